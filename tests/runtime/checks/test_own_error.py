"""Bounds that diffusers' own error in a lower precision widens: how they are reckoned, recorded and applied."""

import json
from collections.abc import Callable
from pathlib import Path

import image_calls
import numpy as np
import pytest
import torch
from conftest import SIZE, BundleFactory, reseal
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from turbochain.runtime import Bundle
from turbochain.runtime.checks import bounds, metrics, reference
from turbochain.runtime.checks.verify import verify_bundle

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("evaluations, modes, many", [(4, (), False), (5, (), True), (1, ("guidance",), True)])
def test_which_pictures_are_judged_by_diffusers_own_error(evaluations: int, modes: tuple[str], many: bool) -> None:
    assert bounds.has_many(evaluations, modes) == many


def test_a_bound_of_one_and_a_quarter_times_the_error() -> None:
    """Of a picture with noise of a known size: noise 1.25 times as large has exactly the bound."""
    noise = np.random.default_rng(0).choice([-4, 4], (1, 64, 64, 3))
    grey = np.full(noise.shape, 128, np.uint8)
    own = {"psnr": metrics.psnr((grey + noise).astype(np.uint8), grey), "ssim": 0.96}
    larger = metrics.psnr((grey + noise * 5 // 4).astype(np.uint8), grey)
    found = bounds.of_image("fp16", {"fp16": own, "bf16": {"psnr": 9.0, "ssim": 0.1}})
    assert found["psnr"] == pytest.approx(larger, abs=1e-9) and found["ssim"] == pytest.approx(0.95)
    assert bounds.of_image("fp32", {"fp32": own}) == bounds.of_image("fp32", {})


def test_the_recorded_error_is_that_of_diffusers_in_bf16(
    checkpoints: dict[str, Path], sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs in bf16 that round in other places are up to 1.7 dB apart (six runs of the miniatures)."""
    cases = reference.read(Bundle.open(sd), "text-to-image").cases
    assert [case.errors.get("bf16", {}).keys() for case in cases if "guidance" not in case.modes] == [
        {"relative_l2"},
        set(),
        set(),
        set(),
    ]
    (case,) = [case for case in cases if "guidance" in case.modes]
    pipe = DiffusionPipeline.from_pretrained(checkpoints["sd"], torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, dtype=None, **more: draw(*a, **more).to(dtype))  # the same noise
    scale = float(case.tensors["guidance_scale"][0])
    call = {"prompt": case.prompt, "num_inference_steps": 1, "guidance_scale": scale, "seed": case.seed}
    made: list[torch.Tensor] = []
    pipe.unet.register_forward_hook(lambda module, arguments, found: made.append(found[0].float()))
    image = image_calls.theirs(pipe, call, height=SIZE[1], width=SIZE[0])
    assert case.errors["bf16"]["psnr"] == pytest.approx(metrics.psnr(image, case.tensors["image"]), abs=3)
    right = np.concatenate([case.tensors["negative_prediction"][0], case.tensors["prediction"][0]])
    error = metrics.relative_l2(made[0].numpy(), right)
    assert case.errors["bf16"]["relative_l2"] == pytest.approx(error, rel=0.4)


@pytest.mark.parametrize(
    ("precision", "own", "bound"),
    [
        ("bf16", {"bf16": 0.04}, 0.05),
        ("bf16", {"bf16": 0.01}, 0.018),
        ("bf16", {"fp16": 0.04}, 0.018),
        ("fp16", {"fp16": 0.04}, 0.05),
        ("fp32", {"fp32": 0.04}, 1e-4),
    ],
)
def test_a_prediction_may_be_as_wrong_as_diffusers_own(precision: str, own: dict[str, float], bound: float) -> None:
    assert bounds.of_stage(precision, "prediction", "", own) == {"relative_l2": pytest.approx(bound)}
    assert bounds.of_stage(precision, "residuals", "", own) == bounds.of_stage(precision, "residuals", "")


def test_the_largest_error_of_any_recorded_prediction_counts() -> None:
    cases = [
        {},
        {"bf16": {"relative_l2": 0.02}},
        {"bf16": {"relative_l2": 0.03, "psnr": 40.0}},
        {"fp16": {"psnr": 9.0}},
    ]
    assert bounds.own_of_predictions(cases) == {"bf16": 0.03, "fp16": 0.0}


@pytest.mark.parametrize(("amplitude", "passes"), [(4, True), (6, False)])
def test_a_picture_may_be_as_wrong_as_diffusers_own_in_that_precision(
    bundle_of: BundleFactory, copy_of: Callable[[Path], Path], amplitude: int, passes: bool
) -> None:
    """And a quarter more; few evaluations may have 38 dB."""
    copy = copy_of(bundle_of("sd", "fp16"))
    cases = reference.read(Bundle.open(copy), "text-to-image").cases
    (i,) = [i for i, case in enumerate(cases) if "guidance" in case.modes]
    file = copy / "reference.safetensors"
    tensors, image = load_file(file), cases[i].tensors["image"]
    noise = np.random.default_rng(0).choice([-amplitude, amplitude], image.shape)
    changed = np.clip(image.astype(int) + noise, 0, 255).astype(np.uint8)
    with safe_open(file, framework="numpy") as opened:
        told = json.loads(opened.metadata()["cases"])
    told[i]["errors"] = {"fp16": {"psnr": 36.5, "ssim": 0.1}}
    assert metrics.psnr(changed, image) < 38 and (metrics.psnr(changed, image) > 36.5 - 1.94) == passes
    save_file({**tensors, f"{i}/image": changed}, file, metadata={"cases": json.dumps(told)})
    reseal(copy)
    _, checks = verify_bundle(copy)
    assert {c.passed for c in checks["text-to-image"] if (c.stage, c.metric) == ("image", "psnr")} == {passes}
