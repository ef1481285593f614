"""Physical removal of what pruning left dead: zeros become smaller matrices, exactly.

The arithmetic is in export/shrink.py; this is the recipe step that applies it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from edgewhisper import alignment, whisper
from edgewhisper.compress.order import refuse_quantised
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
    refuse_quantised(model, "shrink", options)
    slim, heads = slimmed(model, options.round_to, options.min_saving)
    before, after = count_parameters(model), count_parameters(slim)
    work.record["shrink"] = {
        "parameters": {"before": before, "after": after},
        "removed_outside_token_table": 1 - after["rest"] / before["rest"],
        "alignment_heads": heads,
    }
    return slim


def slimmed(
    model: "WhisperForConditionalGeneration",
    round_to: int = Options.round_to,
    min_saving: float = Options.min_saving,
) -> tuple["WhisperForConditionalGeneration", dict[str, Any]]:
    """The model without its dead structure, and what became of its alignment heads."""
    shrunk = shrink(model, round_to, min_saving)
    slim = whisper.rebuild(model, shrunk.tensors, shrunk.layers)
    left = [layer["encoder_attn"] for layer in shrunk.heads["decoder"]]
    return slim, alignment.carry(slim, alignment.moves(left))
