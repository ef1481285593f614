"""Temperature fallback, and texts of windows without speech."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_rules import VOCAB, rules
from transformers import WhisperForConditionalGeneration as Whisper

from devices.runner.decode.fallback import (
    LEAST_LOGPROB,
    TEMPERATURES,
    Attempt,
    Sampler,
    best_attempt,
    compression_ratio,
    draw,
    is_dots,
    is_invented,
    sample,
)
from devices.runner.decode.greedy import Filter
from devices.runner.decode.listen import Listener
from devices.runner.decode.options import Options
from devices.runner.decode.rules import Rules
from devices.runner.decode.softmax import probability
from devices.runner.recognizer import Transcript
from edgewhisper import decoding


def test_the_mean_log_probability_equals_that_of_transformers(rng):
    active, scores, tokens = rules(suppress_tokens=[3, 4]), [], []
    sampler = Sampler(active, temperature := float(rng.choice([0.0, 0.4, 1.0])), rng)
    for _ in range(6):
        logits = (3 * rng.standard_normal(VOCAB)).astype(np.float32)
        tokens.append(sampler(logits, tokens))
        filtered = Filter(active)(logits, [1])
        scores.append(torch.from_numpy(filtered / (temperature or 1)))
    wanted = Whisper._retrieve_avg_logprobs(scores, torch.tensor(tokens), temperature)
    assert np.mean(sampler.logprobs) == pytest.approx(float(wanted), abs=1e-5)


def test_tokens_are_sampled_with_their_probabilities(rng):
    logits = np.array([1.0, -np.inf, 2.0, 0.0, -np.inf], np.float32)
    drawn = np.bincount([draw(logits, rng) for _ in range(20_000)], minlength=5) / 20_000
    wanted = np.exp(logits) / np.exp(logits).sum()
    assert drawn[1] == drawn[4] == 0
    assert np.abs(drawn - wanted).max() < 6 * np.sqrt(0.25 / 20_000)
    assert probability(logits, 2) == pytest.approx(wanted[2], abs=1e-6)


def tries(*attempts: Attempt, silence: float = 0.0) -> tuple[Attempt, list[float]]:
    """Return the chosen attempt of a scripted list for a window of 5 s, and the temperatures."""
    asked, script = [], iter(attempts)

    def attempt(temperature: float) -> Attempt:
        asked.append(temperature)
        return next(script)

    def invented(found: Attempt) -> bool:
        return is_invented(found, len(found.tokens), silence, 5.0)

    return best_attempt(attempt, lambda tokens: "ab " * len(tokens), invented), asked


GOOD, UNLIKELY = Attempt([1], -0.3), Attempt([1], LEAST_LOGPROB - 0.1)
REPEATING, LOOPED = Attempt([1] * 60, -0.1), Attempt([1], -0.1, looped=True)


def test_a_good_text_is_accepted_at_temperature_0():
    assert tries(GOOD) == (GOOD, [0.0])


@pytest.mark.parametrize("bad", [UNLIKELY, REPEATING, LOOPED], ids=["unlikely", "zlib", "loop"])
def test_a_bad_text_is_decoded_again_at_increasing_temperatures(bad):
    found, temperatures = tries(bad, bad, GOOD)
    assert (found, temperatures) == (GOOD, [0.0, 0.2, 0.4])
    found, temperatures = tries(*[bad] * 6)
    assert (found, temperatures) == (bad, list(TEMPERATURES))


def test_an_unlikely_text_without_speech_is_left_out():
    assert tries(UNLIKELY, silence=0.7) == (replace(UNLIKELY, tokens=[]), [0.0])
    assert tries(GOOD, silence=0.9)[0] == GOOD
    assert tries(REPEATING, GOOD, silence=0.7)[0] == GOOD
    assert tries(UNLIKELY, UNLIKELY, GOOD, silence=0.5)[0] == GOOD


@pytest.mark.parametrize(
    ("logprob", "looped", "words", "silence", "window_s", "invented"),
    [
        (-1.1, False, 20, 0.61, 10, True),  # Whisper's rule
        (-0.9, False, 20, 0.61, 10, False),
        (-1.1, False, 20, 0.59, 10, False),
        (-0.6, False, 1, 0.81, 2, True),  # almost certainly no speech
        (-0.4, False, 1, 0.81, 2, False),
        (-0.6, False, 3, 0.81, 2, False),  # very quiet speech
        (-0.9, False, 4, 0.3, 10, True),  # few words for 10 s
        (-0.9, False, 5, 0.3, 10, False),
        (-0.9, False, 1, 0.3, 4, False),  # one word for 4 s is not few
        (-0.7, False, 4, 0.3, 10, False),
        (-0.9, False, 4, 0.2, 10, False),
        (-1.2, False, 4, 0.01, 10, True),  # base, for music
        (-1.2, False, 5, 0.0, 10, False),
        (-1.0, False, 4, 0.0, 10, False),
        (-0.1, True, 4, 0.0, 10, True),  # nothing but a loop
        (-0.1, True, 20, 0.0, 10, False),
        (-0.1, True, 20, 0.2, 10, False),
        (-0.8, True, 20, 0.0, 10, True),  # base, for music in German
        (-0.6, True, 20, 0.0, 10, False),
        (-0.1, True, 20, 0.3, 10, True),
        (-1.6, False, 20, 0.3, 10, True),  # guessed
        (-1.6, False, 20, 0.2, 10, False),
        (-1.4, False, 20, 0.3, 10, False),
    ],
)
def test_texts_of_windows_without_speech_are_invented(
    logprob, looped, words, silence, window_s, invented
):
    found = Attempt([1] * words, logprob, looped)
    assert is_invented(found, words, silence, window_s) == invented


@pytest.mark.parametrize(
    ("text", "dots"),
    [("... ... …", True), (".", True), ("", False), ("one.", False), ("♪", False)],
)
def test_dots_alone_are_not_a_text(text, dots):
    """An empty text is decoded again at increasing temperatures, if it is unlikely."""
    assert is_dots(text) == dots


def test_repetition_compresses_well():
    assert compression_ratio("") == 0
    assert compression_ratio("the quick brown fox jumps over it") < 1.2
    assert compression_ratio("seven " * 40) > 2.4


def test_clear_speech_gets_the_greedy_text_with_fallback(recognizer, pcms):
    for pcm in pcms[:4]:
        assert recognizer.transcribe(pcm, fallback=True).text == recognizer.transcribe(pcm).text


def test_the_same_seed_gives_the_same_tokens(plain, pcms, seed):
    def drawn(seed: int) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        active = Rules.from_manifest(plain.manifest["decoding"])
        decoder = plain.decoder_over(pcms[0], Transcript())
        found = []
        for _ in range(3):
            decoder.fed = 0
            found.append(sample(decoder, active, 3.0, rng, stop_loops=True).tokens)
        return found

    assert drawn(seed) == drawn(seed)
    assert drawn(seed) != drawn(seed + 1)


def test_the_probability_of_no_speech_comes_from_the_model(plain, torch_model, processor, pcms):
    listener = Listener(plain, Options(fallback=True), Transcript())
    decoder = plain.decoder_over(pcms[0], listener.transcript)
    start = torch.tensor([[plain.rules.prompt[0]]])
    with torch.no_grad():
        logits = torch_model(
            decoding.log_mel(processor.feature_extractor, [pcms[0]]), decoder_input_ids=start
        ).logits[0, -1]
    wanted = float(logits.softmax(-1)[plain.rules.no_speech])
    assert listener.no_speech(decoder) == pytest.approx(wanted, rel=1e-3)


def test_detecting_the_language_also_gives_the_probability_of_no_speech(recognizer, pcms):
    found, known = Transcript(), Transcript()
    for transcript, language in ((found, "auto"), (known, None)):
        language = language or found.language
        list(recognizer.stream(pcms[0], transcript, language=language, confidence=True))
    assert (len(found.no_speech_s), len(known.no_speech_s)) == (0, 1)
    assert found.segments == known.segments
