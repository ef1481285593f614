"""Read Whisper models in CTranslate2's format, the folders that faster-whisper uses.

`model.bin` is little-endian (CTranslate2's `model_spec.py`, binary versions 5 and 6):

    u32 version, string "WhisperSpec", u32 revision
    u32 count, then for each variable: string name, u8 rank, u32 sizes, u8 type, u32 bytes, data
    u32 count, then for each alias:    string alias, string name
    string = u16 length, then this many bytes, the last of which is zero

Self-attention stores queries, keys and values in one matrix, cross-attention keys and values.
Weights in int8 or int16 have a `weight_scale`, one for each row or one in total: float = integer /
scale.

The file is not trusted: every length is checked against the file before it is used, and nothing in
the folder is executed.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig

from export.problem import Problem

WEIGHTS, CONFIG = "model.bin", "config.json"
VERSIONS = (5, 6)
SPECIFICATION = "WhisperSpec"
BFLOAT16 = np.dtype("<u2")
"""numpy has no bfloat16; no other type of the file is unsigned."""
TYPES: dict[int, Any] = {
    0: np.dtype("<f4"),
    1: np.dtype("i1"),
    2: np.dtype("<i2"),
    3: np.dtype("<i4"),
    4: np.dtype("<f2"),
    5: BFLOAT16,
}
MOST_VARIABLES = 100_000
GELU = 3
"""CTranslate2's number for Whisper's activation."""
HEAD = 64
"""Width of a head in all of OpenAI's models, used if the file has no number of heads."""

Variables = dict[str, np.ndarray]


def is_folder(path: Path) -> bool:
    """Return whether a directory is in CTranslate2's format."""
    return (path / WEIGHTS).is_file() and not any(path.glob("*.safetensors"))


def read(folder: Path) -> Model:
    """Return the model of a folder. Its weights are read on access. Raises Problem if the file is
    damaged, or of another architecture or version."""
    path = folder / WEIGHTS
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise damaged(path, "the file is empty")
        # not closed explicitly: a traceback may still refer to a view of it
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return Model(path, dict(read_variables(path, memoryview(content))))


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json: alignment heads and suppressed tokens; empty if there is no file."""
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, f"it is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise damaged(path, "it is not a JSON object")
    return values


# --------------------------------------------------------------------------------- binary reader


class Cursor:
    """A position in the file, checked against its end."""

    def __init__(self, path: Path, content: memoryview) -> None:
        self.path, self.content, self.at = path, content, 0

    def take(self, size: int, what: str) -> memoryview:
        if size > len(self.content) - self.at:
            raise damaged(
                self.path,
                f"{what} at byte {self.at} needs {size} bytes, but only "
                f"{len(self.content) - self.at} are left",
            )
        self.at += size
        return self.content[self.at - size : self.at]

    def number(self, kind: str, what: str) -> int:
        return int(struct.unpack(f"<{kind}", self.take(struct.calcsize(kind), what))[0])

    def text(self, what: str) -> str:
        raw = bytes(self.take(self.number("H", what), what))
        try:
            return raw.split(b"\0")[0].decode("utf-8")
        except UnicodeDecodeError:
            raise damaged(self.path, f"{what} at byte {self.at} is not UTF-8 text") from None

    def count(self, what: str) -> int:
        count = self.number("I", what)
        if count > MOST_VARIABLES:
            raise damaged(self.path, f"{what} is {count}, more than {MOST_VARIABLES}")
        return count


def read_variables(path: Path, content: memoryview) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and array of all variables, as stored. Aliases come last."""
    cursor = Cursor(path, content)
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        raise Problem(
            f"{path}: version {version} of CTranslate2's format; versions "
            f"{' and '.join(map(str, VERSIONS))} are supported",
            hint="convert the model again with ctranslate2 3 or 4, or use a Hugging Face directory",
        )
    specification = cursor.text("the name of the model")
    if specification != SPECIFICATION:
        raise Problem(
            f"{path}: it holds {specification[:40]!r}, not {SPECIFICATION!r}",
            hint="name a folder of a Whisper model",
        )
    cursor.number("I", "the revision")
    arrays: Variables = {}
    for _ in range(cursor.count("the number of variables")):
        name, array = read_variable(cursor)
        arrays[name] = array
    yield from arrays.items()
    for _ in range(cursor.count("the number of aliases")):
        alias, name = cursor.text("an alias"), cursor.text("an alias")
        if name not in arrays:
            raise damaged(path, f"the alias {alias!r} refers to {name!r}, which does not exist")
        yield alias, arrays[name]
    if cursor.at != len(content):
        raise damaged(path, f"there are {len(content) - cursor.at} bytes after the end")


