"""The synthetic checkpoints: true sizes, loadable, repeatable, and pictures that depend on every input."""

import hashlib
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers

from turbochain.export.sources import presets
from turbochain.export.sources.presets import PRESETS
from turbochain.export.sources.synthetic import models, write_checkpoint, write_settings
from turbochain.runtime.errors import InputError

MINIS = [name for name in PRESETS if name.endswith("-mini")]
LIKE_TURBO = dict.fromkeys(("sdxl-mini", "lcm-sdxl-mini"), pytest.mark.full)  # in all that loading them is about
# One step of a model that is not distilled begins at timestep 1, where there is nearly no noise to remove. "sdxl-mini"
# has the weights of "sdxl-turbo-mini".
PICTURES = [(name, steps, 64) for name in MINIS for steps in (1, 4) if "turbo" in name or (steps > 1 and "15" in name)]
PICTURES += [("lcm-sdxl-mini", 4, 128)]  # which a pixel more or less of the time ids changes little
pictures = pytest.mark.parametrize(("pipeline", "steps", "side"), PICTURES, indirect=["pipeline"])
PROMPT = "a photo of a cat"


# scheduler/scheduler_config.json of the published checkpoints.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "trained_betas": None}
COMMON = {**BETAS, "num_train_timesteps": 1000, "clip_sample": False}
PNDM = {**COMMON, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
EULER = {**PNDM, "prediction_type": "epsilon", "interpolation_type": "linear", "sample_max_value": 1.0}
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd15": {"_class_name": "PNDMScheduler", **PNDM},
    "sd21": {"_class_name": "DDIMScheduler", **PNDM, "prediction_type": "v_prediction"},
    "sd21-base": {"_class_name": "PNDMScheduler", **PNDM, "prediction_type": "epsilon"},
    "sd-turbo": {
        **{"_class_name": "EulerDiscreteScheduler", **EULER, "timestep_spacing": "trailing"},
        **{"sigma_max": None, "sigma_min": None, "timestep_type": "discrete", "use_karras_sigmas": False},
    },
    "sdxl": {
        **{"_class_name": "EulerDiscreteScheduler", **EULER, "timestep_spacing": "leading"},
        "use_karras_sigmas": False,
    },
    "sdxl-turbo": {"_class_name": "EulerAncestralDiscreteScheduler", **EULER, "timestep_spacing": "trailing"},
    "lcm-sd15": {
        **{"_class_name": "LCMScheduler", **COMMON, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995},
        **{"original_inference_steps": 50, "prediction_type": "epsilon", "rescale_betas_zero_snr": False},
        **{"sample_max_value": 1.0, "set_alpha_to_one": True, "steps_offset": 0, "thresholding": False},
        "timestep_spacing": "leading",
    },
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_schedulers_config_is_the_published_one(name: str) -> None:
    """Another class inherits what its own does not read, and takes its own default for what the file does not name."""
    assert presets.SCHEDULER | PRESETS[name].settings | {"_class_name": PRESETS[name].scheduler} == PUBLISHED[name]


def test_another_class_is_made_of_the_schedulers_file(folders: dict[str, Path]) -> None:
    for name in ("sd15", "sdxl"):
        own = getattr(diffusers, PUBLISHED[name]["_class_name"])
        ours, theirs = own.from_pretrained(folders[f"{name}-mini"] / "scheduler"), own.from_config(PUBLISHED[name])
        for cls in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.LCMScheduler):
            made, expected = cls.from_config(ours.config).config, cls.from_config(theirs.config).config
            told = {key for key in made if not key.startswith("_")}
            assert {key: made[key] for key in told} == {key: expected[key] for key in told}


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each mini preset, written once with seed 0."""
    shared = {folder.name: folder for folder in checkpoints.values()}
    folders = shared | {name: tmp_path_factory.mktemp(name) for name in MINIS if name not in shared}
    for name, folder in folders.items():
        if name not in ("sdxl-mini", *shared):
            write_checkpoint(name, folder)
    write_settings("sdxl-mini", folders["sdxl-mini"])
    for path in folders["sdxl-turbo-mini"].rglob("*.safetensors"):  # see `test_the_weights_of_sdxl_are_those_of_turbo`
        os.link(path, folders["sdxl-mini"] / path.relative_to(folders["sdxl-turbo-mini"]))
    return folders


@pytest.fixture(scope="module")
def pipelines(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: load(folders[name]) for name in {name for name, _, _ in PICTURES}}


@pytest.fixture
def pipeline(request: pytest.FixtureRequest, pipelines: dict[str, Any]) -> Any:
    return pipelines[request.param]


@pytest.fixture(scope="module")
def bases() -> dict[tuple[int, int], np.ndarray]:
    """Pipeline and steps → its picture, once drawn."""
    return {}


def base_of(bases: dict[tuple[int, int], np.ndarray], pipeline: Any, steps: int, side: int) -> np.ndarray:
    if (id(pipeline), steps) not in bases:
        bases[id(pipeline), steps] = draw(pipeline, steps=steps, side=side)
    return bases[id(pipeline), steps]


def load(folder: Path, **parts: Any) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, **options: Any) -> np.ndarray:
    """The picture of PROMPT; see `draw_all`."""
    return draw_all(pipeline, [PROMPT], **options)[0]


def draw_all(
    pipeline: Any,
    prompts: list[str],
    *,
    steps: int = 1,
    shift: int = 0,
    pooled: float = 1.0,
    side: int = 64,
    **options: Any,
) -> np.ndarray:
    """Pictures of the same noise, as int levels; the UNet's timestep lowered by `shift`, its pooled embedding ×
    `pooled`."""

    def changed(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        sample, timestep = args
        if pooled != 1.0:
            embeds = kwargs["added_cond_kwargs"]["text_embeds"] * pooled
            kwargs["added_cond_kwargs"] = kwargs["added_cond_kwargs"] | {"text_embeds": embeds}
        return (sample, timestep - shift), kwargs

    hook = pipeline.unet.register_forward_pre_hook(changed, with_kwargs=True)
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    size = {"height": side, "width": side}
    try:
        images = pipeline(
            prompts,
            num_inference_steps=steps,
            generator=generators,
            output_type="np",
            **{"guidance_scale": 0.0} | size | options,
        ).images
    finally:
        hook.remove()
    assert np.isfinite(images).all()
    return np.round(images * 255).astype(int)


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


# Published: SD 2.1's UNet has 865.9 M parameters and SDXL's 2.567 B (the model papers say 865 M and 2.6 B);
# SD 1.5's UNet has 859.52 M; CLIP ViT-L's text tower 123.06 M, OpenCLIP bigG's 694.66 M, OpenCLIP H's without its last
# layer 340.39 M.
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("sd-turbo", {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}),
        (
            "sdxl-turbo",
            {
                "unet": 2_567_463_684,
                "vae": 83_653_863,
                "text_encoder": 123_060_480,
                "text_encoder_2": 694_659_840,
            },
        ),
        ("sd15", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
    ],
)
def test_full_sizes_are_the_published_ones(name: str, counts: dict[str, int]) -> None:
    assert {k: sum(p.numel() for p in m.parameters()) for k, m in models(name).items()} == counts


@pytest.mark.parametrize("name", MINIS)
def test_a_mini_is_small_and_has_the_parts_of_the_full_one(name: str, folders: dict[str, Path]) -> None:
    assert sum(f.stat().st_size for f in folders[name].rglob("*") if f.is_file()) < 40e6
    mini, full = models(name), models(name.removesuffix("-mini"))
    assert mini.keys() == full.keys()
    for key in ("down_block_types", "up_block_types"):  # each kind of block once, in the full one's order
        assert list(mini["unet"].config[key]) == list(dict.fromkeys(full["unet"].config[key]))
    for key in ("addition_embed_type", "use_linear_projection"):
        assert mini["unet"].config[key] == full["unet"].config[key]
    assert mini["vae"].config.latent_channels == 4
    assert len(mini["vae"].config.block_out_channels) == 4


@pytest.mark.parametrize("name", [pytest.param(name, marks=LIKE_TURBO.get(name, ())) for name in MINIS])
def test_loads_without_a_warning_or_a_missing_key(name: str, folders: dict[str, Path]) -> None:
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(library) for library in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)  # between the libraries, not about the files
            parts = {}
            for component, part in models(name).items():
                kind: Any = getattr(diffusers, type(part).__name__, None)
                kind = kind or getattr(transformers, type(part).__name__)
                parts[component], info = kind.from_pretrained(folders[name] / component, output_loading_info=True)
                assert not any(info.values()), (component, info)
            assert type(load(folders[name], **parts)).__name__ == PRESETS[name].pipeline
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    # Importing a pipeline without torchvision warns too; that says nothing about the checkpoint.
    assert [record for record in records if "torchvision" not in record] == []


def test_the_seed_decides_the_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    name, steps = "sd-turbo-mini", []
    write_checkpoint(name, tmp_path / "0", seed=0, progress=lambda done, total: steps.append((done, total)))
    write_checkpoint(name, tmp_path / "1", seed=1)
    first = digest(folders[name])
    assert digest(tmp_path / "0") == first
    other = digest(tmp_path / "1")
    assert {f for f in first if first[f] != other[f]} == {f for f in first if "safetensors" in f} | {"README.md"}
    total = sum(p.numel() for m in models(name).values() for p in m.parameters())
    assert steps == sorted(steps)
    assert steps[-1] == (total, total)


def test_the_weights_of_sdxl_are_those_of_turbo() -> None:
    """Drawn from the same seed for the same parameters in the same order."""
    plain, turbo = (models(name) for name in ("sdxl-mini", "sdxl-turbo-mini"))
    assert [*plain] == [*turbo]
    for of, other in zip(plain.values(), turbo.values(), strict=True):
        shapes = [[(name, tensor.shape) for name, tensor in part.state_dict().items()] for part in (of, other)]
        assert shapes[0] == shapes[1]


@pictures
def test_the_picture_is_no_flat_or_clipped_one(
    pipeline: Any, steps: int, side: int, bases: dict[Any, np.ndarray]
) -> None:
    image = base_of(bases, pipeline, steps, side)
    assert 30 < image.std() < 70
    assert ((image > 0) & (image < 255)).mean() > 0.9


@pictures
def test_every_input_moves_the_picture(pipeline: Any, steps: int, side: int, bases: dict[Any, np.ndarray]) -> None:
    base = base_of(bases, pipeline, steps, side)
    words = {"one word": "a photo of a dog", "first word": "the photo of a cat", "no prompt": ""}
    changes: dict[str, dict[str, Any]] = {"timestep 998": {"shift": 1}}
    if hasattr(pipeline, "text_encoder_2"):
        changes |= {
            "pooled embedding": {"pooled": 0.5},
            "original size": {"original_size": (side + 1, side)},
            "crop": {"crops_coords_top_left": (0, 1)},
            "target size": {"target_size": (side, side + 1)},
        }
    if pipeline.unet.config.time_cond_proj_dim:
        changes["guidance scale"] = {"guidance_scale": 8.0}
    others = draw_all(pipeline, [*words.values()], steps=steps, side=side)
    moved = {k: abs(other - base).max() for k, other in zip(words, others, strict=True)}
    moved |= {k: abs(draw(pipeline, steps=steps, side=side, **change) - base).max() for k, change in changes.items()}
    assert min(moved.values()) >= 5, moved


@pictures
def test_another_order_of_the_sums_does_not(pipeline: Any, steps: int, side: int, bases: dict[Any, np.ndarray]) -> None:
    base = base_of(bases, pipeline, steps, side)
    networks = (pipeline.unet, pipeline.vae)
    for network in networks:
        network.to(memory_format=torch.channels_last)
    try:
        other = draw(pipeline, steps=steps, side=side)
    finally:
        for network in networks:
            network.to(memory_format=torch.contiguous_format)
    assert abs(other - base).max() <= 1
    assert (other != base).mean() <= 5e-4


@pytest.mark.parametrize("name", ["sd-turbo-mini", pytest.param("sdxl-turbo-mini", marks=pytest.mark.full)])
def test_half_precision_stays_in_range_and_close(name: str, folders: dict[str, Path]) -> None:
    half = load(folders[name]).to(torch.float16)
    half.vae.register_to_config(force_upcast=False)
    peaks: dict[str, float] = {}

    def note(label: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if torch.is_tensor(output):
                peaks[label] = max(peaks.get(label, 0.0), output.abs().max().item())

        return hook

    parts = [part for part in half.components.values() if isinstance(part, torch.nn.Module)]
    for part in parts:
        for label, module in part.named_modules():
            module.register_forward_hook(note(f"{type(part).__name__} {label}"))
    exact = draw(load(folders[name]), steps=2)
    error = ((draw(half, steps=2) - exact) ** 2).mean()
    assert max(peaks.values()) < 500, max(peaks, key=lambda label: peaks[label])
    assert 10 * np.log10(255**2 / error) >= 45  # dB


def test_the_tokenizers_speak_clip(folders: dict[str, Path]) -> None:
    for folder, pad in [
        (folders["sd-turbo-mini"] / "tokenizer", 0),
        (folders["sdxl-turbo-mini"] / "tokenizer", 49407),
        (folders["sdxl-turbo-mini"] / "tokenizer_2", 0),
    ]:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        # Ids as OpenAI's own tokenizer gives them; the words are whole tokens of its vocabulary.
        assert tokenizer(PROMPT).input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
        padded = tokenizer("a", padding="max_length", truncation=True).input_ids
        assert padded == [49406, 320, 49407] + [pad] * 74
        saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        assert saved["padding"] is None
        assert saved["truncation"] is None
        assert len(json.loads((folder / "vocab.json").read_text(encoding="utf-8"))) == 49408


@pytest.mark.parametrize("eos", [2, 49407])
def test_either_end_token_can_be_asked_for(eos: int) -> None:
    parts = models("sdxl-turbo-mini", eos_token_id=eos)
    assert {parts[p].config.eos_token_id for p in ("text_encoder", "text_encoder_2")} == {eos}


def test_unknown_names_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sd-turbo-mini"):
        write_checkpoint("sd-turbo-maxi", tmp_path)
