"""Word times of an int8 artifact of tiny.en, compared with those of the checkpoint in torch."""

from __future__ import annotations

import numpy as np
import pytest
from openai_timing import token_times
from real_models import model

from benchmarks.gate import evenly
from benchmarks.speech.clips import read_manifest
from devices.runner.decode.words import characters, spaced
from devices.runner.recognizer import Recognizer
from edgewhisper import whisper
from edgewhisper.shipped import COMMON_VOICE

pytestmark = pytest.mark.real


def test_the_median_error_is_at_most_20_ms(artifact):
    source = model("tiny.en")
    dense, processor = whisper.load(source), whisper.load_processor(source)
    recognizer = Recognizer(artifact("tiny.en", "int8"))
    heads = dense.generation_config.alignment_heads
    alignment = recognizer.manifest["decoding"]["alignment"]
    assert alignment["heads"] == heads
    delay_s = alignment["delay_s"]  # subtracted from the times, which begin at 0
    errors = []
    for clip in evenly(read_manifest(COMMON_VOICE / "test.jsonl"), 8):
        transcript = recognizer.transcribe(clip.pcm(), word_timestamps=True)
        (segment,) = transcript.segments
        prompt = list(recognizer.rules.prompt)
        times = token_times(dense, processor, clip.pcm(), prompt, transcript.tokens, heads)
        sizes = [size for _, size in spaced(characters(transcript.tokens, recognizer.table))]
        starts = {round(max(0.0, times[i] - delay_s), 2) for i in np.cumsum([0, *sizes[:-1]])}
        errors += [min(abs(word.start_s - start) for start in starts) for word in segment.words]
    assert len(errors) > 40
    assert round(np.median(errors), 3) <= 0.02
