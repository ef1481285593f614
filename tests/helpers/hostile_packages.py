"""Core ML packages that nobody should send: what is done to a sound one, and what is then said.

The sound one runs linear, pad, gelu and tile, in this order; its only weight is (8, 6) float16.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from export.coreml.package import schema

MODEL, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"


def edited(change: Callable) -> Callable:
    """Change the model: given its operations by type, and the model itself."""

    def spoil(package: Path) -> None:
        model = schema().Model()
        model.ParseFromString((package / MODEL).read_bytes())
        (block,) = model.mlProgram.functions["main"].block_specializations.values()
        change({operation.type: operation for operation in block.operations}, model, block)
        (package / MODEL).write_bytes(model.SerializeToString())

    return spoil


def constant(block, part: str):
    """The constant that holds a parameter, or a weight."""
    (found,) = (o for o in block.operations if o.type == "const" and part in o.outputs[0].name)
    return found


def written(file: str, content: bytes) -> Callable:
    return lambda package: (package / file).write_bytes(content)


def cut(file: str, share: float) -> Callable:
    def spoil(package: Path) -> None:
        os.truncate(package / file, int((package / file).stat().st_size * share))

    return spoil


def manifest(name: object) -> Callable:
    found = {"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": name}}}
    return written("Manifest.json", json.dumps(found).encode())


def linked(file: str) -> Callable:
    """The file or folder is a link to what it was, elsewhere."""

    def spoil(package: Path) -> None:
        aside = package.parent / "aside"
        (package / file).rename(aside)
        (package / file).symlink_to(aside)

    return spoil


def in_weights(offset: int, content: bytes) -> Callable:
    def spoil(package: Path) -> None:
        with (package / WEIGHTS).open("r+b") as file:
            file.seek(offset)
            file.write(content)

    return spoil


def named(name: str) -> Callable:
    def change(kinds, model, block):
        constant(block, "weight").attributes["val"].blobFileValue.fileName = name

    return edited(change)


def set_offset(kinds, model, block):
    constant(block, "weight").attributes["val"].blobFileValue.offset = 2**63


def larger_weight(kinds, model, block):
    found = constant(block, "weight")
    for kind in (found.attributes["val"].type, found.outputs[0].type):
        kind.tensorType.dimensions[0].constant.size = 9


def huge_constant(kinds, model, block):
    constant(block, "weight").attributes["val"].type.tensorType.dimensions[0].constant.size = 2**50


def huge_input(kinds, model, block):
    kind = model.mlProgram.functions["main"].inputs[0].type.tensorType
    kind.dimensions[0].constant.size = 2**40


def huge_result(kinds, model, block):
    kinds["tile"].outputs[0].type.tensorType.dimensions[0].constant.size = 2**40


def many_tiles(kinds, model, block):
    constant(block, "reps").attributes["val"].immediateValue.tensor.ints.values[0] = 2**31 - 1


def wide_padding(kinds, model, block):
    constant(block, "pad_0_pad").attributes["val"].immediateValue.tensor.ints.values[0] = 2**31 - 1


def unknown_operation(kinds, model, block):
    kinds["gelu"].type = "hypot"


def unknown_parameter(kinds, model, block):
    kinds["gelu"].inputs["sharpness"].CopyFrom(kinds["gelu"].inputs["x"])


def missing_parameter(kinds, model, block):
    del kinds["tile"].inputs["reps"]


def unknown_mode(kinds, model, block):
    constant(block, "pad_0_mode").attributes["val"].immediateValue.tensor.strings.values[0] = "wrap"


def another_shape(kinds, model, block):
    kinds["gelu"].outputs[0].type.tensorType.dimensions[1].constant.size = 11


def another_dtype(kinds, model, block):
    kinds["gelu"].outputs[0].type.tensorType.dataType = 11  # float32


def an_integer(kinds, model, block):
    kinds["gelu"].outputs[0].type.tensorType.dataType = 23  # int32


def no_such_dtype(kinds, model, block):
    kinds["gelu"].outputs[0].type.tensorType.dataType = 24  # int64


def from_nowhere(kinds, model, block):
    kinds["gelu"].inputs["x"].arguments[0].name = "nothing"


def from_itself(kinds, model, block):
    kinds["gelu"].inputs["x"].arguments[0].name = kinds["gelu"].outputs[0].name


def twice_the_name(kinds, model, block):
    kinds["gelu"].outputs[0].name = "x"


def one_result_more(kinds, model, block):
    kinds["gelu"].outputs.add().CopyFrom(kinds["gelu"].outputs[0])
    kinds["gelu"].outputs[1].name = "more"


def two_arguments(kinds, model, block):
    kinds["gelu"].inputs["x"].arguments.add().CopyFrom(kinds["gelu"].inputs["x"].arguments[0])


def too_few_numbers(kinds, model, block):
    del constant(block, "reps").attributes["val"].immediateValue.tensor.ints.values[0]


def no_shape(kinds, model, block):
    kinds["gelu"].outputs[0].type.tensorType.dimensions[0].unknown.variadic = False


def described_otherwise(kinds, model, block):
    model.description.input[0].type.multiArrayType.shape[0] = 4


def output_described_otherwise(kinds, model, block):
    model.description.output[0].name = "z"


def an_image(kinds, model, block):
    model.description.input[0].type.imageType.width = 3


def no_output(kinds, model, block):
    block.outputs[0] = "nothing"


def another_opset(kinds, model, block):
    model.mlProgram.functions["main"].opset = "CoreML99"


def a_neural_network(kinds, model, block):
    model.neuralNetwork.Clear()
    model.neuralNetwork.layers.add()


def no_function(kinds, model, block):
    del model.mlProgram.functions["main"]


BLOB = 64
"""Where the only weight's header begins."""
ALL: dict[str, tuple[Callable, str]] = {
    "no_package": (shutil.rmtree, "not a Core ML package"),
    "no_manifest": (lambda p: (p / "Manifest.json").unlink(), r"Manifest.json: missing"),
    "manifest_not_json": (written("Manifest.json", b"\xff{"), "Manifest.json: damaged"),
    "manifest_a_list": (written("Manifest.json", b"[]"), "Manifest.json: damaged"),
    "manifest_deep": (written("Manifest.json", b"[" * 100_000), "Manifest.json: damaged"),
    "manifest_names_a_number": (manifest(7), "Manifest.json: damaged"),
    "manifest_names_nothing": (manifest("none"), "none: missing"),
    "manifest_names_a_long_name": (manifest("n" * 5000), "missing from the package"),
    "manifest_leaves": (manifest("../../model"), "'../../model', which is outside"),
    "manifest_leaves_by_root": (manifest("/model"), "'/model', which is outside"),
    "manifest_leaves_as_on_windows": (manifest("..\\model"), "which is outside"),
    "manifest_a_link": (linked("Manifest.json"), "Manifest.json: a link"),
    "model_a_link": (linked(MODEL), "model.mlmodel: a link"),
    "data_a_link": (linked("Data"), "model.mlmodel: a link"),
    "weights_a_link": (linked(WEIGHTS), "weight.bin: a link"),
    "weights_in_a_linked_folder": (linked(str(Path(WEIGHTS).parent)), "weight.bin: a link"),
    "no_model": (lambda p: (p / MODEL).unlink(), "model.mlmodel: missing"),
    "no_weights": (lambda p: (p / WEIGHTS).unlink(), "weight.bin: missing"),
    "model_cut": (cut(MODEL, 0.6), "model.mlmodel: damaged, not a Core ML model"),
    "model_empty": (cut(MODEL, 0), "model.mlmodel: not an ML program"),
    "model_is_text": (written(MODEL, b"once upon a time"), "model.mlmodel: damaged"),
    "weights_cut": (cut(WEIGHTS, 0.9), "weight.bin: constant .* beyond the file's"),
    "weights_empty": (cut(WEIGHTS, 0), "beyond the file's 0 bytes"),
    "weights_of_another_time": (in_weights(BLOB, b"    "), "no constant begins there"),
    "weights_of_another_type": (in_weights(BLOB + 4, b"\2"), "holds another type"),
    "weights_smaller": (in_weights(BLOB + 8, b"\7"), "needs 96 bytes, found 7"),
    "weights_elsewhere": (in_weights(BLOB + 16, b"\xff" * 8), "beyond the file's"),
    "weight_beyond": (edited(set_offset), "weight.bin: constant .* is beyond the file's"),
    "weight_larger": (edited(larger_weight), "needs 108 bytes, found 96"),
    "weight_outside": (named("@model_path/../../../secret"), "which is outside"),
    "weight_by_root": (named("/etc/passwd"), "'/etc/passwd', which is outside"),
    "weight_missing": (named("@model_path/weights/other.bin"), "other.bin: missing"),
    "weight_huge": (edited(huge_constant), "declares shape .*, more than 268435456"),
    "input_huge": (edited(huge_input), "declares shape .*, more than 268435456"),
    "result_huge": (edited(huge_result), "declares shape .*, more than 268435456"),
    "many_tiles": (edited(many_tiles), r"returns \[6442450941, 10\], declared \[6, 10\]"),
    "wide_padding": (edited(wide_padding), "operation .*pad"),
    "unknown_operation": (edited(unknown_operation), r"unsupported operations: hypot \(1 times\)"),
    "unknown_parameter": (edited(unknown_parameter), r"\(gelu\): unsupported parameter sharpness"),
    "missing_parameter": (edited(missing_parameter), r"\(tile\): parameter reps is missing"),
    "unknown_mode": (edited(unknown_mode), r"mode is 'wrap', supported: constant, reflect"),
    "another_shape": (edited(another_shape), r"returns \[3, 10\], declared \[3, 11\]"),
    "another_dtype": (edited(another_dtype), r"\(gelu\): mixes float16 and float32"),
    "an_integer": (edited(an_integer), r"\(gelu\): returns torch.float32, declared int32"),
    "no_such_dtype": (edited(no_such_dtype), "has the unsupported type int64"),
    "from_nowhere": (edited(from_nowhere), r"\(gelu\): x is nothing, which no earlier operation"),
    "from_itself": (edited(from_itself), r"\(gelu\): x is gelu_0, which no earlier operation"),
    "twice_the_name": (edited(twice_the_name), "x is defined twice"),
    "one_result_more": (edited(one_result_more), r"\(gelu\): 1 results, declared 2"),
    "two_arguments": (edited(two_arguments), r"\(gelu\): x has 2 values instead of one"),
    "too_few_numbers": (edited(too_few_numbers), r"int32 \[2\] holds 1 values"),
    "no_shape": (edited(no_shape), "has no fixed shape"),
    "described_otherwise": (edited(described_otherwise), r"inputs x float16 \[4, 6\]; its program"),
    "output_described_otherwise": (edited(output_described_otherwise), "outputs z float16"),
    "an_image": (edited(an_image), "x is described as imageType"),
    "no_output": (edited(no_output), "no operation computes it"),
    "another_opset": (edited(another_opset), "has no operations"),
    "a_neural_network": (edited(a_neural_network), r"not an ML program \(neuralNetwork\)"),
    "no_function": (edited(no_function), "no function 'main', it has none"),
}
