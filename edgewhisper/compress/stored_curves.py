"""The measurements of `obs` on disk: a second run with another budget reuses them.

A file holds the curves of all branches and the transcripts of the calibration clips, as JSON. Its
name is a hash of the model, the clips and the options that determine them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.metadata import clips_hash
from edgewhisper.compress.branches import Branch
from edgewhisper.compress.context import Context
from edgewhisper.compress.curves import Curve, Part
from edgewhisper.resume import digest
from export.files import new_file

if TYPE_CHECKING:
    from benchmarks.speech.clips import Clip
    from edgewhisper.compress.obs import Options

FORMAT = 1
LATER = ("remove", "budget_of", "device", "precision", "decoder_weight")
"""Options that are used after the measurements only."""


@dataclass(frozen=True)
class Measured:
    """What one calibration measures."""

    parts: list[Part]
    texts: list[str]
    """The texts of the calibration clips that the decoder reads."""
    effect_clips: int
    """Number of held-out clips on which divergences were measured."""


def file_of(
    model: Any,
    calibration: "Sequence[Clip]",
    dev: "Sequence[Clip]",
    options: "Options",
    context: Context,
) -> Path | None:
    """Return the file of these measurements; None if the context has no directory for them."""
    if context.measured_dir is None:
        return None
    clips = [clips_hash(group) for group in (calibration, dev)]
    decisive = {name: v for name, v in asdict(options).items() if name not in LATER}
    shapes = getattr(model.config, "edgewhisper", None)
    prompts = [getattr(model.generation_config, name, None) for name in ("language", "task")]
    key = digest(model.state_dict(), [FORMAT, clips, decisive, shapes, prompts])
    return context.measured_dir / f"obs-{key[:16]}.json"


def read(file: Path | None) -> Measured | None:
    """Return stored measurements, or None if there are none that can be read."""
    if file is None or not file.is_file():
        return None
    try:
        record = json.loads(file.read_text("utf-8"))
        parts = [
            Part(
                Branch(*part["branch"]),
                {kind: Curve(**curve).checked() for kind, curve in part["curves"].items()},
            )
            for part in record["parts"]
        ]
        return Measured(parts, list(record["texts"]), int(record["effect_clips"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # damaged: it is measured again


def write(file: Path | None, measured: Measured) -> None:
    """Store measurements."""
    if file is None:
        return
    parts = [
        {"branch": list(asdict(part.branch).values()), "curves": asdict(part)["curves"]}
        for part in measured.parts
    ]
    record = {"parts": parts, "texts": measured.texts, "effect_clips": measured.effect_clips}
    with new_file(file) as temporary:
        temporary.write_text(json.dumps(record), "utf-8")
