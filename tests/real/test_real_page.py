"""The page of `edgewhisper serve` with tiny.en, in Chromium."""

from __future__ import annotations

import chromium
import pytest
from transcribe_page import READY, transcribed, write_wav

from benchmarks.speech.clips import read_manifest
from devices.browser.transcribe import open_site
from devices.runner import writers
from devices.runner.recognizer import Recognizer
from edgewhisper.shipped import COMMON_VOICE

pytestmark = pytest.mark.real


@pytest.mark.skipif(chromium.PROGRAM is None, reason=chromium.MISSING)
def test_the_page_gives_the_runners_texts(artifact, tmp_path):
    tiny = artifact("tiny.en", "int8")
    runner = Recognizer(tiny)
    served = open_site(tiny, "127.0.0.1")
    try:
        with chromium.driven(served.url, tmp_path / "profile") as tab:
            tab.wait(READY)
            for number, clip in enumerate(read_manifest(COMMON_VOICE / "test.jsonl")[:3]):
                path = write_wav(tmp_path / f"{number}.wav", clip.pcm())
                expected = runner.transcribe(path, timestamps=True)
                assert transcribed(tab, path) == writers.txt(expected.as_dict())
    finally:
        served.close()
