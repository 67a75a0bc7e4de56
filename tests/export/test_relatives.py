"""Distilled relatives: parts, schedulers and timesteps from elsewhere, as their authors' pages say, against diffusers.

The hub is its client's own cache, with miniatures in files of the real names.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import image_calls
import lora_files
import pytest
import torch
from conftest import ON, SIZE, called
from diffusers import LCMScheduler, UNet2DConditionModel
from here import build_here
from safetensors.torch import load_file, save_file
from test_load import copied
from test_parity import assert_same_picture, load_diffusers, theirs

from turbochain.engines import build
from turbochain.export import asked, jobs, load, recipes, tables
from turbochain.export.order import ExportOrder
from turbochain.export.sources import Want
from turbochain.export.sources.checkpoint import Checkpoint, open_folder
from turbochain.export.tasks.text_to_image import TASK
from turbochain.runtime import Bundle, InputError, Pipeline
from turbochain.runtime.bundle.strict_json import convert, plain

COMMIT = "2" * 40
PARTS = {
    "ByteDance/SDXL-Lightning": (
        *("sdxl_lightning_1step_unet_x0.safetensors", "sdxl_lightning_2step_unet.safetensors"),
        *("sdxl_lightning_4step_unet.safetensors", "sdxl_lightning_8step_unet.safetensors"),
        *(f"sdxl_lightning_{n}step_lora.safetensors" for n in (2, 4, 8)),
    ),
    "ByteDance/Hyper-SD": (
        *("Hyper-SDXL-1step-Unet.safetensors", "Hyper-SDXL-2steps-lora.safetensors"),
        *("Hyper-SDXL-4steps-lora.safetensors", "Hyper-SDXL-8steps-lora.safetensors"),
        "Hyper-SD15-1step-lora.safetensors",
    ),
    "tianweiy/DMD2": ("dmd2_sdxl_4step_lora_fp16.safetensors",),
    "latent-consistency/lcm-lora-sdxl": ("pytorch_lora_weights.safetensors",),
    "latent-consistency/lcm-lora-sdv1-5": ("pytorch_lora_weights.safetensors",),
    "latent-consistency/lcm-sdxl": (),  # a UNet with a config of its own
}
NAMINGS = {"SDXL-Lightning": "kohya", "Hyper-SD": "kohya", "DMD2": "peft", "lcm-lora-sdxl": "kohya"}
"""Repository → how its LoRAs name their layers; lcm-lora-sdv1-5 has peft's names here, so that both are tried."""
DMD2 = "tianweiy/DMD2/dmd2_sdxl_4step_lora_fp16.safetensors"
LIGHTNING = "ByteDance/SDXL-Lightning/sdxl_lightning_4step_unet.safetensors"


@dataclass(frozen=True)
class Card:
    """What the page of a model calls: CLASS.from_config(pipe.scheduler.config, **config), and the pipeline."""

    scheduler: str
    config: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    family: str = "sdxl"

    def made(self, config: Any) -> Any:
        return getattr(diffusers, self.scheduler).from_config(config, **self.config)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "trained_betas": None}
