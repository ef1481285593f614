"""Transcribes recordings of any length: chooses windows, prompts and decoding for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Protocol

import numpy as np

from ..artifact.manifest import AUTO
from ..audio import SAMPLING_RATE, find_cut, is_hum, is_silent, is_steady, sound_seconds, split
from ..interfaces import Decoder, Pcm, Segment, Transcript, Word
from .fallback import (
    SEGMENT_LIMIT,
    SPARSE_LIMITS,
    TEMPERATURES,
    Attempt,
    best_attempt,
    is_dots,
    is_invented,
    is_sparse,
    sample,
)
from .greedy import MOST_NO_SPEECH, Filter, detect, say
from .loops import loop_period, without_loop
from .options import Options, check, code
from .rules import Rules
from .softmax import probability
from .text import Tokens, join
from .timestamps import STEP_SAMPLES, parts
from .words import TimedWord, at_pauses, timed_words

HOT = 0.5
"""Text sampled at a higher temperature is not used as a prompt, as in Whisper."""

LEAST_SOUND_S, LEAST_TOKENS_PER_S = 5.0, 1.5
"""A text with fewer tokens for more sound is incomplete: the model ended it too early. English
speech has 2 to 4 tokens for each second of sound, without pauses."""

LEAST_SEGMENT_TOKENS_PER_S = 1.0
"""The same for one segment of timestamps, whose rate varies more than that of a window."""

LEAST_STEPS = 50
"""If the next window would begin less than 1 s later, the unfinished text is kept instead: a model
that advances in steps of 0.02 s would take hours."""


class Voice(Protocol):
    """A voice activity detector."""

    def only_speech(self, pcm: Pcm) -> Pcm:
        """Return a window with zeros where there is no speech."""


class Model(Protocol):
    """What transcription needs of an opened artifact."""

    rules: Rules
    guards: bool
    window_samples: int

    @property
    def voice(self) -> Voice:
        """The voice activity detector."""

    def decoder_over(self, pcm: Pcm, times: Transcript) -> Decoder:
        """Encode one window and return the decoder over it."""

    def text(self, tokens: list[int]) -> str:
        """Return the text of tokens."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""

    table: Tokens


