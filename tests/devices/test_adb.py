"""A phone over ADB: with a fake adb for rare states and answers, and with a real adbd and adb on
loopback (make test-devices)."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import adbd
import pixel
import pytest
from waiting import wait_until

from devices import adb, bundle
from devices.adb import AdbDevice
from devices.agent import MARK
from devices.device import DeviceProblem, Finished, open_device, run_runner

NAME = "0123456789abcdef"
READY = "List of devices attached\n{}\n\n"
ONE = READY.format("8A1X0123\tdevice usb:1-1 product:shiba model:Pixel_8 transport_id:3")
ANSWERS = f"abi=arm64-v8a\nmachine=aarch64\nruntimes={NAME}\n"
HELLO = (MARK + "{}\n").encode()


def raised(of: Callable[[], object]) -> DeviceProblem:
    with pytest.raises(DeviceProblem) as found:
        of()
    assert str(found.value).isprintable() and found.value.hint.isprintable()
    return found.value


class Player:
    """A fake adb on the PATH: `devices`, `push`, a shell command, the agent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for what, said in (("devices", ONE), ("push", ""), ("line", ANSWERS), ("agent", "")):
            self.says(what, said)
        self.says("agent", HELLO, waits=True)
        (folder / "adb").write_text(
            f"#!{sys.executable} -IS\nimport sys, json, pathlib\n"
            f"here, words = pathlib.Path({str(folder)!r}), sys.argv[1:]\n"
            "with (here / 'calls').open('a') as file: file.write(json.dumps(words) + '\\n')\n"
            "what = 'devices' if words[0] == 'devices' else 'push' if words[2] == 'push' else\\\n"
            "    'agent' if 'exec(sys' in words[-1] else 'line'\n"
            "told = json.loads((here / what).read_text())\n"
            "sys.stdout.buffer.write(bytes.fromhex(told['said']))\nsys.stdout.flush()\n"
            "sys.stderr.write(told['words'])\n"
            "if told['waits']: sys.stdin.buffer.read()\n"
            "sys.exit(told['code'])\n"
        )
        (folder / "adb").chmod(0o755)

    def says(
        self, what: str, said: str | bytes, code: int = 0, words: str = "", waits: bool = False
    ) -> None:
        data = said.encode() if isinstance(said, str) else said
        told = {"said": data.hex(), "code": code, "words": words, "waits": waits}
        (self.folder / what).write_text(json.dumps(told))

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def player(tmp_path, monkeypatch) -> Player:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    folder = tmp_path / "cache" / NAME
    folder.mkdir(parents=True)
    (folder / "python").write_bytes(b"x" * 1000)
    monkeypatch.setattr(adb, "bundle", lambda cpu, say: folder)
    (tmp_path / "bin").mkdir()
    return Player(tmp_path / "bin")


# ---------------------------------------------------------------------------------- which phone


@pytest.mark.parametrize(
    "serial",
    ["-s x", "-H", "a b", "a;b", "$(x)", "`x`", "a\nb", "", "a'b", "x" * 200, "../x", "a|b", "é"],
)
def test_malformed_serial_numbers_are_refused_before_adb_runs(player, serial):
    assert "is not a serial number" in str(raised(lambda: AdbDevice(serial)))
    assert player.calls() == []


@pytest.mark.parametrize("serial", ["8A1X0123", "emulator-5554", "192.168.1.7:5555", "[fe80::1]:5"])
def test_adb_gets_the_serial_number_as_one_argument(player, serial):
    player.says("devices", READY.format(f"{serial}\tdevice"))
    with AdbDevice(serial):
        pass
    listing, *others = player.calls()
    assert listing == ["devices", "-l"]
    assert [words[:4] for words in others] == [["-s", serial, "shell", "-T"]] * 2
    assert others[0][4] == adb.PROBE


