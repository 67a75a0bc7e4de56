"""The recipes: distilled relatives of SD 1.5 and SDXL, and how their authors say that they are drawn with.

A recipe is data: a checkpoint, the part that replaces or changes its own, and a scheduler with its timesteps.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from turbochain.export.order import ExportOrder
from turbochain.runtime.errors import InputError

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SD_15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass(frozen=True)
class Distilled:
    """One recipe. Names of parts are those of `--unet` and `--lora`."""

    purpose: str  # one line, for people
    source: str  # hub id of the checkpoint
    unet: str | None = None
    lora: tuple[str, ...] = ()
    scheduler: dict[str, Any] = field(default_factory=dict)  # changes of the config; `_class_name`: the class
    steps: tuple[int, ...] | None = None
    timesteps: tuple[int, ...] | None = None  # instead of `steps`
    eta: float | None = None
    guidance_scale: float = 0.0  # of calls; up to 1: none, but for a UNet that reads it
    license: str | None = None  # of the part, as its page names it; None: not known here

    @property
    def fields(self) -> dict[str, Any]:
        """Return what it says of an `ExportOrder`: field → value."""
        named = ("source", "unet", "lora", "scheduler", "steps", "timesteps", "eta", "guidance_scale")
        return {name: getattr(self, name) for name in named if getattr(self, name)}


_EULER_TRAILING = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
_DDIM_TRAILING = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
_LCM = {"_class_name": "LCMScheduler"}
_OPENRAIL = "openrail++"


def _lightning(steps: int, lora: bool = False) -> Distilled:
    file = f"ByteDance/SDXL-Lightning/sdxl_lightning_{steps}step_{'lora' if lora else 'unet'}.safetensors"
    return Distilled(
        purpose=f"SDXL-Lightning, {steps} steps" + (", a LoRA for relatives of SDXL" if lora else ""),
        source=SDXL,
        unet=None if lora else file,
        lora=(file,) if lora else (),
        scheduler=_EULER_TRAILING,
        steps=(steps,),
        license=_OPENRAIL,
    )


def _hyper(steps: int) -> Distilled:
    return Distilled(
        purpose=f"Hyper-SD of SDXL, {steps} steps",
        source=SDXL,
        lora=(f"ByteDance/Hyper-SD/Hyper-SDXL-{steps}steps-lora.safetensors",),
        scheduler=_DDIM_TRAILING,
        steps=(steps,),
    )


RECIPES: dict[str, Distilled] = {
    "sdxl-lightning-1step": Distilled(
        purpose="SDXL-Lightning, 1 step (experimental, as its authors say); the UNet predicts the picture itself",
        source=SDXL,
        unet="ByteDance/SDXL-Lightning/sdxl_lightning_1step_unet_x0.safetensors",
        scheduler={**_EULER_TRAILING, "prediction_type": "sample"},
        steps=(1,),
        license=_OPENRAIL,
    ),
    **{f"sdxl-lightning-{steps}step": _lightning(steps) for steps in (2, 4, 8)},
    **{f"sdxl-lightning-{steps}step-lora": _lightning(steps, lora=True) for steps in (2, 4, 8)},
    "hyper-sd-1step": Distilled(
        purpose="Hyper-SD of SDXL, 1 step, a UNet",
        source=SDXL,
        unet="ByteDance/Hyper-SD/Hyper-SDXL-1step-Unet.safetensors",
        scheduler=_LCM,
        timesteps=(800,),
    ),
    **{f"hyper-sd-{steps}step": _hyper(steps) for steps in (2, 4, 8)},
    "hyper-sd15-1step": Distilled(
        purpose="Hyper-SD of SD 1.5, 1 step",
        source=SD_15,
        lora=("ByteDance/Hyper-SD/Hyper-SD15-1step-lora.safetensors",),
        scheduler={"_class_name": "TCDScheduler"},
        steps=(1,),
        eta=1.0,
    ),
    "dmd2-4step": Distilled(
        purpose="DMD2 of SDXL, 4 steps",
        source=SDXL,
        lora=("tianweiy/DMD2/dmd2_sdxl_4step_lora_fp16.safetensors",),
        scheduler=_LCM,
        timesteps=(999, 749, 499, 249),
        license="cc-by-nc-4.0",
    ),
    "lcm-lora-sdxl": Distilled(
        purpose="LCM-LoRA of SDXL, 2 to 8 steps",
        source=SDXL,
        lora=("latent-consistency/lcm-lora-sdxl/pytorch_lora_weights.safetensors",),
        scheduler=_LCM,
        steps=(2, 4, 8),
        guidance_scale=1.0,
        license=_OPENRAIL,
    ),
    "lcm-sdxl": Distilled(
        purpose="LCM of SDXL, 2 to 8 steps; its UNet reads the guidance scale",
        source=SDXL,
        unet="latent-consistency/lcm-sdxl",
        scheduler=_LCM,
        steps=(2, 4, 8),
        guidance_scale=8.0,
        license=_OPENRAIL,
    ),
    "lcm-sd15": Distilled(
        purpose="LCM-LoRA of SD 1.5, 2 to 8 steps",
        source=SD_15,
        lora=("latent-consistency/lcm-lora-sdv1-5/pytorch_lora_weights.safetensors",),
        scheduler=_LCM,
        steps=(2, 4, 8),
        guidance_scale=1.0,
        license=_OPENRAIL,
    ),
}
"""Every recipe by its name."""


def get(name: str) -> Distilled:
    """Return a recipe; InputError that names them all if there is none."""
    if name not in RECIPES:
        raise InputError(f"there is no recipe {name!r}: choose {', '.join(RECIPES)}")
    return RECIPES[name]


def settle(order: ExportOrder) -> ExportOrder:
    """Return the order with what its recipe says of everything that is left open; options that are given win.

    Steps and timesteps say the same thing, so either leaves out the recipe's, and so do a guidance scale and several.
    Raises InputError without a source.
    """
    fields = get(order.recipe_name).fields if order.recipe_name is not None else {}
    for alike in (("steps", "timesteps"), ("guidance_scale", "guidance_scales")):
        if any(getattr(order, name) is not None for name in alike):
            fields = {name: value for name, value in fields.items() if name not in alike}
    settled = replace(order, **{name: value for name, value in fields.items() if getattr(order, name) in (None, "")})
    if not settled.source:
        raise InputError("no source is given: name a checkpoint, or a recipe with --recipe NAME")
    return settled


def deviations(order: ExportOrder) -> list[str]:
    """Return in which fields a settled order differs from its recipe."""
    fields = get(order.recipe_name).fields if order.recipe_name is not None else {}
    return [name for name, value in fields.items() if getattr(order, name) != value]


def described() -> str:
    """Return the recipes as lines for `build-engine --help`."""
    width = max(map(len, RECIPES))
    return "recipes:\n" + "\n".join(f"  {name:<{width}}  {recipe.purpose}" for name, recipe in RECIPES.items())
