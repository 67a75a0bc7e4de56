"""The tables of supported models, tasks and recipes: of README.md and export/README.md, from the data in `export`."""

from collections.abc import Mapping

from tables import table
from turbochain.export import families, recipes, tasks
from turbochain.export.recipes import Distilled
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE


def models() -> str:
    """Return a row for each family: its models, and the pipeline of diffusers that each task is compared with."""
    known = sorted(tasks.load().values(), key=lambda task: task.name != TEXT_TO_IMAGE)
    rows = [
        [family.title, *(f"`{family.pipelines[t.pipeline]}`" if t.pipeline in family.pipelines else "" for t in known)]
        for family in families.load().values()
    ]
    return table(["models", *(task.name for task in known)], rows) + "\n"


def distilled() -> str:
    """Return a row for each recipe."""
    heading = ["recipe", "for", "checkpoint", "part", "scheduler", "steps", "licence of the part"]
    rows = [[f"`{name}`", *_cells(recipe)] for name, recipe in recipes.RECIPES.items()]
    return table(heading, rows) + "\n"


def _cells(recipe: Distilled) -> list[str]:
    part = f"UNet `{recipe.unet}`" if recipe.unet else f"LoRA `{recipe.lora[0]}`"
    steps = recipe.timesteps or recipe.steps or ()
    what = "timesteps " if recipe.timesteps else ""
    guidance = f"; guidance_scale {recipe.guidance_scale:g}" if recipe.guidance_scale else ""
    return [
        recipe.purpose,
        f"`{recipe.source}`",
        part,
        _scheduler(recipe.scheduler, recipe.eta),
        f"{what}{', '.join(map(str, steps))}{guidance}",
        recipe.license or "see its page",
    ]


def _scheduler(changes: Mapping[str, object], eta: float | None) -> str:
    others = [f"{name} {value}" for name, value in changes.items() if name != "_class_name"]
    return ", ".join([str(changes.get("_class_name", "")), *others, *([f"eta {eta:g}"] if eta else [])])
