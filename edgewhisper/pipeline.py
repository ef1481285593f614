"""The road, in one screen a stage: compress makes a checkpoint, export an artifact, bench results.

Every function takes plain values, writes whole directories or nothing, and raises Problem.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from hashlib import sha256
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.metadata import clips_hash
from benchmarks.normalizers import name_for
from benchmarks.normalizers import normalizer as normalizer_named
from benchmarks.speech.clips import Clip, Samples, read_manifest
from benchmarks.wer import Score, score, word_counts
from devices.runner.engines.contract import LAYOUTS as RUNNERS_OWN
from edgewhisper import alignment, decoding, runs, whisper
from edgewhisper.card import card_of
from edgewhisper.checkpoints.openai import ENGLISH
from edgewhisper.compress import METHODS
from edgewhisper.compress.order import refuse_quantised
from edgewhisper.compress.shrink import slimmed
from edgewhisper.compress.work import Work
from edgewhisper.guard import Guard, Loss, TooMuchLost, likely_cause, trainings_of
from edgewhisper.languages import (
    refuse_other_than_english,
    refuse_without_token,
    set_language,
    set_prompt,
)
from edgewhisper.progress import progress_bar
from edgewhisper.recipe import Recipe, load_recipe
from export.artifact import MANIFEST, PACKAGED, write_manifest
from export.artifact import read_manifest as read_artifact
from export.cost import count_parameters, macs, macs_by_window
from export.files import new_directory
from export.problem import Problem
from export.prompt import AUTO, is_multilingual, language_code, prompt_ids
from export.quantise import is_quantised
from export.versions import versions

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from benchmarks.bench import Candidate, Measuring
    from benchmarks.gate import Parts
    from devices.device import Place
    from devices.runner.decode.listen import Segment
    from devices.runner.recognizer import Recognizer

ASSETS = Path(__file__).parent / "assets"
DEFAULT_MODEL = ASSETS / "whisper-digits"
SPEECH = ASSETS / "speech"
COMMON_VOICE = ASSETS / "common-voice"
BY_CLIP = tuple(RUNNERS_OWN.values())
"""Layouts that prompt each clip for its own language; others have one fixed prompt."""
ONE_WINDOW = ("transformers", "sherpa", "whisperkit", "encoder")
"""Layouts of runtimes that give every clip the same window."""
DEFAULTS = {"onnx": ("int8", "native"), "coreml": ("fp16", "whisperkit")}
"""Target -> precision and layout where none is named."""
DEV_SHARE = 10
"""Every tenth clip is held out for choosing thresholds where no dev manifest is given."""

Say = Callable[[str], None]


SHIPPED = (
    "60 + 60 English clips of Mozilla Common Voice (CC0 1.0) that come with EdgeWhisper, "
    "edgewhisper/assets/common-voice"
)
OWN_WORDS = "the model's own transcripts, or the reference where they differ much"
AGREES = 0.3
"""WER up to which a transcript is the better text to train on than the reference."""


@dataclass(frozen=True)
class Speech:
    """Clips to train on, and clips to choose thresholds on."""

    train: list[Clip]
    dev: list[Clip]
    source: str | None = None
    """Said in the model card, where the clips are EdgeWhisper's own."""


# --------------------------------------------------------------------------------- compress


def compress(
    model: str | None = None,
    recipe: str | None = None,
    speech: Path | None = None,
    dev: Path | None = None,
    out: Path | None = None,
    seed: int = 0,
    revision: str | None = None,
    say: Say = print,
    language: str | None = None,
    allow_loss: bool = False,
) -> Path:
    """Run a recipe on a checkpoint; return the directory of the smaller one.

    Raises TooMuchLost where a step, or the whole recipe, costs more dev WER than the recipe's
    `max_wer_loss`: the checkpoint is then written under a name that says so. `allow_loss` goes on.

    Without one it is `lite`, which trains nothing; for the embedded model `quick`, some minutes'
    work on the speech that comes with it, or on your own speech `digits-tspar`. `language` prompts
    the model for speech in a language that it has no token for.
    """
    found = recipe_for(model, recipe, speech)
    job = prepare(found, model, speech, dev, out, seed, revision, language=language)
    for line in (*job.notes, f"{job.source}: {describe(job.before)}"):
        say(line)
    place = out or runs.new_path("checkpoint", f"-{job.recipe.name}")
    guard = Guard(job.recipe.max_wer_loss, allow_loss)
    try:
        # a copy: methods train in place, and later steps still want the original
        made = run_steps(copy.deepcopy(job.dense), job.recipe, job.work, say, guard=guard)
    except TooMuchLost as lost:
        raise keep_failed(job, guard, lost, place) from None
    slim, after = finish(made, job.work)
    say(f"compressed: {describe(after)}")
    if runs.main_process():
        record = record_of(job, job.work, after) | {"dev_wer": guard.as_dict()}
        whisper.save(slim, job.work.processor, place, record, card_of(record))
        shutil.rmtree(job.work.run_dir, ignore_errors=True)
    return place