class Listener:
    """Transcribes one recording; stage times and language are written to `transcript`."""

    def __init__(self, recognizer: Model, options: Options, transcript: Transcript) -> None:
        self.recognizer, self.options, self.transcript = recognizer, options, transcript
        check(options, recognizer.rules)
        language = code(options.language, recognizer.rules)
        self.detects = language == AUTO or (language is None and recognizer.rules.auto)
        self.rules = recognizer.rules.with_options(
            None if self.detects else language, options.task, options.timestamps
        )
        transcript.language = None if self.detects else self.rules.language
        self.only_speech = recognizer.voice.only_speech if options.vad else unchanged
        self.prompted, self.doubtful, self.silent = self.rules, False, False
        self.since = len(transcript.tokens)
        """Tokens from this index on may prompt the next window."""
        self.context, self.hotwords = (
            recognizer.encode(f" {text.strip()}") if text and text.strip() else []
            for text in (options.prompt, options.hotwords)
        )
        """Tokens before the first window, and before every window."""
        self.logprobs: Sequence[float] = ()
        """The log-probability of each token of the last window, if they are needed."""
        self.no_speech_prob: float | None = None
        """The probability that the last window has no speech, if it is needed."""
        self.silence: float | None = None
        """The same, if the language was detected in the last window."""
        self.words: list[TimedWord] = []
        """The words of the last window, if they are needed."""

    @cached_property
    def rng(self) -> np.random.Generator:
        """The random numbers of sampling. Importing numpy.random takes 2 MB of memory."""
        return np.random.default_rng(self.options.seed)

    def segments(self, pcm: Pcm) -> Iterator[Segment]:
        """Yield the segments, and add them to the transcript."""
        for window in self.windows(pcm):
            tokens = [token for segment in window for token in segment.tokens]
            spoken = [segment for segment in window if segment.text]
            text = self.recognizer.text(tokens)
            self.transcript.text = join([self.transcript.text, text])
            self.transcript.tokens += tokens
            self.transcript.segments += spoken
            if self.doubtful:
                self.since, self.context = len(self.transcript.tokens), []
            yield from spoken

    def windows(self, pcm: Pcm) -> Iterator[list[Segment]]:
        """Yield the segments of each window as soon as it is decoded."""
        if self.options.timestamps:
            return self.by_timestamps(pcm, 0, len(pcm))
        return self.by_pauses(pcm)

    def by_pauses(self, pcm: Pcm) -> Iterator[list[Segment]]:
        """Yield one segment per window; windows end in pauses."""
        for piece in split(pcm, self.recognizer.window_samples):
            yield self.complete(self.only_speech(pcm[piece]), piece.start)

    def complete(self, window: Pcm, start: int) -> list[Segment]:
        """Return the segment of a window that began at a sample, or those of its two parts if the
        model may have left out some of its speech and the text of the parts is longer."""
        whole = self.piece(window, start)
        tokens = sum(len(segment.tokens) for segment in whole)
        if not self.leaves_out(window, tokens):
            return whole
        halves = split(window, 2 * len(window) // 3)
        parts = [part for h in halves for part in self.piece(window[h], start + h.start)]
        return parts if sum(len(part.tokens) for part in parts) > tokens else whole

    def piece(self, window: Pcm, start: int) -> list[Segment]:
        """Return a window that began at a sample as one segment."""
        return self.timed([(start, start + len(window), self.window(window))], start)

    def leaves_out(self, pcm: Pcm, tokens: int, per_s: float = LEAST_TOKENS_PER_S) -> bool:
        """Return whether the last window's tokens are too few for the sound of this part of it."""
        most_s = len(pcm) / SAMPLING_RATE  # of sound, which takes longer to compute
        enough = most_s <= LEAST_SOUND_S or tokens >= per_s * most_s
        if not self.recognizer.guards or self.silent or enough:
            return False
        sound_s = sound_seconds(pcm)
        return sound_s > LEAST_SOUND_S and tokens < per_s * sound_s

    def by_timestamps(
        self, pcm: Pcm, start: int, stop: int, complete: bool = True
    ) -> Iterator[list[Segment]]:
        """Yield the finished segments of each window between two samples; the next window begins
        where they end. With `complete`, left out speech is decoded again.

        Windows end in pauses, except the last one. Whisper's windows end anywhere, and a word at
        the end is lost if the model leaves it out.
        """
        while start < stop:
            window = first_window(pcm[start:stop], self.recognizer.window_samples)
            window = self.only_speech(window)
            tokens, length = self.window(window), len(window) // STEP_SAMPLES
            timed, steps = parts(tokens, self.rules, length) if tokens else ([], length)
            if timed and self.leaves_out(window[timed[-1][1] * STEP_SAMPLES :], 0):
                steps = timed[-1][1]  # decode the sound after the last segment again
            if steps < min(length, LEAST_STEPS):
                rest = tokens[sum(len(part) for _, _, part in timed) :]
                timed, steps = [*timed, (steps, length, rest)], length
            end = start + len(window)
            spans = [[min(start + n * STEP_SAMPLES, end) for n in (a, b)] for a, b, _ in timed]
            found = [(a, b, part) for (a, b), (_, _, part) in zip(spans, timed, strict=True)]
            yield self.completed(pcm, found, start) if complete else self.timed(found, start)
            start = end if steps >= length else start + steps * STEP_SAMPLES

    def completed(
        self, pcm: Pcm, found: Sequence[tuple[int, int, list[int]]], begin: int
    ) -> list[Segment]:
        """Return the segments of the last window as `timed` does. What follows the segment before
        is decoded again in two parts, up to the end of a segment, if the model may have left out
        some of its speech and the text of the parts is longer."""
        spans = list(pairwise([begin, *(stop for _, stop, _ in found)]))
        counts = [len(self.rules.words(tokens)) for _, _, tokens in found]
        short = [
            self.leaves_out(pcm[start:stop], count, LEAST_SEGMENT_TOKENS_PER_S)
            for (start, stop), count in zip(spans, counts, strict=True)
        ]
        segments = []
        for place, segment in enumerate(self.timed(found, begin)):
            parts = self.halves(pcm, *spans[place]) if short[place] else []
            longer = sum(len(self.rules.words(part.tokens)) for part in parts) > counts[place]
            segments += parts if longer else [segment]
        return segments

    def halves(self, pcm: Pcm, start: int, stop: int) -> list[Segment]:
        """Return the segments of the two parts between two samples."""
        halves = split(pcm[start:stop], 2 * (stop - start) // 3)
        windows = [self.by_timestamps(pcm, start + h.start, start + h.stop, False) for h in halves]
        return [segment for window in chain.from_iterable(windows) for segment in window]

    def timed(self, parts: Sequence[tuple[int, int, list[int]]], begin: int) -> list[Segment]:
        """Return the segments of the last window, which began at a sample, from their first and
        last sample and their tokens, which are successive parts of its tokens. Segments that were
        probably invented have no text."""
        confidence = self.options.confidence
        segments: list[Segment] = []
        invented: list[list[int]] = []
        stops = accumulate(len(tokens) for _, _, tokens in parts)
        for (start, stop, tokens), end in zip(parts, stops, strict=True):
            logprobs = self.logprobs[end - len(tokens) : end]
            mean = sum(logprobs) / len(logprobs) if confidence and logprobs else None
            said = self.rules.words(tokens)
            if said in invented or self.invents(tokens, logprobs):
                invented.append(said)
                tokens = []
            words = self.words_of(range(end - len(tokens), end), begin / SAMPLING_RATE)
            segments.append(
                Segment(
                    start / SAMPLING_RATE,
                    stop / SAMPLING_RATE,
                    self.recognizer.text(tokens),
                    tokens,
                    mean,
                    self.no_speech_prob if confidence else None,
                    words,
                )
            )
        return segments

    def invents(self, tokens: list[int], logprobs: Sequence[float]) -> bool:
        """Return whether a segment of timestamps was probably invented."""
        pairs = zip(logprobs, tokens, strict=False)  # there may be no log-probabilities
        spoken = [logprob for logprob, token in pairs if not self.rules.is_timestamp(token)]
        if not (spoken and self.recognizer.guards and self.options.timestamps):
            return False
        silent, likely = SEGMENT_LIMIT
        return (self.no_speech_prob or 0.0) > silent and sum(spoken) / len(spoken) < likely

    def window(self, pcm: Pcm) -> list[int]:
        """Return the tokens of one window, without prompt and end token."""
        guards, options = self.recognizer.guards, self.options
        self.logprobs, self.no_speech_prob, self.words, self.silence = (), None, [], None
        self.silent = guards and (is_silent(pcm) or is_steady(pcm))
        if self.silent:
            return []
        decoder = self.recognizer.decoder_over(pcm, self.transcript)
        self.set_language(decoder, pcm)
        self.prompted = self.with_context()
        best = self.best(decoder, len(pcm) / SAMPLING_RATE)
        self.logprobs = best.logprobs
        kept = self.without_loop(best.tokens) if guards else best.tokens
        self.doubtful = best.temperature > HOT or len(kept) < len(best.tokens)
        if options.word_timestamps:
            self.words = at_pauses(self.align(decoder, kept, len(pcm)), pcm)
        return kept

    def without_loop(self, tokens: list[int]) -> list[int]:
        """Return the text up to the first loop, with its phrase once and the timestamp after it."""
        kept = len(without_loop(self.rules.words(tokens)))
        places = [i for i, token in enumerate(tokens) if not self.rules.is_timestamp(token)]
        if kept == len(places):
            return tokens
        stop = places[kept - 1] + 1
        return tokens[: stop + self.rules.is_timestamp(tokens[stop])]

    def best(self, decoder: Decoder, window_s: float) -> Attempt:
        """Return the text of an encoded window, without tokens if it was probably invented."""
        options = self.options
        judged = self.recognizer.guards or options.fallback
        silence = self.no_speech(decoder) if judged or options.confidence else 0.0
        self.no_speech_prob = silence

        def words(found: Attempt) -> int:
            return len(without_loop(self.rules.words(found.tokens)))

        def invented(found: Attempt) -> bool:
            if not judged:
                return False
            dots = is_dots(self.recognizer.text(found.tokens))
            return dots or is_invented(found, words(found), silence, window_s)

        needs_logprobs = options.fallback or options.confidence or options.word_timestamps
        likely = options.beams == 1 and not needs_logprobs and silence <= SPARSE_LIMITS[0][0]

        def attempt(temperature: float) -> Attempt:
            found = (self.greedy if likely else self.attempt)(decoder, temperature)
            if likely and judged and (found.looped or is_sparse(words(found), window_s)):
                return self.attempt(decoder, temperature)  # the same tokens, with log-probabilities
            return found

        temperatures = TEMPERATURES if options.fallback else TEMPERATURES[:1]
        found = best_attempt(attempt, self.recognizer.text, invented, temperatures)
        self.silent = silence > MOST_NO_SPEECH or (not found.tokens and not found.looped)
        return found

    def align(self, decoder: Decoder, tokens: list[int], samples: int) -> list[TimedWord]:
        """Return the words of a window of some samples, as ranges of its tokens."""
        table = self.recognizer.table
        places = [i for i, token in enumerate(tokens) if token < len(table) and table[token]]
        untimed = self.recognizer.rules.with_options(self.rules.language, self.options.task, False)
        places = places[: untimed.max_new_tokens - 1]
        if not places:
            return []
        text = [tokens[i] for i in places]
        ids = [*untimed.prompt, *text, untimed.eos]
        attention = decoder.attention(ids, -(-samples // STEP_SAMPLES))
        before = len(untimed.prompt) - 1
        rules = self.rules
        words = timed_words(attention, before, text, table, rules.language, rules.word_delay_s)
        return [w._replace(first=places[w.first], stop=places[w.stop - 1] + 1) for w in words]

    def words_of(self, tokens: range, begin_s: float) -> list[Word] | None:
        """Return the words whose first token is in a range of the last window's tokens; None unless
        they were requested. The window began at `begin_s`."""
        if not self.options.word_timestamps:
            return None
        return [
            Word(
                round(begin_s + word.start_s, 2),
                round(begin_s + word.end_s, 2),
                word.text,
                float(np.exp(self.logprobs[word.first : word.stop]).mean()),
            )
            for word in self.words
            if word.first in tokens
        ]

    def with_context(self) -> Rules:
        """Return the rules with hotwords and the text before the window in the prompt."""
        previous = self.context
        if self.options.previous:
            previous = previous + self.transcript.tokens[self.since :]
        else:
            self.context = []
        return self.rules.after(previous, self.hotwords)

    def set_language(self, decoder: Decoder, pcm: Pcm) -> None:
        """Detect the language and put it into the prompt, unless it is known. The language of the
        first window with speech is final; windows before it use their own."""
        if self.detects:
            detected, self.silence = detect(decoder, self.rules)
            self.rules = self.rules.with_options(detected, None, self.options.timestamps)
            self.transcript.language = detected
            self.detects = self.silence > MOST_NO_SPEECH or is_hum(pcm)
            self.rewind(decoder)

    def greedy(self, decoder: Decoder, temperature: float) -> Attempt:
        """Decode the window once without computing log-probabilities, which takes less time."""
        self.rewind(decoder)
        guards = self.recognizer.guards
        tokens = say(decoder, Filter(self.prompted).likeliest, self.prompted, guards)
        return Attempt(tokens, 0.0, guards and loop_period(self.rules.words(tokens)) > 0)

    def attempt(self, decoder: Decoder, temperature: float) -> Attempt:
        """Decode the window once from the prompt; beam search is used at temperature 0 only."""
        self.rewind(decoder)
        if self.options.beams == 1 or temperature:
            return sample(decoder, self.prompted, temperature, self.rng, self.recognizer.guards)
        return self.beam_search(decoder)

    def beam_search(self, decoder: Decoder) -> Attempt:
        """Decode the window once by beam search."""
        from .beam import Branches, beam_search

        first = decoder(self.prompted.prompt).copy()
        branches = Branches(decoder, self.options.beams)
        best = beam_search(first, branches, self.prompted, self.options.beams)
        return replace(best, looped=self.without_loop(best.tokens) != best.tokens)

    def no_speech(self, decoder: Decoder) -> float:
        """Return the probability that the window has no speech: that of a token after the prompt's
        first. The decoder has to start over after this."""
        token = self.rules.no_speech
        before = len(self.prompted.prompt) - len(self.rules.prompt)
        if token is None:
            return 0.0
        if self.silence is not None and not before:
            return self.silence
        decoder.fed, decoder.clock = 0, self.transcript.no_speech_s
        return probability(decoder(self.prompted.prompt[: before + 1]), token)

    def rewind(self, decoder: Decoder) -> None:
        """Make the decoder start over; the next call is timed as a prompt."""
        decoder.fed, decoder.clock = 0, self.transcript.prompt_s


def unchanged(pcm: Pcm) -> Pcm:
    return pcm


def first_window(pcm: Pcm, window_samples: int) -> Pcm:
    """Return all samples, or if they exceed a window, those up to a pause in it."""
    if len(pcm) <= window_samples:
        return pcm
    return pcm[: find_cut(pcm[:window_samples])]
