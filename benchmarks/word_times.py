"""Compare an artifact's word timestamps with a forced alignment of the same words.

    pip install pocketsphinx
    python -m benchmarks.word_times ARTIFACT MANIFEST

The aligner is pocketsphinx with its model of US English, in steps of 10 ms. It aligns the words
that the artifact returned. Clips with digits or with words that its dictionary lacks are left out.
A positive bias means that the artifact's times are later.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.gate import evenly
from benchmarks.markdown import table
from benchmarks.program import exit_code, parser_of
from benchmarks.speech.clips import read_manifest
from devices.runner.audio import Pcm
from devices.runner.recognizer import Recognizer
from export.problem import Problem

FRAME_S = 0.01
SILENCES = ("<", "[")
"""First characters of the aligner's names for silence and noise."""

Span = tuple[float, float]
Align = Callable[[Pcm, Sequence[str]], "list[Span] | None"]
"""Return the times of words in a clip; None if they cannot be aligned."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1 after an error."""
    parser = parser_of("benchmarks.word_times", __doc__)
    add = parser.add_argument
    add("artifact", type=Path)
    add("speech", help="a manifest of clips")
    add("--clips", type=int, default=100, help="most clips; default: 100")
    add("--threads", type=int, default=1)
    return exit_code(measure, parser, argv)


def measure(given: argparse.Namespace) -> None:
    """Print the table."""
    align, recognizer = aligner(), Recognizer(given.artifact, given.threads)
    clips = [clip for clip in read_manifest(given.speech) if clip.lang == "en" and clip.text]
    ours, theirs, used = [], [], 0
    for clip in evenly(clips, given.clips):
        pcm = clip.pcm()
        segments = recognizer.transcribe(pcm, word_timestamps=True, language="en").segments
        words = [word for segment in segments for word in segment.words or ()]
        spans = align(pcm, [plain(word.text) for word in words]) if words else None
        if spans is not None:
            ours += [(word.start_s, word.end_s) for word in words]
            theirs += spans
            used += 1
    if not used:
        raise Problem("no clip could be aligned", hint="give clips of English sentences")
    print(f"{len(ours)} words of {used} clips\n\n{table(summary(ours, theirs))}")


def aligner() -> Align:
    """Return pocketsphinx as a function."""
    try:
        from pocketsphinx import Decoder
    except ImportError:
        raise Problem(
            "the aligner is not installed", hint="run `pip install pocketsphinx`"
        ) from None
    decoder = Decoder(lm=None, loglevel="FATAL")

    def align(pcm: Pcm, words: Sequence[str]) -> list[Span] | None:
        if not all(word and decoder.lookup_word(word) for word in words):
            return None
        decoder.set_align_text(" ".join(words))
        decoder.start_utt()
        steps = np.round(32767 * np.clip(pcm, -1, 1)).astype("<i2")
        decoder.process_raw(steps.tobytes(), full_utt=True)
        decoder.end_utt()
        found = [part for part in decoder.seg() or () if not part.word.startswith(SILENCES)]
        if [part.word.split("(")[0] for part in found] != list(words):
            return None
        return [(FRAME_S * part.start_frame, FRAME_S * (part.end_frame + 1)) for part in found]

    return align


def plain(word: str) -> str:
    """Return a word as the dictionary spells it; with digits or a dash, nothing."""
    bare = word.strip().lower().replace("’", "'").strip("\"'.,!?:;“”()")
    return bare if bare.replace("'", "").isalpha() else ""


def summary(ours: Sequence[Span], theirs: Sequence[Span]) -> list[dict[str, str]]:
    """Return rows for the starts and the ends of the words, in ms."""
    errors = 1000 * (np.array(ours) - np.array(theirs))  # (words, 2)
    rows = []
    for name, values in zip(("start", "end"), errors.T, strict=True):
        median, most = np.percentile(np.abs(values), [50, 90])
        rows.append(
            {
                "time": name,
                "median error ms": f"{median:.0f}",
                "90 % below ms": f"{most:.0f}",
                "bias ms": f"{np.median(values):+.0f}",
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
