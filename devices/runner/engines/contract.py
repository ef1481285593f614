"""What an artifact promises, checked before anything is computed: manifest, files, graphs.

Whatever stands in a folder that somebody sent, what comes out is an artifact that the runner can
serve, or a letter with the file and the reason. Unknown keys are let be: they are of later
releases. Standard library only.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..audio import SAMPLING_RATE
from ..decode.rules import AUTO
from ..problem import RunnerProblem
from .graph_file import AGAIN, UNTRUSTED, read_graph
from .links import leads_out

FORMATS = (2, 3)
"""The versions of manifest.json that this runner reads. In version 3 `decoding.language` can be
"auto": the artifact detects the language of each recording."""
MANIFEST = "manifest.json"
NEEDED = ("encoder.onnx", "decoder.onnx", "tokens.json")
LAYOUTS = {"onnx": "native", "coreml": "whisperkit"}
"""Target -> the layout of it that this runner reads."""

MOST_JSON_BYTES = 8 * 2**20
MOST_SAMPLES = 60 * SAMPLING_RATE
MOST_TENSOR_BYTES = 2**28
MOST_TENSORS = 4096
MOST_WINDOWS = 64
MOST = 2**53
"""Whole numbers up to here are the same in every reader of JSON."""
DTYPES = {
    "float32": 4,
    "float16": 2,
    "int8": 1,
    "uint8": 1,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}
"""Name -> bytes."""
ONE_EXPORT = "its files are not of one export: copy the whole artifact again, or export it again"


# ------------------------------------------------------------------------------------- manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return manifest.json, or the letter that says why this is no artifact for this runner."""
    path = Path(folder) / MANIFEST
    if not path.is_symlink() and not path.exists():
        raise RunnerProblem(
            f"{folder}: no {MANIFEST} there", "name a directory written by `edgewhisper export`"
        )
    manifest = read_json(path)
    check_version(path, manifest)
    check_manifest(path, manifest)
    return manifest


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """Return what a JSON file holds; raise a letter for everything that is not plain JSON."""
    plain_file(path)
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise RunnerProblem(f"{path}: {size} bytes, at most {most_bytes} are read", AGAIN)
        return json.loads(path.read_bytes().decode("utf-8"), parse_constant=no_number)
    except RunnerProblem:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise RunnerProblem(
        f"{path.parent}: {path.name} cannot be read ({reason})",
        f"{AGAIN}; an artifact is a directory written by `edgewhisper export`",
    )


def no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def plain_file(path: Path) -> None:
    """Raise RunnerProblem for links that lead out of the artifact, pipes, devices and folders:
    opening some of them never ends."""
    if leads_out(path):
        raise RunnerProblem(
            f"{path}: a link to {os.readlink(path)}, not a file of the artifact",
            "copy the file itself there; of links, those of the hub's own cache are read",
        )
    try:
        mode = path.stat().st_mode
    except OSError:
        raise RunnerProblem(f"{path}: there is no such file", AGAIN) from None
    if not stat.S_ISREG(mode):
        raise RunnerProblem(f"{path}: not a regular file", AGAIN)


def check_version(path: Path, manifest: Any) -> None:
    told = manifest if isinstance(manifest, dict) else {}
    found, target = told.get("format"), told.get("target")
    if type(found) is not int or found not in FORMATS or target not in tuple(LAYOUTS):
        raise RunnerProblem(
            f"{path}: artifact format {short(found)} for {short(target)}; this runner reads "
            f"{' and '.join(map(str, FORMATS))} for {' and '.join(map(repr, LAYOUTS))}",
            "take runner and artifact from the same release",
        )
    wanted = LAYOUTS[target]
    if (layout := told.get("layout", "native")) != wanted:
        raise RunnerProblem(
            f"{path}: the layout is {short(layout)}; this runner reads {wanted!r}",
            f"export the checkpoint with `--layout {wanted}`, or use the runtime of that layout",
        )


