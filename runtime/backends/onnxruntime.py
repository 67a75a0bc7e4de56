"""ONNX Runtime: reads the bundle's graphs on its CPU provider or, with onnxruntime-gpu, the engine's forms on a GPU."""

import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.runtime import backends
from turbochain.runtime.backends import cuda
from turbochain.runtime.backends import onnxruntime_sessions as sessions
from turbochain.runtime.backends.contract import Backend, Device, Executor, Opened, Options, Preference
from turbochain.runtime.backends.cpu import Arrays, CpuExecutor, CpuGraph, Launch
from turbochain.runtime.backends.gpu import GpuExecutor, GpuGraph
from turbochain.runtime.bundle import quantization
from turbochain.runtime.bundle.manifest import Graph
from turbochain.runtime.errors import BundleError, InputError

LEAST_GPU = "1.31.1"
"""The release of onnxruntime-gpu that was seen to stage nothing in page-locked memory; an older one's Concat may."""


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


def precision(graph: Graph, options: Options) -> str:
    """Return what the graph is computed in: its own precision, or int8."""
    return "int8" if quantization.in_int8(graph, options) else graph.precision


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
    precision=precision,
)


class OnnxRuntimeCpu(CpuExecutor):
    """Runs every graph as a session, bound once to the buffers."""

    def __init__(self, opened: Opened) -> None:
        """Set up what the sessions share."""
        _share_arena()  # before the graphs, which are loaded at once
        self._patches: dict[str, Arrays] = {}
        super().__init__(opened)

    def load_graph(self, name: str) -> CpuGraph:
        """Create the graph's session; TurbochainError if ONNX Runtime cannot."""
        threads, entry = self.opened.threads, self.opened.bundle.manifest.graphs[name]
        backends.require_precision("onnxruntime", self.device, entry.precision)
        options = sessions.default_options()
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
            options.profile_file_prefix = str(Path(tempfile.gettempdir()) / f"turbochain-{os.getpid()}-{name}")
        without = _keep_mapped(options) if self._stays_mapped(name) else []
        if self._in_int8(name):
            without.append("MatMulAddFusion")  # it makes a Gemm, which has no int8 with a bias in fp32
        kept = sessions.override(options, self._patches.get(name, {}))
        model = self.model(name, options)
        return _SessionGraph(name, entry, sessions.load(model, name, options, sessions.CPU, {}, without), kept)

    def model(self, name: str, options: Any) -> str | bytes:
        """Return what a session with these options is made of: the path of an ONNX file, or its bytes."""
        if self._in_int8(name):
            # Without it, a CPU that has no VNNI sums products of bytes in 16 bits, which overflow.
            options.add_session_config_entry("session.x64quantprecision", "1")
            return read_form(self.opened, name, options)
        return str(self.opened.bundle.plain(name) / self.opened.bundle.manifest.graphs[name].file)

    def copies_weights(self, name: str) -> bool:
        """See CpuExecutor."""
        return not self._stays_mapped(name)

    def can_patch(self, name: str) -> bool:
        """See Executor. In other sessions constants are folded, which reads the file's values and no others."""
        return self._stays_mapped(name)

    def _in_int8(self, name: str) -> bool:
        return quantization.in_int8(self.opened.bundle.manifest.graphs[name], self.opened.options)

    def _stays_mapped(self, name: str) -> bool:
        """Return whether the graph's weights are used mapped, as the bundle's file holds them.

        Optimised and packed they are a second copy, which takes seconds and gigabytes to make, and makes a launch of a
        UNet or of a text encoder a tenth quicker. The VAE has few weights and many multiplications: there it pays. So
        it does for fp16, which the CPU provider would convert to fp32 in each launch; and int8 is a copy anyway.
        """
        entry = self.opened.bundle.manifest.graphs[name]
        return entry.precision == "fp32" and entry.component != "vae" and not self._in_int8(name)

    def patch(self, name: str, values: Arrays) -> None:
        """See Executor."""
        if not self.can_patch(name):
            super().patch(name, values)
        self._patches[name] = values
        if name in self.loaded:
            self.unload(name)

    def close(self) -> None:
        """See Executor; also give back the arena's memory that is free."""
        super().close()
        with self._working:
            _shrink_arena()


class _SessionGraph(CpuGraph):
    def __init__(self, name: str, graph: Graph, session: Any, overrides: Any) -> None:
        """Take a session, and keep alive `overrides`, which it uses in place of initializers."""
        self.name, self.graph, self.session, self.overrides = name, graph, session, overrides
        sessions.check_ends(graph, session)

    def bind(self, arrays: Arrays) -> Launch:
        binding = sessions.bind(self.graph, self.session, "cpu", 0, {name: a.ctypes.data for name, a in arrays.items()})
        return lambda: sessions.run(self.name, self.session, binding, None)

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


