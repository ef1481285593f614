"""The command line: parse, one lazy import, one call, one printed table.

Nothing heavy is imported here, so that `--help` is instant. Libraries raise; only `main` prints
errors and exits. An exception with a `hint` is a letter to the user: its message says what was
asked and found, the hint what to do next.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from export.layouts import TARGETS, layouts_of

app = typer.Typer(
    help="Make a Whisper checkpoint small, export it, and measure it on the device.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

TABLE_WIDTH = 100
SPEECH = "a manifest, an audiofolder or hf:OWNER/NAME[:CONFIG][:SPLIT]"

MODEL = (
    "size name (tiny.en, base, ...), hub id, directory (Hugging Face or CTranslate2) or .pt file"
)
Model = Annotated[str | None, typer.Argument(help=f"{MODEL}; default: the embedded digits model")]
Source = Annotated[str, typer.Argument(help=f"artifact, or a checkpoint: {MODEL}")]
Json = Annotated[
    str | None,
    typer.Option("--json", help="write JSON to this file; alone: to stdout, and nothing else"),
]
Out = Annotated[Path | None, typer.Option(help="where to write; must not exist yet")]
Normalizer = Annotated[
    str | None,
    typer.Option(
        help="none, whisper-basic, whisper-english, vistaar, hindi-strict, hindi-wer or bambara; "
        "default: the one for the clips' language"
    ),
]
Host = Annotated[
    list[str] | None,
    typer.Option(
        metavar="USER@HOST",
        help="where a device is: whatever `ssh` calls it; of several, in the order of --device",
    ),
]
FailIf = Annotated[
    list[str] | None,
    typer.Option(metavar="LIMIT", help="exit with 1 where a result breaks it; may be repeated"),
]
Serial = Annotated[
    list[str] | None,
    typer.Option(help="which phone, by `adb devices`; default: the one that is attached"),
]
Threads = Annotated[int | None, typer.Option(min=1, help="default: all usable cores")]
Units = Annotated[
    str | None,
    typer.Option(help="of Core ML, on a Mac: all, cpu, cpu-ane or cpu-gpu; default: all"),
]

LAYOUTS = {target: layouts_of(target) for target in TARGETS}
GATES = ("fail", "warn", "off")
PRECISIONS = {name: target.precisions for name, target in TARGETS.items()}


@app.command("compress")
def compress_cli(
    model: Model = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="name or .toml file; default: lite, for the embedded model quick"),
    ] = None,
    speech: Annotated[
        Path | None,
        typer.Option(help=f"clips to train on: {SPEECH}; default: English clips that come along"),
    ] = None,
    dev: Annotated[
        Path | None,
        typer.Option(help=f"clips for the thresholds: {SPEECH}; default: a tenth of --speech"),
    ] = None,
    out: Out = None,
    seed: Annotated[int, typer.Option(help="of everything that is drawn at random")] = 0,
    revision: Annotated[str | None, typer.Option(help="of a model on the hub")] = None,
    language: Annotated[
        str | None,
        typer.Option(
            metavar="CODE",
            help="that prompts the model for speech in a language which it has no token for",
        ),
    ] = None,
    target_params: Annotated[
        str | None, typer.Option(metavar="N|SHARE", help="search for it: 900000, 0.9M or 60%")
    ] = None,
    target_macs: Annotated[
        str | None, typer.Option(metavar="N|SHARE", help="likewise, of one window and 32 tokens")
    ] = None,
    target_latency: Annotated[
        str | None, typer.Option(metavar="TIME", help="likewise, 400ms or 0.4s on --device")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="that was measured by `edgewhisper devices calibrate`")
    ] = None,
    max_wer_loss: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="search for the smallest that loses no more dev WER (a target; the limit of one "
            "run is max_wer_loss in the recipe)",
        ),
    ] = None,
    allow_loss: Annotated[
        bool,
        typer.Option("--allow-loss", help="write it even if it loses more than max_wer_loss"),
    ] = False,
    trials: Annotated[
        int | None, typer.Option(min=1, help="runs of the recipe that a search makes; default: 12")
    ] = None,
) -> None:
    """Make a checkpoint smaller by a recipe. Interrupted, the same command goes on.

    With a target, search within the recipe (see `edgewhisper recipes`) and write the chosen
    checkpoint with all trials in pareto.json; others worth having are in front/.
    """
    rest = (model, recipe, speech, dev, out, seed, revision, say, language)
    asks = (target_params, target_macs, max_wer_loss, target_latency)
    if asks == (None,) * 4 and device is None:
        _refuse_trials(trials)
        from edgewhisper import pipeline

        say(f"wrote {pipeline.compress(*rest, allow_loss)}")
        return
    from edgewhisper import targets

    asked, table = targets.parse(*asks), targets.table_of(target_latency, device)
    tried = trials or targets.TRIALS
    place, rows = targets.compress_to(asked, tried, *rest, table, allow_loss)
    _show_trials(rows)
    say(f"wrote {place}")


@app.command("export")
def export_cli(
    checkpoint: Annotated[
        str | None, typer.Argument(help=f"{MODEL}; default: the newest checkpoint")
    ] = None,
    target: Annotated[str, typer.Option(help="onnx or coreml")] = "onnx",
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16, int8, int4; of coreml pal4, pal6, pal8 too; default: int8, of coreml "
            "fp16, or --device's"
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="that it is for: see `edgewhisper devices`")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="which runtime it is for: native, transformers, sherpa, single; of coreml "
            "whisperkit, encoder (whisper.cpp's); default: native, whisperkit"
        ),
    ] = None,
    speech: Annotated[
        Path | None,
        typer.Option(help=f"clips for the gate: {SPEECH}; default: clips of EdgeWhisper's own"),
    ] = None,
    gate: Annotated[
        str,
        typer.Option(
            help="fail: write nothing if the text differs; warn: write it and record that; off: "
            "do not compare"
        ),
    ] = "fail",
    gate_clips: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="at most so many clips, evenly chosen; default: 100"),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            metavar="CODE",
            help="prompts the artifact where no other is asked for, or auto to detect it; default: "
            "the one that the checkpoint names, otherwise auto, or English in layouts with one "
            "prompt",
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION",
            help="onnx: the oldest onnxruntime that is to run it, such as 1.23; default: the one "
            "that the fastest graphs need",
        ),
    ] = None,
    out: Out = None,
    deployment_target: Annotated[
        str | None,
        typer.Option(help="coreml: iOS16, iOS17 or iOS18; default: the oldest that will do"),
    ] = None,
    stateful: Annotated[
        bool, typer.Option("--stateful", help="coreml: the decoder keeps its caches (iOS18)")
    ] = False,
    word_timestamps: Annotated[
        bool | None,
        typer.Option(
            "--word-timestamps/--no-word-timestamps",
            help="coreml: output of the alignment heads; default: where the model has some",
        ),
    ] = None,
    neural_engine: Annotated[
        bool,
        typer.Option("--neural-engine", help="coreml: the form that the engine wants"),
    ] = False,
    window: Annotated[
        float | None, typer.Option(help="coreml: seconds, one of the model's; default: the longest")
    ] = None,
) -> None:
    """Turn a checkpoint into files a device can run; fails if their text differs.

    The gate compares the finished files with the checkpoint on clips, each prompted for its own
    language: fp32 must give the same tokens. Other precisions fail if the 95 % interval of the loss
    in word error rate lies above 0.5 points, or the loss is above 10.5 points.
    """
    options: dict[str, Any] = dict(
        deployment_target=deployment_target,
        stateful=stateful or None,
        word_timestamps=word_timestamps,
        neural_engine=neural_engine or None,
        window=window,
        runtime=runtime,
    )
    options = {name: value for name, value in options.items() if value is not None}
    _one_of("--target", target, tuple(LAYOUTS))
    _one_of("--gate", gate, GATES)
    _refuse_options(target, options)
    if layout is not None:
        _of_target("--layout", layout, target, LAYOUTS)
    precision = _precision(precision, device, target)
    from edgewhisper import pipeline

    gating = pipeline.Gating(gate, gate_clips)
    rest = (checkpoint, precision, speech, out, say, layout, target, language, gating)
    place = pipeline.export(*rest, **options)
    say(f"wrote {place}")


@app.command("bench")
def bench_cli(
    artifacts: Annotated[
        list[Path] | None,
        typer.Argument(help="default: the newest artifact", metavar="ARTIFACT..."),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="see `edgewhisper devices`; several work at once; default: local"),
    ] = None,
    host: Host = None,
    serial: Serial = None,
    browser: Annotated[
        bool, typer.Option("--browser", help="of a phone: in its browser, by a page served here")
    ] = False,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS[:PORT]",
            help="where that page is served; default: as the local network sees this machine",
        ),
    ] = None,
    speech: Annotated[Path | None, typer.Option(help=f"clips to transcribe: {SPEECH}")] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="dense checkpoint (as MODEL of compress), run in transformers unless --rival is "
            "given"
        ),
    ] = None,
    rival: Annotated[
        list[str] | None,
        typer.Option(
            help="run it in faster-whisper, whisper.cpp or sherpa-onnx; several may be given; "
            "default of --baseline then: the embedded model, if the artifacts are made of it"
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="rounds, interleaved")] = 5,
    threads: Threads = None,
    compute_units: Annotated[
        list[str] | None,
        typer.Option(help="of Core ML: all, cpu, cpu-ane, cpu-gpu; several, or each; default: all"),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="then transcribe on and on for so long, 60 at most")
    ] = None,
    interval: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="more rounds, 50 at most, until the median is known to it: 2%",
        ),
    ] = None,
    governor: Annotated[
        str | None, typer.Option(help="of the clock meanwhile, such as performance")
    ] = None,
    pin: Annotated[
        str | None, typer.Option(metavar="CORES", help="to run on: big, all, or 0,1")
    ] = None,
    normalizer: Normalizer = None,
    fail_if: FailIf = None,
    json_file: Json = None,
) -> None:
    """Measure latency, memory and error rate of artifacts on devices.

    A limit of --fail-if is a measure and how much of it is too much: total>400ms, wer>5%,
    peak>125MB.
    """
    from benchmarks import limits
    from benchmarks.bench import Measuring
    from devices.device import in_browser, places
    from edgewhisper import pipeline

    kept = [limits.parse(text) for text in fail_if or []]
    units = tuple(compute_units or ())
    share = None if interval is None else _share("--interval", interval)
    how = Measuring(repeats, threads, normalizer, units, minutes, share, governor, pin)
    names = device or ["local"]
    names = in_browser(names) if browser else names
    where = places(names, host or [], serial or [], [listen] if listen else [])
    rest = (speech, baseline, how, _say_for(json_file))
    found = pipeline.bench(artifacts or [], where, *rest, rival or ())
    _show_results(found.results, json_file)
    _say_for(json_file)(f"wrote {found.path}")
    for letter in found.failed[:-1]:
        _print_letter(letter)
    if found.failed:
        raise found.failed[-1]
    limits.refuse(limits.broken(found.results, kept))


@app.command("eval")
def eval_cli(
    source: Source,
    speech: Annotated[Path, typer.Option(help=f"clips with texts: {SPEECH}")],
    normalizer: Normalizer = None,
    compute_units: Units = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="write each clip's text and word counts to this file, as JSON lines",
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Word and character error rates of a checkpoint or an artifact."""
    from edgewhisper import pipeline
    from export.files import new_file

    found, clips = pipeline.evaluate(source, speech, normalizer, compute_units)
    if texts is not None:
        lines = "".join(json.dumps(clip, ensure_ascii=False) + "\n" for clip in clips)
        with new_file(texts) as path:
            path.write_text(lines, encoding="utf-8")
    low, high = found.wer_interval
    _emit(found.as_dict(), json_file)
    if json_file != "-":
        say(f"WER {found.wer:.2%}  (95 % interval {low:.2%} to {high:.2%})   CER {found.cer:.2%}")
        say(f"mean of every clip's own WER {found.wer_per_utterance_mean:.2%}")
        say(
            f"{found.substitutions} substitutions, {found.deletions} deletions, "
            f"{found.insertions} insertions in {found.words} words; "
            f"{found.exact} of {found.utterances} clips exact; normalizer {found.normalizer}"
        )


