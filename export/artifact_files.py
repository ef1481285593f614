"""What an artifact is made of beside its graphs, for every target: the checks before one is
written, the manifest, the rules of decoding, and the files for those who read tokens."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from export.cost import count_parameters
from export.problem import Problem
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
"""Name of a graph -> "inputs" and "outputs" -> name, shape and dtype of each."""
Dim = int | str


@dataclass(frozen=True)
class Spec:
    """Name, shape and dtype of a graph input or output; an axis named by a string is symbolic."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str = "float32"


def manifest_of(
    told: dict[str, Any],
    model: nn.Module,
    processor: Any,
    costs: dict[str, dict[str, int]],
    contract: Contract,
    provenance: dict[str, Any] | None,
) -> dict[str, Any]:
    """The manifest of graphs, gate still null; it begins with what is `told`: target, layout,
    precision. `costs` are those of each window, by its encoder positions, the longest one last, as
    cost.macs_by_window has them."""
    extractor = processor.feature_extractor
    samples = [2 * int(positions) * extractor.hop_length for positions in costs]
    return {
        **told,
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


def described(
    inputs: Sequence[Spec], outputs: Sequence[Spec], states: Sequence[Spec] = ()
) -> dict[str, list[dict[str, Any]]]:
    """What goes in and comes out of a graph, as the manifest's contract has it."""
    sides = {"inputs": inputs, "outputs": outputs} | ({"states": states} if states else {})
    return {
        side: [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in specs]
        for side, specs in sides.items()
    }


def check(model: nn.Module, processor: Any) -> None:
    """Refuse what no graph of ours would follow, before a file is written.

    Raises Problem: an activation, an untied table, a feature extractor of another window, a prompt
    that the generation config cannot give, a token that stands for no bytes.
    """
    check_model(model)
    check_window(model, processor.feature_extractor)
    decoding_rules(model)
    token_bytes(processor.tokenizer, model.config.vocab_size)


def check_model(model: nn.Module) -> None:
    """Our graphs have the exact GELU and one table for tokens in and out, as every Whisper has."""
    if model.config.activation_function != "gelu":
        raise Problem(
            f"the model's activation is {model.config.activation_function!r}; "
            "our graphs have Whisper's 'gelu'",
            hint="start from a Whisper checkpoint with activation_function gelu",
        )
    if not _tied(model.proj_out, model.model.decoder.embed_tokens):
        raise Problem(
            "the model's output table (proj_out) differs from its token table; "
            "our graphs share one",
            hint="train with tie_word_embeddings = true, as Whisper is",
        )


def _tied(output: nn.Module, table: nn.Module) -> bool:
    if hasattr(table, "rows"):
        return getattr(output, "table", None) is table
    return output.weight is table.weight or output.weight.equal(table.weight)


def check_window(model: nn.Module, extractor: Any) -> None:
    """Two mel frames make one encoder position: the extractor's window must be the model's."""
    wanted = 2 * model.config.max_source_positions * extractor.hop_length
    if extractor.n_samples != wanted:
        raise Problem(
            f"the feature extractor's window has {extractor.n_samples} samples, "
            f"the model's {wanted}",
            hint="set chunk_length in preprocessor_config.json to the model's window in seconds",
        )
    if extractor.feature_size != model.config.num_mel_bins:
        raise Problem(
            f"the feature extractor makes {extractor.feature_size} mel bins, "
            f"the model reads {model.config.num_mel_bins}",
            hint="take preprocessor_config.json from the model that was compressed",
        )


def decoding_rules(model: nn.Module) -> dict[str, Any]:
    """Prompt, end and suppressed tokens, as transformers' generate() would have them, greedy.

    The prompt is for one language (see prompt.py); `languages` and `tasks` have the ids that may
    stand in it instead, code -> id. Where the checkpoint names no language, `language` is "auto":
    the runner detects it, and the prompt's English is a placeholder. The prompt forbids timestamps,
    so ids from `timestamp_begin` on are never chosen, up to `timestamp_end` where a vocabulary has
    words behind them. Whoever wants them leaves out the prompt's
    last token, timestamp_begin - 1, and says a first one of at most `max_initial_timestamp_index`
    steps. Behind the prompt's first token, the probability of `no_speech` is that of no speech.
    Text from before may stand in front of the prompt, behind `previous`.
    """
    generation = model.generation_config
    multilingual = is_multilingual(generation)
    prompt = prompt_ids(generation)
    end = generation.eos_token_id
    silent = getattr(generation, "no_timestamps_token_id", None)
    end_of_stamps = getattr(generation, "timestamp_end", None)
    return {
        "prompt": prompt,
        "eos": end if isinstance(end, int) else end[0],
        "suppress_tokens": list(generation.suppress_tokens or []),
        "begin_suppress_tokens": list(generation.begin_suppress_tokens or []),
        "timestamp_begin": None if silent is None else silent + 1,
        **({} if end_of_stamps is None else {"timestamp_end": end_of_stamps}),
        "max_initial_timestamp_index": getattr(generation, "max_initial_timestamp_index", None),
        "no_speech": no_speech_id(generation),
        "previous": getattr(generation, "prev_sot_token_id", None),
        "languages": language_ids(generation) if multilingual else {},
        "tasks": dict(getattr(generation, "task_to_id", None) or {}) if multilingual else {},
        **({"language": AUTO} if language_or_auto(generation) == AUTO else {}),
        "max_new_tokens": model.config.max_target_positions - len(prompt),
    }


def token_bytes(tokenizer: Any, vocab_size: int) -> list[str | None]:
    """The bytes of every token in base64; null for special tokens, timestamps and unused ids.

    Byte-level BPE writes bytes as printable characters; this turns them back. Words that were added
    to the vocabulary stand there as they are.
    Raises Problem where a token holds a character that stands for no byte.
    """
    unicode_to_byte = {char: byte for byte, char in _byte_alphabet()}
    added = tokenizer.added_tokens_decoder
    words = {
        i: base64.b64encode(token.content.encode()).decode()
        for i, token in added.items()
        if not token.special and not re.fullmatch(r"<\|.*\|>", token.content)
    }
    ordinary = {i: token for token, i in tokenizer.get_vocab().items() if i not in added}
    return [
        _encoded(ordinary[i], i, unicode_to_byte) if i in ordinary else words.get(i)
        for i in range(vocab_size)
    ]


def _encoded(token: str, number: int, unicode_to_byte: dict[str, int]) -> str:
    try:
        return base64.b64encode(bytes(unicode_to_byte[char] for char in token)).decode()
    except KeyError as error:
        raise Problem(
            f"token {number} ({token!r}): {error.args[0]!r} stands for no byte",
            hint="the tokenizer must be Whisper's byte-level BPE",
        ) from error


def _byte_alphabet() -> Iterator[tuple[int, str]]:
    """GPT-2's: printable Latin-1 bytes are themselves, the others are counted up from U+0100."""
    unprintable = 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            yield byte, chr(byte)
        else:
            yield byte, chr(0x100 + unprintable)
            unprintable += 1


def write_tokens(tokenizer: Any, vocab_size: int, out: Path) -> None:
    """The bytes of every token, for those who have no tokenizer library."""
    tokens = {"bytes": token_bytes(tokenizer, vocab_size)}
    (out / "tokens.json").write_text(json.dumps(tokens) + "\n", encoding="utf-8")


def save_beside(model: nn.Module, processor: Any, out: Path) -> None:
    """Hugging Face's files, for tools that want them."""
    parts = (model.config, model.generation_config, processor.tokenizer)
    for part in (*parts, processor.feature_extractor):
        part.save_pretrained(out)
    write_compactly(out / "tokenizer.json")


def write_compactly(path: Path) -> None:
    """A JSON file without indentation: of a small model's artifact it is a large part."""
    if path.is_file():
        told = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(told, ensure_ascii=False, separators=(",", ":"))
        path.write_text(text + "\n", encoding="utf-8")
