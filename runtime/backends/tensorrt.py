"""TensorRT: one serialized engine per graph, for one kind of NVIDIA GPU.

`tensorrt` and `tensorrt_rtx` are one code path.
"""

import ctypes
import functools
import importlib
import logging
import mmap
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from turbochain.runtime import backends
from turbochain.runtime.backends import cuda
from turbochain.runtime.backends.contract import Backend, Device, Executor, Opened, Preference
from turbochain.runtime.backends.gpu import GpuExecutor, GpuGraph
from turbochain.runtime.bundle import sealed
from turbochain.runtime.bundle.manifest import EngineKey, Gpu, Graph
from turbochain.runtime.errors import BundleError, CudaError, InputError, TurbochainError

log = logging.getLogger("turbochain")

Echo = Callable[[str, str], None]  # severity, message

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


@dataclass(eq=False)
class Said:
    """What TensorRT says while something is done."""

    echo: Echo | None = None  # gets every message: the name of its severity, and its text
    errors: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "; ".join(self.errors) or "it gave no reason"


@contextmanager
def listen(echo: Echo | None = None) -> Iterator[Said]:
    """Collect TensorRT's complaints while the block runs, those of other threads included, and none from before it."""
    said = Said(echo)
    logger().heard_by.append(said)
    try:
        yield said
    finally:
        logger().heard_by.remove(said)


@functools.cache
def logger() -> Any:
    """Return the one logger of this process: TensorRT keeps the first that it gets for as long as it is loaded."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.heard_by: list[Said] = []

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            for said in tuple(self.heard_by):
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    said.errors.append(msg)
                if said.echo:
                    with suppress(Exception):  # none may pass through TensorRT, which would end the process
                        said.echo(severity.name, msg)

    made = Logger()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))  # engines may be freed after this module when Python ends
    return made


def engine_file(name: str) -> str:
    """Return the name of a graph's serialized engine in the engine's folder."""
    return f"{name}.engine"


def kernels_file(name: str, device: Device) -> str:
    """Return the name of the file with a graph's compiled kernels, beside its engine: see `read_kernels`."""
    return f"{name}.{file_name(device)}.kernels"


def file_name(device: Device) -> str:
    """Return a GPU's name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", str(device.gpu)).strip("-")


def read_kernels(path: Path, purpose: str) -> bytes | None:
    """Return the kernels that TensorRT-RTX compiled for an engine; None if there are none, or if they are damaged.

    They are code, as the engine is. They are taken only if they were kept for this `purpose`, which names library, GPU
    and graph; TensorRT itself refuses those of an older driver.
    """
    try:
        return sealed.read(path, purpose)
    except InputError as error:
        log.warning("TensorRT compiles kernels again: %s", error)
        return None


def keep_kernels(path: Path, kernels: memoryview, purpose: str) -> None:
    """Keep compiled kernels for the next load; warn if that is impossible."""
    try:
        sealed.write(path, kernels, purpose)
    except InputError as error:
        log.warning("TensorRT compiles kernels at each load: %s", error)


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
    """Runs every graph as an engine with one execution context."""

    def load_graph(self, name: str) -> GpuGraph:
        """Deserialize the graph's engine; BundleError if it is another graph's, OutOfMemory or TurbochainError."""
        with listen() as said:
            return self._load(name, said)

    def _load(self, name: str, said: Said) -> "_Graph":
        options, bundle = self.opened.options, self.opened.bundle
        runtime = trt.Runtime(logger())
        # A version-compatible engine carries the code that runs it; its file has been hashed.
        runtime.engine_host_code_allowed = bool(options.get("version_compatible"))
        path = self.opened.folder / engine_file(name)
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as serialized:
            engine = runtime.deserialize_cuda_engine(serialized)
        if engine is None:
            raise self._failure(said, f"cannot load {path}", size)
        entry = bundle.manifest.graphs[name]
        if options.get("strip_plan"):
            refitter = trt.Refitter(engine, logger())
            source = trt.OnnxParserRefitter(refitter, logger())
            if not source.refit_from_file(str(bundle.plain(name) / entry.file)) or not refitter.refit_cuda_engine():
                raise self._failure(said, f"cannot put the weights of {entry.file} into {path}", size)
        _check_ends(engine, entry, path)
        context = self._context(name, engine)
        if context is None:
            raise self._failure(said, f"cannot make a context for {path}", engine.device_memory_size_v2)
        return _Graph(name, (runtime, engine), context, engine.device_memory_size_v2)

    def _context(self, name: str, engine: "trt.ICudaEngine") -> "trt.IExecutionContext | None":
        """Return a context without scratch memory. TensorRT-RTX compiles kernels for it, or has them from a file."""
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(config, "create_runtime_cache") and hasattr(config, "set_runtime_cache"):
            path, purpose = self.opened.folder / kernels_file(name, self.device), self._purpose(name)
            cache, kept = config.create_runtime_cache(), read_kernels(path, purpose)
            known = kept is not None and cache.deserialize(kept)
            config.set_runtime_cache(cache)
            context = engine.create_execution_context(config)
            if context is not None and not known:
                keep_kernels(path, memoryview(cache.serialize()), purpose)
            return context
        return engine.create_execution_context(config)

    def _purpose(self, name: str) -> str:
        library, version = backends.require("tensorrt")
        return f"{library} {version}, {self.device}, graph {self.opened.bundle.graph_digest(name)}"

    def _failure(self, said: Said, what: str, size: int) -> TurbochainError:
        """Return OutOfMemory if the GPU has less than `size` bytes left or TensorRT says so, else what it said."""
        if cuda.free_bytes() < size or any("outofmemory" in e.lower().replace(" ", "") for e in said.errors):
            return self.session.out_of_memory(size, what.removeprefix("cannot "))
        return TurbochainError(f"TensorRT {what}: {said}")


class _Graph(GpuGraph):
    def __init__(
        self, name: str, owners: tuple[Any, ...], context: "trt.IExecutionContext", scratch_bytes: int
    ) -> None:
        self.name, self.context, self.scratch_bytes = name, context, scratch_bytes
        self.owners = owners  # they must live as long as the context

    def place(self, address: int, size: int) -> None:
        self.context.set_device_memory(address, size)

    def check_capturable(self, stream: Any) -> None:
        if hasattr(self.context, "is_stream_capturable") and not self.context.is_stream_capturable(int(stream)):
            raise CudaError(f"TensorRT says that {self.name} cannot be captured")

    def enqueue(self, addresses: Mapping[str, int], stream: Any) -> None:
        with listen() as said:
            bound = all(self.context.set_tensor_address(name, address) for name, address in addresses.items())
            if not bound or not self.context.execute_async_v3(int(stream)):
                raise CudaError(f"TensorRT failed in {self.name}: {said}")


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