def check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Raise a letter for the first field that is missing or is not what it should be."""
    told = Told(path, manifest)
    sizes = check_packaged(told) if manifest["target"] == "coreml" else check_graphs(told)
    check_audio(told.at("audio"))
    check_decoding(told.at("decoding"), *sizes)
    check_facts(told)


def check_graphs(told: "Told") -> tuple[int, int]:
    """Files and contract of ONNX graphs; return how many tokens there are, and how many the decoder
    can be fed."""
    check_file_list(told)
    contract = told.at("contract")
    specs = {name: check_graph(contract.at(name)) for name in ("encoder", "decoder")}
    check_caches(contract, specs)
    return vocabulary_and_room(told.path, specs["decoder"])


def check_packaged(told: "Told") -> tuple[int, int]:
    """The same of Core ML packages."""
    from . import whisperkit

    check_file_list(told, whisperkit.NEEDED)
    contract = told.at("contract")
    specs = {name: check_graph(contract.at(name)) for name in whisperkit.PACKAGES}
    return whisperkit.check_packages(told, specs)


class Told:
    """A value of the manifest and where it stands, for the letter."""

    def __init__(self, path: Path, value: Any, where: str = "") -> None:
        self.path, self.value, self.where = path, value, where

    def wrong(self, wanted: str, hint: str = AGAIN) -> RunnerProblem:
        return RunnerProblem(
            f"{self.path}: {self.where or 'it'} is {short(self.value)}, not {wanted}", hint
        )

    def at(self, key: str) -> "Told":
        """Return the value under a key, which must be there."""
        plain = key if key.isidentifier() and len(key) <= 60 else short(key)
        where = f"{self.where}.{plain}" if self.where else plain
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        if key not in self.value:
            raise RunnerProblem(f"{self.path}: {where} is missing", AGAIN)
        return Told(self.path, self.value[key], where)

    def get(self, key: str) -> "Told | None":
        """Likewise for a key that may be missing or null."""
        if isinstance(self.value, dict) and self.value.get(key) is None:
            return None
        return self.at(key)

    def each(self, most: int = MOST_TENSORS) -> list["Told"]:
        """Return the elements of a list."""
        if not isinstance(self.value, list) or len(self.value) > most:
            raise self.wrong(f"a list of at most {most}")
        return [Told(self.path, v, f"{self.where}[{i}]") for i, v in enumerate(self.value)]

    def items(self) -> dict[str, "Told"]:
        """Return the members of an object."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return {key: self.at(key) for key in self.value}

    def count(self, low: int = 0, high: int = MOST) -> int:
        """Return a whole number from `low` to `high`."""
        if type(self.value) is not int or not low <= self.value <= high:
            raise self.wrong(f"a whole number from {low} to {high}")
        return self.value

    def text(self) -> str:
        if not isinstance(self.value, str) or len(self.value) > 1000:
            raise self.wrong("a short text")
        return self.value


def short(value: Any) -> str:
    """Return a value as a letter shows it, however large it is."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_file_list(told: Told, needed: Iterable[str] = NEEDED) -> None:
    files = told.at("files").items()
    for name, entry in files.items():
        if not stays_inside(name):
            raise RunnerProblem(
                f"{told.path}: names the file {short(name)}, which is outside the artifact",
                UNTRUSTED,
            )
        entry.at("bytes").count()
        digest = entry.at("sha256")
        if len(digest.text()) != 64 or set(digest.text()) - set("0123456789abcdef"):
            raise digest.wrong("64 hexadecimal digits")
    for name in needed:
        if name not in files:
            raise RunnerProblem(f"{told.path}: it does not list {name}", AGAIN)


def stays_inside(name: str) -> bool:
    """Tell whether a file name is relative and has no way up, on POSIX and on Windows."""
    parts = name.replace("\\", "/").split("/")
    return all(part not in ("", ".", "..") for part in parts) and not {":", "\0"} & set(name)


def check_graph(told: Told) -> dict[str, list[Told]]:
    """Return inputs and outputs of one graph's contract, and its states where it keeps some."""
    sides = ("inputs", "outputs", *(["states"] if told.get("states") else []))
    found = {side: told.at(side).each() for side in sides}
    for specs in found.values():
        names = [check_spec(spec) for spec in specs]
        if len(set(names)) < len(names):
            raise RunnerProblem(f"{told.path}: {told.where} names a tensor twice", AGAIN)
    return found


def check_spec(told: Told) -> str:
    """Return the name of a tensor with a sound type and a shape that fits into memory."""
    dtype = told.at("dtype")
    if dtype.value not in tuple(DTYPES):
        raise dtype.wrong(f"one of {', '.join(DTYPES)}")
    shape = told.at("shape")
    axes = [a.text() if isinstance(a.value, str) else a.count(1, 2**31) for a in shape.each(8)]
    size = DTYPES[dtype.value] * math.prod(a for a in axes if isinstance(a, int))
    if size > MOST_TENSOR_BYTES:
        raise RunnerProblem(
            f"{told.path}: {shape.where} {axes} takes {size} bytes, at most {MOST_TENSOR_BYTES} "
            "are given",
            AGAIN,
        )
    return told.at("name").text()


