"""The per-layer shapes of a compressed model: format, validation and audio windows.

The layers of a compressed checkpoint may differ in shape. `config.json` stores the shapes under the
key `edgewhisper`:

    {"format": 1, "encoder": [LAYER, ...], "decoder": [LAYER, ...]}
    LAYER  self_attn, encoder_attn (decoder only): {"heads": h, "qk_dim": k, "v_dim": v}
               "shared": true (encoder only): all heads share one key and one value, computed by
               k_proj (k, in) and v_proj (v, in) without biases
           ffn: width of the feed-forward layer
           ranks: {"fc1": r, ...}    the linear layer is stored as `down` (r, in) and `up` (out, r)
           inputs: {"fc1": n, ...}   the linear layer reads n of its features (buffer `inputs`)
           biases: ["self_attn.k_proj", ...]   low-rank key projections with a bias, stored on `up`;
                                               Whisper's own key projections have none. Optional.
           bits: {"fc1": 4, ...}     the layer's weights (both factors of a low-rank layer) lie on
                                     the grid of this many bits (export/quantise.py), and an int8
                                     export stores them in this width: 4, 8, 16, or 32 for floats.
                                     Layers without an entry use the precision of the export.
    token_bits: b                    bits of the token table: 4, 8, 16 or 32
    token_columns: [n, ...]          exponents of two by which the columns of a dense token table
                                     are divided before they are quantised; none if absent
    token_rows_in_8_bits: n          first rows of a dense token table in 4 bits that have 8 bits;
                                     none if absent
    token_rows_in_3_bits: [n, m]     rows from n to m - 1 of such a table that have 3 bits
    stem_bits: b                     bits of the convolutions: 8 or 32; float16 if absent
    block: n                         inputs that share a scale in 4 bits; 32 if absent
    half_scales: true                4-bit scales are float16; float32 if absent
    integer_scales: true             4-bit scales are integers times a power of two per row
    scales: "tensor"                 one scale for each weight instead of one for each output
    token_rank: r                    the token table is a product (vocabulary, r) (r, d_model)
    windows: [n, ...]                audio lengths that the model was trained for, in encoder
                                     positions of 20 ms, ascending; the last is
                                     max_source_positions, the only window if "windows" is absent
        with token_rank or windows, "encoder" and "decoder" may be absent: the layers are dense

The standard keys of `config.json` keep the dense model's number of heads, because attention keeps
the dense model's scale 1/sqrt(head_dim).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import WhisperConfig

from export.problem import Problem
from export.quantise import BITS, BLOCKS, SCALES
from export.shrink import ATTENTIONS, FORMAT, windows_of

POSITION_S = 0.02
"""Duration of one encoder position in seconds."""
PRECISION: dict[str, tuple[Any, ...]] = {
    "token_bits": BITS,
    "stem_bits": (8, 32),
    "block": BLOCKS,
    "scales": SCALES,
    "half_scales": (True, False),
    "integer_scales": (True, False),
}
"""Key -> its allowed values."""
DAMAGED = "the checkpoint is damaged: copy it again, or repeat the compression"


def linear_names(attentions: Sequence[str]) -> list[str]:
    """Return the names of a layer's linear modules: "self_attn.q_proj", ..., "fc1", "fc2"."""
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    return [*(f"{name}.{part}" for name in attentions for part in parts), "fc1", "fc2"]


# ------------------------------------------------------------------------------------- windows


def set_windows(config: WhisperConfig, windows: Sequence[int]) -> None:
    """Store the audio lengths that the model was trained for, in encoder positions. The full window
    alone is not stored. Raises Problem for an invalid list."""
    check_windows(list(windows), config.max_source_positions)
    shapes = dict(getattr(config, "edgewhisper", None) or {"format": FORMAT})
    shapes.pop("windows", None)
    if len(windows) > 1:
        shapes["windows"] = list(windows)
    if shapes.keys() > {"format"}:
        config.edgewhisper = shapes
    elif hasattr(config, "edgewhisper"):
        del config.edgewhisper


def remove_short_windows(model: nn.Module, but_s: float | None = None) -> None:
    """Remove the model's short windows, except the one of `but_s` seconds. A length that is not
    among the model's windows changes nothing; the export refuses it."""
    windows = windows_of(model.config)
    kept = windows[-1] if but_s is None else round(but_s / POSITION_S)
    if kept in windows:
        set_windows(model.config, sorted({kept, windows[-1]}))


def check_windows(windows: Any, positions: int) -> None:
    """Raise Problem if `windows` is not a valid list for a model of so many encoder positions."""
    integers = isinstance(windows, list) and all(type(n) is int and n >= 1 for n in windows)
    if not integers or windows != sorted(set(windows)) or windows[-1:] != [positions]:
        raise _invalid(
            f"windows is {windows!r}; it must be an ascending list of encoder positions that ends "
            f"with the model's {positions}"
        )


# ----------------------------------------------------------------------------------- validation


