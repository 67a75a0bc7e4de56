"""The recording of a plan for a GPU: the order of launches and copies, and the buffer of each name."""

from pathlib import Path

import pytest

from turbochain.runtime import Bundle
from turbochain.runtime.bundle.manifest import Graph, Tensor
from turbochain.runtime.chain.plan import Constant, Copy, Download, Plan, Run, Upload, graph_plan, plan
from turbochain.runtime.chain.recording import (
    Action,
    Launch,
    OnDevice,
    Recording,
    ToDevice,
    Together,
    ToHost,
    record,
    scratch,
)

EMBEDS = ["prompt_embeds", "prompt_embeds_2", "pooled_prompt_embeds"]


def recorded(path: Path, steps: int, **options: object) -> Recording:
    chain = Bundle.open(path).open_chain()
    return record(chain.plan(str(steps), **options), chain.graphs)


def outline(actions: tuple[Action, ...]) -> list[object]:
    """The actions with a group of launches as the set of its graphs."""
    return [{launch.graph for launch in a.launches} if isinstance(a, Together) else a for a in actions]


def launches(recording: Recording, graph: str) -> list[dict[str, str]]:
    together = [a for a in recording.actions if isinstance(a, Together)]
    return [dict(launch.buffers) for a in together for launch in a.launches if launch.graph == graph]


def test_one_step_is_uploads_stages_and_downloads(sd: Path) -> None:
    recording = recorded(sd, 1, downloads=["next_latents"])
    assert outline(recording.actions) == [
        ToDevice("input_ids"),
        ToDevice("latents"),
        {"text_encoder"},
        ToDevice("noise[0]"),
        {"unet"},
        {"step"},
        {"vae_decoder"},
        ToHost("next_latents"),
        ToHost("image"),
    ]
    assert recording.downloads == {"next_latents": "next_latents", "image": "image"}
    assert recording.uploads == {
        "input_ids": ("input_ids", None),
        "latents": ("latents", None),
        "noise[0]": ("noise", 0),
    }


def test_what_differs_by_step_has_a_buffer_of_its_own_for_each_row(sd: Path) -> None:
    recording = recorded(sd, 3)
    assert [s["noise"] for s in launches(recording, "step")] == ["noise[0]", "noise[1]", "noise[2]"]
    columns = {"unet": {"time_projections", "input_scale"}, "step": {"m", "v", "w"}}
    table = "text-to-image/3"
    for graph, own in columns.items():
        for row, step in enumerate(launches(recording, graph)):
            assert {step[c] for c in own} == {f"{c}[{table}][{row}]" for c in own}
            shared = set(step) - own - {"noise"}
            assert {step[name] for name in shared} == shared
    every = [(c, row) for own in columns.values() for c in own for row in range(3)]
    assert recording.constants == {f"{c}[{table}][{row}]": Constant(c, table, row) for c, row in every}
    assert [a for a in recording.actions if isinstance(a, OnDevice)] == [OnDevice("next_latents", "latents")] * 2


def test_what_is_the_same_in_every_step_has_one_buffer(sdxl: Path) -> None:
    recording = recorded(sdxl, 3)
    (buffer,) = {step["time_ids_embeds"] for step in launches(recording, "unet")}
    assert recording.constants[buffer] == Constant("time_ids_embeds", "text-to-image/3", 0)
    assert len({step["time_embeds"] for step in launches(recording, "unet")}) == 3


def test_equal_rows_of_two_tables_are_two_constants(sd: Path) -> None:
    """A GPU keeps a constant by what it is, and two tables may differ in one column alone."""
    one, other = ({*recorded(sd, steps).constants.values()} for steps in (1, 4))
    assert {c.name for c in one} == {c.name for c in other} and not one & other
    chain = Bundle.open(sd).open_chain()
    again = record(plan(chain.chain, chain.graphs, 1, table="text-to-image/another"), chain.graphs)
    assert not {*again.constants.values()} & one and not {*again.constants} & {*recorded(sd, 1).constants}


def test_constants_are_not_uploaded_with_a_picture(sdxl: Path) -> None:
    recording = recorded(sdxl, 4)
    assert not {a.buffer for a in recording.actions if isinstance(a, ToDevice)} & set(recording.constants)


def test_the_two_text_encoders_may_run_at_the_same_time_and_nothing_else_may(sdxl: Path) -> None:
    groups = [g for g in outline(recorded(sdxl, 2).actions) if isinstance(g, set)]
    assert groups == [{"text_encoder", "text_encoder_2"}, *[{"unet"}, {"step"}] * 2, {"vae_decoder"}]


def test_a_known_prompt_runs_no_text_encoder(sdxl: Path) -> None:
    assert outline(recorded(sdxl, 1, given=EMBEDS).actions) == [
        ToDevice("latents"),
        *(ToDevice(name) for name in EMBEDS),
        ToDevice("noise[0]"),
        {"unet"},
        {"step"},
        {"vae_decoder"},
        ToHost("image"),
    ]


def test_every_buffer_has_the_tensor_of_its_name(sdxl: Path) -> None:
    tensors = Bundle.open(sdxl).open_chain().tensors
    recording = recorded(sdxl, 2)
    used = {b for a in recording.actions if isinstance(a, Together) for one in a.launches for b in one.buffers.values()}
    assert used <= set(recording.tensors)
    assert all(tensor == tensors[buffer.partition("[")[0]] for buffer, tensor in recording.tensors.items())


