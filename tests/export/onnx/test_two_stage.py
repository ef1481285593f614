"""Logits in two stages: the candidates are exact, the others approximate, and no artifact that
would decode other tokens gets them.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from exported import Exported, export, window
from onnx import numpy_helper

from export.onnx import two_stage
from export.onnx.to_onnx import export_onnx


@pytest.fixture
def few(monkeypatch):
    """Sizes for small models: rank 8, and 16 candidates."""
    monkeypatch.setattr(two_stage, "RANK", 8)
    monkeypatch.setattr(two_stage, "BEST", 16)


def moment_of(width, rng):
    rows = rng.standard_normal((200, width)) * np.geomspace(1, 1e-2, width)
    return (rows.T @ rows / len(rows)).astype(np.float32)


def both(model, processor, folder, rng):
    moment = moment_of(model.config.d_model, rng)
    manifest = export_onnx(model, processor, folder / "two", "int8", moment=moment)
    return Exported(folder / "two", manifest), export(model, processor, folder / "one", "int8")


def test_factors_of_full_rank_give_the_product_itself(rng):
    table = rng.standard_normal((50, 12)).astype(np.float32)
    down, rows = two_stage.factors(table, moment_of(12, rng), 12)
    np.testing.assert_allclose(rows @ down.T, table, atol=1e-4)


def test_no_factors_of_that_rank_have_a_smaller_error_on_the_calibration_states(rng):
    """The plain principal components of the states, and those of the table, are both worse."""
    table = rng.standard_normal((50, 12)) * np.geomspace(1, 3, 12)
    hidden = rng.standard_normal((300, 12)) @ rng.standard_normal((12, 12))
    moment = hidden.T @ hidden / len(hidden)

    def error(approximation):
        return np.square(hidden @ (approximation - table).T).sum()

    down, rows = two_stage.factors(table, moment, 4)
    _, states = np.linalg.eigh(moment)
    _, tokens = np.linalg.eigh(table.T @ table)
    for basis in (states[:, -4:], tokens[:, -4:]):
        assert error(rows @ down.T) < error(table @ basis @ basis.T)


def test_candidates_have_the_logits_of_one_stage_to_the_bit(
    few, make_whisper, processor, rng, tmp_path
):
    two, one = both(make_whisper(), processor, tmp_path, rng)
    pcm = window(processor, rng)
    cross, past = two.encode(pcm), two.no_past()
    for ids in ([3, 5, 7], [11], [2, 4]):
        expected, _ = one.step(ids, past, cross)
        actual, past = two.step(ids, past, cross)
        exact = actual == expected
        text = two_stage.text_tokens(make_whisper())
        assert exact[:text].sum() >= two_stage.BEST
        assert exact[text:].all()
        assert not exact.all()


def test_all_timestamps_are_exact(few, make_whisper):
    model = make_whisper()
    begin = model.generation_config.no_timestamps_token_id + 1
    assert two_stage.text_tokens(model) == begin
    exact = 16 + model.config.vocab_size - begin
    assert two_stage.facts(model) == {"rank": 8, "candidates": exact}


def test_only_the_timestamps_of_the_token_table_are_packed(
    few, make_whisper, processor, rng, tmp_path
):
    model = make_whisper()
    both(model, processor, tmp_path, rng)
    sizes = {}
    for name in ("one", "two"):
        graph = onnx.load(tmp_path / name / "decoder.onnx").graph
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        products = [node for node in graph.node if node.op_type == "QGemm"]
        sizes[name] = [stored[node.input[3]].shape for node in products]
    vocabulary, text = model.config.vocab_size, two_stage.text_tokens(model)
    assert sizes == {"one": [(vocabulary, 32)], "two": [(text, 8), (vocabulary - text, 32)]}


@pytest.fixture
def english(few, monkeypatch, make_whisper):
    """An English-only model whose table counts as large."""
    monkeypatch.setattr(two_stage, "LEAST_VOCABULARY", 100)
    model = make_whisper()
    model.generation_config.is_multilingual = False
    return model


@pytest.mark.parametrize(
    ("precision", "layout", "suited"),
    [
        ("int8", "native", True),
        ("int4", "native", True),
        ("fp32", "native", False),
        ("fp16", "native", False),
        ("int8", "sherpa", False),
    ],
)
def test_only_native_artifacts_with_an_int8_table_suit_two_stages(
    precision, layout, suited, english
):
    assert two_stage.suits(english, precision, layout) == suited


def test_a_multilingual_model_does_not_suit_two_stages(english):
    """The calibration clips are English."""
    english.generation_config.is_multilingual = True
    assert not two_stage.suits(english, "int8", "native")


@pytest.mark.parametrize("bits", [4, 32])
def test_a_table_in_other_bits_does_not_suit_two_stages(bits, english):
    english.config.edgewhisper = {"format": 1, "token_bits": bits}
    assert not two_stage.suits(english, "int8", "native")


def test_a_factorised_table_does_not_suit_two_stages(english):
    english.model.decoder.embed_tokens.rows = torch.nn.Embedding(1, 1)
    assert not two_stage.suits(english, "int8", "native")


def test_a_small_table_does_not_suit_two_stages(english, monkeypatch):
    monkeypatch.setattr(two_stage, "LEAST_VOCABULARY", english.config.vocab_size + 1)
    assert not two_stage.suits(english, "int8", "native")
