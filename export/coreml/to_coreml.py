"""Write a Whisper as Core ML packages.

Layout `whisperkit` has three packages, as WhisperKit loads them from a folder:

    MelSpectrogram  audio (samples,), 16 kHz -> melspectrogram_features (1, n_mels, 1, frames)
    AudioEncoder    melspectrogram_features -> encoder_output_embeds (1, d_model, 1, positions)
    TextDecoder     input_ids (1,) and cache_length (1,) int32, key_cache and value_cache
                    (1, width, 1, room), kv_cache_update_mask (1, room), encoder_output_embeds,
                    decoder_key_padding_mask (1, room)
                    -> logits (1, 1, vocab), key_cache_updates and value_cache_updates
                    (1, width, 1, 1), and with word timestamps
                    alignment_heads_weights (1, positions)

Each call decodes one token. `cache_length` positions of the caches are filled, with the channels of
all layers one after the other. kv_cache_update_mask is 1 at position cache_length and 0 elsewhere;
decoder_key_padding_mask is 0 up to it and -10000 after it. The caller writes the updates into the
caches. `width` is the sum over layers of heads * head width, for keys or for values, whichever is
larger; the other is padded with zeros. alignment_heads_weights are the new token's cross-attention,
averaged over the alignment heads of the generation config.

`stateful` (iOS18) keeps the caches in the package: key_cache and value_cache are states, there are
no updates, and the caller only passes the position. WhisperKit does not run this form.

Layout `encoder` has one package, as whisper.cpp loads it to go with its own decoder:

    coreml-encoder  logmel_data (1, n_mels, frames) -> output (1, positions, d_model), float32

The encoder may be pruned. The decoder that whisper.cpp reads from its own file is the dense one,
with the same d_model.

Floats in inputs and outputs are float16, in precision fp32 float32. The mel front end computes in
float32 throughout. Programs have fixed shapes: one window, by default the model's longest.

`neural_engine` writes encoder and decoder in the form that Apple's notes on transformers for the
Neural Engine, WhisperKit and whisper.cpp describe. Values are (1, channels, 1, positions), linear
layers are 1x1 convolutions, attention runs head by head, inner dimensions are padded with zeros to
multiples of 64, and the token table is split into chunks of fewer than 16384 rows. It computes the
same function. It is known that the engine prefers channels first and rejects tensors with a
dimension above 16384. Whether the form is faster, on which chip and by how much, has not been
measured, because no Mac was available. For irregular layers the padding makes the packages larger.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from export.artifact import Gate, write_manifest
from export.checks import check
from export.coreml.graph import TARGETS, save
from export.coreml.plan import make_plan
from export.coreml.programs import PROGRAMS
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
    gate: Gate | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write an artifact into the empty folder `out` and return its manifest.

    `model` is a Whisper, dense or slim, `processor` its WhisperProcessor, and `provenance` the
    checkpoint's compression.json. `options` are the keyword arguments of `plan.make_plan`. The
    manifest is written last, after `gate`.

    Raises Problem before a file is written if the request cannot be fulfilled, and if a weight is
    beyond the range of float16.
    """
    check(model, processor)
    plan = make_plan(model, processor.feature_extractor, precision, layout, **options)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    contract, stored, notes = {}, {}, list[str]()
    for name, make in PROGRAMS[layout].items():
        made = make(model, processor.feature_extractor, plan)
        save(made.program, plan.target, out / f"{name}.mlpackage", f"Whisper: {name}")
        contract[name] = describe_graph(made.inputs, made.outputs, made.states)
        stored[name] = dict(sorted(made.graph.stored.items()))
        notes += [f"{name}: {text}" for text in made.graph.notes]
    if layout == "whisperkit":
        write_tokens(processor.tokenizer, model.config.vocab_size, out)
        save_hub_files(model, processor, out)
    header = {"target": "coreml", "layout": layout, "precision": precision}
    counted = macs(
        model, plan.room, plan.positions, cached=False
    )  # attention covers the whole cache
    costs = {str(plan.positions): counted}
    manifest = manifest_of(header, model, processor, costs, contract, provenance)
    manifest["decoding"]["max_new_tokens"] -= model.config.max_target_positions - plan.room
    manifest["coreml"] = {
        "deployment_target": plan.target,
        "specification_version": TARGETS[plan.target],
        "stateful": plan.stateful,
        "word_timestamps": bool(plan.alignment) and layout == "whisperkit",
        "neural_engine": plan.neural_engine,
        "weights": stored,
        "said": notes,
    }
    manifest["versions"]["coremltools"] = version("coremltools")
    write_manifest(out, manifest, gate)
    return manifest
