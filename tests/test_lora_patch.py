"""LoRA adapters in a bundle without slots: ONNX Runtime's CPU provider is given patched weights, the files stay."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
from image_calls import seeded
from lora_files import Layers
from test_parity import assert_same_picture, load_diffusers

from turbochain.runtime import Bundle, InputError, Pipeline
from turbochain.runtime.backends import onnxruntime
from turbochain.runtime.backends.contract import Device, Opened
from turbochain.runtime.bundle.initializers import read_fp32
from turbochain.runtime.bundle.names import read_names
from turbochain.runtime.chain.plan import graph_plan

IN_TABLES = ("time_emb_proj", "time_embedding", "add_embedding")
SIDES = {"height": 64, "width": 64}
CALL: dict[str, Any] = {"prompt": "a cat in the snow", "num_inference_steps": 2, "seed": 3, "output_type": "uint8"}

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(checkpoint: Path, *, only: str = "", **how: Any) -> Layers:
    """A random adapter of all that graphs hold whole: every matrix and convolution but those of the time."""
    drawn = lora_files.draw(checkpoint, only=only, **how)
    return {place: layer for place, layer in drawn.items() if not any(part in place[1] for part in IN_TABLES)}


def load(bundle: Path, **how: Any) -> Pipeline:
    return Pipeline.load(bundle, backend="onnxruntime", device="cpu", chain="text-to-image", **how)


def theirs(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    """What diffusers makes of a call."""
    call = {**call, "generator": seeded(call["seed"])}
    call = {"guidance_scale": 0.0, **SIDES} | {n: v for n, v in call.items() if n not in ("seed", "output_type")}
    made = pipe(**call)
    return np.stack([np.asarray(picture) for picture in made.images])


@pytest.fixture(scope="module")
def pipe(sd: Path) -> Iterator[Pipeline]:
    with load(sd, lora="patch") as found:
        yield found


@pytest.mark.parametrize("component", ["text_encoder", "unet"])
def test_every_matrix_that_is_overridden_takes_effect(sd: Path, checkpoints: dict[str, Path], component: str) -> None:
    """Not one is read from the file all the same, as constants are that ONNX Runtime folds.

    The session uses the very arrays that it was given, so one session is enough.
    """
    bundle = Bundle.open(sd)
    graph = bundle.manifest.graphs[component]
    known = read_names(bundle, component)
    changed = [f"{module}.weight" for of, module in draw(checkpoints["sd"]) if of == component]
    names = {known.get(n, known.get(n.removeprefix("text_model."))).initializer for n in changed}
    stored = read_fp32(bundle.path / graph.file, names)
    assert stored.keys() == names
    executor = onnxruntime.OnnxRuntimeCpu(Opened(bundle, bundle.path, {}, Device("cpu"), threads=1))
    numbers, plan = np.random.default_rng(0), graph_plan(component, graph)
    feeds = {
        t.name: (numbers.integers(0, 500, t.shape) if t.dtype == "int32" else numbers.standard_normal(t.shape)).astype(
            t.dtype
        )
        for t in graph.inputs
    }

    def results() -> list[bytes]:
        executor.load([component])
        return [array.tobytes() for array in executor.execute(plan, feeds).arrays.values()]

    right, given = results(), {name: value.copy() for name, value in stored.items()}
    executor.patch(component, given)
    assert results() == right
    for name, value in given.items():
        value *= 1.5
        assert results() != right, name
        value[:] = stored[name]
    assert results() == right
    for value in given.values():
        value *= 1.5
    assert results() != right
    executor.patch(component, {})
    assert results() == right
    executor.close()


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.full)])
def test_the_picture_is_that_of_diffusers_with_peft(
    family: str, checkpoints: dict[str, Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Linear layers, 3×3 convolutions and text encoders, with a weight; two adapters; then the first one alone."""
    one = lora_files.write(tmp_path / "one.safetensors", draw(checkpoints[family], seed=1, alphas=(2.0,)), "kohya")
    two = lora_files.write(tmp_path / "two.safetensors", draw(checkpoints[family], seed=2, only="unet"), "peft")
    call = CALL | {"prompt": [CALL["prompt"]] * (1 if family == "sd" else 3), "seed": 7}
    reference = load_diffusers(checkpoints[family])
    with load(request.getfixturevalue(family)) as pipe:
        for of in (pipe, reference):
            of.load_lora_weights(one.parent, weight_name=one.name, adapter_name="one")
            of.load_lora_weights(two.parent, weight_name=two.name, adapter_name="two")
        for names, weights in ([["one", "two"], [0.7, -0.4]], ["one", 0.8], [["two"], [1.0]]):
            for of in (pipe, reference):
                of.set_adapters(names, weights)
            assert pipe.get_active_adapters() == reference.get_active_adapters()
            assert pipe.get_list_adapters() == reference.get_list_adapters()
            assert_same_picture(pipe(**call).images, theirs(reference, call))


def test_unloading_leaves_the_files_and_gives_the_bits_of_before(
    pipe: Pipeline, sd: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    files = [lora_files.write(tmp_path / f"{n}.safetensors", draw(checkpoints["sd"], seed=n), "peft") for n in (1, 2)]
    assert not pipe.get_list_adapters()
    untouched, made = pipe(**CALL), {}
    for name, file in zip("ab", files, strict=True):
        pipe.load_lora_weights(file, adapter_name=name)
    for state in ("a", "b", "a", []):
        pipe.set_adapters(state)
        out = pipe(**CALL)
        assert out.adapters == tuple((name, 1.0) for name in state)
        np.testing.assert_array_equal(made.setdefault(str(state), out.images), out.images)
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(made["[]"], untouched.images)
    np.testing.assert_array_equal(pipe(**CALL).images, untouched.images)
    assert len({images.tobytes() for images in made.values()}) == 3
    Bundle.open(sd).check_files(full=True)


def test_what_a_patch_cannot_change_is_refused(pipe: Pipeline, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The time's part is in the tables of the chain."""
    for part in ("time_embedding", "time_emb_proj"):
        drawn = lora_files.draw(checkpoints["sd"], only=part)
        file = lora_files.write(tmp_path / f"{part}.safetensors", drawn, "kohya")
        with pytest.raises(InputError, match=rf"{part}.* of the unet, .*build-engine SOURCE --lora {file}"):
            pipe.load_lora_weights(file)
    assert pipe.get_list_adapters() == {}
