"""Types that the parts of the runner exchange: arrays, segments, transcripts, decoders, engines."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Pcm = npt.NDArray[np.float32]
"""Samples (samples,) of 16 kHz mono audio, within [-1, 1]."""

Logits = npt.NDArray[np.float32]
"""Scores of the next token, (vocab,)."""


@dataclass(frozen=True)
class Word:
    """A word of a segment: its text with the space before it, its times in seconds from the start
    of the recording, and the mean probability of its tokens."""

    start_s: float
    end_s: float
    text: str
    probability: float


@dataclass(frozen=True)
class Segment:
    """A part of a recording, in seconds from its start, with its text and tokens."""

    start_s: float
    end_s: float
    text: str
    tokens: list[int]
    avg_logprob: float | None = None
    """Mean log-probability of the tokens, with Options.confidence."""
    no_speech_prob: float | None = None
    """Probability that the segment's window has no speech, with Options.confidence."""
    words: list[Word] | None = None
    """The words, with Options.word_timestamps."""

    def as_dict(self) -> dict[str, Any]:
        """Return the entries for the JSON output, those of Options only if they were requested."""
        optional = {
            "avg_logprob": self.avg_logprob,
            "no_speech_prob": self.no_speech_prob,
            "words": None if self.words is None else [asdict(word) for word in self.words],
        }
        return {
            "start_s": self.start_s,
            "end_s": self.end_s,
            "text": self.text,
            **{name: value for name, value in optional.items() if value is not None},
        }


@dataclass
class Transcript:
    """The transcript of one recording, and the seconds that each stage took.

    `language` is the code in the prompt: requested, set by the checkpoint or detected; None for
    English-only models. `graph_s` is the time of the encoder graph: log-mel, encoder, cross keys
    and values. `mel_s` is log-mel's part of it, if known. The lists have one entry per window,
    `per_token_s` one per decoder step after the prompt, `no_speech_s` one per decoder step for the
    probability of no speech.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    language: str | None = None
    graph_s: list[float] = field(default_factory=list)
    mel_s: list[float] = field(default_factory=list)
    no_speech_s: list[float] = field(default_factory=list)
    prompt_s: list[float] = field(default_factory=list)
    per_token_s: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the entries for the JSON output."""
        segments = [segment.as_dict() for segment in self.segments]
        return {"text": self.text, "language": self.language, "segments": segments}


class Decoder(Protocol):
    """The decoder over one encoded window, with its key and value caches."""

    fed: int
    """Number of tokens fed so far; set it to 0 to start over."""
    clock: list[float]
    """The list that the next call appends its seconds to."""

    def __call__(self, ids: Sequence[int]) -> Logits:
        """Feed tokens after those already fed; return the logits (vocab,) after the last. The array
        may belong to the engine; the next call overwrites it."""

    def attention(self, ids: Sequence[int], positions: int) -> npt.NDArray[np.float32]:
        """Return the attention (heads, ids, positions) of the alignment heads over the first
        positions of the window, for tokens from the start of the decoder."""

    def branches(self, count: int) -> "Sequence[Decoder]":
        """Return `count` decoders over the same window, each with its own caches."""

    def follow(self, other: Any) -> None:
        """Copy the state of another decoder over the same window."""

    def parts(self) -> dict[str, np.ndarray]:
        """Return intermediate arrays between audio and logits, if the engine exposes them."""


class Engine(Protocol):
    """The opened graphs of an artifact."""

    def decoder_over(self, window: Pcm, times: "Transcript") -> Decoder:
        """Encode one window (1, samples) and return the decoder over it."""
