"""Load, save and build Whisper models: the entry to the modules below.

    model.py                    the model class, and where things are in the model
    shapes.py                   per-layer shapes in config.json, and audio windows
    checkpoints/store.py        load and save checkpoints
    checkpoints/processors.py   load tokenizers and feature extractors

Other modules import these names from here; the modules above do not import this one.
"""

# ruff: noqa: F401 - all names are re-exports
from edgewhisper.checkpoints.processors import load_processor, load_tokenizer
from edgewhisper.checkpoints.store import (
    as_directory,
    compression_record,
    load,
    load_with_processor,
    resolved,
    save,
)
from edgewhisper.model import (
    Encoder,
    FactorisedTable,
    GatherLinear,
    LowRank,
    SlimAttention,
    TiedOutput,
    WhisperForConditionalGeneration,
    input_of,
    linears,
    reads_audio,
    rebuild,
    side_and_layer,
)
from edgewhisper.shapes import check_shapes, linear_names, remove_short_windows, set_windows
