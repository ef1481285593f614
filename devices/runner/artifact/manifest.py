"""Reads and checks manifest.json before anything is loaded.

The folder may come from anywhere. It is either an artifact that the runner supports, or it gives an
error that names the file and the reason. Unknown keys are ignored: later releases may add some.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..audio.samples import SAMPLING_RATE
from ..problem import RunnerProblem
from . import whisperkit
from .fields import Field, short
from .files import AGAIN, MANIFEST, UNTRUSTED, check_file, read_json, stays_inside
from .graph_file import read_graph
from .tensors import ONE_EXPORT, alike, check_graph, described

FORMATS = (2, 3)
"""Supported versions of manifest.json. Version 3 adds `decoding.language`, see AUTO."""
AUTO = "auto"
"""`decoding.language` of artifacts that detect the language of each recording."""
NEEDED = ("encoder.onnx", "decoder.onnx", "tokens.json")
LAYOUTS = {"onnx": "native", "coreml": "whisperkit"}
"""Target -> the layout that this runner supports."""

MOST_SAMPLES = 60 * SAMPLING_RATE
MOST_WINDOWS = 64
MOST_SCALE = 1e6
MOST_DELAY_S = 1.0


# ------------------------------------------------------------------------------------- manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the checked content of manifest.json; raise RunnerProblem if it is not supported."""
    path = Path(folder) / MANIFEST
    if not path.is_symlink() and not path.exists():
        raise RunnerProblem(
            f"{folder}: no {MANIFEST} there", "give a directory written by `edgewhisper export`"
        )
    return checked_manifest(folder, read_json(path))


def checked_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of a folder; raise RunnerProblem if it is not supported."""
    path = Path(folder) / MANIFEST
    check_version(path, manifest)
    check_manifest(path, manifest)
    return manifest


def check_version(path: Path, manifest: Any) -> None:
    """Raise RunnerProblem for an unsupported format, target or layout."""
    record = manifest if isinstance(manifest, dict) else {}
    version, target = record.get("format"), record.get("target")
    if type(version) is not int or version not in FORMATS or target not in tuple(LAYOUTS):
        raise RunnerProblem(
            f"{path}: artifact format {short(version)} for {short(target)}; this runner reads "
            f"{' and '.join(map(str, FORMATS))} for {' and '.join(map(repr, LAYOUTS))}",
            "use a runner and an artifact of the same release",
        )
    supported = LAYOUTS[target]
    if (layout := record.get("layout", "native")) != supported:
        raise RunnerProblem(
            f"{path}: the layout is {short(layout)}; this runner reads {supported!r}",
            f"export the checkpoint with `--layout {supported}`, or use the runtime of that layout",
        )


def check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Raise RunnerProblem for the first field that is missing or wrong."""
    root = Field(path, manifest)
    sizes = check_packaged(root) if manifest["target"] == "coreml" else check_graphs(root)
    check_audio(root.at("audio"))
    decoding = root.at("decoding")
    check_decoding(decoding, *sizes)
    if (alignment := decoding.get("alignment")) is not None:
        check_alignment(alignment, root.at("contract"))
    check_facts(root)


def check_graphs(root: Field) -> tuple[int, int]:
    """Check files and tensors of ONNX graphs; return vocabulary size and the caches' capacity."""
    check_file_list(root)
    contract = root.at("contract")
    specs = {name: check_graph(contract.at(name)) for name in ("encoder", "decoder")}
    check_caches(contract, specs)
    return vocabulary_and_room(root.path, specs["decoder"])


def check_packaged(root: Field) -> tuple[int, int]:
    """Check files and tensors of Core ML packages; return the same sizes as check_graphs."""
    check_file_list(root, whisperkit.NEEDED)
    contract = root.at("contract")
    specs = {name: check_graph(contract.at(name)) for name in whisperkit.PACKAGES}
    return whisperkit.check_packages(root, specs)


def check_file_list(root: Field, needed: Iterable[str] = NEEDED) -> None:
    """Raise RunnerProblem for bad entries of `files`, or if a needed file is not listed."""
    files = root.at("files").items()
    for name, entry in files.items():
        if not stays_inside(name):
            raise RunnerProblem(
                f"{root.path}: lists the file {short(name)}, which is outside the artifact",
                UNTRUSTED,
            )
        entry.at("bytes").count()
        digest = entry.at("sha256")
        if len(digest.text()) != 64 or set(digest.text()) - set("0123456789abcdef"):
            raise digest.wrong("64 hexadecimal digits")
    for name in needed:
        if name not in files:
            raise RunnerProblem(f"{root.path}: it does not list {name}", AGAIN)


