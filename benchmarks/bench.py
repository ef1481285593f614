"""Artifact x device x clips -> results.

Every candidate runs in processes of its own which import nothing else. Candidates take turns,
round by round, so that a machine that grows warm or busy slows all of them alike.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import telemetry as watched
from benchmarks.metadata import artifact_hash, clips_hash, folder_bytes, folder_hash
from benchmarks.normalizers import name_for
from benchmarks.normalizers import normalizer as normalizer_named
from benchmarks.result import FORMAT, STAGES, summaries, validate
from benchmarks.rivals.engines import (
    CODE,
    RIVALS,
    count_parameters,
    interpreter,
    refuse_missing,
    send_program,
)
from benchmarks.rivals.prepare import PROJECT, Order
from benchmarks.rivals.transformers import refuse_slim
from benchmarks.speech.clips import Clip
from benchmarks.wer import score, word_errors
from devices.device import RUNNER, Device, clean, open_device, run_runner
from devices.runner.audio import SAMPLING_RATE
from devices.runner.engines.coreml import UNITS
from export.artifact import read_manifest, verify
from export.problem import Problem
from export.prompt import language_code
from export.versions import version

PEAKS = ("peak_rss_bytes", "peak_footprint_bytes")
"""Of a round; the second one is a Mac's."""

OURS = {"PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"}
"""Environment of a program of this project that is not the runner."""

REFERENCE = "transformers"
"""The rival whose texts are those of the checkpoint itself."""

MOST_ROUNDS = 50
"""That an interval may take."""
MOST_MINUTES = 60
ROUND_S = 4 * 3600.0
"""After which a process counts as hung, there to measure hours of speech on a slow device."""
MOST_S = 1e9
"""Of a time that is believed."""


@dataclass(frozen=True)
class Candidate:
    """Something to bench: an artifact directory, or a checkpoint by one of RIVALS."""

    source: Path
    rival: str | None = None
    form: Path | None = None
    """The source as the rival reads it, where that is another folder: see in_own_form."""
    name: str = ""
    """How tables call it; the folder's name where it is empty."""
    compute_units: str | None = None
    """Of Core ML, where they are chosen."""

    @property
    def label(self) -> str:
        own = self.name or Path(self.source).resolve().name
        behind = self.compute_units or (None if self.name else self.rival)
        return own if behind is None else f"{own} ({behind})"

    @property
    def is_coreml(self) -> bool:
        return self.rival is None and read_manifest(Path(self.source)).get("target") == "coreml"


@dataclass(frozen=True)
class Measuring:
    """How to measure."""

    repeats: int = 5
    """Rounds: each starts one process a candidate, which warms up and then transcribes every clip
    once."""
    threads: int | None = None
    """By default all cores that the device lets a process use."""
    normalizer: str | None = None
    """By default the one for the clips' language."""
    compute_units: tuple[str, ...] = ()
    """Of Core ML: a result for each; EACH is all of them."""
    minutes: float | None = None
    """After the rounds, clips are transcribed on and on for so long."""
    interval: float | None = None
    """Rounds go on, up to MOST_ROUNDS, until the 95 % interval of the median of their end_to_end_s
    is at most this share of it."""
    governor: str | None = None
    """Of the device's clock, while a process runs."""
    pin: str | None = None
    """Cores to run on: big, all, or numbers such as 0,1."""


EACH = ("each",)


def bench(
    artifact: Path, device: Device, clips: Sequence[Clip], how: Measuring = Measuring()
) -> dict[str, Any]:
    """The result of one artifact; see bench_all."""
    return bench_all([Candidate(artifact)], device, clips, how)[0]


