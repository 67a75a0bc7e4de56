"""`verify` passes what is right and refuses what is wrong, and says which stage and by how much."""

import functools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAMILIES, BundleFactory, called, reseal
from safetensors.numpy import load_file
from skimage.metrics import peak_signal_noise_ratio
from wrong_bundles import (
    MUTATIONS,
    TABLES,
    Arrays,
    Change,
    Copy,
    channels_swapped,
    coefficients_exchanged,
    floor_for_round,
    in_graph,
    in_reference,
    in_rows,
    in_tables,
    not_a_number,
    predictions_exchanged,
    scaled,
)

from turbochain.runtime import Bundle, BundleError, Pipeline, VerificationError, selection
from turbochain.runtime.backends.contract import Executor
from turbochain.runtime.bundle import hashing
from turbochain.runtime.bundle.manifest import Check
from turbochain.runtime.checks import reference, verify

Loaded = tuple[Bundle, Executor]


def checks_of(path: Path, loaded: Loaded | None = None) -> list[Check]:
    """Everything hashed, then every figure; by the executor `loaded` if it has the very graphs of the bundle."""
    bundle = Bundle.open(path)
    bundle.check_files(full=True)
    chain = bundle.open_chain()
    found = selection.select(chain)
    if loaded and all(loaded[0].graph_digest(graph) == bundle.graph_digest(graph) for graph in chain.graphs):
        return verify.verify(chain, loaded[1], verify.precisions(chain, found))
    executor = selection.open_executor(bundle, found)
    try:
        executor.load(chain.graphs)
        return verify.verify(chain, executor, verify.precisions(chain, found))
    finally:
        executor.close()


@pytest.fixture(scope="module")
def loaded(bundle_of: BundleFactory) -> Iterator[Callable[[str], Loaded]]:
    """A family → its bundle, and an executor with the graphs of text-to-image, which most changes leave as they are."""
    with ExitStack() as stack:

        @functools.cache
        def load(family: str) -> Loaded:
            bundle = Bundle.open(bundle_of(family))
            chain = bundle.open_chain()
            executor = selection.open_executor(bundle, selection.select(chain))
            stack.callback(executor.close)
            executor.load(chain.graphs)
            return bundle, executor

        yield load


def failed(checks: list[Check]) -> set[str]:
    return {c.stage for c in checks if not c.passed}


FEW = (("2", []), ("1", ["guidance"]))
"""Table and modes of two cases that run every graph of text-to-image, one of them with a row after the first."""


@pytest.fixture
def few(request: pytest.FixtureRequest, copy_of: Copy) -> Callable[[str], Path]:
    """A family → a copy of its bundle with the cases `FEW` alone, which are verified in half the time."""

    def rename(_: Arrays, cases: list[dict[str, Any]]) -> None:
        others = [case for case in cases if (case["table"], case["modes"]) not in FEW]
        assert len(others) == len(cases) - len(FEW)
        for case in others:
            case["chain"] = "another"

    def make(family: str) -> Path:
        path = copy_of(request.getfixturevalue(family))
        in_reference(path, rename)
        return path

    return make


LIKE_OTHERS = dict.fromkeys(("timestep - 1", "w = 0", "pooled embeds zeroed"), pytest.mark.full)


@pytest.mark.parametrize("name", [pytest.param(name, marks=LIKE_OTHERS.get(name, ())) for name in MUTATIONS])
def test_what_is_wrong_is_refused_by_name(
    name: str, checkpoints: dict[str, Path], few: Callable[[str], Path], loaded: Callable[[str], Loaded]
) -> None:
    family, change, stages_hit = MUTATIONS[name]
    path = few(family)
    change(path, checkpoints[family])
    reseal(path)
    checks = checks_of(path, loaded(family))
    assert failed(checks) == stages_hit
    with pytest.raises(VerificationError) as error:
        verify.require(checks)
    assert all(f"{stage}: " in str(error.value) for stage in stages_hit)


@pytest.mark.parametrize("change", [None, coefficients_exchanged, predictions_exchanged])
def test_a_guided_step_that_was_not_recorded_is_checked(
    change: Callable[[Any], None] | None, few: Callable[[str], Path], loaded: Callable[[str], Loaded]
) -> None:
    """As that of a further size, whose one case has no guidance."""
    path = few("sdxl")
    in_reference(path, lambda _, cases: [c.update(chain="another") for c in cases if c["modes"]])
    if change:
        in_graph("step+guidance", change)(path)
        reseal(path)
    checks = checks_of(path, loaded("sdxl"))
    assert failed(checks) == ({"step+guidance"} if change else set())
    assert "step+guidance" in {check.stage for check in checks}


def only_an_excerpt(arrays: Arrays, cases: list[dict[str, Any]]) -> None:
    """Leave of text-to-image the call of four steps, as it is recorded of a further size: two rows of the loop, and
    what the last one leaves."""
    (i,) = (i for i, case in enumerate(cases) if case["table"] == "4" and case["chain"] == "text-to-image")
    for case in cases[:i] + cases[i + 1 :]:
        case["chain"] = "another"
    left = np.stack([arrays[f"{i}/latents"][2], arrays[f"{i}/next_latents"][0]])
    arrays |= {f"{i}/{name}": arrays[f"{i}/{name}"][:2] for name in ("latents", "prediction")}
    arrays[f"{i}/next_latents"] = left


