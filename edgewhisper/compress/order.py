"""The one rule about the order of steps: what is quantised comes last.

A step that quantises leaves every weight on the grid that it is stored on, and export finds the
very codes again. Any change of a weight afterwards ends that: the artifact would hold other weights
than the checkpoint, and nobody has measured those. So after qat or kdq only these may follow:

- qat and kdq: they train under the rounding of all weights that have bits, also of those that an
  earlier step gave them, and put all of them back on their grids;
- short without training, which only records the windows.

The rule is kept twice: when a recipe is read, and when a step meets a model, for a checkpoint may
come in quantised and methods can be called without a recipe.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from export.problem import Problem

if TYPE_CHECKING:
    from torch import nn

    from edgewhisper.recipe import Step


def quantises(method: str, options: Any) -> bool:
    if method not in ("qat", "kdq"):
        return False
    told = options.quantise if method == "kdq" else options
    return min(told.encoder, told.decoder, told.token_table, told.stem) < 32


def leaves_grids(method: str, options: Any) -> bool:
    """Whether the step would take weights off the grids that they stand on."""
    if method == "short":
        return options.training.steps > 0 or options.training.epochs > 0
    return method not in ("qat", "kdq")


def refuse_order(recipe: str, steps: "Sequence[Step]") -> None:
    """Raise Problem where a step would change what one before it has quantised."""
    quantiser = ""
    for number, step in enumerate(steps, 1):
        named = f"step {number} ({step.method})"
        if quantiser and leaves_grids(step.method, step.options):
            raise Problem(
                f"recipe {recipe}: {named} would change weights that {quantiser} has quantised",
                hint=f"put {quantiser} behind {named}: only qat, kdq, and short without training "
                "may follow a step that quantises",
            )
        if quantises(step.method, step.options):
            quantiser = named


def refuse_quantised(model: "nn.Module", method: str, options: Any) -> None:
    """Raise Problem where the step would change weights that come in quantised."""
    from export.quantise import is_quantised, schemes  # torch: reading a recipe does not need it

    if leaves_grids(method, options) and is_quantised(model):
        quantised = sum(scheme.bits < 32 for scheme in schemes(model).values())
        raise Problem(
            f"{method}: {quantised} weights of the model are quantised, and this step would move "
            "them off the grids that they are stored on",
            hint=f"put the step {method} before the one that quantises, or start from the "
            "checkpoint before that one",
        )
