"""Contents and cost of a checkpoint or an artifact, and the time profile of an artifact.

Each measured time is compared with a floor: the minimum time for the same work on this machine,
computed from its measured rates for matrix products and memory copies.

    encoder   int8 multiply-accumulates / rate of a large int8 product
              + all others / rate of a large float32 product
    token     the larger of two times: to read the data of a step (weights, token table, keys and
              values) at the rate of a copy of that size, and to compute its products

The encoder's floor does not include the log-mel features.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.timing import summarise
from devices.device import RUNNER, run_runner, thread_option
from devices.local import LocalDevice
from devices.runner.artifact import manifest as contract
from devices.runner.artifact.graph_file import Constant, Parts, read_graph
from devices.runner.artifact.tensors import DTYPES
from export import artifact, layouts
from export.problem import Problem

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

TOKENIZER = ("token", "vocab", "merges", "normalizer", "added_tokens", "special_tokens")
"""Prefixes of the names of tokenizer files."""
INT8_TYPES, FLOAT16 = (2, 3), 10
COSTS = {"encoder", "cross", "decoder_per_token"}
PROBE = (1500, 1024)
"""Rows and width of the timed matrix product (rows, width) (width, width)."""
TIMEOUT_S = 600.0
MOST_ROWS = 8
"""Most windows in a table; artifacts for short clips have thirty."""


def inspect(source: str) -> dict[str, Any]:
    """Return the layer shapes, bytes of every part, parameters and multiply-accumulates. `source`
    is an artifact's directory, or a checkpoint as in `whisper.load`."""
    if (Path(source) / artifact.MANIFEST).exists():
        return inspect_artifact(Path(source))
    return inspect_checkpoint(source)


def inspect_checkpoint(source: str) -> dict[str, Any]:
    """Return the contents of a checkpoint, see `inspect`."""
    from edgewhisper import whisper
    from export.cost import count_parameters, macs_by_window
    from export.shrink import layer_shapes

    model = whisper.load(source)
    parts = weight_bytes(model)
    if Path(source).is_dir():
        sizes = {path.name: path.stat().st_size for path in Path(source).iterdir()}
        parts |= file_bytes(sizes, ("model.safetensors",))
    return {
        "kind": "checkpoint",
        "source": str(source),
        "precision": str(next(model.parameters()).dtype).removeprefix("torch."),
        "parameters": count_parameters(model)["total"],
        "macs_by_window": macs_by_window(model),
        "layers": layer_shapes(model),
        "bytes": parts,
    }


def weight_bytes(model: WhisperForConditionalGeneration) -> dict[str, int]:
    """Return the bytes of the weights of encoder, decoder and token table, each tensor once."""
    inner = model.model
    total = {id(p): p.numel() * p.element_size() for p in inner.decoder.parameters()}
    table = sum(p.numel() * p.element_size() for p in inner.decoder.embed_tokens.parameters())
    return {
        "encoder": sum(p.numel() * p.element_size() for p in inner.encoder.parameters()),
        "decoder": sum(total.values()) - table,
        "token table": table,
    }


