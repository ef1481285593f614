"""Removal of dead structure: zeros left by pruning become smaller matrices, with the same outputs.

The arithmetic is in export/shrink.py; this is the recipe step that applies it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from edgewhisper import alignment, whisper
from edgewhisper.compress.context import Context
from edgewhisper.compress.step_order import refuse_quantised
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
    """A layer reads only its live inputs if at least this share of its columns is dead."""


def apply(
    model: "WhisperForConditionalGeneration", options: Options, context: Context
) -> "WhisperForConditionalGeneration":
    """Return a model with the same outputs and fewer parameters.

    `context.record["shrink"]` has the counts. Raises Problem if the model is quantised.
    """
    refuse_quantised(model, "shrink", options)
    slim, heads = slimmed(model, options.round_to, options.min_saving)
    before, after = count_parameters(model), count_parameters(slim)
    context.record["shrink"] = {
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
    """Return the model without its dead structure, and the record of its alignment heads."""
    shrunk = shrink(model, round_to, min_saving)
    slim = whisper.rebuild(model, shrunk.tensors, shrunk.layers)
    kept_heads = [layer["encoder_attn"] for layer in shrunk.heads["decoder"]]
    return slim, alignment.carry(slim, alignment.moves(kept_heads))
