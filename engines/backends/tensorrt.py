"""TensorRT: one serialized engine per graph, built for one kind of NVIDIA GPU.

`tensorrt` and `tensorrt_rtx` are one code path: what one of them lacks is detected, not known by its version. The
network is strongly typed: the graph's own dtypes say what is computed in which precision.
"""

import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

from turbochain.engines.backends.contract import Builder, Compilation, Option, Options, Progress
from turbochain.engines.backends.fractions import Fractions
from turbochain.runtime import backends
from turbochain.runtime.backends import cuda
from turbochain.runtime.backends.contract import Device
from turbochain.runtime.backends.tensorrt import Echo, engine_file, file_name, listen, logger, trt
from turbochain.runtime.bundle import sealed, writing
from turbochain.runtime.errors import BackendMissing, InputError, TurbochainError

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
    "rewrite": Option(
        True,
        "first give a graph the form that suits a GPU and computes the same; not with refit and strip_plan, which need "
        "the weights as they are in the ONNX file",
    ),
}
"""The names are those of TensorRT's builder.

`builder_optimization_level` stays at TensorRT's own default: 5 can take hours for what no measurement here backs.
"""

log = logging.getLogger("turbochain")

_TOTAL = 1000  # the parts that progress is reported in
_REPORT_EVERY = 0.1  # seconds


WRONG_REFIT = (11, 3)
"""The release of TensorRT whose notes say that an engine built with REFIT may compute wrong results."""


def settle(options: Options) -> dict[str, Any]:
    """Return the options; InputError if the installed library does not do right what they ask for."""
    check_refit(options, *backends.require("tensorrt"))
    return dict(options)


def check_refit(options: Options, library: str, version: str) -> None:
    """Raise InputError if engines with REFIT are wrong in this version. What `strip_plan` uses is another mode."""
    if options["refit"] and "rtx" not in library and tuple(map(int, version.split(".")[:2])) == WRONG_REFIT:
        raise InputError(
            f"option refit: {library} {version} computes wrong results in an engine that can be refitted; leave it, or "
            f"pip install '{library}!={'.'.join(map(str, WRONG_REFIT))}.*'"
        )


def compile(compilation: Compilation) -> list[str]:
    """Build the graph's engine and write it, serialized; returns the file's name.

    Raises TurbochainError, with every reason that TensorRT gives, if it cannot build the graph; InputError for an
    option that this library does not have. An exception from `progress` stops the build.
    """
    c = compilation
    serialized = serialize(c.path, c.graph, c.options, c.device, c.cache, c.progress, _show)
    name = engine_file(c.graph)
    with writing.atomic_write(compilation.folder / name, size=serialized.nbytes) as file:
        file.write(serialized)
    return [name]


BUILDER = Builder(
    name="tensorrt", reads_graphs=False, options=OPTIONS, compile=compile, settle=settle, left="*.kernels"
)


def _show(severity: str, message: str) -> None:
    if severity != "VERBOSE":
        print(f"TensorRT: {severity.lower()}: {message}", file=sys.stderr)


def serialize(
    path: Path,
    name: str,
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
    with listen(echo) as said:
        builder = trt.Builder(logger())
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger())  # it owns weights that the network refers to
        if not _parse(parser, path, options):
            raise TurbochainError(_parser_errors(parser, name))
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
        raise TurbochainError(f"TensorRT cannot build {name}: {said}")
    if times:
        save_timings(config, times)
    progress(_TOTAL, _TOTAL)
    return memoryview(serialized)


def _parse(parser: "trt.OnnxParser", path: Path, options: Options) -> bool:
    """Give the parser the graph in the form that is compiled; return whether it takes it."""
    if options["refit"] or options["strip_plan"] or not options["rewrite"]:
        return parser.parse_from_file(str(path))
    try:
        from turbochain.engines.forms.tensorrt import rewrite  # it needs onnx, as no other part of a build does
    except ModuleNotFoundError as error:
        install = backends.get("tensorrt").install
        raise BackendMissing(f"{error.name} is not installed: {install}, or build with -O rewrite=false") from None
    return parser.parse(rewrite(path), str(path))


def _parser_errors(parser: "trt.OnnxParser", name: str) -> str:
    """Return a message that names every node which TensorRT refuses: name, operator and reason."""
    found = []
    for error in (parser.get_error(i) for i in range(parser.num_errors)):
        what = error.code().name.lower().replace("_", " ")
        where = f"node {error.node_name()} ({error.node_operator()}): " if error.node_operator() else ""
        # If a node is unsupported as such, the description is only the condition that did not hold.
        found.append(f"{where}{what}" + (f": {error.desc()}" if error.desc() != "false" else ""))
    return f"TensorRT cannot read the graph {name}: " + "; ".join(dict.fromkeys(found))


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
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # what allocates while it runs cannot be captured
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
    return folder / f"{'-'.join(backends.require('tensorrt'))}-{file_name(device)}.timings"


def load_timings(config: "trt.IBuilderConfig", path: Path) -> None:
    """Give the builder the timings in `path`; if they are unusable, warn, and let it begin without any."""
    known, wrong = b"", ""
    try:
        known = sealed.read(path) or b""  # TensorRT itself ignores damaged timings without a message
    except InputError as error:
        wrong = str(error)
    if not wrong and not config.set_timing_cache(config.create_timing_cache(known), False):
        wrong = f"{path} is of another GPU or library"
    if wrong:
        log.warning("the timing cache %s: every kernel is timed again", wrong)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def save_timings(config: "trt.IBuilderConfig", path: Path) -> None:
    """Keep the builder's timings in `path` for later builds; warn if that is impossible."""
    try:
        sealed.write(path, memoryview(config.get_timing_cache().serialize()))
    except InputError as error:
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
