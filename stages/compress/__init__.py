"""The mechanics of the third stage: pruning, INT8, ONNX, latency."""
