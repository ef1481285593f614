"""Whisper as Core ML packages, built from the weights.

Layout `whisperkit`, three packages as WhisperKit loads them from a folder:

    MelSpectrogram  audio (samples,), 16 kHz -> melspectrogram_features (1, n_mels, 1, frames)
    AudioEncoder    melspectrogram_features -> encoder_output_embeds (1, d_model, 1, positions)
    TextDecoder     input_ids (1,) and cache_length (1,) int32, key_cache and value_cache
                    (1, width, 1, room), kv_cache_update_mask (1, room), encoder_output_embeds,
                    decoder_key_padding_mask (1, room)
                    -> logits (1, 1, vocab), key_cache_updates and value_cache_updates
                    (1, width, 1, 1), and where word timestamps are wanted
                    alignment_heads_weights (1, positions)

One token a call. `cache_length` positions stand in the caches, a layer's channels behind those of
the layer before; kv_cache_update_mask is 1 at position cache_length and 0 elsewhere, and
decoder_key_padding_mask 0 up to it and -10000 behind. The caller writes the updates into the
caches. `width` is the sum of the layers' heads * width of a head, for keys or for values, whichever
is larger; what the other leaves over is zero. alignment_heads_weights are the new token's
cross-attention, the mean over the generation config's alignment heads.

`stateful` (iOS18) keeps the caches in the package: key_cache and value_cache are states, there are
no updates, and the caller only says where it is. WhisperKit does not run this form.

Layout `encoder`, one package as whisper.cpp loads it beside its own decoder:

    coreml-encoder  logmel_data (1, n_mels, frames) -> output (1, positions, d_model), float32

The encoder may be pruned; the decoder that whisper.cpp reads from its own file is the dense one, of
the same d_model.

Floats are float16 going in and out, in precision fp32 float32. The mel front end computes in
float32 throughout. Programs have fixed shapes: one window, the model's longest unless another one
of its windows is asked for.

`neural_engine` writes encoder and decoder in the form that Apple's notes on transformers for the
Neural Engine, whisperkit and whisper.cpp describe: values are (1, channels, 1, positions), linear
layers 1x1 convolutions, attention goes head by head, inner dimensions are filled up with zeros to
multiples of 64, and the token table stands in chunks of less than 16384 rows. It computes the same
function. Known is that the engine wants channels first, and that it takes no tensor with a larger
dimension than 16384; that the whole form is faster, on which chip and by how much, we have not
measured: there was no Mac. Where layers are irregular, the zeros make it larger.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from export.artifact import write_manifest
from export.checks import check
from export.coreml.graph import TARGETS, save
from export.coreml.plan import make_plan
from export.coreml.programs import LAYOUTS
from export.cost import macs
from export.hub_files import save_hub_files
from export.manifest import describe_graph, manifest_of
from export.tokens import write_tokens
from export.versions import version


def export_coreml(
    model: nn.Module,
    processor: Any,
    out: Path,
    precision: str = "fp16",
    provenance: dict[str, Any] | None = None,
    layout: str = "whisperkit",
    *,
    deployment_target: str | None = None,
    stateful: bool = False,
    word_timestamps: bool | None = None,
    neural_engine: bool = False,
    window: float | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Write an artifact into the empty directory `out`; returns its manifest, gate still null.

    `model` is a Whisper, dense or slim, `processor` its WhisperProcessor, `provenance` the
    checkpoint's compression.json. `deployment_target` None: the oldest that can do what is asked;
    `word_timestamps` None: where the model names alignment heads; `window` is one of the model's,
    in seconds, None the longest; `max_tokens` are positions of the decoder, None all that it has.
    The caller gates the artifact and writes the manifest again.

    Raises Problem, before a file is written, where something is asked for that cannot be done; and
    where a weight is beyond float16.
    """
    check(model, processor)
    plan = make_plan(
        model,
        processor.feature_extractor,
        precision,
        layout,
        deployment_target=deployment_target,
        stateful=stateful,
        word_timestamps=word_timestamps,
        neural_engine=neural_engine,
        window=window,
        max_tokens=max_tokens,
    )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    contract, stored, said = {}, {}, list[str]()
    for name, make in LAYOUTS[layout].items():
        made = make(model, processor.feature_extractor, plan)
        save(made.program, plan.target, out / f"{name}.mlpackage", f"Whisper: {name}")
        contract[name] = describe_graph(made.inputs, made.outputs, made.states)
        stored[name] = dict(sorted(made.graph.stored.items()))
        said += [f"{name}: {text}" for text in made.graph.said]
    if layout == "whisperkit":
        write_tokens(processor.tokenizer, model.config.vocab_size, out)
        save_hub_files(model, processor, out)
    told = {"target": "coreml", "layout": layout, "precision": precision}
    counted = macs(model, plan.room, plan.positions, cached=False)  # all of a cache is multiplied
    costs = {str(plan.positions): counted}
    manifest = manifest_of(told, model, processor, costs, contract, provenance)
    manifest["decoding"]["max_new_tokens"] -= model.config.max_target_positions - plan.room
    manifest["coreml"] = {
        "deployment_target": plan.target,
        "specification_version": TARGETS[plan.target],
        "stateful": stateful,
        "word_timestamps": bool(plan.alignment) and layout == "whisperkit",
        "neural_engine": neural_engine,
        "weights": stored,
        "said": said,
    }
    manifest["versions"]["coremltools"] = version("coremltools")
    write_manifest(out, manifest)
    return manifest
