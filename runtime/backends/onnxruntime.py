"""ONNX Runtime: reads the bundle's graphs directly, on its CPU provider or, with onnxruntime-gpu, on a GPU."""

import importlib
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.runtime import backends
from turbochain.runtime.backends import cuda
from turbochain.runtime.backends.contract import Backend, Device, Executor, Opened, Preference
from turbochain.runtime.backends.cpu import Arrays, CpuExecutor, Launch, Loaded
from turbochain.runtime.backends.gpu import GpuExecutor, GpuGraph
from turbochain.runtime.bundle.manifest import Graph
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.errors import BundleError, InputError, OutOfMemory, TurbochainError

_IDENTITY = (  # x → y, float32 [1]: a model that can be run without a file
    b'\x08\x08\x12\x00:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08'
    b"\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x15"
)

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
}


def device(name: str | None) -> Device:
    """Return "cpu", or with onnxruntime-gpu the GPU that "cuda" or "cuda:N" means; None: a GPU if there is one.

    Raises InputError for another name, NoGpu if there is no such GPU.
    """
    gpu = (backends.library("onnxruntime") or ("",))[0] == "onnxruntime-gpu"
    if name == "cpu" or (name is None and not gpu):
        return Device("cpu")
    if not gpu:
        raise InputError(
            f"device={name!r}: onnxruntime runs on 'cpu'; on a GPU with pip uninstall onnxruntime, then "
            "pip install 'turbochain[cuda]'"
        )
    try:
        index, found = cuda.find(name)
    except InputError:
        if name is None:  # no GPU, no driver or no cuda-bindings: its CPU provider is there
            return Device("cpu")
        raise
    return Device("cuda", index, found)


def executor(opened: Opened) -> Executor:
    """Return an executor on the CPU or CUDA provider, by the kind of the device."""
    return OnnxRuntimeCuda(opened) if opened.device.kind == "cuda" else OnnxRuntimeCpu(opened)


BACKEND = Backend(
    name="onnxruntime",
    libraries=("onnxruntime", "onnxruntime-gpu"),
    install="pip install 'turbochain[cpu]'",
    preferences={
        "cpu": Preference(10, "it runs on any CPU", ("fp32", "fp16")),  # it has no bf16 convolution
        "cuda": Preference(50, "it runs on any NVIDIA GPU", ("fp16", "fp32", "bf16")),
    },
    device=device,
    misfit=backends.exact,
    executor=executor,
)


class OnnxRuntimeCpu(CpuExecutor):
    """Every graph is a session, bound once to the buffers."""

    def __init__(self, opened: Opened) -> None:
        """Set up what the sessions share."""
        _share_arena()  # before the graphs, which are loaded at once
        super().__init__(opened)

    def load_graph(self, graph: str) -> Loaded:
        """Create the graph's session; TurbochainError if ONNX Runtime cannot."""
        bundle, threads = self.opened.bundle, self.opened.threads
        entry = bundle.manifest.graphs[graph]
        backends.require_precision("onnxruntime", self.device, entry.precision)
        options = _options()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Each graph has its own threads, and they must not spin while those of the next graph work. Threads that graphs
        # share are the whole process's, of one number for all: with them an app's own sessions are refused.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not entry.component:
            options.intra_op_num_threads = 1  # the sampler's arithmetic: a few nodes
        elif threads is not None:
            options.intra_op_num_threads = threads
        if self.opened.profile:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(tempfile.gettempdir()) / f"turbochain-{os.getpid()}-{graph}")
        without = _keep_mapped(options) if _stays_mapped(entry) else []
        return _CpuGraph(graph, entry, _session(bundle, graph, options, ["CPUExecutionProvider"], without))

    def close(self) -> None:
        """See Executor; also give back the arena's memory that is free."""
        super().close()
        _shrink_arena()


class _CpuGraph(Loaded):
    def __init__(self, name: str, graph: Graph, session: Any) -> None:
        self.name, self.graph, self.session = name, graph, session
        _check_ends(graph, session)

    def bind(self, arrays: Arrays) -> Launch:
        binding = _bind(self.graph, self.session, "cpu", 0, {name: a.ctypes.data for name, a in arrays.items()})
        return lambda: _run(self.name, self.session, binding, None)

    def operators(self) -> Iterable[tuple[str, float]]:
        """Return ONNX's operators, and those that ONNX Runtime makes of several."""
        path = Path(self.session.end_profiling())
        events = json.loads(path.read_text())
        path.unlink()
        launches = sum(event["name"] == "model_run" for event in events)
        seconds: dict[tuple[str, str], float] = defaultdict(float)
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
                seconds[event["name"], event["args"]["op_name"]] += 1e-6 * event["dur"] / launches
        for (_, kind), mean in seconds.items():
            yield kind, mean


class OnnxRuntimeCuda(GpuExecutor):
    """Every graph is a session on the executor's stream, bound to the executor's buffers."""

    concurrent = False  # a session is tied to one stream when it is made

    def load_graph(self, graph: str) -> GpuGraph:
        """Create the graph's session on the GPU; TurbochainError if ONNX Runtime cannot."""
        provider = {
            "device_id": str(self.device.index),
            "user_compute_stream": str(int(self.stream)),
            "use_tf32": "0",  # fp32 means fp32
            "arena_extend_strategy": "kSameAsRequested",
        }
        if self.opened.options.get("prefer_nhwc"):
            provider["prefer_nhwc"] = "1"
        # With the CPU's provider behind it ONNX Runtime would compute there, silently, what it cannot do on the GPU.
        options = _options()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        bundle = self.opened.bundle
        session = _session(bundle, graph, options, [("CUDAExecutionProvider", provider)])
        return _CudaGraph(graph, bundle.manifest.graphs[graph], session, self.device.index)

    def check_captured(self, graph: Any) -> None:
        """Refuse a captured graph whose kernels leave work to the host, or copy memory that may be freed by then."""
        cuda.refuse_host(graph, {array.ctypes.data for array in self.host_buffers()})


