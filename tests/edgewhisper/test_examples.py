"""What training takes: prompts and labels, the order of the clips, and their augmentation."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.speech.clips import Clip, read_manifest
from edgewhisper.examples import IGNORED, Examples, mask, token_ids


@pytest.fixture
def few(clips: Path) -> list[Clip]:
    return read_manifest(clips)[:5]


def test_decoding_is_given_the_models_prompt_and_shall_find_the_text_and_the_end(
    tiny_whisper, processor, few
):
    tokenizer = processor.tokenizer
    given, found = token_ids(replace(few[0], text="three one"), tiny_whisper, tokenizer)
    prompt = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    assert tokenizer.convert_ids_to_tokens(given) == prompt
    assert tokenizer.convert_ids_to_tokens(found)[-1] == "<|endoftext|>"
    assert tokenizer.decode(found[:-1]) == " three one"


def test_an_english_only_model_has_neither_language_nor_task_in_its_prompt(
    tiny_whisper, processor, few
):
    tiny_whisper.generation_config.is_multilingual = False
    given, found = token_ids(replace(few[0], text=""), tiny_whisper, processor.tokenizer)
    tokens = processor.tokenizer.convert_ids_to_tokens([*given, *found])
    assert tokens == ["<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"]


def test_a_batch_pairs_every_input_with_what_comes_next_and_ignores_prompt_and_padding(
    tiny_whisper, processor, few
):
    examples = Examples(few, tiny_whisper, processor, seed=0)
    batch = examples[range(5)]
    counts = batch.labels != IGNORED
    assert not counts[:, :3].any() and counts[:, 3].all()
    assert counts.sum() == examples.tokens(range(5)) < batch.labels[:, 3:].numel()
    both = counts[:, :-1] & counts[:, 1:]
    assert torch.equal(batch.decoder_input_ids[:, 1:][both], batch.labels[:, :-1][both])


def test_every_epoch_is_a_new_order_of_all_clips(tiny_whisper, processor, few, seed):
    examples = Examples(few, tiny_whisper, processor, seed)
    epochs = [[examples.index(p + start) for p in range(5)] for start in range(0, 500, 5)]
    assert all(sorted(order) == list(range(5)) for order in epochs)
    assert len({tuple(order) for order in epochs}) > 50


def test_masks_are_two_bands_and_two_stretches_at_most_as_wide_as_asked(rng):
    features = torch.randn(80, 600)
    masked = mask(features, 12, rng)
    mean = features.mean()
    assert ((masked == features) | (masked == mean)).all()
    assert (masked == mean).all(dim=1).sum() <= 24
    assert (masked == mean).all(dim=0).sum() <= 24
    assert torch.equal(mask(features, 0, rng), features)
