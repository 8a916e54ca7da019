"""PyTorch to ONNX: one graph an engine, the bundle around them, and the proof that each equals its reference."""
