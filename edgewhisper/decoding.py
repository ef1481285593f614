"""Transcribe with a checkpoint in torch: speech -> log-mel features -> greedy tokens -> text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import WhisperProcessor

from devices.runner.audio import is_hum, is_silent, shortest, split
from devices.runner.decode.greedy import MOST_NO_SPEECH
from edgewhisper.quiet import quiet
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
"""Language of each clip, if known."""

CLIPS_AT_ONCE = 64
"""Clips whose audio is in memory at the same time."""


def windows_samples(model: nn.Module, extractor: Any) -> list[int]:
    """Return the model's windows in samples, ascending. A clip uses the first that holds it."""
    return [2 * positions * extractor.hop_length for positions in windows_of(model.config)]


def log_mel(extractor: Any, pcms: Sequence[np.ndarray], samples: int | None = None) -> Tensor:
    """Return the log-mel features (batch, n_mels, frames) of 16 kHz mono clips. Clips are
    zero-padded to a window of `samples` (None: the full window)."""
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
    """Return the greedy tokens of clips of up to one window, without prompt and end token.

    - `max_tokens` limits the tokens of a clip; None uses the limit of the model.
    - `done` is called with the number of finished clips.
    - `languages` sets the prompt of each clip. If the language is unknown, or the model has no
      token for it, the language of generation_config is used, or else the one that the model
      detects (see export/prompt.py).
    """
    finished = 0
    tokens: list[list[int]] = [[] for _ in pcms]
    prompts = detected_languages(model, processor, pcms, languages, batch_size)
    for indices, features in batches(model, processor, pcms, batch_size, prompts):
        prompt = prompt_ids(model.generation_config, prompts[indices[0]])
        room = model.config.max_target_positions - len(prompt)
        limit = room if max_tokens is None else min(max_tokens, room)
        with quiet():
            output = model.generate(
                features.to(next(model.parameters()).device),
                do_sample=False,
                num_beams=1,
                max_new_tokens=limit,
                suppress_tokens=suppressed(model),
                **_prompt_options(model, prompts[indices[0]]),
            )
        for index, row in zip(indices, output.tolist(), strict=True):
            tokens[index] = until_end(row, model.generation_config.eos_token_id)
        finished += len(indices)
        done(finished)
    return tokens


def detected_languages(
    model: nn.Module,
    processor: WhisperProcessor,
    pcms: Sequence[np.ndarray],
    languages: Languages = None,
    batch_size: int = 16,
) -> list[str | None]:
    """Return the language code of each clip's prompt; None for English-only models.

    Unknown languages are detected in the clip's first window with speech, or in its first window
    with sound if none has speech.
    """
    generation = model.generation_config
    prompts = [language_or_auto(generation, spoken) for spoken in _each(pcms, languages)]
    unknown = [i for i, prompt in enumerate(prompts) if prompt == AUTO]
    window_samples = processor.feature_extractor.n_samples
    windows = {i: sounding(pcms[i], window_samples) for i in unknown}
    first = detect(model, processor, [windows[i][0] for i in unknown], batch_size)
    for i, (code, no_speech) in zip(unknown, first, strict=True):
        later = iter(windows[i][1:])
        prompts[i] = code
        while no_speech > MOST_NO_SPEECH and (window := next(later, None)) is not None:
            ((other, no_speech),) = detect(model, processor, [window], batch_size)
            prompts[i] = other if no_speech <= MOST_NO_SPEECH else code
    return prompts


def sounding(pcm: np.ndarray, samples: int) -> list[np.ndarray]:
    """Return the windows with more than silence and hum. If there are none, returns the windows
    that are not silent, and if there are none, the first."""
    windows = [pcm[piece] for piece in split(pcm, samples)]
    for empty in (is_hum, is_silent):
        if kept := [window for window in windows if not empty(window)]:
            return kept
    return windows[:1]


@torch.no_grad()
def detect(
    model: nn.Module,
    processor: WhisperProcessor,
    pcms: Sequence[np.ndarray],
    batch_size: int = 16,
) -> list[tuple[str, float]]:
    """Return the most likely language code of each clip, and the probability of no speech. Clips
    may be up to one window long."""
    silence = no_speech_id(model.generation_config)
    codes = language_ids(model.generation_config)
    start = model.generation_config.decoder_start_token_id
    results = [("", 0.0)] * len(pcms)
    for indices, features in batches(model, processor, pcms, batch_size):
        inputs = torch.full((len(indices), 1), start, device=next(model.parameters()).device)
        output = model(input_features=features.to(inputs.device), decoder_input_ids=inputs)
        scores = output.logits[:, -1, list(codes.values())]  # (batch, languages)
        probabilities = output.logits[:, -1].softmax(dim=-1)
        none = probabilities[:, silence] if silence is not None else torch.zeros(len(indices))
        for index, best, share in zip(indices, scores.argmax(dim=-1).tolist(), none, strict=True):
            results[index] = list(codes)[best], float(share)
    return results


