"""Models of irregular shapes, and their ONNX graphs as a runner feeds them."""

from __future__ import annotations

import numpy as np
import torch
from dead_structure import kill
from torch import nn

from edgewhisper import decoding, whisper
from export.onnx.to_onnx import export_onnx
from export.shrink import shrink


class Exported:
    """An artifact's two graphs in onnxruntime, fed as a runner feeds them."""

    def __init__(self, directory, manifest):
        self.encoder, self.decoder = (
            session(directory / f"{name}.onnx") for name in ("encoder", "decoder")
        )
        self.manifest = manifest

    def encode(self, pcm):
        names = [output.name for output in self.encoder.get_outputs()]
        return dict(zip(names, self.encoder.run(None, {"pcm": pcm[None]}), strict=True))

    def no_past(self):
        past = {"past_length": np.array([0], np.int32)}
        for spec in self.manifest["contract"]["decoder"]["inputs"]:
            kind, _, rest = spec["name"].partition(".")
            if kind == "past":
                shape = self.manifest["layers"]["decoder"][int(rest.split(".")[0])]["self_attn"]
                past[spec["name"]] = np.zeros((1, shape["heads"], *spec["shape"][2:]), np.float32)
        return past

    def step(self, ids, past, cross):
        """As a caller who binds nothing: caches are copied from step to step."""
        names = [output.name for output in self.decoder.get_outputs()]
        found = self.decoder.run(None, {"input_ids": np.array([ids]), **past, **cross})
        told = dict(zip(names, found, strict=True))
        logits = told["logits"]
        past = {"past_length": past["past_length"] + np.int32(len(ids))} | {
            name.replace("present", "past"): x for name, x in told.items() if "present" in name
        }
        return logits[0, 0], past

    def greedy(self, pcm):
        rules, cross, past = self.manifest["decoding"], self.encode(pcm), self.no_past()
        tokens, ids = [], rules["prompt"]
        while len(tokens) < rules["max_new_tokens"]:
            logits, past = self.step(ids, past, cross)
            logits[rules["suppress_tokens"]] = -np.inf
            logits[rules["timestamp_begin"] :] = -np.inf
            if not tokens:
                logits[rules["begin_suppress_tokens"]] = -np.inf
            ids = [int(logits.argmax())]
            if ids[0] == rules["eos"]:
                break
            tokens += ids
        return tokens


def session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def export(model, processor, directory, precision="fp32", **options):
    return Exported(directory, export_onnx(model, processor, directory, precision, **options))


def window(processor, rng):
    """A random sound that fills the window: a few tones in noise."""
    samples = processor.feature_extractor.n_samples
    time = np.arange(samples) / 16000
    tones = sum(np.sin(2 * np.pi * rng.uniform(80, 4000) * time) for _ in range(3))
    return (0.1 * tones + 0.02 * rng.standard_normal(samples)).astype(np.float32)


def low_rank(layer, name, rank):
    dense = getattr(layer, name)
    down = nn.Linear(dense.in_features, rank, bias=False)
    setattr(layer, name, whisper.LowRank(down, nn.Linear(rank, dense.out_features)))


def irregular(make_whisper, rng):
    """Heads, channels, units, ranks and inputs that differ from layer to layer."""
    model = kill(make_whisper(heads=4), "all_kinds", rng)
    shrunk = shrink(model)
    slim = whisper.rebuild(model, shrunk.tensors, shrunk.layers)
    low_rank(slim.model.encoder.layers[0], "fc2", 3)
    low_rank(slim.model.decoder.layers[1].self_attn, "out_proj", 2)
    return slim


def whole(make_whisper, rng):
    return make_whisper()


@torch.no_grad()
def torch_steps(model, processor, pcm, chunks):
    """Logits of the last position after each chunk of tokens, with transformers' cache."""
    encoded = model.model.encoder(decoding.log_mel(processor.feature_extractor, [pcm]))
    cache, found = None, []
    for chunk in chunks:
        out = model(
            encoder_outputs=encoded,
            decoder_input_ids=torch.tensor([chunk]),
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        found.append(out.logits[0, -1].numpy())
    return found
