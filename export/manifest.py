"""The content of an artifact's manifest: contract, costs, audio and decoding rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from export.cost import count_parameters
from export.prompt import (
    AUTO,
    is_multilingual,
    language_ids,
    language_or_auto,
    no_speech_id,
    prompt_ids,
)
from export.shrink import layer_shapes
from export.versions import versions

Contract = dict[str, dict[str, list[dict[str, Any]]]]
"""Graph name -> "inputs" and "outputs" -> name, shape and dtype of each."""
Dim = int | str


@dataclass(frozen=True)
class Spec:
    """Name, shape and dtype of a graph input or output. A string names a symbolic axis."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str = "float32"


def manifest_of(
    header: dict[str, Any],
    model: nn.Module,
    processor: Any,
    costs: dict[str, dict[str, int]],
    contract: Contract,
    provenance: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the manifest of a model's graphs, with `gate` still None.

    `header` holds the first keys: target, layout, precision and, for ONNX, the runtime. `costs`
    maps the encoder positions of each window to its multiply-accumulates, longest window last, as
    `cost.macs_by_window` returns them.
    """
    extractor = processor.feature_extractor
    samples = [2 * int(positions) * extractor.hop_length for positions in costs]
    return {
        **header,
        "parameters": count_parameters(model)["total"],
        "macs": list(costs.values())[-1],
        "macs_by_window": costs,
        "contract": contract,
        "layers": layer_shapes(model),
        "audio": {
            "sampling_rate": extractor.sampling_rate,
            "window_samples": samples[-1],
            "windows_samples": samples,
            "hop_samples": extractor.hop_length,
        },
        "decoding": decoding_rules(model),
        "provenance": provenance or {},
        "gate": None,
        "versions": versions(),
    }


def describe_graph(
    inputs: Sequence[Spec], outputs: Sequence[Spec], states: Sequence[Spec] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Return the inputs, outputs and states of a graph in the form of the manifest's contract."""
    sides = {"inputs": inputs, "outputs": outputs} | ({"states": states} if states else {})
    return {
        side: [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in specs]
        for side, specs in sides.items()
    }


def decoding_rules(model: nn.Module) -> dict[str, Any]:
    """Return the prompt, the end token and the suppressed tokens that greedy `generate()` would
    use.

    - `prompt` starts the decoder, for one language (see prompt.py). `languages` and `tasks` map
      codes to the ids that can replace those in the prompt.
    - `language` is "auto" if the checkpoint names no language. The runner then detects it, and
      English in the prompt is a placeholder.
    - `timestamp_begin` is the first timestamp id. The prompt forbids timestamps, so ids from there
      up to `timestamp_end` (or to the end of the vocabulary) are never chosen.
    - To decode timestamps, drop the last token of the prompt, timestamp_begin - 1. The first
      timestamp is then at most `max_initial_timestamp_index` steps of 0.02 s.
    - `no_speech` is the token whose probability after the first prompt token is that of no speech.
    - `previous` introduces earlier text, which can precede the prompt.
    """
    generation = model.generation_config
    multilingual = is_multilingual(generation)
    prompt = prompt_ids(generation)
    end = generation.eos_token_id
    no_timestamps = getattr(generation, "no_timestamps_token_id", None)
    timestamp_end = getattr(generation, "timestamp_end", None)
    return {
        "prompt": prompt,
        "eos": end if isinstance(end, int) else end[0],
        "suppress_tokens": list(generation.suppress_tokens or []),
        "begin_suppress_tokens": list(generation.begin_suppress_tokens or []),
        "timestamp_begin": None if no_timestamps is None else no_timestamps + 1,
        **({} if timestamp_end is None else {"timestamp_end": timestamp_end}),
        "max_initial_timestamp_index": getattr(generation, "max_initial_timestamp_index", None),
        "no_speech": no_speech_id(generation),
        "previous": getattr(generation, "prev_sot_token_id", None),
        "languages": language_ids(generation) if multilingual else {},
        "tasks": dict(getattr(generation, "task_to_id", None) or {}) if multilingual else {},
        **({"language": AUTO} if language_or_auto(generation) == AUTO else {}),
        "max_new_tokens": model.config.max_target_positions - len(prompt),
    }
