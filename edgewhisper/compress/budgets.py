"""What a level of a branch saves: parameters, MACs, predicted latency, or predicted bytes.

All four are sums over the branches of a model plus a constant. A branch's cost is computed from the
shape of its layer, so no smaller model is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.latency import Table, find_table, predict_shapes
from edgewhisper.compress.branches import FFN, Branch
from export.cost import artifact_bytes, count_parameters, layer_bytes, macs, window_macs
from export.onnx.operators import shapes_of
from export.problem import Problem

if TYPE_CHECKING:
    from torch import nn

TOKENS = 32
"""Tokens of a window if the budget is in MACs or in latency."""

Kept = tuple[int, ...]
"""What remains of a branch: (units,), (units, rank) or (heads, value dims, score dims), as in
Level."""
Axis = Literal["parameters", "macs", "latency", "bytes"]


@dataclass(frozen=True)
class Budget:
    """The cost that is saved, and what it depends on."""

    axis: Axis = "parameters"
    precision: str = "int8"
    """Precision of the artifact if the axis is bytes."""
    table: Table | None = None
    """Latency table of the device if the axis is latency."""

    @property
    def of_device(self) -> Table:
        assert self.table is not None, "budget_of() finds a table for a latency"
        return self.table


def budget_of(axis: Axis, precision: str, device: str) -> Budget:
    """Return the budget of an axis. Raises Problem if it is latency and the device has no table."""
    if axis != "latency":
        return Budget(axis, precision)
    if not device:
        raise Problem(
            'obs: budget_of = "latency" needs a device',
            hint='add device = "NAME" to the step, or use --target-latency with --device',
        )
    return Budget(axis, precision, find_table(device))


def total_of(model: nn.Module, budget: Budget) -> float:
    """Return the cost of which `remove` is a share. For parameters, the token table is left out."""
    if budget.axis == "parameters":
        return count_parameters(model)["rest"]
    if budget.axis == "macs":
        return window_macs(macs(model, TOKENS), TOKENS)
    if budget.axis == "bytes":
        return artifact_bytes(model, budget.precision)
    return predict_shapes(budget.of_device, shapes_of(model), TOKENS)


def cost_of(model: nn.Module, branch: Branch, budget: Budget) -> Callable[[Kept], float]:
    """Return a function of a level: the cost of the branch, up to a constant."""
    if budget.axis in ("parameters", "macs"):
        return linear_cost(model, branch, budget.axis)
    shapes = shapes_of(model)
    layer = shapes.layers[branch.side][branch.layer]
    if budget.axis == "bytes":
        width = shapes.width
        return lambda kept: layer_bytes(resized(layer, branch, kept), width, budget.precision)

    def latency(kept: Kept) -> float:
        alone = {"encoder": [], "decoder": [], branch.side: [resized(layer, branch, kept)]}
        of_layer = replace(shapes, layers={**shapes.layers, **alone})
        return predict_shapes(budget.of_device, of_layer, TOKENS)

    return latency


def resized(layer: dict[str, Any], branch: Branch, kept: Kept) -> dict[str, Any]:
    """Return the shape of a layer with one branch at a level."""
    if branch.kind == "ffn":
        ranks = dict.fromkeys(FFN, kept[1]) if len(kept) == 2 else {}
        return layer | {"ffn": kept[0], "ranks": layer["ranks"] | ranks}
    sizes = dict(zip(("heads", "v_dim", "qk_dim"), kept, strict=True))
    return layer | {branch.kind: layer[branch.kind] | sizes}


def linear_cost(model: nn.Module, branch: Branch, axis: Axis) -> Callable[[Kept], float]:
    """Return a function of a level: the branch's parameters, or its MACs in one window."""
    d, sound = model.config.d_model, model.config.max_source_positions
    rows = sound if branch.side == "encoder" else TOKENS
    source = sound if branch.kind == "encoder_attn" else rows
    if axis == "parameters":
        unit, value, score = 2 * d + 1, 2 * d + 1, 2 * d + 1  # one bias each
    else:
        unit = 2 * d * rows
        value = score = d * (rows + source) + rows * source

    def cost(kept: Kept) -> float:
        if len(kept) == 1:
            return unit * kept[0]
        if len(kept) == 2:  # each layer is two factors
            units, rank = kept
            products = 2 * rank * (d + units)
            return products + units if axis == "parameters" else products * rows
        heads, values, scores = kept
        return heads * (value * values + score * scores)

    return cost
