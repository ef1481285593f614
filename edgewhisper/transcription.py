"""Transcribe audio and evaluate error rates, with a checkpoint or an artifact."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.normalizers import name_for
from benchmarks.normalizers import normalizer as normalizer_named
from benchmarks.speech.clips import Samples, read_manifest
from benchmarks.wer import Score, score, word_counts
from edgewhisper import decoding, whisper
from edgewhisper.languages import refuse_other_than_english, refuse_without_token
from edgewhisper.progress import progress_bar
from export.artifact import MANIFEST
from export.layouts import layouts_of
from export.problem import Problem
from export.prompt import AUTO, is_multilingual, language_code
from export.vocabulary import TASKS

if TYPE_CHECKING:
    from devices.runner.batch import Transcribe
    from devices.runner.recognizer import Recognizer


def recogniser(
    source: str,
    threads: int | None = None,
    compute_units: str | None = None,
    **options: Any,
) -> Transcribe:
    """Return a function from a 16 kHz recording to its text and language; an artifact adds the
    segments.

    An artifact calls the function's second argument with each segment as soon as it is decoded.
    `options` are those of devices/runner/decode/listen.py. A checkpoint takes the language only,
    and raises Problem for other options.
    """
    if not is_artifact(source):
        refuse_compute_units(source, compute_units)
        model, processor = whisper.load(source), whisper.load_processor(source)
        refuse_options(source, model.generation_config, options)
        language = known_language(model.generation_config, options.get("language"))

        def by_checkpoint(pcm: np.ndarray, on_segment: object) -> dict[str, Any]:
            (code,) = decoding.detected_languages(model, processor, [pcm], [language])
            text = decoding.transcribe(model, processor, [pcm], [code])[0]
            return {"text": text, "language": code}

        return by_checkpoint
    return partial(open_artifact(source, threads, compute_units).row, **options)


class Evaluation(NamedTuple):
    """The error rates of a model and its text of each clip."""

    score: Score
    clips: list[dict[str, Any]]
    """Per clip: audio, lang, reference, text, and the word counts of `score`."""


def evaluate(
    source: str, speech: Path, normalizer: str | None = None, compute_units: str | None = None
) -> Evaluation:
    """Return the error rates of a checkpoint or an artifact on the clips of a manifest.

    The default normalizer is the one for the clips' language. Raises Problem for an unknown
    normalizer before anything is transcribed.
    """
    clips = read_manifest(speech)
    normalizer = normalizer or name_for(clips)
    normalizer_named(normalizer)
    languages = [clip.lang for clip in clips]
    texts = transcriber(source, languages=languages, compute_units=compute_units)(Samples(clips))
    references = [clip.text for clip in clips]
    counts = word_counts(references, texts, normalizer, languages)
    rows = [
        {"audio": str(clip.audio), "lang": clip.lang, "reference": clip.text, "text": text, **row}
        for clip, text, row in zip(clips, texts, counts, strict=True)
    ]
    return Evaluation(score(references, texts, normalizer, languages), rows)


def transcriber(
    source: str,
    threads: int | None = None,
    languages: Sequence[str] | None = None,
    compute_units: str | None = None,
) -> Callable[[Sequence[np.ndarray]], list[str]]:
    """Return a function from 16 kHz clips to their texts, by a checkpoint or an artifact.

    `languages` are the languages of the clips. Each one prompts the model for its clip if the model
    knows it.
    """
    if is_artifact(source):
        recognizer = open_artifact(source, threads, compute_units)

        def by_artifact(pcms: Sequence[np.ndarray]) -> list[str]:
            codes = [None] * len(pcms) if languages is None else map(language_code, languages)
            texts: list[str] = []
            with progress_bar(len(pcms), "clips") as show:
                for pcm, code in zip(pcms, codes, strict=True):
                    language = recognizer.known(code)
                    texts.append(recognizer.transcribe(pcm, language=language).text)
                    show(len(texts), "")
            return texts

        return by_artifact
    refuse_compute_units(source, compute_units)
    model, processor = whisper.load(source), whisper.load_processor(source)

    def by_checkpoint(pcms: Sequence[np.ndarray]) -> list[str]:
        with progress_bar(len(pcms), "clips") as show:
            return decoding.transcribe(
                model, processor, pcms, languages, done=lambda clips: show(clips, "")
            )

    return by_checkpoint


def refuse_options(source: str, generation: Any, options: dict[str, Any]) -> None:
    """Raise Problem for options that a checkpoint does not take.

    A checkpoint takes a language, and no other task than `transcribe`.
    """
    from devices.runner.decode.options import Options

    task = options.get("task") or "transcribe"
    if task not in TASKS:
        raise Problem(f"unknown task {task!r}", hint="choose transcribe or translate")
    if task != "transcribe" and not is_multilingual(generation):
        raise Problem(
            f"--task {task}: {source} knows English only",
            hint="leave it out, or use a multilingual model",
        )
    given = [f.name for f in fields(Options) if options.get(f.name, f.default) != f.default]
    allowed = {"language"} | ({"task"} if task == "transcribe" else set())
    if wrong := [name for name in given if name not in allowed]:
        raise Problem(
            f"{source} is a checkpoint, and {' and '.join(wrong)} are for artifacts",
            hint="export it with `edgewhisper export`, and transcribe with the artifact",
        )


def refuse_files_and_jobs(
    source: str, formats: Sequence[str], jobs: int, live: bool = False
) -> None:
    """Raise Problem for outputs with times, several files at once and live transcription, which a
    checkpoint does not support, and if there is no such checkpoint."""
    from devices.runner.writers import TIMED
    from edgewhisper.checkpoints.huggingface import refuse_missing, resolved

    asked = [f"--output {name}" for name in formats if name in TIMED]
    asked += [f"--jobs {jobs}"] * (jobs > 1) + ["--live"] * live
    if asked:
        if not Path(source).is_file():
            refuse_missing(resolved(source))
        raise Problem(
            f"{source} is a checkpoint, and {asked[0]} is for artifacts",
            hint="export it with `edgewhisper export`, and transcribe with the artifact",
        )


def known_language(generation: Any, language: str | None) -> str | None:
    """Return the code of a language that the checkpoint knows.

    Returns None for None, where the checkpoint uses its own language, and for AUTO, where its own
    language is removed. Raises Problem if the checkpoint does not know the language.
    """
    code = None if language is None else language_code(language)
    if not is_multilingual(generation):
        refuse_other_than_english(code)
        return None
    if code == AUTO:
        generation.language = generation.forced_decoder_ids = None
        return None
    if code is not None:
        refuse_without_token(generation, code)
    return code


def is_artifact(source: str) -> bool:
    """Return whether `source` is a directory written by `export`."""
    return (Path(source) / MANIFEST).exists()


def open_artifact(
    source: str, threads: int | None = None, compute_units: str | None = None
) -> Recognizer:
    """Return the runner for an artifact, after checking its files.

    Without Core ML, its packages run in EdgeWhisper's interpreter, with a warning.
    """
    from benchmarks.reference_runtimes import has_core_ml, recognizer

    opened = recognizer(Path(source), threads, compute_units=compute_units)
    if opened.manifest.get("layout") in layouts_of("coreml") and not has_core_ml():
        warnings.warn(
            f"{source} runs in EdgeWhisper's interpreter of Core ML packages, because Core ML "
            "exists on Apple's systems only: the text is valid, the speed is not",
            stacklevel=2,
        )
    return opened


def refuse_compute_units(source: str, compute_units: str | None) -> None:
    """Raise Problem if compute units are given for a checkpoint."""
    if compute_units is not None:
        raise Problem(
            f"{source} is a checkpoint, and compute units {compute_units!r} are for Core ML",
            hint="export it with `--target coreml`, and use the artifact",
        )
