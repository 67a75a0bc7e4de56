"""A second size or batch adds under 1% to a bundle, reckoned for the true architectures in full size.

The reference and the tables are written by the export's own code, from diffusers' pipelines whose tensors have their
true shapes and whose networks compute next to nothing.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BundleFactory
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

from turbochain.export import load, reference, tables
from turbochain.export.controls import controlnet
from turbochain.export.controls.kind import Control
from turbochain.export.families import Shape
from turbochain.export.requested import Requested
from turbochain.export.sources import synthetic
from turbochain.export.sources.checkpoint import Checkpoint, Part
from turbochain.export.tracing.modules import pooled_width, timed_resnets
from turbochain.runtime import Bundle

BYTES = 2  # of a weight in fp16
TWENTY = {"steps": (20,), "guidance_scale": 7.5}
ALL_TASKS = ("text-to-image", "image-to-image", "inpainting")
CANNY = Control(controlnet.KIND, "canny")


@dataclass(frozen=True)
class Case:
    """A bundle that gets a second size, and the bundle of a miniature that has graphs of the same kinds."""

    preset: str
    how: dict[str, Any] = field(default_factory=dict)
    miniature: str = "sd"
    further: dict[str, Any] = field(default_factory=lambda: {"sizes": ((512, 512), (768, 512))})
    bound: float = 0.01

    @property
    def controlled(self) -> bool:
        return "controlnet" in self.how


FOUR = {"batches": (1, 4)}
CASES = {
    "sd15": Case("sd15", TWENTY),  # its own scheduler, PNDM, makes 21 evaluations
    "sd-turbo": Case("sd-turbo"),
    "sdxl-turbo": Case("sdxl-turbo", miniature="sdxl"),
    "sdxl": Case("sdxl", TWENTY, miniature="sdxl"),
    "sd15, inpainting": Case("sd15", {**TWENTY, "tasks": ALL_TASKS}),
    "sd15, ControlNet": Case("sd15", {**TWENTY, "controlnet": {"canny": "x"}}, miniature="controlled"),
    "sd15, batch of 4": Case("sd15", TWENTY, further=FOUR),
    # Four pictures in and four out for each task, as they are: they do not shrink.
    "sd15, inpainting, batch of 4": Case("sd15", {**TWENTY, "tasks": ALL_TASKS}, further=FOUR, bound=0.014),
}


class HollowUNet(UNet2DConditionModel):
    """What reads the time, and a prediction that depends on it; the other layers have no memory."""

    device = torch.device("cpu")

    def forward(  # type: ignore[override]
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep_cond: Any = None,
        cross_attention_kwargs: Any = None,
        down_block_additional_residuals: Any = None,
        mid_block_additional_residual: Any = None,
        added_cond_kwargs: Any = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        embedding = self.time_embedding(self.time_proj(timestep.expand(len(sample))))
        for resnet in timed_resnets(self):
            resnet.time_emb_proj(embedding)
        return (sample * 0.5 + embedding.mean(),)


class HollowControlNet(ControlNetModel):
    """What reads the time, and residuals of the true shapes."""

    device = torch.device("cpu")

    def forward(  # type: ignore[override]
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float = 1.0,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        self.controlnet_cond_embedding(controlnet_cond)
        embedding = self.time_embedding(self.time_proj(timestep.expand(len(sample))))
        for resnet in timed_resnets(self):
            resnet.time_emb_proj(embedding)
        shape = Shape(8 * sample.shape[2], 8 * sample.shape[3], len(sample))
        *down, middle = (torch.zeros(size) for _, size in controlnet.residuals(self.config, shape).values())
        return down, middle


class HollowEmbedding(torch.nn.Module):
    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = picture.shape
        return torch.zeros(batch, 320, height // 8, width // 8)


def hollow(parts: dict[str, Any]) -> dict[str, Any]:
    """Return networks that read and make what those of a preset do."""
    vae = {name: value for name, value in parts["vae"].config.items() if not name.startswith("_")}
    vae |= {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 8}
    made: dict[str, Any] = {"vae": AutoencoderKL(**vae)}
    with torch.device("meta"):
        made["unet"] = HollowUNet.from_config(parts["unet"].config)
        if CANNY.component in parts:
            made[CANNY.component] = HollowControlNet.from_config(parts[CANNY.component].config)
            made[CANNY.component].controlnet_cond_embedding = HollowEmbedding()
    for network in (made[name] for name in made if name != "vae"):
        for name in [n for n, _ in network.named_modules() if n.endswith(("time_emb_proj", "_embedding"))]:
            network.get_submodule(name).to_empty(device="cpu")
    for name, part in parts.items():
        if name.startswith("text"):
            part.config.num_hidden_layers = 1
            made[name] = type(part)(part.config)
    for part in made.values():
        part.float().eval().requires_grad_(False)
        for parameter in part.parameters():
            if parameter.device.type == "cpu":
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return made


def written(checkpoint: Checkpoint, requested: Requested, nets: dict[Control, Any], folder: Path) -> dict[str, int]:
    """Write the reference and the tables of a bundle; return file → bytes."""
    made = tables.make(checkpoint, requested)
    layout = tables.layout(checkpoint, requested, made)
    chains = tables.chains(checkpoint, requested, layout, made)
    pipelines = load.pipelines(checkpoint, [task.name for task in layout.tasks])
    unet = pipelines["text-to-image"].unet
    for task, shape in layout.chains:
        file = folder / chains[layout.name(task, shape)].tables_file
        own = {one: net for one, net in nets.items() if one in layout.steered.of(task.name)}
        tables.write(made[task.name], checkpoint.family, unet, shape, file, own)
    sources = reference.Sources(pipelines, load.controlled(checkpoint, nets, pipelines), nets)
    path = folder / "reference.safetensors"
    reference.write(sources, checkpoint, layout, chains, 7.5, requested.call, [], path, lambda *_: None)
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def of_graphs(miniature: Bundle, tensors: dict[str, int], sized: bool) -> float:
    """Return the bytes of the graphs of a further size or batch: the miniature's, which grow with a network's layers,
    times its share of the tensors. `tensors`: component → how many there are in full size."""
    found = 0.0
    for graph in (one for one in miniature.manifest.graphs.values() if (one.size if sized else one.batch)):
        names = miniature.path / graph.names
        grown = 1.0 if not graph.component else tensors.get(graph.component, 0) / len(json.loads(names.read_text()))
        found += grown * (names.stat().st_size + (miniature.path / graph.file).stat().st_size)
    return found


def of_constants(unet: Any) -> int:
    """Return the values of a graph's large constants that are no parameters: in SDXL the pooled part of one."""
    return pooled_width(unet) * unet.add_embedding.linear_1.out_features if hasattr(unet, "add_embedding") else 0


