"""Whisper with layers of different shapes, and where things are in the model.

`WhisperForConditionalGeneration` is transformers' model with the layer shapes and audio windows
that `config.edgewhisper` describes (see edgewhisper/shapes.py). `rebuild` makes such a model from
tensors and shapes. `linears`, `side_and_layer`, `reads_audio` and `input_of` locate its layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import (
    ALL_ATTENTION_FUNCTIONS,
    BaseModelOutput,
    EncoderDecoderCache,
    WhisperAttention,
    WhisperEncoder,
    capture_outputs,
    eager_attention_forward,
    merge_with_config_defaults,
    sinusoids,
)

from edgewhisper.shapes import check_shapes, set_windows
from edgewhisper.silence import placed, score_weights
from export.onnx.silence import Silence
from export.problem import Problem
from export.shrink import ATTENTIONS, windows_of


class GatherLinear(nn.Linear):
    """A linear layer over a subset of its input features: y = W x[inputs] + b. x (..., d_in) ->
    (..., out_features); `inputs` (in_features,) holds ascending feature indices."""

    inputs: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("inputs", torch.arange(in_features))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.index_select(-1, self.inputs))


class LowRank(nn.Module):
    """A linear layer factorised into two: y = up(down(x)), x (..., d_in) -> (..., d_out)."""

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.down = down
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class FactorisedTable(nn.Module):
    """The tied token table factorised into two: E = rows @ up.T, (V, r) (r, d_model). ids (..., n)
    -> (..., n, d_model). `logits` uses the transposes of the same two factors."""

    def __init__(self, rows: nn.Embedding, up: nn.Linear) -> None:
        super().__init__()
        self.rows = rows
        self.up = up

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.rows(ids))

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (..., V) of decoder outputs x (..., d_model)."""
        return functional.linear(functional.linear(x, self.up.weight.T), self.rows.weight)


