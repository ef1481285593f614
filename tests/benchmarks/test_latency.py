"""Latency tables: operator costs on a device, and predicted times of models."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
from fake_device import FakeDevice
from made_results import make_result
from made_table import make_table

from benchmarks import calibrate_latency as calibration
from benchmarks import latency
from benchmarks.latency import STAGES, Correction, Cost
from benchmarks.study import latency_check
from devices.device import Finished, Place
from devices.runner.measure.probe import probe_all
from devices.runner.problem import RunnerProblem
from edgewhisper import inspect, pipeline
from edgewhisper.whisper import WhisperForConditionalGeneration, load
from export.cost import macs
from export.onnx import probes
from export.onnx.layouts.native import decoder_graph, encoder_graph
from export.onnx.operators import (
    EMPTY,
    KINDS,
    Operator,
    encoder_operators,
    of_a_token,
    shapes_of,
    token_operators,
    work,
)
from export.problem import Problem

UNIT = {kind: Cost(0.0, s_per_mac=1.0) for kind in KINDS if kind != "log_mel"}
"""One second per multiply-accumulate, without the front end, which cost.py does not count."""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty user cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/edgewhisper/latency"


def layer(heads: int, qk: int, v: int, units: int, **ranks: int) -> dict:
    attention = {"heads": heads, "qk_dim": qk, "v_dim": v}
    named = {name.replace("__", "."): rank for name, rank in ranks.items()}
    return {"self_attn": attention, "encoder_attn": attention, "ffn": units, "ranks": named}


def slim(model, encoder: list[dict], decoder: list[dict], **more):
    """Return a model with other shapes and random weights."""
    config = copy.deepcopy(model.config)
    own = [
        {name: entry for name, entry in one.items() if name != "encoder_attn"} for one in encoder
    ]
    config.edgewhisper = {"format": 1, "encoder": own, "decoder": decoder, **more}
    found = WhisperForConditionalGeneration(config).eval()
    found.generation_config = model.generation_config
    return found


@pytest.fixture
def irregular(make_whisper):
    """A model whose heads, widths and ranks differ by layer, with a factorised token table."""
    low = {"self_attn__q_proj": 3, "fc1": 5}
    return slim(
        make_whisper(ffn=2000),
        [layer(2, 5, 11, 31, **low), layer(1, 16, 16, 2000)],
        [layer(1, 8, 8, 40, **low, self_attn__k_proj=4), layer(2, 7, 12, 9, fc2=6)],
        token_rank=6,
    )


# -------------------------------------------------------------------------------------------- fit


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_fit_recovers_the_costs_of_generated_times(precision, rng):
    expected, times = {}, {Operator(EMPTY, (1,)): 4e-5, Operator(EMPTY, (100,)): 7e-6}
    for kind in KINDS:
        drawn = 10 ** rng.uniform(-1, 1, 3) * [1e-5, 1e-11, 1e-10]
        expected[kind] = drawn
        for sizes in probes.GRIDS[kind]:
            operator = Operator(kind, sizes)
            alone = times[Operator(EMPTY, (1,) if of_a_token(operator) else (100,))]
            times[operator] = alone + float(np.dot(calibration.row(operator, precision), drawn))
    found = calibration.fit(times, precision)
    assert found["token"].overhead_s == 4e-5 and found["encoder"].overhead_s == 7e-6
    for kind, (overhead, a_mac, a_byte) in expected.items():
        cost = found[kind]
        assert max(map(abs, cost.residuals)) < 1e-3
        assert cost.s_per_byte == pytest.approx(a_byte, rel=1e-2)
        if any(work(Operator(kind, sizes), precision).macs for sizes in probes.GRIDS[kind]):
            assert cost.s_per_mac == pytest.approx(a_mac, rel=1e-2)
        for sizes in probes.GRIDS[kind]:
            done = work(Operator(kind, sizes), precision)
            right = overhead + a_mac * done.macs + a_byte * done.bytes
            assert cost.seconds(*done) == pytest.approx(right, rel=1e-3)


def test_no_cost_is_below_zero(rng):
    """Times that decrease with more work are noise."""
    rows = np.array([[1, 10.0, 5.0], [1, 100.0, 7.0], [1, 1000.0, 9.0]])
    cost = calibration.fit_kind(rows, np.sort(rng.uniform(1, 2, 3))[::-1], np.zeros(3))
    assert min(cost.overhead_s, cost.s_per_mac, cost.s_per_byte) >= 0
    assert len(cost.residuals) == 3 and max(map(abs, cost.residuals)) > 0


# ---------------------------------------------------------------------------------------- predict


def test_a_prediction_equals_the_sum_computed_by_hand(tiny_whisper):
    """All layers have two heads of widths 5 and 11, 31 units, and fc1 of rank 5; d_model is 32, the
    window 300, the vocabulary 783, and keys are padded to 16."""
    model = slim(tiny_whisper, [layer(2, 5, 11, 31, fc1=5)] * 2, [layer(2, 5, 11, 31, fc1=5)] * 2)
    a_layer = 32 * 10 * 2 + 32 * 22 + 22 * 32 + 32 * 5 + 5 * 31 + 31 * 32
    window = 300 * 2 * a_layer + 2 * 300**2 * 2 * 16 + 2 * 300 * 32 * (10 + 22)
    window += 3 * 32 * (600 * 80 + 300 * 32)
    crossing = 32 * 10 + 22 * 32 + 2 * 300 * 2 * 16
    token = 2 * (a_layer + 2 * 32 * 2 * 16 + crossing) + 783 * 32
    table = make_table(UNIT)
    assert latency.stages(table, shapes_of(model)) == {"encoder": window, "token": token}
    assert latency.predict(table, model) == window + 32 * token
    assert latency.predict(table, model, tokens=5) == window + 5 * token
    twice = {"encoder": Correction(2.0, 1), "token": Correction(3.0, 1)}
    corrected = replace(table, corrections=twice)
    assert latency.predict(corrected, model) == 2 * window + 32 * 3 * token


def test_multiply_accumulates_equal_those_of_export_cost(make_whisper, rng):
    width = 8 * int(rng.integers(1, 5))
    dense = make_whisper(d_model=2 * width, ffn=int(rng.integers(40, 200)), encoder_layers=3)
    rank = int(rng.integers(1, 8))
    low = layer(1, width, width, 33, fc1=rank, fc2=rank, encoder_attn__q_proj=rank)
    own = {name: r for name, r in low["ranks"].items() if "encoder_attn" not in name}
    both = slim(dense, [low | {"ranks": own}] * 3, [low] * 2, token_rank=rank)
    for model in (dense, both):
        counted, found = macs(model), latency.uncorrected(make_table(UNIT), shapes_of(model))
        assert found["encoder"] == counted["encoder"] + counted["cross"]
        assert found["token"] == counted["decoder_per_token"]


def test_operators_match_the_nodes_of_the_graphs(irregular, processor):
    """The numbers of nodes agree, in a model whose hidden units are computed in pieces."""
    encoder = encoder_graph(irregular, processor.feature_extractor, "int8")[0]
    nodes = Counter(
        node.op_type for node in encoder._nodes if not node.name.startswith(("stem", "log_mel"))
    )
    found = Counter(operator.kind for operator in encoder_operators(shapes_of(irregular)))
    assert found["linear"] == nodes["DynamicQuantizeMatMul"] + nodes["MatMulIntegerToFloat"]
    assert found["norm"] == nodes["LayerNormalization"]
    assert found["gelu"] == nodes["Gelu"] > 2, "in pieces"
    assert found["attention"] == nodes["MultiHeadAttention"]
    assert found["keys"] == nodes["QuantizeLinear"]
    assert found["pad"] == nodes["Pad"] - found["keys"] == 2

    nodes = Counter(node.op_type for node in decoder_graph(irregular, "int8")[0]._nodes)
    found = Counter(operator.kind for operator in token_operators(shapes_of(irregular)))
    assert found["product"] == nodes["DynamicQuantizeMatMul"] + nodes["MatMul"]
    assert found["past"] + found["cross"] == nodes["GroupQueryAttention"]
    assert found["logits"] == nodes["QGemm"]
    assert found["norm"] == nodes["LayerNormalization"]
    assert found["gelu"] == nodes["Gelu"]
    own_cuts = nodes["Slice"] - 2  # the others take the positions, and the last token
    again = 2  # of the queries of cross-attention, which stand for keys and values, too
    assert found["pad"] == nodes["Pad"] - again + own_cuts


@pytest.mark.parametrize(
    ("smaller", "stage"),
    [
        pytest.param({"heads": 1}, "both", id="heads"),
        pytest.param({"qk_dim": 16}, "both", id="width of keys"),
        pytest.param({"units": 24}, "both", id="units"),
        pytest.param({"rank": 4}, "both", id="rank"),
        pytest.param({"token_rank": 3}, "token", id="token table"),
        pytest.param({"layers": 1}, "both", id="layers"),
    ],
)
def test_a_smaller_model_has_a_smaller_prediction(smaller, stage, make_whisper, rng):
    """It holds for any device, with a rank that already reduces the work."""
    costs = {kind: Cost(0.0, *10 ** rng.uniform(-12, -9, 2)) for kind in [*STAGES, *KINDS]}
    usual = {"heads": 2, "qk_dim": 24, "units": 64, "rank": 7, "token_rank": 6, "layers": 2}

    def predicted(heads, qk_dim, units, rank, token_rank, layers):
        model = make_whisper(d_model=48, ffn=64, encoder_layers=layers, decoder_layers=layers)
        one = layer(heads, qk_dim, qk_dim, units, fc2=rank, self_attn__v_proj=rank)
        found = slim(model, [one] * layers, [one] * layers, token_rank=token_rank)
        return latency.stages(make_table(costs), shapes_of(found))

    before, after = predicted(**usual), predicted(**usual | smaller)
    assert after["token"] < before["token"]
    assert after["encoder"] < before["encoder"] if stage == "both" else True


# ---------------------------------------------------------------------------------------- measure


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_the_runner_times_every_microbenchmark(precision, tmp_path):
    for kind, grid in probes.GRIDS.items():
        prefix = latency.GRAPHS[of_a_token(Operator(kind, grid[0]))]
        probes.write(tmp_path, f"{prefix}-{kind}", Operator(kind, grid[0]), precision)
    answer = probe_all(tmp_path, threads=1)
    assert len(answer["probes"]) == len(probes.GRIDS)
    assert all(calibration.are_times(times) for times in answer["probes"].values())


def test_a_folder_without_graphs_is_refused(tmp_path):
    with pytest.raises(RunnerProblem, match="there are no graphs to time"):
        probe_all(tmp_path)


def test_this_machine_is_calibrated(monkeypatch):
    """Calibration runs with two sizes of every operator."""
    few = {kind: sizes[:2] for kind, sizes in probes.GRIDS.items()}
    monkeypatch.setattr(probes, "GRIDS", few)
    monkeypatch.setattr(calibration, "ROUNDS", 1)
    progress: list[str] = []
    table = calibration.calibrate(Place("local"), "int8", 1, progress.append)
    assert (table.device, table.precision, table.threads) == ("local", "int8", 1)
    assert latency.parsed(json.loads(json.dumps({"format": 1, **asdict(table)}))) == table
    assert all(0 < table.operators[stage].overhead_s < 0.1 for stage in STAGES)
    assert progress[0] == f"local: {2 * len(few)} microbenchmarks in int8 on 1 thread"
    assert {row["operator"] for row in latency.rows_of(table)} == {*STAGES, *KINDS}


WANTED = {"encoder-000": (Operator(EMPTY, (100,)), "int8")}
GOOD = {"probes": {"encoder-000": [1e-5, 2e-5]}, "versions": {"onnxruntime": "1"}}


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(GOOD | {"probes": []}, id="no probes"),
        pytest.param(GOOD | {"probes": {}}, id="one missing"),
        pytest.param(GOOD | {"probes": GOOD["probes"] | {"more": [1e-5]}}, id="one too many"),
        *[
            pytest.param(GOOD | {"probes": {"encoder-000": times}}, id=name)
            for name, times in {
                "no list": 1e-5,
                "empty": [],
                "zero": [0.0],
                "negative": [-1e-5],
                "not a number": [float("nan")],
                "infinite": [float("inf")],
                "a day": [86400.0],
                "words": ["1e-5"],
                "a truth": [True],
                "too many": [1e-5] * 1001,
            }.items()
        ],
        pytest.param(GOOD | {"versions": None}, id="no versions"),
        pytest.param(GOOD | {"versions": {"onnxruntime": 1}}, id="a version that is a number"),
    ],
)
def test_an_invalid_answer_is_refused(answer):
    device = FakeDevice(replies=[Finished(0, json.dumps(answer), "")])
    with pytest.raises(
        Problem, match="fake: the runner's answer has no usable times of 1 microbenchmarks"
    ):
        calibration.run_all(device, WANTED, 1)
    assert (
        calibration.run_all(FakeDevice(replies=[Finished(0, json.dumps(GOOD), "")]), WANTED, 1)
        == GOOD
    )


def test_an_emulated_device_gives_no_table(monkeypatch):
    device = FakeDevice(machine={"emulated": True, "cores": 4})
    monkeypatch.setattr(calibration, "open_device", lambda *place, say: device)
    with pytest.raises(Problem, match="rpi5 pi@five is emulated") as error:
        calibration.calibrate(Place("rpi5", "pi@five"))
    assert "--device local" in error.value.hint
    assert ("push", "probes") not in device.calls


def test_an_unknown_precision_is_refused():
    with pytest.raises(Problem, match="unknown ONNX precision 'pal4'"):
        calibration.calibrate(Place("local"), "pal4")


def test_inspect_times_matrix_products_as_microbenchmarks(exported):
    """A float32 artifact's minimum time comes from the float32 microbenchmark."""
    timed = inspect.time_artifact(exported, 1.0, threads=1)
    assert timed["machine"]["macs_per_s"].keys() == {"fp32", "int8"}
    assert all(rate > 1e8 for rate in timed["machine"]["macs_per_s"].values())


