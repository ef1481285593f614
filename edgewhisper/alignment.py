"""Alignment heads: the cross-attention heads of the decoder that follow the spoken words.

Whisper computes word timestamps from them: the attention of these heads over the audio is averaged
for each token, and dynamic time warping finds the monotonic path through it. transformers
implements this; `generation_config.alignment_heads` is a list of [layer, head].

- `carry` updates the list when compression moves heads. If pruning or merging removes all of them,
  all heads of the decoder's upper half replace them, as in OpenAI's Whisper for unknown models.
- `find_heads` searches the heads on speech with known word times, because compression or
  fine-tuning may change what a head attends to. `compose` makes such speech from single words.
- `timestamp_error_s` measures the error of the word times that a set of heads gives. `reference`
  prepares speech for it: clips with single words are concatenated, which gives true times;
  otherwise the times of the uncompressed model are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import WhisperProcessor
from transformers.generation.utils import GenerateEncoderDecoderOutput

from edgewhisper.decoding import log_mel
from edgewhisper.examples import SAMPLE_RATE, UNSPACED
from export.problem import Problem
from export.prompt import language_code, prompt_ids

if TYPE_CHECKING:
    from benchmarks.speech.clips import Clip

Head = tuple[int, int]
"""A decoder layer and a head of its cross-attention, both counted from 0."""

Moves = Mapping[Head, Head | None]
"""Old head -> new head. Removed heads map to None or are missing."""


# ------------------------------------------------------------------------- heads that were moved


def moves(left: Sequence[Sequence[int]]) -> dict[Head, Head | None]:
    """Return the moves. `left` has the remaining heads of each decoder layer in their new order. A
    layer without heads was removed."""
    return {
        (layer, old): (sum(map(bool, left[:layer])), new)
        for layer, heads in enumerate(left)
        for new, old in enumerate(heads)
    }


def remap(heads: Sequence[Sequence[int]], moved: Moves) -> list[list[int]]:
    """Return the remaining heads as in generation_config: ascending, without duplicates."""
    remaining = {moved.get((layer, head)) for layer, head in heads}
    return sorted(list(head) for head in remaining if head is not None)


def carry(model: nn.Module, moved: Moves) -> dict[str, Any]:
    """Update the alignment heads of `model` after its heads were moved. Returns the entry for
    compression.json, or {} if the model has no alignment heads."""
    old = getattr(model.generation_config, "alignment_heads", None)
    if not old:
        return {}
    return replace_heads(model, old, remap(old, moved))


def settle(model: nn.Module) -> dict[str, Any]:
    """Remove alignment heads that the model does not have: transformers would fail on them. Returns
    the entry for compression.json, or {} if the model has no alignment heads."""
    old = getattr(model.generation_config, "alignment_heads", None)
    if not old:
        return {}
    return replace_heads(model, old, remap(old, moves([range(n) for n in head_counts(model)])))


def replace_heads(
    model: nn.Module, old: Sequence[Sequence[int]], new: list[list[int]]
) -> dict[str, Any]:
    """Set the alignment heads to `new`, or to those of the upper half if `new` is empty. Returns
    the entry for compression.json."""
    model.generation_config.alignment_heads = new or upper_half(model)
    if not new:
        model.generation_config.word_delay_s = None  # it is that of the old heads
    return {
        "before": [list(head) for head in old],
        "after": model.generation_config.alignment_heads,
        "stand_in": not new,
    }


def upper_half(model: nn.Module) -> list[list[int]]:
    """Return all heads of the upper half of the decoder layers."""
    counts = head_counts(model)
    first = len(counts) // 2
    return [[n, head] for n in range(first, len(counts)) for head in range(counts[n])]


def head_counts(model: nn.Module) -> list[int]:
    """Return the number of cross-attention heads of every decoder layer."""
    return [layer.encoder_attn.num_heads for layer in model.model.decoder.layers]


# ------------------------------------------------------------------- speech with known word times


@dataclass(frozen=True)
class Word:
    """A word with its time in the clip, in seconds."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class TimedClip:
    """A clip with the times of its words."""

    pcm: np.ndarray
    """(samples,) float32, 16 kHz"""
    words: tuple[Word, ...]
    lang: str = "en"


def compose(
    words: Sequence[tuple[str, np.ndarray]], pauses_s: Sequence[float], lang: str = "en"
) -> TimedClip:
    """Concatenate single words (text, samples) with a pause before each and after the last."""
    parts, timed, now = [], [], 0
    for (text, samples), pause_s in zip(words, pauses_s[:-1], strict=True):
        silence = np.zeros(round(pause_s * SAMPLE_RATE))
        start, end = now + len(silence), now + len(silence) + len(samples)
        timed.append(Word(text, start / SAMPLE_RATE, end / SAMPLE_RATE))
        parts += [silence, samples]
        now = end
    tail = np.zeros(round(pauses_s[-1] * SAMPLE_RATE))
    return TimedClip(np.concatenate([*parts, tail]).astype(np.float32), tuple(timed), lang)


