"""What is said of a checkpoint before it is loaded: its files, its licence, and its scheduler as a table."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.embeddings import Timesteps

from turbochain.export import schedule
from turbochain.export.sources.checkpoint import license_of, open_folder
from turbochain.runtime import InputError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own, about numpy


@pytest.fixture
def folder(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """The SD miniature's layout, its weights linked to the originals."""
    shutil.copytree(checkpoints["sd"], tmp_path / "c", copy_function=link)
    return tmp_path / "c"


def link(original: str, copy: str) -> None:
    if original.endswith(".safetensors"):
        Path(copy).symlink_to(original)
    else:
        shutil.copy(original, copy)


def rename_weights(folder: Path, infix: str, *parts: str) -> None:
    for part_ in parts:
        (path,) = (folder / part_).glob("*.safetensors")
        path.rename(path.with_name(path.name.replace(".safetensors", f"{infix}.safetensors")))


PARTS = ("text_encoder", "unet", "vae")


def test_an_opened_folder(checkpoints: dict[str, Path]) -> None:
    for family, parts in (("sd", PARTS), ("sdxl", ("text_encoder", "text_encoder_2", "unet", "vae"))):
        checkpoint = open_folder(checkpoints[family], None)
        assert checkpoint.family.name == family and checkpoint.variant is None
        assert tuple(checkpoint.weights) == parts == tuple(checkpoint.configs)
        model = diffusers.UNet2DConditionModel.from_pretrained(checkpoints[family] / "unet")
        assert checkpoint.parameters("unet") == model.num_parameters()


def test_an_fp16_only_folder_is_recognised(folder: Path) -> None:
    rename_weights(folder, ".fp16", *PARTS)
    checkpoint = open_folder(folder, None)
    assert checkpoint.variant == "fp16"
    assert all(path.name.endswith(".fp16.safetensors") for (path,) in checkpoint.weights.values())


def test_a_variant_of_some_parts_only(folder: Path) -> None:
    rename_weights(folder, ".fp16", "unet")
    weights = open_folder(folder, "fp16").weights
    assert [path.name for paths in weights.values() for path in paths] == [
        "model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
    ]
    with pytest.raises(InputError, match="unet has no safetensors weights; it has the variant 'fp16'"):
        open_folder(folder, None)


def test_a_variant_that_is_not_there(folder: Path) -> None:
    with pytest.raises(InputError, match="has no variant 'fp17': it has none"):
        open_folder(folder, "fp17")
    rename_weights(folder, ".fp16", "unet")
    with pytest.raises(InputError, match="has no variant 'fp17': it has fp16"):
        open_folder(folder, "fp17")


def shard(folder: Path, names: Any, infix: str = "") -> None:
    (file,) = (folder / "unet").glob("*.safetensors")
    file.rename(folder / "unet" / f"diffusion_pytorch_model{infix}-00001-of-00001.safetensors")
    index = folder / "unet" / f"diffusion_pytorch_model.safetensors.index{infix}.json"
    index.write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize("infix", ["", ".fp16"])
def test_shards(folder: Path, infix: str) -> None:
    name = f"diffusion_pytorch_model{infix}-00001-of-00001.safetensors"
    shard(folder, {"a": name, "b": name}, infix)
    checkpoint = open_folder(folder, infix.removeprefix(".") or None)
    assert checkpoint.weights["unet"] == (folder / "unet" / name,)


@pytest.mark.parametrize("names", [None, [], {"a": 1}, {"a": "../vae/x.safetensors"}, {"a": "/etc/x.safetensors"}])
def test_an_index_of_shards_that_is_not_sound(folder: Path, names: Any) -> None:
    shard(folder, names)
    with pytest.raises(InputError, match="should map every weight to the name of a file beside it"):
        open_folder(folder, None)


@pytest.mark.parametrize("entry", [None, [], "x", ["os", "system"], ["transformers", None], [None, None]])
def test_no_other_library_is_imported(folder: Path, entry: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "unet": entry}))
    with pytest.raises(InputError, match="names no class of diffusers or transformers as unet"):
        open_folder(folder, None)


