"""Alignment heads: the few cross-attention heads of the decoder that know when a word was said.

Whisper times its words with them: their attention, token by token over the sound, is averaged, and
dynamic time warping finds the one way through it from start to end (transformers does this, with
`generation_config.alignment_heads`, a list of [layer, head]). Three things are done here:

- `carry` follows the heads where compression moved them, so that the list names the same heads
  after it. Pruning and merging may take all of them; then every head of the decoder's upper half
  stands in, as in Whisper where nobody knows better.
- `find_heads` discovers them anew on speech whose word times are known, for compression or
  fine-tuning may have changed what a head does. `compose` makes such speech from single words.
- `timestamp_error_s` says how far from the truth the words are timed with a set of heads, and
  `reference` gives compression some speech to say it of: the truth where the clips hold single
  words, which can be put together, and otherwise what the model said before.
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
"""A decoder layer, and a head of its cross-attention, both from 0."""

Moves = Mapping[Head, Head | None]
"""Where each head went; None, or no entry, where it is gone."""


# ------------------------------------------------------------------------- heads that were moved


def moves(left: Sequence[Sequence[int]]) -> dict[Head, Head | None]:
    """Of each decoder layer the heads that are left, by their old numbers in their new order."""
    return {
        (layer, old): (layer, new)
        for layer, heads in enumerate(left)
        for new, old in enumerate(heads)
    }


def remap(heads: Sequence[Sequence[int]], moved: Moves) -> list[list[int]]:
    """The heads that are left, as generation_config writes them: ascending, none twice."""
    found = {moved.get((layer, head)) for layer, head in heads}
    return sorted(list(head) for head in found if head is not None)


def carry(model: nn.Module, moved: Moves) -> dict[str, Any]:
    """Let `model`, whose heads were moved, name the alignment heads it had; what it names now.

    Its generation_config still has the old list; a model without one stays without.
    """
    old = getattr(model.generation_config, "alignment_heads", None)
    if not old:
        return {}
    return replace_heads(model, old, remap(old, moved))


def settle(model: nn.Module) -> dict[str, Any]:
    """Name no head that the model does not have: transformers would fail on it."""
    old = getattr(model.generation_config, "alignment_heads", None)
    if not old:
        return {}
    return replace_heads(model, old, remap(old, moves([range(n) for n in head_counts(model)])))


def replace_heads(
    model: nn.Module, old: Sequence[Sequence[int]], new: list[list[int]]
) -> dict[str, Any]:
    """Heads `new`, or where there are none, the upper half's; said as compression.json has it."""
    model.generation_config.alignment_heads = new or upper_half(model)
    return {
        "before": [list(head) for head in old],
        "after": model.generation_config.alignment_heads,
        "stand_in": not new,
    }


def upper_half(model: nn.Module) -> list[list[int]]:
    """Every head of the last half of the decoder layers."""
    counts = head_counts(model)
    first = len(counts) // 2
    return [[n, head] for n in range(first, len(counts)) for head in range(counts[n])]


def head_counts(model: nn.Module) -> list[int]:
    """Cross-attention heads of every decoder layer."""
    return [layer.encoder_attn.num_heads for layer in model.model.decoder.layers]


# ------------------------------------------------------------------- speech with known word times


@dataclass(frozen=True)
class Word:
    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class TimedClip:
    pcm: np.ndarray
    """(samples,) float32, 16 kHz"""
    words: tuple[Word, ...]
    lang: str = "en"


def compose(
    words: Sequence[tuple[str, np.ndarray]], pauses_s: Sequence[float], lang: str = "en"
) -> TimedClip:
    """Single words (text, samples) one after the other, a pause before each and behind the last."""
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
    """What decoding is given, and every word's tokens."""
    space = "" if language_code(clip.lang) in UNSPACED else " "
    return prompt_ids(model.generation_config, clip.lang), [
        processor.tokenizer(space + word.text, add_special_tokens=False).input_ids
        for word in clip.words
    ]


# ---------------------------------------------------------------------- speech to be judged by

REFERENCE_CLIPS = 8
WORDS = 4
"""Of a clip that is put together, with pauses of PAUSE_S."""
PAUSE_S = 0.2
QUIET = 0.01
"""Of the loudest 20 ms: what is softer, before and behind a word, is not part of it."""


@dataclass(frozen=True)
class Reference:
    clips: tuple[TimedClip, ...]
    source: str
    """Where the times of the words are from."""


