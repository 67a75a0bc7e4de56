"""Random combinations of a miniature, its parts, tasks, a scheduler and calls: what we are asked for, and what makes
diffusers' own pipeline of the same.

Everything follows from one seed, so that a combination that differs can be drawn again.
"""

import inspect
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import image_calls
import lora_files
import original_names
import torch
from safetensors.torch import load_file, save_file
from test_relatives import CARDS

Options = dict[str, Any]
Weights = dict[str, torch.Tensor]

PRESETS = ("sd-turbo-mini", "sd15-mini", "sdxl-turbo-mini", "sdxl-mini", "lcm-sd15-mini", "lcm-sdxl-mini")
PIPELINES = {
    "text-to-image": {
        **{"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"},
        "lcm": "LatentConsistencyModelPipeline",
    },
    "image-to-image": {
        **{"sd": "StableDiffusionImg2ImgPipeline", "sdxl": "StableDiffusionXLImg2ImgPipeline"},
        "lcm": "LatentConsistencyModelImg2ImgPipeline",
    },
    "inpainting": {"sd": "StableDiffusionInpaintPipeline", "sdxl": "StableDiffusionXLInpaintPipeline"},
}
"""Task → family → diffusers' pipeline."""

SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("EDMEulerScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler"),
    *("LCMScheduler", "TCDScheduler"),
)
CHANGES: dict[str, tuple[Any, ...]] = {
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "rescale_betas_zero_snr": (True,),
    "prediction_type": ("v_prediction", "sample"),
    "solver_order": (1, 2, 3),
    "algorithm_type": ("sde-dpmsolver++",),
    "set_alpha_to_one": (True,),
    "final_sigmas_type": ("zero", "sigma_min"),
    "lower_order_final": (False,),
    "euler_at_final": (True,),
}
"""Of a scheduler's config, each by its turn."""
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Of which a scheduler takes one."""

RECIPES = {
    "sd15-mini": {"lora": ("hyper-sd15-1step", "lcm-sd15")},
    "sdxl-mini": {
        "lora": ("dmd2-4step", "lcm-lora-sdxl", "hyper-sd-4step", "sdxl-lightning-2step-lora"),
        "unet": ("sdxl-lightning-4step", "sdxl-lightning-1step", "hyper-sd-1step"),
    },
}
"""Preset → the part that replaces or changes its own → recipes."""

SIZES = ((64, 64), (72, 88))
BATCHES: tuple[list[int], ...] = ([1], [1], [2], [1, 2])
STEPS = (1, 2, 3, 4, 6)
PROMPTS = ("a cat", "", "a lighthouse at dusk, oil painting, " * 12, "窓辺の猫", "robot 🤖 red", "a <|endoftext|> b!")


@dataclass
class Combination:
    """What a build is asked for, and how diffusers is made the same."""

    preset: str
    family: str
    source: str
    kind: str  # of the source
    options: Options
    checkpoint: Path  # in diffusers' format, with the source's weights
    changes: list[Callable[[Any], object]] = field(default_factory=list)  # of a pipeline of that checkpoint
    scheduler: Callable[[Any], Any] | None = None  # config → scheduler
    more: Options = field(default_factory=dict)  # of every call to diffusers
    guidance_scale: float = 0.0  # of a call that gives none

    @property
    def reads_scale(self) -> bool:
        """Whether the UNet reads the guidance scale."""
        return self.preset.startswith("lcm")

    def pipelines(self) -> dict[str, Any]:
        """Return task → diffusers' pipeline."""
        one = diffusers.DiffusionPipeline.from_pretrained(
            self.checkpoint, torch_dtype=torch.float32, local_files_only=True
        )
        for change in self.changes:
            change(one)
        if "clip_skip" in self.more and self.family == "sd":  # diffusers looks for the final norm there
            vars(one.text_encoder).setdefault("text_model", one.text_encoder)
        found = {}
        for task in self.options["tasks"]:
            found[task] = getattr(diffusers, PIPELINES[task][self.family]).from_pipe(one)
            if self.scheduler:
                found[task].scheduler = self.scheduler(one.scheduler.config)
            found[task].set_progress_bar_config(disable=True)
        return found

    def __str__(self) -> str:
        told = {name: value for name, value in self.options.items() if name not in ("quiet", "precision")}
        return f"{self.preset}, {self.kind}: {told}"