# ---------------------------------------------------------------------------------------- correct


@pytest.fixture
def benched(exported, digits):
    """A table, its prediction for the embedded model in float32, and a result.

    The result's encoder took 1.5 times, its tokens 3 times as long as predicted.
    """
    costs = {kind: Cost(1e-6, 1e-11, 1e-10) for kind in [*STAGES, *KINDS]}
    table = make_table(costs, precision="fp32")
    sums = latency.uncorrected(table, shapes_of(load(digits)))
    (name,) = latency.artifacts_in([exported.parent])
    result = make_result(
        artifact_hash=name,
        precision="fp32",
        threads=4,
        device={"name": "rpi5", "cpu": "a CPU", "emulated": False},
        mel_s=[0.5 * sums["encoder"]] * 30,
        encoder_s=[sums["encoder"]] * 30,
        per_token_s=[3 * sums["token"]] * 30,
    )
    return table, sums, result


def test_results_of_bench_correct_the_table(benched, exported, digits):
    table, sums, result = benched
    shapes = latency.artifacts_in([exported.parent])
    corrected = latency.correct(table, [result], shapes)
    assert corrected.corrections["encoder"].factor == pytest.approx(1.5)
    assert corrected.corrections["token"].factor == pytest.approx(3)
    expected = 1.5 * sums["encoder"] + 32 * 3 * sums["token"]
    assert latency.predict(corrected, load(digits)) == pytest.approx(expected)
    slower = copy.deepcopy(result)
    slower["medians"]["per_token_s"] *= 2
    again = latency.correct(corrected, [result, slower, slower], shapes)
    assert again.corrections["token"] == Correction(pytest.approx(6), 3), (
        "of the sum, not of itself"
    )
    assert "token times 6.00" in latency.summary(again)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"threads": 2}, id="threads"),
        pytest.param({"precision": "int8"}, id="precision"),
        pytest.param({"emulated": True}, id="emulated"),
        pytest.param({"rival": "transformers"}, id="a rival"),
        pytest.param({"artifact_hash": "b" * 64}, id="an artifact that is not there"),
        pytest.param({"medians": {"per_token_s": 0.1}}, id="stages missing"),
        pytest.param({"device": {"name": "rpi4", "cpu": "a CPU"}}, id="another device"),
        pytest.param({"device": {"name": "rpi5", "cpu": "another"}}, id="another CPU"),
        pytest.param({"device": {}}, id="no device"),
    ],
)
def test_results_of_other_measurements_do_not_correct_the_table(other, benched, exported):
    table, _, result = benched
    assert (
        latency.correct(table, [result | other], latency.artifacts_in([exported.parent])) is table
    )


