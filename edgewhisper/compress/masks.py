"""What pruning methods share: which weights, what is kept of them, how zeros stay and are counted.

A mask is a bool tensor of a weight's shape, true where the weight is kept.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edgewhisper.training import AfterStep
from edgewhisper.whisper import linears
from export.cost import count_parameters
from export.problem import Problem
from export.shrink import shrink

Masks = Mapping[str, Tensor]
"""Name of a linear layer -> what is kept of its weight, (d_out, d_in) bool."""


def chosen(model: nn.Module, layers: str) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of the blocks whose names match the pattern."""
    for name, module in linears(model):
        if fnmatchcase(name, layers):
            yield name, module


def weights_of(model: nn.Module, layers: str = "*") -> dict[str, Tensor]:
    """Raises Problem where no layer matches."""
    weights = {name: module.weight.detach() for name, module in chosen(model, layers)}
    if not weights:
        names = sorted({name.split(".", 4)[-1] for name, _ in linears(model)})
        raise Problem(
            f"no linear layer is called {layers!r}",
            hint=f"correct `layers` in the recipe; names end in {', '.join(names)}",
        )
    return weights


def smallest(values: Tensor, count: int) -> Tensor:
    """Where the `count` smallest values are, earlier ones first among equals; bool, same shape."""
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    cut = values.flatten().kthvalue(count).values
    found = (values < cut).flatten()
    equal = (values == cut).flatten().nonzero().flatten()
    found[equal[: count - int(found.sum())]] = True
    return found.view(values.shape)


# -- what may not be pruned


def guards(model: Any, wanted: bool) -> dict[str, Tensor]:
    """What a method that is told to protect the alignment heads must leave as it is: name ->
    (d_out, d_in) bool, for the layers that have some; empty where it is not wanted.

    Of a head's cross-attention these are its rows of q, k and v and its columns of out_proj; of a
    low-rank layer the factor that all heads share, whole. Raises Problem where no head is named.
    """
    if not wanted:
        return {}
    heads = getattr(model.generation_config, "alignment_heads", None)
    if not heads:
        raise Problem(
            "protect_alignment is asked for, but the model names no alignment heads",
            hint="set alignment_heads in its generation_config.json, or leave protect_alignment "
            "out; edgewhisper.alignment.find_heads finds them",
        )
    found: dict[str, Tensor] = {}
    for layer, head in heads:
        attention = model.model.decoder.layers[layer].encoder_attn
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            for name, guard in guards_of(attention, part, head).items():
                whole = f"model.decoder.layers.{layer}.encoder_attn.{name}"
                found[whole] = found.get(whole, torch.zeros_like(guard)) | guard
    return found


def guards_of(attention: Any, part: str, head: int) -> dict[str, Tensor]:
    """One head's share of one linear layer, or of both factors of it."""
    linear = getattr(attention, part)
    values = part in ("v_proj", "out_proj")
    width = getattr(attention, "v_dim", attention.head_dim) if values else attention.head_dim
    own = slice(head * width, (head + 1) * width)
    down, up = getattr(linear, "down", linear), getattr(linear, "up", linear)
    guard = {
        f"{part}.{factor}": torch.ones_like(getattr(linear, factor).weight, dtype=torch.bool)
        for factor in ("down", "up")
        if down is not up
    }
    side = down if part == "out_proj" else up
    mask = torch.zeros_like(side.weight, dtype=torch.bool)
    if part == "out_proj":
        mask[:, own] = True
    else:
        mask[own] = True
    name = part if down is up else f"{part}.{'down' if part == 'out_proj' else 'up'}"
    return guard | {name: mask}


def guarded(keep: Masks, guard: Masks) -> dict[str, Tensor]:
    return {name: mask | guard[name] if name in guard else mask for name, mask in keep.items()}


def never_smallest(sizes: Tensor, guard: Tensor | None) -> Tensor:
    """Sizes in which all that is guarded is larger than anything else."""
    return sizes if guard is None else sizes.masked_fill(guard, torch.inf)


@torch.no_grad()
def set_pruned(model: nn.Module, dense: Mapping[str, Tensor], keep: Masks) -> None:
    """Give the masked layers the weights `dense`, with zeros where nothing is kept."""
    for name, module in linears(model):
        if name in keep:
            module.weight.copy_(dense[name] * keep[name])


# -- training what is left


def hold(keep: Masks) -> AfterStep:
    """The hook after a step that puts what is pruned back to zero."""
    here = dict(keep)

    def hook(model: nn.Module, step: int, learning_rate: float) -> None:
        for name, module in linears(model):
            if name in here:
                here[name] = here[name].to(module.weight.device)  # moves once, where it moves
                module.weight.mul_(here[name])

    return hook


@contextmanager
def masked_gradients(model: nn.Module, keep: Masks) -> Iterator[None]:
    """Gradients of what is pruned are zero: they shall not count in the norm that is clipped."""

    def masked(name: str, gradient: Tensor) -> Tensor:
        here[name] = here[name].to(gradient.device)
        return gradient * here[name]

    here = dict(keep)
    handles = [
        module.weight.register_hook(partial(masked, name))
        for name, module in linears(model)
        if name in here
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- counting


def bookkeeping(model: nn.Module) -> dict[str, Any]:
    """What is zero, and what of it can be removed."""
    weights = weights_of(model)
    total = sum(w.numel() for w in weights.values())
    zero = sum(int((w == 0).sum()) for w in weights.values())
    return {
        "zero_elements": zero / total,
        "zero_columns": {name: int((w == 0).all(dim=0).sum()) for name, w in weights.items()},
        "removable_parameters": removed_share(model),
    }


def removed_share(model: nn.Module) -> float:
    """Share of the parameters outside the token table that exact removal would take away."""
    return 1 - sum(tensor.numel() for tensor in left_by_removal(model)) / rest(model)


def zero_share(model: nn.Module) -> float:
    """Share of the parameters outside the token table that would be gone or are zero."""
    return 1 - sum(int((t != 0).sum()) for t in left_by_removal(model)) / rest(model)


def left_by_removal(model: nn.Module) -> list[Tensor]:
    """The tensors outside the token table after exact removal, without the indices of gathers."""
    table = ("proj_out.", "model.decoder.embed_tokens.")
    tensors = shrink(model).tensors.items()
    return [t for name, t in tensors if not name.startswith(table) and not name.endswith(".inputs")]


def rest(model: nn.Module) -> int:
    return count_parameters(model)["rest"]
