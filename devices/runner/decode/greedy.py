"""Greedy decoding: the same tokens as transformers' `generate(num_beams=1, do_sample=False)`."""

from collections.abc import Callable, Sequence

import numpy as np

from ..interfaces import Logits
from .loops import loop_period, without_loop
from .rules import Rules
from .softmax import probability
from .timestamps import forbid

Step = Callable[[Sequence[int]], Logits]
"""Feeds tokens after those already fed and returns the logits (vocab,) after the last one."""

Choose = Callable[[Logits, Sequence[int]], int]
"""Logits (vocab,) and the tokens so far -> the next token."""


MOST_NO_SPEECH = 0.6
"""Whisper's threshold for no speech: such a window has no text and does not settle the language."""


def detect(step: Step, rules: Rules) -> tuple[str, float]:
    """Return the code of the most probable language, and the probability of no speech. The decoder
    has to start over after this."""
    logits = step(rules.prompt[:1])
    code = max(rules.languages, key=lambda code: logits[rules.languages[code]])
    return code, 0.0 if rules.no_speech is None else probability(logits, rules.no_speech)


class Filter:
    """Masks forbidden tokens. Fixed rules are an array of 0 and -inf that is added to the
    logits."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.always = self.first = self.scores = np.zeros(0, np.float32)

    def __call__(self, logits: Logits, tokens: Sequence[int]) -> Logits:
        """Return the logits (vocab,) with -inf for forbidden tokens. The array belongs to the
        filter; the next call overwrites it."""
        if self.scores.size != logits.size:
            self.prepare(logits.size)
        np.add(logits, self.always if tokens else self.first, out=self.scores)
        if self.rules.timestamps:
            forbid(self.scores, tokens, self.rules)
        return self.scores

    def likeliest(self, logits: Logits, tokens: Sequence[int]) -> int:
        """Return the most probable allowed token; of equals the lower id, as torch does."""
        if self.scores.size != logits.size:
            self.prepare(logits.size)
        if not self.rules.timestamps:  # usually the best token is allowed, then one pass is enough
            token = int(logits.argmax())
            if not (self.always if tokens else self.first)[token]:
                return token
        return int(self(logits, tokens).argmax())

    def prepare(self, vocab: int) -> None:
        """Build the masks of the fixed rules."""
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
    """Return the generated tokens, without prompt and end token. With `stop_loops`, decoding stops
    once the text repeats itself, and one copy is kept."""
    tokens = say(step, Filter(rules).likeliest, rules, stop_loops)
    return without_loop(tokens) if stop_loops else tokens


def say(step: Step, choose: Choose, rules: Rules, stop_loops: bool) -> list[int]:
    """Return the chosen tokens up to the end token, or with `stop_loops` up to a loop."""
    tokens: list[int] = []
    words: list[int] = []  # without timestamps
    ids: Sequence[int] = rules.prompt
    while len(tokens) < rules.max_new_tokens:
        token = choose(step(ids), tokens)
        if token == rules.eos:
            break
        tokens.append(token)
        ids = (token,)
        if rules.timestamps and rules.is_timestamp(token):
            continue
        words.append(token)
        if stop_loops and loop_period(words):
            break
    return tokens
