"""whisper.cpp's model file, written from a Hugging Face checkpoint.

    magic "ggml" | 11 int32: vocabulary, then of the encoder positions, width, heads, layers, of the
    decoder the same four, mel bins, kind of file | mel filters: int32 bins, int32 frequencies,
    float32 (bins, frequencies) | int32 words, each: int32 length, bytes | tensors until the end:
    int32 axes, int32 length of the name, int32 type, int32 sizes from the innermost axis on, name,
    data

All is little-endian. Kinds: `f16` and `q8_0` (the program's convolutions take no other kernels than
float16, so a file in float32 would not run). In f16 every tensor of two axes or more is float16,
save the positions and the convolutions' biases, which have one axis more than one expects; q8_0
differs from it in the matrices, where 32 neighbouring inputs share a scale:

    d = max |x| / 127,   q = round(x / d),   stored as float16 d, 32 times int8 q

The program builds its graph from the header alone: feed-forward layers are four times as wide as
the model, all layers alike. Read from whisper.cpp's behaviour; see its models/README.md.
"""

from __future__ import annotations

import json
import re
import struct
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from benchmarks.rivals.protocol import RULES
from benchmarks.rivals.whisper_cpp import MODEL
from export.files import new_directory
from export.problem import Problem

MAGIC = 0x67676D6C

QUANTISER = 2000
"""A file with quantised tensors says the version of their format, 2, in thousands of its kind."""
KINDS = {"f16": 1, "q8_0": 7 + QUANTISER}
TYPES = {"f32": 0, "f16": 1, "q8_0": 8}
BLOCK = 32

FLOATS = {"encoder.conv1.bias", "encoder.conv2.bias"}
FLOATS |= {f"{side}.positional_embedding" for side in ("encoder", "decoder")}

