"""Training examples: prompts and labels, the order of the clips, and their augmentation."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.speech.clips import Clip, read_manifest
from edgewhisper.examples import IGNORED, Examples, mask, token_ids


@pytest.fixture
def few(clips: Path) -> list[Clip]:
    return read_manifest(clips)[:5]


def test_token_ids_are_the_prompt_and_the_text_with_the_end_token(tiny_whisper, processor, few):
    tokenizer = processor.tokenizer
    prompt, text = token_ids(replace(few[0], text="three one"), tiny_whisper, tokenizer)
    expected = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    assert tokenizer.convert_ids_to_tokens(prompt) == expected
    assert tokenizer.convert_ids_to_tokens(text)[-1] == "<|endoftext|>"
    assert tokenizer.decode(text[:-1]) == " three one"


def test_an_english_only_model_has_neither_language_nor_task_in_its_prompt(
    tiny_whisper, processor, few
):
    tiny_whisper.generation_config.is_multilingual = False
    prompt, text = token_ids(replace(few[0], text=""), tiny_whisper, processor.tokenizer)
    tokens = processor.tokenizer.convert_ids_to_tokens([*prompt, *text])
    assert tokens == ["<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"]


def test_labels_are_the_next_tokens_and_ignore_prompt_and_padding(tiny_whisper, processor, few):
    examples = Examples(few, tiny_whisper, processor, seed=0)
    batch = examples[range(5)]
    counts = batch.labels != IGNORED
    assert not counts[:, :3].any() and counts[:, 3].all()
    assert counts.sum() == examples.tokens(range(5)) < batch.labels[:, 3:].numel()
    both = counts[:, :-1] & counts[:, 1:]
    assert torch.equal(batch.decoder_input_ids[:, 1:][both], batch.labels[:, :-1][both])


def test_every_epoch_is_a_new_permutation_of_all_clips(tiny_whisper, processor, few, seed):
    examples = Examples(few, tiny_whisper, processor, seed)
    epochs = [[examples.index(p + start) for p in range(5)] for start in range(0, 500, 5)]
    assert all(sorted(order) == list(range(5)) for order in epochs)
    assert len({tuple(order) for order in epochs}) > 50


def test_masks_are_two_bands_and_two_spans_of_limited_width(rng):
    features = torch.randn(80, 600)
    masked = mask(features, 12, rng)
    mean = features.mean()
    assert ((masked == features) | (masked == mean)).all()
    assert (masked == mean).all(dim=1).sum() <= 24
    assert (masked == mean).all(dim=0).sum() <= 24
    assert torch.equal(mask(features, 0, rng), features)
