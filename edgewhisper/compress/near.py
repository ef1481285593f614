"""A loss term that keeps a model near what it was: for fine-tuning with little speech.

It says something about every frame of speech where the text says a few words.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewhisper.examples import IGNORED, Batch
from edgewhisper.training import LossTerm


def keep_term(model: nn.Module, weight: float) -> LossTerm | None:
    """`weight` times the distance to a frozen copy of the model as it is now."""
    if weight == 0:
        return None
    before = copy.deepcopy(model).eval().requires_grad_(False)

    def term(model: nn.Module, batch: Batch, outputs: Any) -> Tensor:
        before.to(batch.labels.device)
        ids = batch.decoder_input_ids
        with torch.no_grad():
            wanted = before(batch.input_features, decoder_input_ids=ids, use_cache=False)
        return weight * distance(wanted, outputs, batch.labels)

    return term


def distance(wanted: Any, outputs: Any, labels: Tensor) -> Tensor:
    """KL(wanted || outputs) plus the error of the encoder's output, relative to its variance.

    Logits (clips, tokens, vocabulary), encoder output (clips, frames, d_model) -> (), a mean per
    token: a clip counts by its tokens, so that batches can be split over processes.
    """
    told = labels != IGNORED  # (clips, tokens)
    new, old = (x.logits[told].float().log_softmax(-1) for x in (outputs, wanted))
    divergence = functional.kl_div(new, old, log_target=True, reduction="batchmean")
    new, old = (x.encoder_last_hidden_state.float().flatten(1) for x in (outputs, wanted))
    error = (new - old).square().mean(dim=1) / old.var(dim=1)  # (clips,)
    return divergence + (error * told.sum(dim=1)).sum() / told.sum()


def total(*terms: LossTerm | None) -> LossTerm | None:
    given = [term for term in terms if term is not None]
    if not given:
        return None
    return lambda model, batch, outputs: torch.stack(
        [term(model, batch, outputs) for term in given]
    ).sum()
