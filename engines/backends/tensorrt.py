"""TensorRT: one plan per graph, built for one kind of NVIDIA GPU. `tensorrt` and `tensorrt_rtx` are one code path.

What one of them lacks is looked for, not known by version. The network is strongly typed: the graph's own dtypes
say what is computed in which precision.
"""

import hashlib
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from turbochain.engines.backends.fractions import Fractions
from turbochain.engines.options import Option
from turbochain.runtime import backends
from turbochain.runtime.backends import Device, cuda
from turbochain.runtime.backends.tensorrt import logger, trt
from turbochain.runtime.bundle import writing
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.errors import InputError, TurbochainError

Progress = Callable[[int, int], None]
Echo = Callable[[str, str], None]  # severity, message

READS_GRAPHS = False
OPTIONS = {
    "builder_optimization_level": Option(3, "how hard the builder searches; 5 may take many times as long", most=5),
    "tiling_optimization_level": Option(
        "none",
        "how hard it searches for ways to keep data in the L2 cache",
        choices=("none", "fast", "moderate", "full"),
    ),
    "workspace_gib": Option(0, "GiB that a layer may use besides its tensors; 0: all that the GPU has", most=1024),
    "max_aux_streams": Option(-1, "streams a graph may use besides its own; -1: TensorRT decides", least=-1, most=16),
    "hardware_compatibility": Option(
        "none",
        "also run on other GPUs: of Ampere and newer, or of the same compute capability; slower",
        choices=("none", "ampere_plus", "same_compute_capability"),
    ),
    "version_compatible": Option(False, "also run with later versions of the same major version; slower"),
    "refit": Option(False, "the weights can be replaced in the plan"),
    "strip_plan": Option(False, "no weights in the plan: they come from the ONNX file at each load"),
}
"""The options that an engine is built with, part of its key; the names are those of TensorRT's builder.

`builder_optimization_level` stays at TensorRT's own default: 5 can take hours for what no measurement here backs.
"""

log = logging.getLogger("turbochain")

_TOTAL = 1000  # progress is told in so many parts
_REPORT_EVERY = 0.1  # seconds


def compile(
    bundle: Bundle,
    graph: str,
    folder: Path,
    options: Mapping[str, Any],
    device: Device,
    cache: Path,
    progress: Progress,
) -> list[str]:
    """Build the graph's plan into `folder`; returns its name there.

    `cache`: the folder with the timing caches. Raises TurbochainError, with every reason that TensorRT gives, where
    it cannot build the graph; InputError for an option that this library does not have. What `progress` raises stops
    the build.
    """
    path = bundle.path / bundle.manifest.graphs[graph].file
    plan = serialize(path, graph, options, device, cache, progress, _show)
    name = f"{graph}.plan"
    with writing.atomic_write(folder / name, size=plan.nbytes) as file:
        file.write(plan)
    return [name]


def _show(severity: str, message: str) -> None:
    if severity != "VERBOSE":
        print(f"TensorRT: {severity.lower()}: {message}", file=sys.stderr)


def serialize(
    path: Path,
    graph: str,
    options: Mapping[str, Any],
    device: Device,
    cache: Path,
    progress: Progress,
    echo: Echo,
) -> memoryview:
    """The plan of the ONNX file at `path`, whose external data lies beside it; `compile` has the rest.

    `echo` is given the severity and the text of everything that TensorRT says; the layers of the plan are among it.
    """
    progress(0, _TOTAL)
    if device.gpu and device.gpu.name:
        cuda.call("cudaSetDevice", device.index)  # the builder times its kernels on the current one
    said = logger(echo)
    builder = trt.Builder(said)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, said)  # it owns weights that the network refers to
    if not parser.parse_from_file(str(path)):
        raise TurbochainError(_parser_errors(parser, graph))
    config = builder.create_builder_config()
    _configure(config, options)
    _aim(config, device)
    times = None if hasattr(trt, "IRuntimeCache") else timing_file(cache, device)  # TensorRT-RTX times nothing
    if times:
        load_timings(config, times)
    raised: list[BaseException] = []
    config.progress_monitor = _monitor(progress, raised)
    plan = builder.build_serialized_network(network, config)
    if raised:
        raise raised[0]
    if plan is None:
        reasons = "; ".join(said.errors) or "it gave no reason"
        raise TurbochainError(f"TensorRT cannot build {graph}: {reasons}")
    if times:
        save_timings(config, times)
    progress(_TOTAL, _TOTAL)
    return memoryview(plan)


