"""Temporary changes to a model during training: dropout, frozen parts, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration


@contextmanager
def regularised(model: nn.Module, dropout: float) -> Iterator[None]:
    """Set this dropout, and disable the model's own feature masks and layer drops."""
    rates = {"dropout": dropout, "activation_dropout": 0.0, "layerdrop": 0.0}
    before = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for name in rates
        if isinstance(getattr(module, name, None), float)
    ]
    masks = getattr(model.config, "apply_spec_augment", False)
    for module, name, _ in before:
        setattr(module, name, rates[name])
    model.config.apply_spec_augment = False
    try:
        yield
    finally:
        model.config.apply_spec_augment = masks
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def partly_frozen(
    model: WhisperForConditionalGeneration, encoder: bool, token_table: bool
) -> Iterator[None]:
    """Disable gradients of the encoder if `encoder` is False, and likewise of the token table."""
    parts: list[nn.Parameter] = []
    if not encoder:
        parts += list(model.model.encoder.parameters())
    table = getattr(model.model.decoder.embed_tokens, "weight", None)
    if not token_table and table is not None:
        parts.append(table)
    with without_gradients(parts):
        yield


@contextmanager
def without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Disable gradients of these parameters, and restore them at the end."""
    frozen = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


@contextmanager
def removed_after(*hooks: RemovableHandle) -> Iterator[None]:
    """Remove the hooks at the end."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def checkpointing(model: WhisperForConditionalGeneration, enabled: bool) -> Iterator[None]:
    """Enable gradient checkpointing if `enabled`, and disable it at the end."""
    if enabled:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    try:
        yield
    finally:
        if enabled:
            disable = getattr(model, "activation_checkpointing_disable", None)
            (disable or model.gradient_checkpointing_disable)()


def unwrap(model: nn.Module) -> None:
    """Remove accelerate's wrapper of mixed precision. Accelerate's own unwrapping keeps a bound
    method, which a deep copy of the model would share with the original."""
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)
