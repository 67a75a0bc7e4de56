"""Calls into TensorRT, right and wrong. Never run: `test_tensorrt_api.py` has them checked against each version.

A comment `wrong in VERSIONS` marks a line that must be refused for these versions. All other lines must pass in all.
"""

import json
from pathlib import Path
from typing import Any

import tensorrt as trt


class Logger(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity <= trt.ILogger.WARNING:
            print(msg, severity.name, severity.level)  # wrong in 10.16 11.4 rtx


class Monitor(trt.IProgressMonitor):
    def __init__(self) -> None:
        trt.IProgressMonitor.__init__(self)
        self.cancelled = False

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        print(phase_name, parent_phase, num_steps)

    def phase_finish(self, phase_name: str) -> None:
        print(phase_name)

    def step_complete(self, phase_name: str, step: int) -> bool:
        return not self.cancelled


class WrongMonitor(trt.IProgressMonitor):
    def phase_finish(self) -> None:  # wrong in 10.16 11.4 rtx
        pass

    def step_complete(self, phase_name: str, step: int) -> str:  # wrong in 10.16 11.4 rtx
        return phase_name


def build(model: Path, cache: bytes) -> bytes:
    logger = Logger()
    builder = trt.Builder(logger)
    trt.Builder()  # wrong in 10.16 11.4 rtx
    trt.Builder("logger")  # wrong in 10.16 11.4 rtx
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))  # wrong in 11.4 rtx
    builder.create_network("STRONGLY_TYPED")  # wrong in 10.16 11.4 rtx
    parser = trt.OnnxParser(network, logger)
    trt.OnnxParser(logger, network)  # wrong in 10.16 11.4 rtx
    if not parser.parse_from_file(str(model)):
        for error in (parser.get_error(i) for i in range(parser.num_errors)):
            print(error.desc(), error.node(), error.node_name(), error.node_operator(), error.code().name)
            print(error.node_name + ": " + error.desc())  # wrong in 10.16 11.4 rtx: it is a method
            print(error.message())  # wrong in 10.16 11.4 rtx
    parser.parse(model.read_bytes(), str(model))
    parser.parse(str(model))  # wrong in 10.16 11.4 rtx: the bytes are asked for
    parser.parse_from_file(model)  # wrong in 10.16 11.4 rtx: a str is asked for
    parser.supports_model(b"")  # wrong in 11.4 rtx
    print(parser.num_errors())  # wrong in 10.16 11.4 rtx: it is a property
    print([layer.name for layer in network], network.num_layers, network.get_input(0).shape)

    config = builder.create_builder_config()
    config.builder_optimization_level = 5
    config.builder_optimisation_level = 5  # wrong in 10.16 11.4 rtx
    config.tiling_optimization_level = trt.TilingOptimizationLevel.FULL
    config.tiling_optimization_level = 3  # wrong in 10.16 11.4 rtx
    config.l2_limit_for_tiling = 1 << 20
    config.max_aux_streams = 0
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = Monitor()
    config.progress_monitor = logger  # wrong in 10.16 11.4 rtx
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.HOPPER_PLUS  # wrong in 10.16 11.4 rtx
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
    config.set_memory_pool_limit(pool=trt.MemoryPoolType.WORKSPACE, pool_size=1 << 30)
    config.set_memory_pool_limit(pool=trt.MemoryPoolType.WORKSPACE, size=1 << 30)  # wrong in 10.16 11.4 rtx
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)  # wrong in 10.16 11.4 rtx
    config.max_workspace_size = 1 << 30  # wrong in 10.16 11.4 rtx
    config.max_workspace_size = 1 << 30  # type: ignore  # wrong in 10.16 11.4 rtx: nothing is hidden
    for flag in (trt.BuilderFlag.REFIT, trt.BuilderFlag.STRIP_PLAN, trt.BuilderFlag.VERSION_COMPATIBLE):
        config.set_flag(flag)
    config.set_flag(trt.BuilderFlag.FP16)  # wrong in 11.4 rtx
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # wrong in 10.16 11.4
    config.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)  # wrong in 10.16 11.4 rtx
    print(config.build_route)  # wrong in 10.16

    timing = config.create_timing_cache(cache)
    config.set_timing_cache(timing, ignore_mismatch=False)
    config.set_timing_cache(cache, ignore_mismatch=False)  # wrong in 10.16 11.4 rtx
    timing.combine(config.create_timing_cache(b""), ignore_mismatch=True)
    bytes(timing)  # wrong in 10.16 11.4 rtx
    print(memoryview(timing.serialize()).nbytes)

    if hasattr(config, "set_compute_capability"):
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)  # wrong in 10.16 11.4: only half detected
    if hasattr(trt, "ComputeCapability") and hasattr(config, "set_compute_capability"):
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        config.set_compute_capability(trt.ComputeCapability.SM89)  # wrong in rtx
        config.set_compute_capability(trt.ComputeCapability.SM90, 0)  # wrong in rtx
    config.set_compute_capability("sm89", 0)  # wrong in 10.16 11.4 rtx
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    capability = getattr(trt, "ComputeCapability", None)
    if capability is not None:
        print(capability.SM89)

    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise RuntimeError(builder.num_errors)  # wrong in 10.16 11.4 rtx: this line is reached
    builder.build_engine(network, config)  # wrong in 10.16 11.4 rtx
    return bytes(serialized)


