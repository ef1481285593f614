"""The decoding rules of an artifact: prompt, forbidden tokens, languages, timestamps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..artifact.manifest import AUTO


@dataclass(frozen=True)
class Rules:
    """The `decoding` entry of an artifact's manifest, with a caller's options applied."""

    prompt: tuple[int, ...]
    eos: int
    suppress_tokens: tuple[int, ...]
    begin_suppress_tokens: tuple[int, ...]
    timestamp_begin: int | None
    """First timestamp id; the id before it is the token that turns timestamps off."""
    max_new_tokens: int
    timestamp_end: int | None = None
    """The id after the last timestamp; None means timestamps extend to the end of the
    vocabulary."""
    max_initial_timestamp_index: int | None = None
    """The first timestamp is at most this many steps of 0.02 s."""
    no_speech: int | None = None
    """Token whose probability after the prompt's first token is that of no speech."""
    previous: int | None = None
    """Token that begins the previous text in front of the prompt."""
    languages: Mapping[str, int] = field(default_factory=dict)
    """Language code -> id; empty for English-only models."""
    tasks: Mapping[str, int] = field(default_factory=dict)
    aligns: bool = False
    """Whether the artifact gives the attention of its alignment heads, for word timestamps."""
    word_delay_s: float = 0.0
    """How late the word timestamps of the alignment heads are."""
    auto: bool = False
    """Whether the language is detected by default; the prompt's language is then a placeholder."""
    timestamps: bool = False

    @classmethod
    def from_manifest(cls, decoding: dict) -> "Rules":
        """Build the rules from the manifest's `decoding` entry."""
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
            aligns=decoding.get("alignment") is not None,
            word_delay_s=(decoding.get("alignment") or {}).get("delay_s", 0.0),
            auto=decoding.get("language") == AUTO,
        )

    @property
    def language(self) -> str | None:
        """The code of the prompt's language; None if it is still to be detected."""
        if self.auto:
            return None
        return next((code for code, i in self.languages.items() if i in self.prompt), None)

    def is_timestamp(self, token: int) -> bool:
        """Return whether a token is a timestamp."""
        begin, end = self.timestamp_begin, self.timestamp_end
        return begin is not None and begin <= token and (end is None or token < end)

    def words(self, tokens: list[int]) -> list[int]:
        """Return the tokens without timestamps."""
        if not self.timestamps:
            return tokens
        return [token for token in tokens if not self.is_timestamp(token)]

    def with_options(self, language: str | None, task: str | None, timestamps: bool) -> "Rules":
        """Return the rules with another language and task in the prompt; None keeps the old one.
        With `timestamps`, the token that turns timestamps off is removed from the prompt."""
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

    def after(self, previous: Sequence[int], hotwords: Sequence[int] = ()) -> "Rules":
        """Return the rules with hotwords and the end of the previous tokens in front of the prompt.
        As in Whisper, they take at most half of the context; hotwords come first."""
        room = len(self.prompt) + self.max_new_tokens
        most = max(0, min(room // 2 - 1, self.max_new_tokens - 1))
        context = [*hotwords[:most]]
        context += previous[max(0, len(previous) + len(context) - most) :]
        if self.previous is None or not context:
            return self
        prompt = (self.previous, *context, *self.prompt)
        return replace(self, prompt=prompt, max_new_tokens=room - len(prompt))


def swapped(token: int, table: Mapping[str, int], name: str | None) -> int:
    """Return the id of `name` if the token is an id of the table; otherwise the token itself."""
    return table[name] if name is not None and token in table.values() else token
