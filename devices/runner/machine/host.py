"""What this machine is and in what state: every source may be missing, and then reads so.

Standard library only; its larger parts are imported where they are used, for they would count in
every peak of memory. `root` lets a test lay out a machine of its own under a folder.
"""

import ctypes
import math
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

UNAVAILABLE = "unavailable"
MADV_PAGEOUT = 21
M_MMAP_THRESHOLD = -3
LARGE_BLOCK_BYTES = 2**20

ISA_FEATURES = (
    *("neon", "asimd", "fphp", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni"),
    *("avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
)
"""The CPU features that decide which kernel a matrix product gets, as Linux spells them."""


def describe(root: str | Path = "/") -> dict:
    """Return model, CPU, cores, features, clock, temperature, memory and versions as JSON."""
    from . import android

    base = Path(root)
    cpuinfo = read(base / "proc/cpuinfo")
    clock = base / "sys/devices/system/cpu/cpu0/cpufreq"
    found = {
        "model": model(base),
        "cpu": cpu_name(cpuinfo),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "isa": isa(cpuinfo),
        "governor": read(clock / "scaling_governor"),
        "frequency_hz": number(read(clock / "scaling_cur_freq"), 1000),  # kHz there
        "frequency_max_hz": number(read(clock / "cpuinfo_max_freq"), 1000),
        "temperature_c": number(read(base / "sys/class/thermal/thermal_zone0/temp"), 0.001),
        "throttled": throttled(),
        "load_average": load_average(read(base / "proc/loadavg")),
        "memory_bytes": number(field(read(base / "proc/meminfo"), "MemTotal"), 1024),
        "page_size_bytes": os.sysconf("SC_PAGE_SIZE"),
        "os": os_name(read(base / "etc/os-release")),
        "kernel": f"{platform.system()} {platform.release()}",
        "runtime": versions(),
        "emulated": emulated(base, platform.machine()),
        **(android.describe(base) if android.here(base) else {}),
    }
    if sys.platform == "darwin":
        from .mac import describe as of_a_mac

        found |= of_a_mac()
    return found


def emulated(base: Path, machine: str) -> bool:
    """Say whether the CPU is made of software: on QEMU's own board, or under another kernel."""
    return "dummy-virt" in read(base / "proc/device-tree/compatible") or translated(base, machine)


def translated(base: Path, machine: str) -> bool:
    """Say whether the kernel's CPU is of another kind than this program's, as under qemu-aarch64;
    one before 6.1 does not say its own."""
    kernel = read(base / "proc/sys/kernel/arch")
    return kernel != UNAVAILABLE and kind_of_cpu(kernel) != kind_of_cpu(machine)


def kind_of_cpu(machine: str) -> str:
    """Return the family of a machine's name: one that is 64 bits wide runs 32-bit programs too."""
    return re.sub(r"^(i.86|amd64)$", "x86_64", re.sub(r"^arm.*", "aarch64", machine))


def read(path: Path) -> str:
    """Return a small file's text, or "unavailable"."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return UNAVAILABLE
    return text or UNAVAILABLE


def field(text: str, name: str) -> str:
    """Return what follows `name:` in a /proc file."""
    found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else UNAVAILABLE


def number(text: str, scale: float) -> float | str:
    """Return the leading number of a text, scaled to SI; a source that is missing stays so."""
    found = re.match(r"-?\d+", text)
    return float(f"{int(found[0]) * scale:.12g}") if found else UNAVAILABLE


def model(base: Path) -> str:
    """Return the board's name: device tree on ARM boards, DMI on PCs."""
    name = read(base / "proc/device-tree/model")
    return read(base / "sys/class/dmi/id/product_name") if name == UNAVAILABLE else name


def cpu_name(cpuinfo: str) -> str:
    """Return the CPU's name; ARM kernels give numbers of implementer and part instead."""
    name = field(cpuinfo, "model name")
    if name == UNAVAILABLE and (part := field(cpuinfo, "CPU part")) != UNAVAILABLE:
        name = f"implementer {field(cpuinfo, 'CPU implementer')} part {part}"
    return name


def isa(cpuinfo: str) -> list[str] | str:
    """Return the features of ISA_FEATURES that the CPU has."""
    names = ("flags", "Features")
    found = next((f for name in names if (f := field(cpuinfo, name)) != UNAVAILABLE), None)
    return [name for name in ISA_FEATURES if name in found.split()] if found else UNAVAILABLE


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: affinity or a container's quota can make it fewer
    than the machine has. A quota of one and a half counts as two."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *map(math.ceil, quotas(root))]))


def quotas(root: Path) -> Iterator[float]:
    """Yield the cores' worth of time that each control group of this process allows.

    /proc/self/cgroup names the groups; a limit of a group's parents holds as well. In a container,
    its own group is often the root of what it sees.
    """
    mounted = root / "sys/fs/cgroup"
    for line in read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0":
            folder, limit = mounted, "cpu.max"
        elif "cpu" in controllers.split(","):
            folder, limit = mounted / controllers, "cpu.cfs_quota_us"
            folder = folder if folder.is_dir() else mounted / "cpu"
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        for group in (inside, *inside.parents):
            said = read(folder / group / limit).split()
            if limit != "cpu.max":
                said += read(folder / group / "cpu.cfs_period_us").split()
            if len(said) == 2 and all(text.isdecimal() and int(text) for text in said):
                yield int(said[0]) / int(said[1])


def os_name(release: str) -> str:
    """Return the distribution's name; /etc/os-release is a list of shell assignments."""
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', release, re.MULTILINE)
    return found[1] if found else platform.platform(terse=True)


def load_average(text: str) -> float | str:
    """Return how many threads wanted a core over the last minute: above `cores`, others waited."""
    found = re.match(r"[\d.]+", text)
    return float(found[0]) if found else UNAVAILABLE


def throttled() -> str:
    """Return the Raspberry Pi firmware's throttling bits, such as 0x0."""
    found = re.search(r"throttled=(0x[0-9a-fA-F]+)", vcgencmd("get_throttled"))
    return found[1] if found else UNAVAILABLE


def vcgencmd(question: str) -> str:
    """Return what a Raspberry Pi's firmware answers, or "unavailable"."""
    import shutil
    import subprocess

    tool = shutil.which("vcgencmd")
    if not tool:
        return UNAVAILABLE
    try:
        done = subprocess.run(
            [tool, question],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=5,
            text=True,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired):
        return UNAVAILABLE
    return done.stdout or UNAVAILABLE


def limit_memory(more_bytes: int) -> None:
    """Let this process take so many bytes and no more, where the system can be told so. On a Mac
    nothing is done: what it counts is not known from here, and Core ML maps a lot."""
    if sys.platform == "darwin":
        return
    try:
        import resource
    except ImportError:  # Windows
        return
    taken = number(field(read(Path("/proc/self/status")), "VmData"), 1024)
    wanted = more_bytes + (int(taken) if not isinstance(taken, str) else 0)
    allowed = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = wanted if allowed == resource.RLIM_INFINITY else min(wanted, allowed)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, allowed))


