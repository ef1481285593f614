"""Check the choices of `edgewhisper export` against each other."""

from __future__ import annotations

from typing import Any

from edgewhisper.cli.output import say
from export import layouts
from export.layouts import TARGETS, layouts_of
from export.problem import Problem

LAYOUTS = {target: layouts_of(target) for target in TARGETS}
"""Target -> its layouts."""
PRECISIONS = {name: target.precisions for name, target in TARGETS.items()}
"""Target -> its precisions."""
FOR_ONNX = ("runtime", "two_stage", "silence_stride")
"""Options for ONNX only. All others are for Core ML only."""
GATES = ("fail", "warn", "off")
OWN_READERS = {"onnx": "EdgeWhisper's runner", "coreml": "WhisperKit, EdgeWhisper's runner"}
"""Target -> the runtimes that read its default layout."""


def layouts_help(target: str) -> str:
    """Return the layouts of a target, with the runtimes that read them; the default is marked."""
    default = TARGETS[target].layout
    readers = {name: layouts.LAYOUTS[name].runtime for name in layouts_of(target)}
    readers[default] = f"default, {OWN_READERS[target]}"
    return f"for {target}: " + ", ".join(f"{name} ({by})" for name, by in readers.items())


def check_choices(target: str, gate: str, layout: str | None, options: dict[str, Any]) -> None:
    """Raise Problem for unknown choices and for options of the other target."""
    require_one_of("--target", target, tuple(LAYOUTS))
    require_one_of("--gate", gate, GATES)
    refuse_options(target, options)
    if layout is not None:
        require_for_target("--layout", layout, target, LAYOUTS)


def precision_for(precision: str | None, device: str | None, target: str) -> str | None:
    """Return the given precision, or the best one for the device, or None for the default.

    Prints why a precision is the best one. Raises Problem for an unknown precision or device, and
    for Core ML on a device without it.
    """
    from devices.device import load_profile

    profile = None if device is None else load_profile(device)
    if profile is not None and target == "coreml" and not profile.model.startswith("Apple"):
        raise Problem(
            f"--target coreml for {profile.name} ({profile.model}): Core ML runs on Apple's "
            "systems only",
            hint=f"use --target onnx for {profile.name}, or --device m1",
        )
    if precision is not None:
        require_for_target("--precision", precision, target, PRECISIONS)
    elif profile is not None:
        say(f"{profile.precision} for {profile.name}: {profile.reason}")
        return profile.precision
    return precision


def require_one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raise Problem if a value is not a known one."""
    if value not in known:
        raise Problem(f"unknown {option} {value!r}", hint=f"choose {any_of(known)}")


def require_for_target(
    option: str, value: str, target: str, known: dict[str, tuple[str, ...]]
) -> None:
    """Raise Problem if a value is unknown, or known for another target only."""
    others = [other for other, values in known.items() if value in values and other != target]
    if others and value not in known[target]:
        raise Problem(
            f"{option} {value} is for --target {others[0]}, and --target is {target}",
            hint=f"choose {any_of(known[target])}, or --target {others[0]}",
        )
    require_one_of(option, value, known[target])


def refuse_options(target: str, options: dict[str, Any]) -> None:
    """Raise Problem for options of the other target."""
    wrong = [name for name in options if (name in FOR_ONNX) != (target == "onnx")]
    if wrong:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in wrong)
        other, title = ("coreml", "Core ML") if target == "onnx" else ("onnx", "ONNX")
        raise Problem(
            f"{names}: for {title}, and --target is {target}",
            hint=f"add --target {other}, or leave {names} out",
        )


def any_of(names: tuple[str, ...]) -> str:
    """Return names like "a, b or c"."""
    return " or ".join([", ".join(names[:-1]), names[-1]])