@pytest.mark.parametrize(
    ("line", "found", "hint"),
    [
        ("8A1X0123 unauthorized usb:1-1", "does not trust this computer yet", "unlock"),
        ("8A1X0123 authorizing usb:1-1", "asking whether to trust", "in a moment"),
        ("8A1X0123 offline usb:1-1", "adb reports it as offline", "adb reconnect offline"),
        (
            "8A1X0123 no permissions (user in plugdev group; are your udev rules wrong?); see [x]",
            "this user may not open it",
            "plugdev",
        ),
        ("8A1X0123 recovery usb:1-1", "its state is recovery", "start Android"),
        ("8A1X0123 bootloader", "its state is bootloader", "start Android"),
    ],
)
def test_a_phone_in_another_state_gets_an_error_message(player, line, found, hint):
    player.says("devices", READY.format(line))
    for serial in (None, "8A1X0123"):
        said = raised(lambda serial=serial: AdbDevice(serial))
        assert str(said).startswith("8A1X0123: ") and found in str(said)
        assert hint in said.hint


def test_with_several_phones_a_serial_number_is_required(player):
    player.says("devices", READY.format("one\tdevice usb:1-1\ntwo\tunauthorized\nthree\toffline"))
    found = raised(AdbDevice)
    assert str(found) == (
        "3 phones are attached: one (device), two (unauthorized), three (offline)"
    )
    assert "--serial" in found.hint
    with AdbDevice("one") as device:
        assert device.address == "one"
    assert "four is not attached; adb lists one (device), two" in str(
        raised(lambda: AdbDevice("four"))
    )


def test_a_missing_phone_or_adb_gets_an_error_message(player, monkeypatch, tmp_path):
    player.says("devices", READY.format(""))
    assert str(raised(AdbDevice)) == "no phone is attached"
    found = raised(lambda: AdbDevice("10.0.0.7:5555"))
    assert "adb lists no phones" in str(found) and "`adb connect 10.0.0.7:5555`" in found.hint
    monkeypatch.setenv("PATH", str(tmp_path))
    found = raised(AdbDevice)
    assert str(found) == "adb cannot be started: No such file or directory"
    assert "apt-get install adb" in found.hint


def test_messages_of_the_starting_daemon_are_not_phones(player):
    start = "* daemon not running; starting now at tcp:5037\n* daemon started successfully\n"
    player.says("devices", start + ONE)
    with AdbDevice() as device:
        assert device.address == "8A1X0123"


@pytest.mark.parametrize(
    "line",
    ["\x1b[2J\tdevice", "a;reboot\tdevice", "-d\tdevice", "\0\tdevice", "x" * 500 + "\tdevice"],
)
def test_a_phone_with_a_hostile_name_is_ignored(player, line):
    player.says("devices", READY.format(line))
    assert str(raised(AdbDevice)) == "no phone is attached"


@pytest.mark.parametrize(
    ("said", "code", "found"),
    [
        ("adb: failed to check server version: \x1b[31mno\n", 1, "exit code 1 (adb: failed to"),
        ("", 1, "exit code 1 (no output)"),
        ("x" * 10_000_000, 0, "adb devices: adb"),
    ],
)
def test_a_failing_adb_devices_gets_an_error_message(player, said, code, found):
    player.says("devices", said, code)
    assert found in str(raised(AdbDevice))


# ------------------------------------------------------------------------------ what it answers


@pytest.mark.parametrize("abi", ["armeabi-v7a", "x86", "riscv64", "\x1b[2J", "arm64-v8a;x"])
def test_a_phone_with_another_cpu_gets_an_error_message(player, abi):
    player.says("line", f"abi={abi}\nmachine=aarch64\n")
    found = str(raised(AdbDevice))
    assert "8A1X0123: its programs are for " in found and "arm64-v8a and x86_64" in found


def test_a_machine_without_getprop_is_asked_for_its_name(player):
    player.says("line", f"abi=\nmachine=x86_64\nruntimes={NAME}\n")
    assert adb.probe("8A1X0123").cpu == bundle.CPUS["x86_64"]


def test_a_foreign_folder_is_refused(player):
    player.says("line", ANSWERS + "foreign=yes\n")
    assert "belongs to another user, or is a link" in str(raised(AdbDevice))
    assert len(player.calls()) == 2


