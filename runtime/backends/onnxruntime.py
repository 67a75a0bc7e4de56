"""ONNX Runtime: reads the bundle's graphs directly, on its CPU provider or, with onnxruntime-gpu, on a GPU."""

import importlib
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.runtime import backends
from turbochain.runtime.backends import Device, Preference, cuda
from turbochain.runtime.backends.cpu import HostExecutor
from turbochain.runtime.backends.gpu import DeviceExecutor, Stage
from turbochain.runtime.bundle.manifest import Graph
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.errors import BundleError, InputError, OutOfMemory, TurbochainError

LIBRARIES = ("onnxruntime", "onnxruntime-gpu")
INSTALL = "pip install 'turbochain[cpu]'"
PREFERENCES = {
    "cpu": Preference(10, "it runs on any CPU", ("fp32", "fp16")),  # it has no bf16 convolution
    "cuda": Preference(50, "it runs on any NVIDIA GPU", ("fp16", "fp32", "bf16")),
}

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
    """ "cpu", or with onnxruntime-gpu the GPU that "cuda" or "cuda:N" means; None: a GPU where there is one.

    InputError for another name, NoGpu where there is no such GPU.
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


misfit = backends.exact


def executor(
    bundle: Bundle, folder: Path, options: Mapping[str, Any], *, device: Device, **where: Any
) -> "HostExecutor | DeviceExecutor":
    """An executor on the CPU or CUDA provider, by the kind of `device`; see theirs for the rest."""
    kind = CudaExecutor if device.kind == "cuda" else CpuExecutor
    return kind(bundle, folder, options, device=device, **where)


class CpuExecutor(HostExecutor):
    """Every graph is a session, bound once to the buffers."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self._profiled: dict[str, Any] = {}  # graph → its session
        _share_arena()  # before the graphs, which are loaded at once
        super().__init__(*arguments, **more)

    def load(self, graph: str) -> Callable[[], None]:
        """Create the graph's session; TurbochainError where ONNX Runtime cannot."""
        backends.require_precision("onnxruntime", self.device, self.bundle.manifest.graphs[graph].precision)
        options = _options()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Each graph has its own threads, and they must not spin while those of the next graph work.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if self.profile and graph not in self.bundle.chain.once:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(tempfile.gettempdir()) / f"turbochain-{os.getpid()}-{graph}")
        copying = _keep_mapped(options) if _stays_mapped(self.bundle.manifest.graphs[graph]) else []
        session = _session(self.bundle, graph, options, ["CPUExecutionProvider"], copying)
        if options.enable_profiling:
            self._profiled[graph] = session
        at = {name: buffer.ctypes.data for name, buffer in self.buffers.items()}
        binding = _bind(self.bundle.manifest.graphs[graph], session, "cpu", 0, at)
        return lambda: _run(graph, session, binding, None)

    def close(self) -> None:
        """See HostExecutor; and the arena's memory that is free."""
        super().close()
        _shrink_arena()

    def operators(self, graph: str) -> Iterable[tuple[str, float]]:
        """See HostExecutor: ONNX's operators, and those that ONNX Runtime makes of several."""
        path = Path(self._profiled.pop(graph).end_profiling())
        events = json.loads(path.read_text())
        path.unlink()
        launches = sum(event["name"] == "model_run" for event in events)
        seconds: dict[tuple[str, str], float] = defaultdict(float)
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
                seconds[event["name"], event["args"]["op_name"]] += 1e-6 * event["dur"] / launches
        for (_, kind), mean in seconds.items():
            yield kind, mean


class CudaExecutor(DeviceExecutor):
    """Every graph is a session on the executor's stream, bound to the executor's buffers."""

    concurrent = False  # a session is tied to one stream when it is made

    def load(self, graph: str) -> Stage:
        """Create the graph's session on the GPU; TurbochainError where ONNX Runtime cannot."""
        provider = {
            "device_id": str(self.device.index),
            "user_compute_stream": str(int(self.stream)),
            "use_tf32": "0",  # fp32 means fp32
            "arena_extend_strategy": "kSameAsRequested",
        }
        # With the CPU's provider behind it ONNX Runtime would compute there, silently, what it cannot do on the GPU.
        options = _options()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        session = _session(self.bundle, graph, options, [("CUDAExecutionProvider", provider)])
        return _CudaStage(graph, self.bundle.manifest.graphs[graph], session, self.device.index)

    def check_captured(self, graph: Any) -> None:
        """Some of its kernels leave work to the host, or copy what they have freed since: such a graph must not run."""
        cuda.refuse_host(graph, {array.ctypes.data for array in self._host_buffers.values()})


class _CudaStage(Stage):
    def __init__(self, graph: str, stage: Graph, session: Any, index: int) -> None:
        self.graph, self.stage, self.session, self.index = graph, stage, session, index
        self.options = _library().RunOptions()
        # The end of a run must not wait for the stream: it may be being captured.
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.bindings: dict[tuple[tuple[str, int], ...], Any] = {}

    def enqueue(self, addresses: Mapping[str, int], stream: Any) -> None:
        key = tuple(addresses.items())
        if key not in self.bindings:
            self.bindings[key] = _bind(self.stage, self.session, "cuda", self.index, addresses)
        _run(self.graph, self.session, self.bindings[key], self.options)


def _library() -> Any:
    backends.require("onnxruntime")
    return importlib.import_module("onnxruntime")


def _options() -> Any:
    options = _library().SessionOptions()
    options.log_severity_level = 3  # errors only: its warnings are about nodes that it places well
    # A pattern of what a run allocates is no quicker, holds twice as much as the runs need, and is allocated in a later
    # run than the first, which cannot be captured.
    options.enable_mem_pattern = False
    return options


def _stays_mapped(stage: Graph) -> bool:
    """Whether the graph's weights are used as the bundle's file holds them.

    Optimised and packed they are a second copy, which takes seconds and gigabytes to make, and makes a launch of a UNet
    or of a text encoder a tenth quicker. The VAE has few weights and many multiplications: there it pays. So it does
    for fp16, which the CPU provider would convert to fp32 in each launch.
    """
    return stage.precision == "fp32" and stage.role != "vae_decoder"


def _keep_mapped(options: Any) -> list[str]:
    """Let a session neither pack nor rewrite weights; returns the optimisers that it must do without."""
    options.add_session_config_entry("session.disable_prepacking", "1")
    # The level above this one rearranges the weights of convolutions.
    options.graph_optimization_level = _library().GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return ["ConstantFolding"]  # it transposes weights; a MatMul can read them as they are


@cache
def _share_arena() -> None:
    """One arena for all graphs, which run one after the other: it is as large as the largest needs, not their sum."""
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
    path = bundle.path / bundle.manifest.graphs[graph].file
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


def _bind(stage: Graph, session: Any, device: str, index: int, addresses: Mapping[str, int]) -> Any:
    """A session's inputs and outputs at these addresses; BundleError where they are not those of bundle.json."""
    binding = session.io_binding()
    ends = (
        (stage.inputs, session.get_inputs(), "input"),
        (stage.outputs, session.get_outputs(), "output"),
    )
    for declared, found, kind in ends:
        expected = {t.name: (t.dtype, list(t.shape)) for t in declared}
        actual = {t.name: (_DTYPES.get(t.type, t.type), t.shape) for t in found}
        if expected != actual:
            raise BundleError(f"{stage.file}: the {kind}s are {actual}, and bundle.json says {expected}")
        for name, (dtype, shape) in expected.items():
            getattr(binding, f"bind_{kind}")(name, device, index, np.dtype(dtype), shape, addresses[name])
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