def keep_failed(job: Job, guard: Guard, lost: TooMuchLost, place: Path) -> TooMuchLost:
    """Write the checkpoint that lost too much beside `place` -> the error that says where."""
    named = place.with_name(place.name + lost.suffix)
    for number in count(2):
        if not named.exists():
            break
        named = place.with_name(f"{place.name}{lost.suffix}-{number}")
    if runs.main_process():
        slim, after = finish(lost.model, job.work)
        record = record_of(job, job.work, after) | {"dev_wer": guard.as_dict()}
        whisper.save(slim, job.work.processor, named, record, card_of(record))
    return TooMuchLost(
        f"{lost}; the checkpoint is in {named}",
        f"{lost.hint}; or add --allow-loss to accept it",
        lost.loss,
        lost.model,
    )


def recipe_for(model: str | None, recipe: str | None, speech: Path | None) -> Recipe:
    """The recipe that is named; otherwise the safest one: `lite`, which trains nothing."""
    if recipe is None and Path(model or DEFAULT_MODEL) == DEFAULT_MODEL:
        recipe = "quick" if speech is None else "digits-tspar"
    return load_recipe(recipe or "lite")


@dataclass(frozen=True)
class Job:
    """A checkpoint to be compressed, by what, with what, and what it is before."""

    source: str
    recipe: Recipe
    dense: WhisperForConditionalGeneration
    work: Work
    before: dict[str, Any]
    speech: dict[str, str | None] = field(default_factory=dict)
    """Where the clips and their texts are from, where that is not the user's manifest."""

    @property
    def notes(self) -> list[str]:
        """What the user should know before the first step."""
        if not self.speech.get("source"):
            return []
        notes = [f"no --speech is given, so it learns from {self.speech['source']}"]
        if is_multilingual(self.dense.generation_config):
            notes.append(
                "note: these clips are English, so the error rates say nothing of other languages; "
                "name speech in yours with --speech"
            )
        return notes


def prepare(
    recipe: Recipe,
    model: str | None,
    speech: Path | None,
    dev: Path | None,
    out: Path | None,
    seed: int,
    revision: str | None,
    purpose: str = "",
    language: str | None = None,
) -> Job:
    """Everything is read and checked before the first step, the place of the output as well."""
    source = model or str(DEFAULT_MODEL)
    if out is not None and out.exists():
        raise Problem(f"{out} exists already", hint="name another --out, or remove it first")
    dense = whisper.load(source, revision)
    clips = choose_speech(source, speech, dev, dense.config.vocab_size >= ENGLISH)
    if clips.source is None or language is not None:
        set_language(dense.generation_config, clips.train, clips.dev, language)
    for step in recipe.steps:
        refuse_quantised(dense, step.method, step.options)
    processor = whisper.load_processor(source, revision)
    learns = clips.source is not None and trains(recipe)
    work = Work(
        processor=processor,
        train=in_own_words(dense, processor, clips.train) if learns else clips.train,
        dev=clips.dev,
        run_dir=_run_dir(recipe, source, clips, seed, language, purpose),
        seed=seed,
        original=dense,
        timed=alignment.reference(dense, processor, clips.dev),
    )
    told = {"source": clips.source, "texts": OWN_WORDS if learns else None}
    return Job(source, recipe, dense, work, measure(dense, work), told)


def trains(recipe: Recipe) -> bool:
    return any(True for step in recipe.steps for _ in trainings_of(step.options))


def in_own_words(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, clips: Sequence[Clip]
) -> list[Clip]:
    """The clips with the model's own transcripts where these hardly differ from the texts.

    The texts of Common Voice lack case and punctuation; a model that was trained on them would
    lose both. Distil-Whisper (arXiv:2311.00430) trains on transcripts for the same reason.
    """
    with progress_bar(len(clips), None, runs.main_process(), "transcripts to train on") as show:
        texts = decoding.transcribe(
            model,
            processor,
            Samples(clips),
            [clip.lang for clip in clips],
            max_tokens=4 * max(len(clip.text.split()) for clip in clips),
            done=lambda finished: show(finished, ""),
        )
    return [
        replace(clip, text=text) if text and agrees(clip, text) else clip
        for clip, text in zip(clips, texts, strict=True)
    ]


def agrees(clip: Clip, text: str) -> bool:
    return bool(clip.text.strip()) and score([clip.text], [text]).wer <= AGREES


