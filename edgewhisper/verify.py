"""Whether an artifact is what it says: its files, its contract, and what it hears.

From the cheap to the dear, and each check only where the ones before have passed: the manifest and
the files' hashes; the graphs, read without running them; then, in a process of its own under limits
of memory and time, the graphs themselves on clips: the gate's, where these are named, or one short
clip. Nothing that a stranger sent is run before it was looked at, and no run can take this process
with it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gate import MOST_CLIPS, evenly
from benchmarks.gate_record import gate_again, same_clips, states_again
from benchmarks.metadata import folder_bytes
from benchmarks.program import OURS
from benchmarks.speech.clips import Clip, read_manifest
from benchmarks.speech.wav import write_clips
from devices.device import RUNNER, run_runner
from devices.local import LocalDevice
from devices.runner.decode.rules import AUTO, Rules
from devices.runner.engines import contract
from devices.runner.engines.graph_file import read_graph
from export import artifact
from export.onnx.graph import OPSETS
from export.problem import Problem

CHECKS = ("manifest", "files", "graphs", "contract", "gate")
TIMEOUT_S = 1800.0
BRANCHES = ("transformers", "single")
"""Layouts whose graphs have subgraphs: branches or a loop."""
MOST_IDS, MOST_TOKENS = 2**24, 2**12
"""Of vocabularies and texts; Whisper's are 51866 and 448. The runner reads the native layout's own
from its contract."""


@dataclass
class Report:
    """What was checked, in order; the letter of the check that failed, if one did."""

    rows: list[dict[str, str]] = field(default_factory=list)
    letter: Exception | None = None

    def as_dict(self) -> dict[str, Any]:
        told = {"error": str(self.letter), "hint": getattr(self.letter, "hint", "")}
        return {"ok": self.letter is None, "checks": self.rows} | (told if self.letter else {})


def verify(
    folder: Path,
    speech: Path | None = None,
    checkpoint: str | None = None,
    threads: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Report:
    """Check an artifact from end to end; the first thing that is wrong ends it.

    With `speech` the artifact's tokens are compared with those that its gate recorded of the same
    clips. With a checkpoint the gate is run anew against it, on the clips that come with
    EdgeWhisper where there is no `speech`. With neither, the gate is not run. Raises nothing that
    is about the artifact: that is in the report.
    """
    folder, report = Path(folder), Report()
    clips = None if speech is None else read_manifest(speech)
    found: dict[str, Any] = {}
    checks: dict[str, Callable[[], str]] = {
        "manifest": lambda: check_manifest(folder, found),
        "files": lambda: check_files(folder),
        "graphs": lambda: check_graphs(folder, found["manifest"]),
        "contract": lambda: run_graphs(folder, found, clips, checkpoint, threads, timeout_s),
        "gate": lambda: check_gate(folder, found, clips, checkpoint),
    }
    for name, check in checks.items():
        if report.letter is not None:
            report.rows.append({"check": name, "result": "not reached", "found": ""})
            continue
        if name == "gate" and clips is None and checkpoint is None:
            found_of = {"result": "not asked", "found": not_asked(found["manifest"])}
            report.rows.append({"check": name, **found_of})
            continue
        try:
            report.rows.append({"check": name, "result": "ok", "found": check()})
        except Exception as error:
            if not hasattr(error, "hint"):
                raise
            report.letter = error
            report.rows.append({"check": name, "result": "failed", "found": str(error)})
    return report


def check_manifest(folder: Path, found: dict[str, Any]) -> str:
    told = contract.read_json(folder / artifact.MANIFEST)
    if isinstance(told, dict) and told.get("layout", "native") in contract.LAYOUTS.values():
        told = contract.read_manifest(folder)
    else:
        told = read_other(folder)
    found["manifest"] = told
    return f"format {told['format']}, {told.get('layout', 'native')}, {told.get('precision')}"


def read_other(folder: Path) -> dict[str, Any]:
    """The manifest of another layout than the native one, as far as its loop goes by it."""
    manifest = artifact.read_manifest(folder)
    told = contract.Told(folder / artifact.MANIFEST, manifest)
    kind = (manifest["layout"], told.at("precision").text())
    contract.check_file_list(told, artifact.needed_files(*kind))
    for name in artifact.graph_files(*kind):
        contract.check_graph(told.at("contract").at(name))
    contract.check_audio(told.at("audio"))
    contract.check_decoding(told.at("decoding"), MOST_IDS, MOST_TOKENS)
    contract.check_facts(told)
    return manifest


def check_files(folder: Path) -> str:
    files = artifact.verify(folder)["files"]
    return f"{len(files)} files, {folder_bytes(folder) / 1e6:.2f} MB, every SHA-256 as written"


def check_graphs(folder: Path, manifest: dict[str, Any]) -> str:
    """What the graphs ask for, read from their bytes, and the versions of their operators."""
    if manifest.get("layout") in artifact.PACKAGED:
        return check_packages(folder)
    names = [name for name in manifest["files"] if name.endswith(".onnx")]
    branches = manifest.get("layout") in BRANCHES
    kinds, constants = set(), 0
    for name in names:
        parts = read_graph(folder / name, manifest["files"].keys(), subgraphs=branches)
        check_opsets(folder / name, parts.opsets)
        kinds |= {node.kind for node in parts.nodes}
        constants += len(parts.constants)
    return f"{len(names)} graphs of {len(kinds)} kinds of operators, {constants} constants"


def check_packages(folder: Path) -> str:
    """Core ML packages are read in a process of its own: their reader is not ours."""
    from edgewhisper.coreml import read_packages

    packages = read_packages(folder).values()
    kinds = {kind for package in packages for kind in package["operations"]}
    newest = max(package["specification_version"] for package in packages)
    return f"{len(packages)} packages of {len(kinds)} kinds of operators, specification {newest}"


def check_opsets(path: Path, opsets: dict[str, int]) -> None:
    """Of the versions that the installed onnx knows; newer operators may mean something else."""
    from onnx import defs

    for domain, version in opsets.items():
        newest = OPSETS.get(domain, 1) if domain.startswith("com.") else defs.onnx_opset_version()
        if not 1 <= version <= newest:
            raise Problem(
                f"{path}: version {version} of the operators {domain or 'ai.onnx'!r}; versions 1 "
                f"to {newest} are known here",
                hint="use the EdgeWhisper version that wrote it, or export the checkpoint again",
            )


def not_asked(manifest: dict[str, Any]) -> str:
    """Why there is no comparison, and what the manifest says of the one at the export."""
    gate = manifest.get("gate") or {}
    result = str(gate.get("result", "unknown" if gate else "not run"))[:MOST_TEXT]
    return (
        "add --speech with the clips of the gate, or --checkpoint with the model, to compare texts;"
        f" the manifest says of the gate at the export: {result}"
    )


MOST_TEXT = 20


def clips_to_run(
    manifest: dict[str, Any], clips: list[Clip] | None, checkpoint: str | None
) -> list[Clip]:
    """Those that the gate heard; where nothing is to be compared with its record, one."""
    if clips is None or checkpoint is not None:
        return sample_clips()
    return same_clips(manifest.get("gate") or {}, clips)


def sample_clips() -> list[Clip]:
    """One short clip, to run the graphs on."""
    from edgewhisper.pipeline import SPEECH

    return read_manifest(SPEECH / "test.jsonl")[:1]


def run_graphs(
    folder: Path,
    found: dict[str, Any],
    named: list[Clip] | None,
    checkpoint: str | None,
    threads: int | None,
    timeout_s: float,
) -> str:
    """The runner's own check, in a process of its own; its answer is kept for the gate. Other
    layouts go through our loops of their runtimes."""
    clips = clips_to_run(found["manifest"], named, checkpoint)
    native = found["manifest"].get("layout", "native") == "native"
    with LocalDevice() as device:
        device.push(RUNNER, "runner")
        with tempfile.TemporaryDirectory() as sounds:
            write_clips(clips, Path(sounds))
            device.push(Path(sounds), "clips")
        words = [str(folder.resolve()), "clips/clips.json"]
        words += ["--threads", str(threads)] if threads else []
        if native:
            found["answer"] = run_runner(device, ["check", *words], timeout_s=timeout_s)
        else:
            found["answer"] = run_runner(
                device, words, "benchmarks.reference_runtimes", OURS, timeout_s
            )
    sides = found["manifest"]["contract"].values()
    tensors = sum(len(side["inputs"]) + len(side["outputs"]) for side in sides)
    return f"{tensors} inputs and outputs have the names, shapes and types of the manifest"


def check_gate(
    folder: Path, found: dict[str, Any], named: list[Clip] | None, checkpoint: str | None
) -> str:
    manifest = found["manifest"]
    if checkpoint is not None:
        return gate_anew(folder, manifest, named, checkpoint)
    clips = clips_to_run(manifest, named, checkpoint)
    if not manifest.get("gate"):
        raise Problem(
            f"{folder}: the artifact has passed no gate",
            hint="give --checkpoint to run it now, or export the checkpoint again",
        )
    answer = found["answer"]
    if "states" in answer:
        return states_again(manifest["gate"], clips, answer["states"])
    return gate_again(manifest["gate"], clips, answer["tokens"], answer["texts"])


def gate_anew(
    folder: Path, manifest: dict[str, Any], named: list[Clip] | None, checkpoint: str
) -> str:
    """The whole gate, as export runs it, against the checkpoint that the artifact is said to be
    of."""
    from edgewhisper.pipeline import default_speech, gate, load_for
    from export.prompt import prompt_ids
    from export.shrink import layer_shapes

    audio, layout = manifest["audio"], manifest.get("layout", "native")
    window_s = audio["window_samples"] / audio["sampling_rate"]
    model, processor, _ = load_for(layout, checkpoint, window_s, prompt_language(manifest))
    if layer_shapes(model) != manifest["layers"]:
        raise Problem(
            f"{folder}: its layers are not those of {checkpoint}",
            hint="name the checkpoint that the artifact was exported from",
        )
    if prompt_ids(model.generation_config) != manifest["decoding"]["prompt"]:
        raise Problem(
            f"{folder}: its prompt {manifest['decoding']['prompt']} is not the checkpoint's, "
            f"{prompt_ids(model.generation_config)}",
            hint="name the checkpoint that the artifact was exported from",
        )
    if named is None:
        clips = evenly(read_manifest(default_speech(model.config.vocab_size)), MOST_CLIPS)
    else:
        clips = same_clips(manifest.get("gate") or {}, named)
    figures = gate(folder, manifest, model, processor, clips)
    return (
        f"anew: {figures['identical_tokens']:.0%} of {figures['clips']} clips get the checkpoint's "
        f"tokens; WER {100 * figures['artifact_wer']:.2f} %, checkpoint "
        f"{100 * figures['checkpoint_wer']:.2f} %"
    )


def prompt_language(manifest: dict[str, Any]) -> str | None:
    """The language that prompts an artifact, "auto" where it detects one; None where its model
    knows English only."""
    rules = Rules.from_manifest(manifest["decoding"])
    return AUTO if rules.auto else rules.language
