"""Graphs with slots for LoRAs make what diffusers makes with peft, and with zeros what the plain graph makes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import image_graphs
import lora_files
import numpy as np
import pytest
import slot_packing
import torch
from conftest import ON, SIZE
from here import build_here
from lora_files import Layers
from peft.tuners.tuners_utils import BaseTunerLayer
from test_parity import assert_same_picture, load_diffusers

from turbochain.engines import options
from turbochain.export.families import Shape, common
from turbochain.export.recording import NEGATIVE_TEXT
from turbochain.export.remedies import Remedy
from turbochain.export.sources.checkpoint import open_folder
from turbochain.runtime import Bundle, selection
from turbochain.runtime.backends.contract import Executor
from turbochain.runtime.bundle.hashing import digest
from turbochain.runtime.chain.plan import graph_plan
from turbochain.runtime.checks import reference
from turbochain.runtime.checks.bounds import BOUNDS
from turbochain.runtime.checks.metrics import relative_l2
from turbochain.runtime.checks.recorded import Recorded
from turbochain.runtime.commands import inspect
from turbochain.runtime.inputs.noise import Generator, draw_run

RANK = 8
TEXTS = {"sd": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}
WEIGHTS = {"style": 0.7, "sharp": -0.4}


def drawn(checkpoint: Path, covered: set[tuple[str, str]], seed: int, rank: int) -> Layers:
    """A LoRA of what the slots cover, as kohya's files have the UNet's and the text encoders'."""
    layers = lora_files.draw(checkpoint, ranks=(rank,), alphas=(3.0,), seed=seed)
    return {
        (c, m): layer for (c, m), layer in layers.items() if (c, f"{m.removeprefix('text_model.')}.weight") in covered
    }


class Made:
    """A bundle with slots, its engine, and two LoRAs of all that they cover, in diffusers' own pipeline."""

    def __init__(self, checkpoint: Path, bundle: Path, recorded: tuple[Path, Layers], folder: Path) -> None:
        self.checkpoint, self.recorded = checkpoint, recorded
        self.bundle = Bundle.open(bundle)
        self.clip_skip = int(any(name.endswith("+clip_skip") for name in self.bundle.manifest.graphs))
        self.chain = self.bundle.open_chain()
        self.graphs = {n: g for n, g in self.bundle.manifest.graphs.items() if g.slots}
        covered = {
            (g.component, p.removeprefix("text_model."))
            for g in self.graphs.values()
            for p in slot_packing.parameters(self.bundle.path, g)
        }
        # Of kohya's files diffusers reads add_embedding in the names that kohya's program gives SDXL's UNet.
        ranks, namings = (4, 2), ("kohya" if self.bundle.manifest.family == "sd" else lora_files.LDM, "peft")
        self.loras = {
            name: drawn(checkpoint, covered, seed, rank)
            for seed, (name, rank) in enumerate(zip(WEIGHTS, ranks, strict=True))
        }
        self.pipe: Any = load_diffusers(checkpoint)
        for (name, layers), naming in zip(self.loras.items(), namings, strict=True):
            path = lora_files.write(folder / f"{name}.safetensors", layers, naming)
            self.pipe.load_lora_weights(folder, weight_name=path.name, adapter_name=name)
        if self.clip_skip:  # diffusers' looks for it, and transformers 5 does not have it
            vars(self.pipe.text_encoder)["text_model"] = self.pipe.text_encoder
        found = selection.select(self.chain)
        self.executor: Executor = selection.open_executor(self.bundle, found)
        self.executor.load(self.chain.graphs)

    def run(self, graph: str, feeds: dict[str, Any]) -> list[np.ndarray]:
        """What the engine makes in a graph."""
        entry = self.bundle.manifest.graphs[graph]
        given = {name: np.asarray(value) for name, value in feeds.items()}
        made = self.executor.execute(graph_plan(graph, entry), {t.name: given[t.name] for t in entry.inputs}).arrays
        return [made[t.name].copy() for t in entry.outputs]

    def packed(self, graph: str, **weights: float) -> dict[str, np.ndarray]:
        loras = [(self.loras[name], weight) for name, weight in weights.items()]
        return slot_packing.pack(self.bundle.path, self.graphs[graph], loras)

    def set_adapters(self, **weights: float) -> None:
        if weights:
            self.pipe.enable_lora()
            self.pipe.set_adapters(list(weights), list(weights.values()))
        else:
            self.pipe.disable_lora()