@app.command("transcribe")
def transcribe_cli(
    source: Source,
    audio: Annotated[list[Path], typer.Argument(help="sound of any length; - is stdin")],
    language: Annotated[
        str | None,
        typer.Option(help="code such as hi, or auto; default: the one that the model names"),
    ] = None,
    task: Annotated[str | None, typer.Option(help="transcribe, or translate to English")] = None,
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="segments and cuts where the model hears them")
    ] = False,
    beams: Annotated[int, typer.Option(min=1, help="texts followed at once; 1 is greedy")] = 1,
    fallback: Annotated[
        bool, typer.Option("--fallback", help="try again, at random, what reads like a failure")
    ] = False,
    seed: Annotated[int, typer.Option(help="of the random numbers of --fallback")] = 0,
    previous: Annotated[
        bool, typer.Option("--previous", help="prompt each window with what was said before it")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="refuse files that are cut short instead of warning")
    ] = False,
    threads: Threads = None,
    compute_units: Units = None,
    json_file: Json = None,
) -> None:
    """Text of sound files by a checkpoint or an artifact, which says every segment at once."""
    from benchmarks.speech.sound import read_audio
    from edgewhisper import pipeline

    begun = -1

    def place(number: int) -> str:
        return "" if len(audio) == 1 else f"{audio[number]}\t"

    def said(number: int, segment: Any) -> None:
        nonlocal begun
        if json_file == "-":
            return
        if timestamps:
            times = f"{segment.start_s:.2f}\t{segment.end_s:.2f}"
            say(f"{place(number)}{times}\t{segment.text}")
        else:
            typer.echo(" " if begun == number else place(number), nl=False)
            typer.echo(segment.text, nl=False)
        begun = number

    options: dict[str, Any] = dict(
        language=language,
        task=task,
        timestamps=timestamps,
        beams=beams,
        fallback=fallback,
        seed=seed,
        previous=previous,
        compute_units=compute_units,
    )
    # one after the other: they may be hours long
    pcms = (read_audio(path, strict) for path in audio)
    rows = []
    for number, found in enumerate(pipeline.transcribe(source, pcms, threads, said, **options)):
        rows.append({"audio": str(audio[number]), **found})
        if not timestamps and json_file != "-":
            say("" if begun == number else place(number) + found["text"])
    _emit(rows, json_file)


