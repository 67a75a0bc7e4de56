"""OpenVINO: reads the bundle's graphs directly, and computes in bf16 if the CPU can."""

import ctypes
import importlib
import mmap
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from turbochain.runtime import backends
from turbochain.runtime.backends import forks, openvino_int8, openvino_model
from turbochain.runtime.backends.contract import Backend, Device, Executor, Opened, Options, Preference
from turbochain.runtime.backends.cpu import Arrays, CpuExecutor, CpuGraph, Launch
from turbochain.runtime.bundle import quantization
from turbochain.runtime.bundle.manifest import COMPUTED, EngineKey, Graph
from turbochain.runtime.errors import BundleError, InputError, OutOfMemory, TurbochainError

HINTS = {"fp32": "f32", "bf16": "bf16"}
"""What a graph is computed in → OpenVINO's name for it."""

FORKED = (
    "openvino was used before this process was forked, and its threads are in the other process: load a pipeline in "
    "the workers alone (with gunicorn: without --preload), or start them with multiprocessing's spawn"
)
_TELEMETRY = "openvino_telemetry"
_IMPORTING = threading.Lock()
_DTYPES = {"f32": "float32", "f16": "float16", "i32": "int32", "u8": "uint8"}


def device(name: str | None) -> Device:
    """Return the CPU, which "cpu" and None mean; InputError for another name."""
    if name not in (None, "cpu"):
        raise InputError(f"device={name!r}: openvino runs on 'cpu'")
    return Device("cpu")


@cache
def has_bf16() -> bool:
    """Return whether OpenVINO computes in bf16 on this CPU, and does not emulate it."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def misfit(key: EngineKey, library: tuple[str, str], device: Device) -> str | None:
    """Return why an engine does not fit: as `backends.exact`, and what it computes in may need another CPU."""
    if library[0] in BACKEND.libraries:
        if key.options["inference_precision"] != "fp32" and not has_bf16():
            return "it computes in bf16, and this CPU does not"
        if key.options.get("weight_bits", 0) > openvino_int8.weight_bits():
            return "it has weights of 8 bits, whose products overflow on this CPU, which has no VNNI"
    return backends.exact(key, library, device)


def precision(graph: Graph, options: Options) -> str:
    """Return what the graph is computed in: the less precise of its own precision and the engine's."""
    if quantization.in_int8(graph, options):
        return "int8"
    return max(graph.precision, _asked(graph, options), key=COMPUTED.index)


def _asked(graph: Graph, options: Options) -> str:
    """Return OpenVINO's inference precision for a graph."""
    wanted: str = options["inference_precision"]
    if not graph.component:
        return "fp32"  # the sampler's arithmetic: a few nodes, whose roundings would add up over the steps
    if wanted == "mixed":
        return "bf16" if graph.component == "vae" else "fp32"
    return wanted


def executor(opened: Opened) -> Executor:
    """Return an executor on the CPU."""
    return OpenVino(opened)


BACKEND = Backend(
    name="openvino",
    libraries=("openvino",),
    install="pip install 'turbochain[openvino]'",
    preferences={
        "cpu": Preference(20, "it is the fastest on a CPU, and computes in bf16 if the CPU can", ("fp32", "fp16")),
    },
    device=device,
    misfit=misfit,
    executor=executor,
    precision=precision,
)


class OpenVino(CpuExecutor):
    """Runs every graph as a compiled model, with an infer request for each of its places in a chain."""

    rewrites = openvino_model.REWRITES
    process: ClassVar[int | None] = None  # the one whose threads OpenVINO computes with

    def __init__(self, opened: Opened) -> None:
        """Set up what the graphs share; TurbochainError in a process forked from one that has done so."""
        if OpenVino.process not in (None, os.getpid()):
            raise TurbochainError(FORKED)
        OpenVino.process = os.getpid()
        core()  # before the graphs, which are loaded at once
        super().__init__(opened)

    def load_graph(self, name: str) -> CpuGraph:
        """Compile the graph in memory; TurbochainError if OpenVINO cannot."""
        bundle, options = self.opened.bundle, self.opened.options
        entry = bundle.manifest.graphs[name]
        backends.require_precision("openvino", self.device, entry.precision)
        folder = bundle.plain(name)
        path = folder / entry.file
        kept = quantization.kept(bundle, name, BACKEND.name, options)
        try:
            model = core().read_model(path)  # weights are mapped from the bundle
            openvino_model.prepare(model, self.rewrites)
            if kept:
                openvino_int8.quantize(model, kept, options["weight_bits"])
            with _few_pages({str((folder / file).resolve()) for file in entry.data}):
                compiled = core().compile_model(model, "CPU", self.properties(entry, model))
        except Exception as error:  # OpenVINO raises RuntimeError and its own
            raise _failure(f"cannot load {path}", error) from error
        return _CompiledGraph(name, entry, compiled, self.opened.profile)

    def properties(self, graph: Graph, model: Any) -> dict[str, str]:
        """Return the properties that OpenVINO compiles the graph with."""
        precision = _asked(graph, self.opened.options)
        properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": HINTS[precision]}
        if self.opened.profile:
            properties["PERF_COUNT"] = "YES"
        if self.opened.threads is not None:
            properties["INFERENCE_NUM_THREADS"] = str(self.opened.threads)
        if precision == "bf16" and openvino_model.has_as_many_heads_as_tokens(model):
            properties["SNIPPETS_MODE"] = "DISABLE"  # OpenVINO 2026.4's fused attention computes these wrongly
        return properties


