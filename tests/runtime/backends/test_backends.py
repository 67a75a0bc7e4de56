"""One conformance test over every backend that is installed."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import FAMILIES, BundleFactory
from here import build_here
from onnx.reference import ReferenceEvaluator

from turbochain.runtime import Bundle, Cancelled, InputError, Pipeline, backends, selection
from turbochain.runtime.backends import openvino
from turbochain.runtime.backends.contract import Executor
from turbochain.runtime.bundle.manifest import PRECISIONS, Tensor
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.chain.plan import Copy, Download, Plan, Run, Upload, graph_plan
from turbochain.runtime.selection import Found


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
OF_IMAGES = ("vae_encoder", "start")
GRAPHS = [("sd", g) for g in ("text_encoder", "unet", "step", "step+guidance", "vae_decoder", *OF_IMAGES)] + [
    ("sdxl", g) for g in ("text_encoder", "text_encoder_2", "unet", "step", "step+guidance", "vae_decoder")
]
CLOSE = {"fp32": {"float32": 1e-4, "uint8": 1.0}, "bf16": {"float32": 5e-2, "uint8": 8.0}}
"""Relative to the largest value; levels. In bf16 a value has 8 bits."""


def marks(backend: str, device: str, precision: str) -> list[pytest.MarkDecorator]:
    more = precision == "bf16" or backend == "web"  # which runs what onnxruntime does, on its forms
    return [pytest.mark.gpu] * (device == "cuda") + [pytest.mark.full] * more


@pytest.fixture(
    scope="module",
    params=[pytest.param(w, id="{} on {} in {}".format(*w), marks=marks(*w)) for w in WHERE],
)
def where(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    """A backend, a device that it runs on here, and what it computes in."""
    return request.param


@pytest.fixture(scope="module")
def engines(
    where: tuple[str, str, str], bundle_of: BundleFactory, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[OpenChain, Found]]:
    """Family → a bundle's chain, and an engine of that kind; a GPU's has files for the image graphs too."""
    backend, device, precision = where
    chains = ["text-to-image"] + ["image-to-image"] * (device == "cuda")
    options = {"inference_precision": precision} if backend == "openvino" else {}
    found = {}
    for family in FAMILIES:
        path = tmp_path_factory.mktemp("bundle") / family
        shutil.copytree(bundle_of(family), path)
        made = build_here(str(path), path, backend=backend, device=device, options=options, chains=chains, quiet=True)
        bundle = Bundle.open(path)
        found[family] = (bundle.open_chain(), Found(made.folder, bundle.engines()[made.engine]))
    return found


def opened(engine: tuple[OpenChain, Found], device: str) -> Executor:
    """An executor without a graph."""
    chain, found = engine
    return selection.open_executor(chain.bundle, found, device=device)


@pytest.fixture(scope="module")
def executors(
    where: tuple[str, str, str], engines: dict[str, tuple[OpenChain, Found]]
) -> Iterator[dict[str, tuple[OpenChain, Executor]]]:
    """Family → the chain, and an executor with every graph of it and those of images."""
    made = {family: (of[0], opened(of, where[1])) for family, of in engines.items()}
    for chain, executor in made.values():
        executor.load([*chain.graphs, *OF_IMAGES])
    yield made
    for _, executor in made.values():
        executor.close()


def random_value(random: np.random.Generator, tensor: Tensor) -> np.ndarray:
    if tensor.dtype == "int32":  # a prompt: start, words, end, padding
        ids = random.integers(1, 49405, tensor.shape, np.int32)
        ids[:, 0], ids[:, 20], ids[:, 21:] = 49406, 49407, 0
        return ids
    if tensor.dtype == "uint8":
        return random.integers(0, 256, tensor.shape, np.uint8)
    return random.standard_normal(tensor.shape).astype(tensor.dtype)


RIGHT: dict[str, dict[str, np.ndarray]] = {}
"""What was evaluated, by a hash of the graph and its feeds: every backend is given the same."""


def right(chain: OpenChain, graph: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The graph's outputs by onnx's own evaluator, in numpy. Callers must not change them."""
    key = hashlib.sha256(chain.bundle.graph_digest(graph).encode())
    for name, value in sorted(feeds.items()):
        key.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    if key.hexdigest() not in RIGHT:
        model = onnx.load(chain.bundle.path / chain.bundle.manifest.graphs[graph].file)
        names = [o.name for o in model.graph.output]
        RIGHT[key.hexdigest()] = dict(zip(names, ReferenceEvaluator(model).run(names, dict(feeds)), strict=True))
    return RIGHT[key.hexdigest()]


