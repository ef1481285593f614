"""Write whisper.cpp's model file from a Hugging Face checkpoint.

    magic        "ggml"
    header       11 int32: vocabulary; positions, width, heads, layers of the encoder; the same of
                 the decoder; mel bins; kind of file
    mel filters  int32 bins, int32 frequencies, float32 (bins, frequencies)
    words        int32 count; for each word int32 length and bytes
    tensors      until the end: int32 axes, int32 length of the name, int32 type, int32 sizes from
                 the innermost axis on, name, data

All numbers are little-endian. The kinds are `f16` and `q8_0`; whisper.cpp's convolutions need
float16 kernels, so a float32 file would not run. In f16, every tensor with at least two axes is
float16, except the positions and the convolutions' biases, which have an extra axis. In q8_0, the
matrices are quantised in blocks of 32 inputs with a common scale:

    d = max |x| / 127,   q = round(x / d),   stored as float16 d and 32 int8 q

whisper.cpp builds its graph from the header alone: all layers are alike, and feed-forward layers
are four times as wide as the model. The format follows whisper.cpp's models/README.md.
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
"""Files with quantised tensors add the version of their format, 2, times 1000 to the kind."""
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
"""Substitutions, applied in order, from Hugging Face's names to those of OpenAI's release."""

TIED = "proj_out.weight"


def convert(checkpoint: Path, out: Path, kind: str = "q8_0") -> None:
    """Write a folder with the model file and the checkpoint's decoding rules.

    The rules are needed because the engine knows only the ids of OpenAI's vocabulary. Raises
    Problem for an unknown kind, and for a checkpoint that does not fit whisper.cpp's graph.
    """
    if kind not in KINDS:
        raise Problem(f"unknown ggml kind {kind!r}", hint=f"choose one of {', '.join(KINDS)}")
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
    """Raise Problem for a model that whisper.cpp cannot represent."""
    width = config["d_model"]
    if config.get("edgewhisper"):
        raise Problem(
            f"{checkpoint}: its layers have individual shapes, which whisper.cpp does not support",
            hint="convert the dense checkpoint that it was made from",
        )
    for side in ("encoder", "decoder"):
        if config[f"{side}_ffn_dim"] != 4 * width:
            raise Problem(
                f"{checkpoint}: the {side}'s feed-forward layers are {config[f'{side}_ffn_dim']} "
                f"wide; whisper.cpp assumes {4 * width}, four times the model's width",
                hint="leave whisper.cpp out for this model",
            )
    if kind == "q8_0" and width % BLOCK:
        raise Problem(
            f"{checkpoint}: the model is {width} wide, not a multiple of q8_0's blocks of {BLOCK}",
            hint="write f16 instead",
        )


def header(config: dict[str, Any], kind: str) -> bytes:
    """Return the magic number and the eleven numbers of the header."""
    sides = (("encoder", "max_source_positions"), ("decoder", "max_target_positions"))
    sizes = [config["vocab_size"]]
    for side, positions in sides:
        heads, layers = config[f"{side}_attention_heads"], config[f"{side}_layers"]
        sizes += [config[positions], config["d_model"], heads, layers]
    return struct.pack("<12i", MAGIC, *sizes, config["num_mel_bins"], KINDS[kind])


def filters(checkpoint: Path) -> bytes:
    """Return the sizes and values of the mel filters (bins, frequencies)."""
    from transformers import WhisperFeatureExtractor

    table = np.asarray(WhisperFeatureExtractor.from_pretrained(checkpoint).mel_filters).T
    return struct.pack("<2i", *table.shape) + table.astype("<f4").tobytes()


def words(checkpoint: Path, vocabulary: int) -> bytes:
    """Return the bytes of the ordinary tokens, which come first; whisper.cpp names the others."""
    from transformers import WhisperTokenizer

    from export.tokens import token_bytes

    table = token_bytes(WhisperTokenizer.from_pretrained(checkpoint), vocabulary)
    count = next((i for i, word in enumerate(table) if word is None), len(table))
    known = [b64decode(word or "") for word in table[:count]]
    packed = (struct.pack("<i", len(word)) + word for word in known)
    return struct.pack("<i", count) + b"".join(packed)


def tensors(checkpoint: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield tensors under whisper.cpp's names, without the output layer, which is tied."""
    from safetensors.numpy import load_file

    for name, array in load_file(checkpoint / "model.safetensors").items():
        if name != TIED:
            renamed = rename(name)
            is_bias = re.fullmatch(r"encoder\.conv\d\.bias", renamed)
            yield renamed, array[:, None] if is_bias else array


def rename(name: str) -> str:
    """Return OpenAI's name: decoder.blocks.0.mlp.0.weight for model.decoder.layers.0.fc1.weight."""
    for pattern, text in RENAMED:
        name = re.sub(pattern, text, name)
    return name


def type_of(name: str, array: NDArray[Any], kind: str) -> str:
    """Return the type of a tensor in a file of this kind."""
    if array.ndim < 2 or name in FLOATS:
        return "f32"
    return kind if array.ndim == 2 else "f16"


def write_tensor(file: BinaryIO, name: str, array: NDArray[Any], kind: str) -> None:
    stored, label = type_of(name, array, kind), name.encode()
    file.write(struct.pack("<3i", array.ndim, len(label), TYPES[stored]))
    file.write(struct.pack(f"<{array.ndim}i", *array.shape[::-1]) + label)
    file.write(data(array, stored))


def data(array: NDArray[Any], stored: str) -> bytes:
    """Return a tensor's bytes in row-major order."""
    if stored == "q8_0":
        return q8_0(array)
    return np.ascontiguousarray(array, "<f4" if stored == "f32" else "<f2").tobytes()


def q8_0(array: NDArray[Any]) -> bytes:
    """Quantise (..., inputs) to blocks of a float16 scale and 32 int8 codes.

    Halves are rounded away from zero.
    """
    blocks = np.asarray(array, np.float32).reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)  # (blocks, 1)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    steps = (blocks * inverse).astype(np.float64)
    packed = np.empty(len(blocks), [("d", "<f2"), ("q", "i1", BLOCK)])
    packed["d"] = scale[:, 0]
    packed["q"] = np.trunc(steps + np.copysign(0.5, steps))
    return packed.tobytes()


def rules(checkpoint: Path) -> dict[str, Any]:
    """Return the checkpoint's decoding rules and the window in samples."""
    from transformers import WhisperFeatureExtractor

    samples = WhisperFeatureExtractor.from_pretrained(checkpoint).n_samples
    return {**decoding_rules_of(checkpoint), "window_samples": samples}


def decoding_rules_of(checkpoint: Path) -> dict[str, Any]:
    """Return prompt, end, languages and suppressed tokens as in an artifact's manifest."""
    from transformers import GenerationConfig, WhisperConfig

    from export.manifest import decoding_rules

    parts: Any = SimpleNamespace(
        config=WhisperConfig.from_pretrained(checkpoint),
        generation_config=GenerationConfig.from_pretrained(checkpoint),
    )
    return decoding_rules(parts)