def inspect_artifact(folder: Path) -> dict[str, Any]:
    """Return the contents of an artifact, see `inspect`. Its graphs are read but not run."""
    manifest = read_facts(folder)
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    sizes[artifact.MANIFEST] = (folder / artifact.MANIFEST).stat().st_size
    packages = {}
    if manifest.get("layout") in layouts.layouts_of("coreml"):
        from edgewhisper.coreml import read_packages

        packages = {"packages": read_packages(folder)}
    return packages | {
        "kind": "artifact",
        "source": str(folder),
        "layout": manifest.get("layout", "native"),
        "precision": manifest["precision"],
        "parameters": manifest["parameters"],
        "macs_by_window": manifest["macs_by_window"],
        "layers": manifest["layers"],
        "bytes": graph_bytes(folder, manifest) | file_bytes(sizes, tuple(graph_files(manifest))),
        "gate": manifest.get("gate"),
    }


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the manifest of an artifact of any layout. Raises Problem if an entry that `inspect`
    shows is missing or invalid."""
    path = folder / artifact.MANIFEST
    manifest = contract.read_json(path)
    if isinstance(manifest, dict) and manifest.get("layout", "native") in contract.LAYOUTS.values():
        manifest = contract.read_manifest(folder)
    else:
        manifest = artifact.read_manifest(folder)
        contract.check_facts(contract.Field(path, manifest))
    for name in ("precision", "parameters", "macs_by_window", "layers"):
        if manifest.get(name) is None:
            raise Problem(f"{path}: {name} is missing", hint=artifact.AGAIN)
    for window, macs in manifest["macs_by_window"].items():
        if not window.isdecimal() or not macs.keys() >= COSTS:
            raise Problem(f"{path}: no costs of the window {window[:40]!r}", hint=artifact.AGAIN)
    return manifest


def graph_files(manifest: dict[str, Any]) -> list[str]:
    """Return the names of the files with graphs and their weights."""
    suffixes = (".weights", ".bin", ".mlmodel", "mlpackage/Manifest.json")
    return [name for name in manifest["files"] if ".onnx" in name or name.endswith(suffixes)]


def graph_bytes(folder: Path, manifest: dict[str, Any]) -> dict[str, int]:
    """Return the bytes of the graphs. The native layout has entries for encoder, decoder and token
    table. Core ML artifacts have one for each package, and other layouts one for all graphs."""
    sizes = {name: manifest["files"][name]["bytes"] for name in graph_files(manifest)}
    if manifest.get("layout") in layouts.layouts_of("coreml"):
        from edgewhisper.coreml import package_bytes

        names = layouts.graph_files(manifest["layout"], manifest["precision"])
        return {name: package_bytes(manifest, name) for name in names}
    if "decoder.onnx" not in sizes or "encoder.onnx" not in sizes:
        return {"graphs": sum(sizes.values())}
    parts = read_graph(folder / "decoder.onnx", [folder / name for name in sizes])
    table = sum(constant.bytes for constant in token_table(parts, manifest))
    encoder = sum(size for name, size in sizes.items() if name.startswith("encoder"))
    return {
        "encoder": encoder,
        "decoder": sum(sizes.values()) - encoder - table,
        "token table": table,
    }


def token_table(parts: Parts, manifest: dict[str, Any]) -> list[Constant]:
    """Return the constants of the token table. These have a row or a scale for each token, or are
    shared by embedding and logits."""
    outputs = manifest["contract"]["decoder"]["outputs"]
    vocabulary = next(spec["shape"][-1] for spec in outputs if spec["name"] == "logits")
    readers = {
        part: {name for node in parts.nodes if node.name.startswith(part) for name in node.inputs}
        for part in ("look_up/", "logits/")
    }
    shared = readers["look_up/"] & readers["logits/"]
    return [
        constant
        for name, constant in parts.constants.items()
        if vocabulary in constant.dims or (name in shared and len(constant.dims) > 1)
    ]


def file_bytes(sizes: dict[str, int], weights: tuple[str, ...]) -> dict[str, int]:
    """Return the bytes of the tokenizer's files, and of all other files without weights."""
    rest = {Path(name).name: size for name, size in sizes.items() if name not in weights}
    tokenizer = sum(size for name, size in rest.items() if name.startswith(TOKENIZER))
    return {"tokenizer": tokenizer, "other files": sum(rest.values()) - tokenizer}


# ------------------------------------------------------------------------------------ the tables


