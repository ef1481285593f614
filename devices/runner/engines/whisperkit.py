"""WhisperKit's layout: what its three packages must take and give, and the files of an artifact.

Standard library only, as contract.py, whose letters these are.
"""

from pathlib import Path
from typing import Any

from ..problem import RunnerProblem
from .contract import ONE_EXPORT, Told, check_file, described
from .graph_file import AGAIN, UNTRUSTED

FLOATS, IDS = ("float16", "float32"), ("int32",)

Shapes = dict[str, tuple[tuple[str, ...], tuple[int | str, ...]]]
"""Name of a tensor -> its types, and its axes: numbers, or sizes that are the same wherever they
stand."""

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
MAY: Shapes = {"alignment_heads_weights": (FLOATS, (1, "positions"))}
"""Given only by packages that tell the times of words."""

PACKAGES: dict[str, dict[str, Shapes]] = {
    "MelSpectrogram": {"inputs": {"audio": (FLOATS, ("samples",))}, "outputs": MEL},
    "AudioEncoder": {"inputs": MEL, "outputs": STATES},
    "TextDecoder": {"inputs": STEP | CACHES | STATES, "outputs": LOGITS | UPDATES},
}
WITH_STATE = {"inputs": STEP | STATES, "outputs": LOGITS, "states": CACHES}
"""A TextDecoder that keeps its caches itself."""

NEEDED = (*(f"{name}.mlpackage/Manifest.json" for name in PACKAGES), "tokens.json")


def check_packages(told: Told, specs: dict[str, dict[str, list[Told]]]) -> tuple[int, int]:
    """Return how many tokens there are and how many the decoder can be fed; raise a letter for a
    tensor that WhisperKit would not know, or that does not fit the others."""
    sizes: dict[str, int] = {}
    for name, found in specs.items():
        layout = WITH_STATE if "states" in found else PACKAGES[name]
        for side, wanted in layout.items():
            check_side(told.at("contract").at(name).at(side), found[side], wanted, sizes)
    samples = told.at("audio").at("window_samples")
    if samples.value != sizes["samples"]:
        raise samples.wrong(f"the {sizes['samples']} of MelSpectrogram", ONE_EXPORT)
    return sizes["vocabulary"], sizes["room"]


def check_side(told: Told, found: list[Told], wanted: Shapes, sizes: dict[str, int]) -> None:
    """Raise a letter where names, types or shapes are others; what is learnt of sizes is noted."""
    named = {spec.value["name"]: spec for spec in found}
    for name in wanted.keys() - named.keys():
        raise RunnerProblem(f"{told.path}: {told.where} lacks {name}", AGAIN)
    for name, spec in named.items():
        types, axes = (wanted | MAY).get(name, ((), ()))
        if spec.value["dtype"] not in types or not fits(spec.value["shape"], axes, sizes):
            raise RunnerProblem(
                f"{told.path}: {spec.where} {name!r} is {described(spec.value)}, which does not "
                f"fit WhisperKit's {list(axes)} of {' or '.join(types) or 'no type'} where "
                f"{sizes or 'nothing'} is known",
                ONE_EXPORT,
            )


def fits(shape: list[int | str], axes: tuple[int | str, ...], sizes: dict[str, int]) -> bool:
    """Tell whether a shape is as wanted; a size that is seen for the first time is noted."""
    for size, axis in zip(shape, axes, strict=False):
        if not isinstance(size, int):
            return False
        if size != (sizes.setdefault(axis, size) if isinstance(axis, str) else axis):
            return False
    return len(shape) == len(axes)


def check_package_files(folder: Path, files: dict[str, Any], hashed: bool) -> None:
    """Raise a letter for a file of a package that is not as it was written, or is of none."""
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
