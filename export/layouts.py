"""Targets, layouts and precisions: the one table of everything that can be exported.

Standard library only, so that artifacts can be read without torch. Devices do not import this
package; tests hold their copy (devices/runner/artifact/manifest.py) equal to this table.

To add an ONNX layout: add a row here, write export/onnx/layouts/NAME.py, and add its decoding loop
to benchmarks/reference_runtimes.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

RUNNER = "runner"
"""EdgeWhisper's own runtime, devices/runner."""
PACKAGE_FILES = (
    "Manifest.json",
    "Data/com.apple.CoreML/model.mlmodel",
    "Data/com.apple.CoreML/weights/weight.bin",
)
"""The files of a Core ML package, which is a directory."""
PACKAGES = ("MelSpectrogram", "AudioEncoder", "TextDecoder")
"""The packages that WhisperKit loads."""


def _packages(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.mlpackage/{file}" for name in names for file in PACKAGE_FILES)


@dataclass(frozen=True)
class Target:
    """A file format, with the precisions it can be exported in."""

    precisions: tuple[str, ...]
    precision: str
    """The default."""
    layout: str
    """The default."""


@dataclass(frozen=True)
class Layout:
    """The files that one runtime expects."""

    target: str
    runtime: str
    """RUNNER, or the runtime that benchmarks/reference_runtimes.py drives."""
    files: tuple[str, ...]
    """Files that every artifact of this layout has; {} stands for the suffix of the precision."""
    suffixes: dict[str, str] = field(default_factory=dict)
    """Precision -> suffix of the file names; precisions not listed have none."""
    one_window: bool = False
    """The runtime gives every clip the same window, the longest of the model."""
    subgraphs: bool = False
    """The graphs contain If or Loop operators."""
    onnxruntime: str = "1.21"
    """The oldest onnxruntime that runs the graphs; see onnx/runtimes.py."""
    prefix: str | None = None
    """Start of a new artifact's folder name, before the precision; None: the layout and a dash."""

    @property
    def prompts_by_clip(self) -> bool:
        """Whether each clip can be prompted for its own language; others have one fixed prompt."""
        return self.runtime == RUNNER

    @property
    def packaged(self) -> bool:
        """Whether the graphs are Core ML packages."""
        return self.target == "coreml"


TARGETS = {
    "onnx": Target(("fp32", "fp16", "int8", "int4"), precision="int8", layout="native"),
    "coreml": Target(
        ("fp32", "fp16", "int8", "int4", "pal4", "pal6", "pal8"),
        precision="fp16",
        layout="whisperkit",
    ),
}
NATIVE = TARGETS["onnx"].layout
LAYOUTS = {
    NATIVE: Layout(
        "onnx",
        RUNNER,
        ("encoder.onnx", "decoder.onnx", "tokens.json"),
        onnxruntime="1.22",
        prefix="",
    ),
    "transformers": Layout(
        "onnx",
        "transformers.js",
        (
            "onnx/encoder_model{}.onnx",
            "onnx/decoder_model_merged{}.onnx",
            "onnx/decoder_model_merged{}.onnx_data",
            "onnx/decoder_model{}.onnx",
            "onnx/decoder_with_past_model{}.onnx",
            "config.json",
            "tokenizer.json",
        ),
        suffixes={"fp16": "_fp16", "int8": "_quantized", "int4": "_q4"},
        one_window=True,
        subgraphs=True,
    ),
    "sherpa": Layout(
        "onnx",
        "sherpa-onnx",
        ("whisper-encoder{}.onnx", "whisper-decoder{}.onnx", "whisper-tokens.txt"),
        suffixes={"fp16": ".fp16", "int8": ".int8", "int4": ".int4"},
        one_window=True,
    ),
    "single": Layout("onnx", "onnxruntime", ("whisper.onnx", "tokens.json"), subgraphs=True),
    "whisperkit": Layout(
        "coreml", RUNNER, (*_packages(*PACKAGES), "tokens.json"), one_window=True, prefix="coreml-"
    ),
    "encoder": Layout(
        "coreml",
        "whisper.cpp",
        _packages("coreml-encoder"),
        one_window=True,
        prefix="coreml-encoder-",
    ),
}


def layouts_of(target: str) -> tuple[str, ...]:
    """The names of a target's layouts, in the order of the table."""
    return tuple(name for name, layout in LAYOUTS.items() if layout.target == target)


def suffix_for(layout: str, precision: str) -> str:
    """The suffix by which a layout's file names tell the precision, "" where they do not."""
    return LAYOUTS[layout].suffixes.get(precision, "")


def needed_files(layout: str, precision: str) -> list[str]:
    """The files that every artifact of this layout and precision has, relative to its folder."""
    return [name.format(suffix_for(layout, precision)) for name in LAYOUTS[layout].files]


def graph_files(layout: str, precision: str) -> dict[str, str]:
    """Name in the manifest's contract -> file of each graph; a Core ML package is a folder."""
    files = needed_files(layout, precision)
    if LAYOUTS[layout].packaged:
        packages = [file.split("/")[0] for file in files if ".mlpackage/" in file]
        return {name.removesuffix(".mlpackage"): name for name in packages}
    suffix = suffix_for(layout, precision)
    names = [name for name in files if name.endswith(".onnx")]
    plain = (name.rsplit("/")[-1].removesuffix(f"{suffix}.onnx") for name in names)
    return {name.removeprefix("whisper-"): file for name, file in zip(plain, names, strict=True)}