class TiedOutput(nn.Module):
    """The output layer of a model with a factorised token table. It has no weights of its own."""

    def __init__(self, table: FactorisedTable) -> None:
        super().__init__()
        self._table = (
            table,
        )  # the tuple hides it from nn.Module: the factors are counted and saved once

    @property
    def table(self) -> FactorisedTable:
        return self._table[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.table.logits(x)


class SlimAttention(WhisperAttention):
    """Whisper's attention with its own number of heads, and separate key and value widths.

    The scale is that of the dense head, so removing zero channels does not change the output. With
    `shared`, the queries of all heads use one key and one value.
    """

    def __init__(
        self, dense: WhisperAttention, heads: int, qk_dim: int, v_dim: int, shared: bool = False
    ) -> None:
        super().__init__(
            dense.embed_dim,
            dense.num_heads,
            dense.dropout,
            dense.is_decoder,
            is_causal=dense.is_causal,
            layer_idx=dense.layer_idx,
            config=dense.config,
        )
        self.num_heads, self.head_dim, self.v_dim, self.shared = heads, qk_dim, v_dim, shared

    def _heads(self, x: Tensor, dim: int) -> Tensor:
        """(batch, time, heads * dim) -> (batch, heads, time, dim); repeats a shared head."""
        split = x.unflatten(-1, (-1, dim)).transpose(1, 2)
        return split.expand(-1, self.num_heads, -1, -1).contiguous()

    def _keys_values(self, states: Tensor, cache: Any, is_cross: bool) -> tuple[Tensor, Tensor]:
        """Return keys and values, reading and updating the cache as transformers does."""
        if isinstance(cache, EncoderDecoderCache):
            ready = is_cross and cache.is_updated.get(self.layer_idx)
            if is_cross:
                cache.is_updated[self.layer_idx] = True
            cache = cache.cross_attention_cache if is_cross else cache.self_attention_cache
            if ready:
                return cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        key = self._heads(self.k_proj(states), self.head_dim)
        value = self._heads(self.v_proj(states), self.v_dim)
        return (key, value) if cache is None else cache.update(key, value, self.layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return outputs (batch, time, d_model), and attention weights if requested."""
        is_cross = key_value_states is not None
        query = self._heads(self.q_proj(hidden_states) * self.scaling, self.head_dim)
        states = hidden_states if key_value_states is None else key_value_states
        key, value = self._keys_values(states, past_key_values, is_cross)
        if not self.is_decoder:
            query, key, value = equal_widths(query, key, value)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=1.0,
            output_attentions=output_attentions,
            **kwargs,
        )
        return self.out_proj(output[..., : self.v_dim].flatten(2)), weights


def equal_widths(*tensors: Tensor) -> list[Tensor]:
    """Pad queries, keys and values with zeros to the same width. Otherwise torch stores the scores
    of all pairs of positions."""
    width = max(tensor.shape[-1] for tensor in tensors)
    return [functional.pad(tensor, (0, width - tensor.shape[-1])) for tensor in tensors]


OUTPUTS = ("attention_mask", "output_attentions", "output_hidden_states")
"""Arguments of the encoder that need all clips at once."""


class Encoder(WhisperEncoder):
    """Whisper's encoder for audio of several lengths: (batch, mels, 2 n) -> (batch, n, d_model).

    In training, n is any number up to the model's positions. In evaluation, n must be one of the
    model's windows, because Whisper's output is unusable for lengths that it was not trained on.
    """

    any_length = False
    """Set for a teacher, which must accept all lengths that its student is trained on."""
    one_by_one = False
    """Set by `generate` on a CPU: the states of one clip stay in its caches, those of a batch do
    not. The encoder of tiny.en took 0.32 s of CPU time for a clip, and 0.43 s in a batch of 16."""
    silence: Silence | None = None
    """Set by `silence_in_groups`."""

    def forward(self, input_features: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.one_by_one and len(input_features) > 1 and not any(map(kwargs.get, OUTPUTS)):
            outputs = [self._encoded(clip, *args, **kwargs) for clip in input_features.split(1)]
            return BaseModelOutput(torch.cat([output.last_hidden_state for output in outputs]))
        return self._encoded(input_features, *args, **kwargs)

    def _encoded(self, input_features: Tensor, *args: Any, **kwargs: Any) -> Any:
        if input_features.shape[-1] == 2 * self.max_source_positions:
            return super().forward(input_features, *args, **kwargs)
        self._refuse_length(input_features.shape[-1])
        return self._short(input_features, *args, **kwargs)

    @merge_with_config_defaults
    @capture_outputs
    def _short(
        self, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        x = functional.gelu(self.conv1(input_features))
        x = functional.gelu(self.conv2(x)).transpose(1, 2)
        x = placed(self, x)
        weights = score_weights(self, x)
        x = functional.dropout(x, p=self.dropout, training=self.training)
        for layer in self.layers:
            if not (self.training and torch.rand([]) < self.layerdrop):
                x = layer(x, weights, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(x))

    def _refuse_length(self, frames: int) -> None:
        if self.any_length:
            return
        windows = windows_of(self.config)
        accepted = range(1, windows[-1] + 1) if self.training else windows
        if frames % 2 or frames // 2 not in accepted:
            raise Problem(
                f"the model accepts windows of {', '.join(str(2 * n) for n in windows)} mel "
                f"frames; {frames} were given",
                hint="pad the audio to one of them; the method `short` trains further lengths",
            )


class WhisperForConditionalGeneration(transformers.WhisperForConditionalGeneration):
    """Transformers' model with the layer shapes and windows of `config.edgewhisper`."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        self.model.encoder = None  # frees the dense encoder before the new one is made
        self.model.encoder = Encoder(self.config)
        positions = self.model.encoder.embed_positions.weight
        positions.data.copy_(
            sinusoids(*positions.shape)
        )  # transformers does this for its own class only
        shapes = getattr(config, "edgewhisper", None)
        if shapes is not None:
            check_shapes(shapes, config)
            for side in ATTENTIONS.keys() & shapes.keys():
                stack = getattr(self.model, side)
                for layer, shape in zip(stack.layers, shapes[side], strict=True):
                    _reshape_layer(layer, shape, ATTENTIONS[side])
            if "token_rank" in shapes:
                self.factorise_table(shapes["token_rank"])

    def factorise_table(self, rank: int) -> None:
        dense = self.model.decoder.embed_tokens
        rows = nn.Embedding(dense.num_embeddings, rank, dense.padding_idx)
        table = FactorisedTable(rows, nn.Linear(rank, dense.embedding_dim, bias=False))
        self.model.decoder.embed_tokens = table
        self.proj_out = TiedOutput(table)
        # transformers ties tensors by name; here both uses share one module instead
        self._tied_weights_keys = None
        self.all_tied_weights_keys: dict[str, str] = {}

    def generate(self, input_features: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, also for features of one of the model's short windows.

        Transformers pads features to `config.max_source_positions`. This value is changed during
        the call, so only one thread may generate at a time.
        """
        full = self.config.max_source_positions
        positions = 0 if input_features is None else input_features.shape[-1] // 2
        if positions in windows_of(self.config):
            self.config.max_source_positions = positions
        encoder = self.model.encoder
        encoder.one_by_one = next(encoder.parameters()).is_cpu
        try:
            return super().generate(input_features, *args, **kwargs)
        finally:
            self.config.max_source_positions = full
            encoder.one_by_one = False


def _reshape_layer(layer: nn.Module, shape: Mapping[str, Any], attentions: Sequence[str]) -> None:
    d_model = layer.embed_dim
    for name in attentions:
        attention = SlimAttention(getattr(layer, name), **shape[name])
        heads, qk, v = (shape[name][count] for count in ("heads", "qk_dim", "v_dim"))
        kv_heads = 1 if attention.shared else heads
        sizes = {"q_proj": (d_model, heads * qk), "k_proj": (d_model, kv_heads * qk)}
        sizes |= {"v_proj": (d_model, kv_heads * v), "out_proj": (heads * v, d_model)}
        no_bias = {"k_proj", "v_proj"} if attention.shared else {"k_proj"}
        for linear, (d_in, d_out) in sizes.items():
            full_name = f"{name}.{linear}"
            bias = linear not in no_bias or full_name in shape.get("biases", ())
            setattr(attention, linear, _linear(full_name, d_in, d_out, bias, shape))
        setattr(layer, name, attention)
    layer.fc1 = _linear("fc1", d_model, shape["ffn"], True, shape)
    layer.fc2 = _linear("fc2", shape["ffn"], d_model, True, shape)


def _linear(
    name: str, d_in: int, d_out: int, bias: bool, shape: Mapping[str, Any]
) -> nn.Linear | LowRank:
    def first(d_out: int, bias: bool) -> nn.Linear:
        inputs = shape.get("inputs", {}).get(name)
        return GatherLinear(inputs, d_out, bias) if inputs else nn.Linear(d_in, d_out, bias)

    rank = shape.get("ranks", {}).get(name)
    return LowRank(first(rank, False), nn.Linear(rank, d_out, bias)) if rank else first(d_out, bias)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield every nn.Linear of the encoder and decoder blocks with its name, in model order. The
    convolutions, layer norms, embeddings and the tied output are not included."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            yield name, module


def side_and_layer(name: str) -> tuple[str, int]:
    """Return side and layer number: "model.encoder.layers.3.fc1" -> "encoder", 3."""
    before, _, after = name.partition(".layers.")
    return before.rpartition(".")[2], int(after.partition(".")[0])


def reads_audio(name: str) -> bool:
    """Return whether the module's input rows are encoder positions rather than tokens."""
    cross = ("encoder_attn.k_proj", "encoder_attn.v_proj")
    return side_and_layer(name)[0] == "encoder" or name.endswith(cross)


def input_of(name: str) -> str:
    """Return the name of the first module that reads the same input tensor as this one."""
    attention, _, part = name.rpartition(".")
    if attention.endswith(".self_attn") and part in ("q_proj", "k_proj", "v_proj"):
        return f"{attention}.q_proj"
    if attention.endswith(".encoder_attn") and part in ("k_proj", "v_proj"):
        return f"{attention.partition('.layers.')[0]}.layers.0.encoder_attn.k_proj"
    return name


def rebuild(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    layers: dict[str, Any] | None,
    decoder_layers: int | None = None,
) -> WhisperForConditionalGeneration:
    """Return a new model with the per-layer shapes `layers` (None: dense) and these tensors.

    `decoder_layers` is the number of decoder layers if `layers` does not have them (None: as in
    `model`). They are renumbered, because their index selects their entry in the key-value cache.
    The config, generation config, training mode and, if `layers` has none, the windows are copied
    from `model`. Raises Problem if tensors and shapes do not fit together.
    """
    config = copy.deepcopy(model.config)
    config.decoder_layers = decoder_layers or config.decoder_layers
    for side in ATTENTIONS.keys() & (layers or {}).keys():
        setattr(config, f"{side}_layers", len((layers or {})[side]))
    config.edgewhisper = copy.deepcopy(layers)
    if layers is None:
        del config.edgewhisper
    if layers is None or "windows" not in layers:
        set_windows(config, windows_of(model.config))
    built = WhisperForConditionalGeneration(config)
    tied = {name: tensor for name, tensor in tensors.items() if name != "proj_out.weight"}
    try:
        report = built.load_state_dict(tied, strict=False)
    except RuntimeError as error:
        raise Problem(f"tensors do not fit the per-layer shapes: {error}") from error
    missing = set(report.missing_keys) - {"proj_out.weight"}
    if missing or report.unexpected_keys:
        names = sorted(missing) + sorted(report.unexpected_keys)
        raise Problem(f"tensors do not fit the per-layer shapes: {', '.join(names[:5])}")
    built.generation_config = copy.deepcopy(model.generation_config)
    return built.to(next(model.parameters()).device).train(model.training)
