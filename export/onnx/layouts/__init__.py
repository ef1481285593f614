"""One module for each layout of ONNX files; export/layouts.py is the table of them.

Each module has `write(model, processor, precision, out)`, which writes the layout's files into the
empty directory `out` and returns the inputs and outputs of each graph.
"""
