"""Description and state of this machine; a missing source reads "unavailable".

Standard library only. Large modules are imported where they are used, because they would count in
every measured memory peak. Tests pass `root`, a folder that stands for the root of a file system.
"""

import ctypes
import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

UNAVAILABLE = "unavailable"
MADV_DONTNEED = 4
M_MMAP_THRESHOLD = -3
LARGE_BLOCK_BYTES = 2**20

ISA_FEATURES = (
    *("neon", "asimd", "fphp", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni"),
    *("avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
)
"""CPU features that select the kernel of a matrix product, by Linux's names."""


def describe(root: str | Path = "/") -> dict:
    """Return model, CPU, cores, features, frequency, temperature, memory and versions."""
    from . import android

    base = Path(root)
    cpuinfo = read(base / "proc/cpuinfo")
    clock = base / "sys/devices/system/cpu/cpu0/cpufreq"
    description = {
        "model": model(base),
        "cpu": cpu_name(cpuinfo),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "isa": isa(cpuinfo),
        "governor": read(clock / "scaling_governor"),
        "frequency_hz": number(read(clock / "scaling_cur_freq"), 1000),  # the file has kHz
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
        from .mac import describe as describe_mac

        description |= describe_mac()
    return description


def emulated(base: Path, machine: str) -> bool:
    """Return whether the CPU is emulated: QEMU's virtual board, or user-mode emulation."""
    return "dummy-virt" in read(base / "proc/device-tree/compatible") or translated(base, machine)


def translated(base: Path, machine: str) -> bool:
    """Return whether the kernel's architecture differs from this program's, as in user-mode QEMU.
    Kernels before 6.1 do not report their architecture; then the answer is False."""
    kernel = read(base / "proc/sys/kernel/arch")
    return kernel != UNAVAILABLE and kind_of_cpu(kernel) != kind_of_cpu(machine)


def kind_of_cpu(machine: str) -> str:
    """Return a machine's 64-bit architecture: a 64-bit kernel also runs 32-bit programs."""
    return re.sub(r"^(i.86|amd64)$", "x86_64", re.sub(r"^arm.*", "aarch64", machine))


def read(path: Path) -> str:
    """Return the text of a small file, or "unavailable"."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return UNAVAILABLE
    return text or UNAVAILABLE


def field(text: str, name: str) -> str:
    """Return the value after `name:` in a /proc file."""
    match = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else UNAVAILABLE


def number(text: str, scale: float) -> float | str:
    """Return the leading number of a text times `scale`; "unavailable" if there is none."""
    match = re.match(r"-?\d+", text)
    return float(f"{int(match[0]) * scale:.12g}") if match else UNAVAILABLE


def model(base: Path) -> str:
    """Return the board's name, from the device tree on ARM boards, from DMI on PCs."""
    name = read(base / "proc/device-tree/model")
    return read(base / "sys/class/dmi/id/product_name") if name == UNAVAILABLE else name


def cpu_name(cpuinfo: str) -> str:
    """Return the CPU's name; for ARM kernels the numbers of implementer and part."""
    name = field(cpuinfo, "model name")
    if name == UNAVAILABLE and (part := field(cpuinfo, "CPU part")) != UNAVAILABLE:
        name = f"implementer {field(cpuinfo, 'CPU implementer')} part {part}"
    return name


def isa(cpuinfo: str) -> list[str] | str:
    """Return the features of ISA_FEATURES that the CPU has."""
    names = ("flags", "Features")
    flags = next((f for name in names if (f := field(cpuinfo, name)) != UNAVAILABLE), None)
    return [name for name in ISA_FEATURES if name in flags.split()] if flags else UNAVAILABLE


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use, given its affinity and container quotas. A quota
    of 1.5 cores counts as 2."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *map(math.ceil, quotas(root))]))


def quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quota, in cores, of each control group of this process and its parents.

    /proc/self/cgroup names the groups. Inside a container its own group is often the visible root.
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
            numbers = read(folder / group / limit).split()
            if limit != "cpu.max":
                numbers += read(folder / group / "cpu.cfs_period_us").split()
            if len(numbers) == 2 and all(text.isdecimal() and int(text) for text in numbers):
                yield int(numbers[0]) / int(numbers[1])


def os_name(release: str) -> str:
    """Return the distribution's name from the text of /etc/os-release."""
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', release, re.MULTILINE)
    return match[1] if match else platform.platform(terse=True)


def load_average(text: str) -> float | str:
    """Return the load average of the last minute."""
    match = re.match(r"[\d.]+", text)
    return float(match[0]) if match else UNAVAILABLE


def throttled() -> str:
    """Return the Raspberry Pi firmware's throttling bits, such as 0x0."""
    match = re.search(r"throttled=(0x[0-9a-fA-F]+)", vcgencmd("get_throttled"))
    return match[1] if match else UNAVAILABLE


def vcgencmd(question: str) -> str:
    """Return the output of the Raspberry Pi firmware's vcgencmd, or "unavailable"."""
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
    """Limit this process to `more_bytes` of data beyond what it uses now, where the system can. On
    a Mac nothing is done: Core ML maps a lot of memory, and what the limit counts is unknown."""
    if sys.platform == "darwin":
        return
    try:
        import resource
    except ImportError:  # Windows
        return
    used = number(field(read(Path("/proc/self/status")), "VmData"), 1024)
    total = more_bytes + (int(used) if not isinstance(used, str) else 0)
    allowed = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = total if allowed == resource.RLIM_INFINITY else min(total, allowed)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, allowed))


def versions(*more: str) -> dict[str, str]:
    """Return the versions of Python, numpy, onnxruntime and more, without importing them."""
    from importlib import metadata

    known = {"python": platform.python_version()}
    for name in ("numpy", "onnxruntime", *more):
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            known[name] = UNAVAILABLE
    return known


def peak_rss_bytes(base: Path = Path("/")) -> int | str:
    """Return this process's peak resident memory in bytes (VmHWM, on a Mac ru_maxrss). Returns
    "unavailable" under user-mode emulation, whose own memory would count."""
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on a Mac
    if translated(base, platform.machine()):
        return UNAVAILABLE
    peak = number(field(read(base / "proc/self/status"), "VmHWM"), 1024)
    return int(peak) if not isinstance(peak, str) else peak


def peak_of_phase(base: Path = Path("/")) -> int | str:
    """Return the peak resident memory since the last call in bytes, and reset the peak. Returns
    "unavailable" if the kernel does not let a process reset its high-water mark."""
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
    """Have glibc return every large block to the system as soon as it is freed.

    By default its threshold for large blocks grows up to 32 MiB with the blocks that are freed, and
    smaller blocks then leave holes in the heap. Without glibc nothing is done.
    """
    if os.name == "posix" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def give_back_memory(places: Sequence["Mapping"]) -> None:
    """Return freed memory, and the pages of mapped files, to the system (Linux only).

    Packing a large weight reads its whole file, of which few rows are needed afterwards; the system
    reads those again on demand. They leave the page cache too: a file that was just written or read
    is cached in blocks of up to 2 MB, and one row would map a whole block.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    unmap_pages(places)
    for place in places:
        with suppress(OSError):  # deleted
            file = os.open(place.path, os.O_RDONLY)
            os.posix_fadvise(file, place.offset, place.size, os.POSIX_FADV_DONTNEED)
            os.close(file)


class Mapping(NamedTuple):
    """Where a part of a file is mapped into this process, in bytes."""

    path: str
    offset: int
    start: int
    size: int


def mapped(folder: Path, maps: Path = Path("/proc/self/maps")) -> list[Mapping]:
    """Return the mappings of files in `folder`; none where the system is not Linux."""
    inside, mappings = f"{folder.resolve()}{os.sep}", []
    for line in maps.read_text().splitlines() if maps.is_file() else []:
        addresses, _, offset, *_, path = line.split(maxsplit=5)
        if path.startswith(inside):
            start, end = (int(address, 16) for address in addresses.split("-"))
            mappings.append(Mapping(path, int(offset, 16), start, end - start))
    return mappings


def unmap_pages(places: Sequence[Mapping]) -> None:
    """Remove the pages of mapped files, which are only read, from this process. They stay in the
    page cache and are mapped again on demand. Every place must still be mapped."""
    for place in places:
        start, size = ctypes.c_void_p(place.start), ctypes.c_size_t(place.size)
        ctypes.CDLL(None).madvise(start, size, MADV_DONTNEED)
