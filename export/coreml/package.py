"""Read a Core ML package (.mlpackage): its manifest, its program, its constants.

A package is a folder. Manifest.json names the model file (a protobuf message), whose large
constants are stored in weights/weight.bin. A package may come from an untrusted source, so
everything is checked, and each defect raises a Problem that names the file and the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.files import links_outside, stays_inside
from export.problem import Problem

AGAIN = "export it again, or copy the whole folder again"
STRANGER = "do not use this package: it was not written by EdgeWhisper"
LARGEST = 2**28
"""Largest number of elements of one value; whisper-large's token table has a quarter of it."""
LARGEST_FILE = 2**31 - 1
"""Largest size in bytes of the model file, which holds no large constants; a limit of protobuf."""
SENTINEL = 0xDEADBEEF
HEADER = struct.Struct("<IIQQQ")
"""Header of a blob: sentinel, kind, size in bytes, offset of its bytes, unused bits at their
end."""
KINDS = {
    "float16": 1,
    "float32": 2,
    "uint8": 3,
    "int8": 4,
    "int16": 6,
    "uint16": 7,
    "int4": 8,
    "uint1": 9,
    "uint2": 10,
    "uint4": 11,
    "uint3": 12,
    "uint6": 13,
    "int32": 14,
    "uint32": 15,
}
"""Dtype -> kind of a blob."""
PACKED = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
"""Types narrower than a byte -> their bits."""
WHOLE = ("float16", "float32", "int8", "uint8", "int16", "uint16", "int32", "uint32", "bool")
FLOATS = ("float16", "float32")
DECLARED = {65552: "float16", 65568: "float32", 131104: "int32"}
"""Array types in a model's description -> dtype."""

Array = NDArray[Any]
Constant = Array | str