@pytest.mark.parametrize(
    ("said", "code", "found"),
    [
        ("", 0, "adb ended with exit code 0 (no output)"),
        ("error: device '8A1X0123' not found\n", 1, "the connection was lost (error: device"),
        ("error: closed\n", 1, "the connection was lost (error: closed)"),
        ("noise\n" * 100_000, 0, "8A1X0123: adb "),
        ("\xff\xfe\x1b]0;x\x07", 1, "exit code 1"),
    ],
)
def test_unexpected_shell_output_gets_an_error_message(player, said, code, found):
    player.says("line", said, code)
    assert found in str(raised(AdbDevice))


def test_names_listed_by_the_phone_are_not_used_as_paths(player):
    player.says("line", "machine=aarch64\nruntimes=../../x $(x) 0123456789ABCDEF /etc\n")
    assert adb.probe("8A1X0123").runtimes == ()


def test_a_missing_bundle_is_copied_and_named_once_complete(player):
    player.says("line", "machine=aarch64\nruntimes=\n")
    told: list[str] = []
    player.says("agent", HELLO + (MARK + json.dumps(DONE) + "\n").encode(), waits=True)
    with AdbDevice("8A1X0123", "mobile", told.append) as device:
        assert device.sent_bytes == 1000
    home = f"{adb.ROOT}/runtime/{NAME}"
    words = [call[2:] for call in player.calls()[1:]]
    assert words[1] == ["shell", "-T", adb.ROOM]
    assert words[2][0] == "push" and words[2][2] == f"{home}.part"
    assert words[3] == ["shell", "-T", f"sync; mv {home}.part {home}"]
    assert "copying 0 MB to 8A1X0123" in told[0]


def test_a_bundle_that_cannot_import_numpy_gets_an_error_message(player):
    player.says("line", "machine=aarch64\nruntimes=\n")
    done = DONE | {"exit_code": 1, "stderr": "x\nImportError: \x1b dlopen failed\n"}
    player.says("agent", HELLO + (MARK + json.dumps(done) + "\n").encode(), waits=True)
    found = raised(AdbDevice)
    assert str(found) == (
        "8A1X0123: numpy and onnxruntime were copied but cannot be imported there: "
        "ImportError:   dlopen failed"
    )
    assert "devices clean" in found.hint


def test_an_artifact_for_a_newer_runtime_is_refused_before_it_is_copied(player):
    here = {name: metadata.version(name) for name in ("numpy", "onnxruntime")}
    player.says("agent", MARK + json.dumps({"versions": here}) + "\n", waits=True)
    with AdbDevice() as device:
        device.oldest_runtime = here["onnxruntime"]
        device.prepare()
        device.oldest_runtime = "1.99"
        found = raised(lambda: device.push(Path(__file__), "artifact"))
    assert f"needs onnxruntime 1.99 or newer, and this machine copied {here['onnxruntime']}" in str(
        found
    )


DONE = {"exit_code": 0, "ended": "itself", "stdout": "", "stderr": ""}


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("adb: error: failed to copy 'x' to 'y': remote No space left on device\n", "is full"),
        ("adb: error: failed to read copy response: EOF\n", "exit code 1"),
        ("adb: error: device offline\n", "the connection was lost"),
    ],
)
def test_a_partly_copied_bundle_gets_an_error_message_and_is_removed(player, said, found):
    player.says("line", "machine=aarch64\nruntimes=\n")
    player.says("push", said, 1)
    assert found in str(raised(AdbDevice))
    assert player.calls()[-1][-1] == adb.TIDY


@pytest.mark.parametrize(
    ("said", "words", "code", "found"),
    [
        (b"", "sh: python: Permission denied\n", 126, "exit code 126 (sh: python: Permission"),
        (b"sh: no python\n", "", 127, "exit code 127 (sh: no python)"),
        (b"", "error: closed\n", 1, "the connection was lost (error: closed)"),
        (b"\x1b[2J\n" * 50_000, "", 0, "it printed ' [2J '"),
        (b"x" * 200_000, "", 0, "its answer is longer than"),
        ((MARK + "[1]\n").encode(), "", 0, "its answer is not a JSON object"),
        ((MARK + json.dumps({"error": "\x1b]0;x\x07 no"}) + "\n").encode(), "", 0, " ]0;x  no"),
    ],
)
def test_unexpected_answers_of_the_agent_get_error_messages(player, said, words, code, found):
    player.says("agent", said, code, words)
    said_by_it = raised(AdbDevice)
    assert found in str(said_by_it) and str(said_by_it).startswith("8A1X0123: ")


