"""A checkpoint in one file: its tensors are those that it was written from, and what cannot be read is refused."""

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import original_names
import pytest
import torch
from conftest import ON, SIZE
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from here import build_here
from original_names import Tensors, prefixed
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from turbochain.export.order import ExportOrder
from turbochain.export.sources import Want, find, original, parts, presets, synthetic
from turbochain.runtime import Bundle, InputError

KINDS = ("sd1", "sd2", "sdxl")
FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def weights(folder: Path, component: str) -> Tensors:
    return load_file(folder / component / f"{FILES.get(component, 'model')}.safetensors")


def components(folder: Path) -> list[str]:
    return sorted(p.parent.name for p in folder.glob("*/*.safetensors"))


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind → the checkpoint in diffusers' format."""
    folder = tmp_path_factory.mktemp("sd1") / "sd1"
    synthetic.write_checkpoint("sd15-mini", folder)
    return {"sd1": folder, "sd2": checkpoints["sd"], "sdxl": checkpoints["sdxl"]}


@pytest.fixture(scope="module")
def whole(folders: dict[str, Path]) -> dict[str, Tensors]:
    """Kind → its tensors in the original names."""
    return {
        kind: original_names.checkpoint({c: weights(folder, c) for c in components(folder)}, 1, kind)
        for kind, folder in folders.items()
    }


@pytest.fixture
def file(tmp_path: Path) -> Callable[[Tensors], Path]:
    def write(tensors: Tensors) -> Path:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
        return tmp_path / "x.safetensors"

    return write


