"""Parses an ONNX file and refuses dangerous graphs before onnxruntime opens it.

onnxruntime trusts a graph: it reads weights from any file, allocates whatever a shape asks for, and
runs endless loops. EdgeWhisper's graphs need none of that, so such files are refused here. Weights
are skipped, and the number of parsed fields is limited.

    ModelProto       7 graph, 8 opset_import, 20 training_info, 25 functions
    GraphProto       1 node, 5 initializer, 15 sparse_initializer
    NodeProto        1 input, 2 output, 3 name, 4 op_type, 5 attribute, 7 domain
    AttributeProto   1 name, 3 i, 5 t, 6 g, 8 ints, 10 tensors, 11 graphs, 22 and 23 sparse
    TensorProto      1 dims, 2 data_type, 4 5 6 7 10 11 values, 8 name, 9 raw_data, 13 external_data

Standard library only. Memory that a graph allocates by computing (such as a tensor that doubles at
every node) cannot be detected here; the runner's commands have a memory limit, see __main__.
"""

import math
import mmap
import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..problem import RunnerProblem
from .files import AGAIN, UNTRUSTED, links_outside

DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Operator domains built into onnxruntime; all others need a library."""

BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 16: 16, 21: 4, 22: 4}
"""Data type -> bits per element: floats, integers, bool, bfloat16 and 4-bit integers."""
INT64 = 7

MOST_BYTES = 2**31
MOST_FIELDS = 3_000_000
MOST_PARTS = 20_000
"""Most nodes and constants; whisper-large has about 4000."""
MOST_ELEMENTS = 2**28
"""Most elements of a tensor that a graph creates from a shape: 1 GiB of float32."""
SMALL = 16
"""Most elements of a constant that may be a shape."""
DEEPEST = 4

SHAPES = {"ConstantOfShape": (0,), "Expand": (1,), "Tile": (1,)}
"""Operator -> inputs, the product of whose values is the number of output elements."""
COUNTS = {"Range": (0, 1, 2), "Pad": (1,), "OneHot": (1,), "Resize": (3,)}
"""Operator -> inputs, each of whose values is a number of output elements along one axis."""

Span = tuple[int, int]


@dataclass
class Constant:
    """A stored tensor."""

    name: str = ""
    dims: tuple[int, ...] = ()
    data_type: int = 0
    stored: int = 0
    """Bytes stored in the graph's own file."""
    raw: Span | None = None
    values: tuple[int, ...] = ()
    """The values of a small int64 constant."""
    location: str | None = None
    offset: int = 0
    length: int | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return -(-self.elements * BITS[self.data_type] // 8)


@dataclass
class Node:
    """One operator."""

    kind: str = ""
    name: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


@dataclass
class Parts:
    """All operators and constants of a graph and its subgraphs."""

    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    opsets: dict[str, int] = field(default_factory=dict)


def read_graph(path: Path, files: Collection[Path] = (), subgraphs: bool = False) -> Parts:
    """Return the parts of an ONNX file; raise RunnerProblem for a damaged or dangerous one.

    `files` are the artifact's files, which may hold external constants. With `subgraphs`, loops and
    branches are allowed.
    """
    try:
        size = path.stat().st_size
        if not 0 < size <= MOST_BYTES:
            raise RunnerProblem(f"{path}: not an ONNX graph ({size} bytes)", AGAIN)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = Reader(path, data, subgraphs)
            reader.model()
    except OSError as error:
        raise RunnerProblem(f"{path}: cannot be read ({error.strerror})", AGAIN) from None
    for constant in reader.parts.constants.values():
        check_constant(path, constant, files)
    for node in reader.parts.nodes:
        check_node(path, node, reader.parts)
    return reader.parts


class Reader:
    """A parser of one file: the parts so far, and how many more fields may be parsed."""

    def __init__(self, path: Path, data: mmap.mmap, subgraphs: bool) -> None:
        self.path, self.data, self.subgraphs = path, data, subgraphs
        self.parts, self.left = Parts(), MOST_FIELDS

    def damaged(self, place: int) -> RunnerProblem:
        return RunnerProblem(
            f"{self.path}: damaged or truncated ONNX graph at byte {place} of {len(self.data)}",
            AGAIN,
        )

    def refused(self, what: str) -> RunnerProblem:
        return RunnerProblem(f"{self.path}: {what}", UNTRUSTED)

    def varint(self, place: int, stop: int) -> tuple[int, int]:
        """Return the varint at an offset, and the offset after it."""
        value = shift = 0
        while place < stop and shift < 70:
            byte = self.data[place]
            value |= (byte & 127) << shift
            place += 1
            if byte < 128:
                return value, place
            shift += 7
        raise self.damaged(place)

    def fields(self, span: Span) -> Iterator[tuple[int, int | Span]]:
        """Yield the fields of a message: the number, and an integer or the span of the bytes."""
        data, varint = self.data, self.varint
        place, stop = span
        while place < stop:
            self.left -= 1
            if self.left < 0:
                raise self.refused(f"more than {MOST_FIELDS} fields in one graph")
            key, place = (data[place], place + 1) if data[place] < 128 else varint(place, stop)
            kind, number = key & 7, key >> 3
            if kind == 0:
                value, place = varint(place, stop)
                yield number, value
                continue
            if kind == 2:
                size, place = varint(place, stop)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise self.damaged(place)
            if size > stop - place or number == 0:
                raise self.damaged(place)
            yield number, (place, place + size)
            place += size

    def text(self, value: int | Span) -> str:
        start, stop = self.span(value)
        if stop - start > 4096:
            raise self.refused(f"a name of {stop - start} bytes")
        try:
            return self.data[start:stop].decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(start) from None

    def span(self, value: int | Span) -> Span:
        if isinstance(value, int):
            raise self.damaged(0)
        return value

    def numbers(self, value: int | Span) -> Iterator[int]:
        """Yield the signed integers of a single or packed field."""
        if isinstance(value, int):
            yield signed(value)
            return
        place, stop = value
        while place < stop:
            number, place = self.varint(place, stop)
            yield signed(number)

    def model(self) -> None:
        has_graph = False
        for number, value in self.fields((0, len(self.data))):
            if number == 7:
                has_graph = True
                self.graph(self.span(value), 0)
            elif number == 8:
                self.opset(self.span(value))
            elif number in (20, 25):
                raise self.refused("functions or training steps, which are not supported")
        if not has_graph or not self.parts.nodes:
            raise self.damaged(len(self.data))

    def opset(self, span: Span) -> None:
        domain, version = "", 0
        for number, value in self.fields(span):
            if number == 1:
                domain = self.text(value)
            elif number == 2 and isinstance(value, int):
                version = value
        if domain not in DOMAINS:
            raise self.refused(f"operators of {domain!r}, which need a library; none is loaded")
        self.parts.opsets[domain] = version

    def graph(self, span: Span, depth: int) -> None:
        if depth > DEEPEST:
            raise self.refused(f"subgraphs more than {DEEPEST} deep")
        for number, value in self.fields(span):
            if number == 1:
                self.parts.nodes.append(self.node(self.span(value), depth))
            elif number == 5:
                self.add(self.constant(self.span(value)))
            elif number == 15:
                raise self.refused("sparse constants, which are not supported")
            if len(self.parts.nodes) + len(self.parts.constants) > MOST_PARTS:
                raise self.refused(f"more than {MOST_PARTS} operators and constants")

    def add(self, constant: Constant) -> None:
        self.parts.constants[constant.name] = constant

    def node(self, span: Span, depth: int) -> Node:
        node = Node()
        for number, value in self.fields(span):
            if number in (1, 2):
                (node.inputs if number == 1 else node.outputs).append(self.text(value))
            elif number == 3:
                node.name = self.text(value)
            elif number == 4:
                node.kind = self.text(value)
            elif number == 5:
                self.attribute(node, self.span(value), depth)
            elif number == 7:
                node.domain = self.text(value)
        return node

    def attribute(self, node: Node, span: Span, depth: int) -> None:
        """Parse an attribute; its subgraphs and tensors count as the graph's own. A tensor gets the
        name of the node's output, which is right for Constant nodes."""
        for number, value in self.fields(span):
            if number in (3, 8):
                large = next((n for n in self.numbers(value) if abs(n) > MOST_BYTES), None)
                if large is not None:
                    raise self.refused(f"{node.kind} {node.name!r} with the number {large}")
            elif number in (5, 10):
                constant = self.constant(self.span(value))
                constant.name = node.outputs[0] if node.outputs else constant.name
                self.add(constant)
            elif number in (6, 11):
                if not self.subgraphs:
                    raise self.refused(f"a loop or a branch ({node.kind} {node.name!r})")
                self.graph(self.span(value), depth + 1)
            elif number in (22, 23):
                raise self.refused("sparse constants, which are not supported")

    def constant(self, span: Span) -> Constant:
        constant = Constant()
        dims: list[int] = []
        for number, value in self.fields(span):
            if number == 1:
                dims += self.numbers(value)
                if len(dims) > 8:
                    raise self.refused(f"a constant of {len(dims)} or more axes")
            elif number == 2 and isinstance(value, int):
                constant.data_type = value
            elif number == 8:
                constant.name = self.text(value)
            elif number == 9:
                constant.raw = self.span(value)
                constant.stored += constant.raw[1] - constant.raw[0]
            elif number in (4, 5, 6, 7, 10, 11):
                constant.stored += 10 if isinstance(value, int) else value[1] - value[0]
                if number == 7 and constant.stored <= 10 * SMALL:
                    constant.values += tuple(self.numbers(value))
            elif number == 13:
                self.external(constant, self.span(value))
        constant.dims = tuple(dims)
        sizes = range(8, 8 * SMALL + 1, 8)
        if constant.data_type == INT64 and constant.raw and constant.stored in sizes:
            start, stop = constant.raw
            constant.values = struct.unpack(f"<{constant.stored // 8}q", self.data[start:stop])
        return constant

    def external(self, constant: Constant, span: Span) -> None:
        """Parse one key and value of the location of a constant in another file."""
        pair = {number: self.text(value) for number, value in self.fields(span) if number < 3}
        key, value = pair.get(1, ""), pair.get(2, "")
        if key == "location":
            constant.location = value
        elif key in ("offset", "length"):
            if not value.isdecimal() or len(value) > 18:
                raise self.refused(f"the constant {constant.name!r} with {key} {value[:40]!r}")
            setattr(constant, key, int(value))


def signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def check_constant(path: Path, constant: Constant, files: Collection[Path]) -> None:
    """Raise RunnerProblem unless a constant's bytes fit its shape and are in the artifact."""
    name, dims = constant.name, list(constant.dims)
    if constant.data_type not in BITS:
        raise RunnerProblem(
            f"{path}: the constant {name!r} has the data type {constant.data_type}, not numbers",
            AGAIN,
        )
    if min(dims, default=0) < 0 or constant.elements > MOST_BYTES:
        raise RunnerProblem(f"{path}: the constant {name!r} has the shape {dims}", UNTRUSTED)
    if constant.location is not None:
        check_external(path, constant, files)
        return
    needed = constant.bytes
    fits = constant.stored == needed if constant.raw else needed <= 8 * constant.stored
    if not fits:
        raise RunnerProblem(
            f"{path}: damaged, the constant {name!r} of shape {dims} needs {needed} bytes and has "
            f"{constant.stored}",
            AGAIN,
        )


def check_external(path: Path, constant: Constant, files: Collection[Path]) -> None:
    """Raise RunnerProblem unless an external constant is in a listed file that is large enough."""
    place = path.parent / str(constant.location)
    try:
        listed = os.path.normpath(place) in map(os.path.normpath, files)
        plain = place.is_file() and not links_outside(place)
    except (OSError, ValueError):
        listed = plain = False
    if not listed or not plain:
        raise RunnerProblem(
            f"{path}: the constant {constant.name!r} is stored in {constant.location!r}, which is "
            "not a file of the artifact",
            UNTRUSTED,
        )
    end = constant.offset + constant.bytes
    if constant.length not in (None, constant.bytes) or end > place.stat().st_size:
        raise RunnerProblem(
            f"{path}: the constant {constant.name!r} of shape {list(constant.dims)} exceeds the "
            f"{place.stat().st_size} bytes of {constant.location}",
            AGAIN,
        )


def check_node(path: Path, node: Node, parts: Parts) -> None:
    """Raise RunnerProblem for operators outside onnxruntime, and for huge output shapes."""
    if node.domain not in DOMAINS:
        raise RunnerProblem(
            f"{path}: the operator {node.kind} of {node.domain!r} needs a library; none is loaded",
            UNTRUSTED,
        )
    for index in (*SHAPES.get(node.kind, ()), *COUNTS.get(node.kind, ())):
        constant = parts.constants.get(node.inputs[index]) if index < len(node.inputs) else None
        values = [abs(value) for value in constant.values] if constant else []
        asked = math.prod(values) if node.kind in SHAPES else max(values, default=0)
        if asked > MOST_ELEMENTS:
            raise RunnerProblem(
                f"{path}: {node.kind} {node.name!r} creates {asked} elements; the limit is "
                f"{MOST_ELEMENTS}",
                UNTRUSTED,
            )
