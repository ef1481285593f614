"""Alignment heads: updated by compression, found on speech, and their timestamp errors."""

import copy
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from dead_structure import kill
from scipy.ndimage import median_filter
from torch import nn

from benchmarks.speech.clips import read_manifest
from benchmarks.study.digits import DIGITS
from edgewhisper import alignment, decoding, pipeline, whisper
from edgewhisper.alignment import (
    TimedClip,
    Word,
    carry,
    compose,
    cross_attentions,
    find_heads,
    head_counts,
    head_scores,
    moves,
    remap,
    settle,
    timestamp_error_s,
    upper_half,
    within,
    without_silence,
    word_times,
)
from edgewhisper.compress import imp, tspar, wsap
from edgewhisper.compress.context import Context
from edgewhisper.compress.masks import guards
from edgewhisper.compress.shrink import slimmed
from edgewhisper.quiet import quiet
from edgewhisper.training import Training
from export.problem import Problem


@pytest.fixture
def spoken(rng) -> TimedClip:
    """A clip of two to five words, which are noise."""
    words = rng.choice(DIGITS, size=int(rng.integers(2, 6)))
    sounds = [rng.standard_normal(int(rng.integers(4000, 9000))) * 0.1 for _ in words]
    pauses = rng.uniform(0.05, 0.4, size=len(words) + 1)
    return compose(list(zip(map(str, words), sounds, strict=True)), pauses.tolist())


def kill_heads(model, heads) -> None:
    """Zero the output of these heads (layer, head) of the decoder's cross-attention."""
    with torch.no_grad():
        for layer, head in heads:
            attention = model.model.decoder.layers[layer].encoder_attn
            dim = attention.head_dim
            attention.out_proj.weight[:, head * dim : (head + 1) * dim] = 0


def all_heads(model) -> list[list[int]]:
    return [[n, h] for n, count in enumerate(head_counts(model)) for h in range(count)]


# ------------------------------------------------------------------------- heads that were moved


def test_remaining_heads_keep_their_order():
    moved = moves([[1, 3], [0], [0, 1, 2, 3]])
    assert moved == {
        (0, 1): (0, 0), (0, 3): (0, 1), (1, 0): (1, 0),
        (2, 0): (2, 0), (2, 1): (2, 1), (2, 2): (2, 2), (2, 3): (2, 3),
    }  # fmt: skip
    assert remap([[0, 0], [0, 3], [1, 2], [2, 3]], moved) == [[0, 1], [2, 3]]


def test_layers_may_be_merged_dropped_and_renumbered():
    moved = {(0, 0): (0, 0), (0, 1): (0, 1), (1, 0): (0, 0), (1, 1): None, (3, 1): (1, 1)}
    assert remap([[0, 0], [1, 0], [1, 1], [2, 0], [3, 1]], moved) == [[0, 0], [1, 1]]


def test_unchanged_heads_stay_in_the_list(tiny_whisper):
    tiny_whisper.generation_config.alignment_heads = [[1, 0], [1, 1]]
    slim, record = slimmed(tiny_whisper)
    assert slim.generation_config.alignment_heads == [[1, 0], [1, 1]]
    assert not record["stand_in"]


def test_a_model_without_alignment_heads_gets_none(tiny_whisper, rng):
    slim, record = slimmed(kill(tiny_whisper, "whole_heads", rng))
    assert record == {} == settle(slim)
    assert not hasattr(slim.generation_config, "alignment_heads")


def test_the_list_refers_to_the_same_heads_after_compression(make_whisper, processor, spoken, rng):
    """The attention of a remaining head is the same under its new number."""
    count, layers = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    model = make_whisper(d_model=8 * count, heads=count, decoder_layers=layers)
    dead = [(n, h) for n in range(layers) for h in rng.permutation(count)[1:] if rng.random() < 0.6]
    kill_heads(model, dead)
    model.generation_config.alignment_heads = all_heads(model)
    slim, _ = slimmed(model)
    left = [(n, h) for n, h in all_heads(model) if (n, h) not in dead]
    assert len(left) == len(slim.generation_config.alignment_heads)
    before, after = (cross_attentions(m, processor, spoken) for m in (model, slim))
    for (n, old), (m, new) in zip(left, slim.generation_config.alignment_heads, strict=True):
        torch.testing.assert_close(after[m][new], before[n][old], rtol=0, atol=1e-5)


