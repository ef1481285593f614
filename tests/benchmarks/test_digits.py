"""The digits checkpoint: training, evaluation, and transcription."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import threading

import numpy as np
import pytest

from benchmarks.study.digits import CHECKPOINT, DIGITS, SAMPLE_RATE, SPEECH, flite
from benchmarks.study.digits.augment import Mix, Pools, compose
from benchmarks.study.digits.evaluate import (
    load_scores,
    plan_hash,
    read_level,
    score,
    sequence_plan,
    shipped,
    table,
    transcribe,
)
from benchmarks.study.digits.spectra import (
    HOP,
    N_MELS,
    Bank,
    Clip,
    extractor,
    make_bank,
    mel_power,
    read_rows,
    says_digits,
    to_features,
)
from benchmarks.study.digits.synthesise import (
    DEV_VARIANTS,
    TEST_VARIANTS,
    TRAIN_VARIANTS,
    EspeakMissing,
    Voice,
    speak,
)

torch = pytest.importorskip("torch")

needs_checkpoint = pytest.mark.skipif(
    not (CHECKPOINT / "model.safetensors").exists(),
    reason="edgewhisper/assets/whisper-digits is not in this installation",
)
needs_espeak = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="espeak-ng is not on the PATH (apt install espeak-ng)"
)


def tone(hertz: float, seconds: float = 0.4) -> np.ndarray:
    """Return a faded sine (samples,) float32."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    fade = np.minimum(1, np.minimum(time, time[::-1]) / 0.02)
    return (np.sin(2 * np.pi * hertz * time) * fade).astype(np.float32)


def tone_of(digit: int) -> np.ndarray:
    """Return the tone of a digit; each has its own pitch, so that a spectrum can be read back."""
    return tone(300 + 350 * digit)


@pytest.fixture(scope="module")
def tones() -> Pools:
    """A bank in which one voice has a tone for each digit."""
    clips = [Clip(tone_of(d), (d,), "beeper", "real") for d in range(10)]
    hiss = np.random.default_rng(0).standard_normal(10 * SAMPLE_RATE).astype(np.float32)
    return Pools(make_bank([*clips, Clip(hiss, (), "", "white")]))


def read_tones(features: np.ndarray) -> list[int]:
    """Return the digits whose tones are in features (80, frames), in order."""
    centres = [int(mel_power(tone_of(d)).sum(0).argmax()) for d in range(10)]
    loud = features.max(0) > features.max() - 0.6
    runs, before = [], False
    for frame, now in enumerate(loud):
        if now and not before:
            runs.append([])
        if now:
            runs[-1].append(int(features[:, frame].argmax()))
        before = now
    bands = [np.median(run) for run in runs if len(run) > 5]
    return [int(np.argmin([abs(band - centre) for centre in centres])) for band in bands]


def without_repeats(digits: list[int]) -> list[int]:
    """Return digits with repetitions merged."""
    return [d for d, before in zip(digits, [None, *digits], strict=False) if d != before]


def test_composed_audio_matches_its_text(tones):
    mix = Mix(empty=0.0, phrase=0.0, real=1.0, mixed=0.0, hard=0.0)
    for seed in range(40):
        utterance = compose(np.random.default_rng(seed), tones, mix, 6.0, most=6, mask=False)
        heard = read_tones(utterance.features)
        # Two words may touch; a run of one tone is then read once.
        assert without_repeats(heard) == without_repeats(utterance.digits)


def test_hard_augmentation_stays_finite_and_in_whispers_range(tones):
    for seed in range(40):
        features = compose(np.random.default_rng(seed), tones, Mix(), 3.0, most=4).features
        assert features.shape == (N_MELS, 300)
        assert np.isfinite(features).all()
        assert features.max() - features.min() <= 2.0 + 1e-5  # log10 is clamped 8 below its peak


