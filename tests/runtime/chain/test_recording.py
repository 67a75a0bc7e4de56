"""What a GPU carries out, read as a value: the order of launches and copies, and which buffer each name is."""

from pathlib import Path

import pytest

from turbochain.runtime import Bundle
from turbochain.runtime.chain.plan import Run, plan, stage_plan
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
    bundle = Bundle.open(path)
    return record(plan(bundle.chain, bundle.manifest.graphs, steps, **options), bundle.manifest.graphs)  # type: ignore[arg-type]


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
    steps = launches(recording, "unet")
    assert [s["noise"] for s in steps] == ["noise[0]", "noise[1]", "noise[2]"]
    columns = {"time_projections", "input_scale", "a", "b", "c"}
    for row, step in enumerate(steps):
        assert {step[c] for c in columns} == {f"{c}[{row}]" for c in columns}
        shared = set(step) - columns - {"noise"}
        assert {step[name] for name in shared} == shared
    assert recording.constants == {f"{c}[{row}]": (c, row) for c in columns for row in range(3)}
    assert [a for a in recording.actions if isinstance(a, OnDevice)] == [OnDevice("next_latents", "latents")] * 2


def test_constants_are_not_uploaded_with_a_picture(sdxl: Path) -> None:
    recording = recorded(sdxl, 4)
    assert not {a.buffer for a in recording.actions if isinstance(a, ToDevice)} & set(recording.constants)


def test_the_two_text_encoders_may_run_at_the_same_time_and_nothing_else_may(sdxl: Path) -> None:
    groups = [g for g in outline(recorded(sdxl, 2).actions) if isinstance(g, set)]
    assert groups == [{"text_encoder", "text_encoder_2"}, {"unet"}, {"unet"}, {"vae_decoder"}]


def test_a_known_prompt_runs_no_text_encoder(sdxl: Path) -> None:
    assert outline(recorded(sdxl, 1, given=EMBEDS).actions) == [
        ToDevice("latents"),
        *(ToDevice(name) for name in EMBEDS),
        ToDevice("noise[0]"),
        {"unet"},
        {"vae_decoder"},
        ToHost("image"),
    ]


def test_every_buffer_has_the_tensor_of_its_name(sdxl: Path) -> None:
    tensors = Bundle.open(sdxl).tensors
    recording = recorded(sdxl, 2)
    used = {b for a in recording.actions if isinstance(a, Together) for one in a.launches for _, b in one.buffers}
    assert used <= set(recording.tensors)
    assert all(tensor == tensors[buffer.partition("[")[0]] for buffer, tensor in recording.tensors.items())


def test_a_stage_alone(sd: Path) -> None:
    graphs = Bundle.open(sd).manifest.graphs
    recording = record(stage_plan("vae_decoder", graphs["vae_decoder"]), graphs)
    assert outline(recording.actions) == [ToDevice("next_latents"), {"vae_decoder"}, ToHost("image")]


def test_launches_that_share_a_written_buffer_keep_their_order(sd: Path) -> None:
    graphs = Bundle.open(sd).manifest.graphs
    twice = record((Run("text_encoder"), Run("text_encoder")), graphs)  # both write prompt_embeds
    assert outline(twice.actions) == [{"text_encoder"}, {"text_encoder"}]
    readers = record((Run("unet"), Run("text_encoder")), graphs)  # the second overwrites what the first reads
    assert outline(readers.actions) == [{"unet"}, {"text_encoder"}]


@pytest.mark.parametrize(
    "sizes", [{"a": 1000, "b": 300, "c": 900}, {"a": 1, "b": 1, "c": 5000}, {"a": 0, "b": 0, "c": 0}]
)
def test_scratch_memory_is_shared_but_by_what_runs_at_the_same_time(sizes: dict[str, int]) -> None:
    actions = (Together((Launch("a", ()), Launch("b", ()))), Together((Launch("c", ()),)))
    offsets, total = scratch(actions, sizes)
    spans = {g: (offsets[g], offsets[g] + sizes[g]) for g in sizes}
    assert all(start % 256 == 0 and end <= total for start, end in spans.values())
    assert spans["a"][1] <= spans["b"][0] or spans["b"][1] <= spans["a"][0]
    assert offsets["c"] == 0
    assert total <= max(sizes["a"] + sizes["b"] + 256, sizes["c"])
