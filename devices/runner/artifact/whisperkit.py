"""WhisperKit's layout: checks the tensors of its three packages, and the files of an artifact.

Standard library only.
"""

from pathlib import Path
from typing import Any

from ..problem import RunnerProblem
from .fields import Field
from .files import AGAIN, UNTRUSTED, check_file
from .tensors import ONE_EXPORT, described

FLOATS, IDS = ("float16", "float32"), ("int32",)

Shapes = dict[str, tuple[tuple[str, ...], tuple[int | str, ...]]]
"""Name of a tensor -> its allowed types, and its axes. A named axis has the same size
everywhere."""

MEL: Shapes = {"melspectrogram_features": (FLOATS, (1, "mels", 1, "frames"))}
STATES: Shapes = {"encoder_output_embeds": (FLOATS, (1, "d_model", 1, "positions"))}
CACHES: Shapes = {
    "key_cache": (FLOATS, (1, "width", 1, "room")),
    "value_cache": (FLOATS, (1, "width", 1, "room")),
}
UPDATES: Shapes = {
    "key_cache_updates": (FLOATS, (1, "width", 1, 1)),
    "value_cache_updates": (FLOATS, (1, "width", 1, 1)),
}
STEP: Shapes = {
    "input_ids": (IDS, (1,)),
    "cache_length": (IDS, (1,)),
    "kv_cache_update_mask": (FLOATS, (1, "room")),
    "decoder_key_padding_mask": (FLOATS, (1, "room")),
}
LOGITS: Shapes = {"logits": (FLOATS, (1, 1, "vocabulary"))}
OPTIONAL: Shapes = {"alignment_heads_weights": (FLOATS, (1, "positions"))}
"""An output of packages with word timestamps."""

PACKAGES: dict[str, dict[str, Shapes]] = {
    "MelSpectrogram": {"inputs": {"audio": (FLOATS, ("samples",))}, "outputs": MEL},
    "AudioEncoder": {"inputs": MEL, "outputs": STATES},
    "TextDecoder": {"inputs": STEP | CACHES | STATES, "outputs": LOGITS | UPDATES},
}
WITH_STATE = {"inputs": STEP | STATES, "outputs": LOGITS, "states": CACHES}
"""A TextDecoder that holds its caches as Core ML states."""

NEEDED = (*(f"{name}.mlpackage/Manifest.json" for name in PACKAGES), "tokens.json")


def check_packages(root: Field, specs: dict[str, dict[str, list[Field]]]) -> tuple[int, int]:
    """Return the vocabulary size, and how many tokens the decoder's caches hold. Raises
    RunnerProblem for a tensor that WhisperKit does not support or that does not fit the others."""
    sizes: dict[str, int] = {}
    for name, sides in specs.items():
        layout = WITH_STATE if "states" in sides else PACKAGES[name]
        for side, expected in layout.items():
            check_side(root.at("contract").at(name).at(side), sides[side], expected, sizes)
    samples = root.at("audio").at("window_samples")
    if samples.value != sizes["samples"]:
        raise samples.wrong(f"the {sizes['samples']} of MelSpectrogram", ONE_EXPORT)
    return sizes["vocabulary"], sizes["room"]


def check_side(side: Field, specs: list[Field], expected: Shapes, sizes: dict[str, int]) -> None:
    """Raise RunnerProblem for wrong names, types or shapes; new sizes are added to `sizes`."""
    named = {spec.value["name"]: spec for spec in specs}
    for name in expected.keys() - named.keys():
        raise RunnerProblem(f"{side.path}: {side.where} lacks {name}", AGAIN)
    for name, spec in named.items():
        types, axes = (expected | OPTIONAL).get(name, ((), ()))
        if spec.value["dtype"] not in types or not fits(spec.value["shape"], axes, sizes):
            raise RunnerProblem(
                f"{side.path}: {spec.where} {name!r} is {described(spec.value)}, which does not "
                f"fit WhisperKit's {list(axes)} of {' or '.join(types) or 'no type'}; sizes so "
                f"far: {sizes or 'none'}",
                ONE_EXPORT,
            )


def fits(shape: list[int | str], axes: tuple[int | str, ...], sizes: dict[str, int]) -> bool:
    """Return whether a shape fits the axes; the first size of a named axis is added to `sizes`."""
    for size, axis in zip(shape, axes, strict=False):
        if not isinstance(size, int):
            return False
        if size != (sizes.setdefault(axis, size) if isinstance(axis, str) else axis):
            return False
    return len(shape) == len(axes)


def check_package_files(folder: Path, files: dict[str, Any], hashed: bool) -> None:
    """Raise RunnerProblem for a file of a package that was changed or is not in the manifest."""
    for name, entry in files.items():
        path = folder / name
        if name.split("/")[0].endswith(".mlpackage") or name in NEEDED:
            for parent in path.relative_to(folder).parents:
                if (folder / parent).is_symlink() and folder / parent != folder:
                    raise RunnerProblem(f"{folder / parent}: a link, not a folder", UNTRUSTED)
            check_file(path, entry, hashed)
    for package in PACKAGES:
        for path in (folder / f"{package}.mlpackage").rglob("*"):
            if path.relative_to(folder).as_posix() not in files and not path.is_dir():
                raise RunnerProblem(f"{path}: the manifest does not list it", UNTRUSTED)
