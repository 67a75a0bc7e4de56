"""Which GPU and library version a TensorRT engine fits: the rules, one by one. Nothing here asks for a GPU."""

import dataclasses

import pytest

from turbochain.runtime.backends import exact
from turbochain.runtime.backends.contract import Device
from turbochain.runtime.backends.tensorrt import misfit
from turbochain.runtime.bundle.manifest import EngineKey, Gpu

L4 = Gpu("NVIDIA L4", "8.9", 24 * 2**30)
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", "8.9", 24 * 2**30)
A100 = Gpu("NVIDIA A100-SXM4-40GB", "8.0", 40 * 2**30)
H200 = Gpu("NVIDIA H200", "9.0", 141 * 2**30)
T4 = Gpu("Tesla T4", "7.5", 16 * 2**30)
ANY_SM89 = Gpu(None, "8.9", None)  # built ahead for the architecture

LIBRARY = ("tensorrt", "10.16.1.11")


def key(gpu: Gpu, **options: object) -> EngineKey:
    return EngineKey("tensorrt", "cuda", *LIBRARY, options, gpu)


def on(gpu: Gpu) -> Device:
    return Device("cuda", 0, gpu)


@pytest.mark.parametrize(
    ("built", "here", "options"),
    [
        (L4, L4, {}),
        (ANY_SM89, L4, {}),
        (ANY_SM89, RTX_4090, {}),
        (L4, RTX_4090, {"hardware_compatibility": "same_compute_capability"}),
        (L4, H200, {"hardware_compatibility": "ampere_plus"}),
        (dataclasses.replace(L4, memory_bytes=23 * 2**30), L4, {}),  # a driver may report a little less or more
        (L4, dataclasses.replace(L4, memory_bytes=L4.memory_bytes - 2**28), {}),
    ],
)
def test_it_fits(built: Gpu, here: Gpu, options: dict[str, object]) -> None:
    assert misfit(key(built, **options), LIBRARY, on(here)) is None


@pytest.mark.parametrize(
    ("built", "here", "options", "reason"),
    [
        (
            L4,
            RTX_4090,
            {},
            "it is for NVIDIA L4 (sm89, 24 GiB), and this GPU is NVIDIA GeForce RTX 4090 (sm89, 24 GiB)",
        ),
        (ANY_SM89, A100, {}, "it is for any GPU of the architecture (sm89), and this GPU is NVIDIA A100-SXM4-40GB"),
        (L4, A100, {"hardware_compatibility": "same_compute_capability"}, "it is for NVIDIA L4"),
        (A100, T4, {"hardware_compatibility": "ampere_plus"}, "it is for NVIDIA A100"),
        (
            H200,
            dataclasses.replace(H200, memory_bytes=70 * 2**30),
            {},
            "it was built on NVIDIA H200 (sm90, 141 GiB), and this GPU has less memory: NVIDIA H200 (sm90, 70 GiB)",
        ),
    ],
)
def test_another_gpu_is_refused_with_both_names(built: Gpu, here: Gpu, options: dict[str, object], reason: str) -> None:
    assert (misfit(key(built, **options), LIBRARY, on(here)) or "").startswith(reason)


@pytest.mark.parametrize(
    ("library", "options", "fits"),
    [
        (("tensorrt", "10.16.2.1"), {}, False),
        (("tensorrt", "10.16.2.1"), {"version_compatible": True}, True),
        (("tensorrt", "11.4.0.106"), {"version_compatible": True}, False),  # not across major versions
        (("tensorrt-rtx-cu13", "10.16.1.11"), {"version_compatible": True}, False),
    ],
)
def test_another_library_is_refused_unless_the_plan_allows_it(
    library: tuple[str, str], options: dict[str, object], fits: bool
) -> None:
    reason = misfit(key(L4, **options), library, on(L4))
    assert reason == (
        None if fits else f"it was built with tensorrt 10.16.1.11, and this machine has {' '.join(library)}"
    )


def test_the_strict_rule_allows_no_difference() -> None:
    made = EngineKey("onnxruntime", "cuda", "onnxruntime-gpu", "1.31.1", {}, L4)
    assert exact(made, ("onnxruntime-gpu", "1.31.1"), on(L4)) is None
    assert exact(made, ("onnxruntime-gpu", "1.31.1"), on(RTX_4090)) == (
        "it is for NVIDIA L4 (sm89, 24 GiB), and this device is NVIDIA GeForce RTX 4090 (sm89, 24 GiB)"
    )
    assert exact(made, ("onnxruntime", "1.31.1"), Device("cpu")) == (
        "it was built with onnxruntime-gpu 1.31.1, and this machine has onnxruntime 1.31.1"
    )
    cpu = EngineKey("onnxruntime", "cpu", "onnxruntime", "1.31.1", {})
    assert exact(cpu, ("onnxruntime", "1.31.1"), on(L4)) == "it is for cpu, and this device is NVIDIA L4 (sm89, 24 GiB)"


@pytest.mark.parametrize(("version", "fits"), [("10.16.1.11", True), ("10.16.0.72", False), ("10.9.0.34", False)])
def test_a_version_compatible_plan_needs_no_older_library_than_its_builder(version: str, fits: bool) -> None:
    assert (misfit(key(L4, version_compatible=True), ("tensorrt", version), on(L4)) is None) == fits


def test_a_key_that_was_edited_is_refused_in_words() -> None:
    nowhere = dataclasses.replace(key(L4), gpu=None)
    assert misfit(nowhere, LIBRARY, on(L4)) == "it does not say which GPU it is for"
    assert (misfit(key(L4, hardware_compatibility="all"), LIBRARY, on(L4)) or "").startswith("it is for NVIDIA L4")
