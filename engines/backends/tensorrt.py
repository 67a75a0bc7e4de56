"""TensorRT: one serialized engine per graph, built for one kind of NVIDIA GPU.

`tensorrt` and `tensorrt_rtx` are one code path: what one of them lacks is detected, not known by its version. The
network is strongly typed: the graph's own dtypes say what is computed in which precision.
"""

import hashlib
import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from turbochain.engines.backends.contract import Builder, Option, Options, Progress, Task
from turbochain.engines.backends.fractions import Fractions
from turbochain.runtime import backends
from turbochain.runtime.backends import cuda
from turbochain.runtime.backends.contract import Device
from turbochain.runtime.backends.tensorrt import engine_file, logger, trt
from turbochain.runtime.bundle import writing
from turbochain.runtime.errors import InputError, TurbochainError

Echo = Callable[[str, str], None]  # severity, message

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
    "refit": Option(False, "the weights can be replaced in the serialized engine"),
    "strip_plan": Option(False, "no weights in the file: they come from the ONNX file at each load"),
}
"""The names are those of TensorRT's builder.

`builder_optimization_level` stays at TensorRT's own default: 5 can take hours for what no measurement here backs.
"""

log = logging.getLogger("turbochain")

_TOTAL = 1000  # the parts that progress is reported in
_REPORT_EVERY = 0.1  # seconds


def compile(task: Task) -> list[str]:
    """Build the graph's engine and write it, serialized; returns the file's name.

    Raises TurbochainError, with every reason that TensorRT gives, if it cannot build the graph; InputError for an
    option that this library does not have. An exception from `progress` stops the build.
    """
    path = task.bundle.plain(task.graph) / task.bundle.manifest.graphs[task.graph].file
    serialized = serialize(path, task.graph, task.options, task.device, task.cache, task.progress, _show)
    name = engine_file(task.graph)
    with writing.atomic_write(task.folder / name, size=serialized.nbytes) as file:
        file.write(serialized)
    return [name]


BUILDER = Builder(name="tensorrt", reads_graphs=False, options=OPTIONS, compile=compile)


def _show(severity: str, message: str) -> None:
    if severity != "VERBOSE":
        print(f"TensorRT: {severity.lower()}: {message}", file=sys.stderr)


def serialize(
    path: Path,
    graph: str,
    options: Options,
    device: Device,
    cache: Path,
    progress: Progress,
    echo: Echo,
) -> memoryview:
    """Return the serialized engine of the ONNX file at `path`, whose external data lies beside it; see `compile`.

    `cache`: the folder with the timing caches. `echo` gets the severity and the text of every message of TensorRT,
    which include the engine's layers.
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
    serialized = builder.build_serialized_network(network, config)
    if raised:
        raise raised[0]
    if serialized is None:
        reasons = "; ".join(said.errors) or "it gave no reason"
        raise TurbochainError(f"TensorRT cannot build {graph}: {reasons}")
    if times:
        save_timings(config, times)
    progress(_TOTAL, _TOTAL)
    return memoryview(serialized)


def _parser_errors(parser: "trt.OnnxParser", graph: str) -> str:
    """Return a message that names every node which TensorRT refuses: name, operator and reason."""
    found = []
    for error in (parser.get_error(i) for i in range(parser.num_errors)):
        what = error.code().name.lower().replace("_", " ")
        where = f"node {error.node_name()} ({error.node_operator()}): " if error.node_operator() else ""
        # If a node is unsupported as such, the description is only the condition that did not hold.
        found.append(f"{where}{what}" + (f": {error.desc()}" if error.desc() != "false" else ""))
    return f"TensorRT cannot read the graph {graph}: " + "; ".join(dict.fromkeys(found))


def _configure(config: "trt.IBuilderConfig", options: Options) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # a graph has in fp32 only what needs it
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
        if hasattr(config, "set_compute_capability"):  # TensorRT-RTX only warns, and builds for one kind of GPU
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
    elif options["strip_plan"]:  # the weights that come back are those that were stripped: no speed is lost
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)


def _aim(config: "trt.IBuilderConfig", device: Device) -> None:
    """Set which GPUs the engine is for, if the library can: else it is for the one that the build runs on."""
    assert device.gpu
    architecture = "CURRENT" if device.gpu.name else "SM" + device.gpu.compute_capability.replace(".", "")
    if hasattr(config, "num_compute_capabilities"):
        config.num_compute_capabilities = 1
    if hasattr(config, "set_compute_capability") and hasattr(trt, "ComputeCapability"):
        config.set_compute_capability(trt.ComputeCapability.__members__[architecture], 0)


def timing_file(folder: Path, device: Device) -> Path:
    """Return the file for the timings of this library version on this kind of GPU."""
    library, version = backends.require("tensorrt")
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", str(device.gpu)).strip("-")
    return folder / f"{library}-{version}-{gpu}.timings"


def load_timings(config: "trt.IBuilderConfig", path: Path) -> None:
    """Give the builder the timings in `path`; if they are unusable, warn, and let it begin without any.

    The file holds the SHA-256 of the serialized timings, then the timings: TensorRT itself ignores damaged ones
    without a message.
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
        log.warning("the timing cache %s %s: every kernel is timed again", path, wrong)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def save_timings(config: "trt.IBuilderConfig", path: Path) -> None:
    """Keep the builder's timings in `path` for later builds; warn if that is impossible."""
    timings = memoryview(config.get_timing_cache().serialize())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing.atomic_write(path, size=timings.nbytes) as file:
            file.write(hashlib.sha256(timings).digest())
            file.write(timings)
    except (InputError, OSError) as error:
        log.warning("the timings of this build are not kept: %s", error)


def _monitor(progress: Progress, raised: list[BaseException]) -> "trt.IProgressMonitor":
    """Return a monitor that reports to `progress`; an exception from that goes into `raised` and ends the build.

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
