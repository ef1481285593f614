"""A browser on the local network as a device: a page that runs artifacts on onnxruntime-web."""