def assert_close(results: Mapping[str, np.ndarray], expected: dict[str, np.ndarray], precision: str) -> None:
    assert set(results) == set(expected)
    for name, reference in expected.items():
        assert (results[name].dtype, results[name].shape) == (reference.dtype, reference.shape)
        difference = np.abs(results[name].astype(np.float64) - reference)
        scale = 1 if reference.dtype == np.uint8 else float(np.abs(reference).max())
        assert difference.max() <= CLOSE[precision][reference.dtype.name] * scale, name
        assert precision != "fp32" or reference.dtype != np.uint8 or (difference > 0).mean() <= 1e-3


@pytest.mark.parametrize(("family", "graph"), GRAPHS)
def test_a_stage_computes_what_its_graph_says(
    where: tuple[str, str, str], executors: dict[str, tuple[OpenChain, Executor]], family: str, graph: str
) -> None:
    (chain, executor), random = executors[family], np.random.default_rng(0)
    tensors = chain.bundle.manifest.graphs[graph]
    for _ in range(2):  # the second launch reuses the buffers
        feeds = {t.name: random_value(random, t) for t in tensors.inputs}
        results = executor.execute(graph_plan(graph, tensors), feeds)
        assert_close(results.arrays, right(chain, graph, feeds), where[2])
        assert results.seconds > 0 and results.uncaptured is None


