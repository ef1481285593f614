"""The digits checkpoint before training: tokenizer in Whisper's layout, model, initial weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.study.digits import DIGITS, WINDOW_S
from export.vocabulary import special_tokens


@dataclass(frozen=True)
class Geometry:
    """Dimensions of the model; the defaults give 1.5 million parameters."""

    d_model: int = 128
    heads: int = 4
    encoder_layers: int = 4
    decoder_layers: int = 2


# More words for the tokenizer's merges, so that the model can be fine-tuned beyond digits.
COMMANDS = (
    "yes no up down left right on off stop go light lights fan door open close turn the play "
    "pause next volume music room kitchen bedroom start cancel"
)


def build_processor() -> Any:
    """Return a processor: a byte-level tokenizer in Whisper's layout with single-token digits, and
    the feature extractor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    bpe.train_from_iterator(
        [f" {word} {word}" for word in [*DIGITS, *COMMANDS.split()]] * 20, trainer
    )
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokenizer = WhisperTokenizer(vocab=model["vocab"], merges=merges)
    tokenizer.add_tokens(special_tokens(), special_tokens=True)
    tokenizer.add_tokens([f"<|{step * 0.02:.2f}|>" for step in range(WINDOW_S * 50 + 1)])
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW_S)
    return WhisperProcessor(extractor, tokenizer)


@dataclass(frozen=True)
class Tokens:
    """The token ids used in training."""

    prompt: tuple[int, ...]
    """Ids of <|startoftranscript|><|en|><|transcribe|><|notimestamps|>."""
    end: int
    digits: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Tokens:
        """Look up the ids. Raises ValueError if a digit is not a single token."""
        names = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
        digits = [tokenizer(f" {d}", add_special_tokens=False).input_ids for d in DIGITS]
        if any(len(ids) != 1 for ids in digits):
            raise ValueError(f"digits are not single tokens: {digits}")
        prompt = tuple(tokenizer.convert_tokens_to_ids(names))
        end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        return cls(prompt, end, tuple(ids[0] for ids in digits))


def build_model(geometry: Geometry, processor: Any) -> nn.Module:
    """Return an untrained model whose generate() uses the training prompt by default."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    tokens = Tokens.of(processor.tokenizer)
    config = WhisperConfig(
        vocab_size=len(processor.tokenizer),
        num_mel_bins=80,
        d_model=geometry.d_model,
        encoder_layers=geometry.encoder_layers,
        decoder_layers=geometry.decoder_layers,
        encoder_attention_heads=geometry.heads,
        decoder_attention_heads=geometry.heads,
        encoder_ffn_dim=4 * geometry.d_model,
        decoder_ffn_dim=4 * geometry.d_model,
        max_source_positions=WINDOW_S * 50,
        max_target_positions=64,
        dropout=0.0,
        decoder_start_token_id=tokens.prompt[0],
        bos_token_id=tokens.end,
        eos_token_id=tokens.end,
        pad_token_id=tokens.end,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = generation_config(processor.tokenizer)
    fan_in_init(model)
    return model


def generation_config(tokenizer: Any) -> Any:
    """Return a new generation config; one derived from the model's loses these fields on reload."""
    from transformers import GenerationConfig
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    ids = tokenizer.convert_tokens_to_ids
    end = ids("<|endoftext|>")
    return GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=ids("<|startoftranscript|>"),
        is_multilingual=True,
        no_timestamps_token_id=ids("<|notimestamps|>"),
        prev_sot_token_id=ids("<|startofprev|>"),
        lang_to_id={f"<|{code}|>": ids(f"<|{code}|>") for code in LANGUAGES},
        task_to_id={task: ids(f"<|{task}|>") for task in ("transcribe", "translate")},
        suppress_tokens=[],
        begin_suppress_tokens=[],
        max_initial_timestamp_index=50,
        max_new_tokens=60,
        return_timestamps=False,
        language="en",
        task="transcribe",
    )


@torch.no_grad()
def fan_in_init(model: nn.Module) -> None:
    """Initialise the weights by fan-in instead of the fixed standard deviation 0.02."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            module.weight.mul_(1.5)
            module.bias.zero_()
        elif isinstance(module, nn.Linear) and name != "proj_out":
            nn.init.xavier_uniform_(module.weight, gain=0.8)
    decoder = model.model.decoder
    nn.init.normal_(decoder.embed_tokens.weight, std=model.config.d_model**-0.5)
    nn.init.normal_(decoder.embed_positions.weight, std=0.05)


def make_ctc_head(d_model: int) -> nn.Linear:
    """Return a CTC head for blank and ten digits.

    It starts close to "all blank"; otherwise its loss dominates the clipped gradient.
    """
    head = nn.Linear(d_model, 11)
    with torch.no_grad():
        head.weight.mul_(0.3)
        head.bias.zero_()
        head.bias[0] = 4.5
    return head


def use_window(model: nn.Module, table: Tensor, window_s: float) -> None:
    """Set the encoder's window to `window_s` seconds: the first rows of its position table."""
    encoder = model.model.encoder
    rows = round(window_s * 50)
    if len(encoder.embed_positions.weight) == rows:
        return
    part = table[:rows].clone()
    encoder.embed_positions = nn.Embedding.from_pretrained(part, freeze=True).to(table.device)
    encoder.config.max_source_positions = rows
    model.config.max_source_positions = rows


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and the warnings that generate() repeats every call."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
