"""Measure the memory for calibrating low-rank layers at the dimensions of Whisper large-v3.

    python -m benchmarks.study.calibration_memory [--layers 32] [--positions 150]

The statistics of 32 layers are collected in one pass. A layer needs four matrices of 1280 x 1280
float64, 52 MB: for the common input of q, k and v, the inputs of out_proj and fc1, and the output
of fc2. A matrix for the input of fc2 would have 5120 x 5120 numbers, 210 MB, but only the
covariance of its outputs is needed. Storing the activations of the paper's 100 clips in float32
would take 221 GB.

All layers share one layer's weights, so that the measurement covers calibration and not the model:
the process has torch, one layer, one window and the sums in memory. With a short window it takes
seconds. --positions 1500 is Whisper's window and adds the activations of one window. The weights
and features are random.
"""

import argparse
import copy
import json
import resource
import sys
import time
from types import SimpleNamespace

WIDTH, HEADS, FFN, LAYERS = 1280, 20, 5120, 32
WINDOWS, POSITIONS = 100, 1500


def peak_bytes() -> int:
    """Return the peak memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def model_of(layers: int, positions: int):  # type: ignore[no-untyped-def] # torch is imported below
    """Return an encoder with large-v3's dimensions whose layers share one layer's weights."""
    import torch
    from transformers import WhisperConfig

    from edgewhisper.whisper import WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=WIDTH,
        encoder_layers=1,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=FFN,
        num_mel_bins=128,
        max_source_positions=positions,
        decoder_layers=1,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=16,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    model = WhisperForConditionalGeneration(config).eval()
    first = model.model.encoder.layers[0]
    shared = {id(parameter): parameter for parameter in first.parameters()}
    more = [copy.deepcopy(first, dict(shared)) for _ in range(layers - 1)]
    model.model.encoder.layers = torch.nn.ModuleList([first, *more])
    return model


def measure(layers: int, positions: int) -> dict[str, float | int]:
    """Calibrate on one window and return sizes in bytes and the time in seconds."""
    import torch

    from edgewhisper.calibration import Window, collect
    from edgewhisper.compress.lite import chosen
    from edgewhisper.compress.output_statistics import observation_points

    model = model_of(layers, positions)
    window = Window(torch.randn(1, 128, 2 * positions), positions)
    speech = SimpleNamespace(clips=[window], windows=lambda model, decoder: [window])
    with torch.no_grad():  # the memory of a window without statistics
        model.model.encoder(window.features)
    points = observation_points(model, chosen(model, "model.encoder.layers.*"))
    started = time.monotonic()
    moments = collect(model, dict.fromkeys(points.values()), speech)  # type: ignore[arg-type]
    return {
        "layers": layers,
        "positions": positions,
        "matrices": len(moments),
        "moments_bytes": sum(m.products.nbytes + m.total.nbytes for m in moments.values()),
        "peak_rss_bytes": peak_bytes(),
        "seconds": time.monotonic() - started,
        "stored_activations_bytes": 4
        * layers
        * WINDOWS
        * POSITIONS
        * sum((WIDTH, WIDTH, WIDTH, WIDTH, FFN, WIDTH)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument(
        "--positions", type=int, default=150, help="positions of a window; Whisper has 1500"
    )
    given = parser.parse_args()
    sizes = measure(given.layers, given.positions)
    print(
        f"{sizes['layers']} layers, {sizes['matrices']} matrices: "
        f"{sizes['moments_bytes'] / 1e9:.2f} GB of sums; "
        f"peak of the whole process {sizes['peak_rss_bytes'] / 1e9:.2f} GB, "
        f"{sizes['seconds']:.0f} s for one window of {sizes['positions']} positions"
    )
    print(
        f"stored activations of {WINDOWS} windows: {sizes['stored_activations_bytes'] / 1e9:.0f} GB"
    )
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