def random_feeds(chain: OpenChain, steps: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """The columns of the table, and random values of the other feeds."""
    columns, found = chain.columns(str(steps)), {}
    for name, feed in chain.chain.feeds.items():
        tensor = chain.tensors[name]
        if feed.is_ != "column":
            rows = [random_value(random, tensor) for _ in range(steps if feed.when == "step" else 1)]
            found[name] = np.stack(rows) if feed.when == "step" else rows[0]
    return found | columns


@pytest.mark.parametrize(("steps", "guided"), [(1, True), (3, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_is_its_stages_joined_by_name(
    where: tuple[str, str, str], executors: dict[str, tuple[OpenChain, Executor]], family: str, steps: int, guided: bool
) -> None:
    """In all of its modes too, where one graph serves two places."""
    (opened, executor), random = executors[family], np.random.default_rng(1)
    chain, feeds = opened.chain, random_feeds(opened, steps, random)
    modes = chain.modes if guided else ()
    when = {p: [s for s in chain.stages if s.when == p and s.runs(modes)] for p in ("prompt", "step", "end")}
    sequence = [*when["prompt"], *(g for row in range(steps) for g in (row, *when["step"])), *when["end"]]
    values: dict[str, np.ndarray] = {}
    for name, feed in chain.feeds.items():
        if feed.when == "call":
            values[name] = feeds[name][0] if feed.is_ == "column" else feeds[name]
    for item in sequence:
        if isinstance(item, int):
            values |= {name: feeds[name][item] for name, feed in chain.feeds.items() if feed.when == "step"}
            values |= {target: values[source] for source, target in chain.carry.items() if item}
        else:
            fed = {t.name: values[item.wires.get(t.name, t.name)] for t in opened.graphs[item.graph].inputs}
            values |= {item.wires.get(n, n): made for n, made in right(opened, item.graph, fed).items()}

    launched: list[str] = []
    whole = opened.plan(str(steps), modes=modes, downloads=["next_latents"])
    results = executor.execute(whole, feeds, observe=lambda graph, seconds: launched.append(graph))
    assert_close(results.arrays, {name: values[name] for name in ("next_latents", "image")}, where[2])
    assert launched == [item.graph for item in sequence if not isinstance(item, int)]
    assert len(launched) == len({*launched}) + (sum(bool(s.wires) for s in chain.stages) if guided else 4)


def test_feeds_are_left_alone(executors: dict[str, tuple[OpenChain, Executor]]) -> None:
    (chain, executor), random = executors["sd"], np.random.default_rng(2)
    tensors = chain.graphs["unet"]
    feeds = {t.name: random_value(random, t) for t in tensors.inputs}
    before = {name: value.copy() for name, value in feeds.items()}
    first = {k: v.copy() for k, v in executor.execute(graph_plan("unet", tensors), feeds).arrays.items()}
    for name, value in before.items():
        np.testing.assert_array_equal(feeds[name], value)
    again = executor.execute(graph_plan("unet", tensors), feeds).arrays
    np.testing.assert_array_equal(again["prediction"], first["prediction"])


def test_a_graph_serves_two_places_by_its_wires(
    where: tuple[str, str, str], executors: dict[str, tuple[OpenChain, Executor]]
) -> None:
    """Twice in one plan, as for a negative prompt; then what it made is read under its new name."""
    (chain, executor), random = executors["sd"], np.random.default_rng(6)
    ids = {name: random_value(random, chain.tensors["input_ids"]) for name in ("input_ids", "negative_ids")}
    wires = (("input_ids", "negative_ids"), ("prompt_embeds", "negative_embeds"))
    made = ("prompt_embeds", "negative_embeds")
    plan_of_two = Plan(
        (*map(Upload, ids), Run("text_encoder"), Run("text_encoder", wires), *(Download(name) for name in made))
    )
    results = executor.execute(plan_of_two, ids).arrays
    expected = {
        name: right(chain, "text_encoder", {"input_ids": value})["prompt_embeds"]
        for name, value in zip(made, ids.values(), strict=True)
    }
    assert_close(results, expected, where[2])
    assert not np.array_equal(results["prompt_embeds"], results["negative_embeds"])


def test_a_held_buffer_keeps_its_value(
    where: tuple[str, str, str], executors: dict[str, tuple[OpenChain, Executor]]
) -> None:
    """No plan uploads it, and another plan may change it in between by a copy."""
    (chain, executor), random = executors["sd"], np.random.default_rng(7)
    tensors = chain.graphs["step"]
    feeds = {t.name: random_value(random, t) for t in tensors.inputs}
    held = (("noise", "kept"),)
    uploads = [Upload(t.name) for t in tensors.inputs if t.name != "noise"]
    reading = Plan((*uploads, Run("step", held), Download("next_latents")))
    kept = random_value(random, chain.tensors["noise"])
    executor.hold(reading, {"kept": kept})
    for _ in range(2):
        results = executor.execute(reading, feeds)
        assert_close(results.arrays, right(chain, "step", {**feeds, "noise": kept}), where[2])
    made = results.arrays["next_latents"].copy()
    writing = Plan((*uploads, Run("step", held), Copy("next_latents", "kept"), Download("next_latents")))
    executor.execute(writing, feeds)
    after = executor.execute(reading, feeds)
    assert_close(after.arrays, right(chain, "step", {**feeds, "noise": made}), where[2])


def test_a_cancelled_plan_leaves_the_next_as_it_is(executors: dict[str, tuple[OpenChain, Executor]]) -> None:
    (chain, executor), random = executors["sd"], np.random.default_rng(5)
    whole, feeds = chain.plan("2"), random_feeds(chain, 2, random)
    expected = executor.execute(whole, feeds).arrays["image"].copy()
    for asks in (1, 2, 4):
        answers = iter([False] * (asks - 1) + [True])
        with pytest.raises(Cancelled):
            other = random_feeds(chain, 2, random)
            executor.execute(whole, other, observe=lambda *_: None, cancel=partial(next, answers))
        np.testing.assert_array_equal(executor.execute(whole, feeds, cancel=lambda: False).arrays["image"], expected)


def test_an_executor_may_hold_a_single_graph(
    where: tuple[str, str, str], engines: dict[str, tuple[OpenChain, Found]]
) -> None:
    chain = engines["sd"][0]
    executor = opened(engines["sd"], where[1])
    assert executor.loaded == frozenset()
    executor.load(["vae_decoder"])
    assert executor.loaded == {"vae_decoder"}
    tensors = chain.graphs["vae_decoder"]
    feeds = {t.name: random_value(np.random.default_rng(3), t) for t in tensors.inputs}
    results = executor.execute(graph_plan("vae_decoder", tensors), feeds)
    assert_close(results.arrays, right(chain, "vae_decoder", feeds), where[2])
    with pytest.raises(KeyError):
        executor.execute(Plan((Run("unet"),)), {})
    executor.close()
    executor.close()  # twice is once


def test_a_graph_that_was_unloaded_is_gone_until_it_is_loaded_again(
    where: tuple[str, str, str], engines: dict[str, tuple[OpenChain, Found]]
) -> None:
    chain = engines["sd"][0]
    executor = opened(engines["sd"], where[1])
    executor.load(chain.graphs)
    feeds = random_feeds(chain, 2, np.random.default_rng(4))
    whole, known = chain.plan("2"), chain.plan("2", given=["prompt_embeds"])
    first = executor.execute(whole, feeds, observe=None).arrays["image"].copy()
    embeds = executor.execute(chain.plan("2", downloads=["prompt_embeds"]), feeds).arrays["prompt_embeds"].copy()
    executor.unload("text_encoder")
    assert executor.loaded == {*chain.graphs} - {"text_encoder"}
    with pytest.raises(KeyError):
        executor.execute(whole, feeds)
    np.testing.assert_array_equal(executor.execute(known, feeds | {"prompt_embeds": embeds}).arrays["image"], first)
    executor.load(chain.graphs)
    np.testing.assert_array_equal(executor.execute(whole, feeds).arrays["image"], first)
    executor.close()


def test_every_backend_says_what_it_needs(where: tuple[str, str, str]) -> None:
    name, device, _ = where
    backend = backends.get(name)
    assert backends.library(name)[0] in backend.libraries
    assert backend.install.startswith("pip install ")
    assert all(set(p.precisions) <= set(PRECISIONS) for p in backend.preferences.values())
    assert backend.device(device).kind == device
    assert device in backend.preferences
    with pytest.raises(InputError, match="no-such-device"):
        backend.device("no-such-device")


def test_a_graph_in_a_precision_that_the_backend_lacks(sd: Path, copy_of: Callable[[Path], Path]) -> None:
    path = copy_of(sd)
    value = json.loads((path / "bundle.json").read_text())
    value["graphs"]["vae_decoder"]["precision"] = "bf16"
    (path / "bundle.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="cannot compute in bf16 on cpu, only in fp32 and fp16: choose another"):
        Pipeline.load(path, backend="onnxruntime")


def test_the_best_backend_is_installed_and_ranks_highest() -> None:
    name, reason = backends.best()
    preferences = {u: backends.get(u[0]).preferences[u[1]] for u in USABLE}
    best = max(USABLE, key=lambda u: preferences[u].rank)
    assert (name, reason) == (best[0], preferences[best].reason)


@pytest.mark.parametrize("name", ["no_such_backend", "os", "cpu", "contract", "cpu.x", ""])
def test_an_unknown_backend_is_refused_with_the_known_ones(name: str, sd: Path) -> None:
    with pytest.raises(InputError, match="onnxruntime"):
        selection.select(Bundle.open(sd).open_chain(), name)