def reference(
    model: nn.Module, processor: WhisperProcessor, clips: Sequence[Clip]
) -> Reference | None:
    """Some of the clips with the times of their words: true ones where at least four clips hold a
    single word, otherwise those that `model` gives; None where no clip can be used."""
    ready = [clip for clip in clips if can_be_timed(clip)]
    made = composed([clip for clip in ready if len(clip.text.split()) == 1], processor)
    if made:
        return Reference(tuple(made), "single words put together, whose times are known")
    told = [self_timed(clip, model, processor) for clip in fitting(ready, model, processor)]
    return Reference(tuple(told), "the model before compression") if told else None


def can_be_timed(clip: Clip) -> bool:
    """Whether it has words that can be told apart."""
    return language_code(clip.lang) not in UNSPACED and bool(clip.text.strip())


def composed(single: Sequence[Clip], processor: WhisperProcessor) -> list[TimedClip]:
    """Clips of four words each from clips of one, as many as fit into the window."""
    made = []
    for first in range(0, min(len(single), REFERENCE_CLIPS * WORDS) - WORDS + 1, WORDS):
        words = [(c.text.strip(), without_silence(c.pcm())) for c in single[first : first + WORDS]]
        clip = compose(words, [PAUSE_S] * (WORDS + 1), single[first].lang)
        if len(clip.pcm) <= processor.feature_extractor.n_samples:
            made.append(clip)
    return made


def without_silence(pcm: np.ndarray) -> np.ndarray:
    power = np.convolve(pcm**2, np.ones(320) / 320, mode="same")
    loud = np.flatnonzero(power >= QUIET * power.max())
    return pcm[loud[0] : loud[-1] + 1]


def fitting(clips: Sequence[Clip], model: Any, processor: WhisperProcessor) -> list[Clip]:
    """The first few of two words or more that the model can hear and write at once."""
    found: list[Clip] = []
    for clip in clips:
        ids = processor.tokenizer(f" {clip.text}", add_special_tokens=False).input_ids
        room = model.config.max_target_positions - 5  # start, language, task, no timestamps, end
        short = len(clip.pcm()) <= processor.feature_extractor.n_samples
        if len(clip.text.split()) > 1 and len(ids) <= room and short:
            found.append(clip)
        if len(found) == REFERENCE_CLIPS:
            break
    return found


def self_timed(clip: Clip, model: nn.Module, processor: WhisperProcessor) -> TimedClip:
    """A clip with the times that the model itself gives to its words."""
    words = clip.text.split()
    untimed = TimedClip(clip.pcm(), tuple(Word(word, 0.0, 0.0) for word in words), clip.lang)
    times = word_times(model, processor, untimed, heads_of(model))
    timed = tuple(Word(word, *span) for word, span in zip(words, times, strict=True))
    return TimedClip(untimed.pcm, timed, clip.lang)


def heads_of(model: Any) -> list[list[int]]:
    """The alignment heads that the model names and has, or those that stand in for them."""
    named = getattr(model.generation_config, "alignment_heads", None) or []
    there = moves([range(count) for count in head_counts(model)])
    return remap(named, there) or upper_half(model)


# ------------------------------------------------------------------------------- what heads do


def head_scores(
    model: nn.Module, processor: WhisperProcessor, clips: Sequence[TimedClip]
) -> dict[Head, float]:
    """For every head, the share of its attention that lies within the time of the word whose
    tokens are next, averaged over all tokens of the clips: 1 for a head that follows perfectly."""
    check_clips(model, processor, clips)
    total: list[Tensor] = []
    tokens = 0
    for clip in clips:
        given, words = spell(clip, model, processor)
        spans = [
            span for word, ids in zip(clip.words, words, strict=True) for span in [word] * len(ids)
        ]
        inside = within(spans, model.config.max_source_positions, position_s(processor))
        rows = slice(len(given) - 1, len(given) - 1 + len(spans))  # these predict the words' tokens
        found = [
            (attention[:, rows] * inside).sum(dim=(1, 2))
            for attention in cross_attentions(model, processor, clip)
        ]
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        tokens += len(spans)
    return {
        (layer, head): float(score) / tokens
        for layer, scores in enumerate(total)
        for head, score in enumerate(scores)
    }


