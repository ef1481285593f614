"""All that can be said of an artifact by running it: its tokens of some clips, window by window."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..audio import Pcm, read_wav, split
from ..decode.text import join
from ..machine.host import versions
from ..recognizer import Recognizer
from .bench import read_clips, read_languages


class Hearing(Protocol):
    """What tells what an artifact says, whatever its layout."""

    window_samples: int

    def window(self, pcm: Pcm) -> list[int]:
        """Return the greedy tokens of one window; Recognizer takes a language as well."""

    def text(self, tokens: list[int]) -> str: ...


def check(
    artifact: Path, clips: Path, threads: int | None = None, compute_units: str | None = None
) -> dict[str, Any]:
    """Return the greedy tokens of every clip, a list for each of its windows, and the texts.

    Manifest, hashes, graphs and contract are checked before (contract.py). No rule is applied that
    transformers' generate() does not have: the tokens are those that the gate compared.
    """
    recognizer = Recognizer(artifact, threads, guards=False, compute_units=compute_units)
    return said(recognizer, clips)


def window_in(recognizer: Hearing, language: str | None) -> Callable[[Pcm], list[int]]:
    """Return what gives the tokens of windows in a language; layouts of other runtimes have one
    prompt, whatever is spoken."""
    if isinstance(recognizer, Recognizer):
        return partial(recognizer.window, language=language)
    return recognizer.window


def said(recognizer: Hearing, clips: Path) -> dict[str, Any]:
    """Return what a recognizer says; also one that is not the runner's own, with its one prompt."""
    paths, tokens = read_clips(clips), []
    for path, language in zip(paths, read_languages(clips, len(paths)), strict=True):
        pcm = read_wav(path)
        pieces = split(pcm, recognizer.window_samples)
        hear = window_in(recognizer, language)
        tokens.append([hear(pcm[piece]) for piece in pieces])
    texts = [join([recognizer.text(window) for window in clip]) for clip in tokens]
    return {"tokens": tokens, "texts": texts, "versions": versions()}
