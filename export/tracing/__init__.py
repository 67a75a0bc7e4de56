"""Trace the modules of a checkpoint to ONNX."""
