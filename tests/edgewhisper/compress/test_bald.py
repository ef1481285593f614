"""BaldWhisper, both stages: decoding, saving, export, sizes, and recipes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from bald_models import (
    MERGE,
    SHEAR,
    base,
    logits,
    pairs,
    same_tensors,
)
from exported import export, torch_steps, window

from edgewhisper import decoding, whisper
from edgewhisper.compress import merge, shear
from edgewhisper.compress.decoder_layers import (
    regroup,
)
from edgewhisper.recipe import load_recipe
from edgewhisper.training import Training
from export.cost import count_parameters
from export.problem import Problem

# -------------------------------------------------------------------------- the new layers' numbers


def both_stages(model, context):
    merged = merge.apply(model, MERGE, context)
    return shear.apply(merged, SHEAR, context)


STAGES = {
    "merged": lambda model, context: merge.apply(model, MERGE, context),
    "sheared": lambda model, context: shear.apply(model, SHEAR, context),
    "both": both_stages,
}


@pytest.fixture(params=STAGES)
def bald(request, deep, context):
    """A random model after either stage, or both."""
    return STAGES[request.param](deep, context)


def test_greedy_decoding_is_the_same_with_and_without_a_cache(bald, processor, rng):
    pcm = window(processor, rng)
    features = decoding.log_mel(processor.feature_extractor, [pcm])
    result = []
    for cached in (True, False):
        with torch.no_grad():
            result.append(
                bald.generate(
                    features, do_sample=False, num_beams=1, max_new_tokens=12, use_cache=cached
                ).tolist()
            )
    assert result[0] == result[1]


def test_logits_are_the_same_with_and_without_a_cache(bald, processor, rng):
    pcm, ids = window(processor, rng), rng.integers(0, 783, 9).tolist()
    steps = np.stack(torch_steps(bald, processor, pcm, [[i] for i in ids]))
    np.testing.assert_allclose(steps, decoding.logits(bald, processor, pcm, ids), atol=1e-3)


def test_a_round_trip_is_bit_exact(bald, processor, tmp_path):
    whisper.save(bald, processor, tmp_path / "out", {})
    loaded = whisper.load(tmp_path / "out")
    assert same_tensors(loaded, bald)
    assert torch.equal(logits(loaded), logits(bald))
    for key in ("edgewhisper", "decoder_layers"):
        assert getattr(loaded.config, key, None) == getattr(bald.config, key, None)


def test_onnx_logits_and_tokens_agree_with_torch(bald, processor, rng, tmp_path):
    exported = export(bald, processor, tmp_path)
    pcm = window(processor, rng)
    chunks = [rng.integers(0, 783, n).tolist() for n in (int(rng.integers(1, 6)), 1, 3)]
    past, cross = exported.no_past(), exported.encode(pcm)
    for chunk, want in zip(chunks, torch_steps(bald, processor, pcm, chunks), strict=True):
        result, past = exported.step(chunk, past, cross)
        assert np.abs(result - want).max() < 1e-3
    assert exported.greedy(pcm) == decoding.greedy(bald, processor, [pcm])[0]


# -------------------------------------------------------------------- the factorised model at large


def test_sizes_of_whisper_base_are_the_papers():
    with torch.device("meta"):
        merged, _ = regroup(base(), pairs(base()), 0.1, 1.0)
    assert count_parameters(merged)["total"] == pytest.approx(59.98e6, abs=5e3)
    final = base(decoder_layers=3, token_rank=96)
    assert count_parameters(final)["total"] == pytest.approx(38.46e6, abs=5e3)
    assert count_parameters(final)["token_table"] == 51865 * 96 + 96 * 512


# --------------------------------------------------------------------------------------- the recipe


def test_bald_paper_has_the_published_values():
    stages = load_recipe("bald-paper").steps
    assert [step.method for step in stages] == ["merge", "shear"]
    one, two = (step.options for step in stages)
    assert (one.start, one.groups, one.search, one.trials) == ("merge", "", "bayes", 30)
    assert (one.train_share, one.dev_share, two.rank, two.start) == (0.3, 0.6, 96, "svd")
    for training in (one.baseline, one.training, two.training):
        assert (training.epochs, training.learning_rate) == (20.0, 5e-5)


def test_recipe_bald_merges_the_pair_in_the_middle():
    (merging, shearing) = (step.options for step in load_recipe("bald").steps)
    assert merge.plan_of(merging, 4) == [(0,), (1, 2), (3,)]
    assert merge.plan_of(merging, 6) == [(0,), (1,), (2, 3), (4,), (5,)]
    assert not merging.training.encoder and not shearing.training.encoder


def test_pairs_sets_the_number_of_merged_pairs_in_the_middle():
    assert merge.plan_of(merge.Options(pairs=2), 5) == [(0,), (1, 2), (3, 4)]
    assert merge.plan_of(merge.Options(), 4) == [(0, 1), (2, 3)]
    with pytest.raises(Problem, match="pairs is set to 3 for a decoder of 4 layers"):
        merge.plan_of(merge.Options(pairs=3), 4)
    with pytest.raises(Problem, match="pairs is set to 1 together with groups"):
        merge.plan_of(merge.Options(pairs=1, groups="0+1"), 2)


def test_epochs_are_converted_to_steps(context, tiny_whisper):
    from edgewhisper.training import counted

    twenty = Training(epochs=20.0, batch_size=16, steps=7)
    assert counted(twenty, 100).steps == 125
    assert counted(twenty, 101).steps == 127
    assert counted(Training(steps=7), 100).steps == 7
    options = replace(SHEAR, training=Training(epochs=0.5, batch_size=1, steps=9))
    shear.apply(tiny_whisper, options, context)
    assert context.record["shear"]["training"]["steps"] == 2