def models(case: Case, folder: Path) -> tuple[dict[str, Any], Checkpoint]:
    """Return component → model without memory, and the checkpoint, which has no weights."""
    parts = synthetic.models(case.preset)
    synthetic.write_settings(case.preset, folder / "checkpoint", parts)
    checkpoint = Checkpoint(folder / "checkpoint")
    if case.controlled:
        with torch.device("meta"):
            net = ControlNetModel.from_unet(parts["unet"], load_weights_from_unet=False)
        (folder / "canny").mkdir()
        net.save_config(folder / "canny")
        parts[CANNY.component] = net
        checkpoint = replace(checkpoint, controls={CANNY.component: Part(folder / "canny", folder, "x")})
    return parts, checkpoint


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_a_second_size_of_a_full_size_model_adds_under_one_percent(
    name: str, bundle_of: BundleFactory, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    of_controls = case.miniature == "controlled"
    miniature = Bundle.open(request.getfixturevalue("controlled") if of_controls else bundle_of(case.miniature))
    parts, checkpoint = models(case, tmp_path)
    weights = {name: BYTES * sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    counts = {name: len(part.state_dict()) for name, part in parts.items()}
    constants = BYTES * of_constants(parts["unet"])
    networks = hollow(parts)
    monkeypatch.setattr(load, "component", lambda checkpoint, name, dtype: networks[name])
    whole = Requested("x", {}, "fp16", **case.how, **case.further)
    first = replace(whole, sizes=whole.sizes[:1], batches=whole.batches[:1])
    nets = {CANNY: networks[CANNY.component]} if case.controlled else {}
    one, two = (written(checkpoint, r, nets, tmp_path / str(i)) for i, r in enumerate((first, whole)))
    added = {name: size - one.get(name, 0) for name, size in two.items()}
    assert {name for name, size in added.items() if size} == {
        "reference.safetensors",
        *(f"tables/{task}@768x512.safetensors" for task in whole.tasks if "xl" in case.preset),
    }
    own = [f for g in miniature.manifest.graphs.values() if g.size for f in g.data if f.startswith(g.file)]
    assert len(own) == bool(constants), "graphs have other constants"
    graphs = constants + of_graphs(miniature, counts, "sizes" in case.further)
    share = (sum(added.values()) + graphs) / sum(weights.values())
    print(f"{name}: {added}, graphs {graphs:.0f}, of {sum(weights.values())}: {share:.2%}")
    assert share < case.bound