@app.command("inspect")
def inspect_cli(
    source: Source,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--time", min=0.01, help="time an artifact's graphs on so much sound; alone: 5 s"
        ),
    ] = None,
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """Show what a checkpoint or an artifact is made of, what it costs, where its time goes."""
    from edgewhisper import inspect

    found = inspect.inspect(source)
    if seconds is not None:
        found["time"] = inspect.time_artifact(Path(source), seconds, threads)
    _emit(found, json_file)
    if json_file != "-":
        say(f"{found['kind']}, {found['precision']}, {found['parameters']:,} parameters")
        for rows in (inspect.layer_rows, inspect.size_rows, inspect.cost_rows):
            _table(rows(found))
        if "packages" in found:
            _table(inspect.package_rows(found))
        if "time" in found:
            _table(inspect.time_rows(found["time"]))
            _table(inspect.floor_rows(found["time"]))


@app.command("verify")
def verify_cli(
    artifact: Annotated[Path, typer.Argument(help="directory written by `edgewhisper export`")],
    speech: Annotated[
        Path | None, typer.Option(help=f"the clips that export was given: {SPEECH}")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="run the gate anew against this directory or hub id")
    ] = None,
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """Check an artifact: hashes, graphs, contract, and that it still says what its gate heard."""
    from edgewhisper.verify import verify

    report = verify(artifact, speech, checkpoint, threads)
    _emit(report.as_dict(), json_file)
    if json_file != "-":
        _table(report.rows)
    if report.letter is not None:
        raise report.letter