RENAMED = (
    (r"^model\.", ""),
    (r"\.layers\.", ".blocks."),
    (r"\.embed_positions\.weight$", ".positional_embedding"),
    (r"\.embed_tokens\.", ".token_embedding."),
    (r"\.self_attn_layer_norm\.", ".attn_ln."),
    (r"\.encoder_attn_layer_norm\.", ".cross_attn_ln."),
    (r"\.final_layer_norm\.", ".mlp_ln."),
    (r"^encoder\.layer_norm\.", "encoder.ln_post."),
    (r"^decoder\.layer_norm\.", "decoder.ln."),
    (r"\.self_attn\.", ".attn."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.out_proj\.", ".out."),
    (r"\.fc1\.", ".mlp.0."),
    (r"\.fc2\.", ".mlp.2."),
)
"""Hugging Face's names, step by step, into those of OpenAI's release."""

TIED = "proj_out.weight"


def convert(checkpoint: Path, out: Path, kind: str = "q8_0") -> None:
    """Write a folder with the model file and the checkpoint's decoding rules (the engine knows only
    the ids of OpenAI's vocabulary).

    Raises Problem: unknown kind, a checkpoint that the program's graph does not fit.
    """
    if kind not in KINDS:
        raise Problem(f"there is no ggml file of kind {kind!r}", hint=f"one of {', '.join(KINDS)}")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    check(checkpoint, config, kind)
    with new_directory(out) as folder:
        with (folder / MODEL).open("wb") as file:
            file.write(header(config, kind))
            file.write(filters(checkpoint))
            file.write(words(checkpoint, config["vocab_size"]))
            for name, array in tensors(checkpoint):
                write_tensor(file, name, array, kind)
        (folder / RULES).write_text(json.dumps(rules(checkpoint)) + "\n", encoding="utf-8")


def check(checkpoint: Path, config: dict[str, Any], kind: str) -> None:
    """Raise the letter for a model that whisper.cpp would misread."""
    width = config["d_model"]
    if config.get("edgewhisper"):
        raise Problem(
            f"{checkpoint}: its layers have shapes of their own; whisper.cpp has one for all",
            hint="convert the dense checkpoint that it was made from",
        )
    for side in ("encoder", "decoder"):
        if config[f"{side}_ffn_dim"] != 4 * width:
            raise Problem(
                f"{checkpoint}: the {side}'s feed-forward layers are {config[f'{side}_ffn_dim']} "
                f"wide; whisper.cpp takes them to be {4 * width}, four times the model's width",
                hint="leave whisper.cpp out for this model",
            )
    if kind == "q8_0" and width % BLOCK:
        raise Problem(
            f"{checkpoint}: the model is {width} wide; q8_0 has blocks of {BLOCK} inputs",
            hint="write f16 instead",
        )


def header(config: dict[str, Any], kind: str) -> bytes:
    """Magic and the eleven numbers."""
    sides = (("encoder", "max_source_positions"), ("decoder", "max_target_positions"))
    sizes = [config["vocab_size"]]
    for side, positions in sides:
        heads, layers = config[f"{side}_attention_heads"], config[f"{side}_layers"]
        sizes += [config[positions], config["d_model"], heads, layers]
    return struct.pack("<12i", MAGIC, *sizes, config["num_mel_bins"], KINDS[kind])


def filters(checkpoint: Path) -> bytes:
    """The mel filters, (bins, frequencies), behind their sizes."""
    from transformers import WhisperFeatureExtractor

    table = np.asarray(WhisperFeatureExtractor.from_pretrained(checkpoint).mel_filters).T
    return struct.pack("<2i", *table.shape) + table.astype("<f4").tobytes()


def words(checkpoint: Path, vocabulary: int) -> bytes:
    """The bytes of the ordinary tokens, which come first; the program names the others itself."""
    from transformers import WhisperTokenizer

    from export.tokens import token_bytes

    table = token_bytes(WhisperTokenizer.from_pretrained(checkpoint), vocabulary)
    count = next((i for i, word in enumerate(table) if word is None), len(table))
    known = [b64decode(word or "") for word in table[:count]]
    packed = (struct.pack("<i", len(word)) + word for word in known)
    return struct.pack("<i", count) + b"".join(packed)


def tensors(checkpoint: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Names and arrays as whisper.cpp has them; the output is the token table again."""
    from safetensors.numpy import load_file

    for name, array in load_file(checkpoint / "model.safetensors").items():
        if name != TIED:
            renamed = rename(name)
            is_bias = re.fullmatch(r"encoder\.conv\d\.bias", renamed)
            yield renamed, array[:, None] if is_bias else array


def rename(name: str) -> str:
    """model.decoder.layers.0.fc1.weight -> decoder.blocks.0.mlp.0.weight"""
    for pattern, text in RENAMED:
        name = re.sub(pattern, text, name)
    return name


def type_of(name: str, array: NDArray[Any], kind: str) -> str:
    """How a tensor is stored in a file of this kind."""
    if array.ndim < 2 or name in FLOATS:
        return "f32"
    return kind if array.ndim == 2 else "f16"


def write_tensor(file: BinaryIO, name: str, array: NDArray[Any], kind: str) -> None:
    stored, label = type_of(name, array, kind), name.encode()
    file.write(struct.pack("<3i", array.ndim, len(label), TYPES[stored]))
    file.write(struct.pack(f"<{array.ndim}i", *array.shape[::-1]) + label)
    file.write(data(array, stored))


def data(array: NDArray[Any], stored: str) -> bytes:
    """A tensor's bytes, row after row."""
    if stored == "q8_0":
        return q8_0(array)
    return np.ascontiguousarray(array, "<f4" if stored == "f32" else "<f2").tobytes()


def q8_0(array: NDArray[Any]) -> bytes:
    """(..., inputs) -> blocks of a float16 scale and 32 int8 codes; halves round away from zero."""
    blocks = np.asarray(array, np.float32).reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)  # (blocks, 1)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    steps = (blocks * inverse).astype(np.float64)
    packed = np.empty(len(blocks), [("d", "<f2"), ("q", "i1", BLOCK)])
    packed["d"] = scale[:, 0]
    packed["q"] = np.trunc(steps + np.copysign(0.5, steps))
    return packed.tobytes()


def rules(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's decoding rules, and the window."""
    from transformers import WhisperFeatureExtractor

    samples = WhisperFeatureExtractor.from_pretrained(checkpoint).n_samples
    return {**decoding_rules_of(checkpoint), "window_samples": samples}


def decoding_rules_of(checkpoint: Path) -> dict[str, Any]:
    """Prompt, end, languages and suppressed tokens, as an artifact's manifest has them."""
    from transformers import GenerationConfig, WhisperConfig

    from export.manifest import decoding_rules

    parts: Any = SimpleNamespace(
        config=WhisperConfig.from_pretrained(checkpoint),
        generation_config=GenerationConfig.from_pretrained(checkpoint),
    )
    return decoding_rules(parts)
