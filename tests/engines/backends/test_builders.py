"""Every builder keeps to the contract; none imports its library before it compiles."""

import ast
import dataclasses
import subprocess
import sys

import pytest
from conftest import PACKAGES, ROOT

from turbochain.engines import backends as builders
from turbochain.engines import options
from turbochain.engines.backends.contract import Builder
from turbochain.runtime import InputError, backends


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


PROBED = {  # file → what is asked there for an attribute that it may lack: an object of a library, or of Python
    "engines/backends/tensorrt.py": {"trt", "trt.BuilderFlag", "config"},  # of many versions, and two libraries
    "runtime/backends/tensorrt.py": {"trt", "config", "self.context"},
    "runtime/backends/openvino_model.py": {"order"},  # a node, which has data if it is a constant
    "runtime/bundle/strict_json.py": {"kind"},  # a type
    "runtime/inputs/feeds.py": {"self._local"},  # a thread's own
    "runtime/serve/app.py": {"scope.get('route')"},  # Starlette's
    "runtime/serve/listen.py": {"error"},
    "export/load.py": {"diffusers"},
    "export/magnitudes.py": {"attention"},  # diffusers' or transformers'
    "export/phases/process.py": {"error"},
    "export/recording.py": {"pipeline"},
    "export/sampler.py": {"scheduler", "self.scheduler"},
    "export/sources/kinds/hub.py": {"error"},
    "export/sources/synthetic.py": {"part"},  # diffusers' or transformers'
    "export/tables.py": {"tokenizer"},
    "export/tracing/attention.py": {"attention"},  # diffusers' or transformers'
    "export/tracing/rescale.py": {"module", "part", "block", "sampler"},  # of diffusers' VAEs
    "export/tracing/vae.py": {"vae.config"},
}


def test_no_contract_is_probed() -> None:
    """What is ours has types; only what is not is asked whether it has an attribute."""
    found: dict[str, set[str]] = {}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(ast.Name("hasattr"), [thing, _]) | ast.Call(ast.Name("getattr"), [thing, _, _]):
                    found.setdefault(str(path.relative_to(ROOT)), set()).add(ast.unparse(thing))
    assert found == PROBED
