"""Branches one at a time: their states, statistics and divergences."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.speech.clips import Clip, read_manifest
from edgewhisper import whisper
from edgewhisper.calibration import COPIES, Moments, Speech
from edgewhisper.compress import fits
from edgewhisper.compress.branches import (
    Branch,
    States,
    attend_few,
    branches_of,
    last_states,
    run,
    stem,
)
from edgewhisper.compress.fits import fit_of
from edgewhisper.compress.teacher import divergence
from edgewhisper.compress.walk import ScoreSums, Walk, attended, effect


@pytest.fixture
def few(clips: Path) -> list[Clip]:
    """Four clips."""
    return read_manifest(clips)[:4]


def speech(few, processor) -> Speech:
    return Speech(few, processor, mask_padding=True)


def logits_after(model, branch, x, window, encoded=None):
    """The logits of one window whose branch has the output states x."""
    with torch.no_grad():
        return model.proj_out(last_states(model, branch, x, window.tokens, encoded))


def test_branches_in_order_are_the_model(make_whisper, few, processor):
    model = make_whisper()
    (window, *_) = speech(few, processor).windows(model, decoder=True)
    first = branches_of(model, "encoder")[0]
    with torch.no_grad():
        x = stem(model, window.features)
        found = logits_after(model, first, x + run(model, first, x, None), window)
        wanted = model(input_features=window.features, decoder_input_ids=window.tokens).logits[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("branch", [Branch("encoder", 0, "ffn"), Branch("decoder", 0, "self_attn")])
def test_divergences_of_several_changes_are_those_of_each(branch, make_whisper, few, processor):
    """Changes that run as one batch of the decoder diverge like single ones, clip by clip."""
    model = make_whisper()
    clips = Speech(few[:2], processor, mask_padding=True, random_tokens=3)
    walk = Walk(model, clips, held_out=speech(few[2:], processor))
    dense = walk.dense()
    for earlier in branches_of(model, "encoder"):
        if branch.side == "encoder" and earlier == branch:
            break
        walk.move(earlier)
    if branch.side == "decoder":
        walk.enter_decoder()
        dense = walk.dense()
    changes = []
    for scale in (0.5, 2.0)[: 1 if branch.side == "encoder" else 2]:
        with fits.restored(branch.last_of(model)):
            branch.last_of(model).weight.mul_(scale)
            changes.append(walk.changed(branch))
    found = walk.divergences(branch, changes, dense)
    groups = walk.measured_windows(branch)
    assert len(groups) == (1 if branch.side == "encoder" else 2)
    for states, divergence_found in zip(changes, found, strict=True):
        losses = []
        for group, wanted in zip(groups, dense, strict=True):
            each = [
                logits_after(model, branch, states[i], walk.windows[i], walk.encoded_of(branch, i))
                for i in group
            ]
            losses.append(float(divergence(wanted, torch.cat(each))))
        assert min(losses) > 1e-6
        assert divergence_found == pytest.approx(effect(losses), rel=1e-3)


@torch.no_grad()
def test_few_tokens_attend_like_many(make_whisper):
    """Also with heads that were removed, and keys and values of different widths."""
    attention = make_whisper().model.decoder.layers[0].encoder_attn
    slim = whisper.SlimAttention(attention, heads=1, qk_dim=5, v_dim=7)
    slim.q_proj, slim.k_proj, slim.v_proj, slim.out_proj = (
        nn.Linear(*sizes) for sizes in ((32, 5), (32, 5), (32, 7), (7, 32))
    )
    y, encoded = torch.randn(1, 3, 32), torch.randn(1, 40, 32)
    for each in (attention, slim):
        found = attend_few(each, y, encoded)
        torch.testing.assert_close(found, each(y, key_value_states=encoded)[0])


@torch.no_grad()
def test_texts_in_one_sequence_do_not_read_each_other(make_whisper, few, processor):
    model = make_whisper()
    walk = Walk(model, Speech(few[:1], processor, mask_padding=True, random_tokens=3))
    walk.enter_decoder()
    lengths = walk.lengths(0)
    assert len(lengths) == 1 + COPIES
    for branch in branches_of(model, "decoder"):
        alone = [
            run(model, branch, x, walk.encoded_of(branch, 0))
            for x in walk.states[0].split(lengths, dim=1)
        ]
        together = walk.output(branch, 0, walk.states[0])
        torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)
        walk.move(branch)


@torch.no_grad()
@pytest.mark.parametrize(("heads", "dims"), [(2, 5), (1, 16), (1, 3)])
def test_stored_attention_gives_the_output_with_fewer_values(
    heads, dims, make_whisper, few, processor
):
    model = make_whisper()
    branch = branches_of(model, "encoder")[0]
    assert fits.whole_of(model, branch)[:2] == (2, 16)
    walk = Walk(model, speech(few[:2], processor))
    found = fit_of(branch.last_of(model), walk.collect(branch, store=True), 0.1)
    weight = fits.reduce_values(model, branch, found, heads, dims)
    for i in walk.states:
        direct = run(model, branch, walk.states[i], None)
        stored = attended(model, branch, walk.stored[i], weight)
        torch.testing.assert_close(stored, direct, rtol=1e-3, atol=1e-5)


def test_states_are_the_same_in_files(rng, monkeypatch):
    monkeypatch.setattr("edgewhisper.compress.branches.IN_MEMORY_BYTES", 100)
    states, tensors = States(), [torch.randn(1, 4, 4) for _ in range(3)]
    for number, tensor in enumerate(tensors):
        states[number] = tensor
    states[2] = tensors[0]
    assert list(states) == [0, 1, 2]
    assert states[0].equal(tensors[0]) and states[1].equal(tensors[1])
    assert states[2].equal(tensors[0])
    assert states.pop(0).equal(tensors[0]) and states.pop(2).equal(tensors[0])
    assert states.pop(0) is None and list(states) == [1]


def test_padding_does_not_matter(make_whisper, few, processor, monkeypatch):
    """Statistics are those of the first positions, whatever stands behind them."""
    monkeypatch.setattr("edgewhisper.compress.walk.MARGIN", 0)
    model = make_whisper()
    walk = Walk(model, speech(few[:1], processor))
    branch = Branch("encoder", 0, "ffn")
    before = walk.collect(branch)
    states = walk.states[0].clone()
    states[:, walk.windows[0].positions :] += 5
    walk.states[0] = states
    after = walk.collect(branch)
    assert before.count == after.count == walk.windows[0].positions < states.shape[1]
    torch.testing.assert_close(before.covariance, after.covariance)


def test_stored_outputs_move_the_states_like_computed_ones(make_whisper, few, processor):
    model = make_whisper()
    branch = branches_of(model, "encoder")[0]
    walks = [Walk(model, speech(few[:2], processor), speech(few[2:], processor)) for _ in range(2)]
    walks[0].collect(branch, store=True)
    for walk in walks:
        walk.move(branch)
    assert all(walks[0].states[i].equal(walks[1].states[i]) for i in range(4))
    assert not len(walks[0].stored)


def test_held_out_clips_do_not_count_in_the_statistics(make_whisper, few, processor):
    model = make_whisper()
    branch = branches_of(model, "encoder")[0]
    alone = Walk(model, speech(few[:2], processor))
    both = Walk(model, speech(few[:2], processor), held_out=speech(few[2:], processor))
    assert both.effect_windows() == [[0, 1], [2, 3]]
    assert alone.effect_windows() == [[], []]
    assert alone.dense() == []
    tokens = [window.tokens.shape[1] for window in both.windows]
    assert [len(group) for group in both.dense()] == [sum(tokens[2:])]
    assert list(both.changed(branch)) == [2, 3]
    torch.testing.assert_close(alone.collect(branch).covariance, both.collect(branch).covariance)
    scores = [walk.collect_scores(branch).keys for walk in (alone, both)]
    torch.testing.assert_close(*scores)


def test_texts_with_random_tokens_weigh_together_as_much_as_their_clip(
    make_whisper, few, processor
):
    model = make_whisper()
    clips = Speech(few[:2], processor, mask_padding=True, random_tokens=3)
    walk = Walk(model, clips, held_out=speech(few[2:], processor))
    assert list(walk.counted_windows()) == [0, 1]
    walk.enter_decoder()
    assert list(walk.counted_windows()) == [0, 1]
    for i in (0, 1):
        own, *longer = walk.texts(i)
        assert [tokens.shape[1] for tokens in longer] == [own.shape[1] + 3] * COPIES
        assert all(tokens[:, -1].equal(own[:, -1]) for tokens in longer)
        assert walk.weights(i) == [1.0] + [1 / COPIES] * COPIES
        assert walk.states[i].shape[1] == sum(walk.lengths(i))
    assert all(len(walk.texts(i)) == 1 for i in (2, 3))
    assert walk.effect_windows() == [[0, 1], [2, 3]]
    expected = sum(2 * walk.lengths(i)[0] + 3 for i in (0, 1))
    branch = branches_of(model, "decoder")[1]
    assert walk.collect(branch).count == pytest.approx(expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["self_attn", "encoder_attn", "ffn"])
def test_statistics_of_texts_in_one_sequence_are_those_of_each(kind, make_whisper, few, processor):
    """The moments and scores of a clip's texts, added one by one with their weights."""
    model = make_whisper()
    walk = Walk(model, Speech(few[:1], processor, mask_padding=True, random_tokens=3))
    walk.enter_decoder()
    branch = Branch("decoder", 0, kind)
    found, last = walk.collect(branch), branch.last_of(model)
    wanted = Moments(last.in_features)
    alone = Walk(model, speech(few[:1], processor))
    alone.enter_decoder()
    scores = []
    for x, weight in zip(walk.states[0].split(walk.lengths(0), 1), walk.weights(0), strict=True):
        tokens = torch.zeros(1, x.shape[1]).long()
        alone.states[0] = x
        alone.windows[0] = replace(alone.windows[0], tokens=tokens, weight=weight)
        own = alone.collect(branch)
        wanted.count += own.count
        wanted.total += own.total
        wanted.products += own.products
        scores += [alone.collect_scores(branch)] if kind != "ffn" else []
    assert found.count == pytest.approx(wanted.count)
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.covariance, wanted.covariance, rtol=1e-4, atol=1e-6)
    if scores:
        together = walk.collect_scores(branch)
        for name in ("queries", "keys"):
            expected = sum(getattr(each, name) for each in scores)
            torch.testing.assert_close(getattr(together, name), expected, rtol=1e-4, atol=1e-5)


def test_divergences_use_no_windows_with_random_tokens(make_whisper, few, processor):
    clips = Speech(few[:1], processor, mask_padding=True, random_tokens=3)
    walk = Walk(make_whisper(), clips, held_out=speech(few[1:], processor))
    walk.enter_decoder()
    assert walk.effect_windows() == [[0], [1, 2, 3]]


def test_keys_count_by_their_attention(rng):
    """The statistics are those of each query's softmax, summed one by one."""
    queries, keys = (torch.from_numpy(rng.standard_normal((2, 5, 3))) for _ in range(2))
    sums = ScoreSums(2, 3)
    sums.add(queries, keys, None)
    wanted = torch.zeros(2, 3, 3).double()
    for head, query in product(range(2), range(5)):
        shares = (keys[head] @ queries[head, query]).softmax(0)
        centred = keys[head] - shares @ keys[head]
        wanted[head] += (centred * shares[:, None]).T @ centred
    torch.testing.assert_close(sums.keys, wanted)
    torch.testing.assert_close(sums.queries, queries.mT @ queries)


def test_an_effect_is_the_geometric_mean_over_both_groups_of_clips():
    assert effect([0.02, 0.08]) == pytest.approx(0.04)
    assert effect([0.08]) == pytest.approx(0.08)
