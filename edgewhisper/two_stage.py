"""Decides whether an export computes logits in two stages.

export/onnx/two_stage.py describes the stages. This module computes the statistics that they are
calibrated with, and compares the tokens of an artifact in two stages with those of one stage.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgewhisper.calibration import Moments, Speech
from edgewhisper.shipped import COMMON_VOICE
from export.prompt import language_code

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from benchmarks.speech.clips import Clip
    from devices.runner.interfaces import Decoder
    from devices.runner.recognizer import Recognizer
    from edgewhisper.job import Say
    from export.weights import Floats

CALIBRATION = COMMON_VOICE / "calibration.jsonl"
Write = Callable[..., object]
"""Writes an artifact into a folder; with the keyword `moment`, in two stages."""


def moment_for(
    write: Write,
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    clips: Sequence[Clip],
    say: Say,
) -> Floats | None:
    """Return the second moment that two stages need; None if they change tokens.

    Two artifacts are written and compared on `clips`, with and without timestamps.
    """
    moment = second_moment(model, processor)
    with tempfile.TemporaryDirectory() as folder:
        staged, plain = Path(folder) / "staged", Path(folder) / "plain"
        write(staged, moment=moment)
        write(plain)
        differing = count_differing(staged, plain, clips)
    stages = "one stage" if differing else "two stages"
    say(f"logits in {stages}: {differing} of {len(clips)} clips get other tokens in two stages")
    return None if differing else moment


@torch.no_grad()
def second_moment(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> Floats:
    """Return the second moment (d_model, d_model) of the decoder's last hidden states on the
    included calibration clips. The decoder reads their texts."""
    from benchmarks.speech.clips import read_manifest

    clips = read_manifest(CALIBRATION)
    device = model.device
    moments = Moments(model.config.d_model)
    for clip in Speech(clips, processor).windows(model, decoder=True):
        if clip.tokens is None:
            continue
        encoded = model.model.encoder(clip.features.to(device))
        states = model.model.decoder(
            input_ids=clip.tokens.to(device),
            encoder_hidden_states=encoded.last_hidden_state,
            use_cache=False,
        )
        moments.add(states.last_hidden_state[0].cpu())
    return (moments.products / moments.count).float().numpy()


def count_differing(one: Path, other: Path, clips: Sequence[Clip]) -> int:
    """Return the number of clips whose greedy tokens differ between two artifacts with the same
    encoder, with or without timestamps."""
    from devices.runner.recognizer import Recognizer

    recognizers = [Recognizer(folder, guards=False, hashed=False) for folder in (one, other)]
    return sum(differs(recognizers, clip) for clip in clips)


def differs(recognizers: Sequence[Recognizer], clip: Clip) -> bool:
    """Return whether two recognizers decode a clip to different tokens."""
    from devices.runner.audio import split
    from devices.runner.decode.greedy import greedy

    first = recognizers[0]
    pcm, language = clip.pcm(), first.known(language_code(clip.lang))
    for piece in split(pcm, first.window_samples):
        decoders = list(over_one_window(recognizers, pcm[piece]))
        for timestamps in (False, True):
            rules = first.rules.with_options(language, None, timestamps)
            for decoder in decoders:
                decoder.fed = 0
            one, other = (greedy(decoder, rules, stop_loops=True) for decoder in decoders)
            if one != other:
                return True
    return False


def over_one_window(recognizers: Sequence[Recognizer], pcm: Any) -> Iterator[Decoder]:
    """Yield the decoders of several recognizers over one window, which is encoded once."""
    from devices.runner.interfaces import Transcript

    decoder: Any = recognizers[0].decoder_over(pcm, Transcript())
    for recognizer in recognizers:
        other = copy(decoder)
        other.session = recognizer.engine.decoder  # type: ignore[attr-defined]
        other.write_to(recognizer.engine.caches(1)[0])  # type: ignore[attr-defined]
        yield other