def test_heads_of_the_upper_half_replace_removed_heads(make_whisper):
    model = make_whisper(heads=2, decoder_layers=3)
    model.generation_config.alignment_heads = [[1, 0], [2, 1]]
    kill_heads(model, [(1, 0), (2, 1)])
    slim, record = slimmed(model)
    assert record == {"before": [[1, 0], [2, 1]], "after": [[1, 0], [2, 0]], "stand_in": True}
    assert slim.generation_config.alignment_heads == upper_half(slim) == [[1, 0], [2, 0]]


def test_the_list_of_the_original_model_is_not_changed(tiny_whisper):
    tiny_whisper.generation_config.alignment_heads = [[0, 0], [0, 1]]
    kill_heads(tiny_whisper, [(0, 0)])
    slim, _ = slimmed(tiny_whisper)
    assert slim.generation_config.alignment_heads == [[0, 0]]
    assert tiny_whisper.generation_config.alignment_heads == [[0, 0], [0, 1]]


def test_heads_that_do_not_exist_are_removed_from_the_list(tiny_whisper):
    tiny_whisper.generation_config.alignment_heads = [[0, 1], [0, 2], [5, 0]]
    settle(tiny_whisper)
    assert tiny_whisper.generation_config.alignment_heads == [[0, 1]]


def test_two_carries_apply_both_moves(tiny_whisper):
    tiny_whisper.generation_config.alignment_heads = [[0, 1], [1, 0], [1, 1]]
    carry(tiny_whisper, {(0, 1): (1, 0), (1, 0): None, (1, 1): (1, 1)})
    carry(tiny_whisper, {(1, 0): (0, 1), (1, 1): (1, 0)})
    assert tiny_whisper.generation_config.alignment_heads == [[0, 1], [1, 0]]


def test_token_times_of_pruned_and_shrunk_models_are_the_same(make_whisper, processor, clips):
    """In transformers' generate(), with the heads of generation_config."""
    model = make_whisper(heads=4, d_model=32)
    kill_heads(model, [(0, 0), (1, 2), (1, 3)])
    model.generation_config.alignment_heads = [[0, 1], [0, 3], [1, 1]]
    slim, _ = slimmed(model)
    assert slim.generation_config.alignment_heads == [[0, 0], [0, 2], [1, 1]]
    pcm = read_manifest(clips)[1].pcm()
    features = decoding.log_mel(processor.feature_extractor, [pcm])
    times = []
    for one in (model, slim):
        one.set_attn_implementation("eager")
        with quiet():
            out = one.generate(
                features,
                language="en",
                return_token_timestamps=True,
                return_dict_in_generate=True,
                max_new_tokens=12,
                suppress_tokens=decoding.suppressed(one),
            )
        times.append((out["sequences"].tolist(), out["token_timestamps"].tolist()))
    assert times[0] == times[1]
    assert max(times[0][1][0]) > 0


def test_compress_saves_the_updated_list(tmp_path, monkeypatch, make_whisper, processor, clips):
    monkeypatch.chdir(tmp_path)
    model = make_whisper(heads=4, d_model=32)
    kill_heads(model, [(0, 0), (1, 1)])
    model.generation_config.alignment_heads = [[0, 2], [1, 1], [1, 3], [7, 0]]
    whisper.save(model, processor, tmp_path / "base", {})
    shutil.copytree(clips.parent / "test", tmp_path / "test")
    (tmp_path / "two.jsonl").write_text("\n".join(clips.read_text().splitlines()[:2]))
    (tmp_path / "shrink.toml").write_text('[[step]]\nmethod = "shrink"\n')
    manifest = tmp_path / "two.jsonl"
    slim = pipeline.compress(
        pipeline.Request("./base", "shrink.toml", manifest, manifest, Path("slim"))
    )
    saved = json.loads((slim / "generation_config.json").read_text())
    assert saved["alignment_heads"] == [[0, 1], [1, 2]]
    record = json.loads((slim / "compression.json").read_text())["steps"]["shrink"]
    assert record["alignment_heads"]["before"] == [[0, 2], [1, 1], [1, 3], [7, 0]]
    assert whisper.load(slim).generation_config.alignment_heads == [[0, 1], [1, 2]]


