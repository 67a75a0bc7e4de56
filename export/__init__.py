"""Checkpoint → bundle: traces a diffusers checkpoint to ONNX and records what diffusers produced."""
