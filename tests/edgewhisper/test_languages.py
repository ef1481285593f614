"""Which language prompts a model: the same in training, decoding, export and the rivals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import soundfile

from benchmarks.rivals.protocol import languages_of
from benchmarks.rivals.transformers import Rival
from benchmarks.speech.clips import read_manifest
from benchmarks.speech.wav import write_clips
from devices.runner.problem import RunnerProblem
from devices.runner.recognizer import Recognizer
from edgewhisper import alignment, decoding, pipeline, whisper
from edgewhisper.compress.work import Work
from edgewhisper.examples import token_ids
from edgewhisper.languages import set_language, set_prompt
from edgewhisper.recipe import parse
from export.artifact import read_manifest as read_artifact
from export.artifact import write_manifest
from export.artifact_files import decoding_rules
from export.onnx.to_onnx import export_onnx
from export.problem import Problem
from export.prompt import known_languages, language_code, named_language, prompt_ids

WITHOUT_TOKEN = ("bm", "tlh", "xx-YY")

# every kind of step that makes a model anew
STEPS = """
[[step]]
method = "merge"
groups = "0+1"
[step.training]
steps = 1
batch_size = 2

[[step]]
method = "shear"
rank = 96
calibration = 1
[step.training]
steps = 0

[[step]]
method = "wsap"
[step.recovery]
steps = 1
batch_size = 2