@pytest.fixture(
    scope="module", params=["sd", *(pytest.param(of, marks=pytest.mark.full) for of in ("sdxl", "sd+clip_skip"))]
)
def made(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Made]:
    """The shared bundle, one of SDXL, and one with clip_skip."""
    (family, _, more), folder = request.param.partition("+"), tmp_path_factory.mktemp("slots")
    if request.param == "sd":
        bundle, recorded = request.getfixturevalue("slotted"), request.getfixturevalue("reference_lora")
        layers = lora_files.draw(checkpoints["sd"], seed=1, only="attn")  # as `reference_lora` has them
    else:
        bundle, recorded = folder / "b", folder / "recorded.safetensors"
        # As kohya's resize_lora writes them: diffusers alone would give all attention layers one alpha.
        layers = lora_files.draw(checkpoints[family], ranks=(2, 1), alphas=(1.0, 3.0, 2.0), seed=5, only="attn")
        lora_files.write(recorded, layers, "kohya")
        how: dict[str, Any] = {
            "steps": [2],
            "tasks": ["text-to-image"],
            "lora_rank": RANK,
            "clip_skip": int(more == "clip_skip"),
        }
        how |= {"size": SIZE, "reference_lora": [f"{recorded}:0.8"]}
        build_here(str(checkpoints[family]), bundle, **how, quiet=True, **ON)
    found = Made(checkpoints[family], bundle, (recorded, layers), folder)
    yield found
    found.executor.close()


ADAPTERS = [{}, {"style": 0.7}, {"style": 0.7, "sharp": -0.4}]


