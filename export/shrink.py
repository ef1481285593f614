"""Exact removal of dead structure: rows and columns of zeros become smaller matrices.

Pruning leaves rows and columns of zeros. Removing them keeps the model's output, if their constant
contribution is added to a bias and attention keeps its scale:

    what is zero                    what is removed
    fc2 column i                    hidden unit i
    fc1 row i                       hidden unit i; fc2.bias += act(fc1.bias[i]) * fc2[:, i]
    out_proj column i               value channel i
    v_proj row i                    value channel i; rows of a softmax sum to one, so
                                    out_proj.bias += v_proj.bias[i] * out_proj[:, i]
    k_proj row i, or                channel i of queries and keys, which adds zero to every
    q_proj row i and its bias       score (not if the bias of the query remains)
    all value channels of a head    the head
    nothing                         the bias of k_proj, if it has one: it adds the same to every
                                    score of a query, which a softmax ignores
    columns of q, k, v, fc1         those input features: the layer reads `inputs` only

All heads of one attention keep the same number of channels: as many as the head with most live
ones. The other heads also keep their largest dead channels, which do no harm.

A layer whose branches all add constants, because their last weights are zero, is removed too. The
constants are added to fc2.bias of the layer before it, so the first layer remains.

The order is heads, channels and units, then inputs. One pass is enough: a column may die because
the units that read it were removed, and inputs come last. Removing columns of zeros never makes a
row zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from export.quantise import precision_fields

FORMAT = 1
ATTENTIONS = {"encoder": ("self_attn",), "decoder": ("self_attn", "encoder_attn")}


@dataclass(frozen=True)
class Shrunk:
    """A smaller model: its complete state dict and the shapes of its layers
    (config.edgewhisper)."""

    tensors: dict[str, Tensor]
    layers: dict[str, Any]
    heads: dict[str, list[dict[str, list[int]]]]
    """Side, layer, attention -> indices in the original model of the heads that are kept, in
    order; none for a removed layer."""


@dataclass(frozen=True)
class Affine:
    """y = W x + bias, W (out, in) over all features of x; W = up @ down if it is low-rank."""

    down: Tensor
    """(out, in), or (rank, in)."""
    up: Tensor | None
    """(out, rank) or None."""
    bias: Tensor | None

    @property
    def rows(self) -> Tensor:
        """The matrix whose rows are the outputs."""
        return self.down if self.up is None else self.up

    def take_outputs(self, index: Tensor) -> Affine:
        bias = None if self.bias is None else self.bias[index]
        if self.up is None:
            return Affine(self.down[index], None, bias)
        return Affine(self.down, self.up[index], bias)

    def take_inputs(self, index: Tensor) -> Affine:
        return replace(self, down=self.down[:, index])

    def fold(self, dropped: Tensor, values: Tensor) -> Affine:
        """Add the contribution of dropped inputs to the bias; input `dropped[n]` is always
        `values[n]`."""
        if self.bias is None or len(dropped) == 0:
            return self
        share = self.down[:, dropped].double() @ values.double()
        if self.up is not None:
            share = self.up.double() @ share
        return replace(self, bias=(self.bias.double() + share).to(self.bias.dtype))


def shrink(model: nn.Module, round_to: int = 1, min_saving: float = 0.125) -> Shrunk:
    """Return the model without its dead structure; it computes the same function up to rounding.

    `model` is a Whisper, dense or slim, and is not changed. Counts of channels, units and inputs
    are rounded up to a multiple of `round_to` by keeping the largest dead ones. A linear layer
    skips its dead inputs only if they are at least `min_saving` of its columns: below an eighth,
    gathering the others costs as much as it saves (measured for fc1 of whisper-tiny's width, int8,
    one row in onnxruntime). If nothing is dead, the tensors are returned unchanged.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    layers = _model_fields(model)
    heads: dict[str, list[dict[str, list[int]]]] = {}
    for side, attentions in ATTENTIONS.items():
        stack = getattr(model.model, side)
        layers[side], heads[side] = [], []
        for number, (layer, bits) in enumerate(zip(stack.layers, _bits(model, side), strict=True)):
            place = f"model.{side}.layers."
            own = _taken(tensors, f"{place}{number}.")
            constant = _constant(layer, attentions)
            if constant is not None and layers[side]:
                _add(constant, f"{place}{len(layers[side]) - 1}.fc2.", tensors)
                heads[side].append({name: [] for name in attentions})
                continue
            linears, shape, left = _shrink_layer(layer, attentions, round_to)
            prefix = f"{place}{len(layers[side])}."
            tensors |= {prefix + name: tensor for name, tensor in own.items()}
            for name, affine in linears.items():
                _store(affine, name, prefix, tensors, shape, round_to, min_saving)
            layers[side].append(shape | bits)
            heads[side].append(left)
    return Shrunk(tensors, layers, heads)


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the tensors of a layer and return them by their names within it."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def _constant(layer: nn.Module, attentions: tuple[str, ...]) -> Tensor | None:
    """Return what a layer adds to the states (d_model,), or None if that depends on the states."""
    lasts = [*(getattr(layer, name).out_proj for name in attentions), layer.fc2]
    if not all(_is_zero(last) for last in lasts):
        return None
    biases = [getattr(last, "up", last).bias for last in lasts]
    return torch.stack([bias.detach().double() for bias in biases if bias is not None]).sum(0)


