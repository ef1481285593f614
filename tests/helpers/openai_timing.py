"""Word times of a checkpoint in torch, step by step as in OpenAI's whisper/timing.py (MIT)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import scipy.signal
import torch

from edgewhisper.alignment import eager
from edgewhisper.decoding import log_mel


@torch.no_grad()
def token_times(model, processor, pcm, prompt, text, heads) -> list[float]:
    """The start of each token of the text and the end of the last, in seconds."""
    ids = [*prompt, *text, model.generation_config.eos_token_id]
    logits = {}
    layers = model.model.decoder.layers
    hooks = [
        layer.encoder_attn.q_proj.register_forward_hook(
            lambda _, __, out, i=i: logits.setdefault(i, [None, None]).__setitem__(0, out)
        )
        for i, layer in enumerate(layers)
    ] + [
        layer.encoder_attn.k_proj.register_forward_hook(
            lambda _, __, out, i=i: logits.setdefault(i, [None, None]).__setitem__(1, out)
        )
        for i, layer in enumerate(layers)
    ]
    with eager(model):
        features = log_mel(processor.feature_extractor, [pcm])
        model(features, decoder_input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    frames = -(-len(pcm) // 320)
    rows = []
    for layer, head in heads:
        attention = layers[layer].encoder_attn
        count = attention.num_heads
        q, k = (x[0].unflatten(-1, (count, -1))[:, head] for x in logits[layer])
        rows.append((q @ k.T)[:, :frames] * attention.scaling)
    weights = torch.stack(rows).softmax(dim=-1)
    std, mean = torch.std_mean(weights, dim=-2, keepdim=True, unbiased=False)
    smooth = ((weights - mean) / std).numpy()
    smooth = np.pad(smooth, ((0, 0), (0, 0), (3, 3)), mode="reflect")
    smooth = scipy.signal.medfilt(smooth, (1, 1, 7))[..., 3:-3]
    matrix = smooth.mean(axis=0)[len(prompt) - 1 : -1]
    path = dtw(-matrix)
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(row for row, _ in path), 1) if a != b)]
    return [path[i][1] * 0.02 for i in starts]


def dtw(cost: np.ndarray) -> list[tuple[int, int]]:
    rows, columns = cost.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0], trace = 0, np.full((rows + 1, columns + 1), -1)
    for j in range(1, columns + 1):
        for i in range(1, rows + 1):
            c0, c1, c2 = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
            if c0 < c1 and c0 < c2:
                c, t = c0, 0
            elif c1 < c0 and c1 < c2:
                c, t = c1, 1
            else:
                c, t = c2, 2
            total[i, j], trace[i, j] = cost[i - 1, j - 1] + c, t
    trace[0, :], trace[:, 0] = 2, 1
    i, j, path = rows, columns, []
    while i > 0 or j > 0:
        path.append((i - 1, j - 1))
        step = trace[i, j]
        i, j = i - (step != 2), j - (step != 1)
    return path[::-1]
