"""What a checkpoint says: speech -> log-mel features -> greedy tokens -> text, in torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import WhisperProcessor

from devices.runner.audio import shortest, split
from edgewhisper.whisper import quiet
from export.shrink import windows_of


def window_samples(processor: WhisperProcessor) -> int:
    """Length of the model's window in samples at 16 kHz (480000 for stock Whisper)."""
    return processor.feature_extractor.n_samples


def windows_samples(model: nn.Module, extractor: Any) -> list[int]:
    """The model's windows, ascending; a clip is heard through the first that holds it."""
    return [2 * positions * extractor.hop_length for positions in windows_of(model.config)]


def log_mel(extractor: Any, pcms: Sequence[np.ndarray], samples: int | None = None) -> Tensor:
    """Clips of up to one window, 16 kHz mono -> (batch, n_mels, frames), zero-padded as trained.

    The window has so many samples; None: the full one.
    """
    features = extractor(
        list(pcms),
        sampling_rate=extractor.sampling_rate,
        return_tensors="pt",
        max_length=samples or extractor.n_samples,
    )
    return features.input_features


@torch.no_grad()
def greedy(
    model: nn.Module,
    processor: WhisperProcessor,
    pcms: Sequence[np.ndarray],
    batch_size: int = 16,
) -> list[list[int]]:
    """Greedy tokens of clips of up to one window each, without prompt and end of text."""
    limit = model.config.max_target_positions - 4
    tokens: list[list[int]] = [[] for _ in pcms]
    for indices, features in _batches(model, processor, pcms, batch_size):
        with quiet():
            output = model.generate(
                features.to(next(model.parameters()).device),
                do_sample=False,
                num_beams=1,
                max_new_tokens=limit,
                suppress_tokens=_suppressed(model),
                **_language(model),
            )
        for index, row in zip(indices, output.tolist(), strict=True):
            tokens[index] = _until_end(row, model.generation_config.eos_token_id)
    return tokens


def _batches(
    model: nn.Module, processor: WhisperProcessor, pcms: Sequence[np.ndarray], size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Clips of one window together: their indices, and their features in the shortest window that
    holds them."""
    extractor = processor.feature_extractor
    windows = windows_samples(model, extractor)
    for window in windows:
        group = [i for i, pcm in enumerate(pcms) if shortest(windows, len(pcm)) == window]
        for start in range(0, len(group), size):
            indices = group[start : start + size]
            yield indices, log_mel(extractor, [pcms[i] for i in indices], window)


@torch.no_grad()
def logits(
    model: nn.Module, processor: WhisperProcessor, pcm: np.ndarray, ids: Sequence[int]
) -> np.ndarray:
    """Logits after each of the decoder's input ids on one window, (ids, vocab) float32."""
    device = next(model.parameters()).device
    (_, features), *_ = _batches(model, processor, [pcm], size=1)
    features = features.to(device)
    inputs = torch.tensor([list(ids)], device=device)
    output = model(input_features=features, decoder_input_ids=inputs, use_cache=False)
    return output.logits[0].float().cpu().numpy()


def transcribe(
    model: nn.Module,
    processor: WhisperProcessor,
    pcms: Sequence[np.ndarray],
    batch_size: int = 16,
) -> list[str]:
    """Text of clips of any length, 16 kHz mono float32; long ones are cut at quiet places."""
    pieces = [[pcm[cut] for cut in split(pcm, window_samples(processor))] for pcm in pcms]
    flat = greedy(model, processor, [piece for clip in pieces for piece in clip], batch_size)
    texts = iter(processor.tokenizer.batch_decode(flat, skip_special_tokens=True))
    return [" ".join(next(texts).strip() for _ in clip).strip() for clip in pieces]


def _language(model: nn.Module) -> dict[str, str]:
    """The prompt's language and task; English where a multilingual model names none."""
    generation = model.generation_config
    if not getattr(generation, "is_multilingual", False):
        return {}
    language = getattr(generation, "language", None) or "en"
    return {"language": language, "task": getattr(generation, "task", None) or "transcribe"}


def _suppressed(model: nn.Module) -> list[int]:
    """Suppressed tokens, and all timestamps: the prompt forbids them, and a weakened model that
    utters one anyway makes generate() decode the rest of the window a second time."""
    generation = model.generation_config
    silent = getattr(generation, "no_timestamps_token_id", None)
    stamps = [] if silent is None else range(silent + 1, model.config.vocab_size)
    return [*(generation.suppress_tokens or []), *stamps]


def _until_end(tokens: list[int], end: int | list[int]) -> list[int]:
    ends = {end} if isinstance(end, int) else set(end)
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]
