"""The token table of the Core ML programs, dense or factorised."""

from __future__ import annotations

import numpy as np

from export.coreml.graph import Graph, Var
from export.coreml.layers import stored
from export.quantise import Scheme
from export.weights import Floats

CHUNK = 16384
"""Number of table rows from which the Neural Engine cannot process a tensor."""


class TokenTable:
    """The tied token table (vocab, d_model), stored once, for look-ups and for logits. In
    channels-first programs it is split into chunks of fewer than CHUNK rows."""

    def __init__(self, g: Graph, weight: Floats, scheme: Scheme | None = None) -> None:
        self.g = g
        count = -(-len(weight) // (CHUNK - 1)) if g.channels_first else 1
        self.chunks = [
            stored(g, chunk, scheme, table=True) for chunk in np.array_split(weight, count)
        ]

    def look_up(self, ids: Var) -> Var:
        """Return the embedding of one token: ids (1,) -> (1, d_model)."""
        if len(self.chunks) == 1:
            return self.g.gather(self.chunks[0], ids, 0)
        start, parts = 0, []
        for chunk in self.chunks:
            parts.append(self._row_or_zeros(chunk, ids, start))
            start += chunk.shape[0]
        return self.g.sum(self.g.concat(parts, 0), 0)

    def _row_or_zeros(self, chunk: Var, ids: Var, start: int) -> Var:
        g = self.g
        place = g.op("sub", x=ids, y=np.int32(start))
        last = np.int32(chunk.shape[0] - 1)
        clamped = g.op("minimum", x=g.op("maximum", x=place, y=np.int32(0)), y=last)
        inside = g.cast(g.op("equal", x=place, y=clamped), np.dtype(g.dtype).name)
        return g.mul(g.gather(chunk, clamped, 0), g.reshape(inside, 1, 1))

    def logits(self, x: Var) -> Var:
        """Return logits: x (1, 1, d_model) -> (1, 1, vocab)."""
        parts = [self.g.matmul(x, chunk, transpose_y=True) for chunk in self.chunks]
        return self.g.concat(parts, 2)


class FactorisedTable:
    """The tied token table as a product of rows (vocab, r) and basis (r, d_model), each stored
    once."""

    def __init__(self, g: Graph, rows: Floats, basis: Floats, scheme: Scheme | None = None) -> None:
        self.g = g
        self.rows, self.basis = TokenTable(g, rows, scheme), stored(g, basis, scheme, table=True)

    def look_up(self, ids: Var) -> Var:
        """Return the embedding of one token: ids (1,) -> (1, d_model)."""
        return self.g.matmul(self.rows.look_up(ids), self.basis)

    def logits(self, x: Var) -> Var:
        """Return logits: x (1, 1, d_model) -> (1, 1, vocab)."""
        return self.rows.logits(self.g.matmul(x, self.basis, transpose_y=True))