def find_heads(
    model: nn.Module, processor: WhisperProcessor, clips: Sequence[TimedClip], count: int
) -> list[list[int]]:
    """The `count` heads that follow the words best, as generation_config writes them."""
    scores = head_scores(model, processor, clips)
    best = sorted(scores, key=lambda head: (-scores[head], head))[:count]
    return sorted([layer, head] for layer, head in best)


def timestamp_error_s(
    model: nn.Module,
    processor: WhisperProcessor,
    clips: Sequence[TimedClip],
    heads: Sequence[Sequence[int]],
) -> float:
    """Mean distance of word starts and ends from the truth, in seconds, timed with these heads.

    The first start of a clip does not count: it is 0 whatever the heads say.
    """
    check_clips(model, processor, clips)
    errors = []
    for clip in clips:
        told = word_times(model, processor, clip, heads)
        true = [(word.start_s, word.end_s) for word in clip.words]
        errors += np.abs(np.subtract(told, true)).ravel()[1:].tolist()
    return float(np.mean(errors))


def word_times(
    model: Any, processor: WhisperProcessor, clip: TimedClip, heads: Sequence[Sequence[int]]
) -> list[tuple[float, float]]:
    """Start and end of every word in seconds, as Whisper finds them where the words are known.

    A token ends where the warped path enters the row behind it; rows count from the last token of
    the prompt, as in OpenAI's own timing. A word starts where the one before it ends.
    """
    given, words = spell(clip, model, processor)
    attentions = cross_attentions(model, processor, clip)
    tokens = sum(map(len, words))
    step = GenerateEncoderDecoderOutput(
        sequences=torch.zeros(1, len(given) + tokens),  # only its device and length are read
        cross_attentions=(tuple(attention[None] for attention in attentions),),
    )
    ends = model._extract_token_timestamps(
        step,
        heads,
        time_precision=position_s(processor),
        num_frames=2 * min(-(-len(clip.pcm) // samples_of(processor)), attentions[0].shape[-1]),
        num_input_ids=len(given) - 1,
    )[0].tolist()
    borders = np.cumsum([len(given) - 1, *map(len, words)])
    return [(ends[a], ends[b]) for a, b in pairwise(borders)]


@torch.no_grad()
def cross_attentions(
    model: nn.Module, processor: WhisperProcessor, clip: TimedClip
) -> list[Tensor]:
    """Of every decoder layer, (heads, tokens of prompt and words, positions)."""
    given, words = spell(clip, model, processor)
    ids = [*given, *(token for word in words for token in word)]
    device = next(model.parameters()).device
    features = log_mel(processor.feature_extractor, [clip.pcm]).to(device)
    with eager(model):
        output = model(
            features,
            decoder_input_ids=torch.tensor([ids], device=device),
            use_cache=False,
            output_attentions=True,
        )
    return [attention[0].float().cpu() for attention in output.cross_attentions]


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """The attention that can tell its weights, for a block."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def within(spans: Sequence[Word], positions: int, step_s: float) -> Tensor:
    """(spans, positions): how much of each encoder position lies within the word, from 0 to 1."""
    starts = torch.tensor([[span.start_s] for span in spans]) / step_s
    ends = torch.tensor([[span.end_s] for span in spans]) / step_s
    left = torch.arange(positions)[None]
    return (torch.minimum(ends, left + 1) - torch.maximum(starts, left)).clamp(0, 1)


def position_s(processor: WhisperProcessor) -> float:
    return samples_of(processor) / processor.feature_extractor.sampling_rate


def samples_of(processor: WhisperProcessor) -> int:
    """Samples of one encoder position: two mel frames."""
    return 2 * processor.feature_extractor.hop_length


def check_clips(model: nn.Module, processor: WhisperProcessor, clips: Sequence[TimedClip]) -> None:
    """Raises Problem where there is no clip, one without words, or one longer than the window."""
    if not clips:
        raise Problem("alignment: there are no clips", hint="give clips with the times of words")
    window = processor.feature_extractor.n_samples
    for number, clip in enumerate(clips, start=1):
        if not clip.words:
            raise Problem(f"alignment: clip {number} has no words", hint="leave it out")
        if len(clip.pcm) > window:
            raise Problem(
                f"alignment: clip {number} lasts {len(clip.pcm) / SAMPLE_RATE:.2f} s, the model's "
                f"window {window / SAMPLE_RATE:g} s",
                hint="compose it of fewer words",
            )