def run_steps(
    model: WhisperForConditionalGeneration,
    recipe: Recipe,
    work: Work,
    say: Say,
    first: int = 0,
    last: int | None = None,
    guard: Guard | None = None,
) -> WhisperForConditionalGeneration:
    """Each step of the recipe in turn; a step gets the model that the one before returned.

    A method that comes twice has state and records of its own each time. `first` and `last` choose
    some of the steps, as a slice does. Raises TooMuchLost where there is a guard and a step, or all
    of them together, cost more dev WER than it allows.
    """
    start = work.wer(model) if guard else None
    for number, step in list(enumerate(recipe.steps, start=1))[first:last]:
        say(f"step {number} of {len(recipe.steps)}: {step.method}")
        before = work.wer(model) if guard else None
        own = replace(work, run_dir=work.run_dir / f"step-{number}", record={})
        model = import_module(METHODS[step.method]).apply(model, step.options, own)
        for name, told in own.record.items():
            work.record[f"{name}-{number}" if name in work.record else name] = told
        if guard and before:
            after = work.wer(model)
            cause = likely_cause(step, own.record, after.wer)
            guard.check(Loss(number, step.method, before, after), cause, model, say)
    if guard and start:
        whole = Loss(None, recipe.name, start, work.wer(model))
        guard.check(whole, "remove less or train longer in the steps that lost most", model, say)
    return model


def finish(
    model: WhisperForConditionalGeneration, work: Work
) -> tuple[WhisperForConditionalGeneration, dict[str, Any]]:
    """A compressed model as it will be saved, and what it is."""
    alignment.settle(model)
    return model, measure(model, work)


def choose_speech(
    source: str, speech: Path | None, dev: Path | None, general: bool = False
) -> Speech:
    """The user's speech; without it, for the embedded default the clips that come with it, and for
    a `general` model those of Common Voice that come with EdgeWhisper."""
    if speech is None and dev is None and Path(source) == DEFAULT_MODEL:
        speech, dev = SPEECH / "train.jsonl", SPEECH / "dev.jsonl"
    elif speech is None and general:
        judged = with_texts(dev or COMMON_VOICE / "dev.jsonl")
        return Speech(with_texts(COMMON_VOICE / "calibration.jsonl"), judged, SHIPPED)
    if speech is None:
        raise Problem(
            f"{source}: no speech to compress it with",
            hint="name a manifest with --speech; a few hours in the model's language are best",
        )
    clips = with_texts(speech)
    if dev is not None:
        return Speech(clips, with_texts(dev))
    if len(clips) < 2 * DEV_SHARE:
        raise Problem(
            f"{speech} names {len(clips)} clips: too few to hold some out for the thresholds",
            hint=f"give at least {2 * DEV_SHARE} clips, or a manifest of its own with --dev",
        )
    held = clips[::DEV_SHARE]
    return Speech([clip for clip in clips if clip not in held], held)


def with_texts(speech: Path) -> list[Clip]:
    """The clips of a manifest. Raises Problem where nothing is said in any of them."""
    clips = read_manifest(speech)
    if not any(clip.text.strip() for clip in clips):
        raise Problem(
            f"{speech}: the text of all {len(clips)} clips is empty, so there is nothing to learn",
            hint="write what is said into `text`; clips without speech may stand among others",
        )
    return clips


def measure(model: WhisperForConditionalGeneration, work: Work) -> dict[str, Any]:
    """Size, cost and dev error rate of a checkpoint, and how far off its timestamps are."""
    heads = alignment.heads_of(model)
    return {
        "parameters": count_parameters(model),
        "macs": macs(model),
        "macs_by_window": macs_by_window(model),
        "dev": work.wer(model).as_dict(),
        "timestamp_error_s": None
        if work.timed is None
        else alignment.timestamp_error_s(model, work.processor, work.timed.clips, heads),
    }


def describe(measured: dict[str, Any]) -> str:
    return (
        f"{measured['parameters']['total']:,} parameters, "
        f"{measured['dev']['wer']:.1%} WER on {measured['dev']['utterances']} dev clips"
    )


def _run_dir(
    recipe: Recipe, source: str, clips: Speech, seed: int, language: str | None, purpose: str
) -> Path:
    """Where interrupted work waits: the same command, typed again, finds it and goes on."""
    told = f"{recipe.text}\0{source}\0{clips}\0{seed}\0{language}\0{purpose}"
    return runs.RUNS / f"unfinished-{sha256(told.encode()).hexdigest()[:12]}"


def record_of(
    job: Job, work: Work, after: dict[str, Any], values: dict[str, Any] | None = None
) -> dict[str, Any]:
    """compression.json: how this checkpoint came to be. `values` are those of a search, which
    stood in the place of the recipe's own."""
    recipe = {"name": job.recipe.name, "text": job.recipe.text}
    return {
        "format": 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recipe": recipe | ({"values": values} if values else {}),
        "base": {
            "source": Path(job.source).name if Path(job.source).is_dir() else job.source,
            "revision": getattr(job.dense.config, "_commit_hash", None),
            "files": _hashes(Path(job.source)),
            "compression": whisper.compression_record(job.source),
        },
        "speech": {"train": _clips_record(work.train), "dev": _clips_record(work.dev)}
        | {name: told for name, told in job.speech.items() if told},
        "seed": work.seed,
        "language": getattr(job.dense.generation_config, "language", None),
        "versions": versions(),
        "before": job.before,
        "after": after,
        "timestamps": None
        if work.timed is None
        else {"judged_by": work.timed.source, "clips": len(work.timed.clips)},
        "steps": work.record,
    }


