"""An encoder that is not trained, with its states cached for each clip, and the cache."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from edgewhisper.examples import CACHED_BYTES, Batch

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration


class StatesCache:
    """States of clips in memory, up to CACHED_BYTES in total. Later ones are not stored."""

    def __init__(self) -> None:
        self.states_of: dict[Hashable, tuple[Tensor, ...]] = {}
        self.bytes = 0

    def __call__(
        self, key: Hashable, compute: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Return the stored states of a key, or else the computed ones."""
        if key in self.states_of:
            return self.states_of[key]
        states = compute()
        size = sum(x.numel() * x.element_size() for x in states)
        if self.bytes + size <= CACHED_BYTES:
            self.states_of[key] = states
            self.bytes += size
        return states


class FrozenEncoder:
    """An encoder that is not trained, with a cache of its states.

    The states of each clip and window are computed once and kept in memory, up to CACHED_BYTES in
    total. Without `cache`, and for augmented clips, they are computed each time for the whole
    batch.
    """

    def __init__(self, encoder: nn.Module, cache: bool = True) -> None:
        self.encoder = encoder
        self.cache = StatesCache() if cache else None
        """(clip, positions) -> states (positions, d_model)"""

    @classmethod
    def of(cls, model: WhisperForConditionalGeneration) -> FrozenEncoder | None:
        """Return None if the encoder is trained in part, or if dropout randomises its states."""
        encoder = model.model.encoder
        learns = any(parameter.requires_grad for parameter in encoder.parameters())
        random = any(getattr(m, "dropout", 0.0) for m in encoder.modules())
        return None if learns or random else cls(encoder)

    def __call__(self, batch: Batch) -> BaseModelOutput:
        if batch.clips is None or self.cache is None:
            return BaseModelOutput(self.states(batch.input_features))
        positions = batch.input_features.shape[-1] // 2
        # each clip is computed alone, so that its rounding depends neither on the rest of the batch
        # nor on whether the training was resumed
        rows = [
            self.cache((clip, positions), partial(self.of_clip, features))[0]
            for clip, features in zip(batch.clips, batch.input_features, strict=True)
        ]
        return BaseModelOutput(torch.stack(rows))

    def of_clip(self, features: Tensor) -> tuple[Tensor]:
        """Return the states (positions, d_model) of one clip's features (mels, frames)."""
        return (self.states(features[None])[0],)

    @torch.no_grad()
    def states(self, features: Tensor) -> Tensor:
        """Return the states (clips, positions, d_model) of features (clips, mels, frames)."""
        return self.encoder(features).last_hidden_state
