"""A simulated phone with a real adbd, reached over loopback by the system's adb.

adbd runs in its own root folder with Android's paths and fake tools that print a Pixel 8's output.

    python tests/helpers/adbd.py    downloads adbd to build/adbd, once

The packages of adbd come from Debian 13, also on Debian 12, and are only unpacked. Running adbd
needs root, because of its own root folder.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sshd import free_port

from devices import debian

PLACE = Path(__file__).resolve().parents[2] / "build/adbd"
SUITE = "trixie"
PACKAGES = ("adbd", "dash", "coreutils", "qemu-user")
EMULATOR = "usr/bin/qemu-aarch64"
"""Statically linked, so that it runs in the phone's root folder."""
ADBD = "usr/lib/android-sdk/platform-tools/adbd"
LIBRARIES = f"/usr/lib/{os.uname().machine}-linux-gnu/android"
LAUNCH = """
mount -t tmpfs -o size={room} none {root}/data/local/tmp
mount -t proc none {root}/proc
mount -t tmpfs none {root}/sys
cp -r {sys}/. {root}/sys/
for name in null zero urandom; do mount --bind /dev/$name {root}/dev/$name; done
exec chroot {root} /usr/bin/env -i PATH=/usr/bin:/system/bin HOME=/ ADBD_PORT={port} \\
  LD_PRELOAD=/loopback_only.so LD_LIBRARY_PATH={libraries} /{adbd}
"""


def missing() -> str:
    """Return why no adbd can be started here, or an empty string."""
    if os.getuid() != 0:
        return "adbd needs a root of its own, which takes root"
    tools = [name for name in ("adb", "gcc", "unshare") if shutil.which(name) is None]
    if tools or not (PLACE / EMULATOR).is_file():
        return f"{tools[0] if tools else 'adbd'} is not there: make test-devices"
    done = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"])
    return "nothing can be mounted here" if done.returncode else ""


def fetch() -> None:
    """Unpack adbd and its libraries, and an emulator."""
    if (PLACE / EMULATOR).is_file():
        return
    PLACE.parent.mkdir(exist_ok=True)
    work = PLACE.with_name("adbd-new")
    shutil.rmtree(work, ignore_errors=True)
    for name in ("lib", "lib64", "bin", "sbin"):
        (work / "root/usr" / name).mkdir(parents=True)
        (work / "root" / name).symlink_to(f"usr/{name}")
    entries = debian.entries_of(debian.release(), "".join(debian.source_files()))
    newer = [entry.replace(debian.release(), SUITE) for entry in entries]
    architecture = debian.apt(["dpkg", "--print-architecture"]).strip()
    config = debian.lay_out_apt(work, architecture, newer)
    debian.update(config)
    debian.unpack(debian.fetch(PACKAGES, config), work / "root")
    for path in (work / "root/usr/bin").glob("qemu-*"):
        if path.name != Path(EMULATOR).name:
            path.unlink()
    shutil.rmtree(PLACE, ignore_errors=True)
    (work / "root").rename(PLACE)
    shutil.rmtree(work)


class Phone:
    """An adbd, the system's adb with its own server, and the phone's properties."""

    def __init__(self, folder: Path, tools: dict[str, str], files: dict[str, str]) -> None:
        self.folder, self.root, self.sys = folder, folder / "root", folder / "sys"
        shutil.copytree(PLACE, self.root, symlinks=True)
        for name in ("data/local/tmp", "proc", "sys", "dev", "system/bin"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for name in ("null", "zero", "urandom"):
            (self.root / "dev" / name).touch()
        (self.root / "system/bin/sh").symlink_to("/usr/bin/dash")
        for name, script in tools.items():
            (self.root / "system/bin" / name).write_text(f"#!/system/bin/sh\n{script}")
            (self.root / "system/bin" / name).chmod(0o755)
        for name, text in files.items():
            (self.sys / name).parent.mkdir(parents=True, exist_ok=True)
            (self.sys / name).write_text(text)
        shim = [str(Path(__file__).with_name("loopback_only.c")), "-o", f"{self.root}/shim.so"]
        subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", *shim], check=True)
        (self.root / "shim.so").rename(self.root / "loopback_only.so")
        self.port, self.process = free_port(), None
        self.serial = f"127.0.0.1:{self.port}"
        self.env = {"ANDROID_ADB_SERVER_PORT": str(free_port()), "HOME": str(folder)}

    def start(self, room: str = "2g") -> None:
        """Start an empty phone and connect to it."""
        launch = LAUNCH.format(
            root=shlex.quote(str(self.root)),
            room=room,
            sys=shlex.quote(str(self.sys)),
            port=self.port,
            libraries=LIBRARIES,
            adbd=ADBD,
        )
        with (self.folder / "log").open("wb") as log:
            argv = ["unshare", "-m", "sh", "-ec", launch]
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.plug_in()

    def plug_in(self) -> None:
        """Connect adb to the phone."""
        assert self.process is not None
        deadline = time.monotonic() + 60
        while self.adb("-s", self.serial, "get-state") != "device\n":
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, self.adb("devices", "-l")
            self.adb("connect", self.serial)
            time.sleep(0.1)

    def unplug(self) -> None:
        """Disconnect; the phone keeps running."""
        self.adb("disconnect", self.serial)

    def stop(self) -> None:
        """Stop the phone and remove its files."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.unplug()

    def close(self) -> None:
        self.stop()
        self.adb("kill-server")

    def adb(self, *words: str) -> str:
        env = {**os.environ, **self.env}
        done = subprocess.run(["adb", *words], env=env, capture_output=True, text=True, timeout=60)
        return done.stdout

    def says(self, line: str) -> str:
        """Return the output of a command in the phone's shell."""
        return self.adb("-s", self.serial, "shell", "-T", line)


MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
"""The header of an AArch64 program, and the mask of its relevant bits."""


REGISTER = """
mount -t binfmt_misc none /mnt
printf %s "$0" > /mnt/register
echo registered
exec cat
"""


@contextmanager
def arm_programs() -> Iterator[bool]:
    """Have the kernel run AArch64 programs in the emulator; yield whether that works.

    The registration lasts as long as the mount, which is private to the process.
    """
    line = f":edgewhisper-test:M::{MAGIC}:{MASK}:{PLACE / EMULATOR}:F"
    pipe = subprocess.PIPE
    argv = ["unshare", "-m", "sh", "-ec", REGISTER, line]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        yield holder.stdout.readline() == b"registered\n"
        holder.stdin.close()


if __name__ == "__main__":
    try:
        fetch()
    except debian.DeviceProblem as problem:
        sys.exit(f"error: {problem}\ntry:   {problem.hint}")
