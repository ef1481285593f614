"""A device over SSH: with a real sshd on loopback, and with a fake ssh for rare states."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sshd
from ssh_devices import alive, connect, python, real
from waiting import wait_until
from wheels_for_pip import raised

from devices import connection
from devices.agent import MARK
from devices.device import Finished, clean, open_device, run_runner
from devices.ssh import SshDevice


@pytest.fixture(scope="module")
def pi(tmp_path_factory) -> Iterator[SshDevice]:
    """A shared connection; tests must leave it unchanged."""
    server = sshd.Server(tmp_path_factory.mktemp("other"))
    server.python()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(connection.CONFIG, str(server.config))
        device = connect("rpi")
    with device:
        yield device
    server.stop()


HOSTILE = [
    "a b",
    "$HOME",
    "$(touch x)",
    "`touch x`",
    "; rm x",
    "'",
    '"',
    "*",
    "",
    "-x",
    "--",
    "a\nb",
]


# ----------------------------------------------------------------------------------------- commands


@real
def test_arguments_reach_the_command_unchanged(pi, rng):
    drawn = ["".join(map(chr, rng.integers(1, 0x300, 20))) for _ in range(20)]
    words = [*HOSTILE, *drawn]
    done = pi.run([*python("import sys, json; print(json.dumps(sys.argv[1:]))"), *words])
    assert json.loads(done.stdout) == words


@real
def test_exit_code_signal_and_stderr_are_returned(pi):
    assert pi.run(python("import sys; sys.stderr.write('no'); sys.exit(5)")) == Finished(
        5, "", "no"
    )
    done = pi.run(python("import os; os.kill(os.getpid(), 9)"))
    assert done == Finished(-9, "", "")
    killed = raised(lambda: run_runner(pi, ["os.kill"], module="no_such_module"))
    assert "rpi: no_such_module ended with exit code 1 (" in str(killed)


@real
def test_a_command_runs_in_a_private_folder_with_a_clean_environment(server):
    pi = connect()
    code = "import os, json; print(json.dumps([os.getcwd(), os.stat('.').st_mode, {**os.environ}]))"
    place, mode, env = json.loads(pi.run(python(code), env={"EXTRA": "$(x)"}).stdout)
    assert Path(place) == server.working()[0]
    assert mode & 0o777 == 0o700 and server.private.stat().st_mode & 0o777 == 0o700
    assert (env["EXTRA"], env["ORT_DISABLE_TELEMETRY"]) == ("$(x)", "1")
    assert "OMP_NUM_THREADS" not in env
    pi.close()
    assert server.working() == []


@real
def test_a_timeout_kills_the_command_and_its_children(pi):
    code = "import os, time; os.fork(); open(f'pid-{os.getpid()}', 'w'); time.sleep(60)"
    found = raised(lambda: pi.run(python(code), timeout_s=1))
    assert str(found) == "pi: python3 did not end within 1 s"
    listing = python("import glob; print(*(name[4:] for name in glob.glob('pid-*')))")
    pids = pi.run(listing).stdout.split()
    assert len(pids) == 2
    wait_until(lambda: not any(alive(pid) for pid in pids))


@real
def test_a_command_with_too_much_output_is_stopped(pi, monkeypatch):
    monkeypatch.setattr("devices.remote.MOST_STDOUT", 100_000)
    found = raised(lambda: pi.run(python("while True: print('x' * 1000)")))
    assert "printed more than 0 MB" in str(found)
    loud = pi.run(python("import sys\nfor _ in range(300): sys.stderr.write('x' * 999 + '\\n')"))
    assert len(loud.stderr) == 1 << 16


@real
def test_a_missing_command_gets_an_error_message(pi):
    assert "nowhere cannot be started: No such file" in str(raised(lambda: pi.run(["nowhere"])))


# -------------------------------------------------------------------------------------------- files


@real
def test_files_and_folders_are_pushed_and_pulled(pi, tmp_path, rng):
    names = ["deep/x.bin", *(f"{word} {n}" for n, word in enumerate(HOSTILE)), "empty"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(rng.bytes(int(rng.integers(300_000))))
    (tmp_path / "in/empty").write_bytes(b"")
    pi.push(tmp_path / "in", "$(touch x)/a b")
    pi.push(tmp_path / "in/deep/x.bin", "y.bin")
    pi.pull("$(touch x)/a b", tmp_path / "out")
    pi.pull("y.bin", tmp_path / "y.bin")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    assert (tmp_path / "y.bin").read_bytes() == (tmp_path / "in/deep/x.bin").read_bytes()


@real
def test_only_changed_files_are_copied(server, tmp_path, rng):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(rng.bytes(1000))
    (tmp_path / "twin").write_bytes((tmp_path / "a").read_bytes())
    sent = []
    for _ in range(2):
        with connect() as device:
            device.push(tmp_path, "artifact")
            sent.append(device.sent_bytes)
    (tmp_path / "b").write_bytes(rng.bytes(10))
    (tmp_path / "a").rename(tmp_path / "other")
    with connect() as device:
        device.push(tmp_path, "artifact")
        assert device.run(python("print(len(open('artifact/b', 'rb').read()))")).stdout == "10\n"
        sent.append(device.sent_bytes)
    assert sent == [3000, 0, 10]


@real
def test_a_truncated_file_is_sent_again(server, tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    for content in (b"abc", b"ab"):
        with connect() as device:
            device.push(tmp_path / "a", "a")
            assert device.sent_bytes == 3
        (kept,) = (server.private / "store").iterdir()
        kept.chmod(0o600)
        kept.write_bytes(content[:2])


@real
@pytest.mark.parametrize("remote", ["../x", "/etc/x", "a/../../x", "a\0b"])
def test_nothing_is_written_outside_the_work_folder(pi, tmp_path, remote):
    (tmp_path / "x").write_text("x")
    for asked in (lambda: pi.push(tmp_path / "x", remote), lambda: pi.pull(remote, tmp_path / "y")):
        assert "is outside the work folder" in str(raised(asked))


@real
def test_missing_files_get_error_messages(pi, tmp_path):
    assert "gone cannot be copied: No such file" in str(
        raised(lambda: pi.push(tmp_path / "gone", "x"))
    )
    assert "there is no file gone" in str(raised(lambda: pi.pull("gone", tmp_path / "x")))


# --------------------------------------------------------------------------------- the connection


@real
def test_a_jump_host_of_the_users_configuration_is_used(server):
    with SshDevice("jump") as device:
        assert device.run(python("print(1)")).stdout == "1\n"


@real
def test_output_of_the_login_shell_is_ignored(server):
    server.python(before="echo Welcome; echo")
    with connect() as device:
        assert device.facts["system"] == "Linux"


@real
def test_unknown_and_changed_host_keys_and_wrong_keys_are_refused(server):
    (server.folder / "changed").write_text(server.key_line("other"))
    server.add("unknown", UserKnownHostsFile="/dev/null")
    server.add("strict", UserKnownHostsFile="/dev/null", StrictHostKeyChecking="yes")
    server.add("changed", UserKnownHostsFile=server.folder / "changed")
    server.add("locked", IdentityFile=server.folder / "other")
    server.add("closed", Port=sshd.free_port())
    said = {
        "unknown": "its host key is unknown",
        "strict": "its host key is unknown",
        "changed": "its host key has changed",
        "locked": "login is refused",
        "closed": "no SSH server is running there",
        "pi.invalid": "there is no host of that name",
    }
    for host, words in said.items():
        found = raised(lambda host=host: SshDevice(host))
        assert str(found) == f"{host}: {words}"
        assert found.hint
    assert "`ssh unknown` once" in raised(lambda: SshDevice("unknown")).hint


@pytest.fixture
def player(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Put a fake ssh on the PATH that prints a given text and ends, or waits."""

    def play(said: bytes = b"", words: str = "", code: int = 255, waits: bool = False) -> Path:
        (tmp_path / "said").write_bytes(said)
        wait = "sys.stdin.buffer.read()" if waits else ""
        (tmp_path / "ssh").write_text(
            f"#!{sys.executable}\nimport sys, json, pathlib\n"
            f"here = pathlib.Path({str(tmp_path)!r})\n"
            "(here / 'argv').write_text(json.dumps(sys.argv))\n"
            "sys.stdout.buffer.write((here / 'said').read_bytes())\nsys.stdout.flush()\n"
            f"sys.stderr.write({words!r})\n{wait}\nsys.exit({code})\n"
        )
        (tmp_path / "ssh").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        return tmp_path / "argv"

    return play


