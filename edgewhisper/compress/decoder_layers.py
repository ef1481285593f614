"""Fewer decoder layers: averages pairs of layers, and rebuilds the model from a plan.

Equation (1) is that of BaldWhisper, see merge.py.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewhisper import alignment, whisper
from export.problem import Problem

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

Plan = list[tuple[int, ...]]
"""The layers of the new decoder: each is one old layer, or the average of two, (lower, upper)."""

LAYERS = "model.decoder.layers."

# ------------------------------------------------------------------------------------ averages, (1)


def merge_tensor(lower: Tensor, upper: Tensor, alpha: float, beta: float) -> Tensor:
    """(1), any shape.

    It is written as a step from lower to upper. Equal tensors then stay equal to the bit, and a
    weight of zero returns the other layer unchanged.
    """
    return torch.lerp(lower, upper, beta / (alpha + beta))


def merge_layers(
    lower: Mapping[str, Tensor], upper: Mapping[str, Tensor], alpha: float, beta: float
) -> dict[str, Tensor]:
    """Average all parameters of two layers, by name. Raises Problem if they do not correspond."""
    refuse_unequal(lower, upper)
    return {
        name: merge_tensor(tensor, upper[name], alpha, beta)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in lower.items()
    }


def refuse_unequal(lower: Mapping[str, Tensor], upper: Mapping[str, Tensor]) -> None:
    """Raise Problem if two layers have different shapes, inputs, or low-rank factors."""
    for name in sorted(lower.keys() | upper.keys()):
        sizes = [
            tuple(layer[name].shape) if name in layer else "absent" for layer in (lower, upper)
        ]
        if sizes[0] != sizes[1]:
            raise unmergeable(f"{name} is {sizes[0]} in the lower and {sizes[1]} in the upper one")
        if ".down." in name:
            # the average of two products is not the product of the averages
            raise unmergeable(f"{name} is a factor of a low-rank layer; factors have no average")
        if name.endswith("inputs") and not lower[name].equal(upper[name]):
            raise unmergeable(f"they read different features ({name})")


def unmergeable(reason: str) -> Problem:
    """Return the error for two layers that cannot be averaged."""
    return Problem(
        f"merge: two decoder layers of one pair cannot be averaged: {reason}",
        hint="put the step merge before steps that change single layers, or set start to 'upper'",
    )


# ----------------------------------------------------------------------------------------- plans


def parse_groups(text: str, layers: int) -> Plan:
    """Parse a plan: "0+1 2" -> [(0, 1), (2,)].

    An empty text pairs adjacent layers; the last layer stays alone if their number is odd. Raises
    Problem unless every layer occurs once.
    """
    if not text.strip():
        return [tuple(range(i, min(i + 2, layers))) for i in range(0, layers, 2)]
    try:
        plan = [tuple(int(number) for number in group.split("+")) for group in text.split()]
    except ValueError:
        plan = []
    named = sorted(number for group in plan for number in group)
    ordered = all(len(group) <= 2 and list(group) == sorted(group) for group in plan)
    if named != list(range(layers)) or not ordered:
        example = " ".join(
            f"{i}+{i + 1}" if i + 1 < layers else f"{i}" for i in range(0, layers, 2)
        )
        raise Problem(
            f"merge: groups {text!r} must name each of the {layers} decoder layers once, alone "
            "or as lower+upper",
            hint=f"write groups like {example!r}",
        )
    return plan


def with_weights(plan: Plan, alpha: float, beta: float) -> Plan:
    """Return the plan without layers that have weight zero. Raises Problem if both weights are."""
    if alpha + beta <= 0:
        raise Problem(
            f"merge: alpha {alpha:g} and beta {beta:g} are both zero",
            hint="set one of them above 0",
        )
    used = [alpha > 0, beta > 0]
    return [
        tuple(i for i, use in zip(group, used, strict=True) if use) if len(group) == 2 else group
        for group in plan
    ]


def single_layers(layers: Iterable[int]) -> Plan:
    """Return a plan that keeps these layers and merges none."""
    return [(layer,) for layer in layers]


# -------------------------------------------------------------------------------- the new decoder


def regroup(
    model: "WhisperForConditionalGeneration", plan: Plan, alpha: float = 1.0, beta: float = 1.0
) -> "tuple[WhisperForConditionalGeneration, dict[str, Any]]":
    """Return a model whose decoder has the layers of the plan, and a record of them."""
    plan = with_weights(plan, alpha, beta)
    tensors = dict(model.state_dict())
    layers = [layer_tensors(tensors, i) for i in range(model.config.decoder_layers)]
    new = {name: tensor for name, tensor in tensors.items() if not name.startswith(LAYERS)}
    for number, group in enumerate(plan):
        merged = layers[group[0]]
        if len(group) == 2:
            merged = merge_layers(merged, layers[group[1]], alpha, beta)
        new |= {f"{LAYERS}{number}.{name}": tensor for name, tensor in merged.items()}
    shapes = copy.deepcopy(getattr(model.config, "edgewhisper", None))
    if shapes is not None and "decoder" in shapes:
        shapes["decoder"] = [shapes["decoder"][group[0]] for group in plan]
    smaller = whisper.rebuild(model, new, shapes, decoder_layers=len(plan))
    counts = alignment.head_counts(model)
    heads = move_alignment_heads(smaller, plan, alpha, beta, counts)
    return smaller, {"layers": [list(group) for group in plan], "alignment_heads": heads}


def layer_tensors(tensors: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Return the tensors of one decoder layer, by their names within it."""
    prefix = f"{LAYERS}{layer}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def move_alignment_heads(
    model: nn.Module, plan: Plan, alpha: float, beta: float, heads: Sequence[int]
) -> dict[str, Any]:
    """Renumber the alignment heads of a model built by the plan; return a record of them.

    `heads` has the number of heads of each old layer. The record names the dropped heads.
    """
    moved = head_moves(plan, alpha, beta, heads)
    record = alignment.carry(model, moved)
    return record | {"dropped": [h for h in record.get("before", []) if tuple(h) not in moved]}


def head_moves(plan: Plan, alpha: float, beta: float, heads: Sequence[int]) -> alignment.Moves:
    """Map each head of the old decoder to its place in the new one.

    A head moves with its layer if the layer has at least half of the merged layer's weight.
    Otherwise it is dropped, because the merged head resembles the other layer's head more.
    """
    larger = [alpha >= beta, beta >= alpha]
    return {
        (layer, head): (number, head)
        for number, group in enumerate(plan)
        for layer, moves in zip(group, larger if len(group) == 2 else [True], strict=True)
        if moves
        for head in range(heads[layer])
    }
