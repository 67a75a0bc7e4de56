"""The plan of a call: which graphs run, on what, in which order."""

from pathlib import Path

from conftest import SIZE

from turbochain.runtime import Bundle
from turbochain.runtime.bundle.manifest import Tensor
from turbochain.runtime.chain.plan import Constant, Copy, Download, Run, Upload, plan


def _row(row: int, steps: int, time: str = "time_embeds") -> list[Upload | Constant | Run]:
    columns = ("input_scale", time, "m", "v", "w")
    table = f"text-to-image/{steps}"
    return [Upload("noise", row), *(Constant(name, table, row) for name in columns), Run("unet"), Run("step")]


def test_plan_of_one_step(sd: Path) -> None:
    assert Bundle.open(sd).open_chain().plan("1").operations == (
        Upload("input_ids"),
        Upload("latents"),
        Run("text_encoder"),
        *_row(0, 1, "time_projections"),
        Run("vae_decoder"),
        Download("image"),
    )


def test_plan_of_three_steps_with_two_text_encoders(sdxl: Path) -> None:
    assert Bundle.open(sdxl).open_chain().plan("3", downloads=["next_latents"]).operations == (
        Upload("input_ids"),
        Upload("input_ids_2"),
        Upload("latents"),
        Constant("time_ids_embeds", "text-to-image/3", 0),
        Run("text_encoder"),
        Run("text_encoder_2"),
        *_row(0, 3),
        Copy("next_latents", "latents"),
        *_row(1, 3),
        Copy("next_latents", "latents"),
        *_row(2, 3),
        Run("vae_decoder"),
        Download("next_latents"),
        Download("image"),
    )


def test_plan_with_given_embeds_runs_no_text_encoder(sdxl: Path) -> None:
    given = ["prompt_embeds", "prompt_embeds_2", "pooled_prompt_embeds"]
    assert Bundle.open(sdxl).open_chain().plan("1", given=given).operations == (
        Upload("latents"),
        *(Upload(name) for name in given),
        Constant("time_ids_embeds", "text-to-image/1", 0),
        *_row(0, 1),
        Run("vae_decoder"),
        Download("image"),
    )


def test_plan_with_one_encoders_embeds_runs_the_other(sdxl: Path) -> None:
    operations = Bundle.open(sdxl).open_chain().plan("1", given=["prompt_embeds"]).operations
    runs = [o for o in operations if isinstance(o, Run)]
    assert runs == [Run("text_encoder_2"), Run("unet"), Run("step"), Run("vae_decoder")]
    assert [o for o in operations if isinstance(o, Upload) and o.row is None] == [
        Upload("input_ids_2"),
        Upload("latents"),
        Upload("prompt_embeds"),
    ]


def test_equal_plans_are_one(sd: Path) -> None:
    one, other = (Bundle.open(sd).open_chain().plan("2") for _ in range(2))
    assert one is not other and one == other and hash(one) == hash(other)
    assert one.graphs == ("text_encoder", "unet", "step", "vae_decoder")
    assert plan(Bundle.open(sd).open_chain().chain, Bundle.open(sd).manifest.graphs, 2, table="another") != one


def test_buffers_are_the_names_on_the_graphs(sd: Path) -> None:
    tensors = Bundle.open(sd).open_chain().tensors
    assert tensors["image"] == Tensor("image", "uint8", (1, SIZE[1], SIZE[0], 3))
    assert tensors["latents"].shape == tensors["noise"].shape == tensors["next_latents"].shape
    assert all(tensor.name == name for name, tensor in tensors.items())