# ------------------------------------------------------------------- speech with known word times


def test_composed_words_are_at_their_times(rng):
    sounds = [np.full(int(rng.integers(100, 5000)), n + 1.0) for n in range(4)]
    pauses = rng.uniform(0, 0.3, size=5).tolist()
    clip = compose([(str(n), s) for n, s in enumerate(sounds)], pauses)
    times = np.arange(len(clip.pcm)) / 16000
    for n, word in enumerate(clip.words):
        inside = (times >= word.start_s) & (times < word.end_s)
        assert (clip.pcm[inside] == n + 1).all() and inside.sum() == len(sounds[n])
    assert (clip.pcm == 0).sum() == len(clip.pcm) - sum(map(len, sounds))


def test_a_missing_pause_is_refused():
    with pytest.raises(ValueError):
        compose([("one", np.ones(9)), ("two", np.ones(9))], [0.1, 0.1])


def test_a_position_half_inside_a_word_counts_half():
    result = within([Word("a", 0.03, 0.06), Word("b", 0.0, 0.02)], 4, 0.02)
    torch.testing.assert_close(result, torch.tensor([[0, 0.5, 1, 0], [1.0, 0, 0, 0]]))


# ------------------------------------------------------------------------------- what heads do


def planted(model, processor, clip, heads, rng, spread=0.15):
    """Attention weights of all heads: noise, except that the given heads follow the words."""
    prompt, words = alignment.spell(clip, model, processor)
    spans = [w for w, ids in zip(clip.words, words, strict=True) for _ in ids]
    positions = model.config.max_source_positions
    rows = len(prompt) + len(spans)
    made = [
        torch.from_numpy(rng.gamma(1.0, size=(count, rows, positions))).float()
        for count in head_counts(model)
    ]
    times = (torch.arange(positions) + 0.5) * 0.02
    for layer, head in heads:
        for n, span in enumerate(spans):
            middle = (span.start_s + span.end_s) / 2
            made[layer][head, len(prompt) - 1 + n] = torch.exp(-((times - middle) ** 2) / spread**2)
        end = clip.words[-1].end_s + 2 * spread
        made[layer][head, len(prompt) - 1 + len(spans)] = torch.exp(
            -((times - end) ** 2) / spread**2
        )
    return [attention / attention.sum(dim=-1, keepdim=True) for attention in made]


def test_head_scores_of_known_attention(tiny_whisper, processor, monkeypatch):
    clip = TimedClip(np.zeros(96000, np.float32), (Word("four", 0.5, 1.0), Word("six", 1.0, 2.5)))
    prompt, words = alignment.spell(clip, tiny_whisper, processor)
    assert [len(ids) for ids in words] == [1, 1]
    attention = torch.zeros(2, len(prompt) + 2, 300)
    attention[0, len(prompt) - 1, 25:50] = 1 / 25  # the whole of "four"
    attention[0, len(prompt), 100:150] = 1 / 50  # half of it in "six"
    attention[1] = 1 / 300  # uniform: 0.5 of 6 s, and 1.5 of 6 s
    monkeypatch.setattr(alignment, "cross_attentions", lambda *_: [attention, attention.flip(0)])
    scores = head_scores(tiny_whisper, processor, [clip])
    assert scores[0, 0] == scores[1, 1] == pytest.approx((1 + 0.5) / 2)
    assert scores[0, 1] == scores[1, 0] == pytest.approx((0.5 + 1.5) / 6 / 2)


