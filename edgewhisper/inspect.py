"""What a checkpoint or an artifact is made of, what it costs, and where an artifact's time goes.

Times stand beside a floor by arithmetic: what the same machine needs at least for the same work,
given the products and the copies that it was just seen to do.

    encoder   int8 products / rate of a large int8 product
              + all others / rate of a large float32 product
    token     the longer of reading what a step reads (weights of the layers, the token table, keys
              and values) at the rate of a copy of that size, and of its products

The log-mel front end is not counted in the encoder's floor.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.timing import summarise
from devices.device import RUNNER, run_runner
from devices.local import LocalDevice
from devices.runner.engines import contract
from devices.runner.engines.graph_file import Constant, Parts, read_graph
from export import artifact
from export.problem import Problem

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

TOKENIZER = ("token", "vocab", "merges", "normalizer", "added_tokens", "special_tokens")
"""How the names of a tokenizer's files begin."""
INT8_TYPES, FLOAT16 = (2, 3), 10
COSTS = {"encoder", "cross", "decoder_per_token"}
PROBE = (1500, 1024)
"""Rows and width of the product that is timed: (rows, width) (width, width)."""
TIMEOUT_S = 600.0


def inspect(source: str) -> dict[str, Any]:
    """Shapes of every layer, bytes of every part, parameters and multiply-accumulates.

    `source` is an artifact's directory, or a checkpoint as whisper.load() takes it.
    """
    if (Path(source) / artifact.MANIFEST).exists():
        return inspect_artifact(Path(source))
    return inspect_checkpoint(source)


def inspect_checkpoint(source: str) -> dict[str, Any]:
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
    """Bytes of the weights of encoder, decoder and token table, each tensor once."""
    inner = model.model
    total = {id(p): p.numel() * p.element_size() for p in inner.decoder.parameters()}
    table = sum(p.numel() * p.element_size() for p in inner.decoder.embed_tokens.parameters())
    return {
        "encoder": sum(p.numel() * p.element_size() for p in inner.encoder.parameters()),
        "decoder": sum(total.values()) - table,
        "token table": table,
    }


def inspect_artifact(folder: Path) -> dict[str, Any]:
    """The same from an artifact's manifest and files, which are looked at and not run."""
    told = read_facts(folder)
    sizes = {name: entry["bytes"] for name, entry in told["files"].items()}
    sizes[artifact.MANIFEST] = (folder / artifact.MANIFEST).stat().st_size
    packages = {}
    if told.get("layout") in artifact.PACKAGED:
        from edgewhisper.coreml import read_packages

        packages = {"packages": read_packages(folder)}
    return packages | {
        "kind": "artifact",
        "source": str(folder),
        "layout": told.get("layout", "native"),
        "precision": told["precision"],
        "parameters": told["parameters"],
        "macs_by_window": told["macs_by_window"],
        "layers": told["layers"],
        "bytes": graph_bytes(folder, told) | file_bytes(sizes, tuple(graph_files(told))),
        "gate": told.get("gate"),
    }