def check_caches(contract: Told, specs: dict[str, dict[str, list[Told]]]) -> None:
    """What the encoder gives must be what the decoder takes, and what that keeps as well."""
    inputs, outputs = specs["decoder"]["inputs"], specs["decoder"]["outputs"]
    given = {spec.value["name"]: spec for spec in specs["encoder"]["outputs"]}
    kept = {spec.value["name"].replace("present.", "past."): spec for spec in outputs}
    for spec in inputs:
        name = spec.value["name"]
        if not name.startswith(("past.", "cross.")):
            continue
        source = (given if name.startswith("cross.") else kept).get(name)
        if source is None or not alike(spec.value, source.value):
            found = "nothing" if source is None else described(source.value)
            raise RunnerProblem(
                f"{contract.path}: {spec.where} {name!r} is {described(spec.value)}, and it gets "
                f"{found}",
                ONE_EXPORT,
            )


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two tensors have one type, and axes of one size where both have numbers."""
    pairs = list(zip(one["shape"], other["shape"], strict=False))
    same = all(a == b or isinstance(a, str) or isinstance(b, str) for a, b in pairs)
    return same and len(one["shape"]) == len(other["shape"]) and one["dtype"] == other["dtype"]


def described(spec: dict[str, Any]) -> str:
    return f"{spec['dtype']} {spec['shape']}"


def check_audio(told: Told) -> None:
    rate = told.at("sampling_rate")
    if rate.value != SAMPLING_RATE or type(rate.value) is not int:
        raise rate.wrong(f"{SAMPLING_RATE}, at which the runner reads sound")
    longest = told.at("window_samples").count(1, MOST_SAMPLES)
    step = 2 * told.at("hop_samples").count(1, longest) if told.get("hop_samples") else 1
    windows = told.get("windows_samples")
    lengths = [w.count(1, MOST_SAMPLES) for w in windows.each(MOST_WINDOWS)] if windows else []
    if lengths and (lengths != sorted(set(lengths)) or lengths[-1] != longest):
        raise RunnerProblem(
            f"{told.path}: {told.where}.windows_samples {lengths} do not ascend to "
            f"window_samples, {longest}",
            AGAIN,
        )
    for length in (longest, *lengths):
        if length % step:
            raise RunnerProblem(
                f"{told.path}: {told.where} has a window of {length}, no multiple of {step}",
                AGAIN,
            )


def check_decoding(told: Told, vocabulary: int, room: int) -> None:
    """Ids are of the vocabulary, and prompt and text find room in the caches."""
    prompt = [token.count(0, vocabulary - 1) for token in told.at("prompt").each(room)]
    if not prompt:
        raise told.at("prompt").wrong("a prompt: it is empty")
    told.at("eos").count(0, vocabulary - 1)
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        for token in told.at(name).each(vocabulary):
            token.count(0, vocabulary - 1)
    if told.at("timestamp_begin").value is not None:
        told.at("timestamp_begin").count(0, vocabulary)
    if (end := told.get("timestamp_end")) is not None:
        end.count(0, vocabulary)
    told.at("max_new_tokens").count(0, room - len(prompt))
    if (start := told.get("max_initial_timestamp_index")) is not None:
        start.count()
    for name in ("no_speech", "previous"):
        if (token_id := told.get(name)) is not None:
            token_id.count(0, vocabulary - 1)
    for name in ("languages", "tasks"):
        if (table := told.get(name)) is not None:
            for token in table.items().values():
                token.count(0, vocabulary - 1)
    check_language(told)


def check_language(told: Told) -> None:
    """Only a model with languages can detect them, and its prompt must have one to replace."""
    if (language := told.get("language")) is None:
        return
    if language.value != AUTO:
        raise language.wrong(f"{AUTO!r}")
    table = told.get("languages")
    ids = [token.value for token in table.items().values()] if table else []
    if not set(ids) & set(told.at("prompt").value):
        raise told.at("prompt").wrong("a prompt with a language to replace by the detected one")


def vocabulary_and_room(path: Path, decoder: dict[str, list[Told]]) -> tuple[int, int]:
    """Return how many tokens there are, and how many the decoder can be fed."""
    shapes = {
        spec.value["name"]: spec.value["shape"]
        for spec in (*decoder["inputs"], *decoder["outputs"])
    }
    logits, past = shapes.get("logits", [])[-1:], shapes.get("past.0.key", [])[2:3]
    for name in ("input_ids", "past_length"):
        if name not in shapes:
            raise RunnerProblem(f"{path}: contract.decoder.inputs lacks {name}", AGAIN)
    if not all(found and isinstance(found[0], int) for found in (logits, past)):
        raise RunnerProblem(
            f"{path}: contract.decoder says no size of the logits or of past.0.key", AGAIN
        )
    return logits[0], past[0]


def check_facts(told: Told) -> None:
    """What is known of the artifact, where it is told; the runner itself does without."""
    kinds: dict[str, Callable[[Told], object]] = {
        "precision": Told.text,
        "parameters": Told.count,
        "macs": counts,
        "macs_by_window": counts_by_window,
        "layers": check_layers,
        "provenance": Told.items,
        "gate": Told.items,
        "coreml": Told.items,
        "versions": lambda t: [v.text() for v in t.items().values()],
    }
    for name, check in kinds.items():
        if (value := told.get(name)) is not None:
            check(value)


def counts(told: Told) -> None:
    for value in told.items().values():
        value.count()


def counts_by_window(told: Told) -> None:
    for macs in told.items().values():
        counts(macs)


def check_layers(told: Told) -> None:
    """Sizes of every layer, as export.shrink.layer_shapes has them."""
    for side in ("encoder", "decoder"):
        for layer in told.at(side).each():
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
    """Raise a letter for a file that inference needs and that is not as it was written.

    Without `hashed` sizes are compared and contents are not.
    """
    listed = manifest["files"]
    if manifest["target"] == "coreml":
        from .whisperkit import check_package_files

        check_package_files(folder, listed, hashed)
        return
    for name in NEEDED:
        check_file(folder / name, listed[name], hashed)
    for name in ("encoder.onnx", "decoder.onnx"):
        constants = read_graph(folder / name, listed.keys()).constants.values()
        for other in {str(c.location) for c in constants if c.location is not None}:
            check_file(folder / other, listed[Path(os.path.normpath(other)).as_posix()], hashed)


def check_file(path: Path, expected: dict[str, Any], hashed: bool = True) -> None:
    plain_file(path)
    found = path.stat().st_size
    if found != expected["bytes"]:
        raise RunnerProblem(f"{path}: damaged, {found} bytes instead of {expected['bytes']}", AGAIN)
    if hashed and sha256(path) != expected["sha256"]:
        raise RunnerProblem(f"{path}: damaged, its SHA-256 is not the manifest's", AGAIN)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Tensor(NamedTuple):
    """An input or an output as a graph itself declares it."""

    name: str
    shape: list[Any]
    dtype: str


def check_session(path: Path, session: Any, told: dict[str, Any]) -> None:
    """Raise a letter where a graph's inputs and outputs are not those of the manifest."""
    for side, nodes in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        found = [Tensor(node.name, node.shape, dtype_of(node.type)) for node in nodes]
        check_tensors(path, side, found, told[side])