def check_caches(contract: Field, specs: dict[str, dict[str, list[Field]]]) -> None:
    """Raise RunnerProblem if a cache input of the decoder differs from the output that fills it."""
    inputs, outputs = specs["decoder"]["inputs"], specs["decoder"]["outputs"]
    cross = {spec.value["name"]: spec for spec in specs["encoder"]["outputs"]}
    past = {spec.value["name"].replace("present.", "past."): spec for spec in outputs}
    for spec in inputs:
        name = spec.value["name"]
        if not name.startswith(("past.", "cross.")):
            continue
        source = (cross if name.startswith("cross.") else past).get(name)
        if source is None or not alike(spec.value, source.value):
            given = "nothing" if source is None else described(source.value)
            raise RunnerProblem(
                f"{contract.path}: {spec.where} {name!r} is {described(spec.value)}, and it gets "
                f"{given}",
                ONE_EXPORT,
            )


def check_audio(audio: Field) -> None:
    """Raise RunnerProblem for a bad sampling rate or bad window lengths."""
    rate = audio.at("sampling_rate")
    if rate.value != SAMPLING_RATE or type(rate.value) is not int:
        raise rate.wrong(f"{SAMPLING_RATE}, the runner's sampling rate")
    longest = audio.at("window_samples").count(1, MOST_SAMPLES)
    step = 2 * audio.at("hop_samples").count(1, longest) if audio.get("hop_samples") else 1
    windows = audio.get("windows_samples")
    lengths = [w.count(1, MOST_SAMPLES) for w in windows.each(MOST_WINDOWS)] if windows else []
    if windows and (lengths != sorted(set(lengths)) or lengths[-1:] != [longest]):
        raise RunnerProblem(
            f"{audio.path}: {audio.where}.windows_samples {lengths} must ascend to "
            f"window_samples, {longest}",
            AGAIN,
        )
    for length in (longest, *lengths):
        if length % step:
            raise RunnerProblem(
                f"{audio.path}: {audio.where} has a window of {length}, not a multiple of {step}",
                AGAIN,
            )


def check_decoding(decoding: Field, vocabulary: int, room: int) -> None:
    """Raise RunnerProblem for ids outside the vocabulary, or a prompt too long for the caches."""
    prompt = [token.count(0, vocabulary - 1) for token in decoding.at("prompt").each(room)]
    if not prompt:
        raise decoding.at("prompt").wrong("a prompt: it is empty")
    decoding.at("eos").count(0, vocabulary - 1)
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        for token in decoding.at(name).each(vocabulary):
            token.count(0, vocabulary - 1)
    if decoding.at("timestamp_begin").value is not None:
        decoding.at("timestamp_begin").count(0, vocabulary)
    if (end := decoding.get("timestamp_end")) is not None:
        end.count(0, vocabulary)
    decoding.at("max_new_tokens").count(0, room - len(prompt))
    if (start := decoding.get("max_initial_timestamp_index")) is not None:
        start.count()
    for name in ("no_speech", "previous"):
        if (token_id := decoding.get(name)) is not None:
            token_id.count(0, vocabulary - 1)
    for name in ("languages", "tasks"):
        if (table := decoding.get(name)) is not None:
            for token in table.items().values():
                token.count(0, vocabulary - 1)
    check_language(decoding)


def check_alignment(alignment: Field, contract: Field) -> None:
    """Raise RunnerProblem unless the alignment heads are different pairs of a layer and one of its
    heads, whose queries the decoder outputs, the scale is a positive number, and the delay is at
    most a second."""
    scale = alignment.at("scale")
    if not isinstance(scale.value, float) or not 0 < scale.value < MOST_SCALE:
        raise scale.wrong("a positive number")
    if "delay_s" in alignment.items():
        delay = alignment.at("delay_s")
        if not isinstance(delay.value, float) or not abs(delay.value) <= MOST_DELAY_S:
            raise delay.wrong(f"a number from -{MOST_DELAY_S} to {MOST_DELAY_S}")
    shapes = {
        spec.value["name"]: spec.value["shape"]
        for graph in ("encoder", "decoder")
        for spec in contract.at(graph).at("outputs").each()
    }
    heads = alignment.at("heads").each()
    pairs = [[entry.count() for entry in head.each(2)] for head in heads]
    if not pairs or len(set(map(tuple, pairs))) < len(pairs):
        raise alignment.at("heads").wrong("a list of different heads")
    for head, pair in zip(heads, pairs, strict=True):
        if len(pair) != 2 or not has_head(shapes, *pair):
            raise head.wrong("a layer and one of its heads whose queries the decoder outputs")


