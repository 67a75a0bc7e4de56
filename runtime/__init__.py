"""Bundle → pixels: the light runtime, without PyTorch.

from turbochain.runtime import Pipeline

pipe = Pipeline.load("sd-turbo.bundle")
pipe("a cat", num_inference_steps=1, seed=0).images[0].save("cat.png")
"""

from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.errors import (
    BackendMissing,
    BundleError,
    Cancelled,
    CudaError,
    CudaFault,
    InputError,
    NoGpu,
    OutOfMemory,
    PictureError,
    TurbochainError,
    VerificationError,
)
from turbochain.runtime.inputs.noise import Generator
from turbochain.runtime.output import PipelineOutput
from turbochain.runtime.pipeline import Pipeline
from turbochain.runtime.request import Request
from turbochain.runtime.stream import Stream

__all__ = [
    "BackendMissing",
    "Bundle",
    "BundleError",
    "Cancelled",
    "CudaError",
    "CudaFault",
    "Generator",
    "InputError",
    "NoGpu",
    "OutOfMemory",
    "PictureError",
    "Pipeline",
    "PipelineOutput",
    "Request",
    "Stream",
    "TurbochainError",
    "VerificationError",
]
