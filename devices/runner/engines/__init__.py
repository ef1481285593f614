"""Engines that execute an artifact's graphs: onnxruntime and Core ML."""
