"""The graphs around the UNet compute what diffusers' pipelines compute between calls of the UNet, number by number."""

from pathlib import Path
from typing import Any

import diffusers
import image_graphs
import numpy as np
import pytest
import torch
from conftest import FAMILIES
from image_graphs import SQUARE, WIDE
from test_parity import load_diffusers

from turbochain.export import schedule
from turbochain.export.families import Shape, common
from turbochain.export.run import SamplerRun
from turbochain.runtime.bundle.manifest import Graph
from turbochain.runtime.checks.metrics import relative_l2

SCHEDULERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler", "LCMScheduler")
STEPS = 3


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def traced(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[Shape, tuple[Path, dict[str, Graph]]]:
    """Shape → a folder and the graphs in it: of one tensor in the loop, and of two."""
    found = {}
    for shape in (SQUARE, WIDE):
        folder = tmp_path_factory.mktemp("traced")
        specs = {**image_graphs.arithmetic(), "step+guidance, K = 2": common.guided_step(2)}
        found[shape] = folder, image_graphs.traced(image_graphs.checkpoint(checkpoints["sd"]), specs, shape, folder)
    return found


def draw(shape: Shape, *seeds: int) -> list[torch.Tensor]:
    size = (shape.batch, 4, shape.height // 8, shape.width // 8)
    return [torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def start_pair(scheduler: Any, timestep: torch.Tensor) -> dict[str, np.ndarray]:
    """(p, q): what `add_noise` does to a picture of ones, and to noise of ones."""
    ones, zeros = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    found = [scheduler.add_noise(*pair, timestep.reshape(1)) for pair in ((ones, zeros), (zeros, ones))]
    return {name: value.reshape(1).numpy() for name, value in zip(("p", "q"), found, strict=True)}


def test_they_have_no_weights_and_are_fp32(traced: dict[Shape, tuple[Path, dict[str, Graph]]]) -> None:
    for shape, (folder, graphs) in traced.items():
        for name, graph in graphs.items():
            assert (graph.precision, graph.data, graph.component, graph.model_class) == ("fp32", (), "", "")
            assert {t.dtype for t in (*graph.inputs, *graph.outputs)} == {"float32"}
            assert (folder / graph.file).stat().st_size < 2**12
            assert graph.role == {"start": "start", "blend": "blend"}.get(name, "step")
        mask = next(t for t in graphs["blend"].inputs if t.name == "mask")
        assert mask.shape == (shape.batch, 1, shape.height // 8, shape.width // 8)


@pytest.mark.parametrize("shape", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_start_is_what_the_scheduler_makes_of_noise(
    traced: dict[Shape, tuple[Path, dict[str, Graph]]], kind: str, shape: Shape
) -> None:
    scheduler = getattr(diffusers, kind)()
    scheduler.set_timesteps(4)
    latents, noise = draw(shape, 0, 1)
    folder, graphs = traced[shape]
    for timestep in scheduler.timesteps:
        expected = scheduler.add_noise(latents, noise, timestep.repeat(shape.batch))
        feeds = {"image_latents": latents, "start_noise": noise, **start_pair(scheduler, timestep)}
        made = image_graphs.run(folder, graphs["start"], feeds)["latents"]
        assert relative_l2(made, expected.numpy()) <= 1e-6


@pytest.mark.parametrize("shape", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_blend_is_the_pipelines(
    checkpoints: dict[str, Path], traced: dict[Shape, tuple[Path, dict[str, Graph]]], family: str, shape: Shape
) -> None:
    """After every step of a run, of which the latents before and after the blend are seen."""
    _, pipe = image_graphs.pipelines(checkpoints[family], family)
    images = image_graphs.pictures(shape)
    after: list[torch.Tensor] = []

    def see(_: Any, __: int, ___: Any, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        after.append(found["latents"].clone())
        return found

    with (
        image_graphs.spied(pipe, "prepare_latents") as prepared,
        image_graphs.spied(pipe, "prepare_mask_latents") as masks,
        image_graphs.spied(pipe.scheduler, "step") as steps,
    ):
        pipe(
            [""] * shape.batch,
            image=image_graphs.pils(images),
            mask_image=image_graphs.pils(images[..., 0]),
            num_inference_steps=STEPS + 1,
            strength=0.75,
            guidance_scale=0.0,
            width=shape.width,
            height=shape.height,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=see,
            output_type="latent",
        )
    ((_, (_, noise, latents)),), ((_, (mask, *_)),) = prepared, masks
    assert len(steps) == len(after) == STEPS and 0.2 < mask.mean() < 0.8
    timesteps = pipe.scheduler.timesteps[-STEPS:]
    folder, graphs = traced[shape]
    for i, (((_, timestep, _), result), expected) in enumerate(zip(steps, after, strict=True)):
        assert timestep == timesteps[i]
        last = {"p": np.ones(1, np.float32), "q": np.zeros(1, np.float32)}
        pair = last if i + 1 == STEPS else start_pair(_at(pipe.scheduler, len(timesteps) + 1), timesteps[i + 1])
        feeds = {"next_latents": result[0], "image_latents": latents, "start_noise": noise, "mask": mask}
        feeds |= {f"next_{name}": value for name, value in pair.items()}
        made = image_graphs.run(folder, graphs["blend"], feeds)["blended_latents"]
        assert relative_l2(made, expected.numpy()) <= 1e-6
        assert relative_l2(made, result[0].numpy()) > 1e-2, "the mask was to show"


def _at(scheduler: Any, steps: int) -> Any:
    """A scheduler of this kind that no run has used."""
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(steps)
    return fresh


@pytest.mark.parametrize(("kind", "K"), [("EulerDiscreteScheduler", 1), ("DPMSolverMultistepScheduler", 2)])
@pytest.mark.parametrize("shape", [SQUARE, WIDE], ids=["square", "wide"])
def test_the_guided_step_is_the_pipelines(
    checkpoints: dict[str, Path],
    traced: dict[Shape, tuple[Path, dict[str, Graph]]],
    shape: Shape,
    kind: str,
    K: int,
) -> None:
    """Over a run, with the history that the graph itself has made; the UNet's predictions are diffusers'."""
    pipe = load_diffusers(checkpoints["sd"])
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
    table = schedule.tabulate(pipe.scheduler, SamplerRun(STEPS))
    assert table.K == K and table.rows == STEPS
    with image_graphs.spied(pipe.unet, "forward") as predictions, image_graphs.spied(pipe.scheduler, "step") as steps:
        pipe(
            ["a cat"] * shape.batch,
            num_inference_steps=STEPS,
            guidance_scale=6.5,
            width=shape.width,
            height=shape.height,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    folder, graphs = traced[shape]
    graph = graphs["step+guidance" if K == 1 else "step+guidance, K = 2"]
    history = {"history": np.zeros((K - 1, *steps[0][0][2].shape), np.float32)} if K > 1 else {}
    for i, ((_, (both,)), ((guided, _, sample), (expected, *_))) in enumerate(zip(predictions, steps, strict=True)):
        negative, positive = both.chunk(2)
        feeds = {"prediction": positive, "negative_prediction": negative, "latents": sample, **history}
        feeds |= {"guidance_scale": np.array([6.5], np.float32), "noise": torch.zeros_like(sample)}
        feeds |= {name: getattr(table, name)[i] for name in ("m", "v", "w")}
        assert set(feeds) == {t.name for t in graph.inputs}
        made = image_graphs.run(folder, graph, feeds)
        assert list(made) == ["next_latents", *(["next_history"] if K > 1 else []), "guided_prediction"]
        assert relative_l2(made["guided_prediction"], guided.numpy()) <= 1e-6
        assert relative_l2(made["guided_prediction"], positive.numpy()) > 1e-2, "guidance was to show"
        assert relative_l2(made["next_latents"], expected.numpy()) <= 1e-6
        history = {"history": made["next_history"]} if K > 1 else {}
