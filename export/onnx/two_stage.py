"""Logits in two stages: approximate scores of all tokens, then exact logits of the best ones.

The token table takes most of the bytes that one decoding step reads. With W (vocab, d) the table,
h (d,) the decoder's last hidden state and C = mean h h^T over calibration speech, the mean squared
error of approximate scores of rank r is least for the factors of a weighted SVD:

    W C^(1/2) = U S V^T                                                                    (1)
    W h ~ rows (down^T h),   rows = W C^(1/2) V_r,   down = C^(-1/2) V_r                   (2)

The rows (vocab, r) are stored in int8, in addition to the table. The candidates are the BEST tokens
by approximate score, separately for text, timestamps and tokens after them: timestamps would
otherwise displace text where decoding forbids them. The logits of the candidates are computed from
the table, and are equal to the bit to those of one stage. All other tokens keep their approximate
score, so sums over the vocabulary are approximate as well.

Measured on tiny.en (664 calibration positions, 376 others): the best allowed token was at most the
52nd of its group, and the logarithm of the sum of all exponentials was wrong by 0.007 on average
and by 0.38 at most. The plain principal components of h, (2) with the eigenvectors of C, are worse:
5.2 at most with timestamps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from export.manifest import decoding_rules
from export.onnx.graph import Graph
from export.onnx.tables import TokenTable
from export.quantise import schemes
from export.weights import Floats, array

RANK = 128
"""Processors multiply int8 in pieces of 64: 96 takes as long."""
BEST = 256
"""Candidates of each group. Text and timestamps have one group each."""
LEAST_RATIO = 2
"""The table must be this many times as wide as RANK, or two stages save too little."""
LEAST_VOCABULARY = 16 * BEST
DAMPING = 1e-4
"""Share of the mean variance that is added to every direction, so that C can be inverted."""


def suits(model: nn.Module, precision: str, layout: str) -> bool:
    """Return whether two stages can be faster: native graphs with a large int8 token table. A
    factorised table is of low rank already."""
    table = model.model.decoder.embed_tokens
    if layout != "native" or precision not in ("int8", "int4") or hasattr(table, "rows"):
        return False
    scheme = schemes(model).get(table)
    vocabulary, width = table.weight.shape
    large = vocabulary >= LEAST_VOCABULARY and width >= LEAST_RATIO * RANK
    return large and (scheme is None or scheme.bits == 8)


def facts(model: nn.Module) -> dict[str, int]:
    """Return the entry `logits` of the manifest."""
    candidates = sum(min(BEST, end - begin) for begin, end in groups(model))
    return {"rank": min(RANK, model.config.d_model), "candidates": candidates}


def groups(model: nn.Module) -> list[tuple[int, int]]:
    """Return the ranges of ids of text, timestamps and tokens after them; empty ones are left
    out."""
    rules, size = decoding_rules(model), model.config.vocab_size
    begin = size if rules["timestamp_begin"] is None else rules["timestamp_begin"]
    cuts = [0, begin, rules.get("timestamp_end") or size, size]
    return [(a, b) for a, b in pairwise(cuts) if a < b]


def factors(table: Floats, moment: Floats, rank: int) -> tuple[Floats, Floats]:
    """Return `down` (d, r) and `rows` (vocab, r) of (2), from W and C."""
    weight, c = torch.from_numpy(table).double(), torch.from_numpy(moment).double()
    damped = c + DAMPING * c.trace() / len(c) * torch.eye(len(c), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(damped)
    root, inverse = ((vectors * values.pow(p)) @ vectors.T for p in (0.5, -0.5))
    _, right = torch.linalg.eigh(root @ (weight.T @ weight) @ root)  # V, ascending
    v = right.flip(1)[:, :rank]
    return (inverse @ v).float().numpy(), (weight @ (root @ v)).float().numpy()


def two_stage_logits(g: Graph, table: TokenTable, x: str, model: nn.Module, moment: Floats) -> str:
    """Return logits: x (1, 1, d_model) -> (1, 1, vocab). `moment` is C, (d_model, d_model)."""
    weight = array(model.model.decoder.embed_tokens.weight)
    down, rows = factors(weight, moment, min(RANK, weight.shape[1]))
    scores = TokenTable(g, rows).logits(g.op("MatMul", x, g.constant(down)))
    best = _candidates(g, scores, groups(model))
    return g.op("ScatterElements", scores, best, table.logits_of(x, best), axis=2)


def _candidates(g: Graph, scores: str, ranges: Sequence[tuple[int, int]]) -> str:
    """Return the ids (1, 1, n) of the best tokens of every range."""
    found = []
    for begin, end in ranges:
        part = g.op("Slice", scores, *(g.constant([n]) for n in (begin, end, 2)))
        count = g.constant([min(BEST, end - begin)])
        _, ids = g.ops("TopK", part, count, outputs=2, axis=2, sorted=0)
        found.append(g.op("Add", ids, g.constant(begin)) if begin else ids)
    return found[0] if len(found) == 1 else g.op("Concat", *found, axis=2)
