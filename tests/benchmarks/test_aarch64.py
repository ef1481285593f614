"""Instruction counts: the plugin, its marks, the check and the emulated machine."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.aarch64 import __main__ as command
from benchmarks.aarch64 import counts, guest, machine
from benchmarks.aarch64.guest import ENCODER, END, PROMPT, TOKEN
from devices.device import load_profile
from export.problem import Problem

HEADER = command.PLACE / "qemu-plugin.h"
built = pytest.mark.skipif(
    shutil.which("gcc") is None or not HEADER.is_file(),
    reason="gcc or qemu-plugin.h is not there: make aarch64",
)

emulated = pytest.mark.skipif(
    shutil.which("qemu-aarch64") is None or not (command.PLACE / "count.so").is_file(),
    reason="the emulated machine is not built: make aarch64",
)


@pytest.fixture
def work(tmp_path) -> machine.Task:
    return machine.Task(tmp_path, (), seconds=2.0, tokens=3)


@pytest.fixture
def row() -> dict:
    """Return the first stored row."""
    return copy.deepcopy(counts.read(command.KEPT)[0])


def marks_of(stages: list[tuple[int, int, int]], rng) -> str:
    """Return marks of stages (number, instructions, dot products), with random gaps."""
    total, dots, lines = int(rng.integers(10**9)), 0, []
    for number, instructions, products in stages:
        total += int(rng.integers(1000))
        lines.append(f"{number} {total} {dots}")
        total, dots = total + instructions, dots + products
        lines.append(f"{END} {total} {dots}")
    return "\n".join(lines) + "\n"


def rounds(work: machine.Task, rng) -> list[tuple[int, int, int]]:
    """Return random counts for the stages of each round."""
    once = [ENCODER, PROMPT, *[TOKEN] * work.tokens]
    return [
        (number, int(rng.integers(10**9, 10**10)), int(rng.integers(10**6)))
        for number in once * work.rounds
    ]


# ---------------------------------------------------------------------------------------- counts


def test_only_the_stages_of_the_last_round_are_counted(work, rng):
    stages = rounds(work, rng)
    found = counts.counted(marks_of(stages, rng), work, window_s=2.0)
    encoder, prompt, *tokens = stages[len(stages) // 2 :]
    for column, name in ((1, "instructions"), (2, "dot_products")):
        assert found[name] == {
            "encoder_per_s": round(encoder[column] / 2),
            "prompt": prompt[column],
            "token": round(float(np.mean([token[column] for token in tokens]))),
        }


def test_a_guest_that_ended_early_is_detected(work, rng):
    text = marks_of(rounds(work, rng)[:-1], rng)
    with pytest.raises(Problem, match=r"3: 5}.* marks of .*3: 6}"):
        counts.counted(text, work, window_s=2.0)


@pytest.mark.parametrize("text", ["", "1 2", "1 9 0\n0 8 0\n", "one two three\n"])
def test_invalid_marks_are_refused(text):
    with pytest.raises(Problem, match="marks cannot be read"):
        counts.spans(text)


# ------------------------------------------------------------------------------------------ gate


def test_stored_counts_pass_their_own_check():
    kept = counts.read(command.KEPT)
    counts.judge(kept, kept)
    assert all(row["emulated"] for row in kept)
    assert {row["cpu"] for row in kept} == {"cortex-a72", "cortex-a76"}
    standard = {f"{model}-{precision}" for model, precision, _ in command.STANDARD}
    assert standard <= {row["name"] for row in kept}


@pytest.mark.parametrize("stage", counts.STAGES)
def test_a_count_may_increase_by_one_per_cent(row, stage):
    now = copy.deepcopy(row)
    now["instructions"][stage] = int(row["instructions"][stage] * 1.0099)
    counts.judge([now], [row])
    now["instructions"][stage] = int(row["instructions"][stage] * 1.0111)
    with pytest.raises(Problem) as error:
        counts.judge([now], [row])
    assert f"{row['name']} on {row['cpu']}: {counts.TITLES[stage]}" in str(error.value)
    assert "1.1% more than" in str(error.value)
    assert "--keep" in error.value.hint


def test_fewer_instructions_and_unknown_artifacts_pass(row):
    fewer = copy.deepcopy(row)
    fewer["instructions"] = {stage: 1 for stage in counts.STAGES}
    counts.judge([fewer], [row])
    counts.judge([row | {"name": "mine"}], [row | {"instructions": fewer["instructions"]}])


def test_the_table_shows_the_largest_change_of_a_stage(row):
    now = copy.deepcopy(row)
    now["instructions"]["prompt"] = round(row["instructions"]["prompt"] * 1.25)
    now["instructions"]["token"] -= 1
    assert counts.change(now, [row | {"cpu": "other"}, row]) == "+25.00%"
    assert counts.change(now | {"tokens": 99}, [row]) == "not stored"


def test_other_tokens_and_fp32_differences_beyond_rounding_fail(row):
    row["against_x86"] |= {"clips": 10, "clips_alike": 9}
    with pytest.raises(Problem, match="1 of 10 clips get other tokens"):
        counts.judge([row], [row])
    row["against_x86"] |= {"clips_alike": 10, "logits": 2e-5}
    counts.judge([row | {"precision": "int8"}], [row])
    with pytest.raises(Problem, match=r"logits differs from x86-64 by 2\.0e-05"):
        counts.judge([row | {"precision": "fp32"}], [row])


def test_storing_replaces_rows_of_the_same_artifact_and_core_only(row, tmp_path):
    place = tmp_path / "kept.jsonl"
    counts.store([row, row | {"name": "other"}], place)
    counts.store([row | {"precision": "fp16"}], place)
    assert [(r["name"], r["precision"]) for r in counts.read(place)] == sorted(
        [(row["name"], "fp16"), ("other", row["precision"])]
    )


@pytest.mark.parametrize("text", ["{}", "nothing", '{"format": 0}', "[]", '{"format": 1}'])
def test_a_file_without_counts_is_refused(text, tmp_path):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(Problem, match="not a file of counts of this version"):
        counts.read(tmp_path / "a.jsonl")


def test_no_emulated_time_is_reported(row):
    (found,) = counts.table_rows([row])
    assert "emulated" in " ".join(found)
    assert not any("ms" in title.split() for title in found)


# --------------------------------------------------------------------------------------- outputs


def test_quantised_values_are_compared_after_dequantisation(rng):
    codes = rng.integers(-127, 128, (1, 2, 5, 3)).astype(np.int8)
    scale = rng.random(6).astype(np.float32)
    found = counts.floats({"cross.0.key": codes, "cross.0.key_scale": scale})["cross.0.key"]
    for head in range(2):
        expected = codes[0, head] * scale[3 * head : 3 * head + 3]
        np.testing.assert_array_equal(found[head], expected)


def test_the_guest_does_the_same_work_twice(exported, clips, tmp_path):
    from benchmarks.speech.clips import read_manifest
    from benchmarks.speech.wav import write_clips

    write_clips(read_manifest(clips)[:2], tmp_path)
    work = machine.Task(exported, tuple(sorted(tmp_path.glob("*.wav"))), 1.0, tokens=2)
    first, second = (machine.run_here(work) for _ in range(2))
    off = counts.against(first, second)
    assert (off["encoder"], off["logits"], off["clips"], off["clips_alike"]) == (0, 0, 2, 2)
    assert off["logits_span"] > 1
    assert first.arrays["logits"].shape[0] == 3
    second.arrays["logits"][1, 0] += 0.5
    second.arrays["cross.0.key"][0, 0, 0, 0] += 0.25
    second.tokens[1].append(0)
    off = counts.against(first, second)
    assert off["logits"] == pytest.approx(0.5, rel=1e-3)
    assert off["encoder"] == pytest.approx(0.25, rel=1e-3)
    assert off["clips_alike"] == 1


def test_a_mark_does_nothing_without_the_plugin():
    assert guest.mark(ENCODER) is None


# ------------------------------------------------------------------------------------ the machine


@built
def test_the_plugin_compiles_without_a_warning(tmp_path):
    argv = ["gcc", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-fsyntax-only"]
    subprocess.run([*argv, f"-I{HEADER.parent}", str(machine.SOURCE)], check=True)
    machine.compile_plugin(HEADER.parent, tmp_path / "count.so")
    assert (tmp_path / "count.so").read_bytes()[:4] == b"\x7fELF"


COUNTED = """
import os
def mark(number):
    try: os.getpgid(-7000000 - number)
    except OSError: pass