def draw(rng: random.Random, written: Callable[[str], Path], folder: Path) -> Combination:
    """Return a combination. `written`: preset → its checkpoint. Files of its own are written to `folder`."""
    preset = rng.choice(PRESETS)
    family = "lcm" if preset == "lcm-sd15-mini" else "sdxl" if "xl" in preset else "sd"
    tasks = [task for task, of in PIPELINES.items() if family in of]
    options: Options = {
        **{"quiet": True, "precision": "fp32", "tasks": rng.sample(tasks, rng.choice([1, 1, 2]))},
        **{"size": rng.sample(SIZES, rng.choice([1, 1, 2])), "batch": rng.choice(BATCHES)},
    }
    checkpoint = written(preset)
    made = Combination(preset, family, str(checkpoint), "folder", options, checkpoint)
    kinds = ["folder", "unet", "lora", *([] if made.reads_scale else ["file", "half"]), *RECIPES.get(preset, ())]
    made.kind = rng.choice(kinds)
    recipes = RECIPES.get(preset, {}).get(made.kind)
    if made.kind in ("file", "half"):
        _file(made, rng, folder)
    elif made.kind == "unet":
        _unet(made, rng, folder)
    elif made.kind == "lora":
        _lora(made, rng, folder)
    if recipes and rng.random() < 0.7:
        _recipe(made, rng.choice(recipes))
    else:
        _scheduler(made, rng)
        _steps(made, rng)
    if made.reads_scale:
        _scales(made, rng)
    else:
        if rng.random() < 0.25:
            made.options["clip_skip"] = made.more["clip_skip"] = 1
        if rng.random() < 0.3 and "recipe" not in made.options:
            made.options["guidance_scale"] = made.guidance_scale = rng.choice([1.5, 5.0])
    return made


def call(rng: random.Random, made: Combination) -> tuple[str, Options, Options]:
    """Return a task and a call, for us and for diffusers."""
    task, size = rng.choice(made.options["tasks"]), rng.choice(made.options["size"])
    count, repeats = rng.choice([1, 1, 2]), rng.choice([1, 1, 2])
    ours: Options = {"prompt": rng.sample(PROMPTS, count) if count > 1 else rng.choice(PROMPTS)}
    ours |= {"num_images_per_prompt": repeats, "width": size[0], "height": size[1]}
    seeds = [rng.randint(0, 2**64 - 1) for _ in range(count * repeats)]
    ours["seed"] = seeds if rng.random() < 0.4 else seeds[0]
    if "steps" in made.options:
        ours["num_inference_steps"] = rng.choice(made.options["steps"])
    steps = ours.get("num_inference_steps") or len(made.more["timesteps"])
    theirs = {"guidance_scale": made.guidance_scale}
    if made.reads_scale:
        theirs["guidance_scale"] = ours["guidance_scale"] = rng.choice(made.options["guidance_scales"])
    else:
        if (scale := rng.choice([None, 0.0, 1.0, 2.5, 7.5])) is not None:
            theirs["guidance_scale"] = ours["guidance_scale"] = scale
        if rng.random() < 0.5:
            ours["negative_prompt"] = rng.choice(["", "blurry", ["bad"] * count if count > 1 else "bad"])
    if task != "text-to-image":
        images = [image_calls.picture(rng.randint(0, 99), size) for _ in range(rng.choice([1, count]))]
        ours["image"] = images if len(images) > 1 else images[0]
        possible = [strength for strength in STRENGTHS if int(steps * strength)]
        ours["strength"] = rng.choice(made.options.get("strengths") or ([0.8] if made.family == "lcm" else possible))
    if task == "inpainting":
        ours["mask_image"] = image_calls.mask(rng.randint(0, 99), size)
    sized = task == "image-to-image"  # diffusers draws the image's own size there
    theirs |= {name: value for name, value in ours.items() if not (sized and name in ("width", "height"))}
    if count > 1 and isinstance(negative := theirs.get("negative_prompt"), str):
        theirs["negative_prompt"] = [negative] * count  # SD's pipelines take no string for several prompts
    return task, ours, theirs | made.more


STRENGTHS = (1.0, 0.99, 0.8, 0.5, 0.34)


