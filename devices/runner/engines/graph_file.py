"""What stands in an ONNX file, read from its bytes before onnxruntime gets it.

onnxruntime does what a graph says: it reads weights from any file, takes as much memory as a shape
asks for, and goes round a loop for ever. A graph of ours needs none of that, so files that ask for
it are refused here. Weights are stepped over, not read; what is read is bounded.

    ModelProto       7 graph, 8 opset_import, 20 training_info, 25 functions
    GraphProto       1 node, 5 initializer, 15 sparse_initializer
    NodeProto        1 input, 2 output, 3 name, 4 op_type, 5 attribute, 7 domain
    AttributeProto   1 name, 3 i, 5 t, 6 g, 8 ints, 10 tensors, 11 graphs, 22 and 23 sparse
    TensorProto      1 dims, 2 data_type, 4 5 6 7 10 11 values, 8 name, 9 raw_data, 13 external_data

Standard library only. Memory that is asked for by computing (a sum of sums that doubles) cannot be
seen from here: the runner's commands run under a limit for that, see __main__.
"""

import math
import mmap
import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..problem import RunnerProblem
from .links import leads_out

AGAIN = "copy the whole artifact again, or export it again"
UNTRUSTED = "do not use this artifact: it was not written by EdgeWhisper"

DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Those of onnxruntime itself; operators of all others come in libraries."""

BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 16: 16, 21: 4, 22: 4}
"""Data type -> bits of an element: floats, integers, bool, bfloat16 and 4-bit integers."""
INT64 = 7

MOST_BYTES = 2**31
MOST_FIELDS = 3_000_000
MOST_PARTS = 20_000
"""Nodes and constants; whisper-large has some 4000."""
MOST_ELEMENTS = 2**28
"""Of one tensor that a graph makes from a shape: 1 GiB of float32."""
FEW = 16
"""Elements of a constant that can be a shape."""
DEEPEST = 4

SHAPES = {"ConstantOfShape": (0,), "Expand": (1,), "Tile": (1,)}
"""Operators whose output has as many elements as the product of these inputs' values."""
COUNTS = {"Range": (0, 1, 2), "Pad": (1,), "OneHot": (1,), "Resize": (3,)}
"""Likewise, as these values say one by one."""

Span = tuple[int, int]


@dataclass
class Constant:
    """A stored tensor."""

    name: str = ""
    dims: tuple[int, ...] = ()
    data_type: int = 0
    stored: int = 0
    """Bytes of it in the graph's own file."""
    raw: Span | None = None
    values: tuple[int, ...] = ()
    """Where it is a few int64."""
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
    """All operators and constants of a graph, those of its subgraphs as well."""

    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    opsets: dict[str, int] = field(default_factory=dict)


def read_graph(path: Path, files: Collection[str] = (), subgraphs: bool = False) -> Parts:
    """Return the parts of an ONNX file, or the letter that says why it is not one to be run.

    `files` are the names that the manifest lists, in which constants may stand as well;
    `subgraphs` lets loops and branches pass.
    """
    try:
        size = path.stat().st_size
        if not 0 < size <= MOST_BYTES:
            raise RunnerProblem(f"{path}: {size} bytes are no ONNX graph", AGAIN)
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
    """A walk through one file: its place, what was found, and how much more may be read."""

    def __init__(self, path: Path, data: mmap.mmap, subgraphs: bool) -> None:
        self.path, self.data, self.subgraphs = path, data, subgraphs
        self.parts, self.left = Parts(), MOST_FIELDS

    def damaged(self, place: int) -> RunnerProblem:
        return RunnerProblem(
            f"{self.path}: damaged or cut short, no ONNX graph at byte {place} of {len(self.data)}",
            AGAIN,
        )

    def refused(self, what: str) -> RunnerProblem:
        return RunnerProblem(f"{self.path}: {what}", UNTRUSTED)

    def varint(self, place: int, stop: int) -> tuple[int, int]:
        """Return the number at a place, and the place behind it."""
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
        """Yield the fields of a message: number, and an integer or where its bytes are."""
        data, varint = self.data, self.varint
        place, stop = span
        while place < stop:
            self.left -= 1
            if self.left < 0:
                raise self.refused(f"more than {MOST_FIELDS} fields in one graph")
            key, place = (data[place], place + 1) if data[place] < 128 else varint(place, stop)
            kind, found = key & 7, key >> 3
            if kind == 0:
                value, place = varint(place, stop)
                yield found, value
                continue
            if kind == 2:
                size, place = varint(place, stop)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise self.damaged(place)
            if size > stop - place or found == 0:
                raise self.damaged(place)
            yield found, (place, place + size)
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
        """Yield signed integers, alone or packed."""
        if isinstance(value, int):
            yield signed(value)
            return
        place, stop = value
        while place < stop:
            number, place = self.varint(place, stop)
            yield signed(number)

    def model(self) -> None:
        found = False
        for number, value in self.fields((0, len(self.data))):
            if number == 7:
                found = True
                self.graph(self.span(value), 0)
            elif number == 8:
                self.opset(self.span(value))
            elif number in (20, 25):
                raise self.refused(
                    "functions or training steps of its own, which no graph has here"
                )
        if not found or not self.parts.nodes:
            raise self.damaged(len(self.data))

    def opset(self, span: Span) -> None:
        domain, version = "", 0
        for number, value in self.fields(span):
            if number == 1:
                domain = self.text(value)
            elif number == 2 and isinstance(value, int):
                version = value
        if domain not in DOMAINS:
            raise self.refused(f"operators of {domain!r}, which come in a library; none is loaded")
        self.parts.opsets[domain] = version

    def graph(self, span: Span, depth: int) -> None:
        if depth > DEEPEST:
            raise self.refused(f"subgraphs more than {DEEPEST} deep")
        for number, value in self.fields(span):
            if number == 1:
                self.parts.nodes.append(self.node(self.span(value), depth))
            elif number == 5:
                self.keep(self.constant(self.span(value)))
            elif number == 15:
                raise self.refused("sparse constants, which no graph has here")
            if len(self.parts.nodes) + len(self.parts.constants) > MOST_PARTS:
                raise self.refused(f"more than {MOST_PARTS} operators and constants")

    def keep(self, constant: Constant) -> None:
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
        """Subgraphs and tensors in attributes count as the graph's own; a tensor gets the name of
        the node's output, which it is where the node is a Constant."""
        for number, value in self.fields(span):
            if number in (3, 8):
                large = next((n for n in self.numbers(value) if abs(n) > MOST_BYTES), None)
                if large is not None:
                    raise self.refused(f"{node.kind} {node.name!r} with the number {large}")
            elif number in (5, 10):
                constant = self.constant(self.span(value))
                constant.name = node.outputs[0] if node.outputs else constant.name
                self.keep(constant)
            elif number in (6, 11):
                if not self.subgraphs:
                    raise self.refused(f"a loop or a branch ({node.kind} {node.name!r})")
                self.graph(self.span(value), depth + 1)
            elif number in (22, 23):
                raise self.refused("sparse constants, which no graph has here")

    def constant(self, span: Span) -> Constant:
        found = Constant()
        dims: list[int] = []
        for number, value in self.fields(span):
            if number == 1:
                dims += self.numbers(value)
                if len(dims) > 8:
                    raise self.refused(f"a constant of {len(dims)} or more axes")
            elif number == 2 and isinstance(value, int):
                found.data_type = value
            elif number == 8:
                found.name = self.text(value)
            elif number == 9:
                found.raw = self.span(value)
                found.stored += found.raw[1] - found.raw[0]
            elif number in (4, 5, 6, 7, 10, 11):
                found.stored += 10 if isinstance(value, int) else value[1] - value[0]
                if number == 7 and found.stored <= 10 * FEW:
                    found.values += tuple(self.numbers(value))
            elif number == 13:
                self.elsewhere(found, self.span(value))
        found.dims = tuple(dims)
        if found.data_type == INT64 and found.raw and found.stored in range(8, 8 * FEW + 1, 8):
            start, stop = found.raw
            found.values = struct.unpack(f"<{found.stored // 8}q", self.data[start:stop])
        return found

    def elsewhere(self, constant: Constant, span: Span) -> None:
        """One key and its value of what says where in another file a constant is."""
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