def check_shapes(shapes: Any, config: WhisperConfig) -> None:
    """Check that per-layer shapes describe this model. Raises Problem: unknown format, wrong number
    of layers, or a count that is not an integer between 1 and the dense model's."""
    if not isinstance(shapes, dict) or shapes.get("format") != FORMAT:
        actual = shapes.get("format") if isinstance(shapes, dict) else type(shapes).__name__
        raise Problem(
            f"config.json: per-layer shapes have format {actual!r}; this version reads {FORMAT}",
            hint="load the checkpoint with the EdgeWhisper version that wrote it, or a newer one",
        )
    for key, allowed in PRECISION.items():
        _check_one_of(key, shapes.get(key, allowed[0]), allowed)
    if "token_columns" in shapes:
        _check_columns(shapes["token_columns"], config.d_model)
    if "token_rows_in_8_bits" in shapes:
        rows = {"token_rows_in_8_bits": (shapes["token_rows_in_8_bits"], config.vocab_size - 1)}
        _check_counts(rows)
    if "token_rows_in_3_bits" in shapes:
        _check_rows(shapes["token_rows_in_3_bits"], shapes, config.vocab_size)
    if "token_rank" in shapes:
        limit = min(config.vocab_size, config.d_model)
        _check_counts({"token_rank": (shapes["token_rank"], limit)})
    if "windows" in shapes:
        check_windows(shapes["windows"], config.max_source_positions)
    if {"token_rank", "windows"} & shapes.keys() and not ATTENTIONS.keys() & shapes.keys():
        return
    for side, attentions in ATTENTIONS.items():
        layers, expected = shapes.get(side), getattr(config, f"{side}_layers")
        if not isinstance(layers, list) or len(layers) != expected:
            actual = len(layers) if isinstance(layers, list) else "no"
            raise _invalid(f"{expected} {side} layers, but shapes for {actual} of them")
        for index, layer in enumerate(layers):
            _check_layer(layer, f"{side}.layers.{index}", attentions, side, config)


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
            count = attention.get(key) if isinstance(attention, dict) else None
            counts[f"{name}.{key}"] = (count, limit)
    for table in ("ranks", "inputs") if isinstance(layer, dict) else ():
        for key, count in (layer.get(table) or {}).items():
            counts[f"{table}.{key}"] = (count, max(config.d_model, ffn))
    _check_counts({f"{where}.{key}": count for key, count in counts.items()})
    _check_biases(layer.get("biases", []), layer.get("ranks") or {}, attentions, where)
    _check_bits(layer.get("bits", {}), attentions, where)


def _check_counts(counts: Mapping[str, tuple[Any, int]]) -> None:
    """`counts` maps a name to its value and its maximum."""
    for name, (count, limit) in counts.items():
        if type(count) is not int or not 1 <= count <= limit:
            raise _invalid(f"{name} is {count!r}; it must be between 1 and {limit}")


def _check_rows(rows: Any, shapes: Mapping[str, Any], size: int) -> None:
    """Check the first row in 3 bits, and the first one after them."""
    least = shapes.get("token_rows_in_8_bits", 0)
    integers = isinstance(rows, list) and [type(n) for n in rows] == [int, int]
    if not integers or not least <= rows[0] < rows[1] <= size:
        raise _invalid(
            f"token_rows_in_3_bits is {rows!r}; it must be two ascending integers between {least} "
            f"and {size}"
        )


def _check_columns(exponents: Any, width: int) -> None:
    """Check the exponents of two of a token table's columns."""
    small = isinstance(exponents, list) and all(
        type(exponent) is int and abs(exponent) <= 100 for exponent in exponents
    )
    if not small or len(exponents) != width:
        raise _invalid(f"token_columns must be {width} integers between -100 and 100")


def _check_shared(attention: Any, side: str, where: str) -> None:
    shared = attention.get("shared", False) if isinstance(attention, dict) else False
    if shared is not False and (shared is not True or side != "encoder"):
        raise _invalid(
            f"{where}.shared is {shared!r}; it must be true or false, and may be true in the "
            "encoder only"
        )


def _check_biases(
    biases: Any, ranks: Mapping[str, int], attentions: Sequence[str], where: str
) -> None:
    allowed = [f"{name}.k_proj" for name in attentions if f"{name}.k_proj" in ranks]
    if not isinstance(biases, list) or any(entry not in allowed for entry in biases):
        raise _invalid(
            f"{where}.biases is {biases!r}; it must be a list of low-rank key projections "
            f"({', '.join(allowed) or 'this layer has none'})"
        )


def _check_bits(bits: Any, attentions: Sequence[str], where: str) -> None:
    names = linear_names(attentions)
    if not isinstance(bits, dict) or any(name not in names for name in bits):
        raise _invalid(
            f"{where}.bits is {bits!r}; it must be a table of linear layers ({', '.join(names)})"
        )
    for name, value in bits.items():
        _check_one_of(f"{where}.bits.{name}", value, BITS)


def _check_one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if type(value) is not type(allowed[0]) or value not in allowed:
        raise _invalid(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")


def _invalid(reason: str) -> Problem:
    return Problem(f"config.json: {reason}", hint=DAMAGED)