@pytest.mark.parametrize("name", ["../x", "/tmp/x"])
def test_a_phone_cannot_choose_where_its_files_go(player, tmp_path, name):
    files = {"files": [[name, 1]], "folder": True}
    player.says("agent", HELLO + (MARK + json.dumps(files) + "\n").encode() + b"?", waits=True)
    with AdbDevice() as device:
        found = raised(lambda: device.pull("out", tmp_path / "deep/out"))
    assert "is outside the work folder" in str(found)


@pytest.mark.parametrize("options", [[], ["--host", "pi", "--serial", "x"]])
def test_devices_clean_needs_one_device(options, monkeypatch, capsys):
    assert command(["devices", "clean", *options], monkeypatch) == 2
    assert "with --host or with --serial" in capsys.readouterr().err


def command(words: list[str], monkeypatch) -> object:
    """Return the exit code of a command line."""
    from edgewhisper.cli import main

    monkeypatch.setattr(sys, "argv", ["edgewhisper", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


# ---------------------------------------------------------------------------------- a real adbd

FAST, SLOW = 2_914_000, 1_704_000


@pytest.fixture(scope="module")
def switched_on(tmp_path_factory) -> Iterator[adbd.Phone]:
    if why := adbd.missing():
        pytest.skip(why)
    phone = adbd.Phone(
        tmp_path_factory.mktemp("phone"), pixel.tools("x86_64"), pixel.cores(SLOW, FAST)
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in phone.env.items():
            patch.setenv(name, value)
        # kept between test runs
        patch.setenv("XDG_CACHE_HOME", str(adbd.PLACE.with_name("cache")))
        phone.start()
        yield phone
        phone.close()


@pytest.fixture
def arm_phone(switched_on, tmp_path_factory) -> Iterator[adbd.Phone]:
    """A phone with AArch64 programs, which run in an emulator; kernel and adbd are native."""
    tools, cores = pixel.tools("arm64-v8a"), pixel.cores(SLOW, FAST)
    with adbd.arm_programs() as possible:
        if not possible:
            pytest.skip("this kernel takes no programs of other machines (binfmt_misc)")
        found = adbd.Phone(tmp_path_factory.mktemp("arm"), tools, cores)
        found.env = switched_on.env  # both use one adb server
        found.start()
        yield found
        found.stop()


@pytest.fixture
def phone(switched_on) -> adbd.Phone:
    """The phone, reconnected if an earlier test unplugged it."""
    switched_on.plug_in()
    return switched_on


real = pytest.mark.devices
"""Needs root, and once a network for the bundle."""


@pytest.fixture
def few(clips) -> list:
    from benchmarks.speech.clips import read_manifest

    return read_manifest(clips)[:3]


@real
def test_a_bench_gives_the_same_texts_as_here_and_copies_files_once(phone, exported, few, tmp_path):
    from benchmarks import bench

    results = []
    for name in ("mobile", "local", "mobile"):
        began = time.monotonic()
        with open_device(name) as device:
            how = bench.BenchOptions(1, 1)
            prepared = bench.prepare([bench.Candidate(exported)], device, few, how)
            ready_s = time.monotonic() - began
            results.append(bench.measure(prepared)[0])
            sent = getattr(device, "sent_bytes", 0)
    there, here, again = results
    for field in ("texts", "clips_hash", "artifact_hash"):
        assert there[field] == here[field] == again[field]
    for name in ("numpy", "onnxruntime"):
        assert there["versions"][name] == here["versions"][name]
    assert all(time > 0 for time in there["end_to_end_s"])
    assert there["device"]["name"] == "mobile"
    assert there["device"]["model"] == "Google Pixel 8"
    assert there["device"]["plugged"] == "usb" and there["device"]["screen"] == "off"
    assert sent == 0
    print(f"the second one was ready after {ready_s:.2f} s")
    assert phone.says(f"ls {adb.ROOT}/work") == ""


@real
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_same_clips_give_the_same_tokens_there_and_here(
    phone, digits, processor, few, tmp_path, precision
):
    from benchmarks.speech.wav import write_clips
    from edgewhisper.whisper import load
    from export.onnx.to_onnx import export_onnx

    export_onnx(load(digits), processor, tmp_path / "artifact", precision)
    (tmp_path / "clips").mkdir()
    write_clips(few, tmp_path / "clips")
    there, here = (tokens(name, tmp_path) for name in ("mobile", "local"))
    assert there == here
    assert all(any(clip) for clip in here)


@real
def test_a_phone_with_arm_programs_gives_the_same_tokens(
    arm_phone, digits, processor, few, tmp_path
):
    from benchmarks.speech.wav import write_clips
    from edgewhisper.whisper import load
    from export.onnx.to_onnx import export_onnx

    export_onnx(load(digits), processor, tmp_path / "artifact", "int8")
    (tmp_path / "clips").mkdir()
    write_clips(few[:2], tmp_path / "clips")
    with open_device("mobile", arm_phone.serial) as device:
        facts = device.describe()
        assert (facts["architecture"], facts["emulated"]) == ("aarch64", True)
    there = tokens("mobile", tmp_path, arm_phone.serial)
    assert there == tokens("local", tmp_path)
    assert all(any(clip) for clip in there)


def tokens(name: str, folder: Path, serial: str | None = None) -> list[list[list[int]]]:
    from devices.device import RUNNER

    with open_device(name, serial) as device:
        device.push(RUNNER, "runner")
        device.push(folder, "given")
        argv = ["check", "given/artifact", "given/clips/clips.json", "--threads", "1"]
        answer: list[list[list[int]]] = run_runner(device, argv)["tokens"]
    return answer


@real
def test_fast_cores_are_used_and_set_the_default_thread_count(phone, exported, few):
    from benchmarks import bench

    if not {0, 1} <= os.sched_getaffinity(0):
        pytest.skip("this process may not use the first two cores")
    with open_device("mobile") as device:
        prepared = bench.prepare([bench.Candidate(exported)], device, few, bench.BenchOptions())
    facts = prepared.known[0]["device"]
    assert (prepared.options.threads, facts["cores"], facts["pinned_to"]) == (1, 1, [1])
    assert facts["core_frequencies_max_hz"] == [1000.0 * SLOW, 1000.0 * FAST]


@real
def test_arguments_exit_codes_and_bytes_are_passed_unchanged(phone, tmp_path, rng):
    words = ["a b", "$HOME", "$(touch x)", "`x`", "; rm x", "'", '"', "*", "", "-x", "--", "a\nb"]
    words += ["".join(map(chr, rng.integers(1, 0x300, 20))) for _ in range(20)]
    data = rng.bytes(int(rng.integers(1, 3_000_000)))
    (tmp_path / "in").write_bytes(data)
    with AdbDevice(phone.serial) as device:
        say = [device.python, "-c", "import sys, json; print(json.dumps(sys.argv[1:]))"]
        assert json.loads(device.run([*say, *words]).stdout) == words
        fail = [device.python, "-c", "import sys; sys.stderr.write('no'); sys.exit(5)"]
        assert device.run(fail) == Finished(5, "", "no")
        device.push(tmp_path / "in", "$(touch x)/a b")
        device.pull("$(touch x)/a b", tmp_path / "out")
        assert "is outside" in str(raised(lambda: device.push(tmp_path / "in", "../x")))
    assert (tmp_path / "out").read_bytes() == data


@real
def test_unplugging_during_a_push_gets_an_error_message(phone, tmp_path, rng, monkeypatch):
    (tmp_path / "large").write_bytes(rng.bytes(30_000_000))
    with AdbDevice(phone.serial) as device:
        send, sent = device.link.send, [0]

        def cut(data: bytes) -> None:
            send(data)
            before, sent[0] = sent[0], sent[0] + len(data)
            if before < 10_000_000 <= sent[0]:
                phone.unplug()

        monkeypatch.setattr(device.link, "send", cut)
        found = raised(lambda: device.push(tmp_path / "large", "large"))
    assert str(found).startswith(f"{phone.serial}: the connection was lost (")
    phone.plug_in()
    wait_until(lambda: phone.says(f"ls {adb.ROOT}/work") == "")
    with AdbDevice(phone.serial) as device:
        device.push(tmp_path / "large", "large")
        assert device.sent_bytes == 30_000_000


@real
def test_unplugging_during_a_run_ends_it(phone):
    with AdbDevice(phone.serial) as device:
        code = "import time; open('/data/local/tmp/began', 'w'); time.sleep(60)"
        found: list[DeviceProblem] = []
        run = threading.Thread(
            target=lambda: found.append(raised(lambda: device.run([device.python, "-c", code])))
        )
        run.start()
        wait_until(lambda: "began" in phone.says("ls /data/local/tmp"))
        phone.unplug()
        run.join(60)
    assert "the connection was lost (" in str(found[0]) and "plug it in again" in found[0].hint
    phone.plug_in()
    wait_until(lambda: phone.says(f"ls {adb.ROOT}/work") == "")
    with AdbDevice(phone.serial) as device:
        assert device.run([device.python, "-c", "print(1)"]).stdout == "1\n"


@real
def test_a_killed_agent_is_reported(phone):
    with AdbDevice(phone.serial) as device:
        code = "import os; os.kill(os.getppid(), 9)"
        found = raised(lambda: device.run([device.python, "-c", code]))
    assert "the interpreter there ended with exit code 137" in str(found)
    assert "memory" in found.hint


@real
def test_devices_clean_removes_everything(phone, tmp_path, monkeypatch, capsys):
    (tmp_path / "a").write_bytes(b"x" * 2_000_000)
    with AdbDevice(phone.serial) as device:
        device.push(tmp_path / "a", "a")
    assert command(["devices", "clean", "--serial", phone.serial], monkeypatch) == 0
    _, size, unit = capsys.readouterr().out.rsplit(" ", 2)
    assert float(size) > 100 and unit == "MB\n"
    assert adb.ROOT.rsplit("/")[-1] not in phone.says("ls /data/local/tmp")


@real
@pytest.mark.parametrize("kind", ["link", "foreign"])
def test_another_users_folder_is_not_touched(phone, kind):
    adb.remove_all(phone.serial)
    made = "ln -s /data X" if kind == "link" else "mkdir X; chown 1234 X"
    phone.says(made.replace("X", adb.ROOT))
    found = raised(lambda: AdbDevice(phone.serial))
    assert "belongs to another user, or is a link" in str(found)
    assert "runtime" not in phone.says(f"ls {adb.ROOT}/")
    phone.says(f"rm -r {adb.ROOT}")


@real
def test_full_storage_gets_an_error_message_and_is_cleaned_up(phone):
    phone.stop()
    phone.start(room="40m")
    try:
        found = raised(lambda: AdbDevice(phone.serial))
        assert "its storage is full" in str(found)
        assert phone.says("ls /data/local/tmp") == ""
    finally:
        phone.stop()
        phone.start()


@real
def test_a_truncated_bundle_is_copied_again(phone):
    adb.remove_all(phone.serial)
    unplug = threading.Thread(
        target=lambda: (wait_until(lambda: ".part" in runtimes(phone)), phone.unplug())
    )
    unplug.start()
    found = raised(lambda: AdbDevice(phone.serial))
    unplug.join()
    assert phone.serial in str(found)
    phone.plug_in()
    with AdbDevice(phone.serial) as device:
        assert device.sent_bytes > 50_000_000
    assert ".part" not in runtimes(phone)


def runtimes(phone: adbd.Phone) -> str:
    return phone.says(f"ls {adb.ROOT}/runtime")
