"""A complete AArch64 computer in an emulator: Debian's kernel, Python and sshd on a disk image.

Memory use is realistic; times are not.

    vmlinuz, initrd     the kernel, and the modules for the disk and the network
    disk.img            Debian's arm64 packages, numpy and onnxruntime; never written to
    id, known_hosts     the user's key, which may log in as root, and the host key

It listens on a port of this machine's loopback interface and cannot reach any network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.aarch64.machine import (
    PYTHON,
    VERSIONS,
    checked,
    lay_out_apt,
    pip,
)
from devices import debian
from export.files import new_directory
from export.problem import Problem

TOOLS = {
    "qemu-system-aarch64": "qemu-system-arm",
    "mke2fs": "e2fsprogs",
    "depmod": "kmod",
    "cpio": "cpio",
    "ssh-keygen": "openssh-client",
}
"""Programs that build and run it -> their Debian packages."""
SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
PACKAGES = (f"python{PYTHON}-minimal", f"libpython{PYTHON}-stdlib", "libstdc++6", "openssh-server")
TOOLBOX = "busybox-static"
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "ext4")
DISK_BYTES = 600 << 20
BOOT_S, LOGIN_S = 300, 30
NETWORK = "Debian's packages and the Python package index are needed; check the network"

FIRST = """#!/bin/busybox sh
export PATH=/bin
busybox mkdir -p /proc /sys /dev /disk
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
while read module; do busybox insmod /modules/$module; done < /modules/order
busybox mount -t ext4 /dev/vda /disk
for place in proc sys dev; do busybox mount --move /$place /disk/$place; done
exec busybox switch_root /disk /sbin/init
"""
"""The init script of the initial memory disk, which mounts the real disk and continues there."""
SECOND = """#!/bin/busybox sh
export PATH=/usr/bin:/usr/sbin
busybox mount -t tmpfs tmpfs /run
busybox mount -t tmpfs tmpfs /tmp
busybox mkdir -p /dev/pts /run/sshd
busybox mount -t devpts devpts /dev/pts
busybox ip link set lo up
busybox ip address add 127.0.0.1/8 dev lo
busybox ip link set eth0 up
busybox ip address add 10.0.2.15/24 dev eth0
exec /usr/sbin/sshd -D -e
"""
SSHD = """HostKey /etc/ssh/host
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""
USERS = "root:x:0:0:root:/root:/bin/sh\nsshd:x:105:65534::/run/sshd:/usr/sbin/nologin\n"
GROUPS = "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"


def build(place: Path) -> None:
    """Build the computer into a folder, once per version of constraints.txt and this file.

    Raises Problem for a missing tool or package.
    """
    for tool, package in TOOLS.items():
        if shutil.which(tool, path=SBIN) is None:
            raise Problem(f"{tool} is not installed", f"install it: sudo apt-get install {package}")
    made_of = VERSIONS.read_bytes() + Path(__file__).read_bytes()
    stamp = place / "made-of"
    if stamp.is_file() and stamp.read_bytes() == made_of:
        return
    shutil.rmtree(place, ignore_errors=True)
    with new_directory(place) as new:
        fetched = new / "fetched"
        fetch(fetched)
        (new / "root").mkdir()
        unpack(fetched, new / "root")
        keys(new)
        settle(new, new / "root")
        boot_files(new, new / "root")
        disk(new / "root", new / "disk.img")
        for folder in (fetched, new / "root"):
            shutil.rmtree(folder)
        (new / "made-of").write_bytes(made_of)


def fetch(folder: Path) -> None:
    """Download packages with their dependencies, the kernel, and wheels."""
    env = {"APT_CONFIG": str(lay_out_apt(folder, "".join(debian.source_files())))}
    checked(["apt-get", "update", "-qq"], NETWORK, env)
    archives = folder / "archives"
    (archives / "partial").mkdir(parents=True)
    install = ["apt-get", "install", "-qq", "--yes", "--download-only", "--no-install-recommends"]
    checked([*install, "-o", f"Dir::Cache::archives={archives}", *PACKAGES], NETWORK, env)
    listed = checked(["apt-cache", "depends", "linux-image-arm64"], NETWORK, env)
    kernel = next(word for word in listed.split() if word.startswith("linux-image-6"))
    download = ["sh", "-c", 'cd "$0" && exec apt-get download -qq "$@"', str(archives)]
    checked([*download, kernel, TOOLBOX], NETWORK, env)
    checked(pip(folder), NETWORK)


def unpack(fetched: Path, root: Path) -> None:
    """Unpack packages and wheels; their scripts are not run."""
    for package in sorted((fetched / "archives").glob("*.deb")):
        checked(["dpkg-deb", "-x", str(package), str(root)], NETWORK)
    for wheel in fetched.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root / "usr/lib/python3/dist-packages")


def keys(place: Path) -> None:
    """Create the keys of the computer and of the user."""
    for name in ("host", "id"):
        made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(place / name)]
        checked(made, "install openssh-client")


