"""Verify an artifact: its manifest, files, graphs, contract and gate.

The checks run from cheap to expensive, and the first failure ends them: the manifest; the hashes
of the files; the graphs, read without running them; the graphs' inputs and outputs, run on the
gate's clips if these are given, otherwise on one short clip; and the transcripts. Graphs run in a
separate process with limits of memory and time, and only after they were inspected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gate import MOST_CLIPS, evenly
from benchmarks.gate_record import gate_again, same_clips, states_again
from benchmarks.metadata import folder_bytes
from benchmarks.program import OURS
from benchmarks.speech.clips import Clip, read_manifest
from benchmarks.speech.wav import push_clips
from devices.device import RUNNER, run_runner, thread_option
from devices.local import LocalDevice
from devices.runner.artifact import manifest as contract
from devices.runner.artifact.graph_file import read_graph
from devices.runner.artifact.manifest import AUTO
from devices.runner.decode.rules import Rules
from export import artifact
from export.layouts import LAYOUTS, graph_files, layouts_of, needed_files
from export.onnx.graph import OPSETS
from export.problem import Problem

CHECKS = ("manifest", "files", "graphs", "contract", "gate")
TIMEOUT_S = 1800.0
"""Time limit for running the graphs, in seconds."""
BRANCHES = tuple(name for name, layout in LAYOUTS.items() if layout.subgraphs)
"""Layouts whose graphs may have subgraphs (branches or loops)."""
MOST_IDS, MOST_TOKENS = 2**24, 2**12
"""Largest accepted vocabulary and text length; Whisper's are 51866 and 448. For the native layout,
the runner reads them from the contract."""


@dataclass
class Report:
    """The results of the checks in order, and the error of the failed check, if any."""

    rows: list[dict[str, str]] = field(default_factory=list)
    error: Exception | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form of the report."""
        error = {"error": str(self.error), "hint": getattr(self.error, "hint", "")}
        return {"ok": self.error is None, "checks": self.rows} | (error if self.error else {})