@pytest.mark.parametrize(
    "host",
    ["-oProxyCommand=touch x", "pi@-oX", "a b", "a;b", "$(x)", "`x`", "a\nb", "", "a'b", "x" * 300],
)
def test_malformed_hosts_are_refused_before_ssh_runs(player, host):
    argv = player()
    assert "is not a valid host name" in str(raised(lambda: SshDevice(host)))
    assert not argv.exists()


@pytest.mark.parametrize("host", ["pi", "pi@raspberrypi.local", "ssh://pi@h:22", "fe80::1%eth0"])
def test_ssh_gets_the_same_command_for_every_host(player, host, monkeypatch):
    argv = player()
    monkeypatch.setenv(connection.CONFIG, "a file")
    raised(lambda: SshDevice(host))
    words = json.loads(argv.read_text())[1:]
    assert words[-3:-1] == ["--", host]
    assert words[:2] == ["-F", "a file"]
    assert "BatchMode=yes" in words and not any("StrictHost" in word for word in words)
    assert words[-1] == connection.remote() and words[-1].count("'") == 2


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("ssh: connect to host pi port 22: Connection timed out\n", 255, "it does not respond"),
        ("ssh: connect to host pi port 22: No route to host\n", 255, "it cannot be reached"),
        ("ssh: connect to host pi port 22: Network is unreachable\n", 255, "it cannot be reached"),
        ("ssh: Could not resolve hostname pi: Name or service", 255, "there is no host of that"),
        ("Received disconnect: Too many authentication failures", 255, "after too many keys"),
        ("bash: line 1: python3: command not found\n", 127, "there is no python3"),
        ("SyntaxError: future feature annotations is not defined", 1, "its python3 is too old"),
        ("ModuleNotFoundError: No module named 'json'\n", 1, "parts of the standard library"),
        (
            "a.conf: line 3: Bad \x1b[31mword\n",
            255,
            "exit code 255 (a.conf: line 3: Bad  [31mword)",
        ),
        ("", 1, "ssh ended with exit code 1 (no output)"),
    ],
)
def test_output_of_ssh_becomes_an_error_message(player, words, code, said):
    player(words=words, code=code)
    found = raised(lambda: SshDevice("pi"))
    assert said in str(found) and str(found).startswith("pi: ")
    assert found.hint and "\x1b" not in str(found)