def _is_zero(linear: nn.Module) -> bool:
    """Return whether the weight of a linear layer is zero, of a low-rank one either factor."""
    factors = [linear.down, linear.up] if hasattr(linear, "down") else [linear]
    return any(not factor.weight.any() for factor in factors)


def _add(constant: Tensor, prefix: str, tensors: dict[str, Tensor]) -> None:
    """Add a constant to the bias of the linear layer that is stored under `prefix`."""
    name = next(f"{prefix}{end}" for end in ("bias", "up.bias") if f"{prefix}{end}" in tensors)
    tensors[name] = (tensors[name].double() + constant).to(tensors[name].dtype)


def _shrink_layer(
    layer: nn.Module, attentions: tuple[str, ...], round_to: int
) -> tuple[dict[str, Affine], dict[str, Any], dict[str, list[int]]]:
    """Return the remaining linear layers of one block by name, its shape (yet without inputs), and
    the heads kept in each attention."""
    linears: dict[str, Affine] = {}
    shape: dict[str, Any] = {}
    heads: dict[str, list[int]] = {}
    for name in attentions:
        attention = getattr(layer, name)
        parts, shape[name], heads[name] = _shrink_attention(attention, layer.embed_dim, round_to)
        linears |= {f"{name}.{part}": affine for part, affine in parts.items()}
    fc1 = _read(layer.fc1, layer.embed_dim)
    fc2 = _read(layer.fc2, len(fc1.rows))
    linears["fc1"], linears["fc2"] = _shrink_ffn(fc1, fc2, layer.activation_fn, round_to)
    shape |= {"ffn": len(linears["fc1"].rows), "ranks": {}, "inputs": {}}
    return linears, shape, heads


def _shrink_ffn(
    fc1: Affine, fc2: Affine, activation: Callable[[Tensor], Tensor], round_to: int
) -> tuple[Affine, Affine]:
    """Remove the units of fc2(act(fc1 x)) that fc2 ignores or that are constant."""
    idle = _zero_columns(fc2) | _zero_rows(fc1)  # (ffn,)
    size = _row_sizes(fc1) + _column_sizes(fc2)
    kept = _select(idle[None], size[None], round_to)[0]
    dropped = _others(kept, len(idle))
    if fc1.bias is not None:
        fc2 = fc2.fold(dropped, activation(fc1.bias[dropped].double()))
    return fc1.take_outputs(kept), fc2.take_inputs(kept)


