"""ONNX graphs with the cache as inputs and outputs."""
