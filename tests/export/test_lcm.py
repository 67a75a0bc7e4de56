"""Latent consistency models: a UNet that reads the guidance scale, a pipeline that gives the sampler the strength."""

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import image_graphs
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from safetensors.numpy import load_file

from turbochain.export import families, recorded_calls, schedule, tables
from turbochain.export.families import Shape
from turbochain.export.requested import Requested
from turbochain.export.run import SamplerRun
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.export.sources.synthetic import write_checkpoint
from turbochain.export.tracing import modules, time
from turbochain.runtime.bundle.manifest import TableEntry

PIPELINES = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
SHAPE = Shape(64, 64, 1)
SCALES = {"a": 16.2, "b": 1.0, "c": 16.2}  # 16.2 − 1 is another number in fp32 than in fp64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {"sd": tmp_path_factory.mktemp("lcm-sd15-mini"), "sdxl": tmp_path_factory.mktemp("lcm-sdxl-mini")}
    for family, name in (("sd", "lcm-sd15-mini"), ("sdxl", "lcm-sdxl-mini")):
        write_checkpoint(name, found[family])
    return found


@pytest.fixture(scope="module", params=PIPELINES)
def written(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family, diffusers' own pipeline, and the arrays of a table file with three tables of two guidance scales."""
    pipeline = DiffusionPipeline.from_pretrained(folders[request.param])
    pipeline.set_progress_bar_config(disable=True)
    table = schedule.tabulate(pipeline.scheduler, SamplerRun(4))
    shorter = schedule.tabulate(pipeline.scheduler, SamplerRun(2))
    path = tmp_path_factory.mktemp("tables") / "t.safetensors"
    family = families.of(PIPELINES[request.param])
    made = {
        name: tables.Made(TableEntry(of.rows, of.rows, guidance_scale=SCALES[name]), of)
        for name, of in {"a": table, "b": table, "c": shorter}.items()
    }
    tables.write(made, family, pipeline.unet, SHAPE, path)
    return request.param, pipeline, load_file(path)


def columns(arrays: dict[str, np.ndarray], table: str) -> dict[str, torch.Tensor]:
    """The rows of each column."""
    index = arrays[f"{table}/index"]
    found = {k.removeprefix("columns/"): torch.from_numpy(v[index]) for k, v in arrays.items() if k.startswith("col")}
    constants = {k.removeprefix("constants/"): v for k, v in arrays.items() if k.startswith("constants/")}
    return found | {k: torch.from_numpy(v).expand(len(index), *v.shape) for k, v in constants.items()}


def test_a_pair_of_timestep_and_scale_is_stored_once(written: Any) -> None:
    _, _, arrays = written
    assert arrays["timesteps"].tolist() == [999, 759, 499, 259] * 2  # 2 steps use two of those of 4
    assert arrays["a/index"].tolist() == [0, 1, 2, 3] and arrays["b/index"].tolist() == [4, 5, 6, 7]
    assert arrays["c/index"].tolist() == [0, 2]


@pytest.mark.parametrize("table", SCALES)
def test_the_columns_are_what_the_pipelines_unet_makes(written: Any, table: str) -> None:
    """As the recorder of the reference watches it."""
    family, pipeline, arrays = written
    (column,) = families.of(PIPELINES[family]).columns
    rows: list[torch.Tensor] = []
    steps = len(arrays[f"{table}/index"])
    options = {"guidance_scale": SCALES[table], "num_inference_steps": steps, "output_type": "latent"}
    with ExitStack() as stack:
        time.watch(stack, pipeline.unet, column, rows.append)
        pipeline(["a", "b"], height=64, width=64, **options)
    made = columns(arrays, table)[column]
    assert made.shape == torch.stack(rows).shape == (steps, 1, made.shape[-1])
    torch.testing.assert_close(made, torch.stack(rows), rtol=1e-5, atol=1e-5)


def test_a_recorded_call_follows_a_table_of_its_steps_strength_and_scale(folders: dict[str, Path]) -> None:
    """It has as many rows as diffusers' pipeline evaluates the network."""
    checkpoint, pipeline = (
        Checkpoint(folders["sdxl"]),
        StableDiffusionXLImg2ImgPipeline.from_pretrained(folders["sdxl"]),
    )
    tasks = ("text-to-image", "image-to-image", "inpainting")
    requested = Requested("x", {}, "fp32", steps=(3, 4), guidance_scales=(8.5, 1.0), tasks=tasks)
    made = tables.make(checkpoint, requested)
    layout = tables.layout(checkpoint, requested, made)
    chains = tables.chains(checkpoint, requested, layout, made)
    calls = [*recorded_calls.of_layout(layout, chains, 0.0, [], lambda *_: True)]
    for call in calls:
        pipeline.scheduler.set_timesteps(call.num_inference_steps)
        timesteps, _ = pipeline.get_timesteps(call.num_inference_steps, call.strength or 1.0, "cpu")
        entry = chains[call.chain].tables[call.table]
        assert (entry.rows, entry.guidance_scale) == (len(timesteps), call.guidance_scale), call
    assert {(call.chain, call.guidance_scale) for call in calls} == {(task, of) for task in tasks for of in (8.5, 1.0)}


def inputs(family: str, pipeline: Any, arrays: dict[str, np.ndarray], row: int) -> tuple[dict[str, Any], torch.Tensor]:
    """What the exported UNet reads in a row of table "a", and what diffusers' makes of it."""
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=random)
    width = pipeline.unet.config.cross_attention_dim
    states = torch.randn(1, 77, width, generator=random)
    given = {"latents": latents, "input_scale": torch.ones(1)}
    given |= {name: rows[row] for name, rows in columns(arrays, "a").items() if name != "activated_time_embedding"}
    added = {}
    if family == "sdxl":
        pooled = torch.randn(1, pipeline.text_encoder_2.config.projection_dim, generator=random)
        first = pipeline.text_encoder.config.hidden_size
        given |= {"prompt_embeds": states[..., :first], "prompt_embeds_2": states[..., first:]}
        given |= {"pooled_prompt_embeds": pooled}
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    else:
        given |= {"prompt_embeds": states}
    condition = pipeline.get_guidance_scale_embedding(
        torch.tensor(SCALES["a"] - 1).repeat(1), pipeline.unet.config.time_cond_proj_dim
    )
    timestep = torch.tensor(int(arrays["timesteps"][arrays["a/index"][row]]))
    with torch.inference_mode():
        made = pipeline.unet(latents, timestep, states, timestep_cond=condition, added_cond_kwargs=added)
        without = pipeline.unet(latents, timestep, states, added_cond_kwargs=added)
    assert (made.sample - without.sample).norm() > 0.01 * made.sample.norm()
    return given, made.sample