def _hashes(folder: Path) -> dict[str, str]:
    names = ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json")
    files = [folder / name for name in names if (folder / name).is_file()]
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in files}


def _clips_record(clips: Sequence[Clip]) -> dict[str, Any]:
    return {"clips": len(clips), "sha256": clips_hash(clips)}


# ----------------------------------------------------------------------------------- export


def export(
    checkpoint: str | None = None,
    precision: str | None = None,
    speech: Path | None = None,
    out: Path | None = None,
    say: Say = print,
    layout: str | None = None,
    target: str = "onnx",
    language: str | None = None,
    gating: Gating | None = None,
    **options: Any,
) -> Path:
    """Write an artifact from a checkpoint and compare its text with the checkpoint's; return its
    directory.

    What was pruned is removed first, physically and exactly. Nothing is left behind when the gate
    fails, unless `gating` says otherwise. Layouts whose runtimes know one window are made, and
    judged, with the full one, or with the `window` of so many seconds. `options` are those of
    export_coreml, and for ONNX `runtime`, the oldest onnxruntime that is to run the artifact.
    `language` is in the artifact's prompt where its user asks for no other.
    """
    from edgewhisper.coreml import chosen
    from export.coreml.to_coreml import export_coreml
    from export.onnx.to_onnx import export_onnx

    source = checkpoint or str(runs.newest("checkpoint") or DEFAULT_MODEL)
    listed = None if speech is None else read_manifest(speech)
    usual_precision, usual_layout = DEFAULTS[target]
    precision, layout = precision or usual_precision, layout or usual_layout
    model, processor, note = load_for(layout, source, options.get("window"), language)
    if note is not None:
        say(f"note: {note}")
    listed = listed or read_manifest(default_speech(model.config.vocab_size))
    names = {"native": "", "whisperkit": "coreml-", "encoder": "coreml-encoder-"}
    kind = names.get(layout, f"{layout}-") + precision
    place = out or runs.new_path("artifact", f"-{kind}")
    with new_directory(place) as folder:
        say(f"{source} -> {place} ({kind})")
        rest = (model, processor, folder, precision, whisper.compression_record(source), layout)
        if target == "coreml":
            manifest = export_coreml(*rest, **options)
            for line in chosen(manifest, options):
                say(line)
        else:
            manifest = export_onnx(*rest, **options)
            if has_float_cache(manifest):
                oldest = manifest["runtime"]["onnxruntime"]
                say(
                    f"note: for onnxruntime {oldest} the encoder's keys and values are float32, "
                    "four times as large as in int8"
                )
        manifest["gate"] = gated(
            folder, manifest, model, processor, listed, gating or Gating(), say
        )
        write_manifest(folder, manifest)
    return place


def has_float_cache(manifest: dict[str, Any]) -> bool:
    """Whether an int8 or int4 artifact keeps floats where int8 would do, for an older runtime."""
    inputs = manifest["contract"].get("decoder", {}).get("inputs", [])
    caches = [spec["dtype"] for spec in inputs if spec["name"] == "cross.0.key"]
    return manifest["precision"] in ("int8", "int4") and caches == ["float32"]


def load_for(
    layout: str, source: str, window_s: float | None = None, language: str | None = None
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor, str | None]:
    """A checkpoint as it is exported in a layout, and a note on its prompt if there is one; where
    the layout has one window only, with that of so many seconds."""
    model, processor = whisper.load(source), whisper.load_processor(source)
    note = set_prompt(model.generation_config, language, layout not in BY_CLIP)
    if not is_quantised(model):  # removal would move weights to other blocks: it came first
        model, _ = slimmed(model)
    if layout in ONE_WINDOW:
        whisper.forget_short_windows(model, window_s)
    return model, processor, note


# ------------------------------------------------------------------------------------- gate


@dataclass(frozen=True)
class Gating:
    """How an export is compared with its checkpoint."""

    mode: str = "fail"
    """fail: a failure ends the export; warn: it is recorded in the manifest; off: there is no
    comparison."""
    most_clips: int | None = None
    """At most so many clips, evenly spread over the speech; None: benchmarks.gate.MOST_CLIPS."""


