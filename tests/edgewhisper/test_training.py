"""The training loop: its loss, its options, and resumption bit for bit."""

import copy
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from benchmarks.speech.clips import Clip, read_manifest
from edgewhisper import whisper
from edgewhisper.examples import Examples
from edgewhisper.resume import Interrupted
from edgewhisper.training import Training, initial_loss, learning_rate, train
from export.problem import Problem

SHORT = Training(steps=4, batch_size=3, learning_rate=1e-3, noise_snr_db=10.0, mask_mels=5)


@pytest.fixture
def few(clips: Path) -> list[Clip]:
    return read_manifest(clips)[:5]


@pytest.fixture
def model(make_whisper: Callable):
    return make_whisper(d_model=16, ffn=16, encoder_layers=1, decoder_layers=1)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def twin(model):
    return copy.deepcopy(model)


# -------------------------------------------------------------------------- loss and options


def test_the_embedded_model_has_a_low_loss_on_its_training_speech(digits, processor, clips):
    loss = initial_loss(
        whisper.load(digits), processor, read_manifest(clips), Training(), batches=1
    )
    assert loss < 1.0


def test_the_loss_equals_that_of_transformers(model, processor, few, tmp_path):
    options = Training(steps=1, batch_size=4)
    batch = Examples(few, model, processor, seed=0)[range(4)]
    expected = model(
        batch.input_features, labels=batch.labels, decoder_input_ids=batch.decoder_input_ids
    )
    log = train(model, processor, few, options, run_dir=tmp_path)
    assert log.losses[0] == pytest.approx(expected.loss.item(), rel=1e-5)


def test_clips_longer_than_the_window_are_left_out_and_counted(model, processor, few, tmp_path):
    soundfile.write(tmp_path / "long.wav", np.zeros(7 * 16_000), 16_000)
    clips = [*few, Clip(audio=tmp_path / "long.wav", text="one")]
    with pytest.warns(UserWarning, match="1 of 6 clips are longer than the window of 6 s"):
        log = train(model, processor, clips, replace(SHORT, steps=1), run_dir=tmp_path)
    assert (log.clips, log.skipped) == (5, 1)


def test_zero_steps_change_nothing(model, processor, few, tmp_path):
    before = weights(model)
    assert train(model, processor, few, replace(SHORT, steps=0), run_dir=tmp_path).losses == []
    assert same_bits(weights(model), before)


def test_the_loss_falls(model, processor, few, tmp_path):
    log = train(
        model,
        processor,
        few[:2],
        Training(steps=20, batch_size=2, learning_rate=0.01),
        run_dir=tmp_path,
    )
    assert log.losses[-1] < 0.7 * log.losses[0]
    assert log.summary()["steps"] == 20


def test_the_result_depends_only_on_the_seed(model, processor, few, tmp_path, seed):
    results = []
    for number, chosen in enumerate((seed, seed, seed + 1)):
        copy = twin(model)
        train(copy, processor, few, SHORT, run_dir=tmp_path / str(number), seed=chosen)
        results.append(weights(copy))
    assert same_bits(results[0], results[1])
    assert not same_bits(results[0], results[2])


def test_passes_of_a_batch_give_the_gradient_of_the_batch(
    model, processor, few, tmp_path, monkeypatch
):
    # SGD, because Adam amplifies the rounding of gradients near zero to whole steps
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, weight_decay: torch.optim.SGD(p, lr=0))
    options = replace(SHORT, learning_rate=0.1)
    one, three = twin(model), twin(model)
    train(one, processor, few, options, run_dir=tmp_path / "one")
    train(three, processor, few, replace(options, accumulate=3), run_dir=tmp_path / "three")
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(three)[name], tensor, rtol=1e-5, atol=1e-5)
    moved = [(weights(one)[name] - before).abs().max() for name, before in weights(model).items()]
    assert max(moved) > 1e-2


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_data_workers_do_not_change_the_result(model, processor, few, tmp_path, one_thread):
    one, two = twin(model), twin(model)
    train(one, processor, few, SHORT, run_dir=tmp_path / "one")
    train(two, processor, few, replace(SHORT, workers=1), run_dir=tmp_path / "two")
    assert same_bits(weights(one), weights(two))