@pytest.mark.parametrize("row", [0, 3])
def test_the_traced_module_is_diffusers_unet(written: Any, row: int) -> None:
    family, pipeline, arrays = written
    given, expected = inputs(family, pipeline, arrays, row)
    module = {"sd": modules.SDUNet, "sdxl": modules.SDXLUNet}[family](modules.copy_modules(pipeline.unet))
    with torch.inference_mode():
        torch.testing.assert_close(module(**given), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_the_graph_is_diffusers_unet(written: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    family, pipeline, arrays = written
    given, expected = inputs(family, pipeline, arrays, 1)
    shapes = {name: tuple(rows.shape[1:]) for name, rows in columns(arrays, "a").items()}
    folder = Path(shutil.copytree(folders[family], tmp_path / "checkpoint", copy_function=os.link))
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": PIPELINES[family]}
    (folder / "model_index.json").unlink()  # a link to the shared file
    (folder / "model_index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(folder, None)
    graphs = image_graphs.traced(checkpoint, image_graphs.own(checkpoint, "unet"), SHAPE, tmp_path, columns=shapes)
    read = {t.name: given[t.name] for t in graphs["unet"].inputs}
    made = image_graphs.run(tmp_path, graphs["unet"], read)["prediction"]
    np.testing.assert_allclose(made, expected.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "run",
    [
        SamplerRun(4, strength=0.5),
        SamplerRun(3, strength=0.8, original_steps=100),
        SamplerRun(
            4, timesteps=(999, 759, 499, 259), strength=0.5
        ),  # the last step's sample has noise, and is not decoded
    ],
    ids=str,
)
def test_image_to_image_of_an_lcm(run: SamplerRun, folders: dict[str, Path]) -> None:
    """The table makes each of the UNet's inputs, and what the VAE would decode, of the UNet's own outputs."""
    pipeline = LatentConsistencyModelImg2ImgPipeline.from_pretrained(folders["sd"])
    pipeline.set_progress_bar_config(disable=True)
    table = schedule.tabulate(pipeline.scheduler, run)
    calls: list[tuple[torch.Tensor, float, torch.Tensor]] = []
    pipeline.unet.register_forward_hook(lambda _, args, made: calls.append((args[0], float(args[1]), made[0])))
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))  # latents, which are not encoded
    (decoded,) = pipeline(
        "a",
        image,
        num_inference_steps=run.steps,
        timesteps=None if run.timesteps is None else list(run.timesteps),
        strength=run.strength,
        original_inference_steps=run.original_steps,
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
    ).images
    assert table.timesteps[table.index].tolist() == [t for _, t, _ in calls]
    generator, (p, q) = torch.Generator().manual_seed(2), table.start[0].tolist()
    x = p * image + q * torch.randn(1, 4, 8, 8, generator=generator)
    for i, (latents, _, prediction) in enumerate(calls):
        torch.testing.assert_close(x, latents, rtol=1e-4, atol=1e-4)
        noise = torch.randn(1, 4, 8, 8, generator=generator) if table.draws_noise[i] else torch.zeros(1)
        m, v, w = float(table.m[i, 0, 0]), float(table.v[i, 0]), float(table.w[i, 0])
        x = m * x + v * prediction + w * noise
    torch.testing.assert_close(x[0], decoded, rtol=1e-4, atol=1e-4)