def check_constant(path: Path, constant: Constant, files: Collection[str]) -> None:
    """Its bytes must be as many as its shape and type say, and stand in a file of the artifact."""
    name, dims = constant.name, list(constant.dims)
    if constant.data_type not in BITS:
        raise RunnerProblem(
            f"{path}: the constant {name!r} is of data type {constant.data_type}, not numbers",
            AGAIN,
        )
    if min(dims, default=0) < 0 or constant.elements > MOST_BYTES:
        raise RunnerProblem(f"{path}: the constant {name!r} has the shape {dims}", UNTRUSTED)
    if constant.location is not None:
        check_elsewhere(path, constant, files)
        return
    wanted = constant.bytes
    fits = constant.stored == wanted if constant.raw else wanted <= 8 * constant.stored
    if not fits:
        raise RunnerProblem(
            f"{path}: damaged, the constant {name!r} of shape {dims} needs {wanted} bytes and has "
            f"{constant.stored}",
            AGAIN,
        )


def check_elsewhere(path: Path, constant: Constant, files: Collection[str]) -> None:
    """A file of its own must be one that the manifest lists, beside the graph, and large enough."""
    root = path.parent
    while root.name and not (root / "manifest.json").is_file():
        root = root.parent
    place = path.parent / str(constant.location)
    try:
        inside = Path(os.path.normpath(place)).relative_to(os.path.normpath(root))
        listed = inside.as_posix() in files
        plain = place.is_file() and not leads_out(place)
    except (OSError, ValueError):
        listed = plain = False
    if not listed or not plain:
        raise RunnerProblem(
            f"{path}: the constant {constant.name!r} stands in {constant.location!r}, which is no "
            "file of the artifact",
            UNTRUSTED,
        )
    end = constant.offset + constant.bytes
    if constant.length not in (None, constant.bytes) or end > place.stat().st_size:
        raise RunnerProblem(
            f"{path}: the constant {constant.name!r} of shape {list(constant.dims)} does not lie "
            f"within the {place.stat().st_size} bytes of {constant.location}",
            AGAIN,
        )


def check_node(path: Path, node: Node, parts: Parts) -> None:
    """Its operator is one of onnxruntime's, and no constant asks it for memory beyond reason."""
    if node.domain not in DOMAINS:
        raise RunnerProblem(
            f"{path}: the operator {node.kind} of {node.domain!r} comes in a library; "
            "none is loaded",
            UNTRUSTED,
        )
    for index in (*SHAPES.get(node.kind, ()), *COUNTS.get(node.kind, ())):
        constant = parts.constants.get(node.inputs[index]) if index < len(node.inputs) else None
        values = [abs(value) for value in constant.values] if constant else []
        asked = math.prod(values) if node.kind in SHAPES else max(values, default=0)
        if asked > MOST_ELEMENTS:
            raise RunnerProblem(
                f"{path}: {node.kind} {node.name!r} asks for {asked} elements, at most "
                f"{MOST_ELEMENTS} are given",
                UNTRUSTED,
            )
