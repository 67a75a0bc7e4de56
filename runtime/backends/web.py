"""ONNX Runtime Web, which draws in a browser. Its forms of the graphs run here on a CPU, to be verified.

`turbochain export-web` takes them to the browser.
"""

from typing import Any

from turbochain.runtime.backends.contract import Backend, Device, Preference
from turbochain.runtime.backends.onnxruntime import BACKEND as onnxruntime
from turbochain.runtime.backends.onnxruntime import OnnxRuntimeCpu, read_form
from turbochain.runtime.bundle.manifest import EngineKey
from turbochain.runtime.errors import InputError


def device(name: str | None) -> Device:
    """Return the CPU, which verifies; InputError for another name."""
    if name not in (None, "cpu"):
        raise InputError(f"device={name!r}: the backend web runs on 'cpu' here; on a GPU it runs in a browser")
    return Device("cpu")


def misfit(key: EngineKey, library: tuple[str, str], device: Device) -> str | None:
    """Return None: the library of the key has verified the forms, and a browser runs them with its own."""
    return (
        None
        if key.device == device.kind
        else f"it is for {key.device}, and an engine for browsers is for {device.kind}"
    )


class WebOnCpu(OnnxRuntimeCpu):
    """Runs the forms of an engine for a browser."""

    def model(self, graph: str, options: Any) -> bytes:
        """Return the engine's form of the graph."""
        return read_form(self.opened, graph, options)


BACKEND = Backend(
    name="web",
    libraries=onnxruntime.libraries,
    install=onnxruntime.install,
    preferences={"cpu": Preference(0, "it draws in a browser", ("fp16", "fp32"))},
    device=device,
    misfit=misfit,
    executor=WebOnCpu,
    elsewhere="turbochain export-web BUNDLE -o SITE",
)
