"""Checks an artifact by running it: returns the tokens of clips, window by window."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..audio import Pcm, read_wav, split
from ..decode.text import join
from ..machine.host import versions
from ..recognizer import Recognizer
from .bench import read_clips, read_languages


class WindowDecoder(Protocol):
    """An opened artifact of any layout that decodes windows."""

    window_samples: int

    def window(self, pcm: Pcm) -> list[int]:
        """Return the greedy tokens of one window; Recognizer also takes a language."""

    def text(self, tokens: list[int]) -> str: ...


def check(
    artifact: Path, clips: Path, threads: int | None = None, compute_units: str | None = None
) -> dict[str, Any]:
    """Return the greedy tokens of every clip, one list per window, and the texts.

    Manifest, hashes, graphs and tensors are checked first (artifact/). Only rules of transformers'
    generate() are applied, so the tokens are those that the gate compared.
    """
    recognizer = Recognizer(artifact, threads, guards=False, compute_units=compute_units)
    return said(recognizer, clips)


def window_in(recognizer: WindowDecoder, language: str | None) -> Callable[[Pcm], list[int]]:
    """Return the function that decodes windows in a language. Layouts of other runtimes have one
    prompt, whatever the language."""
    if isinstance(recognizer, Recognizer):
        return partial(recognizer.window, language=language)
    return recognizer.window


def said(recognizer: WindowDecoder, clips: Path) -> dict[str, Any]:
    """Return the tokens, texts and versions of an artifact of any layout."""
    paths, tokens = read_clips(clips), []
    for path, language in zip(paths, read_languages(clips, len(paths)), strict=True):
        pcm = read_wav(path)
        pieces = split(pcm, recognizer.window_samples)
        decode = window_in(recognizer, language)
        tokens.append([decode(pcm[piece]) for piece in pieces])
    texts = [join([recognizer.text(window) for window in clip]) for clip in tokens]
    return {"tokens": tokens, "texts": texts, "versions": versions()}
