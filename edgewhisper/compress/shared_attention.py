"""Attention with one narrow key and value for all heads, where k_proj and v_proj are low-rank.

This is LiteASR's attention in the reduced dimension (arXiv:2502.20583); equation numbers are those
of lite.py. With A = X down_q, B = X down_k, C = X down_v (frames, k), which all heads share, and
the factors `up` of head i,

    Q_i K_i^T = A M_i B^T + A up_q^T bias_k + bias_q up_k B^T + bias_q bias_k             (12)
    M_i = up_q^T up_k
    softmax(...) V_i = softmax(...) C up_v^T + bias_v                                     (16)

The second and fourth term of (12) are equal for every key, so the softmax ignores them. The queries
of head i become A M_i + bias_q up_k, the only key is B, and up_v is folded into out_proj. The
authors use a custom kernel; this form needs only matrix products, which every graph format has.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from edgewhisper import whisper
from edgewhisper.calibration import exact
from edgewhisper.compress.ranks import worth_it
from edgewhisper.whisper import LowRank
from export.shrink import layer_shapes

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration


def queries_of_shared_key(
    query: Tensor, query_bias: Tensor, key: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """(12): up_q (heads * d, k_q), its bias (heads * d,), up_k (heads * d, k_k) -> M of all heads
    (heads * k_k, k_q) and its bias (heads * k_k,)."""
    query, bias, key = (x.unflatten(0, (heads, -1)) for x in (query, query_bias, key))
    return (key.mT @ query).flatten(0, 1), (key.mT @ bias[..., None]).flatten()


def output_of_shared_value(
    out: Tensor, value: Tensor, value_bias: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """(16): out (d_out, heads * d), up_v (heads * d, k_v), its bias -> out (d_out, heads * k_v),
    which reads the mixed C of all heads, and the contribution of the bias (d_out,)."""
    of_head = out.unflatten(1, (heads, -1)).transpose(0, 1)  # (heads, d_out, d)
    folded = of_head @ value.unflatten(0, (heads, -1))  # (heads, d_out, k_v)
    return folded.transpose(0, 1).flatten(1), out @ value_bias


def share_attention(
    model: "WhisperForConditionalGeneration",
) -> "tuple[WhisperForConditionalGeneration, list[int]]":
    """Share keys and values in the encoder layers where that is narrower than a head.

    Returns a model with the same outputs, and the numbers of those layers.
    """
    tensors, shapes = dict(model.state_dict()), layer_shapes(model)
    numbers = []
    for number, layer in enumerate(model.model.encoder.layers):
        if narrower_than_a_head(layer.self_attn):
            numbers.append(number)
            prefix = f"model.encoder.layers.{number}.self_attn."
            for name in [name for name in tensors if name.startswith(prefix)]:
                del tensors[name]
            shared, shape = shared_form(layer.self_attn)
            tensors |= {f"{prefix}{name}": tensor for name, tensor in shared.items()}
            describe_shared(shapes["encoder"][number], shape, set(shared))
    return (whisper.rebuild(model, tensors, shapes) if numbers else model), numbers


def narrower_than_a_head(attention: nn.Module) -> bool:
    """Return whether key and value are low-rank with ranks below a head's width."""
    key, value = attention.k_proj, attention.v_proj
    if getattr(attention, "shared", False) or not all(isinstance(m, LowRank) for m in (key, value)):
        return False
    return all(m.down.out_features < m.up.out_features // attention.num_heads for m in (key, value))


def shared_form(attention: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of the attention in its shared form, by name, and its shape."""
    query, key, value, out = (getattr(attention, f"{n}_proj") for n in ("q", "k", "v", "out"))
    heads = attention.num_heads
    first, last = getattr(out, "down", out), getattr(out, "up", out)
    folded, constant = output_of_shared_value(
        exact(first.weight), exact(value.up.weight), exact(value.up.bias), heads
    )
    if last is not first:
        constant = exact(last.weight) @ constant
    last_query = getattr(query, "up", query)
    weight, bias = queries_of_shared_key(
        exact(last_query.weight), exact(last_query.bias), exact(key.up.weight), heads
    )
    tensors = {
        **query_tensors(query, weight, bias),
        **named("k_proj", key.down),
        **named("v_proj", value.down),
        **named("out_proj", out),
    }
    tensors[f"out_proj.{'' if last is first else 'down.'}weight"] = folded
    tensors[f"out_proj.{'' if last is first else 'up.'}bias"] = exact(last.bias) + constant
    shape = {"qk_dim": key.down.out_features, "v_dim": value.down.out_features}
    like = first.weight
    cast = {n: t.to(like.dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    on_device = {name: tensor.to(like.device) for name, tensor in cast.items()}
    return on_device, {"heads": heads, **shape, "shared": True}


def query_tensors(query: nn.Module, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Return the tensors of q_proj with a new last factor.

    A low-rank q_proj becomes dense again if that has no more weights than two factors.
    """
    if not isinstance(query, LowRank):
        return named("q_proj", query) | {"q_proj.weight": weight, "q_proj.bias": bias}
    rank, d_in = query.down.weight.shape
    if worth_it(rank, len(weight), d_in):
        return named("q_proj", query) | {"q_proj.up.weight": weight, "q_proj.up.bias": bias}
    dense = {"q_proj.weight": weight @ exact(query.down.weight), "q_proj.bias": bias}
    return named("q_proj", query.down) | dense


def named(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Return the module's tensors, with `name` as a prefix."""
    return {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}


def describe_shared(layer: dict[str, Any], shape: dict[str, Any], tensors: set[str]) -> None:
    """Update a layer's shapes for its attention in the shared form."""
    layer["self_attn"] = shape
    for name in ("q_proj", "k_proj", "v_proj"):
        if f"{name}.weight" in tensors:
            layer["ranks"].pop(f"self_attn.{name}", None)
    layer.pop("biases", None)
