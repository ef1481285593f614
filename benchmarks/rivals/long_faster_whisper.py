"""Transcribe long recordings with faster-whisper; print one JSON object per recording and mode.

    python -m benchmarks.rivals.long_faster_whisper MODEL THREADS MODE,... FILE.wav ...

Greedy decoding without fallback; every window starts without the previous text. `seconds` is the
time of one transcription.
"""

from __future__ import annotations

import json
import sys
import time

from devices.runner.audio import read_wav

MODES = {"timestamps off": False, "timestamps on": True}


def main(model: str, threads: str, modes: str, *paths: str) -> None:
    """Print the texts of all recordings in the first mode, then in the next one."""
    from faster_whisper import WhisperModel

    whisper = WhisperModel(model, device="cpu", compute_type="int8", cpu_threads=int(threads))
    for mode in modes.split(","):
        for path in paths:
            started = time.perf_counter()
            segments, _ = whisper.transcribe(
                read_wav(path),
                language="en",
                beam_size=1,
                temperature=0.0,
                condition_on_previous_text=False,
                without_timestamps=not MODES[mode],
            )
            text = " ".join(segment.text.strip() for segment in segments)
            row = {
                "engine": "faster-whisper",
                "mode": mode,
                "text": text,
                "seconds": time.perf_counter() - started,
                "encoder_runs": None,
            }
            print(json.dumps(row, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