def test_artifacts_with_several_windows_do_not_correct_the_table(benched, exported):
    table, _, result = benched
    shapes = latency.artifacts_in([exported.parent])
    several = {n: replace(s, layers={**s.layers, "windows": [100, 300]}) for n, s in shapes.items()}
    assert latency.correct(table, [result], several) is table


def test_an_artifact_has_the_shapes_of_its_model(exported, digits, tmp_path):
    (found,) = latency.artifacts_in([exported.parent]).values()
    assert found == shapes_of(load(digits))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/manifest.json").write_text("{")
    assert latency.artifacts_in([tmp_path]) == {}


def test_calibrate_with_results_measures_nothing(benched, exported, cache, tmp_path):
    table, _, result = benched
    latency.write(table)
    path = exported.parent / "made.jsonl"
    path.write_text(json.dumps(result) + "\n")
    rows, sentence = pipeline.calibrate(Place("rpi5"), precision="fp32", results=[path])
    assert "corrected by 1 result (encoder times 1.50, token times 3.00)" in sentence
    assert latency.find_table("rpi5", "fp32").corrections["token"].results == 1
    assert len(rows) == len(KINDS) + 2
    path.write_text(json.dumps(result | {"threads": 1}) + "\n")
    with pytest.raises(
        Problem, match="none of 1 results fits the latency table of rpi5, fp32, 4 threads"
    ):
        pipeline.calibrate(Place("rpi5"), precision="fp32", results=[path])


def test_bench_results_correct_the_stored_tables(benched, exported, cache):
    table, _, result = benched
    latency.write(table)
    (latency.path_of("", "", "").parent / "damaged.json").write_text("{")
    (corrected,) = latency.learn([result], [exported.parent])
    assert corrected.corrections["token"] == Correction(pytest.approx(3), 1)
    assert latency.find_table("rpi5", "fp32") == corrected
    assert latency.learn([result], [exported.parent]) == []
    disturbed = result | {"unstable_because": ["the load average was 9.0 on 2 cores"]}
    latency.write(table)
    assert latency.learn([disturbed], [exported.parent]) == []


def test_errors_are_relative_to_the_measured_times(benched, exported):
    table, sums, result = benched
    shapes = latency.artifacts_in([exported.parent])
    (found,) = latency_check.errors_of(table, [result], shapes)
    assert found["measured", "token"] == pytest.approx(3 * sums["token"])
    assert found["sum", "encoder"] == pytest.approx(1 / 1.5 - 1)
    assert found["corrected", "encoder"] == pytest.approx(0)
    first = latency_check.rows_of(["made"], [[found], [found]])[0]
    assert first["error of the sum %"] == "-33 (-33 to -33)"


def test_the_checked_models_can_be_built(digits):
    for shapes in latency_check.SLIM.values():
        config = load(digits).config
        config.edgewhisper = {"format": 1, **copy.deepcopy(shapes)}
        stages = latency.uncorrected(make_table(UNIT), shapes_of(load(digits)))
        slim = shapes_of(WhisperForConditionalGeneration(config))
        assert latency.uncorrected(make_table(UNIT), slim)["token"] < stages["token"]


# -------------------------------------------------------------------------------------- the table


def test_a_stored_table_is_read_unchanged(cache):
    table = make_table({"linear": Cost(1e-6, 1e-11, 1e-10, [0.1, -0.2])})
    assert latency.write(table) == cache / "rpi5-int8-4.json"
    assert latency.find_table("rpi5") == table
    newer = replace(table, threads=1, measured_at="2026-02-02T00:00:00+00:00")
    latency.write(newer)
    assert latency.find_table("rpi5") == newer
    assert latency.find_table("rpi5", threads=4) == table


@pytest.mark.parametrize(
    ("asked", "command"),
    [
        (("rpi5",), "--device rpi5 --host USER@HOST"),
        (("rpi",), "--device rpi4 --host USER@HOST"),
        (("local", "fp32", 2), "--device local --precision fp32 --threads 2"),
    ],
)
def test_the_error_for_a_missing_table_has_the_command(asked, command, cache):
    with pytest.raises(Problem, match="there is no latency table of") as error:
        latency.find_table(*asked)
    assert error.value.hint == f"measure it: edgewhisper devices calibrate {command}"


def damaged(entry: dict, *path: str, value: object) -> str:
    """Return a table as text with one value changed."""
    place = entry
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return json.dumps(entry)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 2),
        (("more",), 1),
        (("threads",), 0),
        (("threads",), True),
        (("precision",), "pal4"),
        (("device",), None),
        (("machine", "emulated"), True),
        (("machine",), []),
        (("operators", "linear", "s_per_mac"), -1e-12),
        (("operators", "linear", "s_per_mac"), float("nan")),
        (("operators", "linear", "s_per_byte"), "fast"),
        (("operators", "linear", "residuals"), [None]),
        (("operators", "linear", "more"), 1),
        (("operators", "telepathy"), {"overhead_s": 0.0}),
        (("operators",), {}),
        (("operators",), None),
        (("corrections", "token", "factor"), 0.0),
        (("corrections", "token", "factor"), float("inf")),
        (("corrections",), {}),
    ],
)
def test_a_damaged_table_is_refused(path, value, cache):
    entry = {"format": 1, **asdict(make_table())}
    file = latency.write(make_table())
    file.write_text(damaged(entry, *path, value=value))
    with pytest.raises(Problem, match=r"rpi5-int8-4\.json is not a latency table of") as error:
        latency.find_table("rpi5")
    assert "devices calibrate" in error.value.hint


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, "x" * 2_000_000])
def test_a_file_without_a_table_is_refused(text, cache):
    latency.write(make_table()).write_text(text)
    with pytest.raises(Problem, match="is not a latency table"):
        latency.find_table("rpi5")
