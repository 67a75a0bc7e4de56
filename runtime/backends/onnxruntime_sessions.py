"""Make ONNX Runtime's sessions, bind them to addresses, run them, and put what went wrong into words."""

import contextlib
import importlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.runtime import backends
from turbochain.runtime.bundle.manifest import Graph
from turbochain.runtime.errors import BundleError, OutOfMemory, TurbochainError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

IDENTITY = (  # x → y, float32 [1]: a model that can be run without a file
    b'\x08\x08\x12\x00:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08'
    b"\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x15"
)

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
}


def library() -> Any:
    """Return the module `onnxruntime`, imported so that it neither reports to its maker nor leaves files for that."""
    backends.require("onnxruntime")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at the import
    return importlib.import_module("onnxruntime")


def default_options() -> Any:
    """Return the options that every session has."""
    options = library().SessionOptions()
    options.log_severity_level = 3  # errors only: its warnings are about nodes that it places well
    # A pattern of what a run allocates is no quicker, holds twice as much as the runs need, and is allocated in a later
    # run than the first, which cannot be captured.
    options.enable_mem_pattern = False
    return options


def override(options: Any, values: Mapping[str, np.ndarray]) -> list[Any]:
    """Let a session with these options have these fp32 arrays as initializers; return what must outlive it.

    Only for sessions that fold no constants: folding reads what is in the file.
    """
    kept = [(name, library().OrtValue.ortvalue_from_numpy(value)) for name, value in values.items()]
    for name, value in kept:
        options.add_initializer(name, value)
    return [*kept, *values.values()]


def load(
    model: str | bytes,
    name: str,
    options: Any,
    provider: str,
    settings: Mapping[str, str],
    without: Sequence[str] = (),
) -> Any:
    """Return a session of a model (the path of its file, or its bytes) on one provider, with that one's settings.

    `without`: the names of optimisers. Raises OutOfMemory or TurbochainError, which names `name`.
    """
    if provider == CUDA:
        _preload()
    try:
        return library().InferenceSession(
            model, options, providers=[(provider, dict(settings))], disabled_optimizers=list(without)
        )
    except Exception as error:  # ONNX Runtime has no common base class for what it raises
        if not _has(provider, settings):  # then its error is about nodes that are left to the CPU
            raise _lacking() from error
        raise _failure(f"cannot load {name}", error) from error


def _has(provider: str, settings: Mapping[str, str]) -> bool:
    """Return whether this provider is there: ONNX Runtime goes on without one that it cannot load."""
    try:
        found = library().InferenceSession(IDENTITY, default_options(), providers=[(provider, dict(settings))])
    except Exception:  # it is there, and what is wrong is something else
        return True
    return bool(found.get_providers()[0] == provider)


@cache
def _preload() -> tuple[str, ...]:
    """Load the libraries of CUDA and cuDNN that pip or the system has installed; return those that fail."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # which is for results
        library().preload_dlls()
    return tuple(Path(name).name for name in re.findall(r"^Failed to load (.+?): ", said.getvalue(), re.MULTILINE))


def _lacking() -> TurbochainError:
    """Return the error for CUDA's or cuDNN's libraries that are not there."""
    which = f" ({', '.join(_preload())})" if _preload() else ""
    return TurbochainError(
        f"onnxruntime cannot use the GPU: libraries of CUDA or cuDNN are missing, or of another version{which}: "
        "pip install 'turbochain[cuda]'"
    )


def check_ends(graph: Graph, session: Any) -> None:
    """Raise BundleError if a session's inputs and outputs are not those of bundle.json."""
    ends = ((graph.inputs, session.get_inputs(), "input"), (graph.outputs, session.get_outputs(), "output"))
    for declared, found, kind in ends:
        expected = {t.name: (t.dtype, list(t.shape)) for t in declared}
        actual = {t.name: (_DTYPES.get(t.type, t.type), t.shape) for t in found}
        if expected != actual:
            raise BundleError(f"{graph.file}: the {kind}s are {actual}, and bundle.json says {expected}")


def bind(graph: Graph, session: Any, device: str, index: int, addresses: Mapping[str, int]) -> Any:
    """Return a binding of a session's inputs and outputs to these addresses."""
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, graph.inputs), (binding.bind_output, graph.outputs)):
        for t in tensors:
            bind(t.name, device, index, np.dtype(t.dtype), list(t.shape), addresses[t.name])
    return binding


def run(name: str, session: Any, binding: Any, options: Any) -> None:
    """Launch a bound session once; OutOfMemory or TurbochainError if it fails."""
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:
        raise _failure(f"failed in {name}", error) from error


def _failure(what: str, error: Exception) -> TurbochainError:
    if "cuDNN is unavailable" in str(error):  # it is looked for in the first launch of a convolution
        return _lacking()
    reason = str(error).strip().splitlines()[0][:300]
    signs = ("out of memory", "Failed to allocate memory", "ALLOC_FAILED", "cudaErrorMemoryAllocation")
    kind = OutOfMemory if any(sign in str(error) for sign in signs) else TurbochainError
    return kind(f"onnxruntime {what}: {reason}")