def test_planted_heads_are_found_and_time_the_words(
    make_whisper, processor, spoken, rng, monkeypatch
):
    count, layers = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    model = make_whisper(d_model=8 * count, heads=count, decoder_layers=layers)
    pairs = all_heads(model)
    chosen = sorted(pairs[i] for i in rng.permutation(len(pairs))[: (len(pairs) + 1) // 2])
    made = planted(model, processor, spoken, chosen, rng)
    monkeypatch.setattr(alignment, "cross_attentions", lambda *_: made)
    assert find_heads(model, processor, [spoken], len(chosen)) == chosen
    good = timestamp_error_s(model, processor, [spoken], chosen)
    longest = max(word.end_s - word.start_s for word in spoken.words)
    assert good < 0.4 / 2 + 0.15 < longest + 0.4  # a word border may be anywhere in the pause
    others = [pair for pair in pairs if pair not in chosen]
    if others:
        assert timestamp_error_s(model, processor, [spoken], others) > good


def dtw(cost):
    """Return the cheapest monotonic path as (row, column) steps, by dynamic programming."""
    rows, columns = cost.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0
    for i in range(rows):
        for j in range(columns):
            total[i + 1, j + 1] = cost[i, j] + min(total[i, j], total[i, j + 1], total[i + 1, j])
    path, i, j = [], rows, columns
    while i and j:
        path.append((i - 1, j - 1))
        options = {
            (-1, -1): total[i - 1, j - 1],
            (-1, 0): total[i - 1, j],
            (0, -1): total[i, j - 1],
        }
        step = min(options, key=options.get)
        i, j = i + step[0], j + step[1]
    return path[::-1]


def test_word_times_match_an_independent_alignment(tiny_whisper, processor, spoken, rng):
    heads = [[0, 1], [1, 0]]
    prompt, words = alignment.spell(spoken, tiny_whisper, processor)
    attentions = cross_attentions(tiny_whisper, processor, spoken)
    frames = -(-len(spoken.pcm) // 320)
    rows = [attentions[layer][head, len(prompt) - 1 :, :frames].numpy() for layer, head in heads]
    weights = np.stack([(row - row.mean(axis=0)) / row.std(axis=0) for row in rows])
    smooth = median_filter(weights.astype(np.float64), size=(1, 1, 7), mode="mirror").mean(axis=0)
    path = dtw(-smooth)
    entered = {row: 0.02 * min(j for i, j in path if i == row) for row in range(len(smooth))}
    borders = np.cumsum([0, *map(len, words)])
    expected = [(entered[a], entered[b]) for a, b in pairwise(borders)]
    times = word_times(tiny_whisper, processor, spoken, heads)
    np.testing.assert_allclose(times, expected, atol=1e-6)
    assert times[0][0] == 0
    assert [end for _, end in times[:-1]] == [start for start, _ in times[1:]]


def test_returned_attention_is_normalised(tiny_whisper, processor, spoken):
    """The weights sum to one, and the model's attention implementation is restored."""
    before = tiny_whisper.config._attn_implementation
    attentions = cross_attentions(tiny_whisper, processor, spoken)
    assert [len(attention) for attention in attentions] == head_counts(tiny_whisper)
    for attention in attentions:
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:2]))
    assert tiny_whisper.config._attn_implementation == before


def test_heads_found_on_the_embedded_model_have_a_lower_timestamp_error(
    digits, processor, clips, rng
):
    """Real speech: clips composed of single digits."""
    model = whisper.load(digits)
    single = [c for c in read_manifest(clips.parent / "dev.jsonl") if " " not in c.text]
    made = []
    for _ in range(4):
        chosen = [single[i] for i in rng.permutation(len(single))[:4]]
        words = [(clip.text, without_silence(clip.pcm())) for clip in chosen]
        made.append(compose(words, [0.2] * 5))
    scores = head_scores(model, processor, made)
    assert set(scores) == set(map(tuple, all_heads(model)))
    best = find_heads(model, processor, made, 2)
    worst = [list(head) for head in sorted(scores, key=scores.get)[:2]]
    errors = [timestamp_error_s(model, processor, made, heads) for heads in (best, worst)]
    print(scores, best, worst, errors)
    assert errors[0] < errors[1]
    assert errors[0] < 0.3