def spell(
    clip: TimedClip, model: nn.Module, processor: WhisperProcessor
) -> tuple[list[int], list[list[int]]]:
    """Return the token ids of the prompt, and those of every word."""
    space = "" if language_code(clip.lang) in UNSPACED else " "
    return prompt_ids(model.generation_config, clip.lang), [
        processor.tokenizer(space + word.text, add_special_tokens=False).input_ids
        for word in clip.words
    ]


# --------------------------------------------------------- reference speech for timestamps

REFERENCE_CLIPS = 8
WORDS = 4
"""Number of words in a concatenated clip."""
PAUSE_S = 0.2
"""Pause between the words of a concatenated clip, in seconds."""
QUIET = 0.01
"""Samples around a word whose power is below this share of its loudest 20 ms are trimmed."""


@dataclass(frozen=True)
class Reference:
    """Speech on which the error of word timestamps is measured."""

    clips: tuple[TimedClip, ...]
    source: str
    """Where the word times come from."""


def reference(
    model: nn.Module, processor: WhisperProcessor, clips: Sequence[Clip]
) -> Reference | None:
    """Return clips with word times, or None if no clip is usable.

    If at least four clips hold a single word, these are concatenated and the times are exact.
    Otherwise they are the times that `model` gives.
    """
    usable = [clip for clip in clips if can_be_timed(clip)]
    concatenated = composed([clip for clip in usable if len(clip.text.split()) == 1], processor)
    if concatenated:
        return Reference(tuple(concatenated), "single words put together, whose times are known")
    timed = [self_timed(clip, model, processor) for clip in fitting(usable, model, processor)]
    return Reference(tuple(timed), "the model before compression") if timed else None


def can_be_timed(clip: Clip) -> bool:
    """Return whether the clip has a text with spaces between its words."""
    return language_code(clip.lang) not in UNSPACED and bool(clip.text.strip())


def composed(single: Sequence[Clip], processor: WhisperProcessor) -> list[TimedClip]:
    """Concatenate clips of one word to clips of four; those longer than the window are dropped."""
    timed = []
    for first in range(0, min(len(single), REFERENCE_CLIPS * WORDS) - WORDS + 1, WORDS):
        words = [(c.text.strip(), without_silence(c.pcm())) for c in single[first : first + WORDS]]
        clip = compose(words, [PAUSE_S] * (WORDS + 1), single[first].lang)
        if len(clip.pcm) <= processor.feature_extractor.n_samples:
            timed.append(clip)
    return timed


def without_silence(pcm: np.ndarray) -> np.ndarray:
    """Trim the silence at the start and the end."""
    power = np.convolve(pcm**2, np.ones(320) / 320, mode="same")
    loud = np.flatnonzero(power >= QUIET * power.max())
    return pcm[loud[0] : loud[-1] + 1]


def fitting(clips: Sequence[Clip], model: Any, processor: WhisperProcessor) -> list[Clip]:
    """Return the first clips of at least two words that fit the window and the token limit."""
    chosen: list[Clip] = []
    for clip in clips:
        ids = processor.tokenizer(f" {clip.text}", add_special_tokens=False).input_ids
        room = model.config.max_target_positions - 5  # start, language, task, no timestamps, end
        short = len(clip.pcm()) <= processor.feature_extractor.n_samples
        if len(clip.text.split()) > 1 and len(ids) <= room and short:
            chosen.append(clip)
        if len(chosen) == REFERENCE_CLIPS:
            break
    return chosen


def self_timed(clip: Clip, model: nn.Module, processor: WhisperProcessor) -> TimedClip:
    """Return the clip with the word times that the model gives with its alignment heads."""
    words = clip.text.split()
    untimed = TimedClip(clip.pcm(), tuple(Word(word, 0.0, 0.0) for word in words), clip.lang)
    times = word_times(model, processor, untimed, heads_of(model))
    timed = tuple(Word(word, *span) for word, span in zip(words, times, strict=True))
    return TimedClip(untimed.pcm, timed, clip.lang)


def heads_of(model: Any) -> list[list[int]]:
    """Return the valid alignment heads of generation_config, or those of the upper half."""
    named = getattr(model.generation_config, "alignment_heads", None) or []
    existing = moves([range(count) for count in head_counts(model)])
    return remap(named, existing) or upper_half(model)


# ------------------------------------------------------------------------------- what heads do


def head_scores(
    model: nn.Module, processor: WhisperProcessor, clips: Sequence[TimedClip]
) -> dict[Head, float]:
    """Return a score from 0 to 1 for every head: how much of its attention follows the words.

    It is the share of the attention that lies within the time of the word whose token is predicted,
    averaged over all tokens of the clips.
    """
    check_clips(model, processor, clips)
    total: list[Tensor] = []
    tokens = 0
    for clip in clips:
        prompt, words = spell(clip, model, processor)
        spans = [
            span for word, ids in zip(clip.words, words, strict=True) for span in [word] * len(ids)
        ]
        inside = within(spans, model.config.max_source_positions, position_s(processor))
        rows = slice(
            len(prompt) - 1, len(prompt) - 1 + len(spans)
        )  # these predict the words' tokens
        scores = [
            (attention[:, rows] * inside).sum(dim=(1, 2))
            for attention in cross_attentions(model, processor, clip)
        ]
        total = [a + b for a, b in zip(total, scores, strict=True)] if total else scores
        tokens += len(spans)
    return {
        (layer, head): float(score) / tokens
        for layer, scores in enumerate(total)
        for head, score in enumerate(scores)
    }


