"""An encoder that is not trained, with its states cached for each clip."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from edgewhisper.examples import CACHED_BYTES, Batch

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration


class FrozenEncoder:
    """An encoder that is not trained, with a cache of its states.

    The states of each clip and window are computed once and kept in memory, up to CACHED_BYTES in
    total. Without `cache`, and for augmented clips, they are computed each time for the whole
    batch.
    """

    def __init__(self, encoder: nn.Module, cache: bool = True) -> None:
        self.encoder, self.cache, self.bytes = encoder, cache, 0
        self.states_of: dict[tuple[int, int], Tensor] = {}
        """(clip, positions) -> states (positions, d_model)"""

    @classmethod
    def of(cls, model: WhisperForConditionalGeneration) -> FrozenEncoder | None:
        """Return None if the encoder is trained in part, or if dropout randomises its states."""
        encoder = model.model.encoder
        learns = any(parameter.requires_grad for parameter in encoder.parameters())
        random = any(getattr(m, "dropout", 0.0) for m in encoder.modules())
        return None if learns or random else cls(encoder)

    def __call__(self, batch: Batch) -> BaseModelOutput:
        if batch.clips is None or not self.cache:
            return BaseModelOutput(self.states(batch.input_features))
        positions = batch.input_features.shape[-1] // 2
        rows = [
            self.cached((clip, positions), features)
            for clip, features in zip(batch.clips, batch.input_features, strict=True)
        ]
        return BaseModelOutput(torch.stack(rows))

    def cached(self, key: tuple[int, int], features: Tensor) -> Tensor:
        """Return the states (positions, d_model) of one clip's features (mels, frames).

        Each clip is computed alone, so that its rounding depends neither on the rest of the batch
        nor on whether the training was resumed.
        """
        if key in self.states_of:
            return self.states_of[key]
        states = self.states(features[None])[0]
        size = states.numel() * states.element_size()
        if self.bytes + size <= CACHED_BYTES:
            self.states_of[key] = states
            self.bytes += size
        return states

    @torch.no_grad()
    def states(self, features: Tensor) -> Tensor:
        """Return the states (clips, positions, d_model) of features (clips, mels, frames)."""
        return self.encoder(features).last_hidden_state
