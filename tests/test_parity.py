"""The same picture as diffusers, made in a process that has no torch."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import interrupted
import numpy as np
import pytest
import torch
from conftest import BATCH, HALF, ON, SIZE, BundleFactory
from diffusers import DiffusionPipeline
from here import build_here
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

Call = dict[str, Any]  # arguments of Pipeline.__call__ as JSON values
Pictures = np.ndarray[Any, Any]  # [N, H, W, 3] uint8

SEEDS = (0, 1, 42, 1234, 2**31, 2**32 - 1, 2**32, 10**15 + 7, 2**63, 2**64 - 1)
STEPS = (1, 2, 3, 4)
PROMPTS = (
    "a photo of a cat wearing a red hat, studio light",
    "",
    "рыжий кот на подоконнике, мягкий свет",
    "窓辺に座っている小さな猫の写真",
    "قطة صغيرة على النافذة",
    "खिड़की पर बैठी एक छोटी बिल्ली",
    "cat 🐈 family 👨‍👩‍👧‍👦 flag 🇮🇸 robot 🤖",
    "an extraordinarily detailed oil painting of a lighthouse on a cliff at dusk, " * 8,
    "一只橘猫坐在窗台上柔和的傍晚光线" * 12,
    "!!! <|endoftext|> a!b  Ångström\n\ttabs",
)

OURS = """
import json, sys
from pathlib import Path
import numpy as np
from turbochain.runtime import Pipeline

bundle, calls, result = sys.argv[1:]
pictures = {}
with Pipeline.load(bundle) as pipe:
    for name, call in json.loads(Path(calls).read_text()).items():
        if "latents" in call:
            call["latents"] = np.array(call["latents"], np.float32)
        pictures[name] = pipe(**call, guidance_scale=0.0, output_type="uint8").images
np.savez(result, **pictures)
banned = {"torch", "diffusers", "transformers", "onnx", "turbochain.export"}
assert not banned & set(sys.modules), banned & set(sys.modules)
"""


def ours(bundle: Path, calls: dict[str, Call], folder: Path) -> dict[str, Pictures]:
    """Name of a call → pictures, made in a process of its own."""
    question, answer = folder / "calls.json", folder / "pictures.npz"
    question.write_text(json.dumps(calls))
    line = [sys.executable, "-c", OURS, str(bundle), str(question), str(answer)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with np.load(answer) as file:
        return dict(file)


def theirs(pipe: Any, call: Call, size: tuple[int, int] = SIZE) -> Pictures:
    """What diffusers' pipeline makes of the same call; `size` is width, height."""
    arguments = dict(call)
    seed = arguments.pop("seed")
    generators = [torch.Generator("cpu").manual_seed(s) for s in (seed if isinstance(seed, list) else [seed])]
    if "latents" in arguments:
        arguments["latents"] = torch.tensor(arguments["latents"], dtype=torch.float32)
    result = pipe(
        **arguments,
        generator=generators if isinstance(seed, list) else generators[0],
        guidance_scale=0.0,
        height=size[1],
        width=size[0],
    )
    return np.stack([np.asarray(picture) for picture in result.images])


def load_diffusers(checkpoint: Path, variant: str | None = None) -> Any:
    """diffusers' own pipeline in fp32, from weight files of this variant."""
    where = {"variant": variant, "torch_dtype": torch.float32, "local_files_only": True}
    pipe = DiffusionPipeline.from_pretrained(checkpoint, **where)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same_picture(result: Pictures, reference: Pictures) -> None:
    """DESIGN.md's bound for fp32: at most 1 level, and at most 0.1% of a picture's values."""
    assert result.dtype == np.uint8
    assert result.shape == reference.shape
    difference = np.abs(result.astype(int) - reference)
    assert difference.max() <= 1
    assert max((d > 0).mean() for d in difference) <= 1e-3


pytestmark = pytest.mark.usefixtures("one_thread")


def _prompts(first: int, count: int) -> list[str]:
    return [PROMPTS[(first + i) % len(PROMPTS)] for i in range(count)]


def _grid(chain: "Chain", steps: int) -> dict[str, Call]:
    """Calls of one batch with all seeds, one for each picture; every prompt meets another seed in every step count.

    With three of them in step counts that are neither the least nor the most, and of bundles that are not the shared
    ones.
    """
    batch, ends = chain.batch, (min(STEPS), max(STEPS))
    count = len(SEEDS) if chain.made == "shared" and steps in ends else 3  # pictures, at least
    seeds = [[SEEDS[(i + j) % len(SEEDS)] for j in range(batch)] for i in range(0, count, batch)]
    return {
        f"{steps} steps, seeds {of}": {
            "prompt": _prompts(i * batch + steps, batch),
            "num_inference_steps": steps,
            "seed": of if batch > 1 else of[0],
        }
        for i, of in enumerate(seeds)
    }