def _shrink_attention(
    attention: nn.Module, d_model: int, round_to: int
) -> tuple[dict[str, Affine], dict[str, Any], list[int]]:
    """Return one attention without dead heads and channels, its shape, and the heads kept."""
    heads = attention.num_heads
    query, key, value = (_read(getattr(attention, f"{n}_proj"), d_model) for n in "qkv")
    out = _read(attention.out_proj, _inputs(attention.out_proj))
    if getattr(attention, "shared", False):  # no channel belongs to one head
        parts = {"q_proj": query, "k_proj": key, "v_proj": value, "out_proj": out}
        return parts, attention_shape(attention), list(range(heads))

    idle_v = (_zero_columns(out) | _zero_rows(value)).view(heads, -1)  # (heads, v_dim)
    size_v = (_row_sizes(value) + _column_sizes(out)).view(heads, -1)
    idle_qk = (_zero_rows(key) | _zero_rows(query) & _zero_bias(query)).view(heads, -1)
    size_qk = (_row_sizes(query) + _row_sizes(key)).view(heads, -1)

    alive = _live_heads(idle_v, size_v)
    kept_v = _channels(alive, idle_v, size_v, round_to)
    kept_qk = _channels(alive, idle_qk, size_qk, round_to)
    dropped = _others(kept_v, idle_v.numel())
    if value.bias is not None:
        out = out.fold(dropped, value.bias[dropped])
    parts = {
        "q_proj": query.take_outputs(kept_qk),
        "k_proj": replace(key.take_outputs(kept_qk), bias=None),
        "v_proj": value.take_outputs(kept_v),
        "out_proj": out.take_inputs(kept_v),
    }
    count = len(alive)
    shape = {"heads": count, "qk_dim": len(kept_qk) // count, "v_dim": len(kept_v) // count}
    return parts, shape, alive.tolist()


def _live_heads(idle_v: Tensor, size_v: Tensor) -> Tensor:
    """Return the indices of heads with a live value channel; the largest head if there is none."""
    alive = (~idle_v).any(1).nonzero().flatten()
    return alive if len(alive) else size_v.sum(1).argmax()[None]


def _channels(alive: Tensor, idle: Tensor, size: Tensor, round_to: int) -> Tensor:
    """Return the rows of a projection to keep, ascending: the same number of channels for every
    live head."""
    kept = _select(idle[alive], size[alive], round_to)
    return (alive[:, None] * idle.shape[1] + kept).flatten()


def _select(idle: Tensor, size: Tensor, round_to: int) -> Tensor:
    """Return which columns of each group to keep: all live ones, then the largest dead ones. idle,
    size (groups, n) -> (groups, kept), ascending. `kept` is uniform, rounded up, at least 1."""
    total = idle.shape[1]
    count = _round_up(max(1, int((~idle).sum(1).max())), round_to, total)
    first = size.masked_fill(~idle, torch.inf).argsort(dim=1, descending=True, stable=True)
    return first[:, :count].sort(dim=1).values


def _round_up(count: int, multiple: int, limit: int) -> int:
    return min(-(-count // multiple) * multiple, limit)


def _others(kept: Tensor, total: int) -> Tensor:
    dropped = torch.ones(total, dtype=torch.bool, device=kept.device)
    dropped[kept] = False
    return dropped.nonzero().flatten()


def _zero_rows(affine: Affine) -> Tensor:
    return (affine.rows == 0).all(1)


def _zero_columns(affine: Affine) -> Tensor:
    return (affine.down == 0).all(0)


def _zero_bias(affine: Affine) -> Tensor:
    if affine.bias is None:
        return torch.ones(len(affine.rows), dtype=torch.bool, device=affine.rows.device)
    return affine.bias == 0


def _row_sizes(affine: Affine) -> Tensor:
    return affine.rows.double().square().sum(1)


def _column_sizes(affine: Affine) -> Tensor:
    return affine.down.double().square().sum(0)


# ------------------------------------------------------------------ modules and state-dict names


def _read(module: nn.Module, features: int) -> Affine:
    """Return a linear module over all `features` of its input, with zero columns for those it
    skips."""
    if hasattr(module, "down"):
        up = module.up
        bias = None if up.bias is None else up.bias.detach()
        return Affine(_wide(module.down, features), up.weight.detach(), bias)
    bias = None if module.bias is None else module.bias.detach()
    return Affine(_wide(module, features), None, bias)


def _wide(linear: nn.Module, features: int) -> Tensor:
    weight = linear.weight.detach()
    inputs = getattr(linear, "inputs", None)
    if inputs is None:
        return weight
    wide = weight.new_zeros(len(weight), features)
    wide[:, inputs] = weight
    return wide


def _store(
    affine: Affine,
    name: str,
    prefix: str,
    tensors: dict[str, Tensor],
    shape: dict[str, Any],
    round_to: int,
    min_saving: float,
) -> None:
    """Put a linear layer into the state dict, and its rank and number of inputs into `shape`."""
    for old in [key for key in tensors if key.startswith(f"{prefix}{name}.")]:
        del tensors[old]
    new: dict[str, Tensor] = {}
    first = "" if affine.up is None else "down."
    inputs = _live_inputs(affine, round_to, min_saving) if _reads_stream(name) else None
    if inputs is not None:
        affine = affine.take_inputs(inputs)
        new[f"{first}inputs"] = inputs
        shape["inputs"][name] = len(inputs)
    new[f"{first}weight"] = affine.down
    if affine.up is not None:
        new["up.weight"] = affine.up
        shape["ranks"][name] = len(affine.down)
    if affine.bias is not None:
        new["bias" if affine.up is None else "up.bias"] = affine.bias
    tensors |= {f"{prefix}{name}.{key}": tensor.contiguous() for key, tensor in new.items()}


def _reads_stream(name: str) -> bool:
    """Return whether a layer reads the residual stream. The others read units or channels."""
    return name.endswith(("q_proj", "k_proj", "v_proj", "fc1"))


def _live_inputs(affine: Affine, round_to: int, min_saving: float) -> Tensor | None:
    """Return the features that this layer reads, ascending; None if reading all of them is as
    good."""
    idle = _zero_columns(affine)
    kept = _select(idle[None], _column_sizes(affine)[None], round_to)[0]
    dead = len(idle) - len(kept)
    return kept if dead and dead >= min_saving * len(idle) else None


# ---------------------------------------------------------------------------- shapes of a model


def layer_shapes(model: nn.Module) -> dict[str, Any]:
    """Return the shapes of every layer in the form of config.edgewhisper, for dense models too."""
    shapes = _model_fields(model)
    for side, attentions in ATTENTIONS.items():
        stack = getattr(model.model, side).layers
        shapes[side] = [
            _shape(layer, attentions) | bits
            for layer, bits in zip(stack, _bits(model, side), strict=True)
        ]
    return shapes


def _bits(model: nn.Module, side: str) -> list[dict[str, Any]]:
    """Return the bits of each layer that config.edgewhisper names, under the key `bits`."""
    config = (getattr(model.config, "edgewhisper", None) or {}).get(side, [])
    known: list[dict[str, Any]] = [
        {"bits": dict(shape["bits"])} if "bits" in shape else {} for shape in config
    ]
    return known or [{} for _ in getattr(model.model, side).layers]


def _model_fields(model: nn.Module) -> dict[str, Any]:
    """Return the fields that belong to no layer: format, rank of a factorised table, windows,
    precision."""
    rows, windows = (
        getattr(model.model.decoder.embed_tokens, "rows", None),
        windows_of(model.config),
    )
    shapes: dict[str, Any] = {"format": FORMAT}
    if rows is not None:
        shapes["token_rank"] = rows.embedding_dim
    if len(windows) > 1:
        shapes["windows"] = windows
    return shapes | precision_fields(model)


def windows_of(config: Any) -> list[int]:
    """Return the window lengths that the model was trained for, in encoder positions, ascending.
    The last one is the full window."""
    shapes = getattr(config, "edgewhisper", None) or {}
    return list(shapes.get("windows", [config.max_source_positions]))


def _shape(layer: nn.Module, attentions: tuple[str, ...]) -> dict[str, Any]:
    shape: dict[str, Any] = {}
    for name in attentions:
        shape[name] = attention_shape(getattr(layer, name))
    modules = dict(layer.named_modules())
    split = {name: module for name, module in modules.items() if hasattr(module, "down")}
    gathered = {name: module for name, module in modules.items() if hasattr(module, "inputs")}
    shape |= {
        "ffn": outputs_of(layer.fc1),
        "ranks": {name: len(module.down.weight) for name, module in split.items()},
        "inputs": {name.removesuffix(".down"): len(m.inputs) for name, m in gathered.items()},
    }
    keys = [n for n, m in split.items() if n.endswith("k_proj") and m.up.bias is not None]
    return shape | ({"biases": keys} if keys else {})


def attention_shape(attention: nn.Module) -> dict[str, Any]:
    """Return the number of heads and the widths of one head of an attention module."""
    heads = attention.num_heads
    shape = {
        "heads": heads,
        "qk_dim": outputs_of(attention.q_proj) // heads,
        "v_dim": _inputs(attention.out_proj) // heads,
    }
    return shape | ({"shared": True} if getattr(attention, "shared", False) else {})


def outputs_of(linear: nn.Module) -> int:
    """Return the number of outputs of a linear module."""
    return len(getattr(linear, "up", linear).weight)


def _inputs(linear: nn.Module) -> int:
    """Return the number of inputs of a layer that reads all its features."""
    return getattr(linear, "down", linear).weight.shape[1]
