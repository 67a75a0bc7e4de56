"""ONNX Runtime: reads the bundle's graphs directly, on its CPU provider."""

import importlib
from collections.abc import Callable
from typing import Any

from turbochain.runtime import backends
from turbochain.runtime.backends.host import HostExecutor
from turbochain.runtime.errors import BundleError, InputError, TurbochainError

LIBRARIES = ("onnxruntime", "onnxruntime-gpu")
INSTALL = "pip install 'turbochain[cpu]'"
RANK = 10
REASON = "it runs on any CPU"
PRECISION = "fp32"
PRECISIONS = ("fp32", "fp16")  # its CPU provider has no bf16 convolution

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
}


def device(name: str | None) -> str:
    """`cpu`, the only device so far; InputError for another."""
    if name not in (None, "cpu"):
        raise InputError(f"device={name!r}: the backend onnxruntime runs on 'cpu'")
    return "cpu"


class Executor(HostExecutor):
    """Every graph is a session, bound once to the buffers."""

    def load(self, graph: str) -> Callable[[], None]:
        """Create the graph's session; TurbochainError where ONNX Runtime cannot."""
        ort = _library()
        backends.require_precision("onnxruntime", self.bundle.manifest.graphs[graph].precision)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors only: its warnings are about nodes that it places well
        # Each graph has its own threads, and they must not spin while those of the next graph work.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        path = self.bundle.path / self.bundle.manifest.graphs[graph].file
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has no common base class for what it raises
            raise TurbochainError(f"onnxruntime cannot load {path}: {_first_line(error)}") from error
        return self._bind(graph, session)

    def _bind(self, graph: str, session: Any) -> Callable[[], None]:
        stage, binding = self.bundle.manifest.graphs[graph], session.io_binding()
        ends = (
            (stage.inputs, session.get_inputs(), "input"),
            (stage.outputs, session.get_outputs(), "output"),
        )
        for declared, found, kind in ends:
            expected = {t.name: (t.dtype, list(t.shape)) for t in declared}
            actual = {t.name: (_DTYPES.get(t.type, t.type), t.shape) for t in found}
            if expected != actual:
                raise BundleError(f"{stage.file}: the {kind}s are {actual}, and bundle.json says {expected}")
            for name, (_, shape) in expected.items():
                bind = getattr(binding, f"bind_{kind}")
                bind(name, "cpu", 0, self.buffers[name].dtype, shape, self.buffers[name].ctypes.data)

        def launch() -> None:
            try:
                session.run_with_iobinding(binding)
            except Exception as error:
                raise TurbochainError(f"onnxruntime failed in {graph}: {_first_line(error)}") from error

        return launch


def _library() -> Any:
    backends.require("onnxruntime")
    return importlib.import_module("onnxruntime")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
