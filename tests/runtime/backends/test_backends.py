"""One conformance test over every backend that is installed, and the plans that they carry out."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import FAMILIES, SIZE, BundleFactory
from onnx.reference import ReferenceEvaluator

from turbochain.engines import build
from turbochain.runtime import Bundle, InputError, Pipeline, backends, selection
from turbochain.runtime.backends import openvino
from turbochain.runtime.bundle.manifest import PRECISIONS, Engine, Tensor
from turbochain.runtime.chain.plan import Constant, Copy, Download, Run, Upload, plan, stage_plan


def _usable(name: str, device: str) -> bool:
    """Whether a backend is installed and finds a device of this kind on this machine."""
    try:
        backends.require(name)
        backends.get(name).device(device)
    except InputError:
        return False
    return True


USABLE = [(name, device) for name in backends.names() for device in ("cpu", "cuda") if _usable(name, device)]
WHERE = [
    (name, device, precision)
    for name, device in USABLE
    for precision in (("fp32", "bf16") if name == "openvino" and openvino.has_bf16() else ("fp32",))
]
GRAPHS = [("sd", g) for g in ("text_encoder", "time", "unet", "vae_decoder")] + [
    ("sdxl", g) for g in ("text_encoder", "text_encoder_2", "time", "unet", "vae_decoder")
]
CLOSE = {"fp32": {"float32": 1e-4, "uint8": 1.0}, "bf16": {"float32": 5e-2, "uint8": 8.0}}
"""Relative to the largest value; levels. In bf16 a value has 8 bits."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(w, id="{} on {} in {}".format(*w), marks=[pytest.mark.gpu] * (w[1] == "cuda")) for w in WHERE],
)
def where(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    """A backend, a device that it runs on here, and what it computes in."""
    return request.param


@pytest.fixture(scope="module")
def engines(
    where: tuple[str, str, str], bundle_of: BundleFactory, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Bundle, str, Engine]]:
    """Family → a bundle of one picture, with an engine of that kind."""
    backend, device, precision = where
    options = {"inference_precision": precision} if backend == "openvino" else {}
    found = {}
    for family in FAMILIES:
        path = tmp_path_factory.mktemp("bundle") / family
        shutil.copytree(bundle_of(family), path)
        made = build(str(path), path, backend=backend, device=device, options=options, quiet=True)
        bundle = Bundle.open(path)
        found[family] = (bundle, made.engine, bundle.engines()[made.engine])
    return found


@pytest.fixture(scope="module")
def executors(where: tuple[str, str, str], engines: dict[str, tuple[Bundle, str, Engine]]) -> Iterator[dict[str, Any]]:
    """Family → an executor with every graph of that bundle."""
    made = {family: selection.open_executor(*of, device=where[1]) for family, of in engines.items()}
    yield made
    for executor in made.values():
        executor.close()


def random_value(random: np.random.Generator, tensor: Tensor) -> np.ndarray:
    if tensor.dtype == "int32":  # a prompt: start, words, end, padding
        ids = random.integers(1, 49405, tensor.shape, np.int32)
        ids[:, 0], ids[:, 20], ids[:, 21:] = 49406, 49407, 0
        return ids
    return random.standard_normal(tensor.shape).astype(tensor.dtype)


