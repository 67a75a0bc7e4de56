"""TensorRT: one serialized engine per graph, for one kind of NVIDIA GPU.

`tensorrt` and `tensorrt_rtx` are one code path.
"""

import importlib
import mmap
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from turbochain.runtime import backends
from turbochain.runtime.backends import cuda
from turbochain.runtime.backends.contract import Backend, Device, Executor, Opened, Preference
from turbochain.runtime.backends.gpu import GpuExecutor, GpuGraph
from turbochain.runtime.bundle.manifest import EngineKey, Gpu, Graph
from turbochain.runtime.errors import BundleError, CudaError, InputError, TurbochainError

if TYPE_CHECKING:
    import tensorrt as trt
else:

    class _Library:
        """The installed library's module, imported when a name of it is first used."""

        def __getattr__(self, name: str) -> Any:
            distribution, _ = backends.require("tensorrt")
            module = importlib.import_module("tensorrt_rtx" if "rtx" in distribution else "tensorrt")
            self.__dict__.update(vars(module))
            return getattr(module, name)

    trt = _Library()


def device(name: str | None) -> Device:
    """Return the GPU that "cuda" (or None) or "cuda:N" means; InputError for another name, NoGpu if there is none."""
    index, gpu = cuda.find(name)
    return Device("cuda", index, gpu)


def target(name: str) -> Device:
    """Return the GPUs of an architecture such as "sm89", to build for on another machine; InputError if impossible."""
    library, version = backends.require("tensorrt")
    if not hasattr(trt, "ComputeCapability"):
        raise InputError(
            f"target {name!r}: {library} {version} builds only for the GPU that it runs on; TensorRT-RTX builds for "
            f"others: pip uninstall {library}, then pip install 'turbochain[tensorrt-rtx]'"
        )
    known = {m.lower(): m for m in trt.ComputeCapability.__members__ if m.startswith("SM")}
    if name not in known:
        raise InputError(f"target {name!r}: {library} {version} builds for {', '.join(known)}")
    digits = name.removeprefix("sm")
    return Device("cuda", gpu=Gpu(None, f"{digits[:-1]}.{digits[-1]}", None))


def misfit(key: EngineKey, library: tuple[str, str], device: Device) -> str | None:
    """Return why an engine does not run with this library on this GPU, as far as its options do not relax that."""
    if key.library != library[0] or (key.version != library[1] and not _version_compatible(key, library[1])):
        return f"it was built with {key.library} {key.version}, and this machine has {' '.join(library)}"
    if key.gpu is None or device.gpu is None:
        return "it does not say which GPU it is for"
    built, here = key.gpu, device.gpu
    levels = {
        "none": (built.name in (None, here.name) and built.compute_capability == here.compute_capability),
        "same_compute_capability": built.compute_capability == here.compute_capability,
        "ampere_plus": int(here.compute_capability.split(".")[0]) >= 8,
    }
    if not levels.get(key.options.get("hardware_compatibility", "none")):
        return f"it is for {built}, and this GPU is {here}"
    # The builder may have chosen kernels that need the memory it saw.
    if (built.memory_bytes or 0) > 1.05 * (here.memory_bytes or 0):
        return f"it was built on {built}, and this GPU has less memory: {here}"
    return None


def _version_compatible(key: EngineKey, version: str) -> bool:
    built, here = (tuple(int(n) for n in re.findall(r"\d+", v)) for v in (key.version, version))
    return bool(key.options.get("version_compatible")) and built[:1] == here[:1] and built <= here


def logger(echo: Callable[[str, str], None] | None = None) -> Any:
    """Return a logger whose `errors` are TensorRT's complaints, to be quoted.

    `echo` gets every message: the name of its severity, and its text.
    """

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)
            if echo:
                echo(severity.name, msg)

    return Logger()


def engine_file(graph: str) -> str:
    """Return the name of a graph's serialized engine in the engine's folder."""
    return f"{graph}.engine"


