"""Physical removal of what pruning left dead: zeros become smaller matrices, exactly.

The arithmetic is in export/shrink.py; this is the recipe step that applies it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from edgewhisper import whisper
from edgewhisper.compress.work import Work
from edgewhisper.recipe import Range
from export.cost import count_parameters
from export.shrink import shrink

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration


@dataclass(frozen=True)
class Options:
    round_to: Annotated[int, Range(1)] = 1
    """Counts of channels, units and inputs are rounded up to a multiple of this."""
    min_saving: Annotated[float, Range(0, 1)] = 0.125
    """A layer reads only its live inputs where at least this share of its columns is dead."""


def apply(
    model: "WhisperForConditionalGeneration", options: Options, work: Work
) -> "WhisperForConditionalGeneration":
    """The same function in fewer parameters; `work.record["shrink"]` counts them."""
    shrunk = shrink(model, options.round_to, options.min_saving)
    slim = whisper.rebuild(model, shrunk.tensors, shrunk.layers)
    before, after = count_parameters(model), count_parameters(slim)
    work.record["shrink"] = {
        "parameters": {"before": before, "after": after},
        "removed_outside_token_table": 1 - after["rest"] / before["rest"],
    }
    return slim
