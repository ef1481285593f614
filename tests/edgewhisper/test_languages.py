"""The prompt language of a model is the same in training, decoding, export and rival engines."""

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
from edgewhisper import alignment, decoding, job, pipeline, transcription, whisper
from edgewhisper.compress.context import Context
from edgewhisper.examples import token_ids
from edgewhisper.languages import set_language, set_prompt
from edgewhisper.recipe import parse
from export.artifact import read_manifest as read_artifact
from export.artifact import write_manifest
from export.manifest import decoding_rules
from export.onnx.to_onnx import export_onnx
from export.problem import Problem
from export.prompt import known_languages, language_code, named_language, prompt_ids

WITHOUT_TOKEN = ("bm", "tlh", "xx-YY")

# all steps that build a new model
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
    """A function that draws languages for which the model has tokens."""
    known = known_languages(tiny_whisper.generation_config)

    def draw(count: int) -> list[str]:
        return [str(code) for code in rng.choice(known, count, replace=False)]

    return draw


def in_languages(clips, languages):
    return [replace(clip, lang=lang) for clip, lang in zip(clips, languages, strict=True)]


def named(processor, prompt) -> str:
    """Return the language of a prompt, and check that the prompt is complete."""
    start, language, *rest = processor.tokenizer.convert_ids_to_tokens(prompt)
    assert (start, rest) == ("<|startoftranscript|>", ["<|transcribe|>", "<|notimestamps|>"])
    return language.strip("<|>")


