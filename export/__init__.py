"""Export a Whisper model from torch to files that devices can run: ONNX or Core ML."""