def header(text: bytes, body: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + body


DAMAGED = {
    "no header": b"",
    "header cut off": (1000).to_bytes(8, "little") + b"{",
    "huge header": (2**63).to_bytes(8, "little") + b"{}",
    "not JSON": header(b"?????"),
    "a list": header(b"[]"),
    "no offsets": header(b'{"a": {"dtype": "F32", "shape": [1]}}'),
    "an odd entry": header(b'{"a": 3}'),
    "cut off": header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"1234"),
    "too long": header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"12345678"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_weight_file(folder: Path, case: str) -> None:
    (path,) = (folder / "unet").glob("*.safetensors")
    path.unlink()
    path.write_bytes(DAMAGED[case])
    with pytest.raises(InputError) as caught:
        open_folder(folder, None)
    assert str(caught.value).startswith(f"{path} is damaged (") and str(caught.value).endswith("; download it again")


LICENCES = {
    "---\nlicense: apache-2.0\n---\n": "apache-2.0",
    "---\nlicense: 'mit'\ntags: [x]\n---\ntext": "mit",
    "---\npipeline_tag: text-to-image\nlicense: other\nlicense_name: sai-nc-community\nlicense_link: >-\n  x\n---\n": (
        "sai-nc-community"
    ),
    "---\r\nlicense: openrail++\r\n---\r\n": "openrail++",
    "# A model\nlicense: mit\n": None,
    "---\ntags: [x]\n---\nlicense: mit\n": None,
    "": None,
}


@pytest.mark.parametrize("card", LICENCES)
def test_the_licence_on_the_model_card(tmp_path: Path, card: str) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert license_of(tmp_path) == LICENCES[card]


def test_no_model_card_or_one_in_another_encoding(tmp_path: Path) -> None:
    assert license_of(tmp_path) is None
    (tmp_path / "README.md").write_bytes("---\nlicense: mit\n---\ncafé".encode("latin-1"))
    assert license_of(tmp_path) == "mit"


def embed(t: torch.Tensor) -> torch.Tensor:
    return Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)(t)


SAMPLERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler", "LCMScheduler")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def sampler(name: str, prediction: str, spacing: str, **options: Any) -> Any:
    if name in ("DDIMScheduler", "LCMScheduler"):
        options = {"clip_sample": False, "set_alpha_to_one": False, **options}
    return getattr(diffusers, name)(prediction_type=prediction, timestep_spacing=spacing, **BETAS, **options)


def follow(scheduler: Any, steps: int, predict: Callable[[int], torch.Tensor]) -> tuple[torch.Tensor, list[float]]:
    """The scheduler's own run as diffusers' pipelines do it: last sample, and what the network read (its mean)."""
    generator = torch.Generator().manual_seed(7)
    scheduler.set_timesteps(steps)
    x, read = torch.randn(2, 4, 6, 5, generator=generator) * scheduler.init_noise_sigma, []
    for i, t in enumerate(scheduler.timesteps):
        read.append(float(scheduler.scale_model_input(x, t).double().mean()))
        x = scheduler.step(predict(i), t, x, generator=generator, return_dict=False)[0]
    return x, read


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_table_does_what_its_scheduler_does(name: str, prediction: str, spacing: str, steps: int) -> None:
    scheduler = sampler(name, prediction, spacing)
    table = schedule.tabulate(scheduler, steps, embed)
    predictions = torch.randn(steps, 2, 4, 6, 5, generator=torch.Generator().manual_seed(8))
    theirs, read = follow(sampler(name, prediction, spacing), steps, lambda i: predictions[i])

    generator = torch.Generator().manual_seed(7)
    x = table.q * torch.randn(2, 4, 6, 5, generator=generator).double()
    scheduler.set_timesteps(steps)
    assert [row.timestep for row in table.rows] == scheduler.timesteps.tolist() and table.p == 0
    for i, row in enumerate(table.rows):
        assert float((row.input_scale * x).mean()) == pytest.approx(read[i], rel=1e-4, abs=1e-6)
        assert torch.equal(torch.tensor([row.timestep_embedding]), embed(scheduler.timesteps[i : i + 1]))
        noise = torch.randn(2, 4, 6, 5, generator=generator) if row.draws_noise else 0
        x = row.a * x + row.b * predictions[i] + row.c * noise
    assert torch.allclose(x, theirs.double(), rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("name", "noisy"),
    [("EulerDiscreteScheduler", 0), ("EulerAncestralDiscreteScheduler", 3), ("DDIMScheduler", 0), ("LCMScheduler", 3)],
)
def test_noise_is_drawn_where_the_sampler_uses_it(name: str, noisy: int) -> None:
    rows = schedule.tabulate(sampler(name, "epsilon", "trailing"), 4, embed).rows
    assert [row.draws_noise for row in rows] == [i < noisy for i in range(4)]
    assert [row.c != 0 for row in rows] == [i < noisy for i in range(4)]


HIGHER = (
    *("DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"),
    *("LMSDiscreteScheduler", "UniPCMultistepScheduler"),
)


@pytest.mark.parametrize("name", HIGHER)
def test_a_sampler_of_higher_order_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=f"the scheduler {name} .* first-order one .*scheduler_config.json"):
        schedule.tabulate(getattr(diffusers, name).from_config(BETAS), 4, embed)


def test_a_sampler_that_clips_is_refused() -> None:
    clipping = sampler("DDIMScheduler", "epsilon", "trailing", clip_sample=True, clip_sample_range=0.5)
    with pytest.raises(InputError, match="DDIMScheduler is not a first-order linear sampler"):
        schedule.tabulate(clipping, 4, embed)


def test_a_table_leaves_the_scheduler_as_it_was() -> None:
    scheduler = sampler("EulerAncestralDiscreteScheduler", "epsilon", "trailing")
    scheduler.set_timesteps(10)
    before = scheduler.timesteps.clone()
    assert schedule.tabulate(scheduler, 2, embed) == schedule.tabulate(scheduler, 2, embed)
    assert torch.equal(scheduler.timesteps, before)
