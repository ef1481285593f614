"""What a checkpoint says: speech -> log-mel features -> greedy tokens -> text, in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import WhisperProcessor

from devices.runner.audio import is_hum, is_silent, shortest, split
from devices.runner.decode.greedy import MOST_NO_SPEECH
from edgewhisper.whisper import quiet
from export.prompt import (
    AUTO,
    language_ids,
    language_or_auto,
    no_speech_id,
    prompt_ids,
    task_of,
    timestamp_ids,
)
from export.shrink import windows_of

Languages = Sequence[str | None] | None
"""What is spoken in each clip, where it is known."""


CLIPS_AT_ONCE = 64


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
    languages: Languages = None,
    batch_size: int = 16,
    max_tokens: int | None = None,
    done: Callable[[int], None] = lambda clips: None,
) -> list[list[int]]:
    """Greedy tokens of clips of up to one window each, without prompt and end of text.

    A clip gets at most `max_tokens`; None: as many as the model has room for. `done` is called
    with the number of clips that are finished. Each clip is decoded under the prompt of its
    language; where that is not known, or the model has no token for it, under the one that
    generation_config names, or else the one that the model detects (export/prompt.py).
    """
    finished = 0
    tokens: list[list[int]] = [[] for _ in pcms]
    prompts = prompt_languages(model, processor, pcms, languages, batch_size)
    for indices, features in _batches(model, processor, pcms, batch_size, prompts):
        prompt = prompt_ids(model.generation_config, prompts[indices[0]])
        room = model.config.max_target_positions - len(prompt)
        limit = room if max_tokens is None else min(max_tokens, room)
        with quiet():
            output = model.generate(
                features.to(next(model.parameters()).device),
                do_sample=False,
                num_beams=1,
                max_new_tokens=limit,
                suppress_tokens=_suppressed(model),
                **_told(model, prompts[indices[0]]),
            )
        for index, row in zip(indices, output.tolist(), strict=True):
            tokens[index] = _until_end(row, model.generation_config.eos_token_id)
        finished += len(indices)
        done(finished)
    return tokens


def prompt_languages(
    model: nn.Module,
    processor: WhisperProcessor,
    pcms: Sequence[np.ndarray],
    languages: Languages = None,
    batch_size: int = 16,
) -> list[str | None]:
    """The code of the language that prompts the model for each clip; None where it knows English
    only. Languages that are to be detected are those of the clip's first window with speech, or of
    its first one with sound."""
    generation = model.generation_config
    prompts = [language_or_auto(generation, spoken) for spoken in _each(pcms, languages)]
    unknown = [i for i, prompt in enumerate(prompts) if prompt == AUTO]
    windows = {i: sounding(pcms[i], window_samples(processor)) for i in unknown}
    first = detect(model, processor, [windows[i][0] for i in unknown], batch_size)
    for i, (code, no_speech) in zip(unknown, first, strict=True):
        later = iter(windows[i][1:])
        prompts[i] = code
        while no_speech > MOST_NO_SPEECH and (window := next(later, None)) is not None:
            ((other, no_speech),) = detect(model, processor, [window], batch_size)
            prompts[i] = other if no_speech <= MOST_NO_SPEECH else code
    return prompts


def sounding(pcm: np.ndarray, samples: int) -> list[np.ndarray]:
    """The windows with more than silence and hum; without any such, those that are not silent, and
    without these the first one."""
    windows = [pcm[piece] for piece in split(pcm, samples)]
    for empty in (is_hum, is_silent):
        if left := [window for window in windows if not empty(window)]:
            return left
    return windows[:1]


@torch.no_grad()
def detect(
    model: nn.Module,
    processor: WhisperProcessor,
    pcms: Sequence[np.ndarray],
    batch_size: int = 16,
) -> list[tuple[str, float]]:
    """The code of the likeliest language of clips of up to one window each, and the probability
    that nobody speaks there."""
    silence = no_speech_id(model.generation_config)
    codes = language_ids(model.generation_config)
    start = model.generation_config.decoder_start_token_id
    found = [("", 0.0)] * len(pcms)
    for indices, features in _batches(model, processor, pcms, batch_size):
        inputs = torch.full((len(indices), 1), start, device=next(model.parameters()).device)
        output = model(input_features=features.to(inputs.device), decoder_input_ids=inputs)
        scores = output.logits[:, -1, list(codes.values())]  # (batch, languages)
        shares = output.logits[:, -1].softmax(dim=-1)
        none = shares[:, silence] if silence is not None else torch.zeros(len(indices))
        for index, best, share in zip(indices, scores.argmax(dim=-1).tolist(), none, strict=True):
            found[index] = list(codes)[best], float(share)
    return found


def _batches(
    model: nn.Module,
    processor: WhisperProcessor,
    pcms: Sequence[np.ndarray],
    size: int,
    prompts: Languages = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Clips of one window and one prompt together: their indices, and their features in the
    shortest window that holds them."""
    extractor = processor.feature_extractor
    windows = windows_samples(model, extractor)
    groups: dict[tuple[int, str | None], list[int]] = {}
    for i, (pcm, prompt) in enumerate(zip(pcms, _each(pcms, prompts), strict=True)):
        groups.setdefault((shortest(windows, len(pcm)), prompt), []).append(i)
    for (window, _), group in groups.items():
        for start in range(0, len(group), size):
            indices = group[start : start + size]
            yield indices, log_mel(extractor, [pcms[i] for i in indices], window)


