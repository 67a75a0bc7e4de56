"""The pipeline that the reference runs is the one that diffusers itself makes of a checkpoint's folder."""

import inspect
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
from conftest import FAMILIES
from diffusers import AutoPipelineForText2Image
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING, _get_task_class
from test_parity import load_diffusers

from turbochain.export import families, load
from turbochain.export.sources.checkpoint import open_folder
from turbochain.export.sources.synthetic import write_checkpoint
from turbochain.runtime import InputError

ODD: dict[str, dict[str, Any]] = {
    "model_index.json": {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
    "scheduler/scheduler_config.json": {"steps_offset": 0, "clip_sample": True, "timestep_spacing": "leading"},
    "unet/config.json": {"_diffusers_version": "0.8.0", "sample_size": 32},
    "vae/config.json": {"scaling_factor": 0.3, "force_upcast": False, "latents_mean": [1, 2, 3, 4], "sample_size": 32},
}
"""What pipelines or their constructors read, ignore or change."""


def copied(checkpoint: Path, folder: Path, changes: dict[str, dict[str, Any]]) -> Path:
    """Copy a checkpoint, its weights linked, with keys of its JSON files changed."""
    shutil.copytree(checkpoint, folder, copy_function=os.link)
    for file, keys in changes.items():
        value = json.loads((folder / file).read_text()) | keys
        (folder / file).unlink()  # a link to the shared file
        (folder / file).write_text(json.dumps(value))
    return folder


def settings(pipe: Any) -> Iterator[tuple[str, Any]]:
    """Yield every setting of a pipeline and of its parts, but for where they were loaded from."""
    yield from ((name, getattr(pipe, name, None)) for name in ("vae_scale_factor", "default_sample_size"))
    configs = {name: part.config for name, part in pipe.components.items() if hasattr(part, "config")}
    for name, config in {"pipeline": pipe.config, **configs}.items():
        plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        yield from ((f"{name}.{key}", value) for key, value in plain.items() if key != "_name_or_path")


@pytest.mark.parametrize("family", [*FAMILIES, "lcm"])
def test_it_has_every_setting_of_the_constructed_pipeline(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    if (source := checkpoints.get(family)) is None:
        write_checkpoint("lcm-sd15-mini", source := tmp_path / "lcm")
    folder = copied(source, tmp_path / "checkpoint", ODD)
    checkpoint = open_folder(folder)
    assert checkpoint.family.name == family
    ours, theirs = dict(settings(load.pipeline(checkpoint))), dict(settings(load_diffusers(folder)))
    left = {f"pipeline.{name}" for name in checkpoint.family.pipeline_options}
    different = {k: (ours.get(k), theirs.get(k)) for k in {*ours, *theirs} - left if ours.get(k) != theirs.get(k)}
    assert not different
    if family == "lcm":
        assert ours["scheduler.steps_offset"] == 0, "its constructor leaves the file's value"
    elif family == "sd":
        assert ours["scheduler.steps_offset"] == 1, "the constructor was to change the file's value"
        assert ours["unet.sample_size"] == 64
    else:
        assert ours["pipeline.force_zeros_for_empty_prompt"] is False


def parts_of(name: str) -> list[families.Family]:
    """Return the families whose parts are those of a diffusers pipeline class, or some of them."""
    expected = inspect.signature(getattr(diffusers, name)).parameters.keys()
    return [f for f in families.load().values() if {*f.components, *f.tokenizers.values(), "scheduler"} <= expected]


def test_every_class_over_the_parts_of_a_family_that_diffusers_draws_with_is_accepted() -> None:
    """The oracle: `AutoPipelineForText2Image` loads it as the family's pipeline, alone or beside a ControlNet."""
    drawn = {}
    kinds = ("StableDiffusion", "LatentConsistencyModel")
    for name in (n for n in dir(diffusers) if n.startswith(kinds) and n.endswith("Pipeline")):
        task = _get_task_class(AUTO_TEXT2IMAGE_PIPELINES_MAPPING, name, throw_error_if_not_exist=False)
        base = task and task.__name__.replace("ControlNetUnion", "").replace("ControlNet", "")
        drawn |= {name: base} if base in families.load() else {}
    accepted = {name: f.pipeline_class for f in families.load().values() for name in (*f.pipelines.values(), *f.kin)}
    assert accepted == drawn
    assert all(families.of(cls).pipeline_class == base for cls, base in drawn.items())
    assert all(families.of(cls) in parts_of(cls) for cls in drawn)


@pytest.mark.parametrize("name", ["StableDiffusionPAGPipeline", "StableDiffusionInstructPix2PixPipeline", "None"])
def test_a_class_that_draws_otherwise_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"^the pipeline class {name} is not supported: choose a checkpoint of "):
        families.of(name)


@pytest.mark.parametrize(
    ("family", "name"), [("sd", "StableDiffusionInpaintPipeline"), ("sdxl", "StableDiffusionXLImg2ImgPipeline")]
)
def test_a_checkpoint_saved_by_another_task_is_that_of_text_to_image(
    family: str, name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    index = {"_class_name": name, "image_encoder": [None, None], "requires_aesthetics_score": True}
    folder = copied(checkpoints[family], tmp_path / "checkpoint", {"model_index.json": index})
    ours = load.pipeline(open_folder(folder))
    theirs = AutoPipelineForText2Image.from_pretrained(folder, local_files_only=True)
    assert type(ours) is type(theirs)
    left = {f"pipeline.{name}" for name in families.of(name).pipeline_options}
    ours, theirs = ({k: v for k, v in settings(pipe) if k not in left} for pipe in (ours, theirs))
    assert ours == theirs


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("sd", {"text_encoder/config.json": {"use_attention_mask": True}}, "asks for an attention mask"),
        ("sdxl", {"unet/config.json": {"projection_class_embeddings_input_dim": 64 + 5 * 32}}, "reads 224 values"),
    ],
)
def test_what_a_pipeline_does_and_no_graph_here_is_refused(
    family: str, changes: dict[str, dict[str, Any]], reason: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(checkpoints[family], tmp_path / "checkpoint", changes)
    with pytest.raises(InputError, match=reason):
        open_folder(folder)


def test_an_attention_mask_that_the_pipeline_does_not_read_is_no_reason(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    changes = {"text_encoder/config.json": {"use_attention_mask": True}}
    assert open_folder(copied(checkpoints["sdxl"], tmp_path / "checkpoint", changes)).family.name == "sdxl"