def prompts_of(model, decode) -> list[list[int]]:
    """Return the prompts in the first decoder step of each batch of `decode()`."""
    prompts = []

    def hook(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids.shape[1] > 1:
            prompts.extend(ids.tolist())

    hooked = model.model.decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        decode()
    finally:
        hooked.remove()
    return prompts


# ------------------------------------------------------------------------------------- one rule


def test_training_decoding_timing_and_export_have_the_same_prompt(
    tiny_whisper, processor, few, drawn, rng, tmp_path
):
    own, fallback = drawn(2)
    generation = tiny_whisper.generation_config
    without = str(rng.choice(WITHOUT_TOKEN))
    for spoken, names, expected in (
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
        assert named(processor, trained) == expected
        inputs = tiny_whisper, processor, [clip.pcm()], [clip.lang]
        if spoken != without or names is not None:  # otherwise decoding detects the language
            assert prompts_of(tiny_whisper, partial(decoding.greedy, *inputs)) == [trained]
        timed = alignment.TimedClip(clip.pcm(), (alignment.Word("one", 0.0, 0.1),), clip.lang)
        assert alignment.spell(timed, tiny_whisper, processor)[0] == trained
        set_language(generation, [clip], [], fallback if spoken == without else None)
        assert set_prompt(generation, None, one_prompt=True) is None
        assert generation.language == (fallback if spoken == without else own)
        artifact = tmp_path / f"{spoken}-{names}".replace("|", "")
        prompt = export_onnx(tiny_whisper, processor, artifact, "fp32")["decoding"]["prompt"]
        assert prompt == token_ids(clip, tiny_whisper, processor.tokenizer)[0]


def test_each_clip_is_decoded_with_its_own_language(tiny_whisper, processor, few, drawn):
    a, b = drawn(2)
    tiny_whisper.generation_config.language = b
    pcms = [clip.pcm() for clip in few]
    spoken = [a, b, "bm", a]
    decode = partial(decoding.greedy, tiny_whisper, processor, pcms, spoken)
    prompts = [named(processor, prompt) for prompt in prompts_of(tiny_whisper, decode)]
    assert sorted(prompts) == sorted([a, b, b, a])
    together = decode()
    for language, pcm, tokens in zip([a, b, b, a], pcms, together, strict=True):
        tiny_whisper.generation_config.language = language
        assert decoding.greedy(tiny_whisper, processor, [pcm]) == [tokens]


def test_a_long_clip_keeps_its_language_in_every_window(tiny_whisper, processor, clips, drawn):
    (language,) = drawn(1)
    (long,) = [c for c in read_manifest(clips.parent / "other.jsonl") if c.text]
    inputs = tiny_whisper, processor, [long.pcm()], [language]
    prompts = prompts_of(tiny_whisper, partial(decoding.transcribe, *inputs))
    assert len(prompts) > 1
    assert {named(processor, prompt) for prompt in prompts} == {language}


def test_an_english_only_model_has_no_language_prompt(tiny_whisper, processor, few, drawn):
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
    for english in ("en", "English", "en-US", "auto"):
        set_language(generation, clips, clips, english)
        assert (generation.language, generation.task) == (None, None)
    with pytest.raises(Problem, match="--language hi: the model knows English only"):
        set_language(generation, clips, clips, "hi")


def test_dev_clips_are_evaluated_with_their_own_languages(
    tiny_whisper, processor, few, drawn, tmp_path
):
    clips = in_languages(few, drawn(4))
    context = Context(processor, clips, clips, tmp_path)
    prompts = prompts_of(tiny_whisper, partial(context.wer, tiny_whisper))
    assert {named(processor, p) for p in prompts} == {clip.lang for clip in clips}


def test_the_rival_is_prompted_with_the_language_of_each_clip(
    digits, processor, few, drawn, tmp_path
):
    clips = in_languages(few, drawn(4))
    write_clips(clips, tmp_path)
    assert languages_of(tmp_path / "clips.json", 4) == [clip.lang for clip in clips]
    rival = Rival(digits, threads=1)
    soundfile.write(tmp_path / "a.wav", few[0].pcm(), 16_000, subtype="FLOAT")
    for clip in clips:
        decode = partial(rival.transcribe, tmp_path / "a.wav", clip.lang)
        (prompt,) = prompts_of(rival.model, decode)
        assert named(processor, prompt) == clip.lang


def test_all_spellings_of_a_language_give_its_code():
    written = ["hi", "hi_in", "hi-IN", "Hindi", " HI ", "<|hi|>"]
    assert {language_code(word) for word in written} == {"hi"}
    assert language_code("bm_ML") == "bm"


# ------------------------------------------------------- language of checkpoints and artifacts


def test_speech_of_one_language_sets_the_prompt_language(tiny_whisper, few, drawn):
    a, b = drawn(2)
    generation = tiny_whisper.generation_config
    generation.language, generation.task = b, None
    noise = replace(few[0], text="", lang="zxx")
    set_language(generation, [*in_languages(few, [a] * 4), noise], in_languages(few, [b] * 4), None)
    assert (generation.language, generation.task) == (a, "transcribe")


def test_speech_of_several_languages_does_not_change_it(tiny_whisper, few, drawn):
    a, b, c = drawn(3)
    generation = tiny_whisper.generation_config
    generation.language = c
    set_language(generation, in_languages(few, [a, b, a, b]), [], None)
    assert generation.language == c


@pytest.mark.parametrize("one_prompt", [False, True], ids=["a prompt a clip", "one prompt"])
def test_an_artifact_uses_the_requested_language_or_the_checkpoints(
    tiny_whisper, drawn, one_prompt
):
    a, b = drawn(2)
    generation = tiny_whisper.generation_config
    for names, asked, expected in ((a, None, a), (a, b, b), (None, b, b), (f"<|{a}|>", None, a)):
        generation.language = names
        assert set_prompt(generation, asked, one_prompt) is None
        assert named_language(generation) == expected
        assert "language" not in decoding_rules(tiny_whisper)
    with pytest.raises(Problem, match="--language bm: the model has no token for it") as error:
        set_prompt(generation, "bm", one_prompt)
    assert a in known_languages(generation)
    assert "languages, such as" in error.value.hint


def test_an_artifact_of_a_checkpoint_without_a_language_detects_it(tiny_whisper, drawn):
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


def test_forced_decoder_ids_set_the_language(tiny_whisper, drawn):
    """Older checkpoints use these ids. In OpenAI's own, the id of the language is null."""
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
    expected = [code for code, _ in decoding.detect(model, processor, pcms)]
    assert decoding.detected_languages(model, processor, pcms, ["bm"] * 4) == expected
    theirs = [
        model.detect_language(decoding.log_mel(processor.feature_extractor, [pcm])).item()
        for pcm in pcms
    ]
    assert [model.generation_config.lang_to_id[f"<|{code}|>"] for code in expected] == theirs

    manifest = export_onnx(model, processor, tmp_path / "artifact", "fp32")
    write_manifest(tmp_path / "artifact", manifest)
    assert manifest["format"] == 3
    assert manifest["decoding"]["language"] == "auto"
    recognizer = Recognizer(tmp_path / "artifact", threads=1, guards=False)
    tokens = decoding.greedy(model, processor, pcms)
    for pcm, code, row in zip(pcms, expected, tokens, strict=True):
        transcript = recognizer.transcribe(pcm)
        assert (transcript.language, transcript.tokens) == (code, row)
        assert recognizer.window(pcm) == recognizer.window(pcm, language="bm") == row
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


def test_unsupported_languages_raise_problems(tiny_whisper, few, drawn):
    a, b = drawn(2)
    generation = tiny_whisper.generation_config
    mixed = in_languages(few, [a, "bm", "bm", "tlh"])
    with pytest.raises(Problem, match="of 3 clips is 'bm' and 'tlh', which the model") as error:
        set_language(generation, mixed, [], None)
    assert "--language CODE" in error.value.hint
    with pytest.raises(Problem, match="of 3 clips"):
        set_language(generation, [], mixed, None)
    with pytest.raises(Problem, match="--language bm: the model has no token for it"):
        set_language(generation, mixed, [], "bm")
    with pytest.raises(Problem, match=f"--language {b}: the speech is in {a}, and"):
        set_language(generation, in_languages(few, [a] * 4), [], b)
    set_language(generation, in_languages(few, [a] * 4), [], a)
    set_language(generation, mixed, [], b)
    assert generation.language == b


# ------------------------------------------------------------------------ from speech to artifact


@pytest.fixture
def bambara(tmp_path, monkeypatch, clips) -> Path:
    """A manifest of two clips labelled as Bambara, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clips.parent / "test", tmp_path / "test")
    rows = [json.loads(line) | {"lang": "bm"} for line in clips.read_text().splitlines()[1:3]]
    (tmp_path / "bm.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.toml").write_text(STEPS)
    return Path("bm.jsonl")


def test_the_requested_prompt_is_used_from_training_to_the_artifact(
    bambara, digits, processor, clips, drawn, monkeypatch
):
    code, other = drawn(2)
    silent, transcripts = {"say": lambda text: None}, []
    transcribe = Recognizer.transcribe
    monkeypatch.setattr(
        Recognizer,
        "transcribe",
        lambda *args, **kw: transcripts.append(transcribe(*args, **kw)) or transcripts[-1],
    )
    given = str(digits), "mine.toml", bambara, bambara
    slim = pipeline.compress(
        pipeline.Request(*given, Path("slim"), language=code, allow_loss=True), **silent
    )
    model = whisper.load(slim)
    assert model.generation_config.language == code
    record = json.loads((slim / "compression.json").read_text())
    assert record["language"] == code
    assert record["after"]["dev"]["normalizer"] == "bambara"

    gating = pipeline.Gating("off")  # after one training step, the model outputs nothing
    arguments = str(slim), "fp32", bambara, Path("artifact")
    artifact = pipeline.export(*arguments, gating=gating, **silent)
    manifest = read_artifact(artifact)
    assert manifest["gate"] == {"result": "not run"}
    spoken = read_manifest(bambara)
    assert manifest["decoding"]["prompt"] == token_ids(spoken[0], model, processor.tokenizer)[0]
    assert named(processor, manifest["decoding"]["prompt"]) == code

    assert transcription.evaluate("artifact", bambara).score.normalizer == "bambara"
    assert [transcript.language for transcript in transcripts] == [code] * 2
    rows = [json.loads(line) | {"lang": other} for line in bambara.read_text().splitlines()]
    Path("other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    transcription.evaluate("artifact", Path("other.jsonl"), "none")
    assert [transcript.language for transcript in transcripts[2:]] == [other] * 2


def test_every_step_keeps_the_language(tiny_whisper, processor, few, drawn, tmp_path):
    (code,) = drawn(1)
    tiny_whisper.generation_config.language = code
    context = Context(
        processor, in_languages(few[:2], [code] * 2), few[:2], tmp_path, original=None
    )
    recipe = parse("mine", STEPS.replace("rank = 96", "rank = 16"))
    model = job.run_steps(tiny_whisper, recipe, context, say=lambda text: None)
    assert model.generation_config.language == code


def test_interrupted_runs_are_not_shared_between_prompt_languages(bambara, digits, drawn):
    a, b = drawn(2)
    recipe = parse("mine", STEPS)
    given = str(digits), None, bambara, bambara
    requests = [pipeline.Request(*given, language=code) for code in (a, b, a)]
    places = {job.prepare(request, recipe).context.run_dir for request in requests}
    assert len(places) == 2