def test_a_missing_ssh_gets_an_error_message(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = raised(lambda: SshDevice("pi"))
    assert str(found) == "ssh cannot be started: No such file or directory"
    assert "openssh-client" in found.hint


def answers(*values: object) -> bytes:
    lines = (value if isinstance(value, bytes) else json.dumps(value).encode() for value in values)
    return b"".join(MARK.encode() + line + b"\n" for line in lines)


HELLO: dict = {}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"x\n" * 50_000, "it printed 'x '"),
        (b"x" * 200_000, "its answer is longer than"),
        (answers(b"[" * 100_000), "its answer is not a JSON object"),
        (answers(b"[1]"), "its answer is not a JSON object"),
        (answers(b"\xff\xfe"), "its answer is not a JSON object"),
        (answers({"error": "\x1b]0;owned\x07 no", "hint": ["\x9b31m"]}), "pi:  ]0;owned  no"),
        (answers({}), "it did not answer within"),
    ],
    ids=["noise", "one-line", "deep", "list", "bytes", "escapes", "nothing-more"],
)
def test_oversized_and_malformed_answers_are_refused(player, monkeypatch, said, words):
    player(said, waits=True)
    monkeypatch.setattr("devices.remote.ANSWER_S", 1)

    def ask() -> None:
        with connect() as device:
            device.ask("clean", 0.5)

    found = raised(ask)
    assert words in str(found)
    assert str(found).isprintable() and found.hint.isprintable()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"missing": ["0" * 64]}, "requested files that were not offered"),
        ({"missing": "all"}, "has no valid missing"),
        ({"missing": [["a"]]}, "requested files that were not offered"),
    ],
)
def test_a_device_gets_only_pushed_files(player, tmp_path, answer, words):
    player(answers(HELLO, answer), waits=True)
    (tmp_path / "x").write_text("x")
    with connect() as device:
        assert words in str(raised(lambda: device.push(tmp_path / "x", "x")))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([["../x", 1]], "is outside the work folder"),
        ([["/tmp/x", 1]], "is outside the work folder"),
        ([["x", 2**40]], "larger than 1 GiB"),
        ([["x", -1], ["y", 1]], "its list of the files of out is malformed"),
        ([["x"]], "its list of the files of out is malformed"),
        ("x", "has no valid files"),
    ],
)
def test_a_device_cannot_choose_where_its_files_go(player, tmp_path, files, words):
    player(answers(HELLO, {"files": files, "folder": True}) + b"?" * 9, waits=True)
    with connect() as device:
        assert words in str(raised(lambda: device.pull("out", tmp_path / "deep/out")))
    assert not (tmp_path / "deep/x").exists()


