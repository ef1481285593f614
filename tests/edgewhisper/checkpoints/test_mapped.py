"""Models whose weights stay in their file: the same results, and a file that does not change."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.speech.clips import read_manifest
from edgewhisper import decoding, whisper
from edgewhisper.compress import obs
from edgewhisper.compress.context import Context
from export.problem import Problem


@pytest.fixture
def folder(digits, processor, tmp_path: Path) -> Path:
    """The embedded model in float16."""
    dense = whisper.load(digits)
    dense.config.__dict__.pop("edgewhisper", None)
    whisper.save(dense.half(), processor, tmp_path / "half")
    return tmp_path / "half"


def test_a_mapped_model_computes_in_float32(folder, processor, clips):
    pcm = read_manifest(clips)[0].pcm()
    mapped, loaded = whisper.load(folder, mapped=True), whisper.load(folder)
    assert mapped.model.encoder.layers[0].fc1.weight.dtype == torch.float16
    logits = [decoding.logits(m, processor, pcm, [1, 2, 3]) for m in (mapped, loaded)]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-4)


def test_obs_removes_the_same_from_a_mapped_model(folder, processor, clips, tmp_path):
    few = read_manifest(clips)[::40][:6]
    file = folder / "model.safetensors"
    before = file.read_bytes()
    # factorises layers
    options = obs.Options(remove=0.2, effect_clips=0, units=False, low_rank=True)
    models, records = [], []
    for mapped in (True, False):
        context = Context(processor=processor, train=few, dev=few, run_dir=tmp_path / "run")
        models.append(obs.apply(whisper.load(folder, mapped=mapped), options, context))
        records.append(context.record["obs"]["branches"])
    assert [r["after"] for r in records[0].values()] == [r["after"] for r in records[1].values()]
    assert any("rank" in branch["after"] for branch in records[0].values())
    one, other = (decoding.logits(m, processor, few[0].pcm(), [1, 2, 3]) for m in models)
    assert np.abs(one - other).max() < 0.02 * np.abs(other).max()
    whisper.save(models[0], processor, tmp_path / "pruned")
    assert file.read_bytes() == before
    again = whisper.load(tmp_path / "pruned").state_dict()
    assert all(again[name].equal(t.float()) for name, t in models[0].state_dict().items())


def test_a_compressed_model_and_a_missing_file_are_refused(folder, processor, tmp_path):
    slim = copy.deepcopy(whisper.load(folder))
    whisper.set_windows(slim.config, [50, slim.config.max_source_positions])
    whisper.save(slim, processor, tmp_path / "slim")
    with pytest.raises(Problem, match="only uncompressed models can stay in their file"):
        whisper.load(tmp_path / "slim", mapped=True)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(Problem, match=r"generation_config\.json is not valid JSON"):
        whisper.load(folder, mapped=True)
    (folder / "generation_config.json").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(Problem, match=r"model\.safetensors cannot be read"):
        whisper.load(folder, mapped=True)
