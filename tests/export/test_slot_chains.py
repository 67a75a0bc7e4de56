"""The chains of bundles with slots for LoRAs: sound in every combination of modes, with one UNet in each."""

from itertools import combinations
from typing import Any

import pytest

from turbochain.export import asked, estimate, families, tasks
from turbochain.export.chains import Layout
from turbochain.export.families import Shape
from turbochain.export.order import ExportOrder
from turbochain.export.sources import presets
from turbochain.runtime.bundle.manifest import Chain, Feed, Graph, TableEntry, Tensor
from turbochain.runtime.chain import wiring
from turbochain.runtime.errors import InputError

PRESETS = ("sd-turbo-mini", "sdxl-turbo-mini", "lcm-sd15-mini")
SHAPES = (Shape(64, 64, 1), Shape(64, 96, 2))


def layout(preset: str, ranks: tuple[int, ...], K: int = 1, **more: Any) -> Layout:
    family = families.of(presets.PRESETS[preset].pipeline)
    of_family = tasks.find(list(tasks.load()))
    wanted = [task for task in of_family if task.pipeline in family.pipelines and not (task.streams and K > 1)]
    shapes = [Shape(s.height, s.width, s.batch, K) for s in SHAPES]
    return Layout(family, configs(preset), wanted, shapes, ranks=ranks, **more)


def configs(preset: str) -> dict[str, Any]:
    from turbochain.export.sources import synthetic

    parts = synthetic.models(preset)
    found = {n: p.config.to_dict() if n.startswith("text") else dict(p.config) for n, p in parts.items()}
    return {name: config | {"_class_name": type(parts[name]).__name__} for name, config in found.items()}


def graphs(layout: Layout) -> dict[str, Graph]:
    """What tracing would make, as far as names go: all tensors have one shape, but for those of the slots."""

    def ends(names: Any) -> tuple[Tensor, ...]:
        return tuple(Tensor(name, "float32", (1,)) for name in names)

    made = {}
    for name, placed in layout.graphs().items():
        spec = placed.spec
        of_graph = len(spec.role) + 100 * spec.rank  # the sizes of another graph's are others
        slots = [Tensor(end, "float32", (of_graph,)) for end in ("lora_down", "lora_up") if spec.rank]
        inputs = (*ends(spec.inputs(layout.configs, placed.shape)), *slots)
        made[name] = Graph(
            spec.role, spec.component, "", (), "", "fp32", 21, inputs, ends(spec.outputs), features=spec.features
        )
    return made


def chains(layout: Layout) -> dict[str, Chain]:
    table = {"2": TableEntry(2, 2)}
    return {layout.name(task, shape): layout.chain(task, shape, table, {}) for task, shape in layout.chains}


def ran(chain: Chain, made: dict[str, Graph], modes: tuple[str, ...], component: str) -> list[str]:
    return [s.graph for s in chain.stages if s.runs(modes) and made[s.graph].component == component]


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize(("zeros", "clip_skip"), [(False, 0), (True, 1)])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_combination_of_modes_has_its_unet(preset: str, zeros: bool, clip_skip: int, K: int) -> None:
    made_of = layout(preset, (8, 32), K, zeros=zeros, clip_skip=clip_skip)
    made = graphs(made_of)
    for name, chain in chains(made_of).items():
        assert wiring.problems(name, chain, made) == []
        adapters = [mode for mode in chain.modes if mode.startswith("adapters")]
        assert adapters == ([] if chain.stream else ["adapters-8", "adapters-32"])
        suffix = name.removeprefix(chain.task)
        for modes in (m for n in range(len(chain.modes) + 1) for m in combinations(chain.modes, n)):
            unets = ran(chain, made, modes, "unet")
            wanted = "unet+stream" if chain.stream else "unet"
            wanted = "unet+lora" if "adapters-8" in modes else wanted
            wanted = "unet+lora-32" if "adapters-32" in modes else wanted
            assert unets == [wanted + suffix] * (2 if "guidance" in modes else 1)
            assert {made[g].features for g in ran(chain, made, modes, "text_encoder")} == {("lora",)}
        held = {feed for feed, how in chain.feeds.items() if how.is_ == "adapter"}
        read = {(s.graph, s.wires[end]) for s in chain.stages for end in s.wires if end.startswith("lora_")}
        assert held == {feed for _, feed in read}
        assert len(read) == 2 * len({graph for graph, _ in read}) == len(held), "a graph's slots have one name"
        columns = {feed for feed, how in chain.feeds.items() if how.is_ == "column"}
        assert ("activated_time_embedding" in columns) == (not preset.startswith("sdxl") and not chain.stream)


def test_the_names_are_the_formats() -> None:
    made_of = layout("sd-turbo-mini", (32, 128))
    chain = chains(made_of)["text-to-image"]
    assert {feed for feed, how in chain.feeds.items() if how == Feed("adapter", "held")} == {
        f"{graph}_lora_{end}{rank}"
        for graph, rank in (("text_encoder", ""), ("unet", ""), ("unet", "_128"))
        for end in ("down", "up")
    }
    ranks = {name: placed.spec.rank for name, placed in made_of.graphs().items() if placed.spec.rank}
    for name, rank in {"text_encoder": 128, "unet+lora": 32, "unet+lora-128": 128, "unet+lora@96x64-b2": 32}.items():
        assert ranks[name] == rank


def test_without_ranks_nothing_changes() -> None:
    made_of = layout("sdxl-turbo-mini", ())
    assert not any(placed.spec.features for placed in made_of.graphs().values())
    assert all(feed.is_ != "adapter" for chain in chains(made_of).values() for feed in chain.feeds.values())


def test_what_is_asked_for() -> None:
    given = ExportOrder.of("demo", {"lora_rank": 32}).given()
    assert given["lora_ranks"] == ExportOrder.of("demo", {"lora_rank": [32, 32]}).given()["lora_ranks"] == (32,)
    assert ExportOrder.of("demo", {"lora_rank": [128, 32]}).requested("fp32").lora_ranks == (32, 128)
    for rank in (0, 257, [8, 300], []):
        with pytest.raises(InputError, match=r"lora_rank \[.*\]: ranks from 1 to 256 were expected, such as 32"):
            ExportOrder.of("demo", {"lora_rank": rank})
    with pytest.raises(InputError, match=r"--reference-lora a.safetensors:b: a number was expected after the colon"):
        ExportOrder.of("demo", {"reference_lora": ["a.safetensors:b"]}).given()
    with pytest.raises(InputError, match=r"--reference-lora a.safetensors: a .safetensors file on this disk"):
        ExportOrder.of("demo", {"reference_lora": ["a.safetensors:0.5"]}).given()
    with pytest.raises(InputError, match="reference_lora 'a': a list was expected"):
        asked.listed({"reference_lora": "a"})


def test_slots_need_memory() -> None:
    preset, counts = "sd-turbo-mini", {"text_encoder": 3 * 10**8, "unet": 9 * 10**8, "vae": 10**8}
    needs = [
        estimate.needs(made_of.graphs(), made_of.configs, counts, made_of.precisions("fp32"), 0)
        for made_of in (layout(preset, ()), layout(preset, (32,)), layout(preset, (256,)))
    ]
    plain, small, large = (need.memory["verify"] for need in needs)
    assert 0 < small - plain < counts["unet"]  # no second UNet: the plain one is unloaded
    assert large - small > 224 * 4 * 432_128  # the values of the full-size UNet's slots, for each rank
    assert needs[0].disk == needs[2].disk, "the weights are shared"
