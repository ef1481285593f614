"""The three stages: compress makes a checkpoint, export an artifact, bench results.

Each function writes a whole directory or nothing, and raises Problem with a hint for the user. See
job.py for the steps of `compress`, gating.py for the gate of `export`, and transcription.py for
transcribe and eval.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.speech.clips import read_manifest
from edgewhisper import runs, whisper
from edgewhisper.card import card_of
from edgewhisper.compress.shrink import slimmed
from edgewhisper.gating import BY_CLIP, Gating, gated
from edgewhisper.guard import AccuracyLoss, Guard
from edgewhisper.job import Job, Request, Say, describe, finish, prepare, recipe_for, run_steps
from edgewhisper.languages import set_prompt
from edgewhisper.provenance import embedded_of, record_of
from edgewhisper.shipped import DEFAULT_MODEL, default_artifact, default_speech, speech_for
from export.files import new_directory
from export.layouts import LAYOUTS, TARGETS
from export.problem import Problem
from export.quantise import is_quantised

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from benchmarks.bench import BenchOptions, Candidate
    from devices.device import Place

ONE_WINDOW = tuple(name for name, layout in LAYOUTS.items() if layout.one_window)
"""Layouts of runtimes that give every clip the same window."""


# --------------------------------------------------------------------------------- compress


def compress(request: Request, say: Say = print) -> Path:
    """Run a recipe on a checkpoint and return the directory of the smaller checkpoint.

    Raises AccuracyLoss if a step, or the whole recipe, costs more dev WER than the recipe's
    `max_wer_loss`; the checkpoint is then written under a name that ends in "-failed...".
    `request.allow_loss` continues instead.
    """
    job = prepare(request, recipe_for(request))
    for line in (*job.notes, f"{job.source}: {describe(job.before)}"):
        say(line)
    place = request.out or runs.new_path("checkpoint", f"-{job.recipe.name}")
    guard = Guard(job.recipe.max_wer_loss, request.allow_loss)
    try:
        # a copy: methods train in place, and later steps may need the dense model
        model = run_steps(copy.deepcopy(job.dense), job.recipe, job.context, say, guard=guard)
    except AccuracyLoss as lost:
        raise save_failed(job, guard, lost, place) from None
    after = save_checkpoint(job, guard, model, place)
    say(f"compressed: {describe(after)}")
    if runs.main_process():
        shutil.rmtree(job.context.run_dir, ignore_errors=True)
    return place


def save_checkpoint(
    job: Job, guard: Guard, model: WhisperForConditionalGeneration, place: Path
) -> dict[str, Any]:
    """Write a checkpoint with its record and model card, and return its measurements."""
    slim, after = finish(model, job.context)
    if runs.main_process():
        record = record_of(job, job.context, after) | {"dev_wer": guard.as_dict()}
        whisper.save(slim, job.context.processor, place, record, card_of(record))
    return after


def save_failed(job: Job, guard: Guard, lost: AccuracyLoss, place: Path) -> AccuracyLoss:
    """Write the checkpoint that lost too much next to `place`.

    Returns the error with the checkpoint's directory in its message.
    """
    failed = place.with_name(place.name + lost.suffix)
    for number in count(2):
        if not failed.exists():
            break
        failed = place.with_name(f"{place.name}{lost.suffix}-{number}")
    save_checkpoint(job, guard, lost.model, failed)
    return AccuracyLoss(
        f"{lost}; the checkpoint is in {failed}",
        f"{lost.hint}; or add --allow-loss to accept it",
        lost.loss,
        lost.model,
    )


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
    two_stage: bool = False,
    silence_stride: int | None = None,
    **options: Any,
) -> Path:
    """Write an artifact from a checkpoint and return its directory.

    Pruned weights are removed first. The gate then compares the artifact's text with the
    checkpoint's; if it fails, nothing is written and GateFailure is raised, unless `gating` asks
    otherwise. `language` is the artifact's default prompt. For ONNX, `two_stage` computes logits in
    two stages if they change no token (see two_stage.py), `silence_stride` is that of
    export/onnx/silence.py (None: the default of the precision), and `options` may have `runtime`,
    the oldest onnxruntime that must run the artifact. For Core ML, they are those of export_coreml.
    """
    from edgewhisper.coreml import chosen
    from edgewhisper.two_stage import moment_for
    from export.coreml.to_coreml import export_coreml
    from export.onnx.silence import default_stride
    from export.onnx.to_onnx import export_onnx

    source = checkpoint or str(runs.newest("checkpoint") or DEFAULT_MODEL)
    clips = None if speech is None else read_manifest(speech)
    precision = precision or TARGETS[target].precision
    layout = layout or TARGETS[target].layout
    model, processor, note = load_for(layout, source, options.get("window"), language)
    if note is not None:
        say(f"note: {note}")
    clips = clips or read_manifest(default_speech(model.config.vocab_size))
    kind = kind_of(layout, precision)
    place = out or runs.new_path("artifact", f"-{kind}")
    with new_directory(place) as folder:
        say(f"{source} -> {place} ({kind})")
        write: Callable[..., dict[str, Any]]
        write = export_coreml if target == "coreml" else export_onnx
        gating = gating or Gating()
        if target == "onnx":
            stride = default_stride(model, precision, layout)
            options["silence_stride"] = stride if silence_stride is None else silence_stride
        if two_stage:
            refuse_two_stages(model, precision, layout)
            trial = partial(write, model, processor, precision=precision, layout=layout, **options)
            options["moment"] = moment_for(trial, model, processor, gating.chosen(clips), say)

        def gate(manifest: dict[str, Any]) -> dict[str, Any]:
            for line in chosen(manifest, options) if target == "coreml" else onnx_notes(manifest):
                say(line)
            return gated(folder, manifest, model, processor, clips, gating, say)

        record = whisper.compression_record(source)
        write(model, processor, folder, precision, record, layout, gate=gate, **options)
    return place


def refuse_two_stages(model: WhisperForConditionalGeneration, precision: str, layout: str) -> None:
    """Raise Problem if logits in two stages cannot be faster."""
    from export.onnx.two_stage import suits

    if not suits(model, precision, layout):
        raise Problem(
            f"--two-stage: precision {precision}, layout {layout} and a vocabulary of "
            f"{model.config.vocab_size}; it needs a native int8 or int4 artifact of an "
            "English-only model, and a large token table in 8 bits that is not factorised",
            hint="leave --two-stage out",
        )


def kind_of(layout: str, precision: str) -> str:
    """Return the layout and precision as they appear in the name of a new artifact."""
    prefix = LAYOUTS[layout].prefix
    return (f"{layout}-" if prefix is None else prefix) + precision


def onnx_notes(manifest: dict[str, Any]) -> list[str]:
    """Return a note if an int8 or int4 artifact has float32 caches for an older runtime."""
    inputs = manifest["contract"].get("decoder", {}).get("inputs", [])
    caches = [spec["dtype"] for spec in inputs if spec["name"] == "cross.0.key"]
    if manifest["precision"] not in ("int8", "int4") or caches != ["float32"]:
        return []
    return [
        f"note: for onnxruntime {manifest['runtime']['onnxruntime']} the encoder's keys and values "
        "are float32, four times as large as in int8"
    ]


def load_for(
    layout: str, source: str, window_s: float | None = None, language: str | None = None
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor, str | None]:
    """Load a checkpoint for export in a layout; return model, processor and a note on its prompt.

    Pruned weights are removed. For layouts in ONE_WINDOW the model keeps one window: that of
    `window_s` seconds, or the longest.
    """
    model, processor = whisper.load(source), whisper.load_processor(source)
    note = set_prompt(model.generation_config, language, layout not in BY_CLIP)
    if not is_quantised(model):  # removal would move quantised weights to other blocks
        model, _ = slimmed(model)
    if layout in ONE_WINDOW:
        whisper.remove_short_windows(model, window_s)
    return model, processor, note


# ------------------------------------------------------------------------------------ bench


class BenchOutcome(NamedTuple):
    """The outcome of bench()."""

    results: list[dict[str, Any]]
    path: Path
    """The file with the results."""
    failed: Sequence[Exception]
    """One error for each device that gave no result."""


def bench(
    artifacts: Sequence[Path],
    places: Sequence[Place] | None = None,
    speech: Path | None = None,
    baseline: str | None = None,
    options: BenchOptions | None = None,
    say: Say = print,
    rivals: Sequence[str] = (),
) -> BenchOutcome:
    """Measure artifacts on devices. The default device is this machine.

    With `baseline` or `rivals`, also measure a dense checkpoint in each rival engine. The default
    rival is transformers; the default baseline is the embedded model.
    """
    from benchmarks.bench import Candidate
    from benchmarks.candidates import check_rival_name, in_own_form
    from benchmarks.reference_runtimes import has_core_ml
    from devices.device import Place, load_profile

    places = [Place()] if places is None else places
    apple = all(
        has_core_ml() if name == "local" else load_profile(name).model.startswith("Apple")
        for name, _ in places
    )
    chosen = list(artifacts) or [default_artifact(core_ml=apple)]
    candidates = [Candidate(Path(artifact)) for artifact in chosen]
    if baseline is None and not rivals:
        return bench_candidates(candidates, places, speech, options, say)
    for rival in rivals:
        check_rival_name(rival)
    with tempfile.TemporaryDirectory() as folder:
        dense = whisper.as_directory(baseline or embedded_of(chosen), Path(folder) / "baseline")
        names = dict.fromkeys(rivals or ("transformers",))
        dense_ones = [in_own_form(Candidate(dense, name), Path(folder), say) for name in names]
        return bench_candidates([*dense_ones, *candidates], places, speech, options, say)


def bench_candidates(
    candidates: Sequence[Candidate],
    places: Sequence[Place],
    speech: Path | None,
    options: BenchOptions | None,
    say: Say,
) -> BenchOutcome:
    """Measure candidates on devices and write the results to ./edgewhisper-runs.

    If no device gives a result, raises the error of the first one.
    """
    from benchmarks.bench import BenchOptions
    from benchmarks.result import write
    from benchmarks.side_by_side import bench_places

    sources = [Path(candidate.source) for candidate in candidates]
    clips = read_manifest(speech or speech_for(sources))
    results, failed = bench_places(candidates, places, clips, options or BenchOptions(), say)
    if not results:
        raise failed[0]
    path = runs.new_path("result", ".jsonl")
    write(results, path)
    correct_tables({source.parent for source in sources}, say)
    return BenchOutcome(results, path, failed)


def correct_tables(folders: set[Path], say: Say) -> None:
    """Correct all latency tables with the results in ./edgewhisper-runs.

    Artifacts are looked up in `folders`, ./edgewhisper-runs and the working directory.
    """
    from benchmarks import latency
    from benchmarks.result import read

    if not latency.table_paths():
        return
    results = []
    for path in sorted(runs.RUNS.glob("result-*.jsonl")):
        with suppress(Problem):
            results += read(path)
    for table in latency.learn(results, {runs.RUNS, Path(), *folders}):
        say(f"corrected the latency table of {table} with the measured results")


def report(results: Sequence[Path], out: Path, plots_dir: Path | None = None) -> None:
    """Write a page about the results in some files, by default the newest file.

    With `plots_dir`, also write the plots as PNG files.
    """
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
    """Measure the latency table of a device, correct it with results of bench, and write it.

    With `results`, correct the existing table with these and measure nothing. Artifacts are looked
    up in ./edgewhisper-runs, the working directory and the directories of the results. Returns the
    rows of the table and a sentence about it.
    """
    from benchmarks import calibrate_latency, latency
    from benchmarks.result import read

    files = results or sorted(runs.RUNS.glob("result-*.jsonl"))
    lines = [result for path in files for result in read(path)]  # raises before minutes of timing
    folders = {runs.RUNS, Path(), *(Path(path).parent for path in files)}
    if results:
        table = latency.find_table(place.device, precision, threads)
    else:
        table = calibrate_latency.calibrate(place, precision, threads, say)
    corrected = latency.correct(table, lines, latency.artifacts_in(folders))
    if results and corrected is table:
        raise Problem(
            f"none of {len(lines)} results fits the latency table of {table}: a result needs the "
            "same device, precision and threads, and its artifact next to it, in "
            "./edgewhisper-runs or here",
            hint="bench an artifact with one window on that device, with the same --threads",
        )
    path = latency.write(corrected)
    return latency.rows_of(corrected), f"{latency.summary(corrected)}; wrote {path}"
