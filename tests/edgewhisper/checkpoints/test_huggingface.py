"""Hugging Face directories: what fine-tuned models lack, and what contradicts itself."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from small_checkpoints import bare, edit, random_of, same_weights
from transformers import WhisperConfig

from edgewhisper import decoding
from edgewhisper.checkpoints import generation, huggingface, openai
from edgewhisper.checkpoints.openai import ENGLISH, MULTILINGUAL, WITH_CANTONESE
from edgewhisper.whisper import load, load_processor
from export.problem import Problem
from export.prompt import prompt_ids


def test_bare_weights_of_a_multilingual_model_get_language_and_task_prompts(multilingual, tmp_path):
    model = load(bare(multilingual, tmp_path / "bare"))
    generation = model.generation_config
    assert generation.is_multilingual and generation.lang_to_id["<|de|>"] == 50261
    assert prompt_ids(generation, "de") == [50258, 50261, 50359, 50363]
    assert generation.suppress_tokens[-1] == 50362
    assert generation.begin_suppress_tokens == [220, 50257]
    assert generation.prev_sot_token_id == 50361
    processor = load_processor(tmp_path / "bare")
    assert processor.feature_extractor.n_samples == 480_000
    assert processor.tokenizer.get_vocab()["<|de|>"] == 50261


def test_bare_weights_of_an_english_model_get_no_language_prompt(english, tmp_path):
    generation = load(bare(english, tmp_path / "bare")).generation_config
    assert not generation.is_multilingual
    assert prompt_ids(generation, "de") == [50257, 50362]
    assert not hasattr(generation, "lang_to_id") and not hasattr(generation, "language")


def test_a_config_generated_by_transformers_is_ignored(multilingual, tmp_path):
    multilingual.save_pretrained(tmp_path / "marked")
    edit(
        tmp_path / "marked/generation_config.json",
        _from_model_config=True,
        begin_suppress_tokens=[220, 50256],
    )
    generation = load(tmp_path / "marked").generation_config
    assert prompt_ids(generation, "hi")[1] == 50276
    assert not generation._from_model_config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_shards_load_in_float32(multilingual, tmp_path, dtype):
    half = random_of(MULTILINGUAL).to(dtype)
    half.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert (tmp_path / "shards/model.safetensors.index.json").is_file()
    model = load(tmp_path / "shards")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert same_weights(model, multilingual, tolerance=0.01)


ENGLISH_START, OTHER_START = 50257, 50258
RESIZED = {
    "multilingual + 1": (MULTILINGUAL + 1, 80, OTHER_START, MULTILINGUAL, 50359),
    "multilingual + 7": (MULTILINGUAL + 7, 80, OTHER_START, MULTILINGUAL, 50359),
    "large-v3": (WITH_CANTONESE, 128, OTHER_START, WITH_CANTONESE, 50360),
    "large-v3 + 4": (WITH_CANTONESE + 4, 128, OTHER_START, WITH_CANTONESE, 50360),
    "large-v3 + 4, default start": (WITH_CANTONESE + 4, 128, None, WITH_CANTONESE, 50360),
    "english + 1": (ENGLISH + 1, 80, ENGLISH_START, ENGLISH, None),
    "english + 2": (ENGLISH + 2, 80, ENGLISH_START, ENGLISH, None),
}
"""Tokens, mel bins, stored start token, the original vocabulary, the id of <|transcribe|>."""


@pytest.mark.parametrize("with_tokenizer", [False, True], ids=["bare", "tokenizer"])
@pytest.mark.parametrize("case", RESIZED)
def test_a_resized_vocabulary_is_recognised_by_mel_bins_and_start(case, with_tokenizer, tmp_path):
    size, mels, start, original, transcribe = RESIZED[case]
    out = bare(random_of(size, num_mel_bins=mels), tmp_path / "resized")
    edit_start(out / "config.json", start)
    if with_tokenizer:
        openai.tokenizer(original).save_pretrained(out)
    model, processor = load(out), load_processor(out)
    assert len(processor.tokenizer) == original
    prompt = prompt_ids(model.generation_config, "de")
    if transcribe is None:
        assert prompt == [50257, 50362] and not model.generation_config.is_multilingual
    else:
        assert prompt == [50258, 50261, transcribe, transcribe + 4]


def edit_start(config: Path, start: int | None) -> None:
    """Store a start token in config.json, or none."""
    stored = json.loads(config.read_text())
    del stored["decoder_start_token_id"]
    config.write_text(json.dumps(stored))
    if start is not None:
        edit(config, decoder_start_token_id=start)


def test_the_start_token_may_be_stored_in_the_generation_config(tmp_path):
    out = bare(random_of(MULTILINGUAL + 1), tmp_path / "resized")
    edit_start(out / "config.json", ENGLISH_START)  # the default of WhisperConfig
    edit(out / "generation_config.json", decoder_start_token_id=OTHER_START)
    assert prompt_ids(load(out).generation_config, "de") == [50258, 50261, 50359, 50363]


def test_a_resized_vocabulary_without_a_start_token_is_refused(tmp_path):
    out = bare(random_of(MULTILINGUAL + 1), tmp_path / "resized")
    edit_start(out / "config.json", None)
    with pytest.raises(Problem, match=r"51866 tokens .* 80 mel bins") as problem:
        load(out)
    assert "decoder_start_token_id" in problem.value.hint


def test_a_multilingual_model_with_the_default_start_token_uses_its_tokenizer(tmp_path):
    out = bare(random_of(MULTILINGUAL), tmp_path / "scratch")
    edit_start(out / "config.json", ENGLISH_START)
    openai.tokenizer(MULTILINGUAL).save_pretrained(out)
    assert prompt_ids(load(out).generation_config, "de") == [50258, 50261, 50359, 50363]


def test_a_resized_english_model_has_the_heads_of_its_original():
    size = openai.SIZES["tiny.en"]
    config = WhisperConfig(
        vocab_size=ENGLISH + 1,
        d_model=size.d_model,
        encoder_layers=size.encoder_layers,
        decoder_layers=size.decoder_layers,
    )
    assert openai.size_of(config, english=True) is size
    assert openai.size_of(config, english=False) is openai.SIZES["tiny"]


def test_underivable_values_are_refused(tmp_path):
    out = bare(random_of(1234, decoder_start_token_id=3, pad_token_id=0), tmp_path / "bare")
    with pytest.raises(Problem, match="1234 tokens is not one of OpenAI's") as problem:
        load(out)
    assert "is_multilingual" in str(problem.value) and "copy the tokenizer" in problem.value.hint


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ("generation_config.json", {"forced_decoder_ids": [[1, 50261], [2, 50358], [3, 50363]]}),
        ("config.json", {"forced_decoder_ids": [[1, 50261], [2, 50358]]}),
        ("generation_config.json", {"language": "german", "task": "translate"}),
        ("generation_config.json", {"language": "<|de|>", "task": "translate"}),
    ],
    ids=["forced-ids", "forced-ids-in-config", "name", "token"],
)
def test_the_language_of_a_fine_tuned_model_is_its_prompt(multilingual, tmp_path, place, values):
    out = bare(multilingual, tmp_path / "tuned")
    edit(out / place, **values)
    generation = load(out).generation_config
    assert prompt_ids(generation) == [50258, 50261, 50358, 50363]


def test_forced_ids_without_a_language_set_none(multilingual, tmp_path):
    out = bare(multilingual, tmp_path / "tuned")
    edit(out / "generation_config.json", forced_decoder_ids=[[1, None], [2, 50359]])
    generation = load(out).generation_config
    assert getattr(generation, "language", None) is None
    assert generation.task == "transcribe"


def test_keys_that_decoding_ignores_have_no_effect(digits, clips, tmp_path):
    from benchmarks.speech.clips import read_manifest

    copy = tmp_path / "keys"
    shutil.copytree(digits, copy)
    edit(
        copy / "generation_config.json",
        return_timestamps=True,
        num_beams=4,
        repetition_penalty=3.0,
        no_repeat_ngram_size=2,
        length_penalty=0.1,
    )
    pcms = [clip.pcm() for clip in read_manifest(clips)[:4]]
    texts = [
        decoding.transcribe(load(place), load_processor(place), pcms) for place in (digits, copy)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"decoder_start_token_id": 50257}, "decoder_start_token_id = 50257"),
        ({"no_timestamps_token_id": 50362}, "no_timestamps_token_id = 50362"),
        ({"lang_to_id": {"<|de|>": 50260}}, r"lang_to_id\['<\|de\|>'\] = 50260"),
        ({"task_to_id": {"transcribe": 50358}}, r"task_to_id\['transcribe'\] = 50358"),
        ({"eos_token_id": 50256}, "eos_token_id = 50256"),
        ({"suppress_tokens": [1, 51865]}, "51865 in suppress_tokens"),
        ({"begin_suppress_tokens": [-1]}, "-1 in begin_suppress_tokens"),
        ({"suppress_tokens": "all"}, "suppress_tokens = 'all'"),
        ({"alignment_heads": [[0, 1], [5, -1]]}, r"\[5, -1\] in alignment_heads"),
        ({"alignment_heads": 3}, "alignment_heads = 3"),
        ({"word_delay_s": 1.5}, "word_delay_s = 1.5"),
    ],
    ids=[
        *("start", "no-timestamps", "language", "task", "end", "too-high", "too-low", "no-list"),
        *("no-head", "no-heads", "delay"),
    ],
)
def test_ids_that_contradict_the_tokenizer_are_refused(multilingual, tmp_path, values, words):
    out = bare(multilingual, tmp_path / "shifted")
    edit(out / "generation_config.json", is_multilingual=True, **values)
    with pytest.raises(Problem, match=words) as problem:
        load(out)
    assert "generation_config.json" in str(problem.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"language": "hi",}', "generation_config.json is not valid JSON .* line 1 column 19"),
        ("[]", "generation_config.json holds a list"),
        ("", "generation_config.json is not valid JSON .* line 1 column 1"),
    ],
    ids=["comma", "list", "empty"],
)
def test_a_generation_config_that_is_no_json_object_is_refused(
    multilingual, tmp_path, content, words
):
    out = bare(multilingual, tmp_path / "damaged")
    (out / "generation_config.json").write_text(content)
    for read in (load, load_processor, partial(load, mapped=True)):
        with pytest.raises(Problem, match=words) as problem:
            read(out)
        assert "remove it" in problem.value.hint


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"language": "klingon"}, "language = 'klingon', .* tokens for en, zh, .* 94 others"),
        ({"language": "yue"}, "language = 'yue'"),
        ({"task": "summarize"}, "task = 'summarize', .* tokens for translate, transcribe"),
    ],
    ids=["unknown", "of-large-v3", "task"],
)
def test_a_language_or_task_without_a_token_is_refused(multilingual, tmp_path, values, words):
    out = bare(multilingual, tmp_path / "tuned")
    edit(out / "generation_config.json", **values)
    with pytest.raises(Problem, match=f"generation_config.json has {words}") as problem:
        load(out)
    assert "or remove it, then" in problem.value.hint


def test_the_delay_of_word_timestamps_is_known_for_openai_s_heads_only():
    size = openai.SIZES["tiny.en"]
    dimensions = {
        "d_model": size.d_model,
        "encoder_layers": size.encoder_layers,
        "decoder_layers": size.decoder_layers,
    }
    config = WhisperConfig(vocab_size=ENGLISH, **dimensions)
    heads = [list(head) for head in size.alignment_heads]
    assert generation.word_delay_s(config, True, heads) == size.word_delay_s == 0.1
    assert generation.word_delay_s(config, True, heads[1:]) is None
    other = WhisperConfig(vocab_size=ENGLISH, d_model=96)
    assert generation.word_delay_s(other, True, heads) is None


def test_an_english_model_with_a_multilingual_config_is_refused(english, tmp_path):
    out = bare(english, tmp_path / "sibling")
    edit(out / "generation_config.json", is_multilingual=True)
    with pytest.raises(Problem, match="is_multilingual = True, but according to the tokenizer it"):
        load(out)


def test_a_multilingual_model_with_an_english_config_is_refused(multilingual, tmp_path):
    out = bare(multilingual, tmp_path / "sibling")
    edit(out / "generation_config.json", is_multilingual=False)
    words = "generation_config.json has is_multilingual = False, .* 51865 in config.json"
    with pytest.raises(Problem, match=words) as problem:
        load(out)
    assert "correct is_multilingual" in problem.value.hint


def test_a_vocabulary_of_its_own_may_be_used_without_a_language(digits, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(digits, own)
    edit(own / "generation_config.json", is_multilingual=False)
    assert prompt_ids(load(own).generation_config) == [375, 481]


def test_a_tokenizer_of_another_vocabulary_is_refused(english, tmp_path):
    out = bare(english, tmp_path / "sibling")
    openai.tokenizer(MULTILINGUAL).save_pretrained(out)
    with pytest.raises(
        Problem, match=r"<\|endoftext\|> is 50257; with vocab_size 51864"
    ) as problem:
        load(out)
    assert "another model" in problem.value.hint


def test_an_english_tokenizer_of_a_multilingual_model_is_refused(multilingual, tmp_path):
    out = bare(multilingual, tmp_path / "sibling")
    openai.tokenizer(ENGLISH).save_pretrained(out)
    words = r"is 50256; with vocab_size 51865, decoder_start_token_id 50258 .* must be 50257"
    with pytest.raises(Problem, match=words) as problem:
        load(out)
    assert "50257 if it is English-only, 50258 if multilingual" in problem.value.hint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is short.", "It is short"),
        (f"One. Two. {'three ' * 40}", "One. Two"),
        ("three " * 40, f"{'three ' * 33}..."),
        ("x" * 300, f"{'x' * 200} ..."),
    ],
    ids=["short", "sentences", "words", "one-word"],
)
def test_long_texts_of_errors_end_with_a_sentence_or_an_ellipsis(text, expected):
    assert huggingface.shortened(text) == expected
