"""A round for the page, and what its answer may be.

The page only runs the two graphs and takes the likeliest token that is allowed. What is cut into
windows, is silent, is prompted or forbidden is settled here by the runner's own rules, and so are
the texts: the page sends ids. Everything that it sends is checked against what it was asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devices.device import DeviceProblem, clean
from devices.runner.audio import Pcm, is_silent, read_wav, split
from devices.runner.decode.listen import plain
from devices.runner.decode.rules import Rules, without_loop
from devices.runner.decode.text import join, read_tokens, to_text
from devices.runner.engines.contract import check_files, read_manifest
from devices.runner.engines.graph_file import read_graph
from devices.runner.measure.bench import WARM_UP_CLIPS, read_clips, read_languages

from .ort_web import VERSION

MOST_IDS = 32
"""Tokens that the decoder takes in one step."""
MOST_S = 3600.0
MOST_THREADS = 1024
GRAPHS = ("encoder", "decoder")


@dataclass
class Job:
    """One artifact, once over all clips."""

    work: dict[str, Any]
    """What the page is told."""
    files: dict[str, bytes | Path]
    """Name that the page asks for -> content."""
    folder: Path


def make(root: Path, artifact: str, clips: Path, threads: int) -> Job:
    """Return the job for an artifact and a list of clips under `root`.

    Raises the runner's letters for an artifact or a clip that it would not take.
    """
    folder = root / artifact
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    files: dict[str, bytes | Path] = {}
    work = {
        **graphs(folder, manifest, f"{artifact}/", files),
        **fixed_rules(manifest),
        "windows": manifest["audio"].get("windows_samples", [manifest["audio"]["window_samples"]]),
        "clips": spoken(clips, manifest, files),
        "warm_up": WARM_UP_CLIPS,
        "most_ids": MOST_IDS,
        "threads": threads,
    }
    return Job(work, files, folder)


def graphs(
    folder: Path, manifest: dict[str, Any], place: str, files: dict[str, bytes | Path]
) -> dict[str, Any]:
    """Where the graphs and the weights beside them are, and the caches that the decoder begins
    with."""
    told: dict[str, Any] = {}
    for name in (f"{graph}.onnx" for graph in GRAPHS):
        constants = read_graph(folder / name, manifest["files"].keys()).constants.values()
        beside = sorted({c.location for c in constants if c.location is not None})
        files |= {place + file: folder / file for file in (name, *beside)}
        told[name.removesuffix(".onnx")] = {"file": place + name, "beside": beside, "place": place}
    outputs = manifest["contract"]["decoder"]["outputs"]
    shapes = {spec["name"]: spec["shape"] for spec in outputs}
    caches = {name: shape for name, shape in shapes.items() if name.startswith("present.")}
    return told | {"caches": caches, "vocabulary": shapes["logits"][-1]}


def fixed_rules(manifest: dict[str, Any]) -> dict[str, Any]:
    """The token that ends a text, and those that are never said, or not as the first."""
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
    """Prompt and windows of every clip; a silent window is not decoded, so it is none."""
    paths = read_clips(clips)
    rules, found = Rules.from_manifest(manifest["decoding"]), []
    for path, language in zip(paths, read_languages(clips, len(paths)), strict=True):
        known = plain(language or "") in rules.languages
        if rules.auto and not known:
            raise DeviceProblem(
                f"{path.name}: the artifact has no token for the language {language!r} and would "
                "detect one, which the page cannot do",
                hint="correct `lang` in the manifest, or export with --language",
            )
        told = rules.told(plain(language or "") if known else None, None, False)
        windows = sounding(read_wav(path), manifest["audio"]["window_samples"])
        places = {f"clips/{path.stem}/{start}": pcm for start, pcm in windows.items()}
        files |= {place: pcm.astype("<f4").tobytes() for place, pcm in places.items()}
        prompt, most = list(told.prompt), told.max_new_tokens
        found.append({"windows": list(places), "prompt": prompt, "most": most})
    return found


def sounding(pcm: Pcm, window_samples: int) -> dict[int, Pcm]:
    """Windows that are not silent, by their first sample."""
    pieces = {piece.start: pcm[piece] for piece in split(pcm, window_samples)}
    return {start: piece for start, piece in pieces.items() if not is_silent(piece)}


# ------------------------------------------------------------------------------------ the answer


class Wrong(ValueError):
    """Where an answer is not what was asked."""


def answered(job: Job, said: dict[str, Any]) -> dict[str, Any]:
    """Return the page's answer as the runner gives one.

    Raises DeviceProblem: it could not do it, took another number of threads, or sends something
    else than was asked.
    """
    if "error" in said:
        raise refused(said["error"])
    try:
        return checked(job, said.get("result"))
    except Wrong as error:
        raise DeviceProblem(
            f"browser: the page's answer has no usable {error}",
            "bench again; if it stays so, something else answers there than the page",
        ) from None


def refused(error: Any) -> DeviceProblem:
    """The letter for what the page says that it could not do."""
    told = error if isinstance(error, dict) else {}
    what, reason = (" ".join(str(clean(told.get(key))).split())[:300] for key in ("at", "reason"))
    return DeviceProblem(
        f"browser: onnxruntime-web {VERSION} failed at {what} ({reason})",
        "if memory ran out, bench a smaller artifact; if an operator is missing there, export with "
        "`--layout native --precision fp32`, which has the fewest of its own",
    )


def checked(job: Job, result: Any) -> dict[str, Any]:
    """The fields of a round's answer; raises Wrong."""
    work, table = job.work, read_tokens(job.folder / "tokens.json")
    threads = count(field(result, "threads"), 1, MOST_THREADS, "threads")
    if threads != work["threads"]:
        raise DeviceProblem(
            f"browser: {work['threads']} threads are asked for, and it gives {threads}",
            "leave --threads out to take what it gives; threads need a page from https or from the "
            "device itself, such as http://127.0.0.1 through `adb reverse`",
        )
    found: dict[str, Any] = {"load_s": [seconds(field(result, "load_s"), "load_s")]}
    stages: dict[str, list[float]] = {"encoder_s": [], "prompt_s": [], "per_token_s": []}
    walls, texts, tokens = [], [], []
    clips = many(field(result, "clips"), len(work["clips"]), "clips")
    for asked, clip in zip(work["clips"], clips, strict=True):
        walls.append(seconds(field(clip, "wall_s"), "end_to_end_s"))
        windows = many(field(clip, "windows"), len(asked["windows"]), "windows")
        said = [window_tokens(work, asked, window, stages) for window in windows]
        texts.append(join([to_text(ids, table) for ids in said]))
        tokens.append([token for ids in said for token in ids])
    memory = field(result, "memory_bytes")
    known = memory if memory is None else count(memory, 0, 2**53, "memory_bytes")
    return {
        **found,
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
    """The tokens of one window; its times go to the stages."""
    ids = field(window, "tokens")
    if not isinstance(ids, list) or len(ids) > asked["most"]:
        raise Wrong("tokens")
    said = [count(token, 0, work["vocabulary"] - 1, "tokens") for token in ids]
    if {work["eos"], *work["never"]} & {*said}:
        raise Wrong("tokens")
    prompts = math.ceil(len(asked["prompt"]) / MOST_IDS)
    later = field(window, "per_token_s")
    if not isinstance(later, list) or len(later) not in {max(0, len(said) - 1), len(said)}:
        raise Wrong("per_token_s")
    stages["encoder_s"].append(seconds(field(window, "encoder_s"), "encoder_s"))
    first = many(field(window, "prompt_s"), prompts if asked["most"] else 0, "prompt_s")
    stages["prompt_s"] += [seconds(time, "prompt_s") for time in first]
    stages["per_token_s"] += [seconds(time, "per_token_s") for time in later]
    return without_loop(said)


def about(said: Any) -> dict[str, Any]:
    """What the page says about its browser, in the words of the runner's `describe`."""
    try:
        agent, isolated = field(said, "user_agent"), field(said, "cross_origin_isolated")
        simd, resolution = field(said, "simd"), field(said, "clock_resolution_s")
        cores = count(field(said, "cores"), 1, MOST_THREADS, "number of cores")
        if not (isinstance(agent, str) and isinstance(isolated, bool) and isinstance(simd, bool)):
            raise Wrong("description of its browser")
        clock = seconds(resolution, "resolution of its clock")
    except Wrong as error:
        raise DeviceProblem(
            f"browser: the page gives no usable {error}", "reload the page, or try another browser"
        ) from None
    if not simd:
        raise DeviceProblem(
            f"browser: it has no SIMD in WebAssembly, and onnxruntime-web {VERSION} has no other "
            f"build ({clean(agent)[:200]})",
            "update it: Chrome 91, Firefox 89 and Safari 16.4 have it",
        )
    agent = clean(agent)[:500]
    return {
        "model": agent.partition("(")[2].partition(")")[0] or "unavailable",
        "cpu": "unavailable",
        "architecture": "wasm32",
        "cores": cores if isolated else 1,  # without isolation there are no threads
        "isa": ["simd128"],
        "user_agent": agent,
        "cross_origin_isolated": isolated,
        "clock_resolution_s": clock,
        "mel_is_in": "encoder_s",
        "emulated": False,  # as far as a page can tell
    }


def field(said: Any, name: str) -> Any:
    if not isinstance(said, dict) or name not in said:
        raise Wrong(name)
    return said[name]


def many(found: Any, length: int, name: str) -> list[Any]:
    """A list of just so many."""
    if not isinstance(found, list) or len(found) != length:
        raise Wrong(name)
    return found


def count(found: Any, low: int, high: int, name: str) -> int:
    if type(found) is not int or not low <= found <= high:
        raise Wrong(name)
    return found


def seconds(found: Any, name: str) -> float:
    """A time; NaN and infinity are none."""
    if type(found) not in (int, float) or not 0 <= found <= MOST_S:
        raise Wrong(name)
    return float(found)
