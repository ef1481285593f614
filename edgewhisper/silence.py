"""The silence after a clip in few encoder positions, in torch: for calibration and training.

export/onnx/silence.py describes the positions and their weights. A pass then costs about as much as
one with a window as long as the clip, and the model keeps its full window.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from export.onnx.silence import UNIT, Silence
from export.shrink import windows_of

if TYPE_CHECKING:
    from edgewhisper.model import Encoder, WhisperForConditionalGeneration


def silence_for(model: WhisperForConditionalGeneration, stride: int) -> Silence | None:
    """Return how calibration computes the silence; None for a stride of 1, and for models with
    short windows, which need none."""
    windows = windows_of(model.config)
    return None if stride == 1 or len(windows) > 1 else Silence(windows[0], stride)


@contextmanager
def silence_in_groups(
    model: WhisperForConditionalGeneration, silence: Silence | None
) -> Iterator[None]:
    """Make the encoder append the silence to windows that are not full, and all attention weight
    it. Windows are multiples of UNIT positions. None changes nothing."""
    encoder = model.model.encoder

    def weighted(_: nn.Module, inputs: Any, named: dict[str, Any]) -> Any:
        weights = score_weights(encoder, named["key_value_states"])
        return inputs, named | {"attention_mask": weights}

    with ExitStack() as stack:
        if silence is not None:
            encoder.silence = silence
            stack.callback(setattr, encoder, "silence", None)
            for layer in model.model.decoder.layers:
                hook = layer.encoder_attn.register_forward_pre_hook(weighted, with_kwargs=True)
                stack.callback(hook.remove)
        yield


def score_weights(encoder: Encoder, states: Tensor) -> Tensor | None:
    """Return the weights (1, 1, 1, T) that are added to the scores of attention to encoder states
    (clips, T, d_model). None for a full window, and if silence is not computed in groups."""
    if encoder.silence is None or states.shape[1] == encoder.silence.full:
        return None
    return weights_by_length(encoder.silence)[states.shape[1]].to(states)


@cache
def weights_by_length(silence: Silence) -> dict[int, Tensor]:
    """Return the weights of each window by its number of states, T."""
    sizes = [silence.sizes(n) for n in range(UNIT, silence.full, UNIT)]
    logs = {len(each): torch.tensor(each, dtype=torch.float32).log() for each in sizes}
    return {length: weights[None, None, None] for length, weights in logs.items()}


def placed(encoder: Encoder, x: Tensor) -> Tensor:
    """Add the encoding of positions to the output of the convolutions (clips, n, d_model), and
    append the silence of a window that is not full. Returns states (clips, T, d_model)."""
    table, silence = encoder.embed_positions.weight, encoder.silence
    if silence is None or x.shape[1] == silence.full:
        return x + table[: x.shape[1]]
    n = silence.spoken(x.shape[1])
    means = [rows.mean(0) for rows in table[n:].split(silence.stride)]
    # all positions of silence have the output of the last one before it
    silent = x[:, n - 1 : n] + torch.stack(means)
    return torch.cat([x[:, :n] + table[:n], silent], dim=1)
