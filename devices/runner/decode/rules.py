"""Greedy decoding, token for token what `generate(num_beams=1, do_sample=False)` returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from .timestamps import forbid, log_sum_exp

Logits = npt.NDArray[np.float32]

Step = Callable[[Sequence[int]], Logits]
"""Feeds tokens behind those already fed; the logits (vocab,) that follow the last one."""

Choose = Callable[[Logits, Sequence[int]], int]
"""Logits and the tokens said so far -> the next token."""

AUTO = "auto"
"""The language that stands for the one that the model detects."""

MOST_NO_SPEECH = 0.6
"""A window that is likelier than this to be no speech says nothing of the language, as in Whisper
it has no text."""

LOOP_TOKENS = 30
LOOP_COPIES = 5
"""A loop is at least 30 tokens which are at least 5 copies of one phrase, in a row."""


@dataclass(frozen=True)
class Rules:
    """The `decoding` entry of an artifact's manifest, and what a caller asks for."""

    prompt: tuple[int, ...]
    eos: int
    suppress_tokens: tuple[int, ...]
    begin_suppress_tokens: tuple[int, ...]
    timestamp_begin: int | None
    """Ids from here on are timestamps, which the prompt forbids; the id before it says so."""
    max_new_tokens: int
    timestamp_end: int | None = None
    """The id behind the last timestamp; None: they go on to the end of the vocabulary."""
    max_initial_timestamp_index: int | None = None
    """The first timestamp is this many steps of 0.02 s at most."""
    no_speech: int | None = None
    """Its probability behind the prompt's first token is that of no speech."""
    previous: int | None = None
    """Says that what follows, up to the prompt, was said before."""
    languages: Mapping[str, int] = field(default_factory=dict)
    """Code -> id; empty where the model knows English only."""
    tasks: Mapping[str, int] = field(default_factory=dict)
    auto: bool = False
    """Whether the language is detected where none is asked for; the prompt's is a placeholder."""
    timestamps: bool = False

    @classmethod
    def from_manifest(cls, decoding: dict) -> "Rules":
        """Build the rules from JSON."""
        return cls(
            prompt=tuple(decoding["prompt"]),
            eos=decoding["eos"],
            suppress_tokens=tuple(decoding["suppress_tokens"]),
            begin_suppress_tokens=tuple(decoding["begin_suppress_tokens"]),
            timestamp_begin=decoding["timestamp_begin"],
            max_new_tokens=decoding["max_new_tokens"],
            timestamp_end=decoding.get("timestamp_end"),
            max_initial_timestamp_index=decoding.get("max_initial_timestamp_index"),
            no_speech=decoding.get("no_speech"),
            previous=decoding.get("previous"),
            languages=decoding.get("languages", {}),
            tasks=decoding.get("tasks", {}),
            auto=decoding.get("language") == AUTO,
        )

    @property
    def language(self) -> str | None:
        """The code of the language that the prompt is for; None where it is not known yet."""
        if self.auto:
            return None
        return next((code for code, i in self.languages.items() if i in self.prompt), None)

    def is_timestamp(self, token: int) -> bool:
        """Return whether a token stands for a time."""
        begin, end = self.timestamp_begin, self.timestamp_end
        return begin is not None and begin <= token and (end is None or token < end)

    def told(self, language: str | None, task: str | None, timestamps: bool) -> "Rules":
        """Return the rules with another language and task in the prompt; None keeps the one there.

        With timestamps, the token that forbids them leaves the prompt.
        """
        prompt = [swapped(i, self.languages, language) for i in self.prompt]
        prompt = [swapped(i, self.tasks, task) for i in prompt]
        if timestamps and self.timestamp_begin is not None:
            prompt = [i for i in prompt if i != self.timestamp_begin - 1]
        room = len(self.prompt) + self.max_new_tokens
        return replace(
            self,
            prompt=tuple(prompt),
            max_new_tokens=room - len(prompt),
            auto=self.auto and language is None,
            timestamps=timestamps,
        )

    def after(self, said: Sequence[int]) -> "Rules":
        """Return the rules with the end of what was said before in front of the prompt; with that
        it takes half of the context at most, as Whisper's own."""
        room = len(self.prompt) + self.max_new_tokens
        kept = min(len(said), room // 2 - 1, self.max_new_tokens - 1)
        if self.previous is None or kept < 1:
            return self
        prompt = (self.previous, *said[-kept:], *self.prompt)
        return replace(self, prompt=prompt, max_new_tokens=room - len(prompt))


def swapped(token: int, table: Mapping[str, int], wanted: str | None) -> int:
    """Return the id of `wanted` for any id of the table, other ids as they are."""
    return table[wanted] if wanted is not None and token in table.values() else token


def detect(step: Step, rules: Rules) -> tuple[str, float]:
    """Return the code of the likeliest language, and the probability that nobody speaks; the
    decoder has to begin again after this."""
    logits = step(rules.prompt[:1])
    code = max(rules.languages, key=lambda code: logits[rules.languages[code]])
    return code, 0.0 if rules.no_speech is None else probability(logits, rules.no_speech)


def probability(logits: Logits, token: int) -> float:
    """Return the softmax's share of one token."""
    return float(np.exp(logits[token] - log_sum_exp(logits)))


class Filter:
    """What may be said next. Fixed rules are an array of 0 and -inf, added to the logits."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.always = self.first = self.scores = np.zeros(0, np.float32)

    def __call__(self, logits: Logits, tokens: Sequence[int]) -> Logits:
        """Return the logits (vocab,) with -inf where a rule forbids the token.

        The array is the filter's own: the next call writes over it.
        """
        if self.scores.size != logits.size:
            self.prepare(logits.size)
        np.add(logits, self.always if tokens else self.first, out=self.scores)
        if self.rules.timestamps:
            forbid(self.scores, tokens, self.rules)
        return self.scores

    def likeliest(self, logits: Logits, tokens: Sequence[int]) -> int:
        """Return the likeliest token of those allowed; the lower id of equals, as torch does."""
        if self.scores.size != logits.size:
            self.prepare(logits.size)
        if not self.rules.timestamps:  # mostly the likeliest of all is allowed: one pass
            token = int(logits.argmax())
            if not (self.always if tokens else self.first)[token]:
                return token
        return int(self(logits, tokens).argmax())

    def prepare(self, vocab: int) -> None:
        """Lay out the fixed rules."""
        rules, self.scores = self.rules, np.empty(vocab, np.float32)
        self.always = np.zeros(vocab, np.float32)
        self.always[list(rules.suppress_tokens)] = -np.inf
        if rules.timestamp_begin is not None and rules.timestamps:
            self.always[rules.timestamp_begin - 1] = -np.inf
        elif rules.timestamp_begin is not None:
            self.always[rules.timestamp_begin : rules.timestamp_end] = -np.inf
        self.first = self.always.copy()
        self.first[list(rules.begin_suppress_tokens)] = -np.inf


def greedy(step: Step, rules: Rules, stop_loops: bool) -> list[int]:
    """Return the generated tokens, without prompt and end token.

    With `stop_loops`, decoding ends where the text has begun to repeat itself and one copy is kept.
    """
    tokens = say(step, Filter(rules).likeliest, rules, stop_loops)
    return without_loop(tokens) if stop_loops else tokens


def say(step: Step, choose: Choose, rules: Rules, stop_loops: bool) -> list[int]:
    """Return the tokens chosen one after the other until the end token or, if wished, a loop."""
    tokens: list[int] = []
    ids: Sequence[int] = rules.prompt
    while len(tokens) < rules.max_new_tokens:
        token = choose(step(ids), tokens)
        if token == rules.eos:
            break
        tokens.append(token)
        ids = (token,)
        if stop_loops and loop_period(tokens):
            break
    return tokens


def loop_period(tokens: Sequence[int]) -> int:
    """Return the length of the phrase that the text has fallen into repeating, or 0."""
    for period in range(1, len(tokens) // LOOP_COPIES + 1):
        if tokens[-1] != tokens[-1 - period]:
            continue
        copies = max(LOOP_COPIES, -(-LOOP_TOKENS // period))
        tail = tokens[-period * copies :]
        if len(tail) == period * copies and tail[period:] == tail[:-period]:
            return period
    return 0


def without_loop(tokens: list[int]) -> list[int]:
    """Keep the text up to the first loop, and its phrase once."""
    for length in range(LOOP_TOKENS, len(tokens) + 1):
        if period := loop_period(tokens[:length]):
            return cut_loop(tokens[:length], period)
    return tokens


def cut_loop(tokens: list[int], period: int) -> list[int]:
    """Keep what stands before the loop, and its phrase once."""
    start = len(tokens) - period
    while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
        start -= 1
    return tokens[: start + period]