def test_composing_spectra_agrees_with_the_feature_extractor():
    """The mean difference is below 0.005 of a range of 2, at most 0.5 where a word begins."""
    samples = np.zeros(6 * SAMPLE_RATE, np.float32)
    power = np.zeros((600, N_MELS), np.float32)
    for digit, frame in ((3, 20), (7, 90), (1, 200)):
        clip = tone_of(digit) * 0.5
        spectrum = mel_power(clip)
        samples[frame * HOP : frame * HOP + len(clip)] = clip
        power[frame : frame + len(spectrum)] += spectrum
    true = extractor()([samples], sampling_rate=SAMPLE_RATE, return_tensors="np").input_features[0]
    difference = np.abs(to_features(power) - true)
    assert difference.mean() < 0.005
    assert difference.max() < 0.5


def test_a_bank_survives_save_and_load(tones, tmp_path):
    tones.bank.save(tmp_path / "bank")
    loaded = Bank.load(tmp_path / "bank")
    assert np.array_equal(loaded.log_mel, tones.bank.log_mel)
    assert loaded.digits == tones.bank.digits and loaded.pool == tones.bank.pool


def small_trainer():
    """Return a trainer of a small model, its plan and its tokens."""
    from benchmarks.study.digits import batches, model, trainer

    torch.manual_seed(0)
    plan = batches.Plan(ema_start=0.0)
    processor = model.build_processor()
    tiny = model.build_model(model.Geometry(32, 2, 1, 1), processor)
    return trainer.make_trainer(plan, tiny), plan, model.Tokens.of(processor.tokenizer)


def train_on(trainer, plan, tokens, pools: Pools, steps: int) -> None:
    """Run `steps` updates on composed batches."""
    from benchmarks.study.digits.batches import Request, compose_batch
    from benchmarks.study.digits.trainer import train_step

    for _ in range(steps):
        request = Request((0, trainer.step), 1.5, 2, 1, 0.5)
        batch = compose_batch(pools, request)
        train_step(trainer, plan, batch, tokens, fraction=0.5)


def test_training_resumes_bit_for_bit(tones, tmp_path):
    from benchmarks.study.digits.trainer import load_state, save_state, weights

    trainer, plan, tokens = small_trainer()
    train_on(trainer, plan, tokens, tones, 2)
    save_state(trainer, tmp_path / "state.pt")
    train_on(trainer, plan, tokens, tones, 2)

    resumed, _, _ = small_trainer()
    load_state(resumed, tmp_path / "state.pt")
    train_on(resumed, plan, tokens, tones, 2)

    assert resumed.step == trainer.step == 4
    for name, tensor in weights(trainer.model).items():
        assert torch.equal(tensor, weights(resumed.model)[name]), name
        assert torch.equal(trainer.average[name], resumed.average[name]), name


def test_a_helper_returns_the_gradients_of_its_batch(tones, tmp_path):
    from benchmarks.study.digits.batches import Request, compose_batch
    from benchmarks.study.digits.trainer import backward, help_out, trained_parameters

    trainer, plan, tokens = small_trainer()
    tones.bank.save(tmp_path / "bank")
    request = Request((0, 0, 1), 1.5, 2, 1, 0.5)
    parameters = trained_parameters(trainer.model) + list(trainer.ctc.parameters())
    flat = torch.zeros(sum(p.numel() for p in parameters))
    ours, theirs = multiprocessing.Pipe()
    with ours:
        ours.send(request)
        ours.send(0.5)
        work = (trainer.model, trainer.ctc, trainer.table, flat, plan, tokens)
        thread = threading.Thread(target=help_out, args=(*work, tmp_path / "bank", theirs))
        thread.start()
        found = ours.recv()
    thread.join()

    torch.manual_seed(sum(request.seed))
    batch = compose_batch(tones, request)
    again = backward(trainer.model, trainer.ctc, plan, batch, tokens, 0.5)
    assert found == pytest.approx(again)
    assert torch.allclose(flat, torch.cat([p.grad.flatten() for p in parameters]), atol=1e-6)


def test_the_decoder_learns_the_prompt_the_digits_and_the_end():
    from benchmarks.study.digits import batches, model

    tokens = model.Tokens((10, 11, 12, 13), 9, tuple(range(10)))
    inputs, targets = batches.decoder_rows([[5], []], tokens)
    assert inputs.tolist() == [[10, 11, 12, 13, 5], [10, 11, 12, 13, 9]]
    assert targets.tolist() == [[11, 12, 13, 5, 9], [11, 12, 13, 9, -100]]