def _file(made: Combination, rng: random.Random, folder: Path) -> None:
    """One file in the original names; of "half" in less than fp32, so that diffusers reads what is left of it."""
    parts = {path.parent.name: load_file(path) for path in made.checkpoint.glob("*/*.safetensors")}
    if made.kind == "half":
        dtype = rng.choice([torch.float16, torch.bfloat16, torch.float8_e4m3fn])
        parts = {c: {n: t.to(dtype) if t.is_floating_point() else t for n, t in w.items()} for c, w in parts.items()}
        made.kind = str(dtype)
        made.checkpoint = shutil.copytree(made.checkpoint, folder / "rounded")
        for component, weights in parts.items():
            (file,) = (made.checkpoint / component).glob("*.safetensors")
            whole = {n: t.float() if t.is_floating_point() else t for n, t in weights.items()}
            save_file(whole, file, {"format": "pt"})
    clip = {"sd-turbo-mini": "sd2", "sd15-mini": "sd1"}.get(made.preset, "sdxl")
    made.options["config"] = made.source
    made.source = str(_saved(original_names.checkpoint(parts, 1, clip), folder / "model.safetensors"))


def _unet(made: Combination, rng: random.Random, folder: Path) -> None:
    (file,) = (made.checkpoint / "unet").glob("*.safetensors")
    generator = torch.Generator().manual_seed(rng.randint(0, 3))
    weights = {n: w * (1 + 0.1 * torch.randn(w.shape, generator=generator)) for n, w in load_file(file).items()}
    made.changes.append(lambda pipe: pipe.unet.load_state_dict(weights))
    named = weights
    if rng.random() < 0.5 and not made.reads_scale:
        made.kind, named = "unet in original names", original_names.unet(weights, 1)
    made.options["unet"] = str(_saved(named, folder / "unet.safetensors"))


def _lora(made: Combination, rng: random.Random, folder: Path) -> None:
    naming, scale = rng.choice(lora_files.NAMINGS), rng.choice([1.0, 0.6, -0.5])
    layers = lora_files.draw(made.checkpoint, seed=rng.randint(0, 3), only=rng.choice(["unet.", "attn", ""]))
    path = lora_files.write(folder / "lora.safetensors", layers, naming)
    made.kind, made.options["lora"] = f"lora, {naming}", [f"{path}:{scale}"]
    made.changes.append(lambda pipe: pipe.load_lora_weights(str(path)))
    made.changes.append(lambda pipe: pipe.fuse_lora(lora_scale=scale))


def _recipe(made: Combination, name: str) -> None:
    card = CARDS[name]
    made.options["recipe"], made.scheduler = name, card.made
    made.more |= {**card.call, **card.step}
    if "num_inference_steps" in card.call:
        made.options["steps"] = [card.call["num_inference_steps"]]


def _scheduler(made: Combination, rng: random.Random) -> None:
    if made.family == "lcm" or rng.random() < 0.2:
        return
    name = rng.choice(SCHEDULERS)
    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    changes = {n: rng.choice(values) for n, values in CHANGES.items() if n in known and rng.random() < 0.3}
    sigmas = [n for n in SIGMAS if n in known]
    if sigmas and rng.random() < 0.4:
        changes[rng.choice(sigmas)] = True
    if "clip_sample" in known:
        changes["clip_sample"] = False  # what clips is not linear, and refused
    made.options["scheduler"] = {"_class_name": name, **changes}
    made.scheduler = lambda config: getattr(diffusers, name).from_config(config, **changes)


def _steps(made: Combination, rng: random.Random) -> None:
    cls = made.options.get("scheduler", {}).get("_class_name", "")
    if cls in ("LCMScheduler", "TCDScheduler", "EulerDiscreteScheduler") and rng.random() < 0.4:
        chosen = sorted(rng.sample(range(1, 999), rng.randint(1, 4)), reverse=True)
        made.options["timesteps"] = made.more["timesteps"] = chosen
    else:
        made.options["steps"] = sorted(rng.sample(STEPS, rng.choice([1, 2])))
    if cls in ("DDIMScheduler", "TCDScheduler") and rng.random() < 0.5:
        made.options["eta"] = made.more["eta"] = rng.choice([0.3, 1.0])


def _scales(made: Combination, rng: random.Random) -> None:
    made.options["guidance_scales"] = [8.5, 1.0]
    if made.family == "lcm" and "image-to-image" in made.options["tasks"] and rng.random() < 0.5:
        made.options["strengths"] = [0.8, 0.4]


def _saved(weights: Weights, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path


def told(call: Options) -> Options:
    """Return a call for people, with its pictures' sizes alone."""
    return {name: str(value) if name.endswith("image") else value for name, value in call.items()}
