"""The governor and the cores of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_until

from devices.runner.machine import tuning
from devices.runner.problem import RunnerProblem

PROJECT = Path(__file__).parents[3]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and /sys")


def governors(root: Path) -> list[str]:
    places = sorted((root / tuning.CORES).glob("cpu*/cpufreq/scaling_governor"))
    return [place.read_text().strip() for place in places]


@linux
def test_a_governor_is_set_and_restored(pi):
    with tuning.governed(None, pi) as found:
        assert found == "ondemand"
    with tuning.governed("performance", pi) as found:
        assert found == "performance"
        assert governors(pi) == ["performance"] * 4
    assert governors(pi) == ["ondemand"] * 4
    with pytest.raises(KeyboardInterrupt), tuning.governed("performance", pi):
        raise KeyboardInterrupt
    assert governors(pi) == ["ondemand"] * 4


@linux
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_runner_restores_the_governor(pi, end):
    """The whole process group is killed, as the agent does over SSH."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from devices.runner.machine.tuning import governed\n"
        "from devices.runner.measure.telemetry import Sampler\n"
        "with governed('performance', Path(sys.argv[1])) as name:\n"
        "    sampler = Sampler(); print(name, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(pi)],
        cwd=PROJECT,
        stdout=-1,
        text=True,
        start_new_session=True,
    ) as runner:
        assert runner.stdout.readline() == "performance\n"
        assert governors(pi) == ["performance"] * 4
        os.killpg(runner.pid, end)
    wait_until(lambda: governors(pi) == ["ondemand"] * 4)


@linux
def test_a_governor_that_cannot_be_set_is_refused(pi, tmp_path, monkeypatch):
    with (
        pytest.raises(RunnerProblem, match="the governor of this machine cannot be set"),
        tuning.governed("performance", tmp_path / "none"),
    ):
        pass
    with (
        pytest.raises(RunnerProblem, match="cpu0 supports ondemand performance"),
        tuning.governed("turbo", pi),
    ):
        pass
    monkeypatch.setattr(tuning, "writable", lambda path: False)  # root may write anything
    with pytest.raises(RunnerProblem, match=r"may not write .*; it is ondemand$") as error:  # noqa: SIM117
        with tuning.governed("performance", pi):
            pass
    assert "sudo tee" in error.value.hint
    assert governors(pi) == ["ondemand"] * 4


def test_big_cores_have_the_highest_maximum_frequency(pi, tmp_path):
    assert tuning.cores_of("big", pi) == [3]
    assert tuning.cores_of("2,0,2", pi) == [0, 2]
    with pytest.raises(RunnerProblem, match="does not report the maximum frequencies"):
        tuning.cores_of("big", tmp_path / "none")
    for words in ("", "0-1", "1,", "-1", "$(reboot)"):
        with pytest.raises(RunnerProblem, match="not a list of cores"):
            tuning.cores_of(words, pi)


@linux
def test_a_missing_core_is_refused():
    with pytest.raises(RunnerProblem, match="--pin 4000: cores 4000 are not available"):
        tuning.pin("4000")