def fetched(path: Path, config: Path | str | None, **want: Any) -> Path:
    config = None if config is None else str(config)
    return find(str(path)).fetch(Want(path.parent, config=config, **want)).folder


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert [n for n in found if found[n].dtype != expected[n].dtype or not torch.equal(found[n], expected[n])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_the_one_that_it_was(
    kind: str, folders: dict[str, Path], whole: dict[str, Tensors], file: Callable[[Tensors], Path]
) -> None:
    folder = folders[kind]
    made = fetched(file(whole[kind]), folder)
    for component in components(folder):
        assert_equal(weights(made, component), weights(folder, component))
        assert json.loads((made / component / "config.json").read_text()) == json.loads(
            (folder / component / "config.json").read_text()
        )
    assert {p.name for p in made.iterdir()} == {p.name for p in folder.iterdir()} - {"README.md", "LICENSE"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_stored_precisions(
    dtype: torch.dtype, folders: dict[str, Path], whole: dict[str, Tensors], file: Callable[[Tensors], Path]
) -> None:
    stored = {n: t.to(dtype) if t.is_floating_point() else t for n, t in whole["sd1"].items()}
    made = fetched(file(stored), folders["sd1"])
    for component in components(folders["sd1"]):
        found = weights(made, component)
        expected = weights(folders["sd1"], component)
        assert_equal({n: t.float() for n, t in found.items()}, {n: t.to(dtype).float() for n, t in expected.items()})


UNETS: dict[str, Callable[[Tensors], Tensors]] = {
    "of a checkpoint": lambda own: prefixed("model.diffusion_model.", original_names.unet(own, 1)),
    "original": lambda own: original_names.unet(own, 1),
    "diffusers": lambda own: own,
}


@pytest.mark.parametrize("naming", UNETS)
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_unet_alone(kind: str, naming: str, folders: dict[str, Path], file: Callable[[Tensors], Path]) -> None:
    own = weights(folders[kind], "unet")
    config = json.loads((folders[kind] / "unet/config.json").read_text())
    path = file(UNETS[naming](own))
    made = find(str(path), "unet").fetch(Want(path.parent, part="unet", part_config=config)).folder
    assert_equal(load_file(made / "diffusion_pytorch_model.safetensors"), own)
    assert json.loads((made / "config.json").read_text()) == config


def test_a_vae_in_a_file_for_a_checkpoint_without_one(
    folders: dict[str, Path], whole: dict[str, Tensors], file: Callable[[Tensors], Path], tmp_path: Path
) -> None:
    own = weights(folders["sd2"], "vae")
    (tmp_path / "vae").mkdir()
    vae = tmp_path / "vae" / "v.safetensors"
    save_file(original_names.vae({n: t + 1 for n, t in own.items()}), vae)
    path = file({n: t for n, t in whole["sd2"].items() if not n.startswith("first_stage_model.")})
    with pytest.raises(InputError, match=r"has no VAE, .*--vae"):
        fetched(path, "sd-turbo-mini")
    checkpoint = parts.fetch(find(str(path)), Want(tmp_path, config="sd-turbo-mini"), {"vae": str(vae)})
    assert_equal(load_file(checkpoint.weights["vae"][0]), {n: t + 1 for n, t in own.items()})
    assert checkpoint.parts["vae"].source == "v.safetensors" and checkpoint.source == "x.safetensors"
    order = ExportOrder(str(path), vae=str(vae), config="sd-turbo-mini")
    assert order.files() == {"checkpoint.safetensors": path, "vae.safetensors": vae}


# --- a build


def test_a_build(whole: dict[str, Tensors], sd: Path, file: Callable[[Tensors], Path], tmp_path: Path) -> None:
    """It is that of the folder with the same weights, it is found again, and another file is another source."""
    path, output = file(whole["sd2"]), tmp_path / "b.bundle"
    order = {"config": "sd-turbo-mini", "size": SIZE, "quiet": True}
    assert build_here(str(path), output, **order, **ON).checks
    bundle, same = Bundle.open(output), Bundle.open(sd)
    assert bundle.manifest.checkpoint.source == "x.safetensors" and bundle.manifest.request["config"] == "sd-turbo-mini"
    found, expected = (load_file(p / "reference.safetensors") for p in (output, sd))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # equal weights elsewhere in memory: other rounding
        apart = 1 if tensor.dtype == torch.uint8 else 1e-4 * max(1.0, float(tensor.abs().max()))
        assert float((found[name].double() - tensor.double()).abs().max()) <= apart, name
    assert bundle.manifest.tokenizers == same.manifest.tokenizers
    assert not list(output.glob("*-checkpoint"))
    other = path.with_name("copy.safetensors")
    shutil.copy(path, tmp_path / "blob")
    other.symlink_to(tmp_path / "blob")  # as the hub's cache has it
    assert build_here(str(other), output, **order, **ON).phases == []
    name = "model.diffusion_model.out.2.bias"
    file(whole["sd2"] | {name: whole["sd2"][name] + 1})
    with pytest.raises(InputError, match=r"files of the source have changed: checkpoint\.safetensors\)"):
        build_here(str(path), output, **order, **ON)


def test_a_folder_of_configs_is_part_of_the_source(
    folders: dict[str, Path], whole: dict[str, Tensors], file: Callable[[Tensors], Path], tmp_path: Path
) -> None:
    path, config = file(whole["sd1"]), tmp_path / "config"
    shutil.copytree(folders["sd1"], config, ignore=shutil.ignore_patterns("*.safetensors"))
    order = ExportOrder(str(path), config=str(config))
    before = order.requested("fp32")
    assert before.config == "a folder" and before.source == "a folder" and str(tmp_path) not in str(before)
    (config / "scheduler/scheduler_config.json").open("a").write("\n")
    after = order.requested("fp32").files
    assert {n for n in after if after[n] != before.files[n]} == {"scheduler/scheduler_config.json"}
    assert components(fetched(path, config)) == components(folders["sd1"])


# --- whose configuration it is


@pytest.mark.parametrize(
    ("preset", "clip", "diffusers_says", "expected"),
    [("sd15", "sd1", "v1", "sd15"), ("sdxl-turbo", "sdxl", "xl_base", "sdxl"), ("sd-turbo", "sd2", "v2", None)],
)
def test_the_guess(preset: str, clip: str, diffusers_says: str, expected: str | None) -> None:
    """At full size, without memory; diffusers tells architectures by other tensors."""
    models = synthetic.models(preset)
    tensors = original_names.checkpoint({c: m.state_dict() for c, m in models.items()}, 2, clip)
    assert infer_diffusers_model_type(tensors) == diffusers_says
    told = {name: ("F16", tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert original.Original(Path("x"), told).guess() == expected
    assert original.Original(Path("x"), told | {"v_pred": ("F32", ())}).guess() is None
    assert expected is None or expected in original.CONFIGS


def test_the_base_of_sd_turbo(tmp_path: Path) -> None:
    """SD 2.1 base differs from it in the scheduler alone."""
    synthetic.write_settings("sd21-base", tmp_path)
    assert synthetic.models("sd21-base")["unet"].config == synthetic.models("sd-turbo")["unet"].config
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_guess_is_said_and_kept(
    file: Callable[[Tensors], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    whole: dict[str, Tensors],
) -> None:
    monkeypatch.setitem(presets.PRESETS, "sd15", presets.PRESETS["sd-turbo-mini"])
    monkeypatch.setattr(original, "_TOLD", {(64, "cond_stage_model.model."): "sd15"})
    path = file(whole["sd2"] | {"model_ema.decay": torch.zeros(())})
    assert ExportOrder(str(path)).requested("fp32") == ExportOrder(str(path), config="sd15").requested("fp32")
    fetched(path, None)
    assert "x.safetensors: --config sd15 is assumed" in caplog.messages[0]
    assert "its EMA weights are not used" in caplog.messages[1]


# --- what is refused


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not re.search(part, n)}


SCALED = "model.diffusion_model.middle_block.1.proj_in"
REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "scaled fp8": (
        lambda own: own | {f"{SCALED}.scale_weight": torch.ones(()), "scaled_fp8": torch.ones(2)},
        r"is quantised, .*\(.*; 2 such in all\)",
    ),
    "4 bits": (
        lambda own: own | {f"{SCALED}.weight": own[f"{SCALED}.weight"].to(torch.uint8)},
        r"stores model\.diffusion_model\.middle_block\.1\.proj_in\.weight as U8, and fp32, fp16",
    ),
    "a missing tensor": (
        without(r"diffusion_model\.middle_block\.1\.norm"),
        r"lacks mid_block\.attentions\.0\.norm\.weight, mid_block\.attentions\.0\.norm\.bias of the unet \(2 in all\)",
    ),
    "a missing tensor of the text encoder": (without(r"resblocks\.0\.ln_1\.bias"), r"of the text_encoder \(1 in all\)"),
    "a missing tensor of the VAE": (without(r"decoder\.mid\.attn_1\.q\.bias"), r"of the vae \(1 in all\)"),
    "another shape": (
        lambda own: own | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)},
        r"in another shape \(conv_in\.weight is \[32, 9, 3, 3\] and should be \[32, 4, 3, 3\]; 1 in all\)",
    ),
    "another UNet": (
        lambda own: own | {"model.diffusion_model.input_blocks.1.1.extra": torch.zeros(1)},
        r"has weights of the unet that the configuration does not have \(down_blocks\.0\.attentions\.0\.extra; 1 in",
    ),
    "no text encoder": (
        without("^cond_stage"),
        r"has no text_encoder in the original names, .*--config .*sd-turbo-mini",
    ),
    "a UNet alone": (without("^(cond|first)"), r"has no text_encoder and no vae in the original names, .*with --unet"),
    "a LoRA that is not fused": (
        lambda own: own | {f"{SCALED}.{name}.weight": torch.ones(4) for name in ("base_layer", "lora_A", "lora_B")},
        r"with a LoRA that is not fused .*proj_in\.base_layer.*; 3 such in all\): .*pipe\.fuse_lora\(\)",
    ),
    "a LoRA alone": (
        lambda own: {f"lora_unet_mid_block_to_k.lora_{end}.weight": torch.ones(4) for end in ("down", "up")},
        r"is a LoRA \(lora_unet_mid_block_to_k\.lora_\w+\.weight; 2 tensors\), .*--lora with this file",
    ),
    "diffusers' names": (
        lambda own: {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)},
        r"has no text_encoder and no unet and no vae",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(
    case: str, folders: dict[str, Path], whole: dict[str, Tensors], file: Callable[[Tensors], Path]
) -> None:
    change, expected = REFUSED[case]
    path = file(change(whole["sd2"]))
    with pytest.raises(InputError, match=expected) as caught:
        fetched(path, folders["sd2"])
    assert "\n" not in str(caught.value)
    assert not list(path.parent.glob("*-checkpoint"))


def test_pickles_are_refused_by_suffix_and_content(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "zip.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    assert zipfile.is_zipfile(tmp_path / "zip.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "x.ckpt")
    for name in ("zip.safetensors", "old.safetensors", "x.ckpt"):
        with pytest.raises(InputError, match=f"{name} is a pickle, and a .safetensors file was expected"):
            find(str(tmp_path / name))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"x\.gguf is a file; a \.safetensors file or a folder"):
        find(str(tmp_path / "x.gguf"))
    (tmp_path / "x.safetensors").write_bytes(b"\x10" + bytes(7) + b"{}")
    with pytest.raises(InputError, match=r"x\.safetensors is damaged"):
        ExportOrder(str(tmp_path / "x.safetensors"), config="sd-turbo").files()


def test_configs_that_cannot_be(file: Callable[[Tensors], Path], tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    path = file({"a": torch.zeros(1)})
    for config, expected in {
        None: r"does not tell its configuration: name it with --config: sd15, sd21, .* or a folder",
        "sd3": r"--config sd3 is no configuration: expected sd15, sd21, .* or a folder",
        str(tmp_path): r"has no model_index\.json",
    }.items():
        with pytest.raises(InputError, match=expected):
            ExportOrder(str(path), config=config).files()
    with pytest.raises(InputError, match=r"--config sd-turbo is for a checkpoint in one file, and .*: leave --config"):
        ExportOrder(str(checkpoints["sd"]), config="sd-turbo").files()


def test_a_file_that_predicts_v(file: Callable[[Tensors], Path]) -> None:
    path = file({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    needed = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    with pytest.raises(InputError, match=re.escape(f"predicts noise: give --scheduler '{json.dumps(needed)}'")):
        ExportOrder(str(path), config="sdxl", scheduler={"_class_name": "DDIMScheduler"}).files()
    assert (
        ExportOrder(str(path), config="sdxl", scheduler=needed).files() == ExportOrder(str(path), config="sd21").files()
    )


def test_a_file_of_playground_is_not_taken_for_sdxl(
    folders: dict[str, Path], whole: dict[str, Tensors], file: Callable[[Tensors], Path]
) -> None:
    """It has SDXL's tensors; only a folder has its scheduler, and how its latents are scaled."""
    path = file(whole["sdxl"] | {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)})
    with safe_open(path, framework="pt") as opened:
        assert infer_diffusers_model_type({name: opened.get_tensor(name) for name in opened.keys()}) == (  # noqa: SIM118
            "playground-v2-5"
        )
    for config in (None, "sdxl"):
        with pytest.raises(InputError, match=r"trained with EDM's noise, .*edm_mean.*: build the model's folder"):
            ExportOrder(str(path), config=config).files()
    assert ExportOrder(str(path), config=str(folders["sdxl"])).files()["checkpoint.safetensors"] == path


def test_a_part_of_another_model(
    folders: dict[str, Path], whole: dict[str, Tensors], file: Callable[[Tensors], Path]
) -> None:
    path, config = file(whole["sd1"]), json.loads((folders["sd2"] / "unet/config.json").read_text())
    with pytest.raises(
        InputError, match=r"in another shape .*: give --unet one with the shapes of the checkpoint's own"
    ):
        find(str(path), "unet").fetch(Want(path.parent, part="unet", part_config=config))


def test_a_unet_with_a_lora_that_is_not_fused(file: Callable[[Tensors], Path]) -> None:
    names = ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    path = file({f"mid_block.to_k.{name}": torch.ones(4) for name in names})
    with pytest.raises(InputError, match=r"with a LoRA that is not fused .*; 3 such in all"):
        find(str(path), "unet").fetch(Want(path.parent, part="unet", part_config={}))


def test_a_part_that_is_not_in_the_file(file: Callable[[Tensors], Path], whole: dict[str, Tensors]) -> None:
    path = file(original_names.prefixed("first_stage_model.", {"encoder.conv_in.bias": torch.zeros(1)}))
    for config, expected in (({}, "has no tensor of a unet"), (None, r"has none for it: give --unet a folder")):
        with pytest.raises(InputError, match=expected):
            find(str(path), "unet").fetch(Want(path.parent, part="unet", part_config=config))


def test_precision_on_disk_is_that_of_the_file(
    folders: dict[str, Path], whole: dict[str, Tensors], file: Callable[[Tensors], Path]
) -> None:
    path = file({n: t.half() for n, t in whole["sd2"].items()})
    made = fetched(path, folders["sd2"], skip=("vae",))
    with safe_open(made / "unet/diffusion_pytorch_model.safetensors", framework="pt") as unet:
        assert {unet.get_slice(n).get_dtype() for n in unet.keys()} == {"F16"}  # noqa: SIM118
    assert components(made) == ["text_encoder", "unet"]


def test_a_variant_is_for_hub_ids_and_folders(
    folders: dict[str, Path], whole: dict[str, Tensors], file: Callable[[Tensors], Path]
) -> None:
    path = file(whole["sd1"])
    for source in (str(path), "demo", "synthetic:sd15-mini"):
        config = "sd15" if source == str(path) else None
        with pytest.raises(InputError, match=r"--variant fp16 is for the weights of a hub id or a folder, and .+ is n"):
            ExportOrder(source, config=config, variant="fp16").files()
        of_part = ExportOrder(source, config=config, variant="fp16", unet=str(folders["sd1"] / "unet"))
        assert of_part.files()
