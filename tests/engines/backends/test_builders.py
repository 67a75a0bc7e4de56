"""Every builder keeps to the contract; none imports its library before it compiles."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from turbochain.engines import backends as builders
from turbochain.engines import options
from turbochain.engines.backends.contract import Builder
from turbochain.runtime import InputError, backends

ENGINES = Path(builders.__file__).parents[1]


def test_each_backend_has_a_builder() -> None:
    found = builders.known()
    assert list(found) == backends.names() and all(isinstance(b, Builder) for b in found.values())
    with pytest.raises(InputError, match=r"no builder for the backend 'none': choose from .*onnxruntime"):
        builders.get("none")


@pytest.mark.parametrize("name", backends.names())
def test_a_builder(name: str) -> None:
    builder = builders.get(name)
    assert builder.name == name
    for option in builder.options.values():
        assert option.read(option.default) == option.default == option.read(str(option.default)) and option.help
    with pytest.raises(dataclasses.FrozenInstanceError):
        builder.name = "another"  # type: ignore[misc]
    defaults = options.resolve(name, {})
    assert options.changed(name, defaults) == {}
    candidates = builder.candidates(defaults)
    assert candidates and all(candidate.keys() <= builder.options.keys() for candidate in candidates)


def test_no_library_is_imported() -> None:
    code = (
        "import sys; from turbochain.engines import backends; backends.known()\n"
        "assert not {'tensorrt', 'tensorrt_rtx', 'openvino', 'onnxruntime', 'torch', 'onnx'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_no_contract_is_probed() -> None:
    """Only a library of many versions is: TensorRT's module, its flags and its builder's configuration."""
    for path in ENGINES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("hasattr", "getattr")
            ):
                assert ast.unparse(node.args[0]) in ("trt", "trt.BuilderFlag", "config"), (path, node.lineno)
