"""Checkpoint → bundle: traces a diffusers checkpoint to ONNX and records what diffusers produced.

from turbochain.export import export

export("stabilityai/sd-turbo", "sd-turbo.bundle", precision="fp16")
"""

from turbochain.export.api import export

__all__ = ["export"]