@app.command("compare")
def compare_cli(
    results: Annotated[list[Path], typer.Argument(help="files that `edgewhisper bench` wrote")],
    fail_if: FailIf = None,
    json_file: Json = None,
) -> None:
    """Say which differences between results are real; the first one on each device is the base.

    A limit of --fail-if is a factor, which a difference that may be noise does not break:
    total>1.1x.
    """
    from benchmarks import limits
    from benchmarks.compare import compare
    from benchmarks.result import read

    kept = [limits.parse(text, relative=True) for text in fail_if or []]
    found = compare([result for path in results for result in read(path)])
    _emit(found, json_file)
    if json_file != "-":
        _table(found["rows"])
    limits.refuse(limits.broken_pairs(found, kept))


@app.command("report")
def report_cli(
    results: Annotated[
        list[Path] | None, typer.Argument(help="default: the newest result", metavar="RESULTS...")
    ] = None,
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
    plots: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="write the plots as PNG files, too")
    ] = None,
) -> None:
    """Write one self-contained page: error rate against latency, stages, machine."""
    from edgewhisper import pipeline

    pipeline.report(results or [], out, plots)
    say(f"wrote {out}")


@app.command("demo")
def demo_cli(
    model: Annotated[
        str | None,
        typer.Option(help=f"digits (embedded, needs no network), or a {MODEL}; default: tiny.en"),
    ] = None,
) -> None:
    """Compress Whisper tiny.en, export it to INT8, and bench it against the dense checkpoint."""
    from edgewhisper import pipeline

    found = pipeline.demo(model, say)
    _show_results(found.results, None)
    say(f"wrote {found.path}; a page about it: edgewhisper report {found.path}")


