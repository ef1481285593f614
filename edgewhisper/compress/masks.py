"""Pruning masks: which weights a method may prune, how zeros are kept, and how they are counted.

A mask is a bool tensor of a weight's shape, true where the weight is kept.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgewhisper.compress.context import Context
from edgewhisper.model_modes import removed_after
from edgewhisper.training import AfterStep, Training
from edgewhisper.whisper import linears
from export.cost import count_parameters
from export.problem import Problem
from export.shrink import shrink

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration

Masks = Mapping[str, Tensor]
"""Name of a linear layer -> mask of its weight, (d_out, d_in) bool."""


def matching(model: nn.Module, layers: str) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the name and module of each linear layer of the blocks that matches the pattern."""
    for name, module in linears(model):
        if fnmatchcase(name, layers):
            yield name, module


def weights_of(model: nn.Module, layers: str = "*") -> dict[str, Tensor]:
    """Return the weights (d_out, d_in) of the linear layers that match the pattern, by name.

    Raises Problem if no layer matches.
    """
    weights = {name: module.weight.detach() for name, module in matching(model, layers)}
    if not weights:
        names = sorted({name.split(".", 4)[-1] for name, _ in linears(model)})
        raise Problem(
            f"no linear layer matches {layers!r}",
            hint=f"correct `layers` in the recipe; names end in {', '.join(names)}",
        )
    return weights


def smallest(values: Tensor, count: int) -> Tensor:
    """Return where the `count` smallest values are; bool, same shape.

    Of equal values, those with the lower index come first.
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    cut = values.flatten().kthvalue(count).values
    selected = (values < cut).flatten()
    equal = (values == cut).flatten().nonzero().flatten()
    selected[equal[: count - int(selected.sum())]] = True
    return selected.view(values.shape)


# -- weights that must not be pruned


def guards(model: Any, protect_alignment: bool) -> dict[str, Tensor]:
    """Return masks of the weights that belong to the alignment heads and must not change.

    Maps the name of a cross-attention layer to (d_out, d_in) bool, true where a weight is
    protected: a head's rows of q, k and v and its columns of out_proj. In a low-rank layer, the
    factor that all heads share is protected completely. Empty unless `protect_alignment`.

    Raises Problem if the model names no alignment heads.
    """
    if not protect_alignment:
        return {}
    heads = getattr(model.generation_config, "alignment_heads", None)
    if not heads:
        raise Problem(
            "protect_alignment is set, but the model names no alignment heads",
            hint="set alignment_heads in its generation_config.json, or remove protect_alignment; "
            "edgewhisper.alignment.find_heads finds the heads",
        )
    protected: dict[str, Tensor] = {}
    for layer, head in heads:
        attention = model.model.decoder.layers[layer].encoder_attn
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            for name, mask in head_masks(attention, part, head).items():
                full_name = f"model.decoder.layers.{layer}.encoder_attn.{name}"
                protected[full_name] = protected.get(full_name, torch.zeros_like(mask)) | mask
    return protected


def head_masks(attention: Any, part: str, head: int) -> dict[str, Tensor]:
    """Return masks of one head's weights in one linear layer, or in both of its factors."""
    linear = getattr(attention, part)
    values = part in ("v_proj", "out_proj")
    width = getattr(attention, "v_dim", attention.head_dim) if values else attention.head_dim
    own = slice(head * width, (head + 1) * width)
    down, up = getattr(linear, "down", linear), getattr(linear, "up", linear)
    masks = {
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
    return masks | {name: mask}


def guarded(masks: Masks, protected: Masks) -> dict[str, Tensor]:
    """Return the masks with all protected weights kept."""
    return {n: mask | protected[n] if n in protected else mask for n, mask in masks.items()}


def never_smallest(sizes: Tensor, protected: Tensor | None) -> Tensor:
    """Return the sizes with protected ones set to infinity, so that they are pruned last."""
    return sizes if protected is None else sizes.masked_fill(protected, torch.inf)


@torch.no_grad()
def set_pruned(model: nn.Module, dense: Mapping[str, Tensor], masks: Masks) -> None:
    """Set the weights of the masked layers to `dense`, with zeros where the mask is false."""
    for name, module in linears(model):
        if name in masks:
            module.weight.copy_(dense[name] * masks[name])


# -- fine-tuning a pruned model


def hold(masks: Masks) -> AfterStep:
    """Return a hook that sets pruned weights back to zero after each optimiser step."""
    on_device = dict(masks)

    def hook(model: nn.Module, step: int, learning_rate: float) -> None:
        for name, module in linears(model):
            if name in on_device:
                on_device[name] = on_device[name].to(module.weight.device)  # copied only once
                module.weight.mul_(on_device[name])

    return hook


@contextmanager
def masked_gradients(model: nn.Module, masks: Masks) -> Iterator[None]:
    """Set gradients of pruned weights to zero, so that gradient clipping ignores them."""

    def masked(name: str, gradient: Tensor) -> Tensor:
        on_device[name] = on_device[name].to(gradient.device)
        return gradient * on_device[name]

    on_device = dict(masks)
    handles = [
        module.weight.register_hook(partial(masked, name))
        for name, module in linears(model)
        if name in on_device
    ]
    with removed_after(*handles):
        yield


def trained_masked(
    context: Context,
    model: "WhisperForConditionalGeneration",
    masks: Masks,
    options: Training,
    name: str,
    **rest: Any,
) -> dict[str, Any]:
    """Train with pruned weights at zero; return the training's summary. See Context.trained."""
    with masked_gradients(model, masks):
        return context.trained(model, options, name, after_step=hold(masks), **rest)


# -- counting


def bookkeeping(model: nn.Module) -> dict[str, Any]:
    """Return the share of zero weights, zero columns per layer, and the removable share."""
    weights = weights_of(model)
    total = sum(w.numel() for w in weights.values())
    zero = sum(int((w == 0).sum()) for w in weights.values())
    return {
        "zero_elements": zero / total,
        "zero_columns": {name: int((w == 0).all(dim=0).sum()) for name, w in weights.items()},
        "removable_parameters": removed_share(model),
    }


def removed_share(model: nn.Module) -> float:
    """Return the share of the parameters outside the token table that step shrink would remove."""
    return 1 - sum(tensor.numel() for tensor in tensors_after_shrink(model)) / rest(model)


def zero_share(model: nn.Module) -> float:
    """Return the share of the parameters outside the token table that are removable or zero."""
    return 1 - sum(int((t != 0).sum()) for t in tensors_after_shrink(model)) / rest(model)


def tensors_after_shrink(model: nn.Module) -> list[Tensor]:
    """Return the parameters outside the token table after shrinking, without input indices."""
    table = ("proj_out.", "model.decoder.embed_tokens.")
    tensors = shrink(model).tensors.items()
    return [t for name, t in tensors if not name.startswith(table) and not name.endswith(".inputs")]


def rest(model: nn.Module) -> int:
    """Return the number of parameters outside the token table."""
    return count_parameters(model)["rest"]