def versions(*more: str) -> dict[str, str]:
    """Return the versions of what computes here, without importing it."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("numpy", "onnxruntime", *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = UNAVAILABLE
    return found


def peak_rss_bytes(base: Path = Path("/")) -> int | str:
    """Return the high-water mark of this process's resident memory (VmHWM, on a Mac ru_maxrss),
    unless an emulator has its own in it."""
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes there
    if translated(base, platform.machine()):
        return UNAVAILABLE
    peak = number(field(read(base / "proc/self/status"), "VmHWM"), 1024)
    return int(peak) if not isinstance(peak, str) else peak


def peak_of_phase(base: Path = Path("/")) -> int | str:
    """Return the peak of resident memory since the last call, and begin a new phase; "unavailable"
    where the kernel does not let a process forget its high-water mark."""
    peak = peak_rss_bytes(base)
    try:
        marks = os.open(base / "proc/self/clear_refs", os.O_WRONLY)
    except OSError:
        return UNAVAILABLE
    try:
        os.write(marks, b"5")
    except OSError:
        return UNAVAILABLE
    finally:
        os.close(marks)
    return peak


def return_large_blocks() -> None:
    """Have glibc return every large block as it is freed, where it would learn to keep them.

    Its own bound of what counts as large grows with the blocks that it sees freed, to 32 MiB: from
    then on they leave holes in its heap. Elsewhere nothing is done.
    """
    if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def give_back_memory(folder: Path, maps: Path = Path("/proc/self/maps")) -> None:
    """Return to the system what was freed, and pages of files mapped from `folder` that can be read
    again: on Linux with glibc; elsewhere nothing is done.

    Packing a large weight reads all of its file, of which only a few rows are needed afterwards.
    """
    if not maps.is_file():  # no Linux
        return
    libc, inside = ctypes.CDLL(None), f"{folder.resolve()}{os.sep}"
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    for line in read(maps).splitlines():
        addresses, *_, name = line.split(maxsplit=5)
        if name.startswith(inside):
            start, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT)
