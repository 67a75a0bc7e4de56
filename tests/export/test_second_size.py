"""A second size adds under 1% to a bundle, reckoned for the true architectures in full size.

The reference and the tables are written by the export's own code, from diffusers' pipelines whose tensors have their
true shapes and whose networks compute next to nothing.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BundleFactory
from diffusers import AutoencoderKL, UNet2DConditionModel

from turbochain.export import load, reference, tables
from turbochain.export.requested import Requested
from turbochain.export.sources import synthetic
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.export.tracing.modules import pooled_width, timed_resnets
from turbochain.runtime import Bundle

SIZES = ((512, 512), (768, 512))
BYTES = 2  # of a weight in fp16
CHANGES: dict[str, dict[str, Any]] = {
    "sd15": {"steps": (20,), "guidance_scale": 7.5},  # its own scheduler, PNDM, makes 21 evaluations
    "sd-turbo": {},
    "sdxl-turbo": {},
    "sdxl": {"steps": (20,), "guidance_scale": 5.0},
}
MINIATURE = {"sd15": "sd", "sd-turbo": "sd", "sdxl-turbo": "sdxl", "sdxl": "sdxl"}


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
        added_cond_kwargs: Any = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        embedding = self.time_embedding(self.time_proj(timestep.expand(len(sample))))
        for resnet in timed_resnets(self):
            resnet.time_emb_proj(embedding)
        return (sample * 0.5 + embedding.mean(),)


def hollow(parts: dict[str, Any]) -> dict[str, Any]:
    """Return networks that read and make what those of a preset do."""
    vae = {**parts["vae"].config, "block_out_channels": [32] * 4, "layers_per_block": 1}
    with torch.device("meta"):
        unet = HollowUNet.from_config(parts["unet"].config)
    made: dict[str, Any] = {"vae": AutoencoderKL.from_config(vae), "unet": unet}
    for name in [name for name, _ in unet.named_modules() if name.endswith(("time_emb_proj", "_embedding"))]:
        unet.get_submodule(name).to_empty(device="cpu")
    for name, part in parts.items():
        if name.startswith("text"):
            part.config.num_hidden_layers = 1
            made[name] = type(part)(part.config)
    for part in made.values():
        part.eval().requires_grad_(False)
        for parameter in part.parameters():
            if parameter.device.type == "cpu":
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return made


def written(
    checkpoint: Checkpoint, sizes: tuple[tuple[int, int], ...], how: dict[str, Any], folder: Path
) -> dict[str, int]:
    """Write the reference and the tables of a bundle of these sizes; return file → bytes."""
    requested = Requested("x", {}, "fp16", sizes=sizes, **how)
    made = tables.make(checkpoint, requested)
    layout = tables.layout(checkpoint, requested, made)
    chains = tables.chains(checkpoint, requested, layout, made)
    pipelines = load.pipelines(checkpoint, [task.name for task in layout.tasks])
    unet = pipelines["text-to-image"].unet
    for task, shape in layout.chains:
        file = folder / chains[layout.name(task, shape)].tables_file
        tables.write(made[task.name], checkpoint.family, unet, shape, file)
    path, sources = folder / "reference.safetensors", reference.Sources(pipelines)
    reference.write(sources, checkpoint, layout, chains, 7.5, requested.call, [], path, lambda *_: None)
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def of_graphs(miniature: Bundle, tensors: dict[str, int]) -> float:
    """Return the bytes of the graphs of a further size: the miniature's, which grow with a network's layers, times its
    share of the tensors. `tensors`: component → how many there are in full size."""
    found = 0.0
    for graph in (one for one in miniature.manifest.graphs.values() if one.size):
        names = miniature.path / graph.names
        grown = tensors[graph.component] / len(json.loads(names.read_text())) if graph.component else 1.0
        found += grown * (names.stat().st_size + (miniature.path / graph.file).stat().st_size)
    return found


def of_constants(unet: Any) -> int:
    """Return the values of a graph's large constants that are no parameters: in SDXL the pooled part of one."""
    return pooled_width(unet) * unet.add_embedding.linear_1.out_features if hasattr(unet, "add_embedding") else 0


@pytest.mark.full
@pytest.mark.parametrize("preset", CHANGES)
def test_a_second_size_of_a_full_size_model_adds_under_one_percent(
    preset: str, bundle_of: BundleFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = synthetic.models(preset)
    synthetic.write_settings(preset, tmp_path / "checkpoint", parts)
    weights = {name: BYTES * sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    counts = {name: len(part.state_dict()) for name, part in parts.items()}
    constants = BYTES * of_constants(parts["unet"])
    networks = hollow(parts)
    monkeypatch.setattr(load, "component", lambda checkpoint, name, dtype: networks[name])
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    one, two = (written(checkpoint, SIZES[:n], CHANGES[preset], tmp_path / str(n)) for n in (1, 2))
    added = {name: size - one.get(name, 0) for name, size in two.items()}
    assert {name for name, size in added.items() if size} == {
        "reference.safetensors",
        *(f"tables/{task}@768x512.safetensors" for task in ("text-to-image", "image-to-image") if "xl" in preset),
    }
    miniature = Bundle.open(bundle_of(MINIATURE[preset]))
    own = [f for g in miniature.manifest.graphs.values() if g.size for f in g.data if f.startswith(g.file)]
    assert len(own) == bool(constants), "graphs have other constants"
    graphs = constants + of_graphs(miniature, counts)
    share = (sum(added.values()) + graphs) / sum(weights.values())
    print(f"{preset}: {added}, graphs {graphs:.0f}, of {sum(weights.values())}: {share:.2%}")
    assert share < 0.01
