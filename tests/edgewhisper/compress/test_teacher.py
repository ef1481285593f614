"""The distance to a teacher as a loss term."""

import copy

import pytest
import torch

from edgewhisper.compress.teacher import distance, distance_term, total
from edgewhisper.examples import Batch


def test_a_model_has_distance_zero_from_itself_only(make_whisper):
    one, other = make_whisper(), make_whisper()
    labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
    features = torch.randn(2, 80, 600)
    a, b = (m(features, decoder_input_ids=labels.clamp_min(0)) for m in (one, other))
    assert distance(a, a, labels).item() == pytest.approx(0, abs=1e-6)
    assert distance(a, b, labels).item() > 0.1


@pytest.fixture
def batch() -> Batch:
    labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
    return Batch(torch.randn(2, 80, 600), labels.clamp_min(0), labels)


def test_the_term_measures_the_distance_to_the_original_weights(tiny_whisper, batch):
    term = distance_term(tiny_whisper, 3.0)
    before = copy.deepcopy(tiny_whisper)
    with torch.no_grad():
        tiny_whisper.model.encoder.layers[0].fc1.weight.add_(0.5)
        new, old = (
            m(batch.input_features, decoder_input_ids=batch.decoder_input_ids)
            for m in (tiny_whisper, before)
        )
    expected = 3 * distance(old, new, batch.labels)
    assert expected > 0.01
    torch.testing.assert_close(term(tiny_whisper, batch, new), expected)


def test_total_adds_terms_and_ignores_none(tiny_whisper, batch):
    two = total(lambda *_: torch.tensor(2.0), None, lambda *_: torch.tensor(0.5))
    assert two(tiny_whisper, batch, None).item() == 2.5
    assert total(None, distance_term(tiny_whisper, 0)) is None