@pytest.mark.parametrize(
    ("change", "stages_hit"),
    [
        (None, set()),
        (in_rows("v", lambda row: row * 0.99, at_step=1), {"schedule", "step", "image"}),
        (in_rows("v", lambda row: row * 0.99, at_step=2), {"image"}),  # of a row that was not recorded
        (in_graph("vae_decoder", floor_for_round), {"vae_decoder", "image"}),
        (in_graph("unet", not_a_number), {"unet", "image"}),
    ],
)
def test_an_excerpt_of_a_call(
    change: Change | None, stages_hit: set[str], sd: Path, copy_of: Copy, loaded: Callable[[str], Loaded]
) -> None:
    path = copy_of(sd)
    in_reference(path, only_an_excerpt)
    if change:
        change(path, Path())
        reseal(path)
    checks = checks_of(path, loaded("sd"))
    assert failed(checks) == stages_hit
    assert {"text_encoder", "unet", "step", "step+guidance", "vae_decoder", "image"} <= {c.stage for c in checks}


def test_a_figure_above_its_bound_is_shown_though_a_larger_one_is_allowed(
    few: Callable[[str], Path], loaded: Callable[[str], Loaded]
) -> None:
    """A step may be off by 1e-4, and a column of the time by 1e-5."""
    path = few("sd")
    scaled("m", 1 + 5e-5)(path, Path())
    reseal(path)
    assert "schedule" not in failed(checks_of(path, loaded("sd")))
    scaled("columns/time_projections", 1 + 2e-5)(path, Path())
    reseal(path)
    (check,) = (c for c in checks_of(path, loaded("sd")) if c.stage == "schedule")
    assert not check.passed and check.value == pytest.approx(2e-5, rel=0.1) and check.bound == 1e-5


def test_one_token_id_that_differs_is_refused(few: Callable[[str], Path], loaded: Callable[[str], Loaded]) -> None:
    path = few("sd")
    in_reference(path, lambda arrays, _: arrays["1/input_ids"].__setitem__((0, 1), 0))
    assert "ids" in failed(checks_of(path, loaded("sd")))


def test_a_reference_without_a_case_verifies_nothing(sd: Path, copy_of: Copy) -> None:
    path = copy_of(sd)
    in_reference(path, lambda _, cases: [case.update(chain="another") for case in cases])
    with pytest.raises(BundleError, match="has no case of the chain text-to-image to check against"):
        checks_of(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resealed_copy_passes(family: str, few: Callable[[str], Path]) -> None:
    """So it is the change that the tests above refuse."""
    path = few(family)
    in_graph("vae_decoder", lambda graph: None)(path)
    in_tables(lambda arrays, _: None)(path, Path())
    reseal(path)
    verify.require(checks_of(path))


def test_the_figure_of_several_pictures_is_that_of_the_worst(bundle_of: BundleFactory) -> None:
    path = bundle_of("sd", "fp16")
    (shown,) = (c for c in checks_of(path) if (c.stage, c.metric) == ("image", "psnr"))
    found = []
    with Pipeline.load(path) as pipe:
        for case in reference.read(pipe.bundle, "text-to-image").cases:
            steps = pipe.bundle.open_chain().chain.tables[case.table].steps
            scale = float(case.tensors["guidance_scale"][0]) if case.modes else 0.0
            call = {"prompt": case.prompt, "seed": case.seed, "num_inference_steps": steps, "guidance_scale": scale}
            picture = pipe(**call, output_type="uint8").images
            found.append(peak_signal_noise_ratio(case.tensors["image"], picture, data_range=255))
    assert shown.value == pytest.approx(min(found), rel=1e-6) and max(found) > min(found) + 0.1


def test_the_command_fails_with_stage_figure_and_bound(sd: Path, copy_of: Copy) -> None:
    path = copy_of(sd)
    in_graph("vae_decoder", channels_swapped)(path)
    reseal(path)
    reference = load_file(sd / "reference.safetensors")
    first = [k for k in reference if k.endswith("/image") and k.replace("image", "start_noise") not in reference]
    pictures = [reference[name].astype(float) for name in first]  # of the first chain, which is told first
    expected = max(np.abs(p - p[..., ::-1]).max() for p in pictures)

    done = called("turbochain", "verify", path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(r"^vae_decoder +max_abs .* FAILED$", done.stdout, re.M)
    figure = re.search(r"vae_decoder: max_abs is ([\d.e+]+), the bound is ≤ 1;", done.stderr)
    assert figure and abs(float(figure[1]) - expected) <= 1

    done = called("turbochain", "verify", path, "--json")
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer["passed"] is False
    for chain in ("text-to-image", "image-to-image"):
        assert {c["stage"] for c in answer["checks"][chain] if not c["passed"]} == {"vae_decoder", "image"}
    assert "vae_decoder" in done.stderr


@pytest.mark.parametrize("name", ["graphs/unet.fp32-0.data", "reference.safetensors", TABLES])
def test_a_flipped_bit_is_bad_input_not_a_wrong_result(sd: Path, copy_of: Copy, name: str) -> None:
    file = copy_of(sd) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = called("turbochain", "verify", file.parents[name.count("/")])
    assert done.returncode == 2
    assert name in done.stderr


def test_a_verification_asks_no_stamp(sd: Path, copy_of: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stamp that lies about a large file shows who is asked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "SETTLED", 0)  # a stamp need not wait for the file to be two seconds old
    path = copy_of(sd)
    with (path / "large").open("wb") as file:
        file.truncate(hashing.CHUNK + 1)
    record, lie = hashing.describe(path / "large"), "f" * 64
    hashing.check(path, "large", record, full=False)
    (stamp,) = (tmp_path / "cache/turbochain/hashes").iterdir()
    stamp.write_text(stamp.read_text().replace(record.sha256, lie))
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["files"]["large"] = {"size": record.size, "sha256": lie}
    (path / "bundle.json").write_text(json.dumps(manifest))
    Bundle.open(path).check_files()
    with pytest.raises(BundleError, match="'large' is damaged"):
        verify.verify_bundle(path)