class _CompiledGraph(CpuGraph):
    def __init__(self, name: str, graph: Graph, compiled: Any, profile: bool) -> None:
        self.name, self.graph, self.compiled = name, graph, compiled
        self.profiles: list[Any] | None = [] if profile else None  # what the profiler said of each launch
        _check_ends(graph, compiled)

    def bind(self, arrays: Arrays) -> Launch:
        request = self.compiled.create_infer_request()
        for name, array in arrays.items():
            request.set_tensor(name, library().Tensor(array, shared_memory=True))

        def launch() -> None:
            try:
                request.infer(share_outputs=True)
            except Exception as error:
                raise _failure(f"failed in {self.name}", error) from error
            if self.profiles is not None:
                self.profiles.append(request.profiling_info)

        return launch

    def operators(self) -> Iterable[tuple[str, float]]:
        """Return the operators, and the kernels that carried them out."""
        for same in zip(*(self.profiles or []), strict=True):
            if same[0].status == same[0].Status.EXECUTED:
                kind = f"{same[0].node_type} {same[0].exec_type}"
                yield kind, sum(one.real_time.total_seconds() for one in same) / len(same)


def _check_ends(graph: Graph, compiled: Any) -> None:
    """Raise BundleError if a compiled model's inputs and outputs are not those of bundle.json."""
    for declared, found, kind in (
        (graph.inputs, compiled.inputs, "input"),
        (graph.outputs, compiled.outputs, "output"),
    ):
        expected = {t.name: (t.dtype, list(t.shape)) for t in declared}
        actual = {_name(p, expected): (_dtype(p), list(p.shape)) for p in found}
        if expected != actual:
            raise BundleError(f"{graph.file}: the {kind}s are {actual}, and bundle.json says {expected}")


def _name(port: Any, expected: Iterable[str]) -> str:
    """Return a port's declared name: it also has the names of tensors that it was merged with."""
    found: str = next((name for name in expected if name in port.names), port.any_name)
    return found


def _dtype(port: Any) -> str:
    name = port.element_type.to_string()
    return _DTYPES.get(name, name)


@contextmanager
def _few_pages(files: Set[str]) -> Iterator[None]:
    """Give back the pages of mapped files every now and then, and at the end.

    OpenVINO keeps the weights mapped as long as it keeps the compiled graph, which has its own copy of most of them:
    they would be in memory twice. A page that is read again comes from the file.
    """
    done = threading.Event()

    def give_back() -> None:
        while not done.wait(0.2):
            _give_back_pages(files)

    thread = threading.Thread(target=give_back, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _give_back_pages(files)


def _give_back_pages(files: Set[str]) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():  # only Linux says where files are mapped
        return
    libc = ctypes.CDLL(None)
    for line in maps.read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name in files:
            start, end = (int(address, 16) for address in span.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


@cache
def library() -> Any:
    """Return the module `openvino`, imported so that it reports nothing over the network.

    With the package openvino_telemetry it would report each import, from a process that it forks: that process holds
    every lock of this one until it gets an answer.
    """
    backends.require("openvino")
    absent: Any = None  # importing what has this as its module raises ImportError, for which OpenVINO is prepared
    with _IMPORTING:
        before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == _TELEMETRY}
        sys.modules[_TELEMETRY] = absent
        try:
            return importlib.import_module("openvino")
        finally:
            del sys.modules[_TELEMETRY]
            sys.modules.update(before)


@cache
def core() -> Any:
    """Return OpenVINO's view of the devices."""
    made = library().Core()
    forks.let_threads_rest()
    os.register_at_fork(after_in_child=lambda: forks.keep_for_ever(made))
    return made


def _failure(what: str, error: Exception) -> TurbochainError:
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    kind = OutOfMemory if isinstance(error, MemoryError) or "bad_alloc" in str(error) else TurbochainError
    return kind(f"openvino {what}: {(lines or ['unknown error'])[0].strip()[:300]}")
