"""An artifact on disk: a directory whose manifest.json names every other file with its hash.

Standard library only, so that a device can check what it was sent.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from export.files import leads_out, new_file
from export.problem import Problem

FORMAT = 2
AUTO_FORMAT = 3
"""The format of artifacts that detect the language, which readers of format 2 would prompt for
English."""
MANIFEST = "manifest.json"
PACKAGES = ("MelSpectrogram", "AudioEncoder", "TextDecoder")
PACKAGE_FILES = (
    "Manifest.json",
    "Data/com.apple.CoreML/model.mlmodel",
    "Data/com.apple.CoreML/weights/weight.bin",
)
"""A Core ML package is a directory."""
FILES = {
    "native": ("encoder.onnx", "decoder.onnx", "tokens.json"),
    "transformers": (
        "onnx/encoder_model{}.onnx",
        "onnx/decoder_model_merged{}.onnx",
        "onnx/decoder_model_merged{}.onnx_data",
        "onnx/decoder_model{}.onnx",
        "onnx/decoder_with_past_model{}.onnx",
        "config.json",
        "tokenizer.json",
    ),
    "sherpa": ("whisper-encoder{}.onnx", "whisper-decoder{}.onnx", "whisper-tokens.txt"),
    "single": ("whisper.onnx", "tokens.json"),
    "whisperkit": (
        *(f"{name}.mlpackage/{file}" for name in PACKAGES for file in PACKAGE_FILES),
        "tokens.json",
    ),
    "encoder": tuple(f"coreml-encoder.mlpackage/{file}" for file in PACKAGE_FILES),
}
"""What no artifact of a layout can do without; {} stands for the precision."""
PACKAGED = ("whisperkit", "encoder")
"""Layouts of Core ML packages."""
SUFFIXES = {
    "transformers": {"fp16": "_fp16", "int8": "_quantized", "int4": "_q4"},
    "sherpa": {"fp16": ".fp16", "int8": ".int8", "int4": ".int4"},
}
"""How a layout's file names tell a precision; nothing is said of others."""
AGAIN = "export it again, or copy the whole folder anew"


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json with the hash and size of every other file now in the directory.

    The dict itself gets `format` and `files`, so that it equals what read_manifest returns.
    """
    detects = (manifest.get("decoding") or {}).get("language") == "auto"
    manifest["format"] = AUTO_FORMAT if detects else FORMAT
    manifest["files"] = {
        path.relative_to(directory).as_posix(): describe(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with new_file(directory / MANIFEST) as partial:
        partial.write_text(text, encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """manifest.json as it was written. The files it names are not looked at: see `verify`.

    Raises Problem: no artifact here, not JSON, a format this version cannot read, a field missing,
    a file name that leaves the folder.
    """
    path = Path(directory) / MANIFEST
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "not a file")  # a pipe would keep its reader waiting
        if leads_out(path):
            raise OSError(0, "a link that leads out of the artifact")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Problem(
            f"{directory}: no artifact here, {MANIFEST} cannot be read ({error.strerror})",
            hint="name a directory that `edgewhisper export` wrote",
        ) from error
    except (ValueError, RecursionError) as error:
        raise Problem(f"{path}: damaged, not JSON ({error})", hint=AGAIN) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if type(found) is not int or found not in (FORMAT, AUTO_FORMAT):
        raise Problem(
            f"{path}: format {found!r}; this version reads formats {FORMAT} and {AUTO_FORMAT}",
            hint="use the EdgeWhisper version that wrote it, or export the checkpoint again",
        )
    _check_files(path, manifest)
    return manifest


def verify(directory: Path) -> dict[str, Any]:
    """The manifest, after every file was found with the size and hash it had when written.

    Raises Problem as read_manifest does, and where a file is missing or has changed: by its name.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, expected in manifest["files"].items():
        path = directory / name
        if leads_out(path):
            raise Problem(f"{path}: a link, not a file of the artifact", hint=AGAIN)
        if not path.is_file():
            raise Problem(f"{path}: missing from the artifact", hint=AGAIN)
        found = describe(path)
        if found["bytes"] != expected["bytes"]:
            raise Problem(
                f"{path}: damaged, {found['bytes']} bytes instead of {expected['bytes']}",
                hint=AGAIN,
            )
        if found["sha256"] != expected["sha256"]:
            raise Problem(f"{path}: damaged, its SHA-256 is not the manifest's", hint=AGAIN)
    for path in directory.glob("*.mlpackage/**/*"):  # whatever stands in one may be read
        if path.relative_to(directory).as_posix() not in manifest["files"] and not path.is_dir():
            raise Problem(f"{path}: {MANIFEST} does not list it", hint=AGAIN)
    return manifest


def suffix_for(layout: str, precision: str) -> str:
    return SUFFIXES.get(layout, {}).get(precision, "")


def needed_files(layout: str, precision: str) -> list[str]:
    """Names of the files without which an artifact is none."""
    return [name.format(suffix_for(layout, precision)) for name in FILES[layout]]


def graph_files(layout: str, precision: str) -> dict[str, str]:
    """Name in the manifest's contract -> file of every graph of a layout; packages are folders."""
    if layout in PACKAGED:
        packages = [file.split("/")[0] for file in FILES[layout] if ".mlpackage/" in file]
        return {name.removesuffix(".mlpackage"): name for name in packages}
    suffix = suffix_for(layout, precision)
    names = [name for name in needed_files(layout, precision) if name.endswith(".onnx")]
    plain = (name.rsplit("/")[-1].removesuffix(f"{suffix}.onnx") for name in names)
    return {name.removeprefix("whisper-"): file for name, file in zip(plain, names, strict=True)}


def describe(path: Path) -> dict[str, Any]:
    """SHA-256 and size in bytes of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def _check_files(path: Path, manifest: dict[str, Any]) -> None:
    layout, files = manifest.get("layout", "native"), manifest.get("files")
    if layout not in tuple(FILES):
        raise Problem(
            f"{path}: layout {layout!r}; this version knows {', '.join(FILES)}",
            hint="use the EdgeWhisper version that wrote it, or export the checkpoint again",
        )
    if not isinstance(files, dict):
        raise Problem(f"{path}: damaged, it lists no files", hint=AGAIN)
    for name, entry in files.items():
        if not _stays_inside(name):
            raise Problem(
                f"{path}: names the file {name!r}, which is outside the artifact",
                hint="do not use this artifact: it was not written by EdgeWhisper",
            )
        if not isinstance(entry, dict) or not {"sha256", "bytes"} <= entry.keys():
            raise Problem(f"{path}: damaged, no hash and size for {name}", hint=AGAIN)
    for name in needed_files(layout, str(manifest.get("precision"))):
        if name not in files:
            raise Problem(f"{path}: damaged, it does not list {name}", hint=AGAIN)


def _stays_inside(name: str) -> bool:
    """Relative, with no way up, in the POSIX reading and in the Windows one."""
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(path.parts) and not path.is_absolute() and not {"..", ":"} & {*path.parts, *name}