def unet_inputs(made: Made, row: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the graph reads in a row of the table, and the same for diffusers' UNet."""
    random, name = torch.Generator().manual_seed(row), made.chain.find(2)
    columns, table = made.chain.columns(name), made.chain.tables[name]
    given = {
        t.name: torch.randn(t.shape, generator=random)
        for t in made.bundle.manifest.graphs["unet"].inputs
        if t.name not in columns
    }
    texts = torch.cat([given[n] for n in ("prompt_embeds", "prompt_embeds_2") if n in given], -1)
    theirs = {
        "sample": given["latents"] * float(columns["input_scale"][row][0]),
        "timestep": torch.tensor(float(table.timesteps[table.index[row]])),
        "encoder_hidden_states": texts,
        "added_cond_kwargs": {},
    }
    if "pooled_prompt_embeds" in given:
        ids = torch.tensor([[SIZE[1], SIZE[0], 0, 0, SIZE[1], SIZE[0]]], dtype=torch.float32)
        theirs["added_cond_kwargs"] = {"text_embeds": given["pooled_prompt_embeds"], "time_ids": ids}
    rows = {n: values[row if len(values) > 1 else 0] for n, values in columns.items()}
    return {**given, **rows}, theirs


def test_zeros_give_the_plain_graphs_bits(made: Made) -> None:
    given, _ = unet_inputs(made, 0)
    (plain,), (slotted,) = made.run("unet", given), made.run("unet+lora", given | made.packed("unet+lora"))
    np.testing.assert_array_equal(slotted, plain)


def test_the_bundle_tells_its_slots(made: Made) -> None:
    manifest = made.bundle.manifest
    assert "adapters" in manifest.requires and {g.features for g in made.graphs.values()} == {("lora",)}
    assert all(g.slots in manifest.files for g in made.graphs.values())
    plain, slotted = manifest.graphs["unet"], manifest.graphs["unet+lora"]
    assert plain.data[0] == slotted.data[0] == "graphs/unet.fp32-0.data", "no weight is stored twice"
    for name, graph in (("unet", plain), ("unet+lora", slotted)):  # SDXL: the part of a matrix that has no slot
        assert graph.data[1:] == ((f"graphs/{name}.onnx.data",) if manifest.family == "sdxl" else ())
    stored = slot_packing.groups(made.bundle.path, slotted)
    groups = {member["parameter"]: i for i, group in enumerate(stored) for member in group["members"]}
    queries = [name for name in groups if name.endswith("attn1.to_q.weight")]
    assert queries
    for query in queries:  # of one tensor, in this order, in one product
        alike = [query.replace("to_q", f"to_{of}") for of in "qkv"]
        assert [name for name, group in groups.items() if group == groups[query]] == alike
    shown = inspect.as_text(made.bundle)
    assert re.search(r"^unet\+lora +fp32 .* lora$", shown, re.MULTILINE)
    assert f"modes guidance, {'negative_prompt, ' if manifest.family == 'sdxl' else ''}adapters-{RANK}" in shown
    assert "caller, held" in shown


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_the_unet_is_diffusers_with_peft(made: Made, adapters: dict[str, float], row: int) -> None:
    made.set_adapters(**adapters)
    given, theirs = unet_inputs(made, row)
    with torch.inference_mode():
        expected = made.pipe.unet(**theirs).sample.numpy()
    (result,) = made.run("unet+lora", given | made.packed("unet+lora", **adapters))
    assert relative_l2(result, expected) < 1e-5


@pytest.mark.full
def test_every_layer_with_a_slot_changes_what_peft_changes(made: Made) -> None:
    """Of one LoRA all layers but one are switched off, in turn."""
    made.set_adapters(style=1.0)
    given, theirs = unet_inputs(made, 1)
    layers = {n: m for n, m in made.pipe.unet.named_modules() if isinstance(m, BaseTunerLayer)}
    parameters = slot_packing.parameters(made.bundle.path, made.graphs["unet+lora"])
    assert {f"{name}.weight" for name in layers} == set(parameters) and len(parameters) == len(layers)
    kinds = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "proj_out", "conv_shortcut")
    assert all(any(p.endswith(f"{kind}.weight") for p in parameters) for kind in (*kinds, "time_emb_proj"))
    scales = {name: layer.scaling["style"] for name, layer in layers.items()}
    zeros = made.packed("unet+lora")
    (plain,) = made.run("unet+lora", given | zeros)
    all_layers = made.loras["style"]
    for one in layers:
        for name, layer in layers.items():
            layer.scaling["style"] = 4 * scales[name] if name == one else 0.0
        packed = slot_packing.pack(
            made.bundle.path, made.graphs["unet+lora"], [({("unet", one): all_layers["unet", one]}, 4.0)]
        )
        (result,) = made.run("unet+lora", given | packed)
        with torch.inference_mode():
            expected = made.pipe.unet(**theirs).sample.numpy()
        change = np.linalg.norm(expected - plain)
        assert change > 1e-4 * np.linalg.norm(plain), one
        assert np.linalg.norm(result - expected) < 1e-2 * change, one
    for name, layer in layers.items():
        layer.scaling["style"] = scales[name]


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_text_encoders_are_transformers_with_peft(made: Made, adapters: dict[str, float]) -> None:
    """With all layers, and with one left out, which is a graph of its own with slots of its own."""
    made.set_adapters(**adapters)
    random = np.random.default_rng(0)
    names = [name for name in made.graphs if name.startswith("text_encoder")]
    assert {made.graphs[n].component for n in names} == {*TEXTS[made.bundle.manifest.family]}
    assert len(names) == (1 + made.clip_skip) * len(TEXTS[made.bundle.manifest.family])
    for name in names:
        graph = made.graphs[name]
        parameters = slot_packing.parameters(made.bundle.path, graph)
        stored = json.loads((made.bundle.path / graph.names).read_text())
        assert {p for p, place in stored.items() if "initializer" in place} >= {*parameters}, "what is run"
        encoder, skipped = getattr(made.pipe, graph.component), int(name.endswith("+clip_skip"))
        ids = random.integers(0, encoder.config.vocab_size, graph.inputs[0].shape).astype(np.int32)
        with torch.inference_mode():
            output = encoder(torch.from_numpy(ids).long(), output_hidden_states=True)
            if len(TEXTS[made.bundle.manifest.family]) == 1:
                expected = [encoder.final_layer_norm(output.hidden_states[-1 - skipped])]
            else:
                expected = [output.hidden_states[-2 - skipped], *([output[0]] if graph.component[-1] == "2" else [])]
        result = made.run(name, {graph.inputs[0].name: ids} | made.packed(name, **adapters))
        for mine, right in zip(result, expected, strict=True):
            assert relative_l2(mine, right.numpy()) < 1e-5, name


