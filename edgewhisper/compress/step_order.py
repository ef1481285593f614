"""The order rule of recipes: steps that quantise come last.

A step that quantises puts every weight on the grid that it is stored on, and export recovers the
integer codes exactly. A later change of a weight would break this: the artifact would hold other
weights than the checkpoint, and their accuracy was never measured. So only steps that keep
quantised weights on their grids may follow; each method states this in its own module, as
`quantises` and `allowed_after_quantisation` (see compress/__init__.py).

The rule is checked when a recipe is read, and again when a step receives a model: a checkpoint may
already be quantised, and methods can be called without a recipe.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgewhisper.compress import METHODS
from export.problem import Problem

if TYPE_CHECKING:
    from torch import nn

    from edgewhisper.recipe import Step


def states(method: str, property_name: str, options: Any) -> bool:
    """Return what the method's module states about a step with these options; False if nothing."""
    statement = getattr(import_module(METHODS[method]), property_name, None)
    return statement is not None and statement(options)


def refuse_order(recipe: str, steps: "Sequence[Step]") -> None:
    """Raise Problem if a step would change weights that an earlier step quantised."""
    quantiser = ""
    for number, step in enumerate(steps, 1):
        name = f"step {number} ({step.method})"
        if quantiser and not states(step.method, "allowed_after_quantisation", step.options):
            raise Problem(
                f"recipe {recipe}: {name} would change weights that {quantiser} has quantised",
                hint=f"move {quantiser} after {name}: only qat, kdq, and short without training "
                "may follow a step that quantises",
            )
        if states(step.method, "quantises", step.options):
            quantiser = name


def refuse_quantised(model: "nn.Module", method: str, options: Any) -> None:
    """Raise Problem if the step would change weights of a model that is already quantised."""
    from export.quantise import is_quantised, schemes  # imports torch; reading a recipe does not

    if is_quantised(model) and not states(method, "allowed_after_quantisation", options):
        quantised = sum(scheme.bits < 32 for scheme in schemes(model).values())
        raise Problem(
            f"{method}: {quantised} weights of the model are quantised, and this step would move "
            "them off the grids that they are stored on",
            hint=f"put the step {method} before the one that quantises, or start from the "
            "checkpoint before quantisation",
        )