def test_the_loss_term_is_added_and_the_hook_runs_after_every_step(model, processor, few, tmp_path):
    calls = []
    plain = train(twin(model), processor, few, SHORT, run_dir=tmp_path / "plain")
    log = train(
        model,
        processor,
        few,
        SHORT,
        run_dir=tmp_path / "hooked",
        loss_term=lambda model, batch, outputs: outputs.logits.sum() * 0 + 2.5,
        after_step=lambda model, step, rate: calls.append((step, rate)),
    )
    assert log.losses == pytest.approx([loss + 2.5 for loss in plain.losses], rel=1e-5)
    assert calls == [(step, learning_rate(step, SHORT)) for step in range(4)]


def test_training_in_bf16_returns_a_float32_model(model, processor, few, tmp_path):
    train(model, processor, few, replace(SHORT, precision="bf16"), run_dir=tmp_path)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert "forward" not in vars(model)  # accelerate's wrapper was removed


def test_the_models_own_dropout_is_replaced_and_restored(model, processor, few, tmp_path):
    model.model.encoder.layers[0].dropout = 0.3
    rates = []
    train(
        model,
        processor,
        few,
        replace(SHORT, steps=1, dropout=0.1),
        run_dir=tmp_path,
        after_step=lambda m, *_: rates.append(m.model.encoder.layers[0].dropout),
    )
    assert (rates, model.model.encoder.layers[0].dropout) == ([0.1], 0.3)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_then_falls(schedule):
    options = Training(steps=100, warmup=0.1, learning_rate=1.0, schedule=schedule)
    rates = [learning_rate(step, options) for step in range(100)]
    assert rates[:11] == sorted(rates[:11]) and max(rates) == 1.0 == rates[10]
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == 1.0 if schedule == "constant" else rates[-1] < 0.02


# -------------------------------------------------------------------------------- stop and resume


def stop_after(step: int):
    """Return a hook that sends Ctrl-C after this step."""

    def hook(model, number, rate):
        if number == step:
            os.kill(os.getpid(), signal.SIGINT)

    return hook


def test_after_ctrl_c_the_training_resumes_bit_for_bit(model, processor, few, tmp_path, seed):
    whole, stopped = twin(model), twin(model)
    options = replace(SHORT, dropout=0.1)
    log = train(whole, processor, few, options, run_dir=tmp_path / "whole", seed=seed)
    run = tmp_path / "stopped"
    with pytest.raises(Interrupted, match="stopped after step 2 of 4") as caught:
        train(stopped, processor, few, options, run_dir=run, seed=seed, after_step=stop_after(0))
    assert "run the same command again" in caught.value.hint
    resumed = twin(model)  # a new process starts from the base model again
    again = train(resumed, processor, few, options, run_dir=run, seed=seed)
    assert again.resumed_at == [2]
    assert again.losses == log.losses
    assert same_bits(weights(resumed), weights(whole))


