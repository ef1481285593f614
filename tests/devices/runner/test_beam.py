"""Beam search, compared with transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from devices.runner.decode import beam
from devices.runner.decode.beam import Branches, beam_search
from devices.runner.decode.rules import Rules
from devices.runner.recognizer import Transcript
from edgewhisper import decoding


class Again:
    """Beam branches on a torch model without a cache: every text is computed from scratch."""

    def __init__(self, model, encoded, prompt: Sequence[int]) -> None:
        self.model, self.encoded, self.texts = model, encoded, [tuple(prompt)]

    def logits(self) -> np.ndarray:
        ids = torch.tensor(self.texts)
        batch = (self.encoded[0].expand(len(ids), -1, -1),)
        with torch.no_grad():
            return self.model(encoder_outputs=batch, decoder_input_ids=ids).logits[:, -1].numpy()

    def __call__(self, parents, tokens):
        self.texts = [(*self.texts[p], t) for p, t in zip(parents, tokens, strict=True)]
        return self.logits()


ROUNDING = 2e-5
"""Rounding error of a sum of about ten log-probabilities in float32."""


def watch_gaps(patch: pytest.MonkeyPatch) -> list[float]:
    """Return the score gaps between successive candidates, up to the best rejected one."""
    gaps, inner = [math.inf], beam.best_candidates

    def watched(logits, running, filters, count):
        found = inner(logits, running, filters, count + 1)
        scores = [candidate.score for candidate in found if candidate.score > beam.NEVER / 2]
        gaps.extend(a - b for a, b in pairwise(scores))
        return found[:count]

    patch.setattr(beam, "best_candidates", watched)
    return gaps


@pytest.mark.parametrize("beams", [2, 3, 5])
@pytest.mark.parametrize("timestamps", [False, True], ids=["text", "timestamps"])
def test_beam_search_equals_that_of_transformers(tiny_whisper, monkeypatch, rng, beams, timestamps):
    """A random model with a probable end token, so that texts end at many lengths.

    The texts may differ if two candidates have the same score up to rounding.
    """
    from export.manifest import decoding_rules

    model = tiny_whisper
    mel = torch.from_numpy(rng.standard_normal((1, 80, 600)).astype(np.float32))
    generation = model.generation_config
    own = Rules.from_manifest(decoding_rules(model) | {"max_new_tokens": 14})
    if not timestamps:
        texts = Again(model, model.model.encoder(mel), own.prompt)
        said = beam_search(texts.logits()[0], texts, own, beams).tokens
        generation.eos_token_id = generation.pad_token_id = said[int(rng.integers(1, 8))]
    own = Rules.from_manifest(decoding_rules(model) | {"max_new_tokens": 14})
    own = own.with_options(None, None, timestamps)
    limits = {} if timestamps else {"suppress_tokens": list(range(own.timestamp_begin, 783))}
    with torch.no_grad():
        wanted = model.generate(
            mel,
            num_beams=beams,
            do_sample=False,
            max_new_tokens=own.max_new_tokens,
            return_timestamps=timestamps,
            force_unique_generate_call=True,
            return_dict_in_generate=True,
            **limits,
        ).sequences[0, len(own.prompt) :]
    texts = Again(model, model.model.encoder(mel), own.prompt)
    gaps = watch_gaps(monkeypatch)
    found = beam_search(texts.logits()[0], texts, own, beams)
    if found.tokens != decoding.until_end(wanted.tolist(), own.eos):
        assert min(gaps) < ROUNDING


@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_equals_generate_on_the_artifact(plain, torch_model, processor, pcms, beams):
    silent = list(range(plain.rules.timestamp_begin, len(plain.table)))
    for pcm in pcms[:4]:
        with torch.no_grad():
            wanted = torch_model.generate(
                decoding.log_mel(processor.feature_extractor, [pcm]),
                num_beams=beams,
                do_sample=False,
                max_new_tokens=60,
                suppress_tokens=silent,
            )[0].tolist()
        assert plain.transcribe(pcm, beams=beams).tokens == decoding.until_end(
            wanted, plain.rules.eos
        )


def test_branches_continue_their_parents(plain, pcms, rng):
    """For random parents and tokens, the logits equal those of the same text fed from the start."""
    count, texts = 4, [list(plain.rules.prompt)] * 4
    decoder = plain.decoder_over(pcms[0], Transcript())
    decoder(plain.rules.prompt)
    branches, parents = Branches(decoder, count), [0] * count
    for _ in range(8):
        tokens = rng.integers(0, 370, count).tolist()
        found = branches(parents, tokens)
        texts = [[*texts[p], t] for p, t in zip(parents, tokens, strict=True)]
        for text, logits in zip(texts, found, strict=True):
            decoder.fed = 0
            assert np.allclose(decoder(text), logits, atol=2e-3)
        parents = rng.integers(0, count, count).tolist()