def find_heads(
    model: nn.Module, processor: WhisperProcessor, clips: Sequence[TimedClip], count: int
) -> list[list[int]]:
    """Return the `count` heads with the best scores, as in generation_config."""
    scores = head_scores(model, processor, clips)
    best = sorted(scores, key=lambda head: (-scores[head], head))[:count]
    return sorted([layer, head] for layer, head in best)


def timestamp_error_s(
    model: nn.Module,
    processor: WhisperProcessor,
    clips: Sequence[TimedClip],
    heads: Sequence[Sequence[int]],
) -> float:
    """Return the mean absolute error of word starts and ends in seconds, timed with these heads.
    The first start of a clip is not counted: it is 0 for all heads."""
    check_clips(model, processor, clips)
    errors = []
    for clip in clips:
        times = word_times(model, processor, clip, heads)
        true = [(word.start_s, word.end_s) for word in clip.words]
        errors += np.abs(np.subtract(times, true)).ravel()[1:].tolist()
    return float(np.mean(errors))


def word_times(
    model: Any, processor: WhisperProcessor, clip: TimedClip, heads: Sequence[Sequence[int]]
) -> list[tuple[float, float]]:
    """Return start and end of every word in seconds, computed as Whisper does for known words.

    A token ends where the warped path enters the next row; rows count from the last token of the
    prompt, as in OpenAI's code. A word starts where the previous one ends.
    """
    prompt, words = spell(clip, model, processor)
    attentions = cross_attentions(model, processor, clip)
    tokens = sum(map(len, words))
    step = GenerateEncoderDecoderOutput(
        sequences=torch.zeros(1, len(prompt) + tokens),  # only its device and length are read
        cross_attentions=(tuple(attention[None] for attention in attentions),),
    )
    ends = model._extract_token_timestamps(
        step,
        heads,
        time_precision=position_s(processor),
        num_frames=2 * min(-(-len(clip.pcm) // samples_of(processor)), attentions[0].shape[-1]),
        num_input_ids=len(prompt) - 1,
    )[0].tolist()
    borders = np.cumsum([len(prompt) - 1, *map(len, words)])
    return [(ends[a], ends[b]) for a, b in pairwise(borders)]


@torch.no_grad()
def cross_attentions(
    model: nn.Module, processor: WhisperProcessor, clip: TimedClip
) -> list[Tensor]:
    """Return the attention weights of every decoder layer: (heads, prompt and words, positions)."""
    prompt, words = spell(clip, model, processor)
    ids = [*prompt, *(token for word in words for token in word)]
    device = next(model.parameters()).device
    features = log_mel(processor.feature_extractor, [clip.pcm]).to(device)
    encoded = model.model.encoder(features)
    with eager(model):
        output = model(
            encoder_outputs=encoded,
            decoder_input_ids=torch.tensor([ids], device=device),
            use_cache=False,
            output_attentions=True,
        )
    return [attention[0].float().cpu() for attention in output.cross_attentions]


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Use the eager attention, the only one that returns its weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def within(spans: Sequence[Word], positions: int, step_s: float) -> Tensor:
    """Return (spans, positions): the share of each encoder position that lies within the word."""
    starts = torch.tensor([[span.start_s] for span in spans]) / step_s
    ends = torch.tensor([[span.end_s] for span in spans]) / step_s
    left = torch.arange(positions)[None]
    return (torch.minimum(ends, left + 1) - torch.maximum(starts, left)).clamp(0, 1)


def position_s(processor: WhisperProcessor) -> float:
    """Return the duration of one encoder position in seconds."""
    return samples_of(processor) / processor.feature_extractor.sampling_rate


def samples_of(processor: WhisperProcessor) -> int:
    """Return the number of samples of one encoder position, which is two mel frames."""
    return 2 * processor.feature_extractor.hop_length


def check_clips(model: nn.Module, processor: WhisperProcessor, clips: Sequence[TimedClip]) -> None:
    """Raise Problem if there is no clip, or a clip without words or longer than the window."""
    if not clips:
        raise Problem("alignment: there are no clips", hint="pass clips with word times")
    window = processor.feature_extractor.n_samples
    for number, clip in enumerate(clips, start=1):
        if not clip.words:
            raise Problem(f"alignment: clip {number} has no words", hint="remove it")
        if len(clip.pcm) > window:
            raise Problem(
                f"alignment: clip {number} lasts {len(clip.pcm) / SAMPLE_RATE:.2f} s, the model's "
                f"window {window / SAMPLE_RATE:g} s",
                hint="use fewer words per clip",
            )