CUDA_WITHOUT = ("GatherSliceToSplitFusion",)
"""The optimisers that a graph on a GPU must do without: a Split into unequal parts, which that one makes of the slices
of the time projections, is given its sizes in page-locked memory, in every run anew."""


def form_file(name: str, int8_error: float | None = None) -> str:
    """Return the name of the engine's file with its form of a graph, or with that in int8 which may add so much, in
    percent."""
    return f"{name}.onnx" if int8_error is None else f"{name}.int8-{int8_error:g}.onnx"


def read_form(opened: Opened, name: str, options: Any) -> bytes:
    """Return the engine's form of a graph, and let a session with `options` find its data in the bundle.

    Raises BundleError if the engine has none, or it names other data than the graph's.
    """
    in_int8 = quantization.in_int8(opened.bundle.manifest.graphs[name], opened.options)
    path = opened.folder / form_file(name, opened.options["int8_error"] if in_int8 else None)
    try:
        form = path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read: {error.strerror}; remove {path.parent}, and build it again"
        ) from None
    opened.bundle.check_form(name, form)
    beside = opened.bundle.plain(name) / opened.bundle.manifest.graphs[name].file
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(beside.parent))
    return form


class OnnxRuntimeCuda(GpuExecutor):
    """Runs every graph as a session on the executor's stream, bound to the executor's buffers."""

    concurrent = False  # a session is tied to one stream when it is made

    def __init__(self, opened: Opened) -> None:
        """Take the GPU; InputError if onnxruntime-gpu is older than `LEAST_GPU`, and what `GpuExecutor` raises."""
        _, version = backends.require("onnxruntime")
        if _numbers(version) < _numbers(LEAST_GPU):
            raise InputError(
                f"onnxruntime-gpu {version} is installed, and on a GPU {LEAST_GPU} or later is needed: "
                "pip install --upgrade 'turbochain[cuda]'"
            )
        super().__init__(opened)

    def load_graph(self, name: str) -> GpuGraph:
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
        options = sessions.default_options()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        form = read_form(self.opened, name, options)
        session = sessions.load(form, name, options, sessions.CUDA, provider, CUDA_WITHOUT)
        return _CudaGraph(name, self.opened.bundle.manifest.graphs[name], session, self.device.index)

    def check_captured(self, graph: Any) -> None:
        """Refuse a captured graph whose kernels leave work to the host, or copy memory that may be freed by then."""
        cuda.refuse_host(graph, {array.ctypes.data for array in self.host_buffers()})


class _CudaGraph(GpuGraph):
    def __init__(self, name: str, graph: Graph, session: Any, index: int) -> None:
        self.name, self.graph, self.session, self.index = name, graph, session, index
        sessions.check_ends(graph, session)
        self.options = sessions.library().RunOptions()
        # The end of a run must not wait for the stream: it may be being captured.
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.bindings: dict[tuple[tuple[str, int], ...], Any] = {}

    def enqueue(self, addresses: Mapping[str, int], stream: Any) -> None:
        key = tuple(addresses.items())
        if key not in self.bindings:
            self.bindings[key] = sessions.bind(self.graph, self.session, "cuda", self.index, addresses)
        sessions.run(self.name, self.session, self.bindings[key], self.options)


def _keep_mapped(options: Any) -> list[str]:
    """Let a session neither pack nor rewrite weights; returns the optimisers that it must do without."""
    options.add_session_config_entry("session.disable_prepacking", "1")
    # The level above this one rearranges the weights of convolutions.
    options.graph_optimization_level = sessions.library().GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return ["ConstantFolding"]  # it transposes weights; a MatMul can read them as they are


@cache
def _share_arena() -> None:
    """Let all graphs share one arena: they run one after the other, so it is as large as the largest needs."""
    library = sessions.library()
    kind, memory = library.OrtAllocatorType.ORT_ARENA_ALLOCATOR, library.OrtMemType.DEFAULT
    library.create_and_register_allocator(library.OrtMemoryInfo("Cpu", kind, 0, memory), library.OrtArenaCfg({}))


def _shrink_arena() -> None:
    """Give back what no graph holds; ONNX Runtime does that at the end of a run that asks for it, and only there."""
    options, run = sessions.default_options(), sessions.library().RunOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    run.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    session = sessions.library().InferenceSession(sessions.IDENTITY, options, providers=[sessions.CPU])
    session.run(None, {"x": np.zeros(1, np.float32)}, run)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
