"""The bounds of a verification are those that checks/README.md states, and good bundles keep them."""

import json
import re
from typing import Any

import pytest
from conftest import ROOT, BundleFactory, called

from turbochain.runtime import Bundle, VerificationError
from turbochain.runtime.bundle.manifest import Check, Graph
from turbochain.runtime.checks import bounds, verify


@pytest.mark.parametrize(
    ("family", "precision"),
    [("sd", "fp32"), ("sd", "fp16"), *(pytest.param("sdxl", of, marks=pytest.mark.full) for of in ("fp32", "fp16"))],
)
def test_good_bundles_pass_every_bound_of_the_design(family: str, precision: str, bundle_of: BundleFactory) -> None:
    path = bundle_of(family, precision)
    done = called("turbochain", "verify", path, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["passed"] is True
    assert [*answer["checks"]] == ["text-to-image", "image-to-image"]
    for chain, checks in answer["checks"].items():
        assert all(c["passed"] for c in checks)
        _assert_bounds(Bundle.open(path).open_chain(chain).graphs, checks, precision)


def _assert_bounds(graphs: dict[str, Graph], checks: list[dict[str, Any]], precision: str) -> None:
    bounds = {(c["stage"], c["metric"]): c["bound"] for c in checks}
    assert {stage for stage, _ in bounds} == {*graphs, "ids", "schedule", "image"}
    text = {"max_abs": 1e-3} if precision == "fp32" else {"cosine": 0.9999}
    assert {m: b for (s, m), b in bounds.items() if s == "text_encoder"} == text
    assert bounds["unet", "relative_l2"] == {"fp32": 1e-4, "fp16": 1e-2}[precision]
    for sampler in {"step", "step+guidance", "start"} & {*graphs}:
        assert bounds[sampler, "relative_l2"] == 1e-4 and graphs[sampler].precision == "fp32"
    if "vae_encoder" in graphs:
        latents = {"fp32": 1e-4, "fp16": 1e-2}[graphs["vae_encoder"].precision]
        assert bounds["vae_encoder", "relative_l2"] == latents
    same = {"max_abs": 1, "fraction_differing": 1e-3}
    decoder = same if graphs["vae_decoder"].precision == "fp32" else {"psnr": 45}
    assert {m: b for (s, m), b in bounds.items() if s == "vae_decoder"} == decoder
    image = same if precision == "fp32" else {"psnr": 38, "ssim": 0.98}
    assert {m: b for (s, m), b in bounds.items() if s == "image"} == image


PAGE = (ROOT / "runtime/checks/README.md").read_text()
NUMBER = re.compile(r"([≤≥]) ([\d.e-]+)(%?)")


def test_the_bounds_are_those_of_the_page() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")]
    start = rows.index(["", "fp32", "fp16", "bf16"]) + 2
    for what, fp32, fp16, last in rows[start : start + 5]:
        bf16, _, int8 = last.partition("int8")
        said = {"fp32": fp32, "fp16": fp16, "bf16": fp16 if bf16.startswith("the same") else bf16, "int8": int8}
        for precision, text in said.items():
            stated = [(sign, float(number) / (100 if part else 1)) for sign, number, part in NUMBER.findall(text)]
            for kind in what.split(" of ")[0].split(", "):
                held = bounds.BOUNDS[precision].get(kind, {}).items()
                assert stated == [("≥" if m in bounds.AT_LEAST else "≤", b) for m, b in held], (kind, precision)
    (tiny,) = re.findall(r"AutoencoderTiny ([\d.]+)\)", PAGE)
    for precision, held in bounds.BOUNDS.items():
        own = {"psnr": float(tiny)} if precision == "bf16" else held["picture"]
        assert bounds.of_stage(precision, "picture", "AutoencoderTiny") == own
        assert bounds.of_stage(precision, "picture", "AutoencoderKL") == held["picture"]
    _, state, *others = rows[start + 5]
    assert [float(number) for _, number, _ in NUMBER.findall(state)] == [
        *bounds.STATE.values(),
        *bounds.COLUMN.values(),
    ]
    assert others == ["the same"] * 2 and bounds.of_stage("bf16", "state", "") == bounds.STATE


def test_a_figure_that_is_too_low_is_shown_as_such() -> None:
    checks = [Check("image", "psnr", 20.0, 38.0, False), Check("unet", "relative_l2", 0.5, 1e-2, False)]
    near = [Check("a", "cosine", 0.99986, 0.9999, False), Check("a", "max_abs", 1.0000001, 1.0, False)]
    assert [verify.value_text(check) for check in near] == ["0.99986", "1.0000001"]
    with pytest.raises(VerificationError) as caught:
        verify.require(checks)
    assert "image: psnr is 20, the bound is ≥ 38; unet: relative_l2 is 0.5, the bound is ≤ 0.01" in str(caught.value)
