"""Description and state of a Mac, from tools of macOS that need no password.

Standard library only. A missing tool or unknown output reads "unavailable". Temperature and clock
of an Apple processor are not available without root. power_w is the power of processor, GPU and
Neural Engine, where `sudo -n powermetrics` is allowed.
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
"""sysctl's name of a CPU feature -> Linux's name, as in host.ISA_FEATURES."""

NAMES = (
    *("hw.model", "machdep.cpu.brand_string", "hw.memsize"),
    *("hw.perflevel0.physicalcpu", "hw.perflevel1.physicalcpu", "sysctl.proc_translated"),
    *ISA,
)
POWERMETRICS = ("sudo", "-n", "powermetrics", "--samplers", "cpu_power", "-n", "1", "-i")
PATIENCE_S = 5


def describe() -> dict:
    """Return the entries of host.describe() that come from other sources than on Linux."""
    values = sysctl(NAMES)
    return {
        "model": values.get("hw.model", UNAVAILABLE),
        "cpu": values.get("machdep.cpu.brand_string", UNAVAILABLE),
        "isa": [name for key, name in ISA.items() if values.get(key) == "1"] or UNAVAILABLE,
        "performance_cores": count(values.get("hw.perflevel0.physicalcpu", "")),
        "efficiency_cores": count(values.get("hw.perflevel1.physicalcpu", "")),
        "memory_bytes": count(values.get("hw.memsize", "")),
        "os": system(output_of("sw_vers")),
        "power_source": source(output_of("pmset", "-g", "batt")),
        "emulated": values.get("sysctl.proc_translated") == "1",  # by Rosetta
        **readings(),
    }


def readings() -> dict:
    """Return one telemetry sample; it takes a quarter of a second if powermetrics is allowed."""
    batteries = output_of("pmset", "-g", "batt")
    return {
        "temperature_c": UNAVAILABLE,
        "frequency_hz": UNAVAILABLE,
        "throttled": warnings(output_of("pmset", "-g", "therm")),
        "battery_share": share(batteries),
        "battery_temperature_c": UNAVAILABLE,
        "charging": UNAVAILABLE if not batteries else "'AC Power'" in batteries,
        "power_w": watts(output_of(*POWERMETRICS, "200")) if has_powermetrics() else UNAVAILABLE,
        "load_average": os.getloadavg()[0],
    }


def output_of(*words: str) -> str:
    """Return a tool's output; nothing if the tool is missing or too slow."""
    import subprocess

    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    try:
        done = subprocess.run(words, stdin=null, stdout=pipe, stderr=null, timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")


def sysctl(names: tuple[str, ...]) -> dict[str, str]:
    """Return kernel values by name; unknown names are left out."""
    pairs = (line.partition(": ") for line in output_of("sysctl", *names).splitlines())
    return {name: value.strip() for name, _, value in pairs if value.strip()}


def count(text: str) -> int | str:
    """Return a whole number, or "unavailable"."""
    return int(text) if text.isdecimal() else UNAVAILABLE


def system(text: str) -> str:
    """Return name, version and build of macOS from the output of sw_vers."""
    matches = [re.search(rf"^{name}:\s*(.+)$", text, re.MULTILINE) for name in SW_VERS]
    name, version, build = (match[1].strip() if match else "" for match in matches)
    return f"{name} {version} ({build})" if name and version else UNAVAILABLE


SW_VERS = ("ProductName", "ProductVersion", "BuildVersion")


def warnings(text: str) -> str:
    """Return the output of `pmset -g therm` on one line, without times. It holds warnings, and on
    Intel processors speed limits."""
    lines = (re.sub(r"\s+", " ", AT.sub("", line)) for line in text.splitlines())
    return "; ".join(line.strip() for line in lines if line.strip()) or UNAVAILABLE


AT = re.compile(r"^Note: |^\d{4}-\d\d-\d\d [\d:]+ [+-]\d{4} ")


def share(text: str) -> float | str:
    """Return the battery's charge, 0 to 1."""
    match = re.search(r"\b(\d{1,3})%", text)
    return int(match[1]) / 100 if match else UNAVAILABLE


def source(text: str) -> str:
    """Return the power source."""
    match = re.search(r"drawing from '([^'\n]+)'", text)
    return match[1] if match else UNAVAILABLE


@cache
def has_powermetrics() -> bool:
    """Return whether powermetrics runs without a password; tried once, as refusals are logged."""
    return watts(output_of(*POWERMETRICS, "1")) != UNAVAILABLE


def watts(text: str) -> float | str:
    """Return the combined power of CPU, GPU and Neural Engine in W."""
    match = re.search(r"^Combined Power[^:\n]*:\s*(\d+)\s*mW", text, re.MULTILINE)
    return int(match[1]) / 1000 if match else UNAVAILABLE


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
"""struct rusage_info_v4 of <sys/resource.h>: uint8_t ri_uuid[16], then one uint64_t for each of
these names, there with the prefix ri_."""
USAGE_BYTES = UUID_BYTES + 8 * len(USAGE)


def usage_of(raw: bytes) -> dict[str, int]:
    """Parse a struct rusage_info_v4."""
    return dict(zip(USAGE, struct.unpack_from(f"<{len(USAGE)}Q", raw, UUID_BYTES), strict=True))


def peak_footprint_bytes() -> int | str:
    """Return the peak physical footprint of this process in bytes.

    The footprint counts dirty and compressed pages and the process's GPU pages. Unlike resident
    memory it excludes pages of mapped files.
    """
    buffer = ctypes.create_string_buffer(USAGE_BYTES)
    try:
        failed = ctypes.CDLL(None).proc_pid_rusage(os.getpid(), RUSAGE_INFO_V4, buffer)
    except AttributeError:  # not a Mac
        return UNAVAILABLE
    peak = 0 if failed else usage_of(buffer.raw)["lifetime_max_phys_footprint"]
    return peak or UNAVAILABLE