for times in (1, 1, {more}):
    mark(3)
    for i in range(10000 * times): pass
    mark(0)
"""


@emulated
def test_the_plugin_counts_instructions_between_marks(seed, tmp_path):
    more = 2 + seed % 9
    argv = machine.python(command.PLACE, "cortex-a72", tmp_path, tmp_path / "marks")
    machine.checked([*argv, "-S", "-c", COUNTED.format(more=more)], "", {})
    _, once, often = counts.spans((tmp_path / "marks").read_text())[TOKEN]
    assert often[0] / once[0] == pytest.approx(more, rel=0.05)
    assert once[0] > 10_000
    assert once[1] == often[1] == 0


def test_a_missing_plugin_header_is_reported(tmp_path):
    with pytest.raises(Problem, match=r"gcc (ended with exit code 1|cannot be started)") as error:
        machine.compile_plugin(tmp_path, tmp_path / "count.so")
    assert "install gcc" in error.value.hint


DEB822 = """Types: deb
URIs: http://one
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: http://two
Suites: {other}
Components: main
"""
ONE_LINE = "deb [arch=amd64] http://one bookworm-security main\ndeb http://two {other} main\n"


@pytest.mark.parametrize("form", [DEB822, ONE_LINE], ids=["deb822", "one-line"])
@pytest.mark.parametrize("other", ["trixie", "nodistro", "cloud-sdk-bookworm"])
def test_only_debian_12_is_used_and_with_its_sources(form, other):
    (found,) = machine.debian_sources(form.format(other=other))
    assert "http://one" in found
    assert "deb-src" in found


def test_another_system_is_refused(tmp_path):
    with pytest.raises(Problem, match="Debian 12's packages") as error:
        machine.lay_out_apt(tmp_path, DEB822.replace("bookworm", "trixie"))
    assert "container" in error.value.hint


def test_a_missing_tool_is_named_with_its_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "PLACE", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.main([]) == 1
    message = capsys.readouterr().err
    assert message.startswith(
        "error: qemu-aarch64 is not installed\ntry:   install it: sudo apt-get"
    )


@pytest.mark.parametrize("cpu", machine.CPUS)
def test_the_runner_reads_the_described_core(cpu, tmp_path):
    from devices.runner.machine.host import describe

    for name in ("lib", "usr"):
        (tmp_path / "root" / name).mkdir(parents=True)
    found = describe(machine.describe(tmp_path / "root", cpu, tmp_path / "seen"))
    assert found["cpu"] == f"implementer 0x41 part {machine.CPUS[cpu][0]}"
    assert ("asimddp" in found["isa"]) == (cpu == "cortex-a76")


def test_an_unknown_core_lists_the_known_ones(tmp_path):
    with pytest.raises(Problem, match="'i386'") as error:
        machine.describe(tmp_path, "i386", tmp_path / "seen")
    assert "cortex-a72" in error.value.hint


def test_the_error_of_a_failed_program_has_its_last_line():
    argv = [sys.executable, "-c", "import sys; sys.exit('one\\ntwo')"]
    with pytest.raises(Problem, match=r"exit code 1 \(two\)"):
        machine.checked(argv, "")


# ----------------------------------------------------------------------------------- the profiles


@pytest.mark.parametrize(("profile", "cpu"), [("rpi4", "cortex-a72"), ("rpi5", "cortex-a76")])
def test_a_profile_uses_int8_if_it_takes_fewer_instructions_than_fp32(profile, cpu):
    """Compare whisper-tiny's dimensions with 30 s of audio and 64 tokens."""
    kept = {row["name"]: row for row in counts.read(command.KEPT) if row["cpu"] == cpu}

    def total(precision: str) -> float:
        found = kept[f"{command.RANDOM}-{precision}"]["instructions"]
        return 30 * found["encoder_per_s"] + 64 * found["token"]

    assert load_profile(profile).precision == min(("int8", "fp32"), key=total)
