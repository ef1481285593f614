"""What executes an artifact (onnxruntime, Core ML), and the checks before it is loaded."""