def right(bundle: Bundle, graph: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The graph's outputs by onnx's own evaluator, in numpy."""
    model = onnx.load(bundle.path / bundle.manifest.graphs[graph].file)
    names = [o.name for o in model.graph.output]
    return dict(zip(names, ReferenceEvaluator(model).run(names, feeds), strict=True))


def assert_close(results: dict[str, np.ndarray], expected: dict[str, np.ndarray], precision: str) -> None:
    assert set(results) == set(expected)
    for name, reference in expected.items():
        assert (results[name].dtype, results[name].shape) == (reference.dtype, reference.shape)
        difference = np.abs(results[name].astype(np.float64) - reference)
        scale = 1 if reference.dtype == np.uint8 else float(np.abs(reference).max())
        assert difference.max() <= CLOSE[precision][reference.dtype.name] * scale, name
        assert precision != "fp32" or reference.dtype != np.uint8 or (difference > 0).mean() <= 1e-3


@pytest.mark.parametrize(("family", "graph"), GRAPHS)
def test_a_stage_computes_what_its_graph_says(
    where: tuple[str, str, str], executors: dict[str, Any], family: str, graph: str
) -> None:
    executor, random = executors[family], np.random.default_rng(0)
    tensors = executor.bundle.manifest.graphs[graph]
    for _ in range(2):  # the second launch reuses the buffers
        feeds = {t.name: random_value(random, t) for t in tensors.inputs}
        results = executor.execute(stage_plan(graph, tensors), feeds)
        assert_close(results, right(executor.bundle, graph, feeds), where[2])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_is_its_stages_joined_by_name(
    where: tuple[str, str, str], executors: dict[str, Any], family: str, steps: int
) -> None:
    executor, random = executors[family], np.random.default_rng(1)
    bundle = executor.bundle
    chain, graphs, tensors = bundle.chain, bundle.manifest.graphs, bundle.tensors
    feeds = {name: random_value(random, tensors[name]) for name in chain.inputs}
    feeds |= selection.feeds(bundle, executor, steps)
    feeds["noise"] = random.standard_normal((steps, *tensors["noise"].shape)).astype(np.float32)

    values = {name: feeds[name] for name in chain.inputs}
    columns = bundle.columns(steps)
    sequence = [*chain.before, *(g for row in range(steps) for g in (row, *chain.loop)), *chain.after]
    for item in sequence:
        if isinstance(item, int):
            values |= {name: feeds[name][item] for name in chain.step_inputs}
            values |= {name: column[item] for name, column in columns.items()}
            for g in chain.once:
                values |= right(bundle, g, {t.name: values[t.name] for t in graphs[g].inputs})
            values |= {target: values[source] for source, target in chain.carry.items() if item}
        else:
            values |= right(bundle, item, {t.name: values[t.name] for t in graphs[item].inputs})

    launched: list[str] = []
    results = executor.execute(
        plan(chain, graphs, steps, downloads=["next_latents"]), feeds, lambda graph, seconds: launched.append(graph)
    )
    assert_close(results, {name: values[name] for name in ("next_latents", "image")}, where[2])
    assert launched == [item for item in sequence if isinstance(item, str)]


def test_feeds_are_left_alone(executors: dict[str, Any]) -> None:
    executor, random = executors["sd"], np.random.default_rng(2)
    tensors = executor.bundle.manifest.graphs["unet"]
    feeds = {t.name: random_value(random, t) for t in tensors.inputs}
    before = {name: value.copy() for name, value in feeds.items()}
    first = {k: v.copy() for k, v in executor.execute(stage_plan("unet", tensors), feeds).items()}
    for name, value in before.items():
        np.testing.assert_array_equal(feeds[name], value)
    again = executor.execute(stage_plan("unet", tensors), feeds)
    np.testing.assert_array_equal(again["next_latents"], first["next_latents"])


def test_an_executor_may_hold_a_single_graph(
    where: tuple[str, str, str], engines: dict[str, tuple[Bundle, str, Engine]]
) -> None:
    backend, device, precision = where
    bundle, name, made = engines["sd"]
    module = backends.get(backend)
    executor = module.executor(
        bundle,
        bundle.path / "engines" / name,
        made.key.options,
        device=module.device(device),
        threads=None,
        graphs=["vae_decoder"],
    )
    tensors = bundle.manifest.graphs["vae_decoder"]
    feeds = {t.name: random_value(np.random.default_rng(3), t) for t in tensors.inputs}
    results = executor.execute(stage_plan("vae_decoder", tensors), feeds)
    assert_close(results, right(bundle, "vae_decoder", feeds), precision)
    with pytest.raises(KeyError):
        executor.execute((Run("unet"),), {})
    executor.close()


def test_a_graph_that_was_unloaded_is_gone(
    where: tuple[str, str, str], engines: dict[str, tuple[Bundle, str, Engine]]
) -> None:
    bundle = engines["sd"][0]
    executor = selection.open_executor(*engines["sd"], device=where[1])
    before = selection.feeds(bundle, executor, 2)
    executor.unload("time")
    with pytest.raises(KeyError):
        selection.feeds(bundle, executor, 2)
    random = np.random.default_rng(4)
    feeds = {name: random_value(random, bundle.tensors[name]) for name in bundle.chain.inputs} | before
    feeds["noise"] = random.standard_normal((2, *bundle.tensors["noise"].shape), np.float32)
    assert executor.execute(plan(bundle.chain, bundle.manifest.graphs, 2), feeds)["image"].any()
    executor.close()


def test_every_backend_says_what_it_needs(where: tuple[str, str, str]) -> None:
    backend, device, _ = where
    module = backends.get(backend)
    assert backends.library(backend)[0] in module.LIBRARIES
    assert module.INSTALL.startswith("pip install ")
    assert all(set(p.precisions) <= set(PRECISIONS) for p in module.PREFERENCES.values())
    assert module.device(device).kind == device
    assert device in module.PREFERENCES
    with pytest.raises(InputError, match="no-such-device"):
        module.device("no-such-device")


def test_a_graph_in_a_precision_that_the_backend_lacks(sd: Path, copy_of: Callable[[Path], Path]) -> None:
    path = copy_of(sd)
    value = json.loads((path / "bundle.json").read_text())
    value["graphs"]["vae_decoder"]["precision"] = "bf16"
    (path / "bundle.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="cannot compute in bf16 on cpu, only in fp32 and fp16: choose another"):
        Pipeline.load(path, backend="onnxruntime")


def test_the_best_backend_is_installed_and_ranks_highest() -> None:
    name, reason = backends.best()
    preferences = {u: backends.get(u[0]).PREFERENCES[u[1]] for u in USABLE}
    best = max(USABLE, key=lambda u: preferences[u].rank)
    assert (name, reason) == (best[0], preferences[best].reason)


@pytest.mark.parametrize("name", ["no_such_backend", "os", "host.x", ""])
def test_an_unknown_backend_is_refused_with_the_known_ones(name: str, sd: Path) -> None:
    with pytest.raises(InputError, match="onnxruntime"):
        selection.select(Bundle.open(sd), name)


def _row(row: int, time: str = "time_embeds") -> list[Upload | Constant | Run]:
    columns = ("input_scale", "a", "b", "c", time)  # and what made the last of these is no part of a picture
    return [Upload("noise", row), *(Constant(name, row) for name in columns), Run("unet")]


def test_plan_of_one_step(sd: Path) -> None:
    bundle = Bundle.open(sd)
    assert plan(bundle.chain, bundle.manifest.graphs, 1) == (
        Upload("input_ids"),
        Upload("latents"),
        Run("text_encoder"),
        *_row(0, "time_projections"),
        Run("vae_decoder"),
        Download("image"),
    )


def test_plan_of_three_steps_with_two_text_encoders(sdxl: Path) -> None:
    bundle = Bundle.open(sdxl)
    assert plan(bundle.chain, bundle.manifest.graphs, 3, downloads=["next_latents"]) == (
        Upload("input_ids"),
        Upload("input_ids_2"),
        Upload("latents"),
        Run("text_encoder"),
        Run("text_encoder_2"),
        *_row(0),
        Copy("next_latents", "latents"),
        *_row(1),
        Copy("next_latents", "latents"),
        *_row(2),
        Run("vae_decoder"),
        Download("next_latents"),
        Download("image"),
    )


def test_plan_with_given_embeds_runs_no_text_encoder(sdxl: Path) -> None:
    bundle = Bundle.open(sdxl)
    given = ["prompt_embeds", "prompt_embeds_2", "pooled_prompt_embeds"]
    assert plan(bundle.chain, bundle.manifest.graphs, 1, given=given) == (
        Upload("latents"),
        *(Upload(name) for name in given),
        *_row(0),
        Run("vae_decoder"),
        Download("image"),
    )


def test_plan_with_one_encoders_embeds_runs_the_other(sdxl: Path) -> None:
    bundle = Bundle.open(sdxl)
    operations = plan(bundle.chain, bundle.manifest.graphs, 1, given=["prompt_embeds"])
    assert [o for o in operations if isinstance(o, Run)] == [Run("text_encoder_2"), Run("unet"), Run("vae_decoder")]
    assert [o for o in operations if isinstance(o, Upload) and o.row is None] == [
        Upload("input_ids_2"),
        Upload("latents"),
        Upload("prompt_embeds"),
    ]


def test_buffers_are_the_names_on_the_graphs(sd: Path) -> None:
    tensors = Bundle.open(sd).tensors
    assert tensors["image"] == Tensor("image", "uint8", (1, SIZE[1], SIZE[0], 3))
    assert tensors["latents"].shape == tensors["noise"].shape == tensors["next_latents"].shape
    assert all(tensor.name == name for name, tensor in tensors.items())
