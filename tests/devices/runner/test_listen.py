"""Transcription beyond greedy text: timestamps, long audio, languages, prompts, loops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_rules import BEGIN, EOS, SILENT, VOCAB, rules
from transformers import WhisperForConditionalGeneration as Whisper
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

from benchmarks.speech.clips import read_manifest
from devices.runner.decode import listen
from devices.runner.decode.fallback import (
    Attempt,
)
from devices.runner.decode.greedy import Filter, greedy, say
from devices.runner.decode.listen import Listener
from devices.runner.decode.loops import loop_period, without_loop
from devices.runner.decode.options import Options, code
from devices.runner.decode.softmax import log_sum_exp
from devices.runner.decode.timestamps import STEP_SAMPLES, parts
from devices.runner.engines.sessions import MOST_IDS
from devices.runner.problem import RunnerProblem
from devices.runner.recognizer import Transcript
from edgewhisper import decoding

WINDOW = 96_000


# ------------------------------------------------------------------- the rules of timestamps


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.lists(st.sampled_from([*range(5), EOS, *range(BEGIN, VOCAB)]), max_size=9),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    first=st.sampled_from([None, 0, 5, 19]),
)
def test_the_forbidden_tokens_equal_those_of_transformers(seed, tokens, spread, first):
    active = rules(max_initial_timestamp_index=first).with_options(None, None, timestamps=True)
    logits = (spread * np.random.default_rng(seed).standard_normal(VOCAB)).astype(np.float32)
    config = SimpleNamespace(
        no_timestamps_token_id=SILENT,
        eos_token_id=EOS,
        bos_token_id=EOS,
        max_initial_timestamp_index=first,
    )
    theirs = WhisperTimeStampLogitsProcessor(config, begin_index=len(active.prompt))
    ids = torch.tensor([[*active.prompt, *tokens]])
    wanted = theirs(ids, torch.from_numpy(logits.copy())[None])[0].numpy()
    assert np.array_equal(Filter(active)(logits, tokens), wanted)


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.one_of(st.integers(0, 3), st.integers(BEGIN, VOCAB - 1)), max_size=14),
    length=st.integers(1, 19),
)
def test_segments_equal_those_of_transformers(tokens, length):
    tokens = [BEGIN, *tokens]
    found, steps = parts(tokens, rules(), length)
    segments, offset = Whisper._retrieve_segment(
        seek_sequence=torch.tensor(tokens),
        seek_outputs=[None],
        time_offset=torch.zeros(1, dtype=torch.float64),
        timestamp_begin=BEGIN,
        seek_num_frames=torch.tensor([2 * length]),
        time_precision=0.5,
        time_precision_features=0.25,
        input_stride=2,
        prev_idx=0,
        idx=0,
        return_token_timestamps=False,
        decoder_input_ids=torch.zeros(1, 3),
    )
    assert steps == int(offset) // 2
    times = [(0.5 * begin, 0.5 * end) for begin, end, _ in found]
    theirs = [s["tokens"].tolist() for s in segments]
    if any(a >= BEGIN and b >= BEGIN for a, b in pairwise(tokens)):  # without pairs, ours differs
        assert times == [(float(s["start"]), float(s["end"])) for s in segments]
        if not tokens[-1] >= BEGIN > tokens[-2]:
            theirs[-1].pop()  # the start of the segment that is left out
    assert [part for _, _, part in found] == theirs


@pytest.mark.parametrize(
    ("tokens", "times"),
    [
        pytest.param([BEGIN + 2, 1, 2, BEGIN + 7], (2, 7), id="closed"),
        pytest.param([BEGIN + 2, 1, 2], (2, 15), id="open"),
        pytest.param([1, 2], (0, 15), id="no-timestamp"),
        pytest.param([BEGIN + 2], (2, 15), id="no-text"),
    ],
)
def test_a_window_without_pairs_is_one_segment(tokens, times):
    assert parts(tokens, rules(), 15) == ([(*times, tokens)], 15)


def test_the_filter_does_not_change_the_logits(rng):
    logits = rng.standard_normal(VOCAB).astype(np.float32)
    before = logits.copy()
    Filter(rules().with_options(None, None, True))(logits, [])
    Filter(rules(suppress_tokens=[1, 2]))(logits, [3])
    assert np.array_equal(logits, before)


def test_log_sum_exp_does_not_overflow_and_accepts_minus_infinity(rng):
    values = rng.uniform(-5, 5, 50).astype(np.float32)
    assert log_sum_exp(values) == pytest.approx(np.log(np.exp(values).sum()), abs=1e-5)
    assert log_sum_exp(values + np.float32(1e4)) == pytest.approx(log_sum_exp(values) + 1e4)
    assert log_sum_exp(np.full(3, -np.inf, np.float32)) == -np.inf


def test_tokens_with_timestamps_equal_those_of_generate(plain, torch_model, processor, pcms, rng):
    """Speech, noise and less than a window; one window each."""
    noise = (0.1 * rng.standard_normal(WINDOW)).astype(np.float32)
    for pcm in [*pcms[:3], noise, pcms[3][: rng.integers(8_000, 30_000)]]:
        with torch.no_grad():
            wanted = torch_model.generate(
                decoding.log_mel(processor.feature_extractor, [pcm]),
                return_timestamps=True,
                force_unique_generate_call=True,
                return_dict_in_generate=True,
                max_new_tokens=60,
            ).sequences[0]
        listener = Listener(plain, Options(timestamps=True), Transcript())
        found = listener.window(pcm)
        wanted = wanted.tolist()[len(listener.rules.prompt) :]
        assert found[:60] == decoding.until_end(wanted, listener.rules.eos)
        assert found[0] >= listener.rules.timestamp_begin


# ------------------------------------------------------------ long audio, split by timestamps


class Ideal(Listener):
    """Reads words from the samples: word n has the value n. It returns the words that are entirely
    in the window, with their start and end times, and the start of a word that the window cuts."""

    def window(self, pcm):
        begin, tokens = self.rules.timestamp_begin, []
        steps = pcm[::STEP_SAMPLES].astype(int)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], steps, [0]])))
        for start, stop in pairwise(edges):
            if steps[start] and stop == len(steps):
                tokens += [begin + int(start), int(steps[start])]
            elif steps[start]:
                tokens += [begin + int(start), int(steps[start]), begin + int(stop)]
        return tokens


def ideal(window_steps: int) -> Ideal:
    """Return an ideal recognizer with the given window length."""
    stub = SimpleNamespace(
        rules=rules(),
        window_samples=window_steps * STEP_SAMPLES,
        guards=True,
        text=lambda tokens: " ".join(str(token) for token in tokens if token < EOS),
    )
    return Ideal(stub, Options(timestamps=True), Transcript())


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(st.tuples(st.integers(1, 20), st.integers(12, 80)), min_size=1, max_size=30),
    lead=st.integers(0, 130),
)
def test_no_word_is_lost_or_doubled_between_windows(words, lead):
    """Words with pauses of at least 0.24 s; some pauses are longer than a window."""
    steps, begins = [0] * lead, []
    for number, (length, gap) in enumerate(words, start=1):
        begins.append(len(steps))
        steps += [number] * length + [0] * gap
    pcm = np.repeat(np.array(steps, np.float32), STEP_SAMPLES)
    pcm[1::2] *= -1  # a constant would count as an offset, not as sound
    listener = ideal(window_steps=60)
    segments = list(listener.segments(pcm))
    assert [segment.text for segment in segments] == [str(i + 1) for i in range(len(words))]
    assert listener.transcript.text == " ".join(segment.text for segment in segments)
    assert listener.transcript.segments == segments
    times = [(s.start_s, s.end_s) for s in segments]
    assert times == [
        pytest.approx((0.02 * begin, 0.02 * (begin + length)), abs=0.021)  # cuts are finer
        for begin, (length, _) in zip(begins, words, strict=True)
    ]


def test_timestamps_equal_those_of_generate(plain, torch_model, processor, pcms):
    listener = Listener(plain, Options(timestamps=True), Transcript())
    for pcm in pcms[:4]:
        with torch.no_grad():
            wanted = torch_model.generate(
                decoding.log_mel(processor.feature_extractor, [pcm]),
                return_timestamps=True,
                max_new_tokens=listener.rules.max_new_tokens,
                force_unique_generate_call=True,
                return_dict_in_generate=True,
            ).sequences[0, len(listener.rules.prompt) :]
        found = listener.window(pcm)
        assert found == decoding.until_end(wanted.tolist(), plain.rules.eos)
        assert any(token >= plain.rules.timestamp_begin for token in found)


def test_times_never_decrease_and_stay_within_the_recording(recognizer, pcms, rng):
    order = rng.permutation(len(pcms))
    pcm = np.concatenate([pcms[n] for n in order])
    found = list(recognizer.stream(pcm, timestamps=True, previous=bool(rng.integers(2))))
    times = [t for segment in found for t in (segment.start_s, segment.end_s)]
    assert found
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= len(pcm) / 16_000


def test_a_window_that_advances_less_than_a_second_keeps_its_text():
    listener = ideal(window_steps=300)
    listener.window = lambda pcm: [BEGIN, 1, BEGIN + 2, BEGIN + 2, 3, 4]
    segments = list(listener.segments(np.ones(STEP_SAMPLES * 320, np.float32)))
    assert [(s.start_s, s.text) for s in segments[:2]] == [(0, "1"), (0.04, "3 4")]
    assert segments[1].end_s == segments[2].start_s > 1
    assert segments[-1].end_s == pytest.approx(6.4)


# -------------------------------------------------------------------- texts that end too early


def words_and_pauses(rng: np.random.Generator, seconds: int) -> np.ndarray:
    """Return words of 0.35 s of noise and pauses of 0.15 s."""
    loud = np.tile(np.repeat([0.1, 0.0], [5600, 2400]), 2 * seconds)
    return ((loud + 1e-3) * rng.standard_normal(len(loud))).astype(np.float32)


def scripted(window: Callable[[np.ndarray], list[int]], timestamps: bool = False) -> Listener:
    """Return a listener with windows of 30 s and a scripted decoder."""
    listener = ideal(window_steps=1500)
    listener.options = Options(timestamps=timestamps)
    listener.window = window
    return listener


def test_a_window_whose_text_is_too_short_is_decoded_again_in_two_parts(rng):
    pcm, lengths = words_and_pauses(rng, 24), []

    def window(piece: np.ndarray) -> list[int]:
        lengths.append(len(piece))
        return [1] if len(piece) == len(pcm) else [2] * 12

    segments = list(scripted(window).segments(pcm))
    assert [segment.tokens for segment in segments] == [[2] * 12, [2] * 12]
    assert lengths[0] == lengths[1] + lengths[2] == len(pcm)
    assert segments[0].end_s == segments[1].start_s == lengths[1] / 16_000


@pytest.mark.parametrize("silent", [False, True], ids=["shorter parts", "no speech"])
def test_its_own_text_stays_if_the_parts_have_less_or_it_has_no_speech(rng, silent):
    pcm, calls = words_and_pauses(rng, 24), []

    def window(piece: np.ndarray) -> list[int]:
        calls.append(len(piece))
        listener.silent = silent
        return [1, 1] if len(piece) == len(pcm) else [2] * silent

    listener = scripted(window)
    assert [segment.tokens for segment in listener.segments(pcm)] == [[1, 1]]
    assert len(calls) == (1 if silent else 3)


def test_a_text_of_usual_length_or_in_silence_is_not_decoded_again(rng):
    speech, calls = words_and_pauses(rng, 24), []
    quiet = np.concatenate([speech[:64_000], np.zeros(320_000, np.float32)])
    for pcm, tokens in ((speech, [1] * 30), (quiet, [1])):
        listener = scripted(lambda piece, tokens=tokens: calls.append(piece) or tokens)
        assert [segment.tokens for segment in listener.segments(pcm)] == [tokens]
    assert len(calls) == 2


def test_sound_after_the_last_timestamp_is_decoded_again(rng):
    pcm, lengths = words_and_pauses(rng, 24), []

    def window(piece: np.ndarray) -> list[int]:
        lengths.append(len(piece))
        end = 500 if len(lengths) == 1 else len(piece) // STEP_SAMPLES
        return [BEGIN, *[len(lengths)] * 12, BEGIN + end]

    segments = list(scripted(window, timestamps=True).segments(pcm))
    assert [(s.start_s, s.end_s, s.tokens[1]) for s in segments] == [(0, 10, 1), (10, 24, 2)]
    assert lengths == [len(pcm), len(pcm) - 500 * STEP_SAMPLES]


@pytest.mark.parametrize("begin", [400, 1000], ids=["long segment", "gap before it"])
@pytest.mark.parametrize("more", [True, False], ids=["longer parts", "shorter parts"])
def test_speech_that_timestamps_skip_is_decoded_again_in_two_parts(begin, more, rng):
    """The second segment ends at 24 s, but has one token for the 16 s after the first."""
    pcm, lengths = words_and_pauses(rng, 24), []
    first, second = [BEGIN, *[1] * 12, BEGIN + 400], [BEGIN + begin, 2, BEGIN + 1200]

    def window(piece: np.ndarray) -> list[int]:
        lengths.append(len(piece))
        if len(piece) == len(pcm):
            return [*first, *second]
        return [BEGIN, *[3] * 9, BEGIN + len(piece) // STEP_SAMPLES] if more else []

    segments = list(scripted(window, timestamps=True).segments(pcm))
    assert [s.tokens[1] for s in segments] == ([1, 3, 3] if more else [1, 2])
    assert sum(lengths[1:]) == len(pcm) - 400 * STEP_SAMPLES
    assert segments[-1].end_s == pytest.approx(24, abs=0.02)
    if more:
        assert [s.start_s for s in segments[1:]] == [8, 8 + lengths[1] / 16_000]


def test_joined_clips_are_cut_between_words(recognizer, clips, rng):
    """Shipped clips in random order, with gaps of at least half a second, over several windows.

    Every cut is in a gap, so the text is that of the pieces between cuts. (Labels are compared
    elsewhere: the embedded model cannot transcribe more than six digits per window.)
    """
    spoken = [clip.pcm() for clip in read_manifest(clips) if clip.text]
    pieces, silent = [], []
    for number in rng.permutation(len(spoken))[:8]:
        gap = np.zeros(rng.integers(8_000, 16_000), np.float32)
        pieces += [spoken[number], gap]
        silent += [np.zeros(len(spoken[number]), bool), np.ones(len(gap), bool)]
    pcm, is_gap = np.concatenate(pieces), np.concatenate(silent)
    transcript = recognizer.transcribe(pcm)
    bounds = [round(16_000 * segment.end_s) for segment in transcript.segments]
    assert len(bounds) > 1
    assert is_gap[bounds[:-1]].all()
    assert all(a.end_s <= b.start_s for a, b in pairwise(transcript.segments))
    assert transcript.text == " ".join(segment.text for segment in transcript.segments)
    for segment in transcript.segments:
        start, stop = (round(16_000 * s) for s in (segment.start_s, segment.end_s))
        assert recognizer.transcribe(pcm[start:stop]).tokens == segment.tokens


def test_segments_are_yielded_as_they_are_decoded(recognizer, pcms):
    transcript = Transcript()
    stream = recognizer.stream(np.concatenate([*pcms[:4], *pcms[:4]]), transcript)
    assert transcript.graph_s == []
    first = next(stream)
    assert len(transcript.graph_s) == 1
    assert transcript.segments == [first]
    rest = list(stream)
    assert transcript.segments == [first, *rest]
    assert len(transcript.graph_s) > 1


# --------------------------------------------------------------------------------- languages


def test_options_set_language_task_and_timestamps_in_the_prompt():
    own = rules()
    assert own.with_options(None, None, False) == own
    assert own.with_options("hi", None, False).prompt == (41, 44, 43, SILENT)
    assert own.with_options("haw", "translate", False).prompt == (41, 45, 46, SILENT)
    timed = own.with_options("hi", None, True)
    assert (timed.prompt, timed.max_new_tokens) == ((41, 44, 43), 31)
    assert timed.with_options("haw", None, True).prompt == (41, 45, 43)
    assert (own.language, timed.language) == ("en", "hi")


@pytest.mark.parametrize("given", ["hi", "HI", "hi_in", "hi-IN", "<|hi|>", " hi "])
def test_language_codes_are_accepted_in_every_usual_spelling(given):
    assert code(given, rules()) == "hi"


def test_unsupported_options_get_an_error_message(recognizer, pcms):
    english = rules(languages={}, tasks={})
    with pytest.raises(RunnerProblem, match=r"language 'hii': not among the 3 languages") as e:
        code("hii", rules())
    assert "'hi'" in e.value.hint
    with pytest.raises(RunnerProblem, match=r"language 'de': .* English only"):
        code("de", english)
    with pytest.raises(RunnerProblem, match=r"task 'translate': .* English only"):
        Listener(SimpleNamespace(rules=english), Options(task="translate"), Transcript())
    with pytest.raises(RunnerProblem, match="unknown task 'translat'"):
        Listener(SimpleNamespace(rules=english), Options(task="translat"), Transcript())
    for options, message in [
        ({"beams": 0}, "beams = 0: must be 1 to 32"),
        ({"task": "sing"}, "unknown task 'sing'"),
        ({"language": "xx"}, "language 'xx': not among"),
    ]:
        with pytest.raises(RunnerProblem, match=message):
            recognizer.stream(pcms[0], **options)
    stub = SimpleNamespace(rules=rules(previous=None))
    with pytest.raises(RunnerProblem, match="the artifact has no token for prompting"):
        Listener(stub, Options(previous=True), Transcript())
    stub = SimpleNamespace(rules=rules(timestamp_begin=None))
    with pytest.raises(RunnerProblem, match="no timestamp tokens"):
        Listener(stub, Options(timestamps=True), Transcript())


@pytest.mark.parametrize(
    ("heard", "wanted"),
    [
        ([("de", 0.9), ("hi", 0.1), ("en", 0.1)], "hi"),
        ([("de", 0.9), ("hi", 0.8), ("en", 0.1)], "en"),
        ([("de", 0.1), ("hi", 0.1), ("en", 0.1)], "de"),
        ([("de", 0.9), ("hi", 0.9), ("en", 0.9)], "en"),
    ],
)
def test_the_language_is_that_of_the_first_window_with_speech(
    heard, wanted, recognizer, pcms, monkeypatch
):
    codes = iter(heard)
    monkeypatch.setattr(listen, "detect", lambda decoder, rules: next(codes))
    sound = np.concatenate([np.pad(pcm, (0, WINDOW - len(pcm))) for pcm in pcms[:3]])
    transcript = recognizer.transcribe(sound, language="auto")
    assert transcript.language == wanted


def test_hum_before_speech_does_not_settle_the_language(recognizer, pcms, monkeypatch):
    codes = iter([("hi", 0.0)])  # the window of hum is not decoded
    monkeypatch.setattr(listen, "detect", lambda decoder, rules: next(codes))
    t = np.arange(WINDOW) / 16_000
    hum = 0.003 * np.sin(2 * np.pi * 50 * t).astype(np.float32)
    sound = np.concatenate([hum, pcms[0]])
    assert recognizer.transcribe(sound, language="auto").language == "hi"


@pytest.mark.parametrize("language", [None, "en", "EN", "auto"])
def test_an_english_only_artifact_takes_english_auto_and_transcribe(language):
    english = rules(languages={}, tasks={}, prompt=[41, SILENT])
    transcript = Transcript()
    options = Options(language=language, task="transcribe")
    listener = Listener(SimpleNamespace(rules=english), options, transcript)
    assert (listener.rules.prompt, listener.detects) == ((41, SILENT), False)
    assert transcript.language is None


def test_the_detected_language_is_that_of_transformers(plain, torch_model, processor, pcms, rng):
    languages = plain.rules.languages
    for pcm in [*pcms[:3], (0.1 * rng.standard_normal(WINDOW)).astype(np.float32)]:
        (wanted,) = torch_model.detect_language(
            decoding.log_mel(processor.feature_extractor, [pcm])
        ).tolist()
        found = plain.transcribe(pcm, language="auto")
        assert languages[found.language] == wanted
        assert found.tokens == plain.transcribe(pcm, language=found.language).tokens


@pytest.mark.parametrize("task", [None, "translate"])
def test_another_language_gives_the_tokens_of_generate(plain, torch_model, processor, pcms, task):
    with torch.no_grad():
        wanted = torch_model.generate(
            decoding.log_mel(processor.feature_extractor, [pcms[2]]),
            language="hi",
            task=task or "transcribe",
            max_new_tokens=60,
            suppress_tokens=list(range(plain.rules.timestamp_begin, len(plain.table))),
        )[0].tolist()
    transcript = plain.transcribe(pcms[2], language="hi_in", task=task)
    assert transcript.tokens == decoding.until_end(wanted, plain.rules.eos)
    assert transcript.language == "hi"


# ------------------------------------------------------------------------ what was said before


@settings(max_examples=100, deadline=None)
@given(
    said=st.lists(st.integers(0, EOS - 1), max_size=60),
    room=st.integers(8, 80),
    timestamps=st.booleans(),
)
def test_the_prompt_with_previous_text_equals_that_of_transformers(said, room, timestamps):
    active = rules(max_new_tokens=room - 4).with_options(None, None, timestamps)
    half = min(room // 2, active.max_new_tokens) - 1  # ours leaves room for at least one token
    wanted, _ = Whisper._prepare_decoder_input_ids(
        cur_bsz=1,
        init_tokens=torch.tensor([active.prompt]),
        current_segments=[[{"tokens": torch.tensor(said)}] if said else []],
        batch_idx_map=[0],
        do_condition_on_prev_tokens=[True],
        prompt_ids=None,
        generation_config=SimpleNamespace(
            prev_sot_token_id=SILENT - 2,
            prompt_condition_type="first-segment",
            cache_implementation=None,
            pad_token_id=EOS,
        ),
        config=SimpleNamespace(max_target_positions=2 * (half + 1)),
        device="cpu",
        suppress_tokens=None,
        timestamp_begin=BEGIN,
        kwargs={},
    )
    found = active.after(said)
    assert list(found.prompt) == wanted[0].tolist()
    assert len(found.prompt) + found.max_new_tokens == room


def test_a_window_is_prompted_with_the_text_before_it(plain, torch_model, processor, pcms, rng):
    """In torch, with the same prompt and text, every token is the best one, up to rounding."""
    for pcm in pcms[:3]:
        listener = Listener(plain, Options(previous=True), Transcript())
        said = rng.integers(0, 370, int(rng.integers(1, 50))).tolist()
        listener.transcript.tokens += said
        found, active = listener.window(pcm), plain.rules.after(said)
        rows = decoding.logits(torch_model, processor, pcm, [*active.prompt, *found])
        ended = [*found, active.eos] if len(found) < active.max_new_tokens else found
        for n, token in enumerate(ended):
            scores = Filter(active)(rows[len(active.prompt) - 1 + n], found[:n])
            assert scores[token] > scores.max() - 2e-3


def test_a_prompt_precedes_the_first_window_and_hotwords_every_window(plain, pcms):
    pcm = np.concatenate([*pcms[1:5], *pcms[1:5]])
    prompted = []
    for previous in (False, True):
        transcript = Transcript()
        options = Options(prompt="four two", hotwords=" nine ", previous=previous)
        listener = Listener(plain, options, transcript)
        windows, tokens = listener.segments(pcm), []
        for _ in windows:
            prompted.append((previous, list(listener.prompted.prompt), tokens))
            tokens = list(transcript.tokens)
    assert len(prompted) > 3
    hot, text = plain.encode(" nine"), plain.encode(" four two")
    rules = plain.rules
    for previous, prompt, tokens in prompted:
        context = [*text, *tokens] if previous or not tokens else []
        assert prompt == list(rules.after(context, hot).prompt)
        assert prompt[: 1 + len(hot)] == [rules.previous, *hot]


def test_hotwords_and_previous_text_share_half_of_the_context():
    active = rules(max_new_tokens=36)  # with the prompt 40 positions, of which 19 are for context
    found = active.after(range(100, 130), range(200, 205))
    assert list(found.prompt) == [SILENT - 2, *range(200, 205), *range(116, 130), *active.prompt]
    assert len(found.prompt) + found.max_new_tokens == 40
    found = active.after([1, 2], range(200, 230))
    assert list(found.prompt) == [SILENT - 2, *range(200, 219), *active.prompt]


def test_a_prompt_needs_the_token_for_previous_text(recognizer, pcms):
    for name in ("prompt", "hotwords"):
        listener = partial(Listener, SimpleNamespace(rules=rules(previous=None)))
        with pytest.raises(RunnerProblem, match=f"{name}: the artifact has no token"):
            listener(Options(**{name: "x"}), Transcript())


@pytest.mark.parametrize("options", [{}, {"beams": 3}, {"timestamps": True}], ids=str)
def test_the_confidence_is_that_of_the_model(options, plain, torch_model, processor, pcms):
    """The same text, and the probabilities of torch on the same prompt and text."""
    for pcm in pcms[:3]:
        expected = plain.transcribe(pcm, **options)
        found = plain.transcribe(pcm, confidence=True, **options)
        assert found.tokens == expected.tokens
        assert all(segment.avg_logprob is None for segment in expected.segments)
        active = plain.rules.with_options(None, None, options.get("timestamps", False))
        rows = decoding.logits(torch_model, processor, pcm, [*active.prompt, *found.tokens])
        no_speech = float(np.exp(rows[0][active.no_speech] - log_sum_exp(rows[0])))
        place = 0
        for segment in found.segments:
            logprobs = []
            for token in segment.tokens:
                scores = rows[len(active.prompt) - 1 + place]
                if not options.get("beams"):
                    scores = Filter(active)(scores, found.tokens[:place]).copy()
                logprobs.append(scores[token] - log_sum_exp(scores))
                place += 1
            assert segment.avg_logprob == pytest.approx(float(np.mean(logprobs)), abs=2e-3)
            assert segment.no_speech_prob == pytest.approx(no_speech, rel=1e-2)
            assert segment.as_dict()["no_speech_prob"] == segment.no_speech_prob


def test_a_long_prompt_is_fed_in_parts(plain, torch_model, processor, pcms, rng):
    active = plain.rules.after(rng.integers(0, 370, 100).tolist())
    assert MOST_IDS < len(active.prompt) == 32 + len(plain.rules.prompt)
    times = Transcript()
    found = plain.decoder_over(pcms[0], times)(active.prompt)
    wanted = decoding.logits(torch_model, processor, pcms[0], active.prompt)[-1]
    assert np.allclose(found, wanted, atol=2e-3)
    assert (len(times.prompt_s), times.per_token_s) == (2, [])


def test_text_sampled_at_high_temperature_or_cut_prompts_nothing(monkeypatch):
    heard = []
    recognizer = SimpleNamespace(
        rules=rules(max_new_tokens=100),
        guards=True,
        window_samples=100,
        text=str,
        decoder_over=lambda pcm, times: SimpleNamespace(fed=0, clock=times.prompt_s),
    )
    listener = Listener(recognizer, Options(previous=True, fallback=True), Transcript())
    drawn = [([1], 0.0), ([2], 0.4), ([3] * 40, 0.0), ([4], 0.0), ([5], 0.6), ([6], 0.0), ([7], 0)]
    script = iter([Attempt(tokens, 0.0, temperature=hot) for tokens, hot in drawn])

    def best(decoder, window_s) -> Attempt:
        heard.append(listener.prompted.prompt[1:-4])
        return next(script)

    monkeypatch.setattr(listener, "best", best)
    monkeypatch.setattr(
        "devices.runner.decode.listen.split", lambda *_: [slice(0, 100)] * len(drawn)
    )
    list(listener.segments(np.ones(100, np.float32)))
    assert heard == [(), (1,), (1, 2), (), (4,), (), (6,)]


# ------------------------------------------------------------------------- invented segments


@pytest.mark.parametrize(
    ("logprob", "silence", "kept"), [(-0.9, 0.3, True), (-1.1, 0.2, True), (-1.1, 0.3, False)]
)
def test_an_unlikely_segment_and_its_copies_have_no_text(logprob, silence, kept):
    """Segments of the words 1, 2, 1; the first word has the given log-probability."""
    listener = ideal(window_steps=60)
    listener.logprobs, listener.no_speech_prob = [-3, logprob, -3] + [-3, -0.1, -3] * 2, silence
    parts = [(n, n + 1, [BEGIN + n, word, BEGIN + n + 1]) for n, word in enumerate([1, 2, 1])]
    segments = listener.timed(parts, 0)
    assert [segment.text for segment in segments] == (["1", "2", "1"] if kept else ["", "2", ""])
    assert [segment.avg_logprob for segment in segments] == [None] * 3


# -------------------------------------------------------------------------------------- loops


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=70))
def test_a_beam_search_loop_is_cut_like_a_greedy_one(tokens):
    script = iter([*tokens, EOS])

    def step(ids):
        wanted = next(script)
        return np.array([float(i == wanted) for i in range(VOCAB)], np.float32)

    active = rules(timestamp_begin=None, max_new_tokens=100)
    assert without_loop(tokens) == greedy(step, active, stop_loops=True)


def test_a_loop_of_segments_ends_the_text_and_is_cut():
    """The same six words in every segment, at other times."""
    script = [[BEGIN + n, *range(6), BEGIN + n + 1] for n in range(12)]
    tokens = iter([token for segment in script for token in segment])

    def step(ids):
        return np.eye(VOCAB, dtype=np.float32)[next(tokens)]

    active = rules(max_new_tokens=100).with_options(None, None, timestamps=True)
    found = say(step, lambda logits, said: int(logits.argmax()), active, True)
    assert len(active.words(found)) == 30
    listener = ideal(window_steps=300)
    assert listener.rules.timestamps
    assert listener.without_loop([*found, BEGIN + 5]) == script[0]
    assert listener.without_loop(script[0]) == script[0]


def test_a_text_ends_at_the_capacity_of_the_caches():
    active = rules(max_new_tokens=7)
    found = say(
        lambda ids: np.eye(VOCAB, dtype=np.float32)[3], Filter(active).likeliest, active, False
    )
    assert found == [3] * 7
    assert loop_period(found) == 0
