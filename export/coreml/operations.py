"""Core ML's operations in torch: one plain function per operation of the MIL specification.

Functions have the names and parameters of the specification. Floats are float32 on input and
output, integers int32. The signature defines what is supported: tensors, and constants (int, float,
bool, list[int], one of several strings). Anything else is refused when a package is opened.
Operations that only move elements are in moves.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from export.coreml.moves import MOVES, Ints, Unknown, axes_of
from export.coreml.package import LARGEST


@dataclass(frozen=True)
class Slot:
    """A state, the one kind of value that an operation may change."""

    states: dict[str, Tensor]
    name: str


# ------------------------------------------------------------------------------------- products


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def einsum(values: list[Tensor], equation: str) -> Tensor:
    axes = dict.fromkeys(axis for axis in equation if axis.isalpha())
    plain = equation.translate({ord(old): new for old, new in zip(axes, "abcde", strict=False)})
    if plain.replace(" ", "") not in ("abcd,adce->abce", "abc,cbd->abd"):
        raise Unknown(f"equation is {equation!r}, supported: nchw,nwhu->nchu and chw,whu->chu")
    return torch.einsum(equation, values)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Ints | None = None,
    pad_type: Literal["valid", "custom"] = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    axes = x.dim() - 2
    product = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    around = pad if pad_type == "custom" and pad is not None else [0] * (2 * axes)
    before, after = around[::2], around[1::2]
    if before != after:
        wide = [n + b + a for n, b, a in zip(x.shape[2:], before, after, strict=True)]
        _limit(x.shape[0] * x.shape[1] * prod(wide))
        x, before = F.pad(x, _inside_out(around)), [0] * axes
    one = [1] * axes
    return product(x, weight, bias, strides or one, before, dilations or one, groups)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    _limit(query.shape[:-1].numel() * key.shape[-2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


# ------------------------------------------------------------------------------- element by element


def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return 1 / (x + epsilon)


def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


def gelu(
    x: Tensor, mode: Literal["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"] = "EXACT"
) -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


Dtype = Literal["fp16", "fp32", "int8", "uint8", "int16", "uint16", "int32", "bool"]


def cast(x: Tensor, dtype: Dtype) -> Tensor:
    if dtype == "bool":
        return x.bool()
    return x.float() if dtype.startswith("fp") else x.int()


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def operation(x: Tensor) -> Tensor:
        return function(x)

    return operation


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def operation(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return operation


# --------------------------------------------------------------------------------- along some axes


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return x.softmax(axis)


def layer_norm(
    x: Tensor,
    axes: Ints | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    along = axes_of(x, axes)
    variance, mean = torch.var_mean(x, along, correction=0, keepdim=True)
    y = (x - mean) * torch.rsqrt(variance + epsilon)
    shape = [n if i in along else 1 for i, n in enumerate(x.shape)]
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def _reduction(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def operation(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
        return function(x, axes_of(x, axes), keepdim=keep_dims)

    return operation


def reduce_argmax(
    x: Tensor,
    axis: int = -1,
    keep_dims: bool = False,
    output_dtype: Literal["int32", "uint16"] = "int32",
) -> Tensor:
    return x.argmax(axis, keepdim=keep_dims).int()


def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    y = x.flip(axis) if reverse else x
    total = y.cumsum(axis, dtype=x.dtype)
    total = total - y if exclusive else total
    return total.flip(axis) if reverse else total


# -------------------------------------------------------------------------------------------- state


def read_state(input: Slot) -> Tensor:
    return input.states[input.name].float()


def write_state(input: Slot, data: Tensor) -> list[Tensor]:
    old = input.states[input.name]
    if old.shape != data.shape:
        raise ValueError(f"writes shape {list(data.shape)} to a state of shape {list(old.shape)}")
    input.states[input.name] = data.to(old.dtype, copy=True)
    return []


# -------------------------------------------------------------------------------------------- parts


def fill(shape: Ints, value: Tensor) -> Tensor:
    return value.expand(shape)


def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    _limit(one_hot_vector_size)
    places = torch.arange(one_hot_vector_size, device=indices.device)
    hot = (indices.unsqueeze(-1) == places).movedim(-1, axis)
    if on_value is None or off_value is None:
        return hot.int()
    return torch.where(hot, on_value, off_value)


def pad(
    x: Tensor,
    pad: Ints,
    mode: Literal["constant", "reflect", "replicate"] = "constant",
    constant_val: float = 0.0,
) -> Tensor:
    if mode == "constant":
        return F.pad(x, _inside_out(pad), value=constant_val)
    axes = len(pad) // 2
    while axes > 1 and pad[-2 * axes :][:2] == [0, 0]:
        axes -= 1
    lead = x.shape[: x.dim() - axes]  # torch needs exactly two leading axes for this mode
    y = F.pad(x.reshape(1, -1, *x.shape[len(lead) :]), _inside_out(pad[-2 * axes :]), mode=mode)
    return y.reshape(*lead, *y.shape[2:])


def _inside_out(pad: Ints) -> Ints:
    """Convert MIL's order of padding (first axis first) to torch's (last axis first)."""
    return [n for i in range(len(pad) - 2, -1, -2) for n in pad[i : i + 2]]


def _limit(elements: int) -> None:
    """Raise ValueError if an intermediate value, whose shape the program does not declare, is too
    large."""
    if elements > LARGEST:
        raise ValueError(f"makes an intermediate value of {elements} elements, more than {LARGEST}")


Operation = Callable[..., Any]
OPERATIONS: dict[str, Operation] = MOVES | {
    operation.__name__: operation
    for operation in (
        linear,
        matmul,
        einsum,
        conv,
        scaled_dot_product_attention,
        log,
        rsqrt,
        inverse,
        clip,
        select,
        gelu,
        cast,
        softmax,
        layer_norm,
        reduce_argmax,
        cumsum,
        fill,
        one_hot,
        pad,
        read_state,
        write_state,
    )
}
OPERATIONS |= {
    name: _unary(function)
    for name, function in {
        "abs": torch.abs,
        "cos": torch.cos,
        "erf": torch.erf,
        "exp": torch.exp,
        "logical_not": torch.logical_not,
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "sin": torch.sin,
        "sqrt": torch.sqrt,
        "square": torch.square,
        "tanh": torch.tanh,
    }.items()
}
OPERATIONS |= {
    name: _binary(function)
    for name, function in {
        "add": torch.add,
        "equal": torch.eq,
        "greater": torch.gt,
        "greater_equal": torch.ge,
        "less": torch.lt,
        "less_equal": torch.le,
        "logical_and": torch.logical_and,
        "logical_or": torch.logical_or,
        "logical_xor": torch.logical_xor,
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "mul": torch.mul,
        "not_equal": torch.ne,
        "pow": torch.pow,
        "real_div": torch.div,
        "sub": torch.sub,
    }.items()
}
OPERATIONS |= {
    f"reduce_{name}": _reduction(function)
    for name, function in {
        "max": torch.amax,
        "mean": torch.mean,
        "min": torch.amin,
        "sum": torch.sum,
    }.items()
}
UNROUNDED = frozenset({*MOVES, "read_state"})
"""Operations that compute no new values, so that there is nothing to round."""