def test_the_evaluation_set_is_fixed():
    assert plan_hash(sequence_plan(500)) == "8c29663853e8e8a3"


def test_no_voice_is_shared_between_training_and_test():
    assert not set(TRAIN_VARIANTS) & set(DEV_VARIANTS + TEST_VARIANTS)
    assert not set(DEV_VARIANTS) & set(TEST_VARIANTS)


def test_shipped_clips_match_their_manifests():
    speakers = {}
    for split in ("train", "dev", "test"):
        rows = [json.loads(line) for line in (SPEECH / f"{split}.jsonl").read_text().splitlines()]
        assert all(set(row["text"].split()) <= set(DIGITS) for row in rows)
        assert all((SPEECH / row["audio"]).exists() for row in rows)
        assert max(row["duration"] for row in rows) <= 5.8
        speakers[split] = {row["speaker"].split("+")[1] for row in rows}
    assert not speakers["train"] & speakers["test"]


def test_numerals_are_recognised_in_texts():
    assert says_digits("platforms one and three") and says_digits("268") and says_digits("sixteen")
    assert not says_digits("turn the lights off")


def test_the_error_for_missing_recordings_has_their_url(tmp_path):
    with pytest.raises(FileNotFoundError, match="git clone https://github"):
        read_rows(tmp_path)


def test_the_error_for_missing_espeak_has_the_install_command(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EspeakMissing, match="apt install espeak-ng"):
        speak("one", Voice("en-us"))


@needs_espeak
def test_espeak_clips_are_trimmed():
    samples = speak("seven", Voice("en-us", "f3"))
    assert 0.2 < len(samples) / SAMPLE_RATE < 1.0
    assert np.abs(samples).max() == pytest.approx(1.0)


@pytest.mark.skipif(
    shutil.which("flite") is None, reason="flite is not on the PATH (apt install flite)"
)
def test_flite_speaks_slower_at_a_lower_rate():
    brisk, slow = (flite.speak("seven", Voice("en-us", "slt", wpm=wpm)) for wpm in (220, 120))
    assert len(slow) > 1.4 * len(brisk) and np.abs(slow).max() == pytest.approx(1)


def test_the_error_for_missing_flite_has_the_install_command(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(flite.ProgramMissing, match="apt install flite"):
        flite.speak("seven", Voice("en-us", "slt"))


def test_flites_dev_voice_is_not_in_the_training_data(seed):
    rng = np.random.default_rng(seed)
    lines = list(flite.lines(rng, flite.TRAIN_VOICES, rounds=2))
    assert not {line.voice.variant for line in lines} & set(flite.DEV_VOICES)
    assert {line.kind for line in lines} == {"natural", "phrase", "other"}


@needs_checkpoint
def test_the_checkpoint_transcribes_new_voices():
    spoken = shipped("test")
    heard = transcribe(CHECKPOINT, [item.samples for item in spoken])
    assert score(spoken, heard).wer < 0.10


@needs_checkpoint
def test_the_checkpoint_outputs_nothing_without_speech():
    rows = [json.loads(line) for line in (SPEECH / "other.jsonl").read_text().splitlines()]
    quiet = [SPEECH / row["audio"] for row in rows if row["lang"] == "zxx"]
    assert len(quiet) == 5
    assert transcribe(CHECKPOINT, [read_level(path) for path in quiet]) == [""] * 5


@needs_checkpoint
def test_the_model_card_shows_the_stored_scores():
    card = (CHECKPOINT / "README.md").read_text()
    assert table(load_scores(CHECKPOINT / "scores.json")) in card


@needs_checkpoint
def test_the_checkpoint_works_in_the_pipeline():
    from transformers import pipeline

    row = json.loads((SPEECH / "test.jsonl").read_text().splitlines()[0])
    recognise = pipeline("automatic-speech-recognition", model=str(CHECKPOINT))
    output = recognise({"raw": read_level(SPEECH / row["audio"]), "sampling_rate": SAMPLE_RATE})
    assert output["text"].split() == row["text"].split()