def verify(
    folder: Path,
    speech: Path | None = None,
    checkpoint: str | None = None,
    threads: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Report:
    """Verify an artifact and return a report. The first failed check ends the verification.

    With `speech`, the artifact's tokens are compared with those that the gate recorded for the same
    clips. With `checkpoint`, the gate is repeated against it, on `speech` or on the clips shipped
    with EdgeWhisper. With neither, the gate is not checked. Errors of the artifact are in the
    report and not raised.
    """
    folder, report = Path(folder), Report()
    clips = None if speech is None else read_manifest(speech)
    results: dict[str, Any] = {}  # the manifest and the runner's answer, for later checks
    checks: dict[str, Callable[[], str]] = {
        "manifest": lambda: check_manifest(folder, results),
        "files": lambda: check_files(folder),
        "graphs": lambda: check_graphs(folder, results["manifest"]),
        "contract": lambda: run_graphs(folder, results, clips, checkpoint, threads, timeout_s),
        "gate": lambda: check_gate(folder, results, clips, checkpoint),
    }
    for name, check in checks.items():
        if report.error is not None:
            report.rows.append({"check": name, "result": "not reached", "found": ""})
            continue
        if name == "gate" and clips is None and checkpoint is None:
            reason = not_asked(results["manifest"])
            report.rows.append({"check": name, "result": "not asked", "found": reason})
            continue
        try:
            report.rows.append({"check": name, "result": "ok", "found": check()})
        except Exception as error:
            if not hasattr(error, "hint"):
                raise
            report.error = error
            report.rows.append({"check": name, "result": "failed", "found": str(error)})
    return report


def check_manifest(folder: Path, results: dict[str, Any]) -> str:
    manifest = contract.read_json(folder / artifact.MANIFEST)
    if isinstance(manifest, dict) and manifest.get("layout", "native") in contract.LAYOUTS.values():
        manifest = contract.read_manifest(folder)
    else:
        manifest = read_other(folder)
    results["manifest"] = manifest
    layout = manifest.get("layout", "native")
    return f"format {manifest['format']}, {layout}, {manifest.get('precision')}"


def read_other(folder: Path) -> dict[str, Any]:
    """Return the manifest of a layout other than native, after checking the entries in use."""
    manifest = artifact.read_manifest(folder)
    entries = contract.Field(folder / artifact.MANIFEST, manifest)
    kind = (manifest["layout"], entries.at("precision").text())
    contract.check_file_list(entries, needed_files(*kind))
    for name in graph_files(*kind):
        contract.check_graph(entries.at("contract").at(name))
    contract.check_audio(entries.at("audio"))
    contract.check_decoding(entries.at("decoding"), MOST_IDS, MOST_TOKENS)
    contract.check_facts(entries)
    return manifest


def check_files(folder: Path) -> str:
    files = artifact.verify(folder)["files"]
    return f"{len(files)} files, {folder_bytes(folder) / 1e6:.2f} MB, all SHA-256 match"


def check_graphs(folder: Path, manifest: dict[str, Any]) -> str:
    """Read the graphs without running them, and check the versions of their operators."""
    if manifest.get("layout") in layouts_of("coreml"):
        return check_packages(folder)
    files = [folder / name for name in manifest["files"]]
    graphs = [path for path in files if path.suffix == ".onnx"]
    branches = manifest.get("layout") in BRANCHES
    kinds, constants = set(), 0
    for graph in graphs:
        parts = read_graph(graph, files, subgraphs=branches)
        check_opsets(graph, parts.opsets)
        kinds |= {node.kind for node in parts.nodes}
        constants += len(parts.constants)
    return f"{len(graphs)} graphs with {len(kinds)} kinds of operators, {constants} constants"


def check_packages(folder: Path) -> str:
    """Read Core ML packages in a separate process, because coremltools parses the files."""
    from edgewhisper.coreml import read_packages

    packages = read_packages(folder).values()
    kinds = {kind for package in packages for kind in package["operations"]}
    newest = max(package["specification_version"] for package in packages)
    return f"{len(packages)} packages with {len(kinds)} kinds of operators, specification {newest}"


def check_opsets(path: Path, opsets: dict[str, int]) -> None:
    """Raise Problem for operator versions newer than the installed onnx, which may differ."""
    from onnx import defs

    for domain, version in opsets.items():
        newest = OPSETS.get(domain, 1) if domain.startswith("com.") else defs.onnx_opset_version()
        if not 1 <= version <= newest:
            raise Problem(
                f"{path}: version {version} of the operators {domain or 'ai.onnx'!r}; versions 1 "
                f"to {newest} are supported",
                hint="use the EdgeWhisper version that wrote it, or export the checkpoint again",
            )


def not_asked(manifest: dict[str, Any]) -> str:
    """Return why the gate is not checked, and the result of the gate at the export."""
    gate = manifest.get("gate") or {}
    result = str(gate.get("result", "unknown" if gate else "not run"))[:MOST_TEXT]
    return (
        "add --speech with the clips of the gate, or --checkpoint with the model, to compare texts;"
        f" result of the gate at the export: {result}"
    )


MOST_TEXT = 20
"""Characters of the gate's result that are shown."""


def clips_to_run(
    manifest: dict[str, Any], clips: list[Clip] | None, checkpoint: str | None
) -> list[Clip]:
    """Return the clips of the gate, or one clip if nothing is compared with the gate's record."""
    if clips is None or checkpoint is not None:
        return sample_clips()
    return same_clips(manifest.get("gate") or {}, clips)


def sample_clips() -> list[Clip]:
    """Return one short clip, on which the graphs are run."""
    from edgewhisper.shipped import SPEECH

    return read_manifest(SPEECH / "test.jsonl")[:1]


def run_graphs(
    folder: Path,
    results: dict[str, Any],
    named: list[Clip] | None,
    checkpoint: str | None,
    threads: int | None,
    timeout_s: float,
) -> str:
    """Run the graphs in a separate process and store the runner's answer for the gate. Other
    layouts than native are run by their reference runtimes (benchmarks/reference_runtimes)."""
    clips = clips_to_run(results["manifest"], named, checkpoint)
    native = results["manifest"].get("layout", "native") == "native"
    with LocalDevice() as device:
        device.push(RUNNER, "runner")
        push_clips(clips, device)
        arguments = [str(folder.resolve()), "clips/clips.json", *thread_option(threads)]
        if native:
            results["answer"] = run_runner(device, ["check", *arguments], timeout_s=timeout_s)
        else:
            results["answer"] = run_runner(
                device, arguments, "benchmarks.reference_runtimes", OURS, timeout_s
            )
    sides = results["manifest"]["contract"].values()
    tensors = sum(len(side["inputs"]) + len(side["outputs"]) for side in sides)
    return f"{tensors} inputs and outputs have the names, shapes and types of the manifest"


def check_gate(
    folder: Path, results: dict[str, Any], named: list[Clip] | None, checkpoint: str | None
) -> str:
    manifest = results["manifest"]
    if checkpoint is not None:
        return gate_anew(folder, manifest, named, checkpoint)
    clips = clips_to_run(manifest, named, checkpoint)
    if not manifest.get("gate"):
        raise Problem(
            f"{folder}: the artifact has passed no gate",
            hint="add --checkpoint to run it now, or export the checkpoint again",
        )
    answer = results["answer"]
    if "states" in answer:
        return states_again(manifest["gate"], clips, answer["states"])
    return gate_again(manifest["gate"], clips, answer["tokens"], answer["texts"])


def gate_anew(
    folder: Path, manifest: dict[str, Any], named: list[Clip] | None, checkpoint: str
) -> str:
    """Run the gate of the export again, against the checkpoint that the artifact was made from."""
    from edgewhisper.gating import gate
    from edgewhisper.pipeline import load_for
    from edgewhisper.shipped import default_speech
    from export.prompt import prompt_ids
    from export.shrink import layer_shapes

    audio, layout = manifest["audio"], manifest.get("layout", "native")
    window_s = audio["window_samples"] / audio["sampling_rate"]
    model, processor, _ = load_for(layout, checkpoint, window_s, prompt_language(manifest))
    if layer_shapes(model) != manifest["layers"]:
        raise Problem(
            f"{folder}: its layers are not those of {checkpoint}",
            hint="pass the checkpoint that the artifact was exported from",
        )
    if prompt_ids(model.generation_config) != manifest["decoding"]["prompt"]:
        raise Problem(
            f"{folder}: its prompt {manifest['decoding']['prompt']} is not the checkpoint's, "
            f"{prompt_ids(model.generation_config)}",
            hint="pass the checkpoint that the artifact was exported from",
        )
    if named is None:
        clips = evenly(read_manifest(default_speech(model.config.vocab_size)), MOST_CLIPS)
    else:
        clips = same_clips(manifest.get("gate") or {}, named)
    figures = gate(folder, manifest, model, processor, clips)
    return (
        f"repeated: {figures['identical_tokens']:.0%} of {figures['clips']} clips get the "
        f"checkpoint's tokens; WER {100 * figures['artifact_wer']:.2f} %, checkpoint "
        f"{100 * figures['checkpoint_wer']:.2f} %"
    )


def prompt_language(manifest: dict[str, Any]) -> str | None:
    """Return the language of an artifact's prompt: a code, "auto", or None if English-only."""
    rules = Rules.from_manifest(manifest["decoding"])
    return AUTO if rules.auto else rules.language
