"""The files that one runtime or another wants. The native ones are export/onnx/to_onnx.py's own.

Every layout is a module with one function, `write(model, processor, precision, out)`: it writes its
files into the empty directory `out` and returns what goes in and comes out of each graph.
"""

LAYOUTS = {
    "native": "export.onnx.to_onnx",
    "transformers": "export.onnx.layouts.transformers",
    "sherpa": "export.onnx.layouts.sherpa",
    "single": "export.onnx.layouts.single",
}