def settle(place: Path, root: Path) -> None:
    """Set up what the packages' scripts would: users, a shell, python3, sshd's settings."""
    (root / "etc/passwd").write_text(USERS, encoding="ascii")
    (root / "etc/group").write_text(GROUPS, encoding="ascii")
    (root / "etc/shadow").write_text("root:*:19000:0:99999:7:::\n", encoding="ascii")
    (root / "etc/ssh/sshd_config").write_text(SSHD, encoding="ascii")
    (root / "sbin/init").write_text(SECOND, encoding="ascii")
    (root / "sbin/init").chmod(0o755)
    for name in ("sh", "true"):
        link(root / "bin" / name, "busybox")
    link(root / "usr/bin/python3", f"python{PYTHON}")
    for name in ("proc", "sys", "dev", "run", "tmp", "root/.ssh"):
        (root / name).mkdir(parents=True, exist_ok=True)
    shutil.move(place / "host", root / "etc/ssh/host")
    shutil.copy(place / "id.pub", root / "root/.ssh/authorized_keys")
    for private in (root / "root", root / "root/.ssh", root / "etc/ssh/host"):
        private.chmod(0o700 if private.is_dir() else 0o600)


def link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def boot_files(place: Path, root: Path) -> None:
    """Move the kernel out of the root and build the initial memory disk."""
    (modules,) = (root / "lib/modules").iterdir()
    shutil.move(root / "boot" / f"vmlinuz-{modules.name}", place / "vmlinuz")
    first = place / "first"
    for name in ("bin", "modules"):
        (first / name).mkdir(parents=True)
    shutil.copy(root / "bin/busybox", first / "bin/busybox")
    checked(["depmod", "-b", str(root), modules.name], "install kmod")
    show = ["modprobe", "-d", str(root), "-S", modules.name, "--show-depends"]
    lines = [line for name in MODULES for line in checked([*show, name], "").splitlines()]
    needed = dict.fromkeys(Path(line.split()[1]) for line in lines if line.startswith("insmod"))
    for path in needed:
        shutil.copy(path, first / "modules")
    order = "".join(f"{path.name}\n" for path in needed)
    (first / "modules/order").write_text(order, encoding="ascii")
    (first / "init").write_text(FIRST, encoding="ascii")
    (first / "init").chmod(0o755)
    pack = 'cd "$0" && find . | cpio --quiet -o -H newc > "$1"'
    checked(["sh", "-c", pack, str(first), str(place / "initrd")], "install cpio")
    shutil.rmtree(first)
    shutil.rmtree(root / "lib/modules")


def disk(root: Path, out: Path) -> None:
    """Create a file system image with the folder's files, owned by root."""
    made = ["mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", "-d", str(root), str(out)]
    checked([*made, f"{DISK_BYTES >> 10}k"], "install e2fsprogs")


# ----------------------------------------------------------------------------------- running it


@contextmanager
def booted(place: Path, port: int, cpu: str, memory_bytes: int, cores: int) -> Iterator[None]:
    """Run the computer inside the block; its sshd answers on a port of this machine."""
    console = place / f"console-{port}"
    argv = command(place, port, cpu, memory_bytes, cores)
    with console.open("wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_for(process, place, port, console)
        yield
    finally:
        process.kill()
        process.wait()
        for own in (console, *place.glob(f"*-{port}")):
            own.unlink(missing_ok=True)


def command(place: Path, port: int, cpu: str, memory_bytes: int, cores: int) -> Sequence[str]:
    network = f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"
    return [
        *("qemu-system-aarch64", "-M", "virt", "-cpu", cpu, "-smp", str(cores)),
        *("-m", f"{memory_bytes >> 20}M", "-accel", "tcg,thread=multi"),
        *("-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"),
        *("-kernel", str(place / "vmlinuz"), "-initrd", str(place / "initrd")),
        *("-append", "console=ttyAMA0 quiet panic=-1"),
        *("-drive", f"if=none,id=disk,file={place / 'disk.img'},format=raw,snapshot=on"),
        *("-device", "virtio-blk-pci,drive=disk"),
        *("-netdev", network, "-device", "virtio-net-pci,netdev=net,romfile="),
        *("-device", "virtio-rng-pci"),
    ]


def wait_for(process: subprocess.Popen[bytes], place: Path, port: int, console: Path) -> None:
    """Wait until ssh can log in. Raises Problem with the console's last line if it cannot."""
    deadline = time.monotonic() + BOOT_S
    login = ["ssh", "-F", str(ssh_config(place, port)), "-o", "BatchMode=yes", "computer", "true"]
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                login, stdin=subprocess.DEVNULL, capture_output=True, timeout=2 * LOGIN_S
            )
            if done.returncode == 0:
                return
        time.sleep(0.5)
    lines = console.read_text(errors="replace").strip().splitlines() or ["no output"]
    ended = process.poll()
    what = f"did not answer within {BOOT_S} s" if ended is None else f"ended with exit code {ended}"
    raise Problem(
        f"the emulated computer {what} ({lines[-1]})", "delete build/aarch64/system to rebuild it"
    )


def ssh_config(place: Path, port: int) -> Path:
    """Write an ssh configuration for the host name `computer` and return its path."""
    kind, key, *_ = (place / "host.pub").read_text(encoding="ascii").split()
    known = place / f"known_hosts-{port}"
    known.write_text(f"[127.0.0.1]:{port} {kind} {key}\n", encoding="ascii")
    config = place / f"ssh_config-{port}"
    options = {
        "HostName": "127.0.0.1",
        "Port": port,
        "User": "root",
        "IdentityFile": f'"{place / "id"}"',
        "IdentitiesOnly": "yes",
        "UserKnownHostsFile": f'"{known}"',
        "ConnectTimeout": LOGIN_S,
    }
    lines = [f"  {name} {value}\n" for name, value in options.items()]
    config.write_text("".join(["Host computer\n", *lines]), encoding="utf-8")
    return config
