"""What graphs are built from: the weights of a Whisper, dense or slim, read off its modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from export.quantise import Scheme
from export.shrink import attention_shape

Floats = NDArray[np.float32]
Schemes = Mapping[nn.Module, Scheme]
"""How the weights of modules are stored, see export/quantise.py."""


@dataclass(frozen=True)
class Linear:
    """y = W x[inputs] + bias, of an x with so many `features`; `inputs` None: all of them."""

    weight: Floats
    """(out, in)"""
    bias: Floats | None = None
    inputs: NDArray[np.int64] | None = None
    features: int = 0
    """Needed with `inputs` only."""
    scheme: Scheme | None = None
    """How a graph that quantises stores the weight; None: as it stores all matrices."""


@dataclass(frozen=True)
class Heads:
    """Shape of one attention. The scale is the dense model's, whatever became of its heads."""

    count: int
    qk_dim: int
    v_dim: int
    scale: float

    @property
    def cache_dim(self) -> int:
        """Width of a head in a cache: of keys and values alike, and a multiple of 8."""
        return -(-max(self.qk_dim, self.v_dim) // 8) * 8


def chains(schemes: Schemes, attention: nn.Module, names: str) -> list[list[Linear]]:
    """Projections of one input: `names` is "qkv" or "kv"."""
    d_model = outputs_of(attention.out_proj)
    return [chain(schemes, getattr(attention, f"{name}_proj"), d_model) for name in names]


def chain(schemes: Schemes, module: nn.Module, features: int) -> list[Linear]:
    """A linear module as the products it consists of: one, or two where it is low-rank."""
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
    """The same layers, what comes out times a factor."""
    *first, last = layers
    bias = None if last.bias is None else last.bias * np.float32(factor)
    return [*first, replace(last, weight=last.weight * np.float32(factor), bias=bias)]


def heads_of(attention: nn.Module) -> Heads:
    shape = attention_shape(attention)
    return Heads(shape["heads"], shape["qk_dim"], shape["v_dim"], attention.scaling)


def outputs_of(linear: nn.Module) -> int:
    return len(getattr(linear, "up", linear).weight)


def array(tensor: Tensor) -> Floats:
    return tensor.detach().float().cpu().numpy()