@app.command("recipes")
def recipes_cli() -> None:
    """The recipes that come with EdgeWhisper, and what a target may search in each."""
    from edgewhisper.recipe import available, searchable, summary

    for name in available():
        say(f"{name:10} {summary(name)}")
        if searchable(name):
            say(f"{'':10} searched: {', '.join(searchable(name))}")


HOWS = {
    "local": "ready",
    "ssh": "--host USER@HOST",
    "adb": "adb, --serial S",
    "browser": "--browser",
}
"""How a kind of device is reached."""

devices_app = typer.Typer()
app.add_typer(devices_app, name="devices")


@devices_app.callback(invoke_without_command=True)
def devices_cli(context: typer.Context) -> None:
    """The devices that are known, and how each is reached."""
    if context.invoked_subcommand is not None:
        return
    from devices.device import load_profile, profile_names

    for profile in map(load_profile, profile_names()):
        say(f"{profile.name:12} {profile.kind:7} {HOWS[profile.kind]:20} {profile.model}")


@devices_app.command("clean")
def clean_cli(
    host: Annotated[str | None, typer.Option(metavar="USER@HOST", help="of bench")] = None,
    serial: Annotated[str | None, typer.Option(help="of bench")] = None,
) -> None:
    """Remove what bench has copied to a device: artifacts, clips, numpy and onnxruntime."""
    if (host is None) == (serial is None):
        raise typer.BadParameter("name one device, by --host or by --serial")
    if serial is not None:
        from devices.adb import remove_all

        folder, freed = remove_all(serial)
    else:
        from devices.ssh import SshDevice

        with SshDevice(str(host)) as device:
            folder, freed = device.clean()
    say(f"removed {folder} from {host or serial}: {freed / 1e6:.1f} MB")


@devices_app.command("calibrate")
def calibrate_cli(
    device: Annotated[str, typer.Option(help="see `edgewhisper devices`")] = "local",
    host: Annotated[str | None, typer.Option(metavar="USER@HOST", help="of bench")] = None,
    serial: Annotated[str | None, typer.Option(help="of bench")] = None,
    threads: Threads = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16, int8 or int4; default: the device's")
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="measure nothing: correct its table by what bench wrote there"),
    ] = None,
) -> None:
    """Time single operators on a device: the table that `compress --target-latency` takes.

    Results of bench in ./edgewhisper-runs correct it, where they are of the same device, precision
    and number of threads.
    """
    from devices.device import Place, places
    from edgewhisper import pipeline

    place = Place(device)
    if not results:
        (place,) = places([device], [host] if host else [], [serial] if serial else [])
    rows, told = pipeline.calibrate(place, precision, threads, results, say)
    _table(rows)
    say(told)


def say(text: str) -> None:
    """One line for the user, from the first process only."""
    from edgewhisper.runs import main_process

    if main_process():
        typer.echo(text)


def _say_for(json_file: str | None) -> Any:
    """Talk goes to stderr where stdout is for JSON."""
    return say if json_file != "-" else lambda text: typer.echo(text, err=True)


def _emit(value: Any, json_file: str | None) -> None:
    text = json.dumps(value, ensure_ascii=False)
    if json_file == "-":
        typer.echo(text)
    elif json_file is not None:
        from export.files import new_file

        with new_file(Path(json_file)) as path:
            path.write_text(text + "\n", encoding="utf-8")


def _show_results(results: list[dict[str, Any]], json_file: str | None) -> None:
    from benchmarks.result import brief_rows, remarks

    _emit(results, json_file)
    if json_file != "-":
        _table(brief_rows(results))
        for line in remarks(results):
            say(line)