def batches(
    model: nn.Module,
    processor: WhisperProcessor,
    pcms: Sequence[np.ndarray],
    size: int,
    prompts: Languages = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield batches of clips that share a window and a prompt: their indices and features. The
    window of a clip is the shortest one that holds it."""
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
    """Return the logits (ids, vocab) float32 after each of the decoder's input ids."""
    return parts(model, processor, pcm, ids)["logits"]


@torch.no_grad()
def parts(
    model: nn.Module, processor: WhisperProcessor, pcm: np.ndarray, ids: Sequence[int]
) -> dict[str, np.ndarray]:
    """Return the tensors of one window and the decoder's input ids, in float32.

    - `mel`: log-mel features (n_mels, frames)
    - `states`: the encoder's output (d_model, positions)
    - `key_cache`, `value_cache`: all layers' keys and values (channels, ids)
    - `logits`: (ids, vocab)
    """
    device = next(model.parameters()).device
    (_, features), *_ = batches(model, processor, [pcm], size=1)
    inputs = torch.tensor([list(ids)], device=device)
    output = model(input_features=features.to(device), decoder_input_ids=inputs, use_cache=True)
    caches = output.past_key_values.self_attention_cache.layers
    tensors = {
        "mel": features[0],
        "states": output.encoder_last_hidden_state[0].T,
        "key_cache": torch.cat([_channels(layer.keys) for layer in caches]),
        "value_cache": torch.cat([_channels(layer.values) for layer in caches]),
        "logits": output.logits[0],
    }
    return {name: part.float().cpu().numpy() for name, part in tensors.items()}


def _channels(cache: Tensor) -> Tensor:
    """Reshape one layer's cache (1, heads, ids, width) -> (heads * width, ids)."""
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
    """Return the texts of clips of any length, 16 kHz mono float32.

    Long clips are cut at quiet places. See `greedy` for the other arguments. A detected language is
    that of the first window with speech. `pcms` is read in slices of CLIPS_AT_ONCE clips.
    """
    texts: list[str] = []
    for start in range(0, len(pcms), CLIPS_AT_ONCE):
        group = slice(start, start + CLIPS_AT_ONCE)

        def done_in_all(clips: int, before: int = start) -> None:
            done(min(before + clips, len(pcms)))

        texts += _transcribe(
            model,
            processor,
            list(pcms[group]),
            None if languages is None else languages[group],
            batch_size,
            max_tokens,
            done_in_all,
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
    """Return the texts of clips that are all in memory. For the arguments see `transcribe`."""
    prompts = detected_languages(model, processor, pcms, languages, batch_size)
    window_samples = processor.feature_extractor.n_samples
    pieces = [[pcm[cut] for cut in split(pcm, window_samples)] for pcm in pcms]
    spoken = [language for clip, language in zip(pieces, prompts, strict=True) for _ in clip]
    cut = [piece for clip in pieces for piece in clip]
    flat = greedy(model, processor, cut, spoken, batch_size, max_tokens, done)
    texts = iter(processor.tokenizer.batch_decode(flat, skip_special_tokens=True))
    return [" ".join(next(texts).strip() for _ in clip).strip() for clip in pieces]


def _each(pcms: Sequence[np.ndarray], languages: Languages) -> Sequence[str | None]:
    return [None] * len(pcms) if languages is None else languages


def _prompt_options(model: nn.Module, language: str | None) -> dict[str, str]:
    """Return the arguments of generate() that set the prompt."""
    if language is None:
        return {}
    return {"language": language, "task": task_of(model.generation_config)}


def suppressed(model: nn.Module) -> list[int]:
    """Return the suppressed tokens and all timestamp tokens.

    The prompt forbids timestamps. If a compressed model predicts one anyway, generate() decodes the
    rest of the window a second time.
    """
    generation = model.generation_config
    stamps = timestamp_ids(generation, model.config.vocab_size)
    return [*(generation.suppress_tokens or []), *stamps]


def until_end(tokens: list[int], end: int | list[int]) -> list[int]:
    ends = {end} if isinstance(end, int) else set(end)
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]