def has_head(shapes: dict[str, list[Any]], layer: int, head: int) -> bool:
    """Return whether the shapes of the graphs' outputs have the queries and keys of a head."""
    name = f"cross.{layer}.key"
    query, key = shapes.get(f"query.{layer}", []), shapes.get(name, [])
    if len(query) != 3 or len(key) != 4:
        return False
    count, room, width = key[1], key[3], query[2]
    if not all(isinstance(size, int) for size in (count, room, width)):
        return False
    scales = shapes.get(f"{name}_scale", [count * room])
    return (
        head < count and not width % count and width // count <= room and scales == [count * room]
    )


def check_language(decoding: Field) -> None:
    """Raise RunnerProblem if the language is to be detected and the prompt has none to replace."""
    if (language := decoding.get("language")) is None:
        return
    if language.value != AUTO:
        raise language.wrong(f"{AUTO!r}")
    table = decoding.get("languages")
    ids = [token.value for token in table.items().values()] if table else []
    if not set(ids) & set(decoding.at("prompt").value):
        raise decoding.at("prompt").wrong("a prompt with a language to replace by the detected one")


def vocabulary_and_room(path: Path, decoder: dict[str, list[Field]]) -> tuple[int, int]:
    """Return the vocabulary size, and how many tokens the decoder's caches hold."""
    shapes, outputs = (
        {spec.value["name"]: spec.value["shape"] for spec in decoder[side]}
        for side in ("inputs", "outputs")
    )
    logits, past = outputs.get("logits", [])[-1:], shapes.get("past.0.key", [])[2:3]
    for name in ("input_ids", "past_length"):
        if name not in shapes:
            raise RunnerProblem(f"{path}: contract.decoder.inputs lacks {name}", AGAIN)
    if not all(size and isinstance(size[0], int) for size in (logits, past)):
        raise RunnerProblem(
            f"{path}: contract.decoder has no fixed size of logits or past.0.key", AGAIN
        )
    return logits[0], past[0]


def check_facts(root: Field) -> None:
    """Raise RunnerProblem for bad optional entries, which the runner itself does not use."""
    kinds: dict[str, Callable[[Field], object]] = {
        "precision": Field.text,
        "parameters": Field.count,
        "macs": counts,
        "logits": counts,
        "macs_by_window": counts_by_window,
        "layers": check_layers,
        "provenance": Field.items,
        "gate": Field.items,
        "coreml": Field.items,
        "versions": lambda versions: [v.text() for v in versions.items().values()],
    }
    for name, check in kinds.items():
        if (value := root.get(name)) is not None:
            check(value)


def counts(table: Field) -> None:
    """Raise RunnerProblem unless all values of an object are whole numbers."""
    for value in table.items().values():
        value.count()


def counts_by_window(table: Field) -> None:
    """Raise RunnerProblem unless all values of an object pass `counts`."""
    for macs in table.items().values():
        counts(macs)


def check_layers(layers: Field) -> None:
    """Raise RunnerProblem for bad layer sizes; export.shrink.layer_shapes writes them."""
    for side in ("encoder", "decoder"):
        for layer in layers.at(side).each():
            layer.at("ffn").count(1)
            for name in ("ranks", "inputs", "bits"):
                if (sizes := layer.get(name)) is not None:
                    counts(sizes)
            names = ("self_attn", "encoder_attn") if side == "decoder" else ("self_attn",)
            for attention in map(layer.at, names):
                for size in ("heads", "qk_dim", "v_dim"):
                    attention.at(size).count(1)


# -------------------------------------------------------------------------------- files, graphs


def check_files(folder: Path, manifest: dict[str, Any], hashed: bool = True) -> None:
    """Raise RunnerProblem if a file that inference needs was changed. Sizes are compared with the
    manifest's, and SHA-256 hashes if `hashed`."""
    listed = manifest["files"]
    if manifest["target"] == "coreml":
        whisperkit.check_package_files(folder, listed, hashed)
        return
    for name in NEEDED:
        check_file(folder / name, listed[name], hashed)
    for name in ("encoder.onnx", "decoder.onnx"):
        constants = read_graph(folder / name, [folder / file for file in listed]).constants.values()
        for other in {str(c.location) for c in constants if c.location is not None}:
            check_file(folder / other, listed[Path(os.path.normpath(other)).as_posix()], hashed)