def _arguments(size: tuple[int, int] = SIZE) -> dict[str, Call]:
    """Each argument that decides which noise a picture gets; four or five pictures, so that bundles of 1 and 3 loop."""
    latents = np.random.default_rng(0).standard_normal((5, 4, size[1] // 8, size[0] // 8)).astype(np.float32)
    five = {"prompt": _prompts(0, 5), "num_inference_steps": 2}
    return {
        "one generator for all": {**five, "seed": 3},
        "one generator each": {**five, "seed": [3, 0, 2**64 - 1, 3, 8]},
        "latents": {**five, "seed": 3, "latents": latents.tolist()},
        "latents, one generator each": {**five, "seed": [1, 2, 3, 4, 5], "latents": latents.tolist()},
        "two per prompt": {**five, "prompt": _prompts(5, 2), "num_images_per_prompt": 2, "seed": 3},
        "two per prompt, one generator each": {
            **five,
            "prompt": _prompts(5, 2),
            "num_images_per_prompt": 2,
            "seed": [9, 8, 7, 6],
        },
        "a prompt that is no list": {**five, "prompt": PROMPTS[0], "num_images_per_prompt": 4, "seed": 3},
    }


@dataclass(frozen=True)
class Chain:
    """A bundle and the pipeline that it stands for."""

    family: str
    batch: int
    size: tuple[int, int] = SIZE  # width, height
    made: Literal["shared", "interrupted", "own"] = "shared"


# Each family in both batches: two of them are the shared bundles, two are of other checkpoints (`write_source`) and of
# another size.
CHAINS = {
    "sd-1": Chain("sd", 1),
    "sd-3-v_prediction": Chain("sd", 3, interrupted.SIZE, "interrupted"),
    "sdxl-1-v_prediction": Chain("sdxl", 1, interrupted.SIZE, "own"),
    "sdxl-3": Chain("sdxl", 3),
}
FULL = {"sdxl-1-v_prediction": pytest.mark.full}


@dataclass(frozen=True)
class Made:
    """Every picture of a bundle, made in one process, and diffusers' pipeline."""

    chain: Chain
    pictures: dict[str, Pictures]
    pipe: Any

    def check(self, name: str, call: Call) -> None:
        assert_same_picture(self.pictures[name], theirs(self.pipe, call, self.chain.size))


@pytest.fixture(scope="module", params=[pytest.param(name, marks=FULL.get(name, ())) for name in CHAINS])
def made(
    request: pytest.FixtureRequest,
    bundle_of: BundleFactory,
    checkpoints: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    chain, folder = CHAINS[request.param], tmp_path_factory.mktemp("ours")
    match chain.made:
        case "shared":
            checkpoint, bundle = checkpoints[chain.family], bundle_of(chain.family)
            assert BATCH[chain.family, "fp32"] == chain.batch
        case "interrupted":
            checkpoint = request.getfixturevalue("interrupted")
            bundle = checkpoint / "x.bundle"
        case "own":
            checkpoint, bundle = folder / "checkpoint", folder / "own.bundle"
            interrupted.write_source(checkpoints[chain.family], checkpoint)
            shape: dict[str, Any] = {"size": chain.size, "batch": chain.batch, "tasks": ["text-to-image"]}
            build_here(str(checkpoint), bundle, precision="fp32", quiet=True, **shape, **ON)
    calls = _arguments(chain.size)
    for steps in STEPS:
        calls |= _grid(chain, steps)
    variant = None if chain.made == "shared" else "fp16"
    return Made(chain, ours(bundle, calls, folder), load_diffusers(checkpoint, variant))


@pytest.mark.parametrize("steps", STEPS)
def test_every_seed_gives_diffusers_picture(made: Made, steps: int) -> None:
    for name, call in _grid(made.chain, steps).items():
        made.check(name, call)


@pytest.mark.parametrize("name", _arguments())
def test_arguments_mean_what_they_mean_in_diffusers(made: Made, name: str) -> None:
    made.check(name, _arguments(made.chain.size)[name])


@pytest.mark.parametrize("family", HALF)
def test_fp16_is_within_its_bounds(
    family: str, bundle_of: BundleFactory, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    every = range(len(PROMPTS))
    calls = {
        f"{steps} steps, seed {seed}": {"prompt": PROMPTS[seed], "num_inference_steps": steps, "seed": seed}
        for steps, seeds in {1: every, 4: every[::3]}.items()
        for seed in seeds
    }
    pictures, pipe = ours(bundle_of(family, "fp16"), calls, tmp_path), load_diffusers(checkpoints[family])
    for name, call in calls.items():
        (result,), (reference,) = pictures[name], theirs(pipe, call)
        assert peak_signal_noise_ratio(reference, result, data_range=255) >= 38
        assert structural_similarity(reference, result, data_range=255, channel_axis=-1) >= 0.98