def test_ctrl_c_in_the_last_step_stops_the_run(model, processor, few, tmp_path):
    """Otherwise a recipe of short trainings could not be stopped."""
    whole = twin(model)
    train(whole, processor, few, SHORT, run_dir=tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped after step 4 of 4"):
        train(twin(model), processor, few, SHORT, run_dir=tmp_path, after_step=stop_after(3))
    assert train(model, processor, few, SHORT, run_dir=tmp_path).resumed_at == [4]
    assert same_bits(weights(model), weights(whole))


def test_a_killed_training_resumes_from_its_last_state_bit_for_bit(model, processor, few, tmp_path):
    def kill(model, number, rate):
        if number == 2:
            raise MemoryError("killed")

    options = replace(SHORT, checkpoint_steps=2)
    whole = twin(model)
    train(whole, processor, few, options, run_dir=tmp_path / "whole")
    with pytest.raises(MemoryError):
        train(twin(model), processor, few, options, run_dir=tmp_path / "run", after_step=kill)
    (tmp_path / "run" / "step-000000009.partial").mkdir()  # an incomplete state is ignored
    assert train(model, processor, few, options, run_dir=tmp_path / "run").resumed_at == [2]
    assert same_bits(weights(model), weights(whole))


def test_a_finished_training_is_not_repeated(model, processor, few, tmp_path):
    again = twin(model)
    first = train(model, processor, few, SHORT, run_dir=tmp_path)
    second = train(again, processor, few, SHORT, run_dir=tmp_path, after_step=stop_after(0))
    assert second.losses == first.losses
    assert same_bits(weights(model), weights(again))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000004"]


def test_the_state_of_another_training_is_refused(model, processor, few, tmp_path):
    train(twin(model), processor, few, SHORT, run_dir=tmp_path)
    with pytest.raises(Problem, match="holds the state of another training"):
        train(model, processor, few, replace(SHORT, learning_rate=2e-3), run_dir=tmp_path)


def test_a_state_that_cannot_be_read_is_named(model, processor, few, tmp_path):
    train(twin(model), processor, few, SHORT, run_dir=tmp_path)
    (tmp_path / "step-000000004" / "progress.json").write_text("{")
    with pytest.raises(Problem, match="step-000000004 cannot be read"):
        train(model, processor, few, SHORT, run_dir=tmp_path)


# ----------------------------------------------------------------------------------------- errors


def test_no_clips_raise_a_problem(model, processor, tmp_path):
    with pytest.raises(Problem, match="there are no clips to train on"):
        train(model, processor, [], SHORT, run_dir=tmp_path)


def test_only_long_clips_raise_a_problem(model, processor, few, tmp_path):
    long = [replace(clip, duration_s=6.5) for clip in few]
    with pytest.raises(Problem, match="all 5 clips are longer than the window of 6 s"):
        train(model, processor, long, SHORT, run_dir=tmp_path)


def test_a_loss_that_is_not_finite_raises_a_problem_with_the_step(model, processor, few, tmp_path):
    def term(model, batch, outputs):
        return outputs.logits.sum() * float("nan")

    with pytest.raises(Problem, match="the loss is nan at step 1 of 4, with learning rate") as e:
        train(model, processor, few, SHORT, run_dir=tmp_path, loss_term=term)
    assert "lower learning_rate" in e.value.hint


def test_a_batch_that_is_too_small_to_split_raises_a_problem(model, processor, few, tmp_path):
    with pytest.raises(Problem, match="batch_size 3 cannot be shared by 1 processes in 4 passes"):
        train(model, processor, few, replace(SHORT, accumulate=4), run_dir=tmp_path)


def test_an_unsupported_precision_raises_a_problem(model, processor, few, tmp_path, monkeypatch):
    def refuse(**options):
        raise ValueError("fp16 mixed precision requires a GPU")

    monkeypatch.setattr("accelerate.Accelerator", refuse)
    with pytest.raises(Problem, match=r"precision 'fp16' does not work here.*requires a GPU"):
        train(model, processor, few, replace(SHORT, precision="fp16"), run_dir=tmp_path)


# -------------------------------------------------------------- frozen parts and cheaper steps

FEW_STEPS = Training(steps=3, batch_size=2, learning_rate=1e-3)


def test_a_frozen_encoder_does_not_change(model, processor, few, tmp_path):
    before = weights(model)
    train(model, processor, few, replace(FEW_STEPS, encoder=False), run_dir=tmp_path)
    changed = {name for name, tensor in weights(model).items() if not tensor.equal(before[name])}
    assert changed
    assert not any(name.startswith("model.encoder.") for name in changed)
    assert all(p.requires_grad for p in model.model.encoder.layers.parameters())


def test_a_frozen_token_table_does_not_change(model, processor, few, tmp_path):
    before = weights(model)
    train(model, processor, few, replace(FEW_STEPS, token_table=False), run_dir=tmp_path)
    assert model.proj_out.weight.equal(before["proj_out.weight"])
    assert model.proj_out.weight.requires_grad
    assert not model.model.decoder.layers[0].fc1.weight.equal(
        before["model.decoder.layers.0.fc1.weight"]
    )


def test_the_states_of_a_frozen_encoder_are_computed_once_per_clip(model, processor, few, tmp_path):
    options = replace(FEW_STEPS, encoder=False, steps=10)
    plain = twin(model)
    train(plain, processor, few, options, run_dir=tmp_path / "plain")
    calls = []
    handle = model.model.encoder.register_forward_hook(lambda *a: calls.append(len(a[1][0])))
    log = train(
        model, processor, few, replace(options, cache_encoder=True), run_dir=tmp_path / "cached"
    )
    handle.remove()
    assert calls == [1] * len(few)
    assert len(log.losses) == 10
    for name, tensor in weights(model).items():
        assert torch.allclose(tensor, weights(plain)[name], atol=1e-3), name


def test_clips_with_noise_are_not_cached(model, processor, few, tmp_path):
    calls = []
    handle = model.model.encoder.register_forward_hook(lambda *a: calls.append(len(a[1][0])))
    options = replace(FEW_STEPS, encoder=False, cache_encoder=True, noise_snr_db=10.0, steps=4)
    train(model, processor, few, options, run_dir=tmp_path)
    handle.remove()
    assert calls == [2] * 4


def test_a_training_with_a_cached_encoder_resumes_bit_for_bit(model, processor, few, tmp_path):
    options = replace(
        FEW_STEPS, steps=6, encoder=False, cache_encoder=True, checkpoint_steps=1, windows="speech"
    )
    whole = twin(model)
    train(whole, processor, few, options, run_dir=tmp_path / "whole")

    def stop(model, step: int, rate: float) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = twin(model)
    with pytest.raises(Interrupted):
        train(stopped, processor, few, options, run_dir=tmp_path / "parts", after_step=stop)
    again = twin(model)
    train(again, processor, few, options, run_dir=tmp_path / "parts")
    assert same_bits(weights(again), weights(whole))


def test_speech_windows_add_up_to_a_second_and_every_eighth_is_full(model):
    from edgewhisper.examples import SpeechWindows

    rule = SpeechWindows(model)  # the model has 300 positions of 6 s; the unit is 5
    assert [rule(step, 100) for step in range(8)] == [105] * 7 + [300]
    assert [rule(0, needed) for needed in (1, 5, 6, 296, 300)] == [10, 10, 15, 300, 300]


def test_gradient_checkpointing_changes_no_result(model, processor, few, tmp_path):
    plain = twin(model)
    train(plain, processor, few, FEW_STEPS, run_dir=tmp_path / "plain")
    options = replace(FEW_STEPS, gradient_checkpointing=True)
    train(model, processor, few, options, run_dir=tmp_path / "checkpointing")
    for name, tensor in weights(model).items():
        assert torch.allclose(tensor, weights(plain)[name], atol=1e-5), name
    assert not model.is_activation_checkpointing


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(capsys, monkeypatch):
    from edgewhisper import progress

    clock = iter([0.0, 4.0, 12.0, 13.0, 23.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress_bar(10, "lite: calibrating", True) as show:
        for done in (1, 2, 3, 4):
            show(done, "loss 0.5")
    assert capsys.readouterr().err.splitlines() == [
        "lite: calibrating: 2 of 10, loss 0.5, about 48 s left",
        "lite: calibrating: 4 of 10, loss 0.5, about 34 s left",
    ]
