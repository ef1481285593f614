"""A loss term that keeps a model near what it was: for fine-tuning with little speech.

It says something about every frame of speech where the text says a few words.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewhisper.examples import IGNORED, Batch
from edgewhisper.frozen_encoder import FrozenEncoder
from edgewhisper.training import LossTerm


def keep_term(model: nn.Module, weight: float, cache: bool = False) -> LossTerm | None:
    """`weight` times the distance to a frozen copy of the model as it is now. For `cache` see
    Teacher."""
    if weight == 0:
        return None
    before = Teacher(frozen_copy(model), cache)

    def term(model: nn.Module, batch: Batch, outputs: Any) -> Tensor:
        wanted = before(batch, batch.input_features)
        return weight * distance(wanted, outputs, batch.labels)

    return term


def frozen_copy(model: nn.Module) -> nn.Module:
    """A teacher that is the model as it is now."""
    return freeze(copy.deepcopy(model))


def freeze(model: Any) -> Any:
    """Make a model a teacher: without gradients and random parts, and with an encoder that takes
    audio of any length, as that of its student does in training."""
    model.eval().requires_grad_(False)
    model.model.encoder.any_length = True
    return model


class Teacher:
    """A frozen model that is asked for its outputs. With `cache`, its encoder's states of a clip
    are computed once."""

    def __init__(self, model: nn.Module, cache: bool = False) -> None:
        self.model = model
        self.encoder = FrozenEncoder(self.model.model.encoder, cache)

    @torch.no_grad()
    def __call__(self, batch: Batch, features: Tensor, **options: Any) -> Any:
        """Its outputs on features (clips, mels, frames) of a batch, which may be another window
        of it than the student hears."""
        ids = batch.decoder_input_ids
        self.model.to(ids.device)
        states = self.encoder(replace(batch, input_features=features))
        return self.model(encoder_outputs=states, decoder_input_ids=ids, use_cache=False, **options)


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
