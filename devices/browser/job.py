"""Builds a round's job for the page, and checks the page's answer.

The page only runs the two graphs and picks the most probable allowed token. Windows, silence,
prompts and forbidden tokens are decided here with the runner's rules. The page sends token ids, and
the texts are computed here. Everything that the page sends is checked against its job.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devices.device import DeviceProblem, clean
from devices.runner.artifact.graph_file import read_graph
from devices.runner.artifact.manifest import check_files, read_manifest
from devices.runner.audio import Pcm, is_silent, read_wav, split
from devices.runner.decode.loops import without_loop
from devices.runner.decode.options import plain
from devices.runner.decode.rules import Rules
from devices.runner.decode.text import join, read_tokens, to_text
from devices.runner.measure.bench import WARM_UP_CLIPS, read_clips, read_languages
from devices.runner.problem import RunnerProblem

from .ort_web import VERSION

MOST_IDS = 32
"""Most tokens per decoder step."""
MOST_S = 3600.0
MOST_THREADS = 1024
GRAPHS = ("encoder", "decoder")


@dataclass
class Job:
    """One round: an artifact on all clips."""

    work: dict[str, Any]
    """The job as sent to the page."""
    files: dict[str, bytes | Path]
    """Name that the page requests -> content."""
    folder: Path


def make(root: Path, artifact: str, clips: Path, threads: int) -> Job:
    """Return the job for an artifact and a list of clips under `root`. Raises RunnerProblem for an
    artifact or a clip that the runner does not accept."""
    folder = root / artifact
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    files: dict[str, bytes | Path] = {}
    work = {
        **graphs(folder, manifest, f"{artifact}/", files),
        **fixed_rules(manifest),
        "windows": windows(manifest),
        "clips": spoken(clips, manifest, files),
        "warm_up": WARM_UP_CLIPS,
        "most_ids": MOST_IDS,
        "threads": threads,
    }
    return Job(work, files, folder)


def graphs(
    folder: Path, manifest: dict[str, Any], place: str, files: dict[str, bytes | Path]
) -> dict[str, Any]:
    """Return the files of the graphs, and the shapes of the decoder's caches; extend `files`.
    Raises RunnerProblem for a Core ML artifact."""
    if manifest["target"] != "onnx":
        raise RunnerProblem(
            f"{folder}: a browser runs ONNX artifacts, and this one is for {manifest['target']}",
            "export the checkpoint with `--target onnx`",
        )
    entries: dict[str, Any] = {}
    listed = [folder / file for file in manifest["files"]]
    for name in (f"{graph}.onnx" for graph in GRAPHS):
        constants = read_graph(folder / name, listed).constants.values()
        weights = sorted({c.location for c in constants if c.location is not None})
        files |= {place + file: folder / file for file in (name, *weights)}
        graph = {"file": place + name, "external": weights, "place": place}
        entries[name.removesuffix(".onnx")] = graph
    outputs = manifest["contract"]["decoder"]["outputs"]
    shapes = {spec["name"]: spec["shape"] for spec in outputs}
    caches = {name: shape for name, shape in shapes.items() if name.startswith("present.")}
    return entries | {"caches": caches, "vocabulary": shapes["logits"][-1]}


def windows(manifest: dict[str, Any]) -> list[int]:
    """Return the lengths of the encoder's windows in samples."""
    audio = manifest["audio"]
    lengths: list[int] = audio.get("windows_samples", [audio["window_samples"]])
    return lengths