def dtype_of(onnx_type: str) -> str:
    """Return the name of what onnxruntime calls tensor(float16); others as they are."""
    bare = onnx_type.removeprefix("tensor(").removesuffix(")")
    return "float32" if bare == "float" else bare


def check_tensors(path: Path, side: str, found: list[Tensor], told: list[dict[str, Any]]) -> None:
    """Raise a letter where these are not the tensors that the manifest says."""
    wanted = {spec["name"]: spec for spec in told}
    names = [tensor.name for tensor in found]
    if names != list(wanted):
        odd = sorted(set(names) ^ set(wanted))[:4] or "the order"
        raise RunnerProblem(
            f"{path}: its {len(names)} {side} are not the {len(wanted)} of {MANIFEST}; they "
            f"differ in {odd}",
            ONE_EXPORT,
        )
    for tensor in found:
        check_tensor(path, side, tensor, wanted[tensor.name])


def check_tensor(path: Path, side: str, tensor: Tensor, wanted: dict[str, Any]) -> None:
    axes = list(zip(wanted["shape"], tensor.shape, strict=False))
    sizes = all(a == b for a, b in axes if isinstance(a, int))
    rank = len(wanted["shape"]) == len(tensor.shape)
    bytes_each, known = DTYPES[wanted["dtype"]], [a for a in tensor.shape if isinstance(a, int)]
    fits = bytes_each * math.prod(known) <= MOST_TENSOR_BYTES
    if not (sizes and rank and fits and tensor.dtype == wanted["dtype"]):
        raise RunnerProblem(
            f"{path}: {tensor.name!r} of its {side} is {tensor.dtype} {tensor.shape}; {MANIFEST} "
            f"says {described(wanted)}",
            ONE_EXPORT,
        )


@contextmanager
def running(path: Path) -> Iterator[None]:
    """Turn what the engine says while a graph runs into a letter that names its file."""
    try:
        yield
    except RunnerProblem:
        raise
    except Exception as error:  # onnxruntime has a class of its own for each status code
        if (
            not isinstance(error, MemoryError | RuntimeError)
            and type(error) is not Exception  # as coremltools raises them
            and "onnx" not in type(error).__module__
        ):
            raise
        reason = (str(error).strip().splitlines() or ["out of memory"])[0]
        raise RunnerProblem(f"{path}: the graph cannot be run ({reason[:300]})", AGAIN) from None