def gated(
    folder: Path,
    manifest: dict[str, Any],
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Sequence[Clip],
    gating: Gating,
    say: Say,
) -> dict[str, Any]:
    """The manifest's record of the gate. Raises GateFailure as `gating` says."""
    from benchmarks.gate import FAILED, MOST_CLIPS, NOT_RUN, PASSED, GateFailure, compared, evenly
    from devices.runner.engines.sessions import saturates

    if gating.mode == "off":
        say("the gate was not run (--gate off)")
        return {"result": NOT_RUN}
    chosen = evenly(clips, gating.most_clips or MOST_CLIPS)
    known = {"clips": len(chosen), "clips_available": len(clips)}
    started = time.monotonic()
    try:
        figures = gate(folder, manifest, model, processor, chosen)
    except GateFailure as failure:
        # only the native layout asks for exact products: devices/runner/engines/sessions.py
        stock = manifest.get("target", "onnx") == "onnx" and manifest.get("layout") != "native"
        if manifest["precision"] == "int8" and stock and saturates():
            failure.hint = f"{SATURATES}; {failure.hint}"
        if gating.mode != "warn":
            raise
        say(f"gate FAILED, and the artifact is kept (--gate warn): {failure}\n{failure.hint}")
        return known | (failure.figures or {}) | {"result": FAILED, "error": str(failure)}
    say(
        f"gate passed on {len(chosen)} of {len(clips)} clips: {figures['identical_tokens']:.0%} of "
        f"them with identical tokens; {compared(figures)}; normalizer {figures['normalizer']}; "
        f"{time.monotonic() - started:.0f} s"
    )
    return known | figures | {"result": PASSED}


def gate(
    folder: Path,
    manifest: dict[str, Any],
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Sequence[Clip],
) -> dict[str, Any]:
    """The gate's figures of an artifact against its checkpoint, see benchmarks/gate.py."""
    from benchmarks.gate import bounds_for, checkpoint_tokens, judge, refuse_foreign, with_states
    from benchmarks.reference_runtimes import open_artifact
    from devices.runner.decode.text import join
    from edgewhisper.coreml import OwnDecoder

    layout = manifest.get("layout", "native")
    languages = [language_code(clip.lang) if layout in BY_CLIP else None for clip in clips]
    window_samples = manifest["audio"]["window_samples"]

    def tokens(pcms: Sequence[np.ndarray], spoken: Sequence[str | None]) -> list[list[int]]:
        return decoding.greedy(model, processor, pcms, spoken)

    with progress_bar(len(clips), None, runs.main_process(), "gate: checkpoint") as progress:
        reference = checkpoint_tokens(tokens, clips, window_samples, languages, progress)
    decode = partial(processor.tokenizer.batch_decode, skip_special_tokens=True)
    refuse_foreign(clips, [join([text.strip() for text in decode(clip)]) for clip in reference])
    own = layout == "encoder"
    hearing = OwnDecoder(folder, manifest, model, processor) if own else open_artifact(folder)
    bounds = bounds_for(manifest.get("target", "onnx"), manifest["precision"])
    parts = torch_parts(model, processor, manifest)
    with progress_bar(len(clips), None, runs.main_process(), "gate: artifact") as progress:
        figures = judge(hearing, reference, clips, bounds, parts, languages, progress)
    if isinstance(hearing, OwnDecoder):
        return with_states(figures, hearing.encoder, clips)
    return figures


SATURATES = (
    "onnxruntime's int8 products saturate on this processor (x86 without VNNI) and lose "
    "accuracy that they keep on ARM and newer x86 processors: export there, or take --layout "
    "native, whose products are exact everywhere"
)


def default_speech(vocabulary: int) -> Path:
    """The clips that come with EdgeWhisper for models of so many tokens: spoken digits for the
    embedded model and what was made of it, English sentences for every other one."""
    return (SPEECH if vocabulary == vocabulary_of(DEFAULT_MODEL) else COMMON_VOICE) / "test.jsonl"


def vocabulary_of(folder: Path) -> int | None:
    """How many tokens a checkpoint or an artifact has, by its config.json."""
    return (_config(folder) or {}).get("vocab_size")


def speech_for(folders: Iterable[Path]) -> Path:
    """The clips for several models. Raises Problem where they need different ones."""
    found = {folder: vocabulary_of(folder) for folder in folders}
    places = {folder: default_speech(size) for folder, size in found.items() if size is not None}
    if len(set(places.values())) > 1:
        listed = ", ".join(f"{folder}: {place.parent.name}" for folder, place in places.items())
        raise Problem(
            f"no clips are named, and the models would need different ones ({listed})",
            hint="name clips for all of them with --speech",
        )
    return next(iter(places.values()), SPEECH / "test.jsonl")


def torch_parts(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, manifest: dict[str, Any]
) -> Parts:
    """The checkpoint's parts along tokens; logits before each of them and after the last."""
    from edgewhisper.coreml import packed_caches

    packed = packed_caches(model, manifest)

    def parts(
        pcm: np.ndarray, tokens: list[int], language: str | None = None
    ) -> dict[str, np.ndarray]:
        prompt = prompt_ids(model.generation_config, language)
        found = decoding.parts(model, processor, pcm, [*prompt, *tokens])
        return found | {"logits": found["logits"][len(prompt) - 1 :]} | packed(found)

    return parts


