"""The token table of the ONNX graphs, dense or factorised, and the encoder's positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from export.onnx.graph import FUSED, INT8, Graph
from export.onnx.layers import (
    float_table,
    joined,
    nbits_product,
    quantise,
    scale_table,
    unpacked,
    widened,
)
from export.quantise import Scheme, column_factors, pack, pack_3_bits, row_parts
from export.weights import Floats

SINUSOID_ERROR = 1e-5
"""Largest difference from Whisper's sinusoids at which positions are computed instead of stored."""
HALF_STEP = 2**-11
"""The same for a table of float16 and sinusoids rounded to float16: the distance of two float16
below 1. In OpenAI's tables, 98.6 % of the rounded sinusoids are equal to the stored numbers. On 80
clips with tiny.en, int8 loses 0.61 points of WER without the rounding and 0.00 with it. A stored
table loses 0.24 points and takes 1.2 MB."""
PRODUCT_BYTES = 12 * 2**20
"""Most bytes of a mapped table in one product."""
SMOOTHING = 0.75
"""Exponent of the column scales: how much of the range of a column is moved to its factor."""


def column_exponents(table: Floats) -> list[int]:
    """Return an exponent of two per column: its power is close to the column's largest magnitude
    ** SMOOTHING."""
    largest = np.maximum(np.abs(table).max(0), 2.0**-100)
    return np.round(SMOOTHING * np.log2(largest)).astype(int).tolist()


def column_scales(table: Floats) -> Floats:
    """Return the powers of two of `column_exponents`."""
    return np.exp2(np.array(column_exponents(table), np.float32))


