"""Models and options for the tests of BaldWhisper's two stages."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import WhisperConfig

from edgewhisper import whisper
from edgewhisper.compress import merge, shear, shrink
from edgewhisper.compress.context import Context
from edgewhisper.compress.decoder_layers import parse_groups
from edgewhisper.examples import Batch
from edgewhisper.training import Training

NONE = Training(steps=0)


BRIEF = Training(steps=2, batch_size=2, learning_rate=1e-3)


MERGE = merge.Options(training=NONE, calibration=2)


SHEAR = shear.Options(rank=8, training=NONE, calibration=2)


@torch.no_grad()
def logits(model, ids=None):
    """Logits of the model for two fixed random inputs."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(2, 80, 600, generator=generator)
    ids = torch.randint(0, 300, (2, 7), generator=generator) if ids is None else ids
    return model(features, decoder_input_ids=ids, use_cache=False).logits


def keeping(model, layers):
    """A copy with only these decoder layers; it does not support a cache."""
    model = copy.deepcopy(model)
    model.model.decoder.layers = nn.ModuleList(model.model.decoder.layers[i] for i in layers)
    return model


def same_tensors(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def pairs(model):
    return parse_groups("", model.config.decoder_layers)


def make_identity(layer) -> None:
    """Make a layer the identity."""
    for linear in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


# ------------------------------------------------------------------- slim models and their shapes


def without_units(model, layer: int, count: int):
    """The model without `count` units of one decoder layer."""
    with torch.no_grad():
        model.model.decoder.layers[layer].fc2.weight[:, :count] = 0
    return shrink.apply(model, shrink.Options(), Context(None, [], [], Path()))


# --------------------------------------------------------------------------------- distillation


def a_batch(model) -> Batch:
    prompt = torch.randint(0, 300, (2, 6))
    labels = torch.randint(0, 300, (2, 6))
    labels[:, 0] = -100
    labels[1, 4:] = -100
    return Batch(torch.randn(2, 80, 600), prompt, labels)


# ------------------------------------------------------------------ the factorised model at large


def base(decoder_layers=6, **shapes):
    """A Whisper with the dimensions of base, on the meta device."""
    config = WhisperConfig(
        d_model=512,
        encoder_layers=6,
        decoder_layers=decoder_layers,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
    )
    if shapes:
        config.edgewhisper = {"format": 1, **shapes}
    with torch.device("meta"):
        return whisper.WhisperForConditionalGeneration(config)