def _show_trials(rows: list[dict[str, str]]) -> None:
    from edgewhisper.runs import main_process

    if main_process():
        _table(rows)


def _refuse_trials(trials: int | None) -> None:
    if trials is not None:
        from export.problem import Problem

        raise Problem(
            f"--trials {trials}: there is nothing to search without a target",
            hint="add --target-params, --target-macs, --target-latency or --max-wer-loss, or leave "
            "--trials out",
        )


def _table(rows: list[dict[str, str]]) -> None:
    """Rows of equal keys as a table; columns are the rows' keys."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in rows[0]:
        table.add_column(column, justify="left" if column == next(iter(rows[0])) else "right")
    for row in rows:
        table.add_row(*row.values())
    # a narrow terminal wraps lines; columns squeezed to fit it could not be read at all
    Console(width=max(Console().width, TABLE_WIDTH)).print(table)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        from export.problem import Problem

        raise Problem(f"{option} {value} is not there", hint=f"use {' or '.join(known)}")


def _share(option: str, text: str) -> float:
    """A share as people write one: 2% or 0.02."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        from export.problem import Problem

        raise Problem(f"{option} {text} is no share", hint="write 2% or 0.02") from None


def _of_target(option: str, value: str, target: str, known: dict[str, tuple[str, ...]]) -> None:
    """What one target has and another has not is told apart from what none has."""
    others = [other for other, values in known.items() if value in values and other != target]
    if others and value not in known[target]:
        from export.problem import Problem

        raise Problem(
            f"{option} {value} is for --target {others[0]}, and --target is {target}",
            hint=f"use {' or '.join(known[target])}, or --target {others[0]}",
        )
    _one_of(option, value, known[target])


def _refuse_options(target: str, given: dict[str, Any]) -> None:
    """Each option is for one target: --runtime for ONNX, the others for Core ML."""
    wrong = [name for name in given if (name == "runtime") != (target == "onnx")]
    if wrong:
        from export.problem import Problem

        names = " and ".join(f"--{name.replace('_', '-')}" for name in wrong)
        other, title = ("coreml", "Core ML") if target == "onnx" else ("onnx", "ONNX")
        raise Problem(
            f"{names}: for {title}, and --target is {target}",
            hint=f"add --target {other}, or leave that out",
        )


def _precision(asked: str | None, device: str | None, target: str) -> str | None:
    """What was asked for, else what pays on the device, which is said with the reason; None leaves
    it to the target."""
    from devices.device import load_profile

    profile = None if device is None else load_profile(device)
    if profile is not None and target == "coreml" and not profile.model.startswith("Apple"):
        from export.problem import Problem

        raise Problem(
            f"--target coreml for {profile.name} ({profile.model}): Core ML is on Apple's systems",
            hint=f"use --target onnx for {profile.name}, or --device m1",
        )
    if asked is not None:
        _of_target("--precision", asked, target, PRECISIONS)
    elif profile is not None:
        say(f"{profile.precision} for {profile.name}: {profile.reason}")
        return profile.precision
    return asked


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one line; deprecations of libraries are not the user's business."""
    if not isinstance(message, DeprecationWarning | FutureWarning):
        typer.echo(f"note:  {message}", err=True)


ALONE = {"--json": "-", "--time": "5"}
"""Options that may stand alone, and the value that they have then: stdout, seconds."""


INTERRUPTED = 130
"""The exit code of programs that Ctrl-C has ended."""


def _with_values(arguments: list[str]) -> list[str]:
    """The parser wants a value behind these options, so give them theirs."""
    found: list[str] = []
    for position, word in enumerate(arguments):
        found.append(word)
        after = arguments[position + 1 : position + 2]
        if word in ALONE and (not after or after[0].startswith("--")):
            found.append(ALONE[word])
    return found


def main() -> None:
    """Run the command line; letters are printed as two lines and exit with 1."""
    warnings.showwarning = _note
    try:
        app(_with_values(sys.argv[1:]), standalone_mode=True)
    except (KeyboardInterrupt, SystemExit) as end:  # typer makes the second of the first
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        typer.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "hint"):
            raise
        _print_letter(error)
        sys.exit(1)


def _print_letter(letter: Any) -> None:
    typer.echo(f"error: {letter}", err=True)
    if letter.hint:
        typer.echo(f"try:   {letter.hint}", err=True)
