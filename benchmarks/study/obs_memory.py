"""Measure memory and time of `obs` at the dimensions of Whisper large-v3.

    python -m benchmarks.study.obs_memory build/random-large-v3 [--clips 2]

The weights are random and in float16. They are written to the folder once (3.1 GB) and stay there:
see edgewhisper/checkpoints/mapped.py. The first layer of the encoder and of the decoder is measured
on full windows with 24 tokens each. All layers have the same dimensions, so their time is that of
one layer times 32. The divergences are not measured: with them, every level that is tried takes a
pass through all later layers. The table of states stands for those of 100 windows, of which
branches.py leaves 400 MB each of inputs and outputs in memory.
"""

import argparse
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from transformers import WhisperConfig

from edgewhisper.calibration import Window
from edgewhisper.compress.branches import IN_MEMORY_BYTES, SIDES, branches_of
from edgewhisper.compress.curves import measure_part
from edgewhisper.compress.obs import Options
from edgewhisper.compress.walk import Walk
from edgewhisper.whisper import WhisperForConditionalGeneration, load

LAYERS, WIDTH, FFN = 32, 1280, 5120


def write_random(folder: Path) -> None:
    """Write a checkpoint of random weights."""
    config = WhisperConfig(
        **{f"{side}_layers": LAYERS for side in SIDES},
        **{f"{side}_attention_heads": 20 for side in SIDES},
        **{f"{side}_ffn_dim": FFN for side in SIDES},
        d_model=WIDTH,
        num_mel_bins=128,
        vocab_size=51866,
    )
    with torch.device("meta"):
        shapes = WhisperForConditionalGeneration(config).state_dict()
    del shapes["proj_out.weight"]
    tensors = {
        name: torch.ones(t.shape, dtype=torch.float16)
        if name.endswith("norm.weight")
        else torch.empty(t.shape, dtype=torch.float16).normal_(std=0.02)
        for name, t in shapes.items()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


class Memory:
    """Watches the memory of this process that is not in files (RssAnon of Linux)."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, self.bytes("RssAnon"))
            time.sleep(0.02)

    def bytes(self, field: str) -> int:
        """Return a field of /proc/self/status: RssAnon, or VmHWM, the peak with mapped files."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def windows(count: int) -> Iterator[Window]:
    for _ in range(count):
        yield Window(torch.randn(1, 128, 3000), 1500, torch.randint(50000, (1, 24)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=2)
    given = parser.parse_args()
    if not given.folder.exists():
        write_random(given.folder)
    memory, options, total_s = Memory(), Options(), 0.0
    model = load(given.folder, mapped=True)
    speech = SimpleNamespace(windows=lambda model, decoder: windows(given.clips))
    walk = Walk(model, speech)  # type: ignore[arg-type]
    states = torch.ones(2 * IN_MEMORY_BYTES // 4)  # float32
    for side in SIDES:
        if side == "decoder":
            walk.enter_decoder()
        for branch in branches_of(model, side):
            if branch.layer > 0:
                break
            started = time.process_time()
            measure_part(walk, branch, [], options)
            walk.move(branch)
            total_s += LAYERS * (spent_s := time.process_time() - started)
            print(f"{branch.name}: {spent_s:.1f} s, peak {memory.peak_bytes / 1e9:.2f} GB")
    print(
        f"{LAYERS} + {LAYERS} layers, {given.clips} clips: {total_s / 60:.0f} min of processor "
        f"time; peak {memory.peak_bytes / 1e9:.2f} GB, {memory.bytes('VmHWM') / 1e9:.2f} GB with "
        f"mapped files; {states.nbytes / 1e9:.1f} GB of it are states"
    )


if __name__ == "__main__":
    main()