def layer_rows(contents: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row for each layer: heads, key and value widths, units, ranks, inputs and bits."""
    rows = []
    for side in ("encoder", "decoder"):
        for number, shape in enumerate(contents["layers"][side]):
            row = {"layer": f"{side} {number}", "self-attention": heads(shape["self_attn"])}
            row["cross-attention"] = heads(shape["encoder_attn"]) if side == "decoder" else ""
            row["units"] = str(shape["ffn"])
            row |= {name: brief(shape.get(name) or {}) for name in ("ranks", "inputs", "bits")}
            rows.append(row)
    return rows


def heads(shape: dict[str, Any]) -> str:
    """Format heads and widths: 4 x 32, or 4 x 24/32 if keys and values differ in width."""
    widths = {shape["qk_dim"], shape["v_dim"]}
    each = f"{shape['qk_dim']}/{shape['v_dim']}" if len(widths) > 1 else f"{shape['qk_dim']}"
    return f"{shape['heads']} x {each}{' shared' if shape.get('shared') else ''}"


def brief(sizes: dict[str, int]) -> str:
    """Format sizes by layer: "q 8 fc1 4", or "all 8" if they are equal."""
    if len(sizes) > 1 and len(set(sizes.values())) == 1:
        return f"all {next(iter(sizes.values()))}"
    names = (name.split(".")[-1].removesuffix("_proj") for name in sizes)
    return " ".join(f"{name} {size}" for name, size in zip(names, sizes.values(), strict=True))


def size_rows(contents: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row for each part: size and share."""
    parts = contents["bytes"]
    total = sum(parts.values())
    return [
        {"part": name, "MB": f"{size / 1e6:.3f}", "share": f"{size / total:.1%}"}
        for name, size in [*parts.items(), ("total", total)]
    ]


def package_rows(contents: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row for each Core ML package: weight types and most frequent operations."""
    rows = []
    for name, package in contents["packages"].items():
        count = sum(package["weights"].values())
        operations = list(package["operations"].items())
        rows.append(
            {
                "package": name,
                "numbers": ", ".join(f"{n:,} {form}" for form, n in package["weights"].items()),
                "specification": str(package["specification_version"]),
                "bits each": f"{8 * contents['bytes'][name] / max(1, count):.1f}",
                "operations": str(sum(package["operations"].values())),
                "mostly": ", ".join(f"{n} {kind}" for kind, n in operations[:4]),
            }
        )
    return rows


def cost_rows(contents: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row for each window, at most MOST_ROWS: multiply-accumulates in millions."""
    windows = list(contents["macs_by_window"].items())
    step = -(-len(windows) // MOST_ROWS)
    return [
        {
            "window": f"{int(positions) / 50:g} s",
            "encoder MMAC": f"{macs['encoder'] / 1e6:.1f}",
            "cross MMAC": f"{macs['cross'] / 1e6:.1f}",
            "token MMAC": f"{macs['decoder_per_token'] / 1e6:.3f}",
        }
        for positions, macs in windows[(len(windows) - 1) % step :: step]
    ]


def time_rows(timed: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row for each part of the encoder and of the decoder: time and share."""
    return [
        {
            "graph": stage,
            "part": part,
            "ms": f"{1e3 * share * timed[stage]['measured_s']:.3f}",
            "share": f"{share:.1%}",
        }
        for stage in ("encoder", "token")
        for part, share in timed[stage]["shares"].items()
    ]


def unsure(timed: dict[str, Any], stage: str) -> str:
    """Return "~" if the times vary too much between windows, as in tables of results."""
    return "~" if summarise(timed[stage]["samples_s"], timed["windows"]).unstable else ""


def floor_rows(timed: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row for each graph: measured time, floor, their ratio, and the floor's cause."""
    return [
        {
            "graph": stage,
            "measured ms": f"{unsure(timed, stage)}{1e3 * timed[stage]['measured_s']:.3f}",
            "floor ms": f"{1e3 * timed[stage]['floor_s']:.3f}",
            "ratio": f"{timed[stage]['measured_s'] / timed[stage]['floor_s']:.1f}",
            "bound by": timed[stage]["bound_by"],
        }
        for stage in ("encoder", "token")
    ]


# -------------------------------------------------------------------------- times and floors


def time_artifact(
    folder: Path, seconds: float, threads: int | None = None, timeout_s: float = TIMEOUT_S
) -> dict[str, Any]:
    """Profile an artifact of the native layout on this machine, with floors.

    Returns the times of a window and of a token, their shares by part, and their floors in seconds.
    The window is the shortest one for `seconds` of audio. Raises Problem if `folder` is not an
    artifact, and RunnerProblem or DeviceProblem if the runner cannot run it.
    """
    folder = Path(folder)
    if not (folder / artifact.MANIFEST).exists():
        raise Problem(
            f"{folder}: there are no graphs to time, because it is not an artifact",
            hint="export the checkpoint first: edgewhisper export",
        )
    # imports torch, which inspect does not need otherwise
    from benchmarks.calibrate_latency import probe
    from export.onnx.operators import Operator

    manifest = read_facts(folder)
    command = ["profile", str(folder.resolve()), "--seconds", str(seconds), *thread_option(threads)]
    product = Operator("linear", (*PROBE, PROBE[-1]))
    with LocalDevice() as device:
        device.push(RUNNER, "runner")
        answer = run_runner(device, command, timeout_s=timeout_s)
        times = probe(device, {kind: (product, kind) for kind in ("fp32", "int8")}, threads)
    fastest = {kind: min(samples) for kind, samples in times.items()}
    return with_floors(folder, manifest, answer | {"probes": fastest})


def with_floors(folder: Path, manifest: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Return the runner's measurements with the floors of both graphs, see the module docstring."""
    positions = answer["samples"] // (2 * manifest["audio"].get("hop_samples", 160))
    macs = manifest["macs_by_window"].get(str(positions))
    if macs is None:
        raise Problem(
            f"{folder}: macs_by_window has no entry for {positions} positions",
            hint="export the checkpoint again",
        )
    rows, width = PROBE
    rates = {name: rows * width**2 / seconds for name, seconds in answer["probes"].items()}
    files = [folder / name for name in manifest["files"]]
    encoder, decoder = (read_graph(folder / f"{n}.onnx", files) for n in ("encoder", "decoder"))

    total = macs["encoder"] + macs["cross"]
    int8 = min(total, positions * integer_weights(encoder))
    encoder_floor = int8 / rates["int8"] + (total - int8) / rates["fp32"]
    read = bytes_a_token(decoder, manifest, positions, answer["context"])
    kind = "int8" if integer_weights(decoder) else "fp32"
    reading, computing = read / answer["bytes_per_s"], macs["decoder_per_token"] / rates[kind]
    return {
        "window_s": answer["samples"] / manifest["audio"]["sampling_rate"],
        "threads": answer["threads"],
        "windows": len(answer["encoder_s"]),
        "machine": {"bytes_per_s": answer["bytes_per_s"], "macs_per_s": rates},
        "encoder": {
            "measured_s": median(answer["encoder_s"]),
            "floor_s": encoder_floor,
            "bound_by": f"{int8 / 1e6:.0f} MMAC int8, {(total - int8) / 1e6:.0f} float32",
            "shares": answer["encoder_shares"],
            "samples_s": answer["encoder_s"],
        },
        "token": {
            "measured_s": median(answer["token_s"]),
            "floor_s": max(reading, computing),
            "bound_by": f"{read / 1e6:.2f} MB read"
            if reading > computing
            else f"{macs['decoder_per_token'] / 1e6:.2f} MMAC",
            "shares": answer["token_shares"],
            "samples_s": answer["token_s"],
        },
        "versions": answer["versions"],
    }


def used(parts: Parts, prefixes: tuple[str, ...]) -> list[Constant]:
    """Return the constants that the nodes with these name prefixes read, each once."""
    nodes = [node for node in parts.nodes if node.name.startswith(prefixes)]
    names = dict.fromkeys(name for node in nodes for name in node.inputs)
    return [parts.constants[name] for name in names if name in parts.constants]


def integer_weights(parts: Parts) -> int:
    """Return the number of integer weights in the layers; a byte holds two 4-bit weights."""
    scales = {name for node in parts.nodes if node.kind in ("Cast", "Mul") for name in node.inputs}
    others = {name: c for name, c in parts.constants.items() if name not in scales}
    constants = used(replace(parts, constants=others), ("layers.", "cross."))
    matrices = [c for c in constants if c.data_type in INT8_TYPES and len(c.dims) > 1]
    return sum(c.elements * (2 if len(c.dims) == 3 else 1) for c in matrices)


def bytes_a_token(parts: Parts, manifest: dict[str, Any], positions: int, context: int) -> int:
    """Return the bytes that a decoder step reads: weights, keys and values.

    The caches hold `positions` of the encoder and `context` previous tokens. float16 weights are
    read as float32.
    """
    weights = used(parts, ("layers.", "logits/"))
    places = {(w.location, w.offset) for w in weights if w.location}  # the table, or its pieces
    table = [
        c
        for c in token_table(parts, manifest)
        if c not in weights and (c.location, c.offset) not in places
    ]
    read = sum(c.elements * 4 if c.data_type == FLOAT16 else c.bytes for c in [*weights, *table])
    outputs = {name: manifest["contract"][name]["outputs"] for name in ("encoder", "decoder")}
    cross = [cache_bytes(spec, positions) for spec in outputs["encoder"]]
    own = [cache_bytes(s, context) for s in outputs["decoder"] if s["name"].startswith("present.")]
    return read + sum(cross) + sum(own)


def cache_bytes(spec: dict[str, Any], filled: int) -> int:
    """Return the bytes of `filled` positions of a cache (1, heads, room, width), or of a scale."""
    shape = list(spec["shape"])
    if len(shape) == 4:
        shape[2] = filled
    return math.prod(shape) * DTYPES[spec["dtype"]]
