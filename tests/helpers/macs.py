"""A simulated Mac: the server of sshd.py with fake macOS tools that print the output of an M1, and
pythons at uv's paths that pretend to run on a Mac (tests/helpers/mac/)."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import sshd

SITE = Path(__file__).parent / "mac"
SYSCTL = {
    "hw.model": "MacBookAir10,1",
    "hw.memsize": "17179869184",
    "machdep.cpu.brand_string": "Apple M1",
    "hw.perflevel0.physicalcpu": "4",
    "hw.perflevel1.physicalcpu": "4",
    "hw.optional.arm.AdvSIMD": "1",
    "hw.optional.arm.FEAT_FP16": "1",
    "hw.optional.arm.FEAT_DotProd": "1",
    "hw.optional.arm.FEAT_I8MM": "0",
    "sysctl.proc_translated": "0",
}
SW_VERS = "ProductName:\t\tmacOS\nProductVersion:\t\t15.5\nBuildVersion:\t\t24F74\n"
BATTERY = (
    "Now drawing from 'Battery Power'\n"
    " -InternalBattery-0 (id=4653155)\t85%; discharging; 4:30 remaining present: true\n"
)
COOL = (
    "Note: No thermal warning level has been recorded\n"
    "Note: No performance warning level has been recorded\n"
    "Note: No CPU power status has been recorded\n"
)
POWER = (
    "*** Sampled system activity (Sat Nov 21 19:00:00 2026 +0000) (201.35ms elapsed) ***\n\n"
    "CPU Power: 4321 mW\nGPU Power: 12 mW\nANE Power: 101 mW\n"
    "Combined Power (CPU + GPU + ANE): 4434 mW\n"
)
REFUSED = "echo 'sudo: a password is required' >&2; exit 1"


def tool(folder: Path, name: str, *lines: str) -> None:
    """Write a shell script that uses only shell builtins: its PATH has no other programs."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)


def prints(text: str) -> str:
    return f"printf %s {shlex.quote(text)}"


def become(server: sshd.Server) -> None:
    """Put the tools on the PATH, and remove python3 from it."""
    (server.bin / "python3").unlink(missing_ok=True)
    cases = [f"{name}) {prints(f'{name}: {value}')}; echo;;" for name, value in SYSCTL.items()]
    cases.append("*) echo \"sysctl: unknown oid '$name'\" >&2; code=1;;")
    loop = ["code=0", "for name; do case $name in", *cases, "esac; done", "exit $code"]
    tool(server.bin, "uname", "echo Darwin")
    tool(server.bin, "sysctl", *loop)
    tool(server.bin, "sw_vers", prints(SW_VERS))
    tool(server.bin, "pmset", f"case $2 in batt) {prints(BATTERY)};; therm) {prints(COOL)};; esac")
    tool(server.bin, "sudo", REFUSED)
    tool(server.bin, "caffeinate", 'echo "$*" >>"$HOME/caffeinated"')


def python(server: sshd.Server, name: str, before: str = ":") -> Path:
    """Return the path of a python in the server's ~/.local/bin."""
    path = f"export PYTHONPATH={SITE}${{PYTHONPATH:+:$PYTHONPATH}}"
    folder = server.home / ".local/bin"
    tool(folder, name, before, path, f'exec {sys.executable} "$@"')
    return folder / name


def of_version(minor: int) -> str:
    """Return a line of code that makes a python3 report the version 3.minor."""
    code = f"import sys; sys.version_info = (3, {minor}); exec(sys.argv[1])"
    return f'[ "$1" = -c ] && exec {sys.executable} -S -c {shlex.quote(code)} "$2"'