def _parser_errors(parser: "trt.OnnxParser", graph: str) -> str:
    """Every node that TensorRT does not take, by name, operator and stage."""
    found = []
    for error in (parser.get_error(i) for i in range(parser.num_errors)):
        what = error.code().name.lower().replace("_", " ")
        where = f"node {error.node_name()} ({error.node_operator()}): " if error.node_operator() else ""
        # Of a node that is unsupported as such, the description is only the condition that did not hold.
        found.append(f"{where}{what}" + (f": {error.desc()}" if error.desc() != "false" else ""))
    return f"TensorRT cannot read the stage {graph}: " + "; ".join(dict.fromkeys(found))


def _configure(config: "trt.IBuilderConfig", options: Mapping[str, Any]) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # what a graph has in fp32 is there because less would not do
    config.builder_optimization_level = int(options["builder_optimization_level"])
    config.tiling_optimization_level = {
        "none": trt.TilingOptimizationLevel.NONE,
        "fast": trt.TilingOptimizationLevel.FAST,
        "moderate": trt.TilingOptimizationLevel.MODERATE,
        "full": trt.TilingOptimizationLevel.FULL,
    }[options["tiling_optimization_level"]]
    if options["workspace_gib"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options["workspace_gib"]) << 30)
    if options["max_aux_streams"] >= 0:
        config.max_aux_streams = int(options["max_aux_streams"])
    if options["hardware_compatibility"] != "none":
        if hasattr(config, "set_compute_capability"):  # TensorRT-RTX only warns, and the plan is for one kind of GPU
            raise InputError("option hardware_compatibility: TensorRT-RTX has none; build with --target for other GPUs")
        config.hardware_compatibility_level = {
            "ampere_plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
            "same_compute_capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
        }[options["hardware_compatibility"]]
    if options["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options["strip_plan"]:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if options["refit"]:
        config.set_flag(trt.BuilderFlag.REFIT)
    elif options["strip_plan"]:  # what comes back are the very weights that were stripped: nothing is lost in speed
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)


def _aim(config: "trt.IBuilderConfig", device: Device) -> None:
    """Say which GPUs the plan is for, where the library lets that be said: else it is the one that it runs on."""
    assert device.gpu
    architecture = "CURRENT" if device.gpu.name else "SM" + device.gpu.compute_capability.replace(".", "")
    if hasattr(config, "num_compute_capabilities"):
        config.num_compute_capabilities = 1
    if hasattr(config, "set_compute_capability") and hasattr(trt, "ComputeCapability"):
        config.set_compute_capability(trt.ComputeCapability.__members__[architecture], 0)


def timing_file(folder: Path, device: Device) -> Path:
    """Where the timings of this library version on this kind of GPU are kept."""
    library, version = backends.require("tensorrt")
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", str(device.gpu)).strip("-")
    return folder / f"{library}-{version}-{gpu}.timings"


def load_timings(config: "trt.IBuilderConfig", path: Path) -> None:
    """Give the builder the timings in `path`; where there are none that are of use, it begins anew, with a warning.

    The file holds the SHA-256 of what TensorRT serialised, then that: TensorRT takes damaged timings for none at all,
    and says so to nobody.
    """
    known, wrong = b"", ""
    try:
        data = path.read_bytes()
        known = data[32:]
        wrong = "" if hashlib.sha256(known).digest() == data[:32] else "is damaged"
    except FileNotFoundError:
        pass
    except OSError as error:
        wrong = f"cannot be read ({error.strerror})"
    if not wrong and not config.set_timing_cache(config.create_timing_cache(known), False):
        wrong = "is of another GPU or library"
    if wrong:
        log.warning("the timing cache %s %s: every kernel is timed anew", path, wrong)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def save_timings(config: "trt.IBuilderConfig", path: Path) -> None:
    """Keep the builder's timings in `path` for later builds; where that cannot be, a warning says so."""
    timings = memoryview(config.get_timing_cache().serialize())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing.atomic_write(path, size=timings.nbytes) as file:
            file.write(hashlib.sha256(timings).digest())
            file.write(timings)
    except (InputError, OSError) as error:
        log.warning("the timings of this build are not kept: %s", error)


def _monitor(progress: Progress, raised: list[BaseException]) -> "trt.IProgressMonitor":
    """A monitor that reports to `progress`; what that raises is put into `raised`, and the build is cancelled.

    TensorRT may call it from several threads, and no exception may pass through TensorRT.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.fractions = Fractions()
            self.lock = threading.Lock()
            self.reported = 0.0  # when

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.fractions.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                self.fractions.step(phase_name, step)
                self.report()
                return not raised

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.fractions.finish(phase_name)
                self.report()

        def report(self) -> None:
            if raised or time.monotonic() < self.reported + _REPORT_EVERY:
                return
            self.reported = time.monotonic()
            try:
                progress(min(_TOTAL - 1, int(_TOTAL * self.fractions.value)), _TOTAL)
            except BaseException as error:
                raised.append(error)

    return Monitor()