[[step]]
method = "shrink"
"""


@pytest.fixture
def few(clips):
    return read_manifest(clips)[:4]


@pytest.fixture
def drawn(rng, tiny_whisper):
    """A function that draws some of the languages that the model has tokens for."""
    known = known_languages(tiny_whisper.generation_config)

    def draw(count: int) -> list[str]:
        return [str(code) for code in rng.choice(known, count, replace=False)]

    return draw


def in_languages(clips, languages):
    return [replace(clip, lang=lang) for clip, lang in zip(clips, languages, strict=True)]


def named(processor, prompt) -> str:
    """The language that a prompt is for, which also has to be a whole one."""
    start, language, *rest = processor.tokenizer.convert_ids_to_tokens(prompt)
    assert (start, rest) == ("<|startoftranscript|>", ["<|transcribe|>", "<|notimestamps|>"])
    return language.strip("<|>")


def heard(model, decode) -> list[list[int]]:
    """The prompts that a model's decoder gets in the first step of each batch of `decode()`."""
    found = []

    def hook(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids.shape[1] > 1:
            found.extend(ids.tolist())

    hooked = model.model.decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        decode()
    finally:
        hooked.remove()
    return found


# ------------------------------------------------------------------------------------- one rule


def test_what_is_trained_is_what_is_decoded_timed_and_exported(
    tiny_whisper, processor, few, drawn, rng, tmp_path
):
    own, fallback = drawn(2)
    generation = tiny_whisper.generation_config
    without = str(rng.choice(WITHOUT_TOKEN))
    for spoken, names, wanted in (
        (own, fallback, own),
        (f"{own}-XX", None, own),
        (own.upper(), fallback, own),
        (without, fallback, fallback),
        (without, f"<|{fallback}|>", fallback),
        (without, None, "en"),
    ):
        generation.language = names
        (clip,) = in_languages(few[:1], [spoken])
        trained, _ = token_ids(clip, tiny_whisper, processor.tokenizer)
        assert named(processor, trained) == wanted
        told = tiny_whisper, processor, [clip.pcm()], [clip.lang]
        if spoken != without or names is not None:  # otherwise decoding detects the language
            assert heard(tiny_whisper, partial(decoding.greedy, *told)) == [trained]
        timed = alignment.TimedClip(clip.pcm(), (alignment.Word("one", 0.0, 0.1),), clip.lang)
        assert alignment.spell(timed, tiny_whisper, processor)[0] == trained
        set_language(generation, [clip], [], fallback if spoken == without else None)
        assert set_prompt(generation, None, one_prompt=True) is None
        assert generation.language == (fallback if spoken == without else own)
        artifact = tmp_path / f"{spoken}-{names}".replace("|", "")
        prompt = export_onnx(tiny_whisper, processor, artifact, "fp32")["decoding"]["prompt"]
        assert prompt == token_ids(clip, tiny_whisper, processor.tokenizer)[0]


def test_clips_of_several_languages_are_each_decoded_under_their_own(
    tiny_whisper, processor, few, drawn
):
    a, b = drawn(2)
    tiny_whisper.generation_config.language = b
    pcms = [clip.pcm() for clip in few]
    spoken = [a, b, "bm", a]
    decode = partial(decoding.greedy, tiny_whisper, processor, pcms, spoken)
    prompts = [named(processor, prompt) for prompt in heard(tiny_whisper, decode)]
    assert sorted(prompts) == sorted([a, b, b, a])
    together = decode()
    for language, pcm, tokens in zip([a, b, b, a], pcms, together, strict=True):
        tiny_whisper.generation_config.language = language
        assert decoding.greedy(tiny_whisper, processor, [pcm]) == [tokens]


def test_a_long_clip_keeps_its_language_in_every_window(tiny_whisper, processor, clips, drawn):
    (language,) = drawn(1)
    (long,) = [c for c in read_manifest(clips.parent / "other.jsonl") if c.text]
    told = tiny_whisper, processor, [long.pcm()], [language]
    prompts = heard(tiny_whisper, partial(decoding.transcribe, *told))
    assert len(prompts) > 1
    assert {named(processor, prompt) for prompt in prompts} == {language}


def test_an_english_only_model_is_told_no_language(tiny_whisper, processor, few, drawn):
    generation = tiny_whisper.generation_config
    generation.is_multilingual, generation.language, generation.task = False, None, None
    clips = in_languages(few, drawn(4))
    set_language(generation, clips, clips, None)
    for english in (None, "en", "English", "auto"):
        assert set_prompt(generation, english, one_prompt=True) is None
    with pytest.raises(Problem, match="--language de: the model knows English only"):
        set_prompt(generation, "de", one_prompt=False)
    assert generation.language is None
    trained, _ = token_ids(clips[0], tiny_whisper, processor.tokenizer)
    assert trained == prompt_ids(generation)
    assert processor.tokenizer.convert_ids_to_tokens(trained)[1:] == ["<|notimestamps|>"]
    with pytest.raises(Problem, match="--language hi: the model knows English only"):
        set_language(generation, clips, clips, "hi")


def test_dev_clips_are_judged_under_their_own_languages(
    tiny_whisper, processor, few, drawn, tmp_path
):
    clips = in_languages(few, drawn(4))
    work = Work(processor, clips, clips, tmp_path)
    prompts = heard(tiny_whisper, partial(work.wer, tiny_whisper))
    assert {named(processor, p) for p in prompts} == {clip.lang for clip in clips}


def test_the_rival_is_prompted_for_the_clips_too(digits, processor, few, drawn, tmp_path):
    clips = in_languages(few, drawn(4))
    write_clips(clips, tmp_path)
    assert languages_of(tmp_path / "clips.json", 4) == [clip.lang for clip in clips]
    rival = Rival(digits, threads=1)
    soundfile.write(tmp_path / "a.wav", few[0].pcm(), 16_000, subtype="FLOAT")
    for clip in clips:
        decode = partial(rival.transcribe, tmp_path / "a.wav", clip.lang)
        (prompt,) = heard(rival.model, decode)
        assert named(processor, prompt) == clip.lang


def test_codes_are_understood_however_they_are_written():
    written = ["hi", "hi_in", "hi-IN", "Hindi", " HI ", "<|hi|>"]
    assert {language_code(word) for word in written} == {"hi"}
    assert language_code("bm_ML") == "bm"


# ------------------------------------------------------------------------- what is made for which


def test_speech_of_one_language_names_it(tiny_whisper, few, drawn):
    a, b = drawn(2)
    generation = tiny_whisper.generation_config
    generation.language, generation.task = b, None
    noise = replace(few[0], text="", lang="zxx")
    set_language(generation, [*in_languages(few, [a] * 4), noise], in_languages(few, [b] * 4), None)
    assert (generation.language, generation.task) == (a, "transcribe")


def test_speech_of_several_languages_names_none(tiny_whisper, few, drawn):
    a, b, c = drawn(3)
    generation = tiny_whisper.generation_config
    generation.language = c
    set_language(generation, in_languages(few, [a, b, a, b]), [], None)
    assert generation.language == c


@pytest.mark.parametrize("one_prompt", [False, True], ids=["a prompt a clip", "one prompt"])
def test_an_artifact_is_prompted_as_asked_or_as_the_checkpoint_names(
    tiny_whisper, drawn, one_prompt
):
    a, b = drawn(2)
    generation = tiny_whisper.generation_config
    for names, asked, wanted in ((a, None, a), (a, b, b), (None, b, b), (f"<|{a}|>", None, a)):
        generation.language = names
        assert set_prompt(generation, asked, one_prompt) is None
        assert named_language(generation) == wanted
        assert "language" not in decoding_rules(tiny_whisper)
    with pytest.raises(Problem, match="--language bm: the model has no token for it") as letter:
        set_prompt(generation, "bm", one_prompt)
    assert a in known_languages(generation)
    assert "languages, such as" in letter.value.hint


def test_an_artifact_of_a_checkpoint_that_names_no_language_detects_it(tiny_whisper, drawn):
    (a,) = drawn(1)
    generation = tiny_whisper.generation_config
    for names, asked in ((None, None), (None, "auto"), (a, "auto")):
        generation.language = names
        assert set_prompt(generation, asked, one_prompt=False) is None
        assert decoding_rules(tiny_whisper)["language"] == "auto"
    generation.language = None
    with pytest.raises(Problem, match="--language auto: this layout has one fixed prompt"):
        set_prompt(generation, "auto", one_prompt=True)
    note = set_prompt(generation, None, one_prompt=True)
    assert "prompted for English; choose another with --language" in note
    assert generation.language == "en"


def test_forced_decoder_ids_name_a_language_too(tiny_whisper, drawn):
    """Older checkpoints name it so; OpenAI's own say null there, which names none."""
    (a,) = drawn(1)
    generation = tiny_whisper.generation_config
    generation.language = None
    generation.forced_decoder_ids = [[1, generation.lang_to_id[f"<|{a}|>"]], [2, 5]]
    assert named_language(generation) == a
    generation.forced_decoder_ids = [[1, None], [2, 5]]
    assert named_language(generation) is None


def test_a_checkpoint_and_its_artifact_detect_the_same_languages(
    make_whisper, processor, few, tmp_path
):
    model = make_whisper()
    model.generation_config.language = None
    pcms = [clip.pcm() for clip in few]
    wanted = [code for code, _ in decoding.detect(model, processor, pcms)]
    assert decoding.prompt_languages(model, processor, pcms, ["bm"] * 4) == wanted
    theirs = [
        model.detect_language(decoding.log_mel(processor.feature_extractor, [pcm])).item()
        for pcm in pcms
    ]
    assert [model.generation_config.lang_to_id[f"<|{code}|>"] for code in wanted] == theirs

    manifest = export_onnx(model, processor, tmp_path / "artifact", "fp32")
    write_manifest(tmp_path / "artifact", manifest)
    assert manifest["format"] == 3
    assert manifest["decoding"]["language"] == "auto"
    recognizer = Recognizer(tmp_path / "artifact", threads=1, guards=False)
    tokens = decoding.greedy(model, processor, pcms)
    for pcm, code, said in zip(pcms, wanted, tokens, strict=True):
        transcript = recognizer.transcribe(pcm)
        assert (transcript.language, transcript.tokens) == (code, said)
        assert recognizer.window(pcm) == recognizer.window(pcm, language="bm") == said
        other = next(c for c in recognizer.rules.languages if c != code)
        assert recognizer.transcribe(pcm, language=other).language == other


def test_an_artifact_with_a_named_language_keeps_format_2(tiny_whisper, processor, tmp_path):
    manifest = export_onnx(tiny_whisper, processor, tmp_path / "named", "fp32")
    write_manifest(tmp_path / "named", manifest)
    assert manifest["format"] == 2
    for change, message in (
        ({"language": "en"}, "decoding.language is 'en', not 'auto'"),
        ({"language": "auto", "languages": {}}, "not a prompt with a language to replace"),
    ):
        write_manifest(tmp_path / "named", manifest | {"decoding": manifest["decoding"] | change})
        with pytest.raises(RunnerProblem, match=message):
            Recognizer(tmp_path / "named")


def test_languages_that_cannot_prompt_get_letters(tiny_whisper, few, drawn):
    a, b = drawn(2)
    generation = tiny_whisper.generation_config
    mixed = in_languages(few, [a, "bm", "bm", "tlh"])
    with pytest.raises(Problem, match="of 3 clips is 'bm' and 'tlh', which the model") as letter:
        set_language(generation, mixed, [], None)
    assert "--language CODE" in letter.value.hint
    with pytest.raises(Problem, match="of 3 clips"):
        set_language(generation, [], mixed, None)
    with pytest.raises(Problem, match="--language bm: the model has no token for it"):
        set_language(generation, mixed, [], "bm")
    with pytest.raises(Problem, match=f"--language {b}: the speech is in {a}, and"):
        set_language(generation, in_languages(few, [a] * 4), [], b)
    set_language(generation, in_languages(few, [a] * 4), [], a)
    set_language(generation, mixed, [], b)
    assert generation.language == b


# --------------------------------------------------------------------------------- the whole road


@pytest.fixture
def bambara(tmp_path, monkeypatch, clips) -> Path:
    """A manifest of two clips that are called Bambara, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clips.parent / "test", tmp_path / "test")
    rows = [json.loads(line) | {"lang": "bm"} for line in clips.read_text().splitlines()[1:3]]
    (tmp_path / "bm.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.toml").write_text(STEPS)
    return Path("bm.jsonl")


def test_speech_without_a_token_is_prompted_as_asked_from_training_to_the_artifact(
    bambara, digits, processor, clips, drawn, monkeypatch
):
    code, other = drawn(2)
    quiet, heard, transcribe = {"say": lambda text: None}, [], Recognizer.transcribe
    monkeypatch.setattr(
        Recognizer,
        "transcribe",
        lambda *given, **options: heard.append(transcribe(*given, **options)) or heard[-1],
    )
    given = str(digits), "mine.toml", bambara, bambara
    slim = pipeline.compress(*given, Path("slim"), language=code, allow_loss=True, **quiet)
    model = whisper.load(slim)
    assert model.generation_config.language == code
    record = json.loads((slim / "compression.json").read_text())
    assert record["language"] == code
    assert record["after"]["dev"]["normalizer"] == "bambara"

    gating = pipeline.Gating("off")  # training of one step has left a model that says nothing
    given = str(slim), "fp32", bambara, Path("artifact")
    artifact = pipeline.export(*given, gating=gating, **quiet)
    told = read_artifact(artifact)
    assert told["gate"] == {"result": "not run"}
    spoken = read_manifest(bambara)
    assert told["decoding"]["prompt"] == token_ids(spoken[0], model, processor.tokenizer)[0]
    assert named(processor, told["decoding"]["prompt"]) == code

    assert pipeline.evaluate("artifact", bambara).score.normalizer == "bambara"
    assert [transcript.language for transcript in heard] == [code] * 2
    rows = [json.loads(line) | {"lang": other} for line in bambara.read_text().splitlines()]
    Path("other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pipeline.evaluate("artifact", Path("other.jsonl"), "none")
    assert [transcript.language for transcript in heard[2:]] == [other] * 2


def test_every_step_keeps_the_language(tiny_whisper, processor, few, drawn, tmp_path):
    (code,) = drawn(1)
    tiny_whisper.generation_config.language = code
    work = Work(processor, in_languages(few[:2], [code] * 2), few[:2], tmp_path, original=None)
    recipe = parse("mine", STEPS.replace("rank = 96", "rank = 16"))
    model = pipeline.run_steps(tiny_whisper, recipe, work, say=lambda text: None)
    assert model.generation_config.language == code


def test_interrupted_work_is_not_shared_between_prompts(bambara, digits, drawn):
    a, b = drawn(2)
    recipe = parse("mine", STEPS)
    given = recipe, str(digits), bambara, bambara, None, 0, None
    places = {pipeline.prepare(*given, language=code).work.run_dir for code in (a, b, a)}
    assert len(places) == 2
