"""Frozen teacher models, and the loss terms that keep a student close to its teacher.

The text of a clip supervises a few tokens. A teacher's outputs supervise every frame and every
logit, so a small amount of speech teaches more.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewhisper import whisper
from edgewhisper.examples import IGNORED, Batch
from edgewhisper.frozen_encoder import FrozenEncoder
from edgewhisper.training import LossTerm
from export.problem import Problem

# ------------------------------------------------------------------------------- the teacher


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a teacher: a frozen copy of the model in its current state."""
    return freeze(copy.deepcopy(model))


def freeze(model: Any) -> Any:
    """Make the model a teacher, in place, and return it.

    It has no gradients and no dropout, and its encoder accepts audio of any length, as the
    student's encoder does in training.
    """
    model.eval().requires_grad_(False)
    model.model.encoder.any_length = True
    return model


class Teacher:
    """A frozen model. With `cache`, the encoder states of each clip are computed only once."""

    def __init__(self, model: nn.Module, cache: bool = False) -> None:
        self.model = model
        self.encoder = FrozenEncoder(self.model.model.encoder, cache)

    @torch.no_grad()
    def __call__(self, batch: Batch, features: Tensor, **options: Any) -> Any:
        """Return the model's outputs for the batch's tokens and `features` (clips, mels, frames).

        `features` may cover another window of the clips than `batch.input_features`.
        """
        ids = batch.decoder_input_ids
        self.model.to(ids.device)
        states = self.encoder(replace(batch, input_features=features))
        return self.model(encoder_outputs=states, decoder_input_ids=ids, use_cache=False, **options)


@torch.no_grad()
def forward(model: nn.Module, batch: Batch) -> Any:
    """Return the model's outputs for a batch, without gradients and without a cache.

    Encoder and decoder both run as modules of `model`, so that forward hooks on them are called.
    """
    ids = batch.decoder_input_ids
    model.to(ids.device)
    return model(batch.input_features, decoder_input_ids=ids, use_cache=False)


def load_teacher(name: str, student: nn.Module, processor: Any, method: str) -> nn.Module:
    """Load a teacher from a directory or hub id. `method` is written before the error.

    Raises Problem if its features, text window or vocabulary differ from the student's.
    """
    teacher = whisper.load(name)
    vocabulary = whisper.load_processor(name).tokenizer.get_vocab()
    check_teacher(teacher, student, name, method)
    check_vocabulary(vocabulary, processor.tokenizer.get_vocab(), name, method)
    return freeze(teacher)


def check_teacher(teacher: nn.Module, student: nn.Module, name: str, method: str) -> None:
    """Raise Problem unless both models take the same features and predict the same tokens."""
    for key, unit in (
        ("vocab_size", "tokens"),
        ("num_mel_bins", "mel bins"),
        ("max_source_positions", "encoder positions"),
    ):
        theirs, ours = (getattr(model.config, key) for model in (teacher, student))
        if theirs != ours:
            raise Problem(
                f"{method}: the teacher {name} has {theirs} {unit}, the student {ours}",
                hint="use a teacher of the same Whisper family: large-v3 differs from the other "
                "sizes, and English-only models differ from multilingual ones",
            )
    theirs, ours = (model.config.max_target_positions for model in (teacher, student))
    if theirs < ours:
        raise Problem(
            f"{method}: the teacher {name} reads at most {theirs} text tokens, the student {ours}",
            hint="use a teacher whose text window is at least as long as the student's",
        )


def check_vocabulary(theirs: dict[str, int], ours: dict[str, int], name: str, method: str) -> None:
    """Raise Problem unless both vocabularies map the same tokens to the same ids."""
    different = len(theirs.items() ^ ours.items())
    if different:
        raise Problem(
            f"{method}: the teacher {name} has another vocabulary: of {len(theirs)} tokens of the "
            f"teacher and {len(ours)} of the student, {different} differ in text or id",
            hint="use a teacher with the student's tokenizer",
        )


# ---------------------------------------------------------------------------- the loss terms


def divergence(teacher: Tensor, student: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """KL(p_teacher || p_student) with p = softmax(logits / temperature).

    Logits (tokens, V) -> (), a mean over tokens.
    """
    target, log_p = ((z.float() / temperature).log_softmax(-1) for z in (teacher, student))
    return functional.kl_div(log_p, target, log_target=True, reduction="batchmean")


def mean_by_tokens(values: Tensor, labels: Tensor) -> Tensor:
    """Average a value per token; values, labels (clips, n) -> ().

    Each clip's value is its mean over the positions up to its last label. It counts by the clip's
    number of labels, so that batches can be split over processes.
    """
    labelled = labels != IGNORED
    real = labelled.flip(1).cumsum(1).flip(1) > 0
    means = (values * real).sum(dim=1) / real.sum(dim=1)  # (clips,)
    return (means * labelled.sum(dim=1)).sum() / labelled.sum()


def distance(teacher: Any, student: Any, labels: Tensor) -> Tensor:
    """Return the distance between the outputs of two models.

    It is the divergence of the logits plus the squared error of the encoder output, relative to
    the variance of the teacher's.

    Logits (clips, tokens, V), encoder output (clips, frames, d_model) -> (), a mean over tokens:
    a clip counts by its number of labels, so that batches can be split over processes.
    """
    labelled = labels != IGNORED  # (clips, tokens)
    loss = divergence(teacher.logits[labelled], student.logits[labelled])
    new, old = (x.encoder_last_hidden_state.float().flatten(1) for x in (student, teacher))
    error = (new - old).square().mean(dim=1) / old.var(dim=1)  # (clips,)
    return loss + (error * labelled.sum(dim=1)).sum() / labelled.sum()


def distance_term(model: nn.Module, weight: float, cache: bool = False) -> LossTerm | None:
    """Return the loss term weight * distance to a frozen copy of `model`; None if weight is 0.

    With `cache`, the copy's encoder states of each clip are computed only once.
    """
    if weight == 0:
        return None
    teacher = Teacher(frozen_copy(model), cache)

    def term(model: nn.Module, batch: Batch, outputs: Any) -> Tensor:
        return weight * distance(teacher(batch, batch.input_features), outputs, batch.labels)

    return term


def total(*terms: LossTerm | None) -> LossTerm | None:
    """Return the sum of the loss terms that are not None; None if there are none."""
    given = [term for term in terms if term is not None]
    if not given:
        return None
    return lambda model, batch, outputs: torch.stack(
        [term(model, batch, outputs) for term in given]
    ).sum()