def read_facts(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact of any layout, with what there is to show in it."""
    path = folder / artifact.MANIFEST
    told = contract.read_json(path)
    if isinstance(told, dict) and told.get("layout", "native") in contract.LAYOUTS.values():
        told = contract.read_manifest(folder)
    else:
        told = artifact.read_manifest(folder)
        contract.check_facts(contract.Told(path, told))
    for name in ("precision", "parameters", "macs_by_window", "layers"):
        if told.get(name) is None:
            raise Problem(f"{path}: {name} is missing", hint=artifact.AGAIN)
    for window, macs in told["macs_by_window"].items():
        if not window.isdecimal() or not macs.keys() >= COSTS:
            raise Problem(f"{path}: no costs of the window {window[:40]!r}", hint=artifact.AGAIN)
    return told


def graph_files(manifest: dict[str, Any]) -> list[str]:
    """Names of the files that hold graphs and their weights."""
    ends = (".weights", ".bin", ".mlmodel", "mlpackage/Manifest.json")
    return [name for name in manifest["files"] if ".onnx" in name or name.endswith(ends)]


def graph_bytes(folder: Path, manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes of the graphs; those of the native layout apart, and the token table for itself."""
    sizes = {name: manifest["files"][name]["bytes"] for name in graph_files(manifest)}
    if manifest.get("layout") in artifact.PACKAGED:
        from edgewhisper.coreml import package_bytes

        names = artifact.graph_files(manifest["layout"], manifest["precision"])
        return {name: package_bytes(manifest, name) for name in names}
    if "decoder.onnx" not in sizes or "encoder.onnx" not in sizes:
        return {"graphs": sum(sizes.values())}
    parts = read_graph(folder / "decoder.onnx", manifest["files"].keys())
    table = sum(constant.bytes for constant in token_table(parts, manifest))
    encoder = sum(size for name, size in sizes.items() if name.startswith("encoder"))
    return {
        "encoder": encoder,
        "decoder": sum(sizes.values()) - encoder - table,
        "token table": table,
    }


def token_table(parts: Parts, manifest: dict[str, Any]) -> list[Constant]:
    """The constants that have a row or a scale a token, and those that look-up and logits share."""
    outputs = manifest["contract"]["decoder"]["outputs"]
    vocabulary = next(spec["shape"][-1] for spec in outputs if spec["name"] == "logits")
    readers = {
        part: {name for node in parts.nodes if node.name.startswith(part) for name in node.inputs}
        for part in ("look_up/", "logits/")
    }
    both = readers["look_up/"] & readers["logits/"]
    return [
        constant
        for name, constant in parts.constants.items()
        if vocabulary in constant.dims or (name in both and len(constant.dims) > 1)
    ]


def file_bytes(sizes: dict[str, int], weights: tuple[str, ...]) -> dict[str, int]:
    """Bytes of the tokenizer's files and of all others that hold no weights."""
    rest = {Path(name).name: size for name, size in sizes.items() if name not in weights}
    tokenizer = sum(size for name, size in rest.items() if name.startswith(TOKENIZER))
    return {"tokenizer": tokenizer, "other files": sum(rest.values()) - tokenizer}


# ------------------------------------------------------------------------------------ the tables


def layer_rows(found: dict[str, Any]) -> list[dict[str, str]]:
    """One row a layer: heads, widths of keys and values, units, ranks, inputs and bits."""
    rows = []
    for side in ("encoder", "decoder"):
        for number, shape in enumerate(found["layers"][side]):
            row = {"layer": f"{side} {number}", "self-attention": heads(shape["self_attn"])}
            row["cross-attention"] = heads(shape["encoder_attn"]) if side == "decoder" else ""
            row["units"] = str(shape["ffn"])
            row |= {name: brief(shape.get(name) or {}) for name in ("ranks", "inputs", "bits")}
            rows.append(row)
    return rows


def heads(shape: dict[str, Any]) -> str:
    """4 x 32 where keys and values are as wide, 4 x 24/32 where they are not."""
    widths = {shape["qk_dim"], shape["v_dim"]}
    each = f"{shape['qk_dim']}/{shape['v_dim']}" if len(widths) > 1 else f"{shape['qk_dim']}"
    return f"{shape['heads']} x {each}{' shared' if shape.get('shared') else ''}"


def brief(sizes: dict[str, int]) -> str:
    """q 8 fc1 4, or one number where all are the same."""
    if len(sizes) > 1 and len(set(sizes.values())) == 1:
        return f"all {next(iter(sizes.values()))}"
    names = (name.split(".")[-1].removesuffix("_proj") for name in sizes)
    return " ".join(f"{name} {size}" for name, size in zip(names, sizes.values(), strict=True))


def size_rows(found: dict[str, Any]) -> list[dict[str, str]]:
    parts = found["bytes"]
    total = sum(parts.values())
    shown = [*parts.items(), ("total", total)]
    return [
        {"part": name, "MB": f"{size / 1e6:.3f}", "share": f"{size / total:.1%}"}
        for name, size in shown
    ]


def package_rows(found: dict[str, Any]) -> list[dict[str, str]]:
    """Of each Core ML package how its numbers are stored, and its most frequent operations."""
    rows = []
    for name, package in found["packages"].items():
        count = sum(package["weights"].values())
        operations = list(package["operations"].items())
        rows.append(
            {
                "package": name,
                "numbers": ", ".join(f"{n:,} {form}" for form, n in package["weights"].items()),
                "specification": str(package["specification_version"]),
                "bits each": f"{8 * found['bytes'][name] / max(1, count):.1f}",
                "operations": str(sum(package["operations"].values())),
                "mostly": ", ".join(f"{n} {kind}" for kind, n in operations[:4]),
            }
        )
    return rows


def cost_rows(found: dict[str, Any]) -> list[dict[str, str]]:
    """Multiply-accumulates of every window, in millions."""
    return [
        {
            "window": f"{int(positions) / 50:g} s",
            "encoder MMAC": f"{macs['encoder'] / 1e6:.1f}",
            "cross MMAC": f"{macs['cross'] / 1e6:.1f}",
            "token MMAC": f"{macs['decoder_per_token'] / 1e6:.3f}",
        }
        for positions, macs in found["macs_by_window"].items()
    ]


def time_rows(timed: dict[str, Any]) -> list[dict[str, str]]:
    """Every part of the encoder's window and of one token."""
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
    """The mark of times that differ too much from window to window, as in tables of results."""
    return "~" if summarise(timed[stage]["samples_s"], timed["windows"]).unstable else ""


def floor_rows(timed: dict[str, Any]) -> list[dict[str, str]]:
    """Measured and least times of both graphs, and what the least is made of."""
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


# ------------------------------------------------------------------------------ time and its floor


def time_artifact(
    folder: Path, seconds: float, threads: int | None = None, timeout_s: float = TIMEOUT_S
) -> dict[str, Any]:
    """Where the time of a window and of a token goes on this machine, and their floors.

    The window is the shortest that holds so many seconds of sound. Raises Problem for what is no
    artifact of the native layout; the runner's letters for one that is damaged.
    """
    folder = Path(folder)
    if not (folder / artifact.MANIFEST).exists():
        raise Problem(
            f"{folder}: there are no graphs to time, it is not an artifact",
            hint="export the checkpoint first: edgewhisper export",
        )
    # imports torch, which the shapes of an artifact do not need
    from benchmarks.calibrate_latency import probe
    from export.onnx.operators import Operator

    told = read_facts(folder)
    words = ["profile", str(folder.resolve()), "--seconds", str(seconds)]
    words += ["--threads", str(threads)] if threads else []
    product = Operator("linear", (*PROBE, PROBE[-1]))
    with LocalDevice() as device:
        device.push(RUNNER, "runner")
        answer = run_runner(device, words, timeout_s=timeout_s)
        times = probe(device, {kind: (product, kind) for kind in ("fp32", "int8")}, threads)
    fastest = {kind: min(found) for kind, found in times.items()}
    return with_floors(folder, told, answer | {"probes": fastest})


def with_floors(folder: Path, told: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """The runner's answer, with the least time that the same work takes on such a machine."""
    positions = answer["samples"] // (2 * told["audio"].get("hop_samples", 160))
    macs = told["macs_by_window"].get(str(positions))
    if macs is None:
        raise Problem(
            f"{folder}: macs_by_window says nothing of {positions} positions",
            hint="export the checkpoint again",
        )
    rows, width = PROBE
    rates = {name: rows * width**2 / seconds for name, seconds in answer["probes"].items()}
    files = told["files"].keys()
    encoder, decoder = (read_graph(folder / f"{n}.onnx", files) for n in ("encoder", "decoder"))

    total = macs["encoder"] + macs["cross"]
    int8 = min(total, positions * integer_weights(encoder))
    encoder_floor = int8 / rates["int8"] + (total - int8) / rates["fp32"]
    read = bytes_a_token(decoder, told, positions, answer["context"])
    kind = "int8" if integer_weights(decoder) else "fp32"
    reading, computing = read / answer["bytes_per_s"], macs["decoder_per_token"] / rates[kind]
    return {
        "window_s": answer["samples"] / told["audio"]["sampling_rate"],
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
    """Constants that are read by the nodes of these parts, each once."""
    nodes = [node for node in parts.nodes if node.name.startswith(prefixes)]
    names = dict.fromkeys(name for node in nodes for name in node.inputs)
    return [parts.constants[name] for name in names if name in parts.constants]


def integer_weights(parts: Parts) -> int:
    """Weights of the layers that are multiplied as integers; two 4-bit ones stand in a byte."""
    found = used(parts, ("layers.", "cross."))
    matrices = [c for c in found if c.data_type in INT8_TYPES and len(c.dims) > 1]
    return sum(c.elements * (2 if len(c.dims) == 3 else 1) for c in matrices)


def bytes_a_token(parts: Parts, told: dict[str, Any], positions: int, context: int) -> int:
    """What one decoder step reads: its weights as they are at work, keys and values of the window
    and of the tokens before."""
    weights = used(parts, ("layers.", "logits/"))
    table = [c for c in token_table(parts, told) if c not in weights]
    read = sum(c.elements * 4 if c.data_type == FLOAT16 else c.bytes for c in [*weights, *table])
    outputs = {name: told["contract"][name]["outputs"] for name in ("encoder", "decoder")}
    cross = [cache_bytes(spec, positions) for spec in outputs["encoder"]]
    own = [cache_bytes(s, context) for s in outputs["decoder"] if s["name"].startswith("present.")]
    return read + sum(cross) + sum(own)


def cache_bytes(spec: dict[str, Any], filled: int) -> int:
    """Bytes of so many positions of a cache (1, heads, room, width); of a scale, all."""
    shape = list(spec["shape"])
    if len(shape) == 4:
        shape[2] = filled
    return math.prod(shape) * contract.DTYPES[spec["dtype"]]