PUBLISHED = {
    "sd": {
        **{"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **BETAS, "num_train_timesteps": 1000},
        **{"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False},
    },
    "sdxl": {
        **{"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", **BETAS},
        **{"num_train_timesteps": 1000, "prediction_type": "epsilon", "interpolation_type": "linear"},
        **{"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False},
        **{"sample_max_value": 1.0, "timestep_spacing": "leading", "use_karras_sigmas": False},
    },
}
TRAILING = {"timestep_spacing": "trailing"}
CARDS = {
    "sdxl-lightning-1step": Card(
        "EulerDiscreteScheduler", {**TRAILING, "prediction_type": "sample"}, {"num_inference_steps": 1}
    ),
    **{
        f"sdxl-lightning-{n}step{kind}": Card("EulerDiscreteScheduler", TRAILING, {"num_inference_steps": n})
        for kind in ("", "-lora")
        for n in (2, 4, 8)
    },
    "hyper-sd-1step": Card("LCMScheduler", {}, {"timesteps": [800]}),
    **{f"hyper-sd-{n}step": Card("DDIMScheduler", TRAILING, {"num_inference_steps": n}) for n in (2, 4, 8)},
    "hyper-sd15-1step": Card("TCDScheduler", {}, {"num_inference_steps": 1}, {"eta": 1.0}, family="sd"),
    "dmd2-4step": Card("LCMScheduler", {}, {"timesteps": [999, 749, 499, 249]}),
    "lcm-lora-sdxl": Card("LCMScheduler", {}, {"num_inference_steps": 4}),
    "lcm-sdxl": Card("LCMScheduler", {}, {"num_inference_steps": 4}),
    "lcm-sd15": Card("LCMScheduler", {}, {"num_inference_steps": 4}, family="sd"),
}


def without_weights(folder: Path) -> Any:
    """diffusers' own pipeline with its scheduler and tokenizers alone: a component given as None is not read."""
    index = json.loads((folder / "model_index.json").read_text())
    networks = [name for name in index if name.startswith(("text_encoder", "unet", "vae"))]
    return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **dict.fromkeys(networks))


def distilled(checkpoint: Path, path: Path) -> None:
    """Write another UNet of the same architecture as one fp16 file with diffusers' names and no config."""
    weights = load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    torch.manual_seed(4)
    save_file({name: (w * (1 + 0.2 * torch.randn_like(w))).half() for name, w in weights.items()}, path)


@pytest.fixture(scope="module")
def files(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache: owner, name and commit as folders of the client's making."""
    cache = tmp_path_factory.mktemp("hub")
    written: dict[tuple[str, str], Path] = {}  # one file for each kind: what tells them apart is where they are
    for repository, names in PARTS.items():
        folder = cache / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text(COMMIT)
        snapshot = folder / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (snapshot / "README.md").write_text("---\nlicense: openrail++\n---\n")
        if not names:
            config = UNet2DConditionModel.load_config(checkpoints["sdxl"] / "unet")
            UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 32}).half().save_pretrained(snapshot)
        for name in names:
            family = "sd" if "15" in name or "v1-5" in repository else "sdxl"
            kind = "unet" if "unet" in name.lower() else NAMINGS.get(repository.split("/")[1], "peft")
            if (family, kind) in written:
                os.link(written[family, kind], snapshot / name)
                continue
            written[family, kind] = snapshot / name
            if kind == "unet":
                distilled(checkpoints[family], snapshot / name)
            else:
                drawn = lora_files.draw(checkpoints[family], dtype=torch.float16, only="unet.", ranks=(2,))
                blocks = {place: layer for place, layer in drawn.items() if "block" in place[1]}
                lora_files.write(snapshot / name, blocks, kind)  # what such LoRAs are trained of, convolutions too
    return cache


@pytest.fixture(scope="module")
def bases(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The miniatures with the schedulers of SD 1.5 and SDXL's base, as these were published."""
    made = {}
    for family, published in PUBLISHED.items():
        changes = {
            "model_index.json": {"scheduler": ["diffusers", published["_class_name"]]},
            "scheduler/scheduler_config.json": published,
        }
        made[family] = copied(checkpoints[family], tmp_path_factory.mktemp("bases") / family, changes)
    return made


@pytest.fixture(scope="module")
def own(bases: dict[str, Path]) -> dict[str, Any]:
    """Family → the config of the scheduler that diffusers' pipeline has of its own."""
    return {family: without_weights(folder).scheduler.config for family, folder in bases.items()}


@pytest.fixture
def cache(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache as the client's own, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(files))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return files


def snapshot(cache: Path, name: str) -> Path:
    owner, repository, file = name.split("/")
    return cache / f"models--{owner}--{repository}" / "snapshots" / COMMIT / file


def fetched(order: ExportOrder, folder: Path) -> Checkpoint:
    """The order's checkpoint, as the later phases get it: both travel as JSON."""
    made = jobs.fetch(convert(ExportOrder, plain(order)), Want(folder))
    return convert(Checkpoint, plain(made))


def test_a_unet_and_a_lora_with_timesteps_of_their_own(
    cache: Path, checkpoints: dict[str, Path], sd: Path, tmp_path: Path
) -> None:
    """Of Stable Diffusion, whose miniature is the smallest: the UNet in a file here, and DMD2's schedule."""
    unet, lora = tmp_path / "sd_lightning_4step_unet.safetensors", tmp_path / "style.safetensors"
    distilled(checkpoints["sd"], unet)
    lora_files.write(lora, lora_files.draw(checkpoints["sd"], only="unet."), "kohya")
    asked_for = {"unet": str(unet), "lora": [f"{lora}:0.5"], "recipe": "dmd2-4step", "size": SIZE, "quiet": True, **ON}
    asked_for["tasks"] = ["text-to-image"]
    bundle = tmp_path / "a.bundle"
    made = build_here(str(checkpoints["sd"]), bundle, **asked_for)
    assert all(check.passed for check in made.checks["text-to-image"])

    pipe = load_diffusers(checkpoints["sd"])
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config)
    pipe.unet.load_state_dict(load_file(unet))
    pipe.load_lora_weights(str(lora))
    pipe.fuse_lora(lora_scale=0.5)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    call = {"prompt": "a cat in the snow", "seed": 3}
    with Pipeline.load(bundle) as ours:
        picture = ours(**call, num_inference_steps=4, output_type="uint8").images
    assert_same_picture(picture, theirs(pipe, {**call, "timesteps": [999, 749, 499, 249]}))

    manifest = Bundle.open(bundle).manifest
    parts = manifest.checkpoint.parts
    assert (parts["unet"].source, parts["lora"].source) == (unet.name, lora.name)
    assert parts["scheduler"].source == 'sd-turbo-mini, changed to {"_class_name": "LCMScheduler"}'
    assert [r.size for r in parts["lora"].weights.values()] == [lora.stat().st_size]
    asked_of = ("steps", "timesteps", "recipe", "scheduler", "lora")
    assert [manifest.request[name] for name in asked_of] == [
        *([4], [999, 749, 499, 249], "dmd2-4step", {"_class_name": "LCMScheduler"}, ["a folder:0.5"]),
    ]
    assert {"unet.safetensors", "unet/config.json", "lora.safetensors"} <= manifest.request["files"].keys()
    assert build(str(checkpoints["sd"]), bundle, **asked_for).phases == []
    assert build(str(bundle), unet=str(unet), quiet=True, **ON).phases == []
    lora_files.write(lora, lora_files.draw(checkpoints["sd"], only="unet.", seed=1), "kohya")
    with pytest.raises(InputError, match=r"files of the source have changed: lora\.safetensors\)"):
        build(str(checkpoints["sd"]), bundle, **asked_for)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_is_what_the_models_page_says(
    name: str, cache: Path, bases: dict[str, Path], own: dict[str, Any], tmp_path: Path
) -> None:
    card = CARDS[name]
    order = recipes.settle(
        ExportOrder(str(bases[card.family]), recipe_name=name, sizes=(SIZE,), tasks=("text-to-image",))
    )
    checkpoint = fetched(order, tmp_path)
    (given,) = {*filter(None, (order.unet, *(order.lora or ())))}
    part = checkpoint.parts["unet" if order.unet else "lora"]
    assert (part.source, part.revision, part.license) == (given, COMMIT, "openrail++")
    assert checkpoint.adapters == (() if order.unet else ((checkpoint.loras["lora"].weights[0], 1.0),))

    theirs, ours = card.made(own[card.family]), load.scheduler(checkpoint)
    assert type(ours) is type(theirs) and ours.config == theirs.config
    theirs.set_timesteps(**card.call)
    steps = len(theirs.timesteps)
    requested = order.requested("fp32")
    made = tables.make(checkpoint, requested)["text-to-image"]
    assert tables.defaults(checkpoint, requested, TASK, made).get("eta", 0) == card.step.get("eta", 0)
    table = next(one.table for one in made.values() if one.entry.steps == steps)
    assert table.timesteps[table.index].tolist() == theirs.timesteps.tolist()
    x, predictions = torch.randn(1, 4, 4, 4), torch.randn(steps, 1, 4, 4, 4)
    drawn, noise = (torch.Generator().manual_seed(0) for _ in range(2))
    for i, t in enumerate(theirs.timesteps):
        theirs.scale_model_input(x, t)
        n = torch.randn(x.shape, generator=noise) if table.draws_noise[i] else torch.zeros_like(x)
        row = float(table.m[i, 0, 0]) * x + float(table.v[i, 0]) * predictions[i] + float(table.w[i, 0]) * n
        x = theirs.step(predictions[i], t, x, **card.step, generator=drawn).prev_sample
        torch.testing.assert_close(row, x, rtol=1e-5, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipes_picture_is_diffusers(name: str, cache: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    """Made as the model's page says, of the same files."""
    card, recipe = CARDS[name], recipes.RECIPES[name]
    how: dict[str, Any] = {"precision": "fp32", "size": SIZE, "tasks": ["text-to-image"], "quiet": True}
    assert build_here(str(bases[card.family]), tmp_path / "x.bundle", recipe=name, **how, **ON).checks

    pipe = load_diffusers(bases[card.family])
    if recipe.unet == "latent-consistency/lcm-sdxl":
        folder = cache / "models--latent-consistency--lcm-sdxl/snapshots" / COMMIT
        pipe.unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
    elif recipe.unet:
        pipe.unet.load_state_dict(load_file(snapshot(cache, recipe.unet)))
    for lora in recipe.lora:
        pipe.load_lora_weights(str(snapshot(cache, lora)))
        pipe.fuse_lora()
    pipe.scheduler = card.made(pipe.scheduler.config)
    call = {"prompt": "a cat in the snow", "seed": 3}
    with Pipeline.load(tmp_path / "x.bundle") as ours:
        steps = card.call.get("num_inference_steps", len(card.call.get("timesteps", ())))
        picture = ours(**call, num_inference_steps=steps, output_type="uint8").images
    more = {"guidance_scale": recipe.guidance_scale, "height": SIZE[1], "width": SIZE[0]}
    assert_same_picture(picture, image_calls.theirs(pipe, {**call, **card.call, **card.step, **more}))


def test_a_unets_weights_are_the_files(cache: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """In diffusers' names, in fp16, from the hub: the checkpoint's own config and the file's values."""
    checkpoint = fetched(ExportOrder(str(checkpoints["sdxl"]), unet=LIGHTNING), tmp_path)
    ours = load.component(checkpoint, "unet", torch.float32)
    expected = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(checkpoints["sdxl"] / "unet"))
    expected.load_state_dict(load_file(snapshot(cache, LIGHTNING)))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("sd", "DDIMScheduler"), ("sd", '{"steps_offset": 3}'), ("sdxl", '{"timestep_spacing": "trailing"}')],
)
def test_what_the_pipelines_constructor_changed_is_inherited(
    family: str, changes: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    odd = {"scheduler/scheduler_config.json": {"steps_offset": 0, "clip_sample": True}}
    folder = copied(checkpoints[family], tmp_path / "checkpoint", odd)
    asked_for = asked.scheduler_changes(changes)
    pipe = without_weights(folder)
    kwargs = dict(asked_for)
    cls = getattr(diffusers, kwargs.pop("_class_name", type(pipe.scheduler).__name__))
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **kwargs)
    whole = open_folder(folder)
    checkpoint = Checkpoint(whole.folder, whole.variant, whole.source, scheduler=asked_for)
    for ours in (load.scheduler(checkpoint), load.pipeline(checkpoint).scheduler):
        assert type(ours) is cls and ours.config == pipe.scheduler.config
    offsets = {"DDIMScheduler": 1, '{"steps_offset": 3}': 3}  # 1 is the constructor's, and 3 comes after it
    assert ours.config.steps_offset == offsets.get(changes, 0)


def test_weights_that_the_config_has_no_place_for_are_not_left_out(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """As those of a latent consistency model, which reads the guidance scale, beside the config of another UNet."""
    unet = shutil.copytree(checkpoints["sd"] / "unet", tmp_path / "unet")
    path = unet / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"time_embedding.cond_proj.weight": torch.zeros(32, 32)}, path, {"format": "pt"})
    checkpoint = fetched(ExportOrder(str(checkpoints["sd"]), unet=str(unet)), tmp_path)
    with pytest.raises(
        InputError, match=r"no place in its config\.json: time_embedding\.cond_proj\.weight \(1 in all\)"
    ):
        load.component(checkpoint, "unet", torch.float32)


def test_what_is_given_wins_over_the_recipe() -> None:
    def settled(**given: Any) -> ExportOrder:
        return recipes.settle(ExportOrder(given.pop("source", ""), recipe_name="dmd2-4step", **given))

    assert settled().source == "stabilityai/stable-diffusion-xl-base-1.0" and recipes.deviations(settled()) == []
    with pytest.raises(InputError, match="no source is given: name a checkpoint, or a recipe with --recipe NAME"):
        recipes.settle(ExportOrder(""))
    assert settled().given()["steps"] == (4,) and settled().online
    other = settled(source="demo", lora=("a/b/c.safetensors:0.7",), scheduler={"_class_name": "TCDScheduler"}, eta=0.3)
    assert (other.source, other.loras, other.timesteps) == (
        *("demo", {"lora": ("a/b/c.safetensors", 0.7)}, (999, 749, 499, 249)),
    )
    assert recipes.deviations(other) == ["source", "lora", "scheduler"]
    hyper = recipes.settle(ExportOrder("", recipe_name="hyper-sd15-1step", eta=0.0))
    assert (hyper.eta, recipes.deviations(hyper)) == (0.0, ["eta"])
    lcm = [
        recipes.settle(ExportOrder("", recipe_name="lcm-sdxl", **given))
        for given in ({"guidance_scale": 0.0}, {"guidance_scales": (1.0, 2.0)})
    ]
    assert [(order.guidance_scale, order.guidance_scales) for order in lcm] == [(0.0, None), (None, (1.0, 2.0))]
    steps = settled(steps=(1, 4))
    assert (steps.steps, steps.timesteps, recipes.deviations(steps)) == ((1, 4), None, ["timesteps"])


def test_the_command_names_every_recipe() -> None:
    done = called("build-engine", "--help")
    assert all(f"  {name} " in done.stdout for name in CARDS) and CARDS.keys() == recipes.RECIPES.keys()


def test_a_file_that_the_cache_lacks_and_one_of_another_model(
    cache: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = str(checkpoints["sd"])
    missing = LIGHTNING.replace("4step", "3step")
    with pytest.raises(InputError, match="ByteDance/SDXL-Lightning is neither on the hub under that name nor in the "):
        fetched(ExportOrder(source, unet=missing, sizes=(SIZE,)), tmp_path)
    with pytest.raises(InputError, match=re.escape("sdxl_lightning_4step_unet")):
        fetched(ExportOrder(source, unet=LIGHTNING, sizes=(SIZE,)), tmp_path)
    with pytest.raises(InputError, match="dmd2_sdxl_4step_lora_fp16"):
        fetched(ExportOrder(source, lora=(DMD2,), sizes=(SIZE,)), tmp_path)
