"""Decoding rules with a small vocabulary in Whisper's layout."""

from __future__ import annotations

from devices.runner.decode.rules import Rules

EOS, SILENT, BEGIN, VOCAB = 40, 49, 50, 70
"""First ids after the text: end, no timestamps, timestamps; and the size of the vocabulary."""


def rules(**changes) -> Rules:
    fields = {
        "prompt": [41, 42, 43, SILENT],
        "eos": EOS,
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
        "timestamp_begin": BEGIN,
        "max_new_tokens": 30,
        "max_initial_timestamp_index": 5,
        "no_speech": SILENT - 1,
        "previous": SILENT - 2,
        "languages": {"en": 42, "hi": 44, "haw": 45},
        "tasks": {"transcribe": 43, "translate": 46},
    }
    return Rules.from_manifest(fields | changes)