@dataclass(frozen=True)
class Spec:
    """Name, shape and dtype of a value."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def held(self) -> tuple[tuple[int, ...], str]:
        """Shape and numpy dtype of a constant; types narrower than a byte are stored in bytes."""
        packed = "int8" if self.dtype == "int4" else "uint8"
        return self.shape, packed if self.dtype in PACKED else self.dtype

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Package:
    """One function of a package, with access to its constants."""

    path: Path
    spec_version: int
    block: Any
    """The operations of the function."""
    inputs: list[Spec]
    states: list[Spec]
    outputs: list[Spec]
    """As the model's description declares them."""
    model_file: Path
    _weights: dict[str, Array] = field(default_factory=dict)

    def spec(self, value: Any) -> Spec:
        """Return the spec of a named value of the program (NamedValueType)."""
        return _spec(self.path, value.name, value.type)

    def constant(self, name: str, value: Any) -> Constant:
        """Return a constant: a string, or an array of the shape that the program declares."""
        spec = _spec(self.path, name, value.type)
        if value.WhichOneof("value") == "blobFileValue":
            blob = value.blobFileValue
            return self._blob(spec, blob.fileName, blob.offset)
        if value.immediateValue.WhichOneof("value") != "tensor":
            raise Problem(f"{self.path}: constant {name} is not a tensor", hint=AGAIN)
        tensor = value.immediateValue.tensor
        kind = tensor.WhichOneof("value")
        held: Any = getattr(tensor, kind).values if kind else []
        if spec.dtype == "string":
            if kind != "strings" or len(held) != 1:
                raise Problem(f"{self.path}: constant {name} is not one string", hint=AGAIN)
            return str(held[0])
        if kind == "bytes":
            return self._decode(spec, np.frombuffer(held, np.uint8))
        if kind == "strings" or spec.dtype in PACKED or len(held) != math.prod(spec.shape):
            count = f"{len(held)} values ({kind})"
            raise Problem(f"{self.path}: constant {spec} holds {count}", hint=AGAIN)
        return np.array(held).astype(spec.dtype).reshape(spec.shape)

    def require_match(self, what: str, actual: Sequence[Spec], described: Sequence[Spec]) -> None:
        """Raise Problem unless the model's description, which callers see, agrees with its
        program."""
        if sorted(map(str, actual)) != sorted(map(str, described)):
            declared, real = ("; ".join(map(str, specs)) or "none" for specs in (described, actual))
            raise Problem(
                f"{self.model_file}: its description has {what} {declared}; its program has {real}",
                hint=AGAIN,
            )

    def _blob(self, spec: Spec, name: str, offset: int) -> Array:
        file, held = self._weight_file(name)
        place = f"{file}: constant {spec} at {offset}"
        if offset + HEADER.size > len(held):
            raise Problem(f"{place} is beyond the file's {len(held)} bytes", hint=AGAIN)
        sentinel, kind, size, begin, _ = HEADER.unpack(held[offset:][: HEADER.size].tobytes())
        if sentinel != SENTINEL:
            raise Problem(f"{place}: no constant begins there", hint=AGAIN)
        if KINDS.get(spec.dtype) != kind:
            raise Problem(f"{place}: the file holds another type (kind {kind})", hint=AGAIN)
        if begin + size > len(held):
            end = f"ends at {begin + size}, beyond the file's {len(held)} bytes"
            raise Problem(f"{place} {end}", hint=AGAIN)
        return self._decode(spec, held[begin : begin + size])

    def _weight_file(self, name: str) -> tuple[Path, Array]:
        relative = name.removeprefix("@model_path/")
        if relative == name or not stays_inside(relative):
            raise Problem(
                f"{self.path}: reads weights from {name!r}, which is outside the package",
                hint=STRANGER,
            )
        file = self.model_file.parent / relative
        if name not in self._weights:
            _check_member(self.path, file)
            empty = file.stat().st_size == 0  # an empty file cannot be mapped
            self._weights[name] = np.zeros(0, np.uint8) if empty else np.memmap(file, mode="r")
        return file, self._weights[name]

    def _decode(self, spec: Spec, held: Array) -> Array:
        count = math.prod(spec.shape)
        bits = PACKED.get(spec.dtype) or 8 * np.dtype(spec.dtype).itemsize
        if len(held) != -(-count * bits // 8):
            need = f"needs {-(-count * bits // 8)} bytes, found {len(held)}"
            raise Problem(f"{self.path}: constant {spec} {need}", hint=AGAIN)
        if spec.dtype in PACKED:
            return unpack(held, count, bits, spec.dtype == "int4").reshape(spec.shape)
        return held.view(spec.dtype).reshape(spec.shape)


def read_package(path: Path, function: str | None = None) -> Package:
    """Return a function of a package, by name or the default one. Raises Problem if it is not a
    package, files are missing or damaged, or names leave the folder."""
    path = Path(path)
    file = _model_file(path)
    model = _parse(file)
    if model.WhichOneof("Type") != "mlProgram":
        kind = model.WhichOneof("Type") or "nothing"
        raise Problem(f"{file}: not an ML program ({kind})", hint="convert it to an mlprogram")
    name, description = _choose(path, model, function)
    body = model.mlProgram.functions[name]
    if body.opset not in body.block_specializations:
        raise Problem(f"{file}: function {name} has no operations ({body.opset!r})", hint=AGAIN)
    package = Package(
        path,
        model.specificationVersion,
        body.block_specializations[body.opset],
        [_spec(path, x.name, x.type) for x in body.inputs if not _is_state(x)],
        [_spec(path, x.name, x.type.stateType.wrappedType) for x in body.inputs if _is_state(x)],
        [_described(path, feature) for feature in description.output],
        file,
    )
    package.require_match(
        "inputs", package.inputs, [_described(path, x) for x in description.input]
    )
    package.require_match(
        "states", package.states, [_described(path, x) for x in description.state]
    )
    return package


def unpack(held: Array, count: int, bits: int, signed: bool = False) -> Array:
    """Unpack numbers of `bits` bits each from bytes, least significant bits first."""
    if len(held) != -(-count * bits // 8):
        raise ValueError(f"{count} numbers of {bits} bits are not {len(held)} bytes")
    if bits == 8:
        return held.astype(np.uint8)
    single = np.unpackbits(held.view(np.uint8), count=count * bits, bitorder="little")
    powers = (1 << np.arange(bits)).astype(np.uint8)
    numbers = (single.reshape(count, bits) * powers).sum(1, dtype=np.uint8)
    if not signed:
        return numbers
    return (numbers ^ (1 << bits - 1)).astype(np.int8) - np.int8(1 << bits - 1)


def schema() -> ModuleType:
    """Return coremltools' protobuf classes without importing the rest of it, which takes
    seconds."""
    package = "export._coreml_schema"
    if package not in sys.modules:
        installed = importlib.util.find_spec("coremltools")
        if installed is None or not installed.submodule_search_locations:
            raise Problem(
                "reading a Core ML package needs coremltools, which is not installed here",
                hint="pip install 'coremltools>=9,<10' (built for macOS and for Linux on x86-64)",
            )
        folder = ModuleType(package)
        folder.__path__ = [str(Path(installed.submodule_search_locations[0]) / "proto")]
        sys.modules[package] = folder
    return importlib.import_module(f"{package}.Model_pb2")


def _model_file(path: Path) -> Path:
    manifest = path / "Manifest.json"
    if not path.is_dir():
        raise Problem(f"{path}: not a Core ML package (a folder)", hint="name an .mlpackage")
    _check_member(path, manifest)
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        name = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
        inside = stays_inside(name)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise Problem(f"{manifest}: damaged, it names no model ({error})", hint=AGAIN) from error
    if not inside:
        raise Problem(f"{manifest}: names {name!r}, which is outside the package", hint=STRANGER)
    file = path / "Data" / name
    _check_member(path, file)
    return file


def _check_member(package: Path, file: Path) -> None:
    """Raise Problem unless `file` is a plain file inside the package, reached through no link."""
    above = [*file.parents]
    try:
        folders = above[: above.index(package)]
        if links_outside(file) or any(folder.is_symlink() for folder in folders):
            raise Problem(f"{file}: a link, not a file of the package", hint=STRANGER)
        there = file.is_file()
    except OSError:  # an impossible file name
        there = False
    if not there:
        raise Problem(f"{file}: missing from the package", hint=AGAIN)


def _parse(file: Path) -> Any:
    model = schema().Model()
    size = file.stat().st_size
    if size > LARGEST_FILE:
        raise Problem(f"{file}: {size} bytes, at most {LARGEST_FILE} are read", hint=STRANGER)
    try:
        model.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's DecodeError, if protobuf is installed
        raise Problem(f"{file}: damaged, not a Core ML model ({error})", hint=AGAIN) from error
    return model


def _choose(path: Path, model: Any, function: str | None) -> tuple[str, Any]:
    """Return the function's name and the description of its inputs and outputs."""
    names = sorted(model.mlProgram.functions)
    name = function or model.description.defaultFunctionName or "main"
    if name not in names:
        raise Problem(
            f"{path}: no function {name!r}, it has {', '.join(names) or 'none'}",
            hint="name one of those",
        )
    for description in model.description.functions:
        if description.name == name:
            return name, description
    return name, model.description


def _is_state(value: Any) -> bool:
    return bool(value.type.WhichOneof("type") == "stateType")


def _spec(path: Path, name: str, kind: Any) -> Spec:
    if kind.WhichOneof("type") != "tensorType":
        raise Problem(f"{path}: {name} is not a tensor ({kind.WhichOneof('type')})", hint=AGAIN)
    tensor = kind.tensorType
    if any(size.WhichOneof("dimension") != "constant" for size in tensor.dimensions) or (
        tensor.rank != len(tensor.dimensions)
    ):
        raise Problem(
            f"{path}: {name} has no fixed shape", hint="export it with one shape for each input"
        )
    dtypes = type(tensor).DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number
    dtype = dtypes[tensor.dataType].name.lower() if tensor.dataType in dtypes else "unknown"
    if dtype not in WHOLE and dtype not in PACKED and dtype != "string":
        raise Problem(f"{path}: {name} has the unsupported type {dtype}", hint=AGAIN)
    return _bounded(path, name, [size.constant.size for size in tensor.dimensions], dtype)


def _bounded(path: Path, name: str, shape: Sequence[int], dtype: str) -> Spec:
    if math.prod(shape) > LARGEST or any(size > LARGEST for size in shape):
        raise Problem(
            f"{path}: {name} declares shape {list(shape)}, more than {LARGEST} elements",
            hint=STRANGER,
        )
    return Spec(name, tuple(shape), dtype)


def _described(path: Path, feature: Any) -> Spec:
    kind = feature.type.WhichOneof("Type")
    state = kind == "stateType"
    array = feature.type.stateType.arrayType if state else feature.type.multiArrayType
    if array.dataType not in DECLARED:
        raise Problem(
            f"{path}: {feature.name} is described as {kind} (type {array.dataType})", hint=AGAIN
        )
    return _bounded(path, feature.name, list(array.shape), DECLARED[array.dataType])
