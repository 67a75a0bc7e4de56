"""Bundles of other schedulers: multistep ones, and those that a pipeline changes, against diffusers' own pictures.

Nothing but the step graph, the tables and the reference depends on the scheduler, so the other graphs are those of the
shared bundle, which has the same weights. Everything else is the export's own work.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import BATCH, ON, SIZE, BundleFactory
from here import Here
from safetensors.numpy import load_file, save_file
from test_parity import PROMPTS, assert_same_picture, load_diffusers, theirs

from turbochain.engines import build
from turbochain.export import bundling
from turbochain.export.order import ExportOrder
from turbochain.export.sources.digests import Digests
from turbochain.runtime import Bundle, Pipeline, VerificationError
from turbochain.runtime.bundle import hashing, strict_json
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE
from turbochain.runtime.errors import PhaseDied

pytestmark = pytest.mark.usefixtures("one_thread")

SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Case:
    """A scheduler in a checkpoint's folder, and the bundle that it gives."""

    cls: str
    options: dict[str, Any]
    K: int
    rows: dict[int, int]  # steps → evaluations of the network
    eta: float = 0.0


CASES = {
    "DPM++ 2M": Case("DPMSolverMultistepScheduler", SD15, 2, {8: 8}),
    "Heun": Case("HeunDiscreteScheduler", SD15, 2, {8: 15}),
    "UniPC": Case("UniPCMultistepScheduler", SD15, 3, {8: 8}),
    "PNDM": Case("PNDMScheduler", {**SD15, "skip_prk_steps": True, "set_alpha_to_one": False}, 4, {8: 9}),
    # What StableDiffusionPipeline changes in its constructor: steps_offset to 1, clip_sample to False.
    "Euler, raw": Case("EulerDiscreteScheduler", {**SD15, "steps_offset": 0, "timestep_spacing": "leading"}, 1, {4: 4}),
    "DDIM, raw": Case("DDIMScheduler", {**SD15, "clip_sample": True, "set_alpha_to_one": False}, 1, {4: 4}),
    # The pipelines give it eta=0.0, and its own default is 0.3.
    "TCD": Case("TCDScheduler", SD15, 1, {4: 4}),
    "TCD, eta 1": Case("TCDScheduler", SD15, 1, {4: 4}, eta=1.0),
}
QUICK = [("sd", "DPM++ 2M"), ("sd", "PNDM")]  # the second has the most tensors, and more evaluations than steps
FULL = [("sd", "UniPC"), ("sd", "Heun"), *(("sdxl", name) for name in ("PNDM", "DPM++ 2M", "UniPC", "Heun"))]
CHANGED = [pytest.param(("sd", "Euler, raw"), marks=pytest.mark.full), ("sd", "DDIM, raw"), ("sd", "TCD")]


def checkpoint_with(case: Case, checkpoint: Path, folder: Path) -> Path:
    """Write a checkpoint that differs by its scheduler alone."""
    shutil.copytree(checkpoint, folder, copy_function=os.link)
    index = json.loads((folder / "model_index.json").read_text())
    for file, value in {
        "model_index.json": {**index, "scheduler": ["diffusers", case.cls]},
        "scheduler/scheduler_config.json": {"_class_name": case.cls, **case.options},
    }.items():
        (folder / file).unlink()  # a link to the shared file
        (folder / file).write_text(json.dumps(value))
    return folder


def export_with(
    steps: Iterable[int], checkpoint: Path, donor: Bundle, batch: int, output: Path, eta: float = 0.0
) -> Bundle:
    """Export a checkpoint, and give the bundle the donor's engine, which is verified when it is first loaded."""
    what: dict[str, Any] = {"tasks": (TEXT_TO_IMAGE,), "sizes": (SIZE,), "batches": (batch,)}
    order = ExportOrder(str(checkpoint), "fp32", steps=tuple(steps), eta=eta, **what)
    folder = output.with_name("partial")
    folder.mkdir()
    bundling.export(Here(0, None, True, []), order, order.requested("fp32"), Digests(), folder, output, True)
    made = Bundle.open(output)
    (engine,) = (e for e in donor.engines().values() if not isinstance(e, Exception))
    graphs = {name: vars(engine.graphs[name]) | {"digest": made.graph_digest(name)} for name in made.manifest.graphs}
    text = json.loads(strict_json.write(engine)) | {"graphs": graphs, "checks": {}, "verified": {}}
    (output / "engines/any").mkdir(parents=True)
    (output / "engines/any/engine.json").write_text(json.dumps(text))
    return made


