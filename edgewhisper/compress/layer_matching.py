"""Layers of a student and a teacher: what is compared, distances, and which layer imitates which.

Equation numbers are those of Whisper-KDQ, see kdq.py. `features` is "softmax" (the paper) or
"normalised" (ours), as in its Options.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewhisper.examples import IGNORED
from edgewhisper.model_modes import removed_after

Hidden = dict[str, list[Tensor]]
"""Side -> the input of fc2 in each of its layers, (clips, positions, ffn)."""

# ------------------------------------------------------------------------- what is compared


def layers_of(model: nn.Module, side: str) -> nn.ModuleList:
    """Return the layers of "encoder" or "decoder"."""
    return getattr(model.model, side).layers


def ffn_width(layer: nn.Module) -> int:
    """Return the number of feed-forward units of a layer."""
    return len(getattr(layer.fc1, "up", layer.fc1).weight)


def fc1_weight(layer: nn.Module) -> Tensor:
    """Return the weight of fc1 as a dense matrix (ffn, d_model), also for slim or low-rank layers.

    Columns of inputs that the layer does not read are zero.
    """
    fc1 = layer.fc1
    first = getattr(fc1, "down", fc1)
    weight, inputs = first.weight, getattr(first, "inputs", None)
    if inputs is not None:
        wide = weight.new_zeros(len(weight), layer.embed_dim)
        weight = wide.index_copy(1, inputs, weight)
    return weight if first is fc1 else fc1.up.weight @ weight


@contextmanager
def hidden_of(model: nn.Module, sides: Sequence[str]) -> Iterator[Hidden]:
    """Yield the inputs of fc2 (outputs of fc1 and GELU) of the last forward pass."""
    hidden: Hidden = {side: [torch.empty(0)] * len(layers_of(model, side)) for side in sides}

    def hook(side: str, number: int) -> Callable[[nn.Module, Any], None]:
        def capture(module: nn.Module, args: Any) -> None:
            hidden[side][number] = args[0]

        return capture

    handles = [
        layer.fc2.register_forward_pre_hook(hook(side, number))
        for side in hidden
        for number, layer in enumerate(layers_of(model, side))
    ]
    with removed_after(*handles):
        yield hidden


def rows_of(hidden: Tensor, labels: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Hidden (clips, positions, f) -> the rows that are compared (n, f), and their weights (n,).

    Decoder rows are the positions that have a label. Encoder rows are all positions; a clip counts
    by its number of labels, so that batches can be split over processes.
    """
    labelled = labels != IGNORED  # (clips, tokens)
    if side == "decoder":
        count = int(labelled.sum())
        return hidden[labelled], hidden.new_full((count,), 1 / count)
    clips = labelled.sum(dim=1) / (labelled.sum() * hidden.shape[1])  # (clips,)
    return hidden.flatten(0, 1), clips.to(hidden.dtype).repeat_interleave(hidden.shape[1])


# ---------------------------------------------------------------------------- distances, (1) (5)


def feature_distance(
    student: Tensor, teacher: Tensor, counts: Tensor, features: str, temperature: float
) -> Tensor:
    """(1) of adapted activations, both (n, f) -> (); `counts` (n,) are weights of the rows."""
    a, b = (comparable(x, features, temperature) for x in (student, teacher))
    return (counts * reduced((a - b).square(), features, temperature)).sum()


def weight_distance(student: Tensor, teacher: Tensor, features: str, temperature: float) -> Tensor:
    """(5) of adapted weights, both (f, d) -> ()."""
    a, b = (comparable(x, features, temperature) for x in (student, teacher))
    rows = reduced((a - b).abs(), features, temperature)
    return rows.sum() if features == "softmax" else rows.mean()


def comparable(rows: Tensor, features: str, temperature: float) -> Tensor:
    """Return softmax_T of each row, or its layer norm; (n, f) -> (n, f)."""
    if features == "softmax":
        return (rows.float() / temperature).softmax(-1)
    return functional.layer_norm(rows.float(), rows.shape[-1:])


def reduced(differences: Tensor, features: str, temperature: float) -> Tensor:
    """Return T^2 times the sum of each row for "softmax", its mean for "normalised"; -> (n,)."""
    if features == "softmax":
        return temperature**2 * differences.sum(-1)
    return differences.mean(-1)


# ----------------------------------------------------------------------------------- matching, (4)


def static(cost: Tensor) -> list[int]:
    """Match at even distances, the last layer with the last. cost (N_s, N_t)."""
    students, teachers = cost.shape
    return [max(0, (i + 1) * teachers // students - 1) for i in range(students)]


def nolimit(cost: Tensor) -> list[int]:
    """Match each layer with the nearest one."""
    return cost.argmin(dim=1).tolist()


def limit(cost: Tensor) -> list[int]:
    """Match each layer in turn with the nearest one not below the match of the layer before."""
    matches, lowest = [], 0
    for row in cost:
        lowest += int(row[lowest:].argmin())
        matches.append(lowest)
    return matches


def monotone(cost: Tensor) -> list[int]:
    """Return the monotone matches with the lowest total cost, by dynamic programming.

    best[i, j]: the lowest cost of layers 0 to i if layer i imitates j.
    """
    best = [cost[0]]
    for row in cost[1:]:
        best.append(row + best[-1].cummin(0).values)
    last, matches = cost.shape[1] - 1, []
    for costs in reversed(best):
        last = int(costs[: last + 1].argmin())
        matches.append(last)
    return matches[::-1]


MATCHING: dict[str, Callable[[Tensor], list[int]]] = {
    "static": static,
    "nolimit": nolimit,
    "limit": limit,
    "dp": monotone,
}
