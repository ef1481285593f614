"""Logits in two stages: approximate scores of all text tokens, then exact logits of the best ones.

The token table takes most of the bytes that one decoding step reads. With W (vocab, d) the table,
h (d,) the decoder's last hidden state and C = mean h h^T over calibration speech, the mean squared
error of approximate scores of rank r is least for the factors of a weighted SVD:

    W C^(1/2) = U S V^T                                                                    (1)
    W h ~ rows (down^T h),   rows = W C^(1/2) V_r,   down = C^(-1/2) V_r                   (2)

The rows (tokens, r) of all text tokens are stored in int8, in addition to the table. The logits of
the BEST text tokens by approximate score, and those of all timestamps, are computed from the table.
They are equal to the bit to those of one stage. All other tokens keep their approximate score, so
sums over the vocabulary are approximate as well.

Measured on tiny.en, calibrated on 735 positions of the included clips: the most probable token is
not among the 512 best at 0 of 1,818 positions of the dev and test clips, at 1 of 1,917 of other
recordings, and at 1 of 1,047 in noise. With 256 candidates these are 4, 1 and 6, and with rank 96
and 512 candidates 5, 1 and 7. The plain principal components of h, (2) with the eigenvectors of C,
are worse. On the dev and test clips, the logarithm of the sum of all exponentials was wrong by
0.008 on average, and by 0.64 at most.
"""

from __future__ import annotations

import torch
from torch import nn

from export.manifest import decoding_rules
from export.onnx.graph import Graph
from export.onnx.tables import TokenTable
from export.prompt import is_multilingual
from export.quantise import schemes
from export.weights import Floats, array

RANK = 128
"""Processors multiply int8 in pieces of 64: 96 takes as long."""
BEST = 512
"""Number of text tokens with exact logits."""
LEAST_RATIO = 2
"""The table must be this many times as wide as RANK, or two stages save too little."""
LEAST_VOCABULARY = 16 * BEST
DAMPING = 1e-4
"""Share of the mean variance that is added to every direction, so that C can be inverted."""


def suits(model: nn.Module, precision: str, layout: str) -> bool:
    """Return whether two stages can be faster and are accurate: native graphs of English-only
    models with a large int8 token table. A factorised table is of low rank already. The calibration
    clips are English; with base, 162 of 3,197 most probable tokens of other languages are not among
    the candidates."""
    table = model.model.decoder.embed_tokens
    if layout != "native" or precision not in ("int8", "int4") or hasattr(table, "rows"):
        return False
    if is_multilingual(model.generation_config):
        return False
    scheme = schemes(model).get(table)
    vocabulary, width = table.weight.shape
    large = vocabulary >= LEAST_VOCABULARY and width >= LEAST_RATIO * RANK
    return large and (scheme is None or scheme.bits == 8)


def facts(model: nn.Module) -> dict[str, int]:
    """Return the entry `logits` of the manifest: the rank, and how many logits are exact."""
    text, size = text_tokens(model), model.config.vocab_size
    return {"rank": min(RANK, model.config.d_model), "candidates": min(BEST, text) + size - text}


def text_tokens(model: nn.Module) -> int:
    """Return the number of tokens before the timestamps."""
    begin: int | None = decoding_rules(model)["timestamp_begin"]
    return model.config.vocab_size if begin is None else begin


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
    weight, text = array(model.model.decoder.embed_tokens.weight), text_tokens(model)
    down, rows = factors(weight, moment, min(RANK, weight.shape[1]))
    x = g.op("Flatten", x, axis=-1)
    scores = TokenTable(g, rows[:text]).logits(g.op("MatMul", x, g.constant(down)))
    _, best = g.ops("TopK", scores, g.constant([min(BEST, text)]), outputs=2, axis=1, sorted=0)
    states = table.quantised(x)
    exact = table.logits_of(states, g.op("Squeeze", best, g.constant([0])))
    logits = g.op("ScatterElements", scores, best, exact, axis=1)
    if text < len(weight):
        logits = g.op("Concat", logits, table.logits_between(states, text, len(weight)), axis=1)
    return g.op("Unsqueeze", logits, g.constant([0]))