def executor(opened: Opened) -> Executor:
    """Return an executor for the serialized engines in the engine's folder."""
    return TensorRt(opened)


BACKEND = Backend(
    name="tensorrt",
    libraries=("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    install="pip install 'turbochain[tensorrt]' (or 'turbochain[tensorrt-rtx]')",
    preferences={"cuda": Preference(100, "compiled for this very GPU, it is the fastest", ("fp16", "fp32", "bf16"))},
    device=device,
    misfit=misfit,
    executor=executor,
    target=target,
)


class TensorRt(GpuExecutor):
    """Every graph is an engine with one execution context."""

    def load_graph(self, graph: str) -> GpuGraph:
        """Deserialize the graph's engine; BundleError if it is another graph's, OutOfMemory or TurbochainError."""
        log, options, bundle = logger(), self.opened.options, self.opened.bundle
        runtime = trt.Runtime(log)
        # A version-compatible engine carries the code that runs it; its file has been hashed.
        runtime.engine_host_code_allowed = bool(options.get("version_compatible"))
        path = self.opened.folder / engine_file(graph)
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as serialized:
            engine = runtime.deserialize_cuda_engine(serialized)
        if engine is None:
            raise self._failure(log, f"cannot load {path}", size)
        entry = bundle.manifest.graphs[graph]
        if options.get("strip_plan"):
            refitter = trt.Refitter(engine, log)
            source = trt.OnnxParserRefitter(refitter, log)
            if not source.refit_from_file(str(bundle.plain(graph) / entry.file)) or not refitter.refit_cuda_engine():
                raise self._failure(log, f"cannot put the weights of {entry.file} into {path}", size)
        _check_ends(engine, entry, path)
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise self._failure(log, f"cannot make a context for {path}", engine.device_memory_size_v2)
        return _Graph(graph, (runtime, engine), context, engine.device_memory_size_v2, log)

    def _failure(self, log: Any, what: str, size: int) -> TurbochainError:
        """Return OutOfMemory if the GPU has less than `size` bytes left or TensorRT says so, else what it said."""
        if cuda.free_bytes() < size or any("outofmemory" in e.lower().replace(" ", "") for e in log.errors):
            return self.session.out_of_memory(size, what.removeprefix("cannot "))
        return TurbochainError(f"TensorRT {what}: {'; '.join(log.errors) or 'it gave no reason'}")


class _Graph(GpuGraph):
    def __init__(
        self, name: str, owners: tuple[Any, ...], context: "trt.IExecutionContext", scratch_bytes: int, log: Any
    ) -> None:
        self.name, self.context, self.scratch_bytes, self.log = name, context, scratch_bytes, log
        self.owners = owners  # they must live as long as the context

    def place(self, address: int, size: int) -> None:
        self.context.set_device_memory(address, size)

    def enqueue(self, addresses: Mapping[str, int], stream: Any) -> None:
        bound = all(self.context.set_tensor_address(name, address) for name, address in addresses.items())
        if not bound or not self.context.execute_async_v3(int(stream)):
            raise CudaError(f"TensorRT failed in {self.name}: {'; '.join(self.log.errors) or 'it gave no reason'}")


def _check_ends(engine: "trt.ICudaEngine", graph: Graph, path: Path) -> None:
    """Raise BundleError if an engine's inputs and outputs are not those that bundle.json declares."""
    for declared, mode in ((graph.inputs, trt.TensorIOMode.INPUT), (graph.outputs, trt.TensorIOMode.OUTPUT)):
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        expected = {t.name: (t.dtype, t.shape) for t in declared}
        actual = {
            n: (np.dtype(trt.nptype(engine.get_tensor_dtype(n))).name, tuple(engine.get_tensor_shape(n)))
            for n in names
            if engine.get_tensor_mode(n) == mode
        }
        if expected != actual:
            raise BundleError(f"{path}: the {mode.name.lower()}s are {actual}, and bundle.json says {expected}")
