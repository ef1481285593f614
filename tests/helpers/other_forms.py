"""Writers of the other forms that checkpoints come in: CTranslate2's model.bin, and .pt files."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

KINDS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "uint16": 5}
"""numpy's name -> CTranslate2's number; uint16 holds the upper halves of bfloat16."""
TO_OPENAI = (
    (r"^model\.", ""),
    (r"\.layers\.(\d+)\.", r".blocks.\1."),
    (r"encoder_attn_layer_norm", "cross_attn_ln"),
    (r"self_attn_layer_norm", "attn_ln"),
    (r"final_layer_norm", "mlp_ln"),
    (r"encoder_attn", "cross_attn"),
    (r"self_attn", "attn"),
    (r"q_proj", "query"),
    (r"k_proj", "key"),
    (r"v_proj", "value"),
    (r"out_proj", "out"),
    (r"fc1", "mlp.0"),
    (r"fc2", "mlp.2"),
    (r"encoder\.layer_norm", "encoder.ln_post"),
    (r"decoder\.layer_norm", "decoder.ln"),
    (r"embed_tokens", "token_embedding"),
    (r"embed_positions\.weight", "positional_embedding"),
)


def text(value: str) -> bytes:
    raw = value.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def model_bin(
    arrays: Mapping[str, np.ndarray], version: int = 6, specification: str = "WhisperSpec"
) -> bytes:
    """The bytes of a model.bin, without aliases."""
    parts = [struct.pack("<I", version), text(specification), struct.pack("<II", 3, len(arrays))]
    for name, array in arrays.items():
        raw, shape = array.tobytes(), array.shape
        parts.append(text(name) + struct.pack(f"<B{len(shape)}I", len(shape), *shape))
        parts.append(struct.pack("<BI", KINDS[str(array.dtype)], len(raw)) + raw)
    return b"".join([*parts, struct.pack("<I", 0)])


def ctranslate2_arrays(model: Any, kind: str = "float32") -> dict[str, np.ndarray]:
    """The variables of a dense model under CTranslate2's names, matrices in the given type."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found: dict[str, np.ndarray] = {}

    def put(name: str, array: np.ndarray) -> None:
        if kind == "int8" and array.ndim > 1 and name.endswith("weight"):
            scale = 127 / np.maximum(np.abs(array).reshape(len(array), -1).max(axis=1), 1e-9)
            rounded = np.rint(array * scale.reshape(-1, *[1] * (array.ndim - 1)))
            found[name], found[f"{name}_scale"] = rounded.astype(np.int8), scale.astype(np.float32)
        elif kind == "bfloat16":
            found[name] = (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            found[name] = array.astype("float32" if kind == "int8" else kind)

    def linear(to: str, *sources: str) -> None:
        width = len(state[f"{sources[0]}.weight"])
        put(f"{to}/weight", np.concatenate([state[f"{source}.weight"] for source in sources]))
        biases = [state.get(f"{s}.bias", np.zeros(width, np.float32)) for s in sources]
        put(f"{to}/bias", np.concatenate(biases))

    def norm(to: str, source: str) -> None:
        put(f"{to}/gamma", state[f"{source}.weight"])
        put(f"{to}/beta", state[f"{source}.bias"])

    put("decoder/embeddings/weight", state["model.decoder.embed_tokens.weight"])
    for number in (1, 2):
        linear(f"encoder/conv{number}", f"model.encoder.conv{number}")
    for side in ("encoder", "decoder"):
        heads = getattr(model.config, f"{side}_attention_heads")
        found[f"{side}/num_heads"] = np.array(heads, np.int16)
        positions = state[f"model.{side}.embed_positions.weight"]
        put(f"{side}/position_encodings/encodings", positions)
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for number in range(getattr(model.config, f"{side}_layers")):
            to, at = f"{side}/layer_{number}", f"model.{side}.layers.{number}"
            own = [f"{at}.self_attn.{part}_proj" for part in "qkv"]
            linear(f"{to}/self_attention/linear_0", *own)
            linear(f"{to}/self_attention/linear_1", f"{at}.self_attn.out_proj")
            norm(f"{to}/self_attention/layer_norm", f"{at}.self_attn_layer_norm")
            if side == "decoder":
                cross = f"{at}.encoder_attn"
                linear(f"{to}/attention/linear_0", f"{cross}.q_proj")
                linear(f"{to}/attention/linear_1", f"{cross}.k_proj", f"{cross}.v_proj")
                linear(f"{to}/attention/linear_2", f"{cross}.out_proj")
                norm(f"{to}/attention/layer_norm", f"{at}.encoder_attn_layer_norm")
            linear(f"{to}/ffn/linear_0", f"{at}.fc1")
            linear(f"{to}/ffn/linear_1", f"{at}.fc2")
            norm(f"{to}/ffn/layer_norm", f"{at}.final_layer_norm")
    return found


def write_pt(model: Any, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """The file that openai-whisper would save."""
    config, state = model.config, {}
    for name, tensor in model.state_dict().items():
        if name != "proj_out.weight":
            for pattern, replacement in TO_OPENAI:
                name = re.sub(pattern, replacement, name)
            state[name] = tensor.to(dtype).clone()
    dims = {
        "n_mels": config.num_mel_bins,
        "n_vocab": config.vocab_size,
        "n_audio_ctx": config.max_source_positions,
        "n_audio_state": config.d_model,
        "n_audio_head": config.encoder_attention_heads,
        "n_audio_layer": config.encoder_layers,
        "n_text_ctx": config.max_target_positions,
        "n_text_state": config.d_model,
        "n_text_head": config.decoder_attention_heads,
        "n_text_layer": config.decoder_layers,
    }
    torch.save({"dims": dims, "model_state_dict": state}, path)