class _CudaGraph(GpuGraph):
    def __init__(self, name: str, graph: Graph, session: Any, index: int) -> None:
        self.name, self.graph, self.session, self.index = name, graph, session, index
        _check_ends(graph, session)
        self.options = _library().RunOptions()
        # The end of a run must not wait for the stream: it may be being captured.
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.bindings: dict[tuple[tuple[str, int], ...], Any] = {}

    def enqueue(self, addresses: Mapping[str, int], stream: Any) -> None:
        key = tuple(addresses.items())
        if key not in self.bindings:
            self.bindings[key] = _bind(self.graph, self.session, "cuda", self.index, addresses)
        _run(self.name, self.session, self.bindings[key], self.options)


def _library() -> Any:
    """Return the module `onnxruntime`, imported so that it neither reports to its maker nor leaves files for that."""
    backends.require("onnxruntime")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at the import
    return importlib.import_module("onnxruntime")


def _options() -> Any:
    options = _library().SessionOptions()
    options.log_severity_level = 3  # errors only: its warnings are about nodes that it places well
    # A pattern of what a run allocates is no quicker, holds twice as much as the runs need, and is allocated in a later
    # run than the first, which cannot be captured.
    options.enable_mem_pattern = False
    return options


def _stays_mapped(graph: Graph) -> bool:
    """Return whether the graph's weights are used mapped, as the bundle's file holds them.

    Optimised and packed they are a second copy, which takes seconds and gigabytes to make, and makes a launch of a UNet
    or of a text encoder a tenth quicker. The VAE has few weights and many multiplications: there it pays. So it does
    for fp16, which the CPU provider would convert to fp32 in each launch.
    """
    return graph.precision == "fp32" and graph.role != "vae_decoder"


def _keep_mapped(options: Any) -> list[str]:
    """Let a session neither pack nor rewrite weights; returns the optimisers that it must do without."""
    options.add_session_config_entry("session.disable_prepacking", "1")
    # The level above this one rearranges the weights of convolutions.
    options.graph_optimization_level = _library().GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return ["ConstantFolding"]  # it transposes weights; a MatMul can read them as they are


@cache
def _share_arena() -> None:
    """Let all graphs share one arena: they run one after the other, so it is as large as the largest needs."""
    library = _library()
    kind, memory = library.OrtAllocatorType.ORT_ARENA_ALLOCATOR, library.OrtMemType.DEFAULT
    library.create_and_register_allocator(library.OrtMemoryInfo("Cpu", kind, 0, memory), library.OrtArenaCfg({}))


def _shrink_arena() -> None:
    """Give back what no graph holds; ONNX Runtime does that at the end of a run that asks for it, and only there."""
    options, run = _options(), _library().RunOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    run.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    session = _library().InferenceSession(_IDENTITY, options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.zeros(1, np.float32)}, run)


def _session(bundle: Bundle, graph: str, options: Any, providers: list[Any], without: Sequence[str] = ()) -> Any:
    path = bundle.plain(graph) / bundle.manifest.graphs[graph].file
    if hasattr(_library(), "preload_dlls") and providers != ["CPUExecutionProvider"]:
        _library().preload_dlls()  # CUDA's and cuDNN's, where pip has installed them
    try:
        session = _library().InferenceSession(
            str(path), options, providers=providers, disabled_optimizers=list(without)
        )
    except Exception as error:  # ONNX Runtime has no common base class for what it raises
        raise _failure(f"cannot load {path}", error) from error
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != wanted:  # where CUDA's libraries are missing it only warns
        raise TurbochainError(
            f"onnxruntime cannot use its {wanted}: CUDA's or cuDNN's libraries are missing, or of another version: "
            "pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    return session


def _check_ends(graph: Graph, session: Any) -> None:
    """Raise BundleError if a session's inputs and outputs are not those of bundle.json."""
    ends = ((graph.inputs, session.get_inputs(), "input"), (graph.outputs, session.get_outputs(), "output"))
    for declared, found, kind in ends:
        expected = {t.name: (t.dtype, list(t.shape)) for t in declared}
        actual = {t.name: (_DTYPES.get(t.type, t.type), t.shape) for t in found}
        if expected != actual:
            raise BundleError(f"{graph.file}: the {kind}s are {actual}, and bundle.json says {expected}")


def _bind(graph: Graph, session: Any, device: str, index: int, addresses: Mapping[str, int]) -> Any:
    """Return a binding of a session's inputs and outputs to these addresses."""
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, graph.inputs), (binding.bind_output, graph.outputs)):
        for t in tensors:
            bind(t.name, device, index, np.dtype(t.dtype), list(t.shape), addresses[t.name])
    return binding


def _run(graph: str, session: Any, binding: Any, options: Any) -> None:
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:
        raise _failure(f"failed in {graph}", error) from error


def _failure(what: str, error: Exception) -> TurbochainError:
    reason = str(error).strip().splitlines()[0][:300]
    signs = ("out of memory", "Failed to allocate memory", "ALLOC_FAILED", "cudaErrorMemoryAllocation")
    kind = OutOfMemory if any(sign in str(error) for sign in signs) else TurbochainError
    return kind(f"onnxruntime {what}: {reason}")
