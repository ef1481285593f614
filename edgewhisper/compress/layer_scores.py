"""Scores of decoder layers: which ones are similar, and which ones can be removed."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewhisper.compress.decoder_layers import regroup, single_layers
from edgewhisper.compress.teacher import forward
from edgewhisper.examples import IGNORED, Batch
from edgewhisper.model_modes import removed_after
from edgewhisper.training import cross_entropy

if TYPE_CHECKING:
    from edgewhisper.whisper import WhisperForConditionalGeneration


def random_layers(model: nn.Module, count: int, seed: int) -> list[int]:
    """Draw `count` decoder layers."""
    rng = np.random.default_rng([seed, 3])
    return sorted(rng.permutation(model.config.decoder_layers)[:count].tolist())


def taylor_layers(
    model: "WhisperForConditionalGeneration",
    count: int,
    calibration: Callable[[nn.Module], Iterable[Batch]],
) -> tuple[list[int], list[dict[str, float]]]:
    """Remove the layer with the lowest score until `count` layers remain.

    Returns the remaining layers, and the scores before each removal.
    """
    remaining = list(range(model.config.decoder_layers))
    history = []
    while len(remaining) > count:
        smaller, _ = regroup(model, single_layers(remaining))
        scores = layer_scores(smaller, calibration(smaller))
        history.append(dict(zip(map(str, remaining), scores.tolist(), strict=True)))
        del remaining[int(scores.argmin())]
    return remaining, history


def layer_scores(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Return E[(dL/dm_i)^2] for gates m_i = 1 on each layer's update: y = x + m (f(x) - x).

    L is the cross entropy of a batch. To first order, the score (layers,) is the square of the
    change in loss when the layer is removed.
    """
    layers = model.model.decoder.layers
    gates = torch.ones(len(layers), device=next(model.parameters()).device, requires_grad=True)

    def gate(i: int) -> Any:
        return lambda module, args, output: args[0] + gates[i] * (output - args[0])

    hooks = [layer.register_forward_hook(gate(i)) for i, layer in enumerate(layers)]
    total = torch.zeros_like(gates, requires_grad=False)
    with removed_after(*hooks):
        for batch in batches:
            ids = batch.decoder_input_ids
            outputs = model(batch.input_features, decoder_input_ids=ids, use_cache=False)
            loss = cross_entropy(outputs.logits, batch.labels)
            total += torch.autograd.grad(loss, gates)[0].square()
    return total


@torch.no_grad()
def similarities(model: nn.Module, batches: Iterable[Batch]) -> list[list[float]]:
    """Return the mean cosine similarity between the outputs of every two decoder layers.

    It shows which layers are candidates for a pair.
    """
    total, tokens = torch.zeros(()), 0
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        for layer in model.model.decoder.layers
    ]
    with removed_after(*hooks):
        for batch in batches:
            outputs.clear()
            forward(model, batch)
            labelled = batch.labels != IGNORED
            states = torch.stack([functional.normalize(x[labelled], dim=-1) for x in outputs])
            total = total + torch.einsum("ith,jth->ij", states, states).cpu()
            tokens += int(labelled.sum())
    return (total / tokens).tolist()
