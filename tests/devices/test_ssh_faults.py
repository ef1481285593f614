"""A device over SSH that loses its connection, is full, or lacks what the runner needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sshd
from ssh_devices import alive, connect, python, real
from waiting import wait_until
from wheels_for_pip import raised

from devices import connection
from devices.ssh import SshDevice


def far_process(device: SshDevice) -> str:
    """Return the agent's process id."""
    return device.run(python("import os; print(os.getppid())")).stdout.strip()


@real
def test_an_interrupted_push_leaves_no_partial_files(server, tmp_path, rng, monkeypatch):
    (tmp_path / "a").write_bytes(rng.bytes(1000))
    (tmp_path / "large").write_bytes(rng.bytes(3_000_000))
    with connect() as device:
        far = far_process(device)
        send, sent = device.link.send, []

        def cut(data: bytes) -> None:
            send(data)
            sent.append(len(data))
            if sum(sent) > 1_000_000:
                device.link.process.kill()

        monkeypatch.setattr(device.link, "send", cut)
        found = raised(lambda: device.push(tmp_path, "artifact"))
    assert "the connection was lost" in str(found)
    wait_until(lambda: not alive(far))
    assert server.working() == [] and server.stored() == 1
    with connect() as device:
        device.push(tmp_path, "artifact")
        assert device.sent_bytes >= 3_000_000
        size = "import os; print(os.path.getsize('artifact/large'))"
        assert device.run(python(size)).stdout == "3000000\n"


@real
def test_a_lost_connection_ends_the_remote_command(server):
    pi = connect()
    threading.Thread(target=after_its_start, args=(server, pi.link.process.kill)).start()
    found = raised(lambda: pi.run(python(NOTES_ITS_PID)))
    assert str(found) == "pi: the connection was lost (ssh was ended by signal 9)"
    wait_until(lambda: server.working() == [])
    assert not alive((server.home / "pid").read_text())
    with connect() as again:
        assert again.run(python("print(1)")).stdout == "1\n"


NOTES_ITS_PID = (
    "import os, time, pathlib; home = pathlib.Path.home()\n"
    "(home / 'x').write_text(str(os.getpid())); (home / 'x').rename(home / 'pid'); time.sleep(60)"
)


def after_its_start(server: sshd.Server, act: Callable[[], object]) -> None:
    wait_until((server.home / "pid").exists)
    act()


@real
def test_ctrl_c_ends_the_remote_command_first(server):
    program = (
        "from devices.ssh import SshDevice\n"
        "with SshDevice('pi') as device:\n"
        f"    device.run(['python3', '-c', {NOTES_ITS_PID!r}])\n"
    )
    root = str(Path(connection.__file__).parent.parent)
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    after_its_start(server, lambda: child.send_signal(signal.SIGINT))
    assert "KeyboardInterrupt" in child.communicate(timeout=60)[1]
    assert server.working() == []
    assert not alive((server.home / "pid").read_text())


@real
def test_a_dead_connection_is_detected(server, monkeypatch):
    alive_options = {"ServerAliveInterval": 1, "ServerAliveCountMax": 1}
    monkeypatch.setattr(connection, "OPTIONS", connection.OPTIONS | alive_options)
    with connect() as device:
        session = next(pid for pid in ancestors(far_process(device)) if is_sshd(pid))
        os.kill(session, signal.SIGSTOP)
        try:
            found = raised(lambda: device.run(python("print(1)")))
        finally:
            os.kill(session, signal.SIGKILL)
    assert "the connection was lost (Timeout, server 127.0.0.1 not responding.)" in str(found)


def ancestors(pid: str) -> Iterator[int]:
    number = int(pid)
    while number > 1:
        yield number
        number = int(Path(f"/proc/{number}/stat").read_text().rsplit(")")[-1].split()[1])


def is_sshd(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().startswith("sshd")


@real
def test_a_killed_agent_is_reported_and_the_next_one_cleans_up(server):
    with connect() as device:
        far = far_process(device)
        found = raised(lambda: device.run(python(f"import os; os.kill({far}, 9)")))
        assert str(found) == "pi: python3 there was killed"
        assert "memory" in found.hint
    (left,) = server.working()
    with connect() as first, connect() as second:
        assert not left.exists()
        assert len(server.working()) == 2  # neither removes the other's work folder
        assert first.run(["python3", "-V"]).stdout == second.run(["python3", "-V"]).stdout


FULL_SOON = "ulimit -f 200"  # limits file sizes, like a full disk


@real
@pytest.mark.parametrize(
    ("far", "words"),
    [
        ({"before": FULL_SOON}, "the disk there is full (File too large)"),
        (
            {"code": "import os\nreal = os.statvfs\nos.statvfs = lambda p: real('/proc')"},
            "3 MB have to be copied, and 0 MB are free there",
        ),
    ],
    ids=["filled-on-the-way", "full"],
)
def test_the_connection_survives_a_full_disk(server, tmp_path, rng, far, words):
    (tmp_path / "large").write_bytes(rng.bytes(3_000_000))
    server.python(**far)
    with connect() as device:
        found = raised(lambda: device.push(tmp_path / "large", "large"))
        assert words in str(found) and "devices clean" in found.hint
        assert server.stored() == 0
        assert device.run(python("print(1)")).stdout == "1\n"


@real
@pytest.mark.parametrize("kind", ["file", "link", "foreign"])
def test_a_foreign_folder_is_refused(server, kind, tmp_path):
    server.private.parent.mkdir()
    if kind == "file":
        server.private.write_text("mine")
    elif kind == "link":
        server.private.symlink_to(tmp_path)
    elif os.getuid() == 0:
        server.private.mkdir(mode=0o777)
        os.chown(server.private, 12345, 12345)
    else:
        pytest.skip("only root can give a folder away")
    found = raised(lambda: SshDevice("pi"))
    wanted = "belongs to user 12345" if kind == "foreign" else "is not a folder"
    assert str(found).startswith(f"pi: {server.private} {wanted}")
    assert list(tmp_path.iterdir()) == []
    assert kind != "foreign" or list(server.private.iterdir()) == []


@real
@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.version_info = (3, 9, 2)", "python3 there is 3.9, and the runner needs"),
        ("import sys, platform; sys.maxsize = 2**31 - 1", "is a 32-bit program"),
        ("import platform; platform.machine = lambda: 'armv7l'", "is a 32-bit program (on armv7l)"),
        ("import os; os.confstr = lambda name: None", "CPython with another C library"),
        ("import platform; platform.system = lambda: 'FreeBSD'", "FreeBSD is not supported"),
    ],
    ids=["old", "32-bit", "armv7l", "musl", "bsd"],
)
def test_an_unsupported_system_is_refused_before_anything_is_copied(server, code, words):
    server.python(code)
    with SshDevice("pi") as device:
        found = raised(lambda: device.push(Path(__file__), "x"))
        assert words in str(found) and found.hint
        assert device.sent_bytes == 0
    assert not server.private.exists()


@real
def test_a_device_without_python_gets_an_error_message(server):
    (server.bin / "python3").unlink()
    found = raised(lambda: SshDevice("pi"))
    assert str(found) == "pi: there is no python3"
    assert "apt-get install python3" in found.hint