def read_variable(cursor: Cursor) -> tuple[str, np.ndarray]:
    name = cursor.text("the name of a variable")
    rank = cursor.number("B", name)
    shape = [cursor.number("I", name) for _ in range(rank)]
    number = cursor.number("B", name)
    kind = TYPES.get(number)
    if kind is None:
        raise damaged(
            cursor.path, f"{name} has type {number}; types 0 to {max(TYPES)} are supported"
        )
    size = cursor.number("I", name)
    if size != prod(shape) * kind.itemsize:
        raise damaged(cursor.path, f"{name} of shape {shape} has {size} bytes")
    return name, np.frombuffer(cursor.take(size, name), kind).reshape(shape)


# ------------------------------------------------------------------------- the model in the file


class Model:
    """The variables of a Whisper model, under Hugging Face's names."""

    def __init__(self, path: Path, variables: Variables) -> None:
        self.path, self.variables = path, variables

    def get(self, name: str) -> np.ndarray:
        """Return a variable in float32. Integers are divided by their scales."""
        if name not in self.variables:
            raise damaged(self.path, f"it has no variable {name!r}")
        array = self.variables[name]
        if array.dtype == BFLOAT16:  # the upper half of a float32
            return (array.astype(np.uint32) << 16).view(np.float32)
        if array.dtype.kind == "f":
            return array.astype(np.float32)
        scale = self.variables.get(f"{name}_scale")
        if scale is None or scale.size not in (1, len(array)) or not (scale > 0).all():
            raise damaged(self.path, f"{name} holds integers without usable scales")
        per_row = scale.reshape(-1, *[1] * (array.ndim - 1))
        return (array / per_row).astype(np.float32)

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        array = self.variables.get(name)
        if array is None or array.ndim != rank:
            raise damaged(self.path, f"it has no variable {name!r} of rank {rank}")
        return array.shape

    def layers(self, side: str) -> int:
        prefix = f"{side}/layer_"
        names = (name for name in self.variables if name.startswith(prefix))
        numbers = {name.removeprefix(prefix).split("/")[0] for name in names}
        return sum(number.isdecimal() for number in numbers)

    def config(self) -> WhisperConfig:
        """Return the model's dimensions. Raises Problem for another architecture."""
        vocab_size, d_model = self.shape("decoder/embeddings/weight", 2)
        _, mels, _ = self.shape("encoder/conv1/weight", 3)
        self.refuse_other_architecture()
        sides = {side: self.layers(side) for side in ("encoder", "decoder")}
        return WhisperConfig(
            vocab_size=vocab_size,
            num_mel_bins=mels,
            d_model=d_model,
            max_source_positions=self.shape("encoder/position_encodings/encodings", 2)[0],
            max_target_positions=self.shape("decoder/position_encodings/encodings", 2)[0],
            **{f"{side}_layers": count for side, count in sides.items()},
            **{f"{side}_attention_heads": self.heads(side, d_model) for side in sides},
            **{f"{side}_ffn_dim": self.shape(f"{side}/layer_0/ffn/linear_0/weight", 2)[0]
               for side in sides},
        )  # fmt: skip

    def heads(self, side: str, d_model: int) -> int:
        array = self.variables.get(f"{side}/num_heads")
        heads = d_model // HEAD if array is None else int(array.reshape(-1)[0])
        if heads < 1 or d_model % heads:
            raise damaged(
                self.path, f"{side}/num_heads is {heads}, which does not divide the width {d_model}"
            )
        return heads

    def refuse_other_architecture(self) -> None:
        for side in ("encoder", "decoder"):
            activation = self.variables.get(f"{side}/activation")
            if activation is not None and int(activation.reshape(-1)[0]) != GELU:
                raise damaged(self.path, f"{side}/activation is not Whisper's GELU ({GELU})")

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of a Hugging Face state dict except the tied proj_out.weight."""
        arrays: dict[str, np.ndarray] = {
            "model.decoder.embed_tokens.weight": self.get("decoder/embeddings/weight")
        }
        for number in (1, 2):
            arrays |= self.linear(f"model.encoder.conv{number}", f"encoder/conv{number}")
        for side in ("encoder", "decoder"):
            encodings = self.get(f"{side}/position_encodings/encodings")
            arrays[f"model.{side}.embed_positions.weight"] = encodings
            arrays |= self.norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
            for layer in range(self.layers(side)):
                arrays |= self.layer(side, layer)
        return {
            name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()
        }

    def layer(self, side: str, number: int) -> Variables:
        to, at = f"model.{side}.layers.{number}", f"{side}/layer_{number}"
        arrays = self.split(f"{to}.self_attn", f"{at}/self_attention/linear_0", "qkv")
        arrays |= self.linear(f"{to}.self_attn.out_proj", f"{at}/self_attention/linear_1")
        arrays |= self.norm(f"{to}.self_attn_layer_norm", f"{at}/self_attention/layer_norm")
        if side == "decoder":
            arrays |= self.linear(f"{to}.encoder_attn.q_proj", f"{at}/attention/linear_0")
            arrays |= self.split(f"{to}.encoder_attn", f"{at}/attention/linear_1", "kv")
            arrays |= self.linear(f"{to}.encoder_attn.out_proj", f"{at}/attention/linear_2")
            arrays |= self.norm(f"{to}.encoder_attn_layer_norm", f"{at}/attention/layer_norm")
        arrays |= self.linear(f"{to}.fc1", f"{at}/ffn/linear_0")
        arrays |= self.linear(f"{to}.fc2", f"{at}/ffn/linear_1")
        return arrays | self.norm(f"{to}.final_layer_norm", f"{at}/ffn/layer_norm")

    def norm(self, to: str, at: str) -> Variables:
        return {f"{to}.weight": self.get(f"{at}/gamma"), f"{to}.bias": self.get(f"{at}/beta")}

    def linear(self, to: str, at: str) -> Variables:
        return {f"{to}.weight": self.get(f"{at}/weight"), f"{to}.bias": self.get(f"{at}/bias")}

    def split(self, to: str, at: str, parts: str) -> Variables:
        """Split a fused projection into its parts. Whisper's keys have no bias."""
        weight, bias = self.get(f"{at}/weight"), self.get(f"{at}/bias")
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or len(weight) % len(parts):
            raise damaged(self.path, f"{at} has shapes {weight.shape} and {bias.shape}")
        arrays: Variables = {}
        pairs = zip(np.split(weight, len(parts)), np.split(bias, len(parts)), strict=True)
        for part, (rows, offsets) in zip(parts, pairs, strict=True):
            arrays[f"{to}.{part}_proj.weight"] = rows
            if part != "k":
                arrays[f"{to}.{part}_proj.bias"] = offsets
            elif offsets.any():
                raise damaged(
                    self.path, f"{at}: its keys have a bias, but Whisper's keys have none"
                )
        return arrays


def damaged(path: Path, reason: str) -> Problem:
    return Problem(
        f"{path}: {reason}",
        hint="copy the folder again, or convert the model again with CTranslate2's converter",
    )
