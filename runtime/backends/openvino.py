"""OpenVINO: reads the bundle's graphs directly, and computes in bf16 where the CPU can."""

import ctypes
import importlib
import json
import mmap
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from turbochain.runtime import backends
from turbochain.runtime.backends import Device, Preference, openvino_model
from turbochain.runtime.backends.cpu import HostExecutor
from turbochain.runtime.bundle.manifest import COMPUTED, EngineKey, Graph
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.errors import BundleError, InputError, OutOfMemory, TurbochainError

LIBRARIES = ("openvino",)
INSTALL = "pip install 'turbochain[openvino]'"
PREFERENCES = {
    "cpu": Preference(20, "it is the fastest on a CPU, and computes in bf16 where the CPU can", ("fp32", "fp16")),
}
HINTS = {"fp32": "f32", "bf16": "bf16"}
"""What a graph is computed in → OpenVINO's name for it."""

_TELEMETRY = "openvino_telemetry"
_IMPORTING = threading.Lock()
_DTYPES = {"f32": "float32", "f16": "float16", "i32": "int32", "u8": "uint8"}


def device(name: str | None) -> Device:
    """The CPU, which "cpu" and None mean; InputError for another name."""
    if name not in (None, "cpu"):
        raise InputError(f"device={name!r}: openvino runs on 'cpu'")
    return Device("cpu")


@cache
def has_bf16() -> bool:
    """Whether OpenVINO computes in bf16 on this CPU, and does not emulate it."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def misfit(key: EngineKey, library: tuple[str, str], device: Device) -> str | None:
    """As `backends.exact`; and one that computes in bf16 needs a CPU that does."""
    if key.options["inference_precision"] != "fp32" and library[0] in LIBRARIES and not has_bf16():
        return "it computes in bf16, and this CPU does not"
    return backends.exact(key, library, device)


def precision(graph: Graph, options: Mapping[str, Any]) -> str:
    """What the graph is computed in: the less precise of its own and the engine's."""
    if in_int8(graph, options):
        return "int8"
    return max(graph.precision, _asked(graph, options), key=COMPUTED.index)


def in_int8(graph: Graph, options: Mapping[str, Any]) -> bool:
    """Whether the graph's convolutions are."""
    return bool(options["vae_int8"]) and graph.role == "vae_decoder"


def ranges_file(graph: str) -> str:
    """The engine's file with the ranges of what the convolutions of a graph in int8 read."""
    return f"{graph}.ranges.json"


def _asked(graph: Graph, options: Mapping[str, Any]) -> str:
    """OpenVINO's inference precision for a graph."""
    asked: str = options["inference_precision"]
    if asked == "mixed":
        return "bf16" if graph.role == "vae_decoder" else "fp32"
    return asked


def executor(bundle: Bundle, folder: Path, options: Mapping[str, Any], **where: Any) -> "CpuExecutor":
    """An executor on the CPU; see `HostExecutor` for the rest."""
    return CpuExecutor(bundle, folder, options, **where)


class CpuExecutor(HostExecutor):
    """Every graph is an infer request on the buffers."""

    rewrites = openvino_model.REWRITES

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self._profiles: dict[str, list[Any]] = {}  # graph → what the profiler said of each launch
        core()  # one for all graphs, which are loaded at once
        super().__init__(*arguments, **more)

    def load(self, graph: str) -> Callable[[], None]:
        """Compile the graph in memory; TurbochainError where OpenVINO cannot."""
        stage = self.bundle.manifest.graphs[graph]
        backends.require_precision("openvino", self.device, stage.precision)
        path = self.bundle.path / stage.file
        try:
            model = core().read_model(path)  # weights are mapped from the bundle
            openvino_model.prepare(model, self.rewrites)
            if in_int8(stage, self.options):
                ranges = json.loads((self.folder / ranges_file(graph)).read_text())
                openvino_model.quantize(model, ranges)
            with _few_pages({str((self.bundle.path / file).resolve()) for file in stage.data}):
                request = core().compile_model(model, "CPU", self.properties(graph, model)).create_infer_request()
        except Exception as error:  # OpenVINO raises RuntimeError and its own
            raise _failure(f"cannot load {path}", error) from error
        self._bind(stage, request)

        def launch() -> None:
            try:
                request.infer(share_outputs=True)
            except Exception as error:
                raise _failure(f"failed in {graph}", error) from error
            if self.profile:
                self._profiles.setdefault(graph, []).append(request.profiling_info)

        return launch

    def operators(self, graph: str) -> Iterable[tuple[str, float]]:
        """See HostExecutor: the operator and the kernel that carried it out."""
        for same in zip(*self._profiles.pop(graph), strict=True):
            if same[0].status == same[0].Status.EXECUTED:
                kind = f"{same[0].node_type} {same[0].exec_type}"
                yield kind, sum(one.real_time.total_seconds() for one in same) / len(same)

    def properties(self, graph: str, model: Any) -> dict[str, str]:
        """Return OpenVINO's properties to compile a graph with."""
        # What runs once is worth fp32: the embedding of the time, which the whole UNet reads.
        stage, once = self.bundle.manifest.graphs[graph], graph in self.bundle.chain.once
        precision = "fp32" if once else _asked(stage, self.options)
        properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": HINTS[precision]}
        if self.profile:
            properties["PERF_COUNT"] = "YES"
        if self.threads is not None:
            properties["INFERENCE_NUM_THREADS"] = str(self.threads)
        if precision == "bf16" and openvino_model.has_as_many_heads_as_tokens(model):
            properties["SNIPPETS_MODE"] = "DISABLE"  # OpenVINO 2026.4's fused attention computes these wrongly
        return properties

    def _bind(self, stage: Graph, request: Any) -> None:
        """Inputs and outputs to the buffers; BundleError where they are not those of bundle.json."""
        tensor = library().Tensor
        ends = ((stage.inputs, request.model_inputs, "input"), (stage.outputs, request.model_outputs, "output"))
        for declared, found, kind in ends:
            expected = {t.name: (t.dtype, list(t.shape)) for t in declared}
            actual = {_name(p, expected): (_dtype(p), list(p.shape)) for p in found}
            if expected != actual:
                raise BundleError(f"{stage.file}: the {kind}s are {actual}, and bundle.json says {expected}")
            for name in expected:
                request.set_tensor(name, tensor(self.buffers[name], shared_memory=True))


def _name(port: Any, expected: Iterable[str]) -> str:
    """A port's name: the declared one of those it has, for it also has those of what it was merged with."""
    found: str = next((name for name in expected if name in port.names), port.any_name)
    return found


def _dtype(port: Any) -> str:
    name = port.element_type.to_string()
    return _DTYPES.get(name, name)


@contextmanager
def _few_pages(files: Set[str]) -> Iterator[None]:
    """Give back the memory of mapped files' pages every now and then, and at the end.

    OpenVINO keeps the weights mapped for as long as it keeps the compiled graph, which has its own copy of most: they
    would be in memory twice. A page that is read again comes from the file.
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
    """The module `openvino`, imported in a way that nobody is told of it.

    With the package openvino_telemetry it would report each import over the network, from a process that it forks: one
    that holds every lock which this process holds, for as long as there is no answer.
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
    """OpenVINO's devices."""
    return library().Core()


def _failure(what: str, error: Exception) -> TurbochainError:
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    kind = OutOfMemory if isinstance(error, MemoryError) or "bad_alloc" in str(error) else TurbochainError
    return kind(f"openvino {what}: {(lines or ['unknown error'])[0].strip()[:300]}")