@pytest.fixture(scope="module")
def made(
    request: pytest.FixtureRequest,
    bundle_of: BundleFactory,
    checkpoints: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A checkpoint and its bundle; the parameter: family and case."""
    (family, name), folder = request.param, tmp_path_factory.mktemp("made")
    checkpoint = checkpoint_with(CASES[name], checkpoints[family], folder / "checkpoint")
    donor = Bundle.open(bundle_of(family))
    case = CASES[name]
    bundle = export_with(case.rows, checkpoint, donor, BATCH[family, "fp32"], folder / "x.bundle", case.eta)
    chain = bundle.open_chain()
    assert chain.chain.K == CASES[name].K
    assert {steps: chain.tables[chain.find(steps)].rows for steps in chain.steps} == CASES[name].rows
    assert chain.chain.defaults.get("eta", 0.0) == CASES[name].eta
    assert ("multistep" in bundle.manifest.requires) == (chain.chain.K > 1)
    return checkpoint, bundle.path


def check(checkpoint: Path, bundle: Path, seeds: range, **more: Any) -> None:
    """Load the bundle, which verifies it, and compare pictures with diffusers' own pipeline on that checkpoint.

    `more`: what diffusers is given, and the bundle has by itself.
    """
    reference = load_diffusers(checkpoint)
    with Pipeline.load(bundle) as pipe:
        chain = pipe.bundle.open_chain()
        for steps in chain.steps:
            for seed in seeds:
                prompt = [PROMPTS[(seed + i) % len(PROMPTS)] for i in range(chain.batch)]
                call = {"prompt": prompt, "num_inference_steps": steps, "seed": seed}
                assert_same_picture(pipe(**call, output_type="uint8").images, theirs(reference, call | more))  # type: ignore[arg-type]
    assert all(c.passed for e in pipe.bundle.engines().values() for c in e.checks[TEXT_TO_IMAGE])  # type: ignore[union-attr]


@pytest.mark.parametrize("made", QUICK, indirect=True, ids=" ".join)
def test_more_than_one_tensor_round_the_loop(made: tuple[Path, Path]) -> None:
    check(*made, seeds=range(1))


@pytest.mark.full
@pytest.mark.parametrize("made", [*QUICK, *FULL], indirect=True, ids=" ".join)
def test_more_than_one_tensor_round_the_loop_with_ten_seeds(made: tuple[Path, Path]) -> None:
    check(*made, seeds=range(10))


@pytest.mark.parametrize("made", CHANGED, indirect=True, ids=" ".join)
def test_a_scheduler_as_the_pipeline_has_it_and_calls_it(made: tuple[Path, Path]) -> None:
    check(*made, seeds=range(2))


@pytest.mark.full
@pytest.mark.parametrize("made", [("sd", "TCD, eta 1")], indirect=True, ids=" ".join)
def test_an_eta_that_is_built_in(made: tuple[Path, Path]) -> None:
    """More noise in each step than without; the picture that was recorded is drawn with it too."""
    check(*made, seeds=range(2), eta=1.0)


@pytest.mark.full
def test_a_build_from_its_beginning(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """With every phase in its own process, as a user builds it."""
    checkpoint = checkpoint_with(CASES["DPM++ 2M"], checkpoints["sd"], tmp_path / "checkpoint")
    bundle = tmp_path / "x.bundle"
    result = build(str(checkpoint), bundle, precision="fp32", size=SIZE, steps=[1, 8], quiet=True, **ON)
    assert all(c.passed for checks in result.checks.values() for c in checks)
    check(checkpoint, bundle, range(3))


def in_row(field: str, row: int, at: tuple[int, ...], factor: float) -> Callable[[dict[str, Any]], None]:
    """Multiply one number of the table of 8 steps."""

    def change(arrays: dict[str, Any]) -> None:
        assert abs(arrays[f"8/{field}"][row][at]) > 1e-3
        arrays[f"8/{field}"][row][at] *= factor

    return change


@pytest.mark.parametrize("made", [("sd", "DPM++ 2M")], indirect=True, ids=" ".join)
def test_a_wrong_number_of_a_table_with_history_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, bundle = made
    file = f"tables/{TEXT_TO_IMAGE}.safetensors"
    changes = {
        "what history adds to the latents": in_row("m", 4, (0, 1), 1.02),
        "what the latents leave in history": in_row("m", 4, (1, 0), 1.02),
        "what the prediction leaves in history": in_row("v", 3, (1,), 0.98),
        "another row's history": lambda arrays: arrays["8/m"].__setitem__(5, arrays["8/m"][1]),
    }
    for i, (what, change) in enumerate(changes.items()):
        copy = Path(shutil.copytree(bundle, tmp_path / f"{i}.bundle"))
        arrays = load_file(copy / file)
        change(arrays)
        save_file(arrays, copy / file)
        manifest = json.loads((copy / "bundle.json").read_text())
        manifest["files"][file] = vars(hashing.describe(copy / file))
        (copy / "bundle.json").write_text(json.dumps(manifest))
        with pytest.raises(VerificationError, match=r"schedule: relative_l2 is .*image: "):
            Pipeline.load(copy)
            pytest.fail(what)


@dataclass
class Dying(Here):
    """Phases of which the first export of a graph dies."""

    def trace(self, **arguments: Any) -> Any:
        raise PhaseDied(arguments["component"])


def test_an_export_goes_on_from_a_copy_of_its_source(
    bundle_of: BundleFactory, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """One that was killed, of a source that is elsewhere by then; what lay there first is not read again."""
    folder, output = tmp_path / "partial", tmp_path / "x.bundle"
    first = shutil.copytree(checkpoints["sd"], tmp_path / "first")
    order = ExportOrder(str(first), "fp32", tasks=(TEXT_TO_IMAGE,), sizes=(SIZE,), steps=(1,))
    folder.mkdir()
    with pytest.raises(PhaseDied):
        bundling.export(Dying(0, None, True, []), order, order.requested("fp32"), Digests(), folder, output, True)
    recorded = (folder / "reference.safetensors").stat()
    second = first.rename(tmp_path / "second")
    order = ExportOrder(str(second), "fp32", tasks=(TEXT_TO_IMAGE,), sizes=(SIZE,), steps=(1,))
    bundling.export(Here(0, None, True, []), order, order.requested("fp32"), Digests(), folder, output, True)
    made = Bundle.open(output)
    made.check_files(full=True)
    assert made.manifest.checkpoint.source == "second" and "first" not in (output / "bundle.json").read_text()
    assert os.path.samestat((output / "reference.safetensors").stat(), recorded)
