"""Models larger than memory: weights stay in their file, and layers convert them as they compute.

A safetensors file is mapped, so the system reads the pages that are in use and may drop them again.
Weights keep the type of the file, float16 for large models. A linear layer converts its weight to
the type of its input in every call. For the 1500 positions of a window, this is a small share of
the time of the product.
"""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from export.problem import Problem

FILE = "model.safetensors"


class ConvertingLinear(nn.Linear):
    """A linear layer that computes in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype), bias)


def read(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a directory's only safetensors file. Raises Problem without it."""
    try:
        return load_file(folder / FILE)
    except Exception as error:  # missing, or safetensors' own exception for a damaged file
        raise Problem(
            f"{folder / FILE} cannot be read: {error}",
            hint="name a Hugging Face directory with one safetensors file, such as one that "
            "edgewhisper wrote",
        ) from error


def compute_in_float32(model: nn.Module) -> None:
    """Let a model with weights of any type compute in float32. Only the weights of linear layers
    and the token table keep their type."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = ConvertingLinear
        elif isinstance(module, nn.Conv1d | nn.LayerNorm):
            module.float()
    model.model.encoder.embed_positions.float()
    model.model.decoder.embed_positions.float()
