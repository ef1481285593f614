"""Export to ONNX: graphs, their weights and constants, and the layouts that runtimes read."""