# ------------------------------------------------------------------------------------ bench


class Benched(NamedTuple):
    """What a bench gave."""

    results: list[dict[str, Any]]
    path: Path
    """Of the file that holds them."""
    failed: Sequence[Exception]
    """The letters of devices that gave none."""


def bench(
    artifacts: Sequence[Path],
    places: Sequence[Place] | None = None,
    speech: Path | None = None,
    baseline: str | None = None,
    how: Measuring | None = None,
    say: Say = print,
    rivals: Sequence[str] = (),
) -> Benched:
    """Measure artifacts on devices, by default on this machine, and beside them a dense checkpoint
    in rivals: `baseline`, in transformers where none is named."""
    from benchmarks.bench import Candidate
    from benchmarks.candidates import in_own_form
    from benchmarks.reference_runtimes import has_core_ml
    from devices.device import Place, load_profile

    where = [Place()] if places is None else places
    apple = all(
        has_core_ml() if name == "local" else load_profile(name).model.startswith("Apple")
        for name, _ in where
    )
    newest = runs.newest("artifact", without="" if apple else "-coreml-")
    chosen = list(artifacts) or [newest or export(say=say)]
    candidates = [Candidate(Path(artifact)) for artifact in chosen]
    if baseline is None and not rivals:
        return bench_candidates(candidates, where, speech, how, say)
    with tempfile.TemporaryDirectory() as folder:
        dense = whisper.as_directory(baseline or embedded_of(chosen), Path(folder) / "baseline")
        names = dict.fromkeys(rivals or ("transformers",))
        beside = [in_own_form(Candidate(dense, name), Path(folder), say) for name in names]
        return bench_candidates([*beside, *candidates], where, speech, how, say)


def embedded_of(artifacts: Sequence[Path]) -> Path:
    """The embedded model, if the artifacts are made of it; else the letter that asks which one."""
    for artifact in artifacts:
        if not is_of_embedded(Path(artifact)):
            raise Problem(
                f"--rival: nothing in {artifact} says that it is made of the embedded model, and "
                "the rivals need the dense checkpoint that it is made of",
                hint="add --baseline and that checkpoint's directory",
            )
    return DEFAULT_MODEL


def is_of_embedded(artifact: Path) -> bool:
    """By the hashes of the first checkpoint in its record; without any record by its config."""
    if record := read_artifact(artifact).get("provenance"):
        return _first_files(record) == _hashes(DEFAULT_MODEL)
    return _config(artifact) == _config(DEFAULT_MODEL)


def _first_files(record: Any) -> Any:
    """The hashes of the checkpoint that a compression, and those before it, began with."""
    match record:
        case {"base": {"compression": {"base": _} as earlier}}:
            return _first_files(earlier)
        case {"base": {"files": files}}:
            return files
    return None