def untyped(config: Any) -> None:
    config.set_flag(trt.BuilderFlag.TF32)  # wrong in 10.16 11.4 rtx: nobody knows what `config` is
    config.update({"config": 1})


def run(serialized: bytes, memory: int, stream: int) -> None:
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    trt.Runtime(trt.Logger("warning"))  # wrong in 10.16 11.4 rtx
    engine = runtime.deserialize_cuda_engine(serialized)
    runtime.deserialize_cuda_engine(42)  # wrong in 10.16 11.4 rtx
    print(engine.name)  # wrong in 10.16 11.4 rtx: it may be None
    if engine is None:
        raise ValueError(trt.__version__)
    if hasattr(runtime, "get_engine_validity"):
        print(runtime.get_engine_validity(serialized))
    print(runtime.get_engine_validity(serialized))  # wrong in 10.16 11.4
    sizes = engine.device_memory_size_v2, engine.streamable_weights_size
    print(engine.device_memory_size, sizes)  # wrong in 11.4 rtx
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    print({name: (tuple(engine.get_tensor_shape(name)), trt.nptype(engine.get_tensor_dtype(name))) for name in inputs})
    print(engine.get_binding_name(0))  # wrong in 10.16 11.4 rtx
    print(engine.get_tensor_name("input"))  # wrong in 10.16 11.4 rtx

    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    engine.create_execution_context(strategy=trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER)  # wrong in 10.16 11.4 rtx
    engine.create_execution_context_without_device_memory()  # wrong in 11.4 rtx
    if not context:
        raise MemoryError(engine.device_memory_size_v2)
    context.set_device_memory(memory, engine.device_memory_size_v2)
    context.set_device_memory(memory)  # wrong in 10.16 11.4 rtx
    for name in names:
        context.set_tensor_address(name, memory)
        context.set_tensor_address(memory, name)  # wrong in 10.16 11.4 rtx
    context.execute_async_v3(stream)
    context.execute_async_v3(stream_handle=stream)
    context.execute_async_v3(stream=stream)  # wrong in 10.16 11.4 rtx
    context.execute_async_v2([memory], stream)  # wrong in 10.16 11.4 rtx
    print(context.is_stream_capturable(stream))  # wrong in 10.16 11.4
    if hasattr(context, "is_stream_capturable"):
        print(context.is_stream_capturable(stream))
        print(context.is_stream_capturable())  # wrong in rtx
    chosen = engine.create_runtime_config()
    chosen.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    chosen.set_execution_context_allocation_strategy(0)  # wrong in 10.16 11.4 rtx
    engine.create_execution_context(chosen)
    print(chosen.create_runtime_cache())  # wrong in 10.16 11.4
    if hasattr(chosen, "create_runtime_cache") and hasattr(chosen, "set_runtime_cache"):
        kernels = chosen.create_runtime_cache()
        print(kernels.deserialize(serialized), memoryview(kernels.serialize()))
        kernels.deserialize("kernels")  # wrong in rtx
        chosen.set_runtime_cache(kernels)
        chosen.set_runtime_cache(serialized)  # wrong in rtx
    print(context.engine.no_such_property)  # wrong in 10.16 11.4 rtx
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    print(json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON)))
    print(inspector.get_engine_information(trt.LayerInformationFormat.XML))  # wrong in 10.16 11.4 rtx