def test_the_reference_concatenates_single_words(digits, processor, clips):
    model = whisper.load(digits)
    reference = alignment.reference(model, processor, read_manifest(clips.parent / "dev.jsonl"))
    assert "single words" in reference.source
    assert reference.clips and all(len(clip.words) == 4 for clip in reference.clips)
    error = timestamp_error_s(model, processor, reference.clips, alignment.heads_of(model))
    assert 0 < error < 1


def test_the_reference_of_other_speech_uses_the_models_own_times(digits, processor, clips):
    model = whisper.load(digits)
    longer = [clip for clip in read_manifest(clips) if " " in clip.text][:3]
    reference = alignment.reference(model, processor, longer)
    assert reference.source == "the model before compression"
    assert [" ".join(w.text for w in clip.words) for clip in reference.clips] == [
        clip.text for clip in longer
    ]
    heads = alignment.heads_of(model)
    assert timestamp_error_s(model, processor, reference.clips, heads) == 0
    with torch.no_grad():
        for layer, head in heads:  # their attention becomes random
            attention = model.model.decoder.layers[layer].encoder_attn
            rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            attention.q_proj.weight[rows].normal_()
    assert timestamp_error_s(model, processor, reference.clips, heads) > 0


def test_unusable_speech_gives_no_reference(tiny_whisper, processor, clips):
    first = read_manifest(clips)[0]
    for change in (dict(text=" "), dict(lang="zh", text="a b")):
        assert alignment.reference(tiny_whisper, processor, [replace(first, **change)]) is None


def test_compress_records_the_timestamp_error_before_and_after(
    tmp_path, monkeypatch, digits, clips
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clips.parent / "test", tmp_path / "test")
    (tmp_path / "few.jsonl").write_text("\n".join(clips.read_text().splitlines()[1:4]))
    (tmp_path / "mine.toml").write_text(
        '[[step]]\nmethod = "wsap"\nlow = 0.8\nmiddle = 0.8\nhigh = 0.8\n'
        "[step.recovery]\nsteps = 0\n"
    )
    manifest = Path("few.jsonl")
    given = str(digits), "mine.toml", manifest, manifest, Path("slim")
    slim = pipeline.compress(pipeline.Request(*given, allow_loss=True))
    record = json.loads((slim / "compression.json").read_text())
    assert record["timestamps"]["judged_by"] == "the model before compression"
    assert record["before"]["timestamp_error_s"] == 0
    assert record["after"]["timestamp_error_s"] > 0


# ----------------------------------------------------------------------------- heads protected

HARD = {
    "tspar": tspar.Options(
        c1=9.0,
        c2=-3.0,
        rho=1.0,
        search=False,
        reg_mode="proximal",
        training=Training(steps=1, batch_size=2),
    ),
    "imp": imp.Options(
        share=0.9,
        target=0.9,
        training=Training(steps=0),
        recovery=Training(steps=1, batch_size=2),
    ),
    "wsap": wsap.Options(low=0.9, middle=0.9, high=0.9, recovery=Training(steps=1, batch_size=2)),
}
METHODS = {"tspar": tspar, "imp": imp, "wsap": wsap}


@pytest.fixture
def context(processor, clips, tmp_path) -> Context:
    two = read_manifest(clips)[:2]
    return Context(processor=processor, train=two, dev=two, run_dir=tmp_path / "run")


def zeros_of(model, heads) -> tuple[list[float], list[float]]:
    """Return the share of zeros in cross-attention weights: of these heads, and of the others."""
    own, rest = [], []
    for number, layer in enumerate(model.model.decoder.layers):
        attention = layer.encoder_attn
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weight = getattr(attention, part).weight.detach()
            weight = weight.T if part == "out_proj" else weight
            for head, rows in enumerate(weight.split(attention.head_dim)):
                which = own if [number, head] in heads else rest
                which.append(float((rows == 0).float().mean()))
    return own, rest