class TokenTable:
    """The tied token table (vocab, d_model), stored once, for look-ups and for logits.

    In int8 every token has a scale, which both uses share. A few columns of Whisper's tables are
    far larger than the others and would use up the range of the codes. So columns are divided by
    powers of two, and their factors are multiplied by these, as in SmoothQuant (arXiv:2211.10438,
    eq. 3). A table whose scheme the checkpoint names is stored unchanged.

    QGemm is the one operator that multiplies with the rows as they are stored. The runtime reads a
    packed copy for its product, and look-ups touch few rows, so little of a memory-mapped table
    stays in memory. Packing also needs a transposed copy, so the product of a mapped table is split
    into pieces: loading tiny.en takes at most 118 instead of 144 MB.
    """

    def __init__(self, g: Graph, weight: Floats, scheme: Scheme | None = None) -> None:
        self.g = g
        self.vocab, self.width = weight.shape
        self.scale: str | None = None
        self.columns: str | None = None
        self.codes: NDArray | None = None
        """The table in 8 bits, (vocab, d_model)."""
        if scheme is None and g.quantises:
            columns = column_scales(weight)
            weight, self.columns = weight / columns, g.constant(columns)
        self.scheme = g.scheme(scheme, INT8)
        if self.scheme.columns:
            self.columns = g.constant(column_factors(self.scheme).numpy())
        if self.scheme.bits == 4:
            codes, scale = quantise(weight, self.scheme)
            self.table = packed_table(g, codes, self.scheme)
            self.scale = scale_table(g, scale, self.scheme)
        elif self.scheme.bits == 8:
            self.codes, scale = quantise(weight, self.scheme)
            self.table, self.scale = g.constant(self.codes), g.constant(scale)
        else:
            self.table = widened(g, weight, self.scheme)

    def look_up(self, ids: str) -> str:
        """Return embeddings: ids (b, s) -> (b, s, d_model)."""
        return self._scaled(self.g.op("Gather", self.table, ids), ids)

    def widened(self) -> str:
        """Return the whole table in float32, (vocab, d_model)."""
        return self._scaled(self.table)

    def _scaled(self, rows: str, ids: str = "") -> str:
        g = self.g
        if self.scale is None:
            return rows
        scale = g.op("Gather", self.scale, ids) if ids else self.scale
        column = g.op("Unsqueeze", scale, g.constant([-1]))
        if self.scheme.bits == 4:
            blocks = g.op("Mul", unpacked(g, rows), column)
            rows = joined(g, blocks, self.width, self.scheme, 3 if ids else 2)
            return g.op("Mul", rows, self.columns) if self.columns else rows
        rows = g.op("Mul", g.op("Cast", rows, to=TensorProto.FLOAT), column)
        return g.op("Mul", rows, self.columns) if self.columns else rows

    def logits(self, x: str) -> str:
        """Return logits: x (b, n, d_model) -> (b, n, vocab)."""
        g = self.g
        if self.scheme.bits == 4:
            assert self.scale is not None
            size = (self.width, self.vocab)
            x = g.op("Mul", x, self.columns) if self.columns else x
            return nbits_product(g, x, self.table, self.scale, self.scheme, size)
        shape = g.op("Concat", g.op("Shape", x, end=-1), g.constant([-1]), axis=0)
        x = g.op("Flatten", x, axis=-1)
        if self.scale is None:
            return g.op("Reshape", g.op("Gemm", x, self.table, transB=1), shape)
        parts = [g.op("Reshape", y, shape) for y in self._products(self.quantised(x))]
        return parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=-1)

    def _products(self, x: Sequence[str]) -> Iterator[str]:
        """Yield the logits (n, tokens) of one piece of the table after the other."""
        assert self.codes is not None
        pieces = -(-self.codes.nbytes // PRODUCT_BYTES) if self.g.mapped else 1
        ends = [len(part) for part in np.array_split(self.codes, pieces)]
        for begin, end in pairwise([0, *accumulate(ends)]):
            yield self.logits_between(x, begin, end)

    def logits_between(self, x: Sequence[str], begin: int, end: int) -> str:
        """Return the logits of a range of tokens from an int8 table: x (n, d_model) as quantised()
        returns it -> (n, end - begin)."""
        g, table, scale = self.g, self.table, self.scale
        assert self.codes is not None and scale is not None
        if end - begin < self.vocab:
            table = g.part(table, self.codes[begin:end], begin * self.width)
            scale = g.op("Slice", scale, g.constant([begin]), g.constant([end]))
        none = g.constant(np.zeros(1, np.int8))  # the weights are symmetric
        zeros = g.op("Expand", none, g.constant([end - begin]))
        return g.op("QGemm", *x, table, scale, zeros, domain=FUSED, transB=1)

    def logits_of(self, x: Sequence[str], tokens: str) -> str:
        """Return the logits of some tokens from an int8 table: x (1, d_model) as quantised()
        returns it, ids (n,) -> (1, n).

        The codes are multiplied as floats. They are integers, and their sums are below 2**24, so
        the result equals that of `logits` to the bit on every processor. Up to a width of 518 no
        sum can be larger; in wider models only rows of the largest codes could be.
        """
        g = self.g
        assert self.scheme.bits == 8 and self.scale is not None
        q, scale, zero = x
        wide = (g.op("Cast", codes, to=TensorProto.FLOAT) for codes in (q, zero))
        # Cast would take five times as long for the rows
        rows = g.op("DequantizeLinear", g.op("Gather", self.table, tokens), g.constant(1.0))
        sums = g.op("Gemm", g.op("Sub", *wide), rows, transB=1)  # (1, n)
        return g.op("Mul", sums, g.op("Mul", scale, g.op("Gather", self.scale, tokens)))

    def quantised(self, x: str) -> list[str]:
        """Return hidden states (n, d_model) in 8 bits, with their scale and zero point."""
        return self.g.quantised(self.g.op("Mul", x, self.columns) if self.columns else x)


class SplitTable:
    """The tied token table, whose first rows have 8 bits and all others 4."""

    def __init__(self, g: Graph, weight: Floats, scheme: Scheme) -> None:
        self.g, self.rows = g, scheme.rows_in_8_bits
        plain = replace(scheme, rows_in_8_bits=0, rows_in_3_bits=None)
        self.first = TokenTable(g, weight[: self.rows], replace(plain, bits=8))
        if scheme.rows_in_3_bits:
            begin, end = scheme.rows_in_3_bits
            plain = replace(plain, rows_in_3_bits=(begin - self.rows, end - self.rows))
        self.rest = TokenTable(g, weight[self.rows :], plain)

    def look_up(self, ids: str) -> str:
        """Return embeddings: ids (b, s) -> (b, s, d_model)."""
        g = self.g
        first, rest = g.constant(self.rows - 1), g.constant(self.rows)
        places = g.op("Min", ids, first), g.op("Sub", g.op("Max", ids, rest), rest)
        is_first = g.op("Unsqueeze", g.op("Less", ids, rest), g.constant([-1]))
        rows = (table.look_up(p) for table, p in zip((self.first, self.rest), places, strict=True))
        return g.op("Where", is_first, *rows)

    def logits(self, x: str) -> str:
        """Return logits: x (b, n, d_model) -> (b, n, vocab)."""
        return self.g.op("Concat", self.first.logits(x), self.rest.logits(x), axis=-1)


def packed_table(g: Graph, codes: NDArray, scheme: Scheme) -> str:
    """Store codes (vocab, d_model) in 4 bits, and rows in 3 bits in three. The runtime widens these
    to 4 bits once, when it loads the graph."""
    parts = row_parts(torch.from_numpy(codes), scheme)
    stored = [
        _three_bits(g, rows, part) if part.bits == 3 else g.constant(pack(rows, part).numpy())
        for rows, part in parts
    ]
    return stored[0] if len(stored) == 1 else g.op("Concat", *stored, axis=0)


def _three_bits(g: Graph, codes: torch.Tensor, scheme: Scheme) -> str:
    """Store codes in 3 bits and return them packed in 4 bits, see `pack_3_bits`."""
    parts = [g.constant(part.numpy()) for part in pack_3_bits(codes, scheme)]
    quarters = [g.op("BitwiseAnd", part, g.constant(np.array(0x77, np.uint8))) for part in parts]
    free = [
        g.op("BitwiseAnd", shifted, g.constant(np.array(0x11 << bit, np.uint8)))
        for bit, part in enumerate(parts)
        for shifted in [
            g.op("BitShift", part, g.constant(np.array(3 - bit, np.uint8)), direction="RIGHT")
        ]
    ]
    last = g.op("BitwiseOr", g.op("BitwiseOr", *free[:2]), free[2])
    codes_plus_4 = g.op("Concat", *quarters, last, axis=-1)
    return g.op("Add", codes_plus_4, g.constant(np.array(0x44, np.uint8)))


class FactorisedTable:
    """The tied token table as a product of rows (vocab, r) and basis (r, d_model), each stored
    once.

    In int8 every token and every row of the basis has a scale. Logits are two int8 products. For
    look-ups the runtime widens the basis once, when it loads the graph, and multiplies in float32.
    """

    def __init__(self, g: Graph, rows: Floats, basis: Floats, scheme: Scheme | None = None) -> None:
        self.g = g
        self.rows, self.basis = TokenTable(g, rows, scheme), TokenTable(g, basis, scheme)

    def look_up(self, ids: str) -> str:
        """Return embeddings: ids (b, s) -> (b, s, d_model)."""
        return self.g.op("MatMul", self.rows.look_up(ids), self.basis.widened())

    def logits(self, x: str) -> str:
        """Return logits: x (b, n, d_model) -> (b, n, vocab)."""
        return self.rows.logits(self.basis.logits(x))


def sinusoids(g: Graph, length: str, rates: Floats) -> str:
    """Compute Whisper's positions: length (1,) int64, rates (d / 2,) -> (length, d)."""
    stop = g.op("Squeeze", length, g.constant([0]))
    places = g.op("Range", g.constant(0), stop, g.constant(1))
    column = g.op("Unsqueeze", g.op("Cast", places, to=TensorProto.FLOAT), g.constant([1]))
    angles = g.op("Mul", column, g.constant(rates))  # (length, d / 2)
    return g.op("Concat", g.op("Sin", angles), g.op("Cos", angles), axis=1)


def encoder_positions(g: Graph, table: Floats, length: str) -> str:
    """Return the first `length` rows of the table, computed if they are Whisper's sinusoids, or
    these rounded to float16."""
    rates = sinusoid_rates(table.shape[1])
    angles = np.arange(len(table), dtype=np.float32)[:, None] * rates
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    if within(SINUSOID_ERROR, expected, table):
        return sinusoids(g, length, rates)
    halves = expected.astype(np.float16)
    if g.halves and (table == table.astype(np.float16)).all() and within(HALF_STEP, halves, table):
        rounded = g.op("Cast", sinusoids(g, length, rates), to=TensorProto.FLOAT16)
        return g.op("Cast", rounded, to=TensorProto.FLOAT)
    return g.op("Slice", float_table(g, table), g.constant([0]), length)


def within(error: float, expected: Floats, table: Floats) -> bool:
    """Return whether two tables have the same shape and differ by at most `error`."""
    return expected.shape == table.shape and bool(np.abs(expected - table).max() <= error)


def sinusoid_rates(width: int) -> Floats:
    """Return the angle per position of every sine, (width / 2,), from 1 down to 1/10000. The
    rounding is Whisper's, because an angle multiplies the error of its rate by up to 1500."""
    half = width // 2
    step = np.log(10000) / max(1, half - 1)
    return torch.exp(-step * torch.arange(half)).numpy()