def bench_all(
    candidates: Sequence[Candidate],
    device: Device,
    clips: Sequence[Clip],
    how: Measuring = Measuring(),
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """The results of several candidates on the same clips, in their order.

    `progress` hears what runs.
    Raises Problem: no clips, a damaged artifact, a rival where it cannot run, a Core ML artifact
    where there is no Core ML; and the device's or the runner's letters.
    """
    ready = prepare(candidates, device, clips, how)
    return measure(ready, progress, checkpoint_wers(ready, progress))


@dataclass(frozen=True)
class Prepared:
    """A device that has all it needs."""

    candidates: Sequence[Candidate]
    device: Device
    places: Sequence[Device]
    """The device, for each candidate with what its program needs."""
    clips: Sequence[Clip]
    how: Measuring
    """With threads (unless cores are chosen there) and normalizer that are known."""
    known: Sequence[dict[str, Any]]
    """The fields of each candidate's result that are known before anything runs."""


def prepare(
    candidates: Sequence[Candidate], device: Device, clips: Sequence[Clip], how: Measuring
) -> Prepared:
    """Check all that can be checked, and copy what the device lacks; raises as bench_all does."""
    candidates = by_units(candidates, how.compute_units)
    if not clips:
        raise Problem("there are no clips to bench on", hint="give a speech manifest")
    normalizer = how.normalizer or name_for(clips)
    normalizer_named(normalizer)  # an unknown one is said now, not after the measurement
    check_options(candidates, device, how)
    described = [identify(candidate) for candidate in candidates]
    if any(candidate.is_coreml for candidate in candidates):
        device.libraries = ("coremltools",)
    machine = device.describe()
    for candidate in candidates:
        check_target(candidate, machine, device.name)
    places = [place_for(candidate, device) for candidate in candidates]
    common = {
        "format": FORMAT,
        "clips_hash": clips_hash(clips),
        "audio_s": send(candidates, device, clips),
        "device": {**machine, "name": device.name},
        "emulated": machine["emulated"],
    }
    # on cores of its own choice, a runner takes as many threads as there are
    threads = how.threads or (None if how.pin else device_cores(machine))
    how = replace(how, threads=threads, normalizer=normalizer)
    known = [common | found for found in described]
    return Prepared(candidates, device, places, clips, how, known)


def measure(
    ready: Prepared,
    progress: Callable[[str], None] = lambda _: None,
    checkpoints: Mapping[Path, float] | None = None,
) -> list[dict]:
    """The results of a device's candidates, which take turns.

    `checkpoints` are the word error rates of checkpoint_wers.
    """
    firsts = [first_load(ready, index, progress) for index in range(len(ready.candidates))]
    answers = take_turns(ready, progress)
    lasting = [sustain(ready, index, progress) for index in range(len(answers))]
    after = ready.device.describe().get("temperature_c", "unavailable")
    found = []
    for known, first, rounds, last in zip(ready.known, firsts, answers, lasting, strict=True):
        machine = {"device": {**known["device"], "temperature_after_c": after}}
        words = accuracy(ready.clips, rounds[-1]["texts"], str(ready.how.normalizer))
        result = known | machine | joined(ready, rounds, last, known["audio_s"]) | first | words
        found.append(result | judged(result, ready.how, rounds, last))
    add_checkpoint_wers(ready.candidates, found, checkpoints or {})
    return [validate(result) for result in found]


def checkpoint_wers(
    ready: Prepared, progress: Callable[[str], None] = lambda _: None
) -> dict[Path, float]:
    """The word error rates of the rivals' checkpoints, by transformers in fp32 on this machine,
    once and untimed. A checkpoint that transformers runs as a candidate is left out."""
    rivals = [candidate for candidate in ready.candidates if candidate.rival is not None]
    measured = {candidate.source for candidate in rivals if candidate.rival == REFERENCE}
    found = {}
    for source in dict.fromkeys(candidate.source for candidate in rivals):
        if source not in measured:
            progress(f"{source.name}: its own texts, in {REFERENCE}")
            found[source] = checkpoint_wer(source, ready.clips, str(ready.how.normalizer))
    return found


def checkpoint_wer(checkpoint: Path, clips: Sequence[Clip], normalizer: str) -> float:
    """The word error rate of a checkpoint in transformers, each clip in its own language."""
    with open_device("local") as device:
        with tempfile.TemporaryDirectory() as folder:
            write_clips(clips, Path(folder))
            device.push(Path(folder), "clips")
        words = [str(checkpoint.resolve()), "clips/clips.json"]
        words += ["--threads", str(device_cores(device.describe()))]
        program = RIVALS[REFERENCE].program
        answer = run_runner(device, words, program, OURS, ROUND_S, python=sys.executable)
    return float(accuracy(clips, answer["texts"], normalizer)["wer"])


def add_checkpoint_wers(
    candidates: Sequence[Candidate], results: Sequence[dict], checkpoints: Mapping[Path, float]
) -> None:
    """Set `checkpoint_wer` of each rival whose checkpoint's is known."""
    pairs = list(zip(candidates, results, strict=True))
    own = {one.source: result["wer"] for one, result in pairs if one.rival == REFERENCE}
    known = {**checkpoints, **own}
    for candidate, result in pairs:
        if candidate.rival is not None and candidate.source in known:
            result["checkpoint_wer"] = known[candidate.source]


def by_units(candidates: Sequence[Candidate], units: tuple[str, ...]) -> list[Candidate]:
    """The candidates, each Core ML artifact once for all units that are named."""
    units = tuple(UNITS) if units == EACH else tuple(dict.fromkeys(units))
    if unknown := next((name for name in units if name not in UNITS), None):
        raise Problem(
            f"compute units {unknown!r} are not known",
            hint=f"name one or more of {', '.join(UNITS)}, or each",
        )
    if units and not any(candidate.is_coreml for candidate in candidates):
        raise Problem(
            f"compute units {units[0]!r} are asked for, and there is no Core ML artifact to bench",
            hint="leave them out, or name one that was exported with `--target coreml`",
        )
    found: list[Candidate] = []
    for candidate in candidates:
        own = units if candidate.is_coreml else ()
        found += [replace(candidate, compute_units=name) for name in own] or [candidate]
    return found


def take_turns(ready: Prepared, progress: Callable[[str], None]) -> list[list[dict[str, Any]]]:
    """Every candidate's rounds."""
    how = ready.how
    answers: list[list[dict[str, Any]]] = [[] for _ in ready.candidates]
    turn = 0
    while turn < how.repeats or (turn < MOST_ROUNDS and not all(map(enough(how), answers))):
        for index, candidate in enumerate(ready.candidates):
            most = f"up to {MOST_ROUNDS}" if how.interval else how.repeats
            progress(f"{candidate.label}: round {turn + 1} of {most}")
            answers[index].append(run_round(ready, index))
        turn += 1
    return answers


def enough(how: Measuring) -> Callable[[list[dict[str, Any]]], bool]:
    """Whether some rounds tell the median as precisely as was asked for."""
    share = how.interval
    if share is None:
        return lambda rounds: True
    return lambda rounds: watched.narrow(
        [time for one in rounds for time in one["end_to_end_s"]], len(rounds), share
    )


def joined(
    ready: Prepared, rounds: list[dict[str, Any]], lasting: dict[str, Any] | None, audio_s: float
) -> dict[str, Any]:
    """What a candidate's processes say together."""
    return {
        "rounds": len(rounds),
        "threads": ready.how.threads,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **merge(rounds),
        **watched.fields(rounds, lasting, audio_s, len(ready.clips)),
    }


def judged(
    result: dict[str, Any],
    how: Measuring,
    rounds: Sequence[dict[str, Any]],
    lasting: dict[str, Any] | None,
) -> dict[str, Any]:
    """Whether the run was disturbed; a sustained run may well have grown slow."""
    samples = [sample for answer in rounds for sample in samples_of(answer)]
    debug = [sign for answer in rounds for sign in answer.get("debug", [])]
    return {
        "unstable_because": watched.unstable_because(result, samples, debug),
        "notes": watched.notes(result, samples_of(lasting or {}), how.interval),
    }


def samples_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = answer.get("telemetry", {}).get("samples", [])
    return found


def check_options(candidates: Sequence[Candidate], device: Device, how: Measuring) -> None:
    """Raise Problem for what cannot be measured so, before anybody has to wait."""
    for name in device.lacks:
        if getattr(how, name):
            option = f"--{name.replace('_', '-')}"
            raise Problem(
                f"{option} is given, and a {device.name} cannot do that",
                hint=f"leave {option} out",
            )
    for candidate in candidates:
        if "compute_units" in device.lacks and candidate.is_coreml:
            raise Problem(
                f"{candidate.source} is for Core ML, which a {device.name} does not run",
                hint="export it with `--target onnx`",
            )
    if how.minutes is not None and not 0 < how.minutes <= MOST_MINUTES:
        raise Problem(
            f"--minutes {how.minutes:g} is not between 0 and {MOST_MINUTES}",
            hint="ten minutes are enough to warm a board through",
        )
    if how.interval is not None and not 0 < how.interval < 1:
        raise Problem(
            f"--interval {how.interval:g} is no share of the median", hint="write 2% or 0.02"
        )
    given = {"--minutes": how.minutes, "--governor": how.governor, "--pin": how.pin}
    asked = [name for name, value in given.items() if value is not None]
    rivals = [candidate.label for candidate in candidates if candidate.rival is not None]
    if asked and rivals:
        raise Problem(
            f"{' and '.join(asked)}: for artifacts, and {rivals[0]} is run by another program",
            hint="bench it in a call of its own, or leave that out",
        )


def identify(candidate: Candidate) -> dict[str, Any]:
    """The fields of a result that are known before anything runs."""
    source = Path(candidate.source)
    common = {"name": candidate.label, "rival": candidate.rival}
    if candidate.rival is None:
        manifest = verify(source)
        return common | {
            "artifact_hash": artifact_hash(manifest),
            "artifact_bytes": folder_bytes(source),
            "precision": manifest["precision"],
            "parameters": manifest["parameters"],
            "macs": manifest["macs"],
            **({"compute_units": candidate.compute_units} if candidate.compute_units else {}),
        }
    check_rival(candidate)
    form = candidate.form or source
    return common | {
        "artifact_hash": folder_hash(form),
        "artifact_bytes": folder_bytes(form),
        "precision": RIVALS[candidate.rival].precision,
        "parameters": count_parameters(source),
        "macs": None,
    }


def check_rival(candidate: Candidate) -> None:
    """Raise Problem for a rival or a checkpoint that is not known."""
    if candidate.rival not in RIVALS:
        raise Problem(
            f"there is no rival {candidate.rival!r}", hint=f"choose one of {', '.join(RIVALS)}"
        )
    if not Path(candidate.source).is_dir():
        raise Problem(
            f"{candidate.source}: no such directory", hint="name a local checkpoint directory"
        )


def in_own_form(candidate: Candidate, folder: Path, say: Callable[[str], None]) -> Candidate:
    """A rival with its checkpoint as it reads it, written into a folder."""
    check_rival(candidate)
    refuse_slim(candidate.source)
    kind = RIVALS[str(candidate.rival)]
    if kind.foreign:
        say(f"{candidate.label}: writing its model")
    order = Order(Path(candidate.source).resolve(), folder, interpreter())
    return replace(candidate, form=kind.prepare(order))


def place_for(candidate: Candidate, device: Device) -> Device:
    """The device with what a candidate's program needs; raises where that is not to be had."""
    if candidate.rival is None:
        return device
    kind, local = RIVALS[candidate.rival], device.name == "local"
    if kind.foreign:
        if local:
            refuse_missing([candidate.rival], interpreter(), "leave it out")
        return device.having(kind.packages, interpreter())
    if not local:
        raise Problem(
            f"the rival {candidate.rival} runs on this machine only, not on {device.name}",
            hint="bench the rival with `--device local`",
        )
    return device


def check_target(candidate: Candidate, machine: dict[str, Any], name: str) -> None:
    """Raise Problem for packages of Core ML where that is not to be had."""
    kernel = str(machine.get("kernel"))
    if candidate.is_coreml and not kernel.startswith("Darwin"):
        raise Problem(
            f"{candidate.source} is for Core ML, which is on Apple's systems only, and {name} runs "
            f"{kernel}; the time that an interpreter takes is none of its own",
            hint="add --device m1 and --host with a Mac, or export with `--target onnx` for "
            f"{name}",
        )


def send(candidates: Sequence[Candidate], device: Device, clips: Sequence[Clip]) -> float:
    """Push runner, artifacts, rivals and clips; return the clips' seconds of sound."""
    device.push(RUNNER, "runner")
    for index, candidate in enumerate(candidates):
        if candidate.rival is None:
            device.push(Path(candidate.source), f"artifacts/{index}")
        elif RIVALS[candidate.rival].foreign:
            send_program(RIVALS[candidate.rival], device)
            device.push(candidate.form or Path(candidate.source), f"artifacts/{index}")
    with tempfile.TemporaryDirectory() as folder:
        audio_s = write_clips(clips, Path(folder))
        device.push(Path(folder), "clips")
    return audio_s


def write_clips(clips: Sequence[Clip], folder: Path) -> float:
    """Write clips as 16 kHz float WAV files, their list, clips.json, and the code of what is
    spoken in each, languages.json, which prompts the model; return their seconds."""
    names = [f"{index:05}.wav" for index in range(len(clips))]
    samples = 0
    for clip, name in zip(clips, names, strict=True):
        pcm = clip.pcm()
        samples += len(pcm)
        (folder / name).write_bytes(float_wav(pcm))
    (folder / "clips.json").write_text(json.dumps(names), encoding="utf-8")
    languages = [language_code(clip.lang) for clip in clips]
    (folder / "languages.json").write_text(json.dumps(languages), encoding="utf-8")
    return samples / SAMPLING_RATE


def float_wav(pcm: np.ndarray) -> bytes:
    """Samples as a WAV file of 32-bit floats, always of the same bytes: libsndfile's hold the time
    at which they were written, and would be copied to a device anew for every bench."""
    data = pcm.astype("<f4").tobytes()
    wave = struct.pack("<HHIIHHH", 3, 1, SAMPLING_RATE, 4 * SAMPLING_RATE, 4, 32, 0)
    chunks = {b"fmt ": wave, b"fact": struct.pack("<I", len(pcm)), b"data": data}
    body = b"".join(name + struct.pack("<I", len(chunk)) + chunk for name, chunk in chunks.items())
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def device_cores(machine: dict[str, Any]) -> int:
    """All cores that the device lets a process use; one where it cannot say."""
    cores = machine.get("cores")
    return cores if isinstance(cores, int) else 1


def of_units(candidate: Candidate) -> list[str]:
    return ["--compute-units", candidate.compute_units] if candidate.compute_units else []


def first_load(
    ready: Prepared, index: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """What a Core ML artifact costs before its first word, and only then: the fields `compile_s`
    and `cold_load_s`. What is compiled there is what the rounds load."""
    candidate, device = ready.candidates[index], ready.device
    if not candidate.is_coreml:
        return {}
    progress(f"{candidate.label}: compiling, and loading for the first time")
    words = ["compile", f"artifacts/{index}", *of_units(candidate)]
    answer = run_runner(device, words, timeout_s=ROUND_S)
    found: dict[str, Any] = {name: answer.get(name) for name in ("compile_s", "cold_load_s")}
    if wrong := [name for name, times in found.items() if not are_seconds(times)]:
        raise unusable(device, wrong)
    found = {name: times for name, times in found.items() if times}
    told = ", ".join(f"{name} {sum(times):.2f}" for name, times in found.items())
    progress(f"{candidate.label}: {told}")
    return found


def run_round(ready: Prepared, index: int) -> dict[str, Any]:
    """One process of one candidate: every clip once."""
    candidate, device = ready.candidates[index], ready.places[index]
    options = ["clips/clips.json", "--repeats", "1", *threads_of(ready.how)]
    artifact = f"artifacts/{index}"
    if candidate.rival is None:
        options += [*of_units(candidate), *runner_options(ready.how)]
        answer = run_runner(device, ["bench", artifact, *options], timeout_s=ROUND_S)
    else:
        kind = RIVALS[candidate.rival]
        model, env = artifact, OURS | {"PYTHONPATH": CODE} | kind.env
        if not kind.foreign:  # it is on this machine
            model, env = str(Path(candidate.source).resolve()), OURS
        answer = run_runner(device, [model, *options], kind.program, env, ROUND_S)
    return checked(answer, device, len(ready.clips))


def threads_of(how: Measuring) -> list[str]:
    return ["--threads", str(how.threads)] if how.threads else []


def runner_options(how: Measuring) -> list[str]:
    """Those that only the runner knows."""
    given = {"--governor": how.governor, "--pin": how.pin}
    return [word for name, value in given.items() if value is not None for word in (name, value)]


def sustain(ready: Prepared, index: int, progress: Callable[[str], None]) -> dict[str, Any] | None:
    """One more process of a candidate, for the minutes that are asked for."""
    how, label = ready.how, ready.candidates[index].label
    if how.minutes is None:
        return None
    progress(f"{label}: {how.minutes:g} minutes on end")
    options = ["clips/clips.json", "--minutes", f"{how.minutes:g}", *threads_of(how)]
    options += [*of_units(ready.candidates[index]), *runner_options(how)]
    words = ["bench", f"artifacts/{index}", *options]
    answer = run_runner(ready.device, words, timeout_s=ROUND_S + 60 * how.minutes)
    found, wrong = watched.checked(answer)
    wrong += [] if "sustained" in found or wrong else ["sustained"]
    if wrong:
        raise unusable(ready.device, wrong)
    return found


def checked(answer: dict[str, Any], device: Device, clips: int) -> dict[str, Any]:
    """A round's answer, if it is one: it comes from another machine, and is data."""
    times = {stage: answer.get(stage) for stage in STAGES}
    wrong = [stage for stage, found in times.items() if not are_seconds(found)]
    if "end_to_end_s" not in wrong and len(answer["end_to_end_s"]) != clips:
        wrong.append("end_to_end_s")
    texts, share = answer.get("texts"), answer.get("mel_share")
    if not (isinstance(texts, list) and len(texts) == clips and all_are(texts, str)):
        wrong.append("texts")
    peaks = {name: answer.get(name) for name in PEAKS if name in answer or name == PEAKS[0]}
    wrong += [
        n for n, peak in peaks.items() if not (isinstance(peak, int) or peak == "unavailable")
    ]
    if not (share is None or (isinstance(share, float) and 0 <= share <= 1)):
        wrong.append("mel_share")
    versions = answer.get("versions")
    if not (isinstance(versions, dict) and all_are(versions.values(), str)):
        wrong.append("versions")
    if not isinstance(answer.get("build", ""), str):
        wrong.append("build")
    beside, more = watched.checked(answer)
    if wrong + more:
        raise unusable(device, wrong + more)
    return answer | beside | {"versions": clean(versions)}


def unusable(device: Device, wrong: Sequence[str]) -> Problem:
    return Problem(
        f"{device.name}: the runner's answer has no usable {', '.join(wrong)}",
        hint="bench again; if it stays so, something else answers there than the runner",
    )


def are_seconds(found: Any) -> bool:
    """Whether it is a list of times."""
    return isinstance(found, list) and all(
        isinstance(time, int | float) and 0 <= time < MOST_S for time in found
    )


def all_are(found: Iterable[Any], kind: type) -> bool:
    return all(isinstance(value, kind) for value in found)


def merge(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The samples of all rounds, one behind the other, and what they say together."""
    samples = {stage: [time for answer in rounds for time in answer[stage]] for stage in STAGES}
    peaks = {name: highest(rounds, name) for name in PEAKS if name in rounds[0]}
    shares = [answer["mel_share"] for answer in rounds if answer["mel_share"] is not None]
    last = rounds[-1]
    extra = {"parameters": last["parameters"]} if "parameters" in last else {}
    extra |= {"build": clean(last["build"])} if last.get("build") else {}
    return {
        **samples,
        **summaries(samples, len(rounds)),
        **extra,
        "mel_share": float(np.median(shares)) if shares else None,
        **peaks,
        "texts": rounds[-1]["texts"],
        "versions": {"edgewhisper": version("edgewhisper"), **rounds[-1]["versions"]},
    }


def highest(rounds: Sequence[dict[str, Any]], name: str) -> int | str:
    """The highest of the rounds' peaks, where any round could tell its own."""
    found = [answer.get(name, "unavailable") for answer in rounds]
    return max((peak for peak in found if isinstance(peak, int)), default=found[0])


def accuracy(clips: Sequence[Clip], texts: Sequence[str], normalizer: str) -> dict[str, Any]:
    """Error rates against the labels, and the word counts of each clip."""
    given = [clip.text for clip in clips], texts, normalizer, [clip.lang for clip in clips]
    counts = word_errors(*given)
    return {
        **score(*given).as_dict(),
        "clip_errors": [errors for errors, _ in counts],
        "clip_words": [words for _, words in counts],
    }
