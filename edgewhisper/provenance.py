"""compression.json: the record of how a checkpoint was made, and which model it was made from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.metadata import clips_hash, file_hash
from benchmarks.speech.clips import Clip
from edgewhisper import whisper
from edgewhisper.shipped import DEFAULT_MODEL, read_config
from export.artifact import read_manifest as read_artifact
from export.problem import Problem
from export.versions import versions

if TYPE_CHECKING:
    from edgewhisper.compress.context import Context
    from edgewhisper.job import Job

HASHED = (
    *("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"),
    *("model.safetensors.index.json", "model-*.safetensors"),  # weights in shards
    "model.bin",  # CTranslate2
    *("adapter_config.json", "adapter_model.safetensors"),  # LoRA
)
"""Patterns of the files that identify a checkpoint directory."""


def record_of(
    job: Job, context: Context, after: dict[str, Any], values: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of compression.json.

    `after` are the measurements of the compressed model. `values` are the values that a search
    chose in place of the recipe's own.
    """
    recipe = {"name": job.recipe.name, "text": job.recipe.text}
    timestamps = None
    if context.timed is not None:
        timestamps = {"judged_by": context.timed.source, "clips": len(context.timed.clips)}
    return {
        "format": 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recipe": recipe | ({"values": values} if values else {}),
        "base": base_record(job.source, getattr(job.dense.config, "_commit_hash", None)),
        "speech": {"train": clips_record(context.train), "dev": clips_record(context.dev)}
        | {name: value for name, value in job.speech.items() if value},
        "seed": context.seed,
        "language": getattr(job.dense.generation_config, "language", None),
        "versions": versions(),
        "before": job.before,
        "after": after,
        "timestamps": timestamps,
        "steps": context.record,
    }


def base_record(source: str, revision: str | None) -> dict[str, Any]:
    """Return the entry "base": the checkpoint before compression. Of a path, only the last part is
    recorded."""
    return {
        "source": Path(source).absolute().name if Path(source).exists() else source,
        "revision": revision,
        "files": file_hashes(Path(source)),
        "compression": whisper.compression_record(source),
    }


def file_hashes(checkpoint: Path) -> dict[str, str]:
    """Return file name -> SHA-256 for the HASHED files in a directory, or for a .pt file itself.

    Empty for a size name or a Hub ID: the revision identifies these.
    """
    if checkpoint.is_file():
        return {checkpoint.name: file_hash(checkpoint)}
    files = [path for pattern in HASHED for path in sorted(checkpoint.glob(pattern))]
    return {path.name: file_hash(path) for path in files if path.is_file()}


def clips_record(clips: Sequence[Clip]) -> dict[str, Any]:
    """Return the number of clips and a hash of their audio and texts."""
    return {"clips": len(clips), "sha256": clips_hash(clips)}


def embedded_of(artifacts: Sequence[Path]) -> Path:
    """Return the embedded model. Raises Problem if an artifact was made from another model."""
    for artifact in artifacts:
        if not is_of_embedded(Path(artifact)):
            raise Problem(
                f"--rival: {artifact} was not made from the embedded digits model, and the rivals "
                "need the uncompressed model that it was made from",
                hint="add --baseline with that model, such as --baseline tiny.en",
            )
    return DEFAULT_MODEL


def is_of_embedded(artifact: Path) -> bool:
    """Return whether an artifact was made from the embedded model.

    Compares the hashes of the first checkpoint in its record, or config.json without a record.
    """
    if record := read_artifact(artifact).get("provenance"):
        return first_files(record) == file_hashes(DEFAULT_MODEL)
    return read_config(artifact) == read_config(DEFAULT_MODEL)


def first_files(record: Any) -> Any:
    """Return the file hashes of the checkpoint that the first of several compressions read."""
    match record:
        case {"base": {"compression": {"base": _} as earlier}}:
            return first_files(earlier)
        case {"base": {"files": files}}:
            return files
    return None