@pytest.mark.parametrize("method", HARD)
def test_protected_heads_lose_no_weight(method, make_whisper, context, rng):
    model = make_whisper(heads=4)
    every = all_heads(model)
    heads = sorted(every[i] for i in rng.permutation(len(every))[: int(rng.integers(1, 4))])
    model.generation_config.alignment_heads = heads
    options = replace(HARD[method], protect_alignment=True)
    METHODS[method].apply(copy.deepcopy(model), HARD[method], context)
    assert context.record[method]["pruned"]["zero_elements"] > 0.5
    slim = METHODS[method].apply(
        model, options, replace(context, run_dir=context.run_dir / "protected")
    )
    own, rest = zeros_of(slim, heads)
    assert set(own) == {0.0}
    assert np.mean(rest) > 0.5
    slim, moved = slimmed(slim)
    assert len(slim.generation_config.alignment_heads) == len(heads), "none was removed"
    assert not moved["stand_in"]


@pytest.mark.parametrize("method", HARD)
def test_protection_requires_alignment_heads(method, tiny_whisper, context, monkeypatch):
    monkeypatch.setattr(Context, "trained", None)  # fails before any training
    options = replace(HARD[method], protect_alignment=True)
    with pytest.raises(Problem, match="the model names no alignment heads"):
        METHODS[method].apply(tiny_whisper, options, context)


@pytest.mark.parametrize("mode", ["proximal", "subgradient"])
def test_penalties_do_not_change_protected_weights(mode, make_whisper, context):
    """Even very large penalties have no effect on them."""
    model = make_whisper(heads=4)
    model.generation_config.alignment_heads = [[0, 1], [1, 3]]
    guard = guards(model, True)
    options = replace(HARD["tspar"], reg_mode=mode, protect_alignment=True)
    if mode == "proximal":
        hook = tspar.proximal_hook(options, dict.fromkeys(tspar.lambdas_of(options), 1e3), guard)
        before = {name: m.weight.clone() for name, m in whisper.linears(model)}
        with torch.no_grad():
            hook(model, 0, 1.0)
        for name, module in whisper.linears(model):
            expected = before[name] * guard[name] if name in guard else 0 * before[name]
            assert module.weight.equal(expected)
    else:
        sums = tspar.penalties(model, options, guard)
        torch.stack(list(sums.values())).sum().backward()
        for name, module in whisper.linears(model):
            inside = guard.get(name, torch.zeros_like(module.weight, dtype=torch.bool))
            assert (module.weight.grad[inside] == 0).all()
            assert (module.weight.grad[~inside] != 0).all()


def test_the_shared_factor_of_a_low_rank_layer_is_protected(make_whisper):
    model = make_whisper(heads=4)
    attention = model.model.decoder.layers[0].encoder_attn
    for part in ("k_proj", "out_proj"):
        old = getattr(attention, part)
        down, up = nn.Linear(32, 8, bias=False), nn.Linear(8, 32, bias=old.bias is not None)
        setattr(attention, part, whisper.LowRank(down, up))
    model.generation_config.alignment_heads = [[0, 2]]
    masks = guards(model, True)
    assert {name.partition("encoder_attn.")[2] for name in masks} == {
        *("q_proj", "v_proj", "k_proj.down", "k_proj.up", "out_proj.down", "out_proj.up"),
    }
    prefix = "model.decoder.layers.0.encoder_attn."
    assert masks[prefix + "k_proj.down"].all() and masks[prefix + "out_proj.up"].all()
    assert masks[prefix + "k_proj.up"].any(dim=1).nonzero().flatten().tolist() == [*range(16, 24)]
    assert masks[prefix + "out_proj.down"].any(dim=0).nonzero().flatten().tolist() == [
        *range(16, 24)
    ]
    assert set(masks) <= {name for name, _ in whisper.linears(model)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({}, "there are no clips", id="none"),
        pytest.param(dict(words=()), "clip 1 has no words", id="no words"),
        pytest.param(
            dict(pcm=np.zeros(7 * 16000, np.float32)),
            "clip 1 lasts 7.00 s, the model's window 6 s",
            id="too long",
        ),
    ],
)
def test_unusable_clips_raise_a_problem(change, message, tiny_whisper, processor, spoken):
    clips = [replace(spoken, **change)] if change else []
    with pytest.raises(Problem, match=message):
        head_scores(tiny_whisper, processor, clips)
    with pytest.raises(Problem, match=message):
        timestamp_error_s(tiny_whisper, processor, clips, [[0, 0]])
