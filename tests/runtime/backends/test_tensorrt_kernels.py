"""The kernels that TensorRT-RTX compiles at a load, kept for the next one.

The library makes an engine only where a driver is, so small objects stand for those of its classes that need one.
"""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from standin import standing_in
from standin.stages import gpu

from turbochain.runtime import Bundle, backends
from turbochain.runtime.backends.contract import Device, Opened
from turbochain.runtime.backends.tensorrt import TensorRt, kernels_file, trt
from turbochain.runtime.bundle.manifest import Gpu

GRAPH, OTHER = "unet", "vae_decoder"


class Cache:
    """IRuntimeCache: it takes the kernels of its own driver."""

    def __init__(self, driver: bytes) -> None:
        self.driver, self.kernels = driver, b""

    def deserialize(self, kernels: bytes) -> bool:
        taken = kernels.startswith(self.driver)
        self.kernels = kernels if taken else b""
        return taken

    def serialize(self) -> bytes:
        return self.kernels


class Config:
    """IRuntimeConfig."""

    cache: Cache | None = None

    def __init__(self, driver: bytes) -> None:
        self.driver = driver

    def set_execution_context_allocation_strategy(self, strategy: trt.ExecutionContextAllocationStrategy) -> None:
        assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED

    def create_runtime_cache(self) -> Cache:
        return Cache(self.driver)

    def set_runtime_cache(self, cache: Cache) -> None:
        self.cache = cache


class OldConfig:
    """IRuntimeConfig of TensorRT, which compiles nothing."""

    def __init__(self, driver: bytes) -> None:
        pass

    set_execution_context_allocation_strategy = Config.set_execution_context_allocation_strategy


class Engine:
    """ICudaEngine: a context that finds no kernels compiles them."""

    config: type[Config] | type[OldConfig] = Config
    fails = False

    def __init__(self, driver: bytes) -> None:
        self.driver, self.compiled = driver, 0

    def create_runtime_config(self) -> Config | OldConfig:
        return self.config(self.driver)

    def create_execution_context(self, config: Config | OldConfig) -> object | None:
        if isinstance(config, Config) and config.cache is not None and not config.cache.kernels:
            self.compiled += 1
            config.cache.kernels = self.driver + b": kernels"
        return None if self.fails else object()


class Old(Engine):
    config = OldConfig


class Failing(Engine):
    fails = True


@pytest.fixture
def executor(small: Path, tmp_path: Path) -> Iterator[TensorRt]:
    with standing_in():
        made = TensorRt(Opened(Bundle.open(small), tmp_path, {}, gpu(0)))
        yield made
        made.close()


def compiled(executor: TensorRt, driver: bytes = b"driver 1", graph: str = GRAPH) -> int:
    """Make a context in a new process; how often kernels were compiled for it."""
    engine = Engine(driver)
    assert executor._context(graph, engine) is not None  # type: ignore[arg-type]
    return engine.compiled


def test_the_stand_ins_have_the_librarys_methods() -> None:
    for ours, theirs in ((Cache, trt.IRuntimeCache), (Config, trt.IRuntimeConfig), (Engine, trt.ICudaEngine)):
        methods = {name for name, member in vars(ours).items() if callable(member) and name[0] != "_"} - {"config"}
        assert methods and methods <= {*dir(theirs)}, ours


def test_kernels_are_compiled_once(executor: TensorRt, caplog: pytest.LogCaptureFixture) -> None:
    path = executor.opened.folder / kernels_file(GRAPH, executor.device)
    assert compiled(executor) == 1
    kept = path.stat()
    assert compiled(executor) == compiled(executor) == 0
    assert path.stat().st_ino == kept.st_ino and not caplog.records  # it is not written again
    assert compiled(executor, graph=OTHER) == 1


def test_kernels_of_another_driver_are_replaced(executor: TensorRt, caplog: pytest.LogCaptureFixture) -> None:
    """The library itself refuses them."""
    path = executor.opened.folder / kernels_file(GRAPH, executor.device)
    assert [compiled(executor), compiled(executor, b"driver 2"), compiled(executor, b"driver 2")] == [1, 1, 0]
    assert b"driver 2" in path.read_bytes() and b"driver 1" not in path.read_bytes() and not caplog.records


def test_kernels_of_another_graph_are_not_given_to_it(executor: TensorRt, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "turbochain")
    path, other = (executor.opened.folder / kernels_file(graph, executor.device) for graph in (GRAPH, OTHER))
    assert compiled(executor) == 1
    shutil.copy(path, other)
    assert [compiled(executor, graph=OTHER), compiled(executor, graph=OTHER)] == [1, 0]
    path.write_bytes(path.read_bytes()[:-1])
    assert [compiled(executor), compiled(executor)] == [1, 0]
    assert ["compiles kernels again" in message for message in caplog.messages] == [True, True]


def test_kernels_of_another_gpu_or_library_are_not_used(executor: TensorRt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their file is called."""
    kept = executor.opened.folder / kernels_file(GRAPH, executor.device)
    assert compiled(executor) == 1
    other = TensorRt(replace(executor.opened, device=Device("cuda", 0, Gpu("Another", "9.0", 2**33))))
    shutil.copy(kept, executor.opened.folder / kernels_file(GRAPH, other.device))
    assert compiled(other) == 1 and compiled(executor) == 0
    other.close()
    library, version = backends.require("tensorrt")
    monkeypatch.setattr(backends, "require", lambda name: (library, f"{version}.1"))
    assert compiled(executor) == 1


def test_without_kernels_nothing_is_kept(executor: TensorRt) -> None:
    """TensorRT compiles none, and a context that could not be made has none."""
    assert executor._context(GRAPH, Old(b"")) is not None  # type: ignore[arg-type]
    assert executor._context(GRAPH, Failing(b"driver 1")) is None  # type: ignore[arg-type]
    assert list(executor.opened.folder.iterdir()) == []