def picture(made: Made, modes: set[str], loras: list[tuple[Layers, float]], adapters: bool = False) -> tuple[Any, Any]:
    """A recorded case, with other modes and LoRAs, drawn by the whole chain; the case too."""
    chain = made.chain
    cases = reference.read(made.bundle, chain.name, adapters=adapters).cases
    alike = [c for c in cases if ("guidance" in c.modes) == ("guidance" in modes)]
    case = max(alike, key=lambda c: chain.chain.tables[c.table].steps)
    recorded, plan = Recorded(chain, case), chain.plan(case.table, modes=case.modes | modes)
    held = {}
    for stage in chain.chain.stages:
        if stage.graph in made.graphs:
            packed = slot_packing.pack(made.bundle.path, made.graphs[stage.graph], loras)
            held |= {stage.wires[end]: values for end, values in packed.items()}
    assert held.keys() == {name for name, feed in chain.chain.feeds.items() if feed.is_ == "adapter"}
    made.executor.hold(plan, {name: held[name] for name in chain.read(case.modes | modes) if name in held})
    noise = draw_run(chain, recorded.table, [Generator(case.seed)], chain.batch)
    fed = {**recorded.feeds("call"), **recorded.feeds("step"), **recorded.columns, **noise}
    return made.executor.execute(plan, fed).arrays[chain.chain.output].copy(), case


def test_the_recorded_picture_is_the_files(made: Made) -> None:
    path, layers = made.recorded
    image, case = picture(made, {f"adapters-{RANK}"}, [(layers, 0.8)], adapters=True)
    assert case.adapters == ((digest(path), 0.8),)
    assert_same_picture(image, case.tensors["image"])
    without, _ = picture(made, {f"adapters-{RANK}"}, [], adapters=True)
    assert np.abs(without.astype(int) - image).max() > 3


@pytest.mark.parametrize("guided", [False, True])
def test_whole_pictures(made: Made, guided: bool) -> None:
    modes = {f"adapters-{RANK}", *(["guidance"] if guided else [])}
    image, case = picture(made, modes, [(made.loras[name], weight) for name, weight in WEIGHTS.items()])
    made.set_adapters(**WEIGHTS)
    theirs = made.pipe(
        case.prompt,
        num_inference_steps=made.chain.chain.tables[case.table].steps,
        guidance_scale=float(case.tensors["guidance_scale"][0]) if guided else 0.0,
        generator=torch.Generator().manual_seed(case.seed),
        height=SIZE[1],
        width=SIZE[0],
        output_type="np",
        clip_skip=made.clip_skip or None,
        **({"negative_prompt": [NEGATIVE_TEXT]} if "negative_prompt" in case.modes else {}),
    ).images
    assert_same_picture(image, (theirs * 255).round().astype(np.uint8))
    zeros, _ = picture(made, modes, [])
    assert_same_picture(zeros, case.tensors["image"])


@pytest.mark.full
def test_half_precision(made: Made, tmp_path: Path) -> None:
    """With attention in fp32, as what would overflow has it; TensorRT-RTX builds an engine of the graph as well."""
    from turbochain.engines.backends import tensorrt
    from turbochain.runtime.backends.tensorrt import target

    family, checkpoint = made.bundle.manifest.family, open_folder(made.checkpoint)
    attentions = tuple(n for n, m in made.pipe.unet.named_modules() if n.endswith(("attn1", "attn2")))
    specs = {"half": common.graphs(checkpoint.family, 1, True, ranks=[RANK])["unet+lora"]}
    columns = {name: made.chain.tensors[name].shape for name in made.chain.feeds("column")}
    shape, remedy = Shape(SIZE[1], SIZE[0], 1), Remedy("fp16", attention=attentions)
    graph = image_graphs.traced(checkpoint, specs, shape, tmp_path, remedy, columns)["half"]
    assert graph.features == ("lora",) and graph.slots == "graphs/half.slots.json"
    adapters = WEIGHTS if family == "sd" else {"style": 0.7}
    made.set_adapters(**adapters)
    given, theirs = unet_inputs(made, 0)
    with torch.inference_mode():
        expected = made.pipe.unet(**theirs).sample.numpy()
    feeds = given | made.packed("unet+lora", **adapters)
    result = image_graphs.run(tmp_path, graph, {t.name: feeds[t.name] for t in graph.inputs})["prediction"]
    assert relative_l2(result, expected) < BOUNDS["fp16"]["prediction"]["relative_l2"]
    chosen = options.resolve("tensorrt", {})
    engine = tensorrt.serialize(
        tmp_path / graph.file, "half", chosen, target("sm89"), tmp_path, lambda *_: None, lambda *_: None
    )
    assert engine.nbytes > 0