def fixed_rules(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the end token, and the tokens that are forbidden always or at the first position."""
    rules = Rules.from_manifest(manifest["decoding"])
    vocabulary = next(
        spec["shape"][-1]
        for spec in manifest["contract"]["decoder"]["outputs"]
        if spec["name"] == "logits"
    )
    times = filter(rules.is_timestamp, range(vocabulary))
    never = sorted({*rules.suppress_tokens, *times})
    return {"eos": rules.eos, "never": never, "not_first": list(rules.begin_suppress_tokens)}


def spoken(
    clips: Path, manifest: dict[str, Any], files: dict[str, bytes | Path]
) -> list[dict[str, Any]]:
    """Return prompt and windows of every clip, without silent windows; extend `files`."""
    paths = read_clips(clips)
    rules, entries = Rules.from_manifest(manifest["decoding"]), []
    for path, language in zip(paths, read_languages(clips, len(paths)), strict=True):
        known = plain(language or "") in rules.languages
        if rules.auto and not known:
            raise DeviceProblem(
                f"{path.name}: the artifact has no token for the language {language!r}, and the "
                "page cannot detect languages",
                hint="correct `lang` in the manifest, or export with --language",
            )
        prompted = rules.with_options(plain(language or "") if known else None, None, False)
        windows = sounding(read_wav(path), manifest["audio"]["window_samples"])
        places = {f"clips/{path.stem}/{start}": pcm for start, pcm in windows.items()}
        files |= {place: pcm.astype("<f4").tobytes() for place, pcm in places.items()}
        prompt, most = list(prompted.prompt), prompted.max_new_tokens
        entries.append({"windows": list(places), "prompt": prompt, "most": most})
    return entries


def sounding(pcm: Pcm, window_samples: int) -> dict[int, Pcm]:
    """Return the windows that are not silent, by the index of their first sample."""
    pieces = {piece.start: pcm[piece] for piece in split(pcm, window_samples)}
    return {start: piece for start, piece in pieces.items() if not is_silent(piece)}


# ------------------------------------------------------------------------------------ the answer


class Wrong(ValueError):
    """An answer does not fit its job; the text names the entry."""


def answered(job: Job, answer: dict[str, Any]) -> dict[str, Any]:
    """Return the page's answer in the form of the runner's. Raises DeviceProblem if the page
    failed, used another number of threads, or sent an answer that does not fit the job."""
    if "error" in answer:
        raise refused(answer["error"])
    try:
        return checked(job, answer.get("result"))
    except Wrong as error:
        raise DeviceProblem(
            f"browser: the page's answer has no usable {error}",
            "bench again; if that does not help, another program answers instead of the page",
        ) from None


def refused(error: Any) -> DeviceProblem:
    """Return the error for a failure that the page reports."""
    report = error if isinstance(error, dict) else {}
    what, reason = (" ".join(str(clean(report.get(key))).split())[:300] for key in ("at", "reason"))
    return DeviceProblem(
        f"browser: onnxruntime-web {VERSION} failed at {what} ({reason})",
        "if memory ran out, bench a smaller artifact; if an operator is missing, export with "
        "`--layout native --precision fp32`, which has the fewest special operators",
    )


def checked(job: Job, result: Any) -> dict[str, Any]:
    """Return the entries of a round's answer; raise Wrong for bad ones."""
    work, table = job.work, read_tokens(job.folder / "tokens.json")
    threads = count(field(result, "threads"), 1, MOST_THREADS, "threads")
    if threads != work["threads"]:
        raise DeviceProblem(
            f"browser: --threads {work['threads']}, but the browser provides {threads}",
            "leave --threads out; a browser provides threads only to pages from https or from the "
            "device itself, such as http://127.0.0.1 through `adb reverse`",
        )
    load_s = seconds(field(result, "load_s"), "load_s")
    stages: dict[str, list[float]] = {"encoder_s": [], "prompt_s": [], "per_token_s": []}
    walls, texts, tokens = [], [], []
    clips = many(field(result, "clips"), len(work["clips"]), "clips")
    for asked, clip in zip(work["clips"], clips, strict=True):
        walls.append(seconds(field(clip, "wall_s"), "end_to_end_s"))
        windows = many(field(clip, "windows"), len(asked["windows"]), "windows")
        ids_by_window = [window_tokens(work, asked, window, stages) for window in windows]
        texts.append(join([to_text(ids, table) for ids in ids_by_window]))
        tokens.append([token for ids in ids_by_window for token in ids])
    memory = field(result, "memory_bytes")
    known = memory if memory is None else count(memory, 0, 2**53, "memory_bytes")
    return {
        "load_s": [load_s],
        "mel_s": [],
        **stages,
        "end_to_end_s": walls,
        "cpu_s": [],
        "mel_share": None,
        "peak_rss_bytes": "unavailable" if known is None else known,
        "tokens": tokens,
        "texts": texts,
        "versions": {"onnxruntime-web": VERSION},
    }


def window_tokens(
    work: dict[str, Any], asked: dict[str, Any], window: Any, stages: dict[str, list[float]]
) -> list[int]:
    """Return the tokens of one window, and append its times to `stages`."""
    ids = field(window, "tokens")
    if not isinstance(ids, list) or len(ids) > asked["most"]:
        raise Wrong("tokens")
    tokens = [count(token, 0, work["vocabulary"] - 1, "tokens") for token in ids]
    if {work["eos"], *work["never"]} & {*tokens}:
        raise Wrong("tokens")
    prompts = math.ceil(len(asked["prompt"]) / MOST_IDS)
    later = field(window, "per_token_s")
    if not isinstance(later, list) or len(later) not in {max(0, len(tokens) - 1), len(tokens)}:
        raise Wrong("per_token_s")
    stages["encoder_s"].append(seconds(field(window, "encoder_s"), "encoder_s"))
    first = many(field(window, "prompt_s"), prompts if asked["most"] else 0, "prompt_s")
    stages["prompt_s"] += [seconds(time, "prompt_s") for time in first]
    stages["per_token_s"] += [seconds(time, "per_token_s") for time in later]
    return without_loop(tokens)


def about(hello: Any) -> dict[str, Any]:
    """Return the page's description of its browser, with the keys of the runner's `describe`."""
    try:
        agent, isolated = field(hello, "user_agent"), field(hello, "cross_origin_isolated")
        simd, resolution = field(hello, "simd"), field(hello, "clock_resolution_s")
        cores = count(field(hello, "cores"), 1, MOST_THREADS, "number of cores")
        if not (isinstance(agent, str) and isinstance(isolated, bool) and isinstance(simd, bool)):
            raise Wrong("description of its browser")
        clock = seconds(resolution, "resolution of its clock")
    except Wrong as error:
        raise DeviceProblem(
            f"browser: the page sent no usable {error}", "reload the page, or try another browser"
        ) from None
    if not simd:
        raise DeviceProblem(
            f"browser: it lacks WebAssembly SIMD, which onnxruntime-web {VERSION} needs "
            f"({clean(agent)[:200]})",
            "update it to Chrome 91, Firefox 89, Safari 16.4 or newer",
        )
    agent = clean(agent)[:500]
    return {
        "model": agent.partition("(")[2].partition(")")[0] or "unavailable",
        "cpu": "unavailable",
        "architecture": "wasm32",
        "cores": cores if isolated else 1,  # pages without isolation have no threads
        "isa": ["simd128"],
        "user_agent": agent,
        "cross_origin_isolated": isolated,
        "clock_resolution_s": clock,
        "mel_is_in": "encoder_s",
        "emulated": False,  # a page cannot detect emulation
    }


def field(record: Any, name: str) -> Any:
    """Return an entry of an object; raise Wrong if it is missing."""
    if not isinstance(record, dict) or name not in record:
        raise Wrong(name)
    return record[name]


def many(value: Any, length: int, name: str) -> list[Any]:
    """Return a list of exactly `length` elements; raise Wrong otherwise."""
    if not isinstance(value, list) or len(value) != length:
        raise Wrong(name)
    return value


def count(value: Any, low: int, high: int, name: str) -> int:
    """Return a whole number from `low` to `high`; raise Wrong otherwise."""
    if type(value) is not int or not low <= value <= high:
        raise Wrong(name)
    return value


def seconds(value: Any, name: str) -> float:
    """Return a time from 0 to MOST_S; raise Wrong otherwise, also for NaN."""
    if type(value) not in (int, float) or not 0 <= value <= MOST_S:
        raise Wrong(name)
    return float(value)
