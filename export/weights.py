"""The weights of a Whisper, dense or slim, in the form from which graphs are built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from export.quantise import Scheme
from export.shrink import attention_shape, outputs_of

Floats = NDArray[np.float32]
Schemes = Mapping[nn.Module, Scheme]
"""How the weights of each module are stored; see quantise.py."""


@dataclass(frozen=True)
class Linear:
    """A linear layer: y = W x[inputs] + bias, where x has `features` features."""

    weight: Floats
    """(out, in)"""
    bias: Floats | None = None
    inputs: NDArray[np.int64] | None = None
    """Indices of the features that the layer reads; None: all of them."""
    features: int = 0
    """Required with `inputs` only."""
    scheme: Scheme | None = None
    """How a quantised graph stores the weight; None: as it stores all matrices."""


@dataclass(frozen=True)
class Heads:
    """Shape of one attention. `scale` is that of the dense model, even if heads were pruned."""

    count: int
    qk_dim: int
    v_dim: int
    scale: float

    @property
    def cache_dim(self) -> int:
        """Width of one head in a cache."""
        return cache_width(self.qk_dim, self.v_dim)


def cache_width(qk_dim: int, v_dim: int) -> int:
    """Return the width of one head in a cache: equal for keys and values, and a multiple of 8."""
    return -(-max(qk_dim, v_dim) // 8) * 8


def chains(schemes: Schemes, attention: nn.Module, names: str) -> list[list[Linear]]:
    """Return the q, k and v projections ("qkv"), or those of "kv", of one attention."""
    d_model = outputs_of(attention.out_proj)
    return [chain(schemes, getattr(attention, f"{name}_proj"), d_model) for name in names]


def chain(schemes: Schemes, module: nn.Module, features: int) -> list[Linear]:
    """Return the matrix products of a linear module: one, or two if it is low-rank."""
    if hasattr(module, "down"):
        return [
            *chain(schemes, module.down, features),
            *chain(schemes, module.up, len(module.down.weight)),
        ]
    bias = None if module.bias is None else array(module.bias)
    inputs = getattr(module, "inputs", None)
    kept = None if inputs is None else inputs.cpu().numpy()
    return [Linear(array(module.weight), bias, kept, features, schemes.get(module))]


def scaled(layers: Sequence[Linear], factor: float) -> list[Linear]:
    """Return the same layers with their output multiplied by `factor`."""
    *first, last = layers
    bias = None if last.bias is None else last.bias * np.float32(factor)
    return [*first, replace(last, weight=last.weight * np.float32(factor), bias=bias)]


def heads_of(attention: nn.Module) -> Heads:
    """Return the shape of an attention module."""
    shape = attention_shape(attention)
    return Heads(shape["heads"], shape["qk_dim"], shape["v_dim"], attention.scaling)


def alignment_heads(model: nn.Module) -> list[list[int]]:
    """Return the alignment heads of every decoder layer that generation_config names and the model
    has."""
    counts = [heads_of(layer.encoder_attn).count for layer in model.model.decoder.layers]
    named = sorted(
        {tuple(head) for head in getattr(model.generation_config, "alignment_heads", None) or []}
    )
    return [[h for n, h in named if n == i and h < count] for i, count in enumerate(counts)]


def array(tensor: Tensor) -> Floats:
    """Return a tensor as a float32 array on the CPU."""
    return tensor.detach().float().cpu().numpy()