def test_a_stage_alone(sd: Path) -> None:
    graphs = Bundle.open(sd).manifest.graphs
    recording = record(graph_plan("vae_decoder", graphs["vae_decoder"]), graphs)
    assert outline(recording.actions) == [ToDevice("next_latents"), {"vae_decoder"}, ToHost("image")]


def test_launches_that_share_a_written_buffer_keep_their_order(sd: Path) -> None:
    graphs = Bundle.open(sd).manifest.graphs
    twice = record(Plan((Run("text_encoder"), Run("text_encoder"))), graphs)  # both write prompt_embeds
    assert outline(twice.actions) == [{"text_encoder"}, {"text_encoder"}]
    readers = record(Plan((Run("unet"), Run("text_encoder"))), graphs)  # the second overwrites what the first reads
    assert outline(readers.actions) == [{"unet"}, {"text_encoder"}]


def graph(inputs: str, outputs: str) -> Graph:
    """A graph of vectors with these names, a letter each."""
    ends = ([Tensor(name, "float32", (4,)) for name in names] for names in (inputs, outputs))
    return Graph("", "", "", (), "", "fp32", 21, *map(tuple, ends))


WIRED = {"f": graph("x", "y"), "g": graph("xy", "z"), "h": graph("x", "z")}


def run(name: str, **wires: str) -> Run:
    return Run(name, tuple(wires.items()))


def test_a_graph_that_serves_two_places_reads_and_writes_by_its_wires() -> None:
    recording = record(Plan((Upload("x"), Upload("n"), run("f"), run("f", x="n", y="ny"), Download("ny"))), WIRED)
    assert launches(recording, "f") == [{"x": "x", "y": "y"}, {"x": "n", "y": "ny"}]
    assert recording.tensors == {name: Tensor(name, "float32", (4,)) for name in ("x", "n", "y", "ny")}
    assert recording.downloads == {"ny": "ny"} and recording.actions[-1] == ToHost("ny")


def test_a_wired_constant_has_the_buffer_of_its_row() -> None:
    rows = [o for row in range(2) for o in (Constant("c", "t", row), run("f", x="c"))]
    assert launches(record(Plan(tuple(rows)), WIRED), "f") == [{"x": f"c[t][{row}]", "y": "y"} for row in range(2)]


@pytest.mark.parametrize(
    ("runs", "groups"),
    [
        ([run("f"), run("h")], [{"f", "h"}]),  # both read x
        ([run("f"), run("g")], [{"f"}, {"g"}]),  # g reads what f writes
        ([run("g"), run("f")], [{"g"}, {"f"}]),  # f overwrites what g reads
        ([run("g"), run("h")], [{"g"}, {"h"}]),  # both write z
        ([run("f", y="a"), run("g")], [{"f", "g"}]),  # f writes elsewhere
        ([run("f", y="x2"), run("h", x="x2")], [{"f"}, {"h"}]),  # h reads that
        ([run("f"), run("f", x="n", y="ny")], [{"f"}, {"f"}]),  # a graph has one context
        ([run("f"), run("h"), run("g", z="b")], [{"f", "h"}, {"g"}]),  # independent of h, and not of f
        ([run("f"), run("h", z="a"), run("g", y="k")], [{"f", "h", "g"}]),
        ([run("f"), Copy("y", "a"), run("h")], [{"f"}, OnDevice("y", "a"), {"h"}]),  # a copy keeps its place
    ],
)
def test_launches_run_at_the_same_time_if_no_wire_joins_them(runs: list[Run | Copy], groups: list[object]) -> None:
    assert outline(record(Plan(tuple(runs)), WIRED).actions) == groups


@pytest.mark.parametrize(
    "sizes", [{"a": 1000, "b": 300, "c": 900}, {"a": 1, "b": 1, "c": 5000}, {"a": 0, "b": 0, "c": 0}]
)
def test_scratch_memory_is_shared_but_by_what_runs_at_the_same_time(sizes: dict[str, int]) -> None:
    actions = (Together((launch("a"), launch("b"))), Together((launch("c"),)))
    offsets, total = scratch(actions, sizes)
    spans = {g: (offsets[g], offsets[g] + sizes[g]) for g in sizes}
    assert all(start % 256 == 0 and end <= total for start, end in spans.values())
    assert spans["a"][1] <= spans["b"][0] or spans["b"][1] <= spans["a"][0]
    assert offsets["c"] == 0
    assert total <= max(sizes["a"] + sizes["b"] + 256, sizes["c"])


def launch(graph: str) -> Launch:
    return Launch(graph, (), ())


def test_scratch_memory_of_chains_that_group_graphs_otherwise() -> None:
    """a beside b, b beside c, a beside c: no two may overlap, in whichever order the groups come."""
    sizes = {"a": 700, "b": 300, "c": 900, "alone": 100}
    pairs = [("a", "b"), ("b", "c"), ("c", "a")]
    for order in (pairs, pairs[::-1]):
        offsets, total = scratch([Together(tuple(map(launch, pair))) for pair in order], sizes)
        spans = {g: (offsets[g], offsets[g] + sizes[g]) for g in sizes}
        for one, other in pairs:
            assert spans[one][1] <= spans[other][0] or spans[other][1] <= spans[one][0]
        assert offsets["alone"] == 0 and total == max(end for _, end in spans.values())
        assert all(start % 256 == 0 for start in offsets.values())
    assert scratch([], sizes) == (dict.fromkeys(sizes, 0), 900) and scratch([], {}) == ({}, 0)