def _config(folder: Path) -> Any:
    """What the model is, without the version that wrote it; nothing where that cannot be read."""
    with suppress(OSError, ValueError, AttributeError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return {key: config[key] for key in config.keys() - {"transformers_version"}}
    return None


def bench_candidates(
    candidates: Sequence[Candidate],
    places: Sequence[Place],
    speech: Path | None,
    how: Measuring | None,
    say: Say,
) -> Benched:
    """Measure on devices and keep the results in ./edgewhisper-runs.

    Raises the letter of the first device that failed where none gave a result.
    """
    from benchmarks.bench import Measuring
    from benchmarks.result import write
    from benchmarks.side_by_side import bench_places

    sources = [Path(candidate.source) for candidate in candidates]
    clips = read_manifest(speech or speech_for(sources))
    results, failed = bench_places(candidates, places, clips, how or Measuring(), say)
    if not results:
        raise failed[0]
    path = runs.new_path("result", ".jsonl")
    write(results, path)
    _correct_tables({Path(candidate.source).parent for candidate in candidates}, say)
    return Benched(results, path, failed)


def _correct_tables(folders: set[Path], say: Say) -> None:
    """Correct the latency tables that there are by all results in ./edgewhisper-runs."""
    from benchmarks import latency
    from benchmarks.result import read

    if not latency.table_paths():
        return
    lines = []
    for path in sorted(runs.RUNS.glob("result-*.jsonl")):
        with suppress(Problem):
            lines += read(path)
    for table in latency.learn(lines, {runs.RUNS, Path(), *folders}):
        say(f"the latency table of {table} is corrected by what was measured")


def report(results: Sequence[Path], out: Path, plots_dir: Path | None = None) -> None:
    """One page about the results of some files; without any, of the newest. Its plots are written
    into a folder as well, if one is named."""
    from benchmarks.report import write_report
    from benchmarks.result import read

    newest = runs.newest("result")
    files = list(results) or ([newest] if newest else [])
    if not files:
        raise Problem("there are no results yet", hint="run `edgewhisper bench` first")
    write_report([result for path in files for result in read(path)], out, plots_dir)


def calibrate(
    place: Place,
    precision: str | None = None,
    threads: int | None = None,
    results: Sequence[Path] | None = None,
    say: Say = print,
) -> tuple[list[dict[str, str]], str]:
    """Measure a device's latency table, correct it by results of bench and keep it; with `results`,
    correct by these the table that is there. Returns its rows, and a sentence about it.

    Artifacts are looked for in ./edgewhisper-runs, here, and beside the results.
    """
    from benchmarks import calibrate_latency, latency
    from benchmarks.result import read

    files = results or sorted(runs.RUNS.glob("result-*.jsonl"))
    lines = [result for path in files for result in read(path)]  # damage is said before minutes go
    folders = {runs.RUNS, Path(), *(Path(path).parent for path in files)}
    if results:
        table = latency.find_table(place.device, precision, threads)
    else:
        table = calibrate_latency.calibrate(place, precision, threads, say)
    corrected = latency.correct(table, lines, latency.artifacts_in(folders))
    if results and corrected is table:
        raise Problem(
            f"none of {len(lines)} results is of {table}, and of an artifact that lies beside it, "
            "in ./edgewhisper-runs or here",
            hint="bench an artifact of one window there, with the same --threads",
        )
    path = latency.write(corrected)
    return latency.rows_of(corrected), f"{latency.told(corrected)}; wrote {path}"


DEMO_MODEL = "tiny.en"
EMBEDDED = "digits"
"""What the embedded model is called where a size name may stand."""


def demo(model: str | None = None, say: Say = print) -> Benched:
    """Compress, export to INT8 and bench, beside the dense checkpoint in transformers.

    `model` is "digits" for the embedded model, or any MODEL; by default OpenAI's tiny.en, and where
    that can be had neither from the hub nor from its package, the embedded model.
    """
    from benchmarks.bench import Candidate, Measuring
    from devices.device import Place

    source = demo_source(model, say)
    embedded = source == str(DEFAULT_MODEL)
    name = EMBEDDED if embedded else Path(source).name
    made, form = demo_checkpoint(source, say)
    small = export(made, say=say)
    with tempfile.TemporaryDirectory() as folder:
        dense = whisper.as_directory(source, Path(folder))
        candidates = [
            Candidate(dense, rival="transformers", name=f"{name}: torch fp32"),
            Candidate(small, name=f"{name}{form}: ONNX int8"),
        ]
        if embedded:
            candidates.insert(1, Candidate(export(source, say=say), name=f"{name}: ONNX int8"))
        rounds = Measuring(repeats=3 if embedded else 2)  # a round of tiny.en takes a minute
        return bench_candidates(candidates, [Place()], None, rounds, say)


def demo_checkpoint(source: str, say: Say) -> tuple[str, str]:
    """The compressed checkpoint and what its name adds; where compression loses too much, which is
    said, the dense one."""
    try:
        return str(compress(source, say=say)), " compressed"
    except TooMuchLost as lost:
        say(f"note: {lost}; the demo goes on with the dense model")
        return source, ""


def demo_source(model: str | None, say: Say) -> str:
    """The MODEL of the demo."""
    from edgewhisper.checkpoints.fetch import hub_or_pinned

    if model == EMBEDDED:
        return str(DEFAULT_MODEL)
    if model is not None:
        return model
    try:
        return hub_or_pinned(DEMO_MODEL, say)
    except Problem as problem:
        say(f"note: Whisper {DEMO_MODEL} cannot be fetched ({problem})")
        say("note: the demo goes on with the embedded digits model, which needs no network")
        return str(DEFAULT_MODEL)


# -------------------------------------------------------------------- transcribe and evaluate


def transcriber(
    source: str,
    threads: int | None = None,
    languages: Sequence[str] | None = None,
    compute_units: str | None = None,
) -> Callable[[Sequence[np.ndarray]], list[str]]:
    """Text of 16 kHz clips by a checkpoint or by an artifact, whichever `source` is.

    `languages` are the clips' own, where they are known: each prompts for its clip where the model
    can be told of it.
    """
    if is_artifact(source):
        recognizer = open_artifact(source, threads, compute_units)

        def by_artifact(pcms: Sequence[np.ndarray]) -> list[str]:
            spoken = [None] * len(pcms) if languages is None else map(language_code, languages)
            texts: list[str] = []
            with progress_bar(len(pcms), None, runs.main_process(), "clips") as show:
                for pcm, code in zip(pcms, spoken, strict=True):
                    language = recognizer.known(code)
                    texts.append(recognizer.transcribe(pcm, language=language).text)
                    show(len(texts), "")
            return texts

        return by_artifact
    refuse_compute_units(source, compute_units)
    model, processor = whisper.load(source), whisper.load_processor(source)

    def by_checkpoint(pcms: Sequence[np.ndarray]) -> list[str]:
        with progress_bar(len(pcms), None, runs.main_process(), "clips") as show:
            return decoding.transcribe(
                model, processor, pcms, languages, done=lambda clips: show(clips, "")
            )

    return by_checkpoint


def transcribe(
    source: str,
    pcms: Iterable[np.ndarray],
    threads: int | None = None,
    said: Callable[[int, Segment], None] = lambda number, segment: None,
    compute_units: str | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """What is said in 16 kHz recordings, one after the other: text, and by an artifact language and
    segments as well. `said` hears each segment with its recording's number, as soon as it is there.

    `options` are the runner's (devices/runner/decode/listen.py); a checkpoint takes the language
    only.
    """
    if not is_artifact(source):
        refuse_compute_units(source, compute_units)
        model, processor = whisper.load(source), whisper.load_processor(source)
        refuse_options(source, model.generation_config, options)
        language = known_language(model.generation_config, options.get("language"))
        for pcm in pcms:
            (code,) = decoding.prompt_languages(model, processor, [pcm], [language])
            text = decoding.transcribe(model, processor, [pcm], [code])[0]
            yield {"text": text, "language": code}
        return
    from devices.runner.recognizer import Transcript

    recognizer = open_artifact(source, threads, compute_units)
    for number, pcm in enumerate(pcms):
        transcript = Transcript()
        for segment in recognizer.stream(pcm, transcript, **options):
            said(number, segment)
        yield transcript.as_dict()


def refuse_options(source: str, generation: Any, options: dict[str, Any]) -> None:
    """Raise Problem for options of artifacts; a checkpoint takes a language, and no other task than
    `transcribe`."""
    from devices.runner.decode.listen import Options

    task = options.get("task") or "transcribe"
    if task != "transcribe" and not is_multilingual(generation):
        raise Problem(
            f"--task {task}: {source} knows English only",
            hint="leave it out, or name a multilingual model",
        )
    names = [f.name for f in fields(Options) if options.get(f.name, f.default) != f.default]
    allowed = {"language"} | ({"task"} if task == "transcribe" else set())
    if wrong := [name for name in names if name not in allowed]:
        raise Problem(
            f"{source} is a checkpoint, and {' and '.join(wrong)} are for artifacts",
            hint="make an artifact of it with `edgewhisper export`, and transcribe by that",
        )


def known_language(generation: Any, asked: str | None) -> str | None:
    """The code of a language that a checkpoint knows. For AUTO and None it is None: it names none
    any more, or uses its own. Raises Problem where it does not know the language."""
    code = None if asked is None else language_code(asked)
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
    return (Path(source) / MANIFEST).exists()


def open_artifact(
    source: str, threads: int | None = None, compute_units: str | None = None
) -> Recognizer:
    """The runner over an artifact whose files are whole; Core ML packages run in the interpreter
    where there is no Core ML, which is said."""
    from benchmarks.reference_runtimes import has_core_ml, recognizer

    opened = recognizer(Path(source), threads, compute_units=compute_units)
    if opened.manifest.get("layout") in PACKAGED and not has_core_ml():
        warnings.warn(
            f"{source} is run by EdgeWhisper's interpreter of Core ML packages, for Core ML itself "
            "is on Apple's systems only: what it says is checked so, how fast it is is not",
            stacklevel=2,
        )
    return opened


def refuse_compute_units(source: str, compute_units: str | None) -> None:
    if compute_units is not None:
        raise Problem(
            f"{source} is a checkpoint, and compute units {compute_units!r} are Core ML's",
            hint="export it with `--target coreml`, and name the artifact",
        )


class Evaluation(NamedTuple):
    """The error rates of a model on some clips, and what it wrote for each."""

    score: Score
    clips: list[dict[str, Any]]
    """For each clip: audio, lang, reference, text, and the word counts of `score`."""


def evaluate(
    source: str,
    speech: Path,
    normalizer: str | None = None,
    compute_units: str | None = None,
) -> Evaluation:
    """Error rates of a checkpoint or an artifact on a manifest's clips; the normalizer is by
    default the one for their language."""
    clips = read_manifest(speech)
    normalizer = normalizer or name_for(clips)
    normalizer_named(normalizer)  # an unknown one is said now, not after the transcription
    languages = [clip.lang for clip in clips]
    transcribed = transcriber(source, languages=languages, compute_units=compute_units)
    texts = transcribed(Samples(clips))
    references = [clip.text for clip in clips]
    counts = word_counts(references, texts, normalizer, languages)
    rows = [
        {"audio": str(clip.audio), "lang": clip.lang, "reference": clip.text, "text": text, **row}
        for clip, text, row in zip(clips, texts, counts, strict=True)
    ]
    return Evaluation(score(references, texts, normalizer, languages), rows)
