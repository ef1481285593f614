"""What a Mac says about itself, by the tools that come with macOS; nothing of it needs a password.

Standard library only. A tool that is missing, or that says something else, reads "unavailable":
without root no temperature and no clock of an Apple processor is to be had. power_w is that of
processor, GPU and Neural Engine, where `sudo -n powermetrics` is allowed to tell it.
"""

import ctypes
import os
import re
import struct
from functools import cache

from .host import UNAVAILABLE

ISA = {
    "hw.optional.arm.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
}
"""sysctl's name of a CPU feature -> Linux' own, which machine.py tells."""

NAMES = (
    *("hw.model", "machdep.cpu.brand_string", "hw.memsize"),
    *("hw.perflevel0.physicalcpu", "hw.perflevel1.physicalcpu", "sysctl.proc_translated"),
    *ISA,
)
POWERMETRICS = ("sudo", "-n", "powermetrics", "--samplers", "cpu_power", "-n", "1", "-i")
PATIENCE_S = 5


def describe() -> dict:
    """Return the fields of machine.describe() that are told otherwise here than on Linux."""
    found = sysctl(NAMES)
    return {
        "model": found.get("hw.model", UNAVAILABLE),
        "cpu": found.get("machdep.cpu.brand_string", UNAVAILABLE),
        "isa": [name for key, name in ISA.items() if found.get(key) == "1"] or UNAVAILABLE,
        "performance_cores": count(found.get("hw.perflevel0.physicalcpu", "")),
        "efficiency_cores": count(found.get("hw.perflevel1.physicalcpu", "")),
        "memory_bytes": count(found.get("hw.memsize", "")),
        "os": system(said("sw_vers")),
        "power_source": source(said("pmset", "-g", "batt")),
        "emulated": found.get("sysctl.proc_translated") == "1",  # by Rosetta
        **readings(),
    }


def readings() -> dict:
    """Return what changes while something runs; a sample of it takes a quarter of a second where
    powermetrics may be asked."""
    batteries = said("pmset", "-g", "batt")
    return {
        "temperature_c": UNAVAILABLE,
        "frequency_hz": UNAVAILABLE,
        "throttled": warnings(said("pmset", "-g", "therm")),
        "battery_share": share(batteries),
        "battery_temperature_c": UNAVAILABLE,
        "charging": UNAVAILABLE if not batteries else "'AC Power'" in batteries,
        "power_w": watts(said(*POWERMETRICS, "200")) if has_powermetrics() else UNAVAILABLE,
        "load_average": os.getloadavg()[0],
    }


def said(*words: str) -> str:
    """Return what a tool prints, nothing where there is none or it takes too long."""
    import subprocess

    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    try:
        done = subprocess.run(words, stdin=null, stdout=pipe, stderr=null, timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")


def sysctl(names: tuple[str, ...]) -> dict[str, str]:
    """Return those values of the kernel that there are; it goes on behind a name it lacks."""
    pairs = (line.partition(": ") for line in said("sysctl", *names).splitlines())
    return {name: value.strip() for name, _, value in pairs if value.strip()}


def count(text: str) -> int | str:
    """Return a number, where it is one."""
    return int(text) if text.isdecimal() else UNAVAILABLE


def system(text: str) -> str:
    """Return name, version and build: sw_vers has a line of each."""
    found = [re.search(rf"^{name}:\s*(.+)$", text, re.MULTILINE) for name in SW_VERS]
    name, version, build = (match[1].strip() if match else "" for match in found)
    return f"{name} {version} ({build})" if name and version else UNAVAILABLE


SW_VERS = ("ProductName", "ProductVersion", "BuildVersion")


def warnings(text: str) -> str:
    """Return `pmset -g therm` on one line: warnings, and on Intel's processors speed limits. When
    it was asked is left out, so that what is the same reads the same."""
    lines = (re.sub(r"\s+", " ", AT.sub("", line)) for line in text.splitlines())
    return "; ".join(line.strip() for line in lines if line.strip()) or UNAVAILABLE


AT = re.compile(r"^Note: |^\d{4}-\d\d-\d\d [\d:]+ [+-]\d{4} ")


def share(text: str) -> float | str:
    """Return how full the battery is, 0 to 1."""
    found = re.search(r"\b(\d{1,3})%", text)
    return int(found[1]) / 100 if found else UNAVAILABLE


def source(text: str) -> str:
    """Return where the power comes from."""
    found = re.search(r"drawing from '([^'\n]+)'", text)
    return found[1] if found else UNAVAILABLE


@cache
def has_powermetrics() -> bool:
    """Say whether it runs without a password; asked once, for each refusal goes into a log."""
    return watts(said(*POWERMETRICS, "1")) != UNAVAILABLE


def watts(text: str) -> float | str:
    """Return the power of all parts of the processor."""
    found = re.search(r"^Combined Power[^:\n]*:\s*(\d+)\s*mW", text, re.MULTILINE)
    return int(found[1]) / 1000 if found else UNAVAILABLE


# ----------------------------------------------------------------------------------------- memory

RUSAGE_INFO_V4 = 4
UUID_BYTES = 16
USAGE = (
    *("user_time", "system_time", "pkg_idle_wkups", "interrupt_wkups", "pageins", "wired_size"),
    *("resident_size", "phys_footprint", "proc_start_abstime", "proc_exit_abstime"),
    *("child_user_time", "child_system_time", "child_pkg_idle_wkups", "child_interrupt_wkups"),
    *("child_pageins", "child_elapsed_abstime", "diskio_bytesread", "diskio_byteswritten"),
    *("cpu_time_qos_default", "cpu_time_qos_maintenance", "cpu_time_qos_background"),
    *("cpu_time_qos_utility", "cpu_time_qos_legacy", "cpu_time_qos_user_initiated"),
    *("cpu_time_qos_user_interactive", "billed_system_time", "serviced_system_time"),
    *("logical_writes", "lifetime_max_phys_footprint", "instructions", "cycles"),
    *("billed_energy", "serviced_energy", "interval_max_phys_footprint", "runnable_time"),
)
"""struct rusage_info_v4 of <sys/resource.h>: uint8_t ri_uuid[16], then a uint64_t for each of
these, whose names there begin with ri_."""
USAGE_BYTES = UUID_BYTES + 8 * len(USAGE)


def usage_of(raw: bytes) -> dict[str, int]:
    """Return the numbers of a struct rusage_info_v4."""
    return dict(zip(USAGE, struct.unpack_from(f"<{len(USAGE)}Q", raw, UUID_BYTES), strict=True))


def peak_footprint_bytes() -> int | str:
    """Return the most that this process has ever made the system pay for: dirty and compressed
    pages, and those of the GPU that are its own; pages of files count in resident memory only."""
    buffer = ctypes.create_string_buffer(USAGE_BYTES)
    try:
        failed = ctypes.CDLL(None).proc_pid_rusage(os.getpid(), RUSAGE_INFO_V4, buffer)
    except AttributeError:  # no Mac
        return UNAVAILABLE
    peak = 0 if failed else usage_of(buffer.raw)["lifetime_max_phys_footprint"]
    return peak or UNAVAILABLE