def logits(
    model: nn.Module, processor: WhisperProcessor, pcm: np.ndarray, ids: Sequence[int]
) -> np.ndarray:
    """Logits after each of the decoder's input ids on one window, (ids, vocab) float32."""
    return parts(model, processor, pcm, ids)["logits"]


@torch.no_grad()
def parts(
    model: nn.Module, processor: WhisperProcessor, pcm: np.ndarray, ids: Sequence[int]
) -> dict[str, np.ndarray]:
    """The same logits and what comes before them: log-mel features (n_mels, frames), the encoder's
    states (d_model, positions), all layers' keys and values of the ids, (channels, ids)."""
    device = next(model.parameters()).device
    (_, features), *_ = _batches(model, processor, [pcm], size=1)
    inputs = torch.tensor([list(ids)], device=device)
    output = model(input_features=features.to(device), decoder_input_ids=inputs, use_cache=True)
    caches = output.past_key_values.self_attention_cache.layers
    found = {
        "mel": features[0],
        "states": output.encoder_last_hidden_state[0].T,
        "key_cache": torch.cat([_channels(layer.keys) for layer in caches]),
        "value_cache": torch.cat([_channels(layer.values) for layer in caches]),
        "logits": output.logits[0],
    }
    return {name: part.float().cpu().numpy() for name, part in found.items()}


def _channels(cache: Tensor) -> Tensor:
    """One layer's (1, heads, ids, width) -> (heads * width, ids)."""
    return cache[0].transpose(1, 2).flatten(0, 1)


def transcribe(
    model: nn.Module,
    processor: WhisperProcessor,
    pcms: Sequence[np.ndarray],
    languages: Languages = None,
    batch_size: int = 16,
    max_tokens: int | None = None,
    done: Callable[[int], None] = lambda clips: None,
) -> list[str]:
    """Text of clips of any length, 16 kHz mono float32; long ones are cut at quiet places. See
    greedy() for the other arguments; a language that is detected is that of the first window with
    speech. At most CLIPS_AT_ONCE clips are taken out of `pcms` at a time."""
    texts: list[str] = []
    for start in range(0, len(pcms), CLIPS_AT_ONCE):
        some = slice(start, start + CLIPS_AT_ONCE)

        def shown(clips: int, before: int = start) -> None:
            done(min(before + clips, len(pcms)))

        texts += _transcribe(
            model,
            processor,
            list(pcms[some]),
            None if languages is None else languages[some],
            batch_size,
            max_tokens,
            shown,
        )
    return texts


def _transcribe(
    model: nn.Module,
    processor: WhisperProcessor,
    pcms: Sequence[np.ndarray],
    languages: Languages,
    batch_size: int,
    max_tokens: int | None,
    done: Callable[[int], None],
) -> list[str]:
    """Text of clips that are all in memory; the arguments are those of transcribe()."""
    prompts = prompt_languages(model, processor, pcms, languages, batch_size)
    pieces = [[pcm[cut] for cut in split(pcm, window_samples(processor))] for pcm in pcms]
    spoken = [language for clip, language in zip(pieces, prompts, strict=True) for _ in clip]
    cut = [piece for clip in pieces for piece in clip]
    flat = greedy(model, processor, cut, spoken, batch_size, max_tokens, done)
    texts = iter(processor.tokenizer.batch_decode(flat, skip_special_tokens=True))
    return [" ".join(next(texts).strip() for _ in clip).strip() for clip in pieces]


def _each(pcms: Sequence[np.ndarray], languages: Languages) -> Sequence[str | None]:
    return [None] * len(pcms) if languages is None else languages


def _told(model: nn.Module, language: str | None) -> dict[str, str]:
    """The prompt, as generate() wants to hear of it."""
    if language is None:
        return {}
    return {"language": language, "task": task_of(model.generation_config)}


def _suppressed(model: nn.Module) -> list[int]:
    """Suppressed tokens, and all timestamps: the prompt forbids them, and a weakened model that
    utters one anyway makes generate() decode the rest of the window a second time."""
    generation = model.generation_config
    stamps = timestamp_ids(generation, model.config.vocab_size)
    return [*(generation.suppress_tokens or []), *stamps]


def _until_end(tokens: list[int], end: int | list[int]) -> list[int]:
    ends = {end} if isinstance(end, int) else set(end)
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]