def test_descriptions_have_no_control_characters(seed):
    hostile = {"model": "Pi\x1b[2J\u202e\x9b\0", "a\nb": ["\r" * 9, 1.5, None], "long": "x" * 10**6}
    found = clean(hostile)
    assert found["model"].split() == ["Pi", "[2J"] and found["a b"] == [" " * 9, 1.5, None]
    assert len(found["long"]) < 3000 and len(clean(list(range(10**5)))) == 200


@pytest.mark.parametrize("python", [None, [], ["3", "13"], [3]])
def test_a_malformed_python_version_gets_an_error_message(player, python):
    player(answers({"python": python, "machine": "aarch64", "system": "Linux"}), waits=True)
    with SshDevice("pi") as device:
        assert "does not say what its python3 is" in str(raised(device.prepare))


def test_a_file_that_vanishes_during_a_push_gets_an_error_message(player, tmp_path, monkeypatch):
    (tmp_path / "x").write_text("x")
    digest = hashlib.sha256(b"x").hexdigest()
    player(answers(HELLO, {"missing": [digest]}), waits=True)
    with connect() as device:
        monkeypatch.setattr(
            "devices.remote.hashed_file", lambda path: (path.unlink(), (digest, 1))[1]
        )
        found = raised(lambda: device.push(tmp_path / "x", "x"))
    assert "x cannot be read: No such file" in str(found)


@real
def test_an_unwritable_target_gets_an_error_message(server, tmp_path):
    (tmp_path / "file").write_text("x")
    with connect() as device:
        device.push(tmp_path / "file", "a/b")
        found = raised(lambda: device.pull("a", tmp_path / "file"))
    assert "file cannot be written: " in str(found)


@real
def test_a_malformed_description_gets_an_error_message(server):
    said = 'case "$*" in *"runner describe"*) printf \'%s\' \'{"model": "x"}\'; exit;; esac'
    server.python(before=said)
    with connect("rpi") as device:
        assert "has no valid emulated" in str(raised(device.describe))


# --------------------------------------------------------------------------------------- the bench


@real
def test_a_bench_gives_the_same_texts_as_here_and_copies_files_once(
    server, exported, clips, monkeypatch
):
    from benchmarks import bench
    from benchmarks.speech.clips import read_manifest

    few = read_manifest(clips)[:3]
    results = []
    for name, host in (("rpi", "pi"), ("local", None)):
        with open_device(name, host) as device:
            results.append(bench.bench(exported, device, few, bench.BenchOptions(1, 1)))
            assert name == "local" or device.sent_bytes > 1_000_000
    there, here = results
    for field in ("texts", "versions", "clips_hash", "artifact_hash", "emulated"):
        assert there[field] == here[field]
    assert there["device"]["name"] == "rpi"
    assert there["device"]["cpu"] == here["device"]["cpu"]
    assert all(time > 0 for time in there["end_to_end_s"])

    class Started(Exception): ...

    monkeypatch.setattr(bench, "run_round", raising(Started))
    with open_device("rpi", "pi") as device, pytest.raises(Started):
        bench.bench(exported, device, few)
    assert device.sent_bytes == 0
    assert server.working() == []


def raising(error: type[Exception]) -> Callable[..., object]:
    def act(*_: object) -> object:
        raise error

    return act


@real
def test_devices_clean_removes_everything(server, tmp_path, monkeypatch, capsys):
    from edgewhisper.cli import main

    (tmp_path / "a").write_bytes(b"x" * 2_000_000)
    with connect() as device:
        device.push(tmp_path / "a", "a")
        with connect() as second:
            assert "is in use by 1 other" in str(raised(second.clean))
    monkeypatch.setattr(sys, "argv", ["edgewhisper", "devices", "clean", "--host", "pi"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().out == f"removed {server.private} from pi: 2.0 MB\n"
    assert not server.private.exists()
