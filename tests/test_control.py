"""ControlNets and T2I-Adapters: pictures against diffusers' own pipelines."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import control_nets
import cv2
import diffusers
import numpy as np
import openvino_engine
import pytest
import torch
from conftest import SIZE, BundleFactory, called
from image_calls import Apart, assert_same, compared, ours, picture, prompts, theirs
from PIL import Image
from test_conformance import KINDS, conform_in_each_way

from turbochain.export import jobs
from turbochain.export.controls import KINDS as KINDS_OF_CONTROL
from turbochain.export.controls import Controls, t2i_adapter
from turbochain.export.controls.kind import Control
from turbochain.export.families import Shape, lcm
from turbochain.export.families import sd as sd_family
from turbochain.export.order import ExportOrder
from turbochain.runtime import InputError, Pipeline
from turbochain.runtime.bundle.manifest import Engine
from turbochain.runtime.checks import metrics

pytestmark = pytest.mark.usefixtures("one_thread")

Call = dict[str, Any]

PIPELINES = {
    ("sd", "plain"): "StableDiffusionPipeline",
    ("sd", "controlnet"): "StableDiffusionControlNetPipeline",
    ("sd", "controlnet of an image"): "StableDiffusionControlNetImg2ImgPipeline",
    ("sd", "adapter"): "StableDiffusionAdapterPipeline",
    ("sdxl", "plain"): "StableDiffusionXLPipeline",
    ("sdxl", "controlnet"): "StableDiffusionXLControlNetPipeline",
    ("sdxl", "controlnet of an image"): "StableDiffusionXLControlNetImg2ImgPipeline",
    ("sdxl", "adapter"): "StableDiffusionXLAdapterPipeline",
}


@dataclass
class Made:
    """A bundle's pipeline, and diffusers' own of the same checkpoint."""

    family: str
    ours: Pipeline
    checkpoint: Path
    nets: dict[str, Path]  # name → folder
    _theirs: dict[tuple[str, str], Any] = field(default_factory=dict)

    def theirs(self, kind: str, net: str = "canny") -> Any:
        """Diffusers' pipeline with one of the networks."""
        if (kind, net) not in self._theirs:
            cls = diffusers.T2IAdapter if kind == "adapter" else diffusers.ControlNetModel
            given = {kind.split()[0]: cls.from_pretrained(self.nets[net])} if kind != "plain" else {}
            options = {"safety_checker": None, "requires_safety_checker": False} if self.family == "sd" else {}
            known = next(iter(self._theirs.values())).components if self._theirs else {}
            kept = {n: known[n] for n in ("unet", "vae", "text_encoder", "text_encoder_2") if n in known}
            named = getattr(diffusers, PIPELINES[self.family, kind])
            made = named.from_pretrained(self.checkpoint, local_files_only=True, **kept, **given, **options)
            made.set_progress_bar_config(disable=True)
            self._theirs[kind, net] = made
        return self._theirs[kind, net]

    def add(self, apart: Apart, call: Call, net: str = "canny") -> None:
        """Draw a call of a ControlNet with both."""
        kind = "controlnet of an image" if "image" in call else "controlnet"
        other = {**call, **({"image": call["control_image"]} if kind == "controlnet" else {})}
        other = {n: v for n, v in other.items() if n != "controlnet" and (n != "control_image" or "image" in call)}
        apart.add(ours(self.ours, {**call, "controlnet": net}), theirs(self.theirs(kind, net), other))


def make(family: str, checkpoint: Path, folder: Path, **how: Any) -> Made:
    """Build and open a bundle; see `control_nets.build`."""
    nets = control_nets.build(family, checkpoint, folder, **how)
    return Made(family, Pipeline.load(folder / "made.bundle"), checkpoint, nets)


@pytest.fixture(scope="module")
def sd(checkpoints: dict[str, Path], controlled: Path) -> Iterator[Made]:
    nets = {name: controlled.with_name(name) for name in ("canny", "sketch")}
    with Pipeline.load(controlled) as pipe:
        yield Made("sd", pipe, checkpoints["sd"], nets)


CALL: Call = {"prompt": "a cat", "num_inference_steps": 2, "seed": 3}


def test_text_to_image_and_image_to_image(sd: Made) -> None:
    """With and without guidance, in all steps and in some."""
    calls: list[Call] = [
        {"controlnet_conditioning_scale": 1.0},
        {"guidance_scale": 5.0, "negative_prompt": "blurry", "control_guidance_end": 0.5},
        {"image": picture(4), "strength": 1.0, "guidance_scale": 3.0},
    ]
    with compared() as apart:
        for i, call in enumerate(calls):
            sd.add(apart, {**CALL, "control_image": picture(i), **call})


def test_without_a_control_image_it_is_the_plain_pipeline(sd: Made) -> None:
    """Before and after a call with one, which leaves its residuals behind; scale 0 is the same picture."""
    with compared() as apart:
        reference = theirs(sd.theirs("plain"), {**CALL, "height": SIZE[1], "width": SIZE[0]})
        apart.add(before := ours(sd.ours, CALL), reference)
        steered = ours(sd.ours, {**CALL, "control_image": picture(1), "controlnet": "canny"})
        np.testing.assert_array_equal(ours(sd.ours, CALL), before)
        none = {"control_image": picture(1), "controlnet": "canny", "controlnet_conditioning_scale": 0}
        apart.add(ours(sd.ours, {**CALL, **none}), reference)
    assert np.abs(steered.astype(int) - before).mean() > 5


@pytest.mark.full
def test_openvino_is_steered_and_then_draws_the_plain_picture(sd: Made, tmp_path: Path) -> None:
    """Nothing of a call with a control image is left for the next one."""
    steered = {**CALL, "control_image": picture(1), "controlnet": "canny"}
    with Pipeline.load(openvino_engine.copied(sd.ours.bundle.path, tmp_path), threads=1) as pipe, compared() as apart:
        first, other, second, none = (
            ours(pipe, call) for call in (CALL, steered, CALL, {**steered, "controlnet_conditioning_scale": 0.0})
        )
        np.testing.assert_array_equal(second, first)
        apart.add(none, first)
        apart.add(first, ours(sd.ours, CALL))
        apart.add(other, theirs(sd.theirs("controlnet"), {**CALL, "image": picture(1)}))
    assert np.abs(other.astype(int) - first).mean() > 5


def test_t2i_adapter(sd: Made) -> None:
    call = {**CALL, "guidance_scale": 2.0}
    mine = ours(sd.ours, {**call, "control_image": picture(1), "t2i_adapter": "sketch"})
    assert_same(mine, theirs(sd.theirs("adapter", "sketch"), {**call, "image": picture(1)}))
    assert np.abs(mine.astype(int) - ours(sd.ours, call)).mean() > 5


def test_the_cache_and_the_pass(sd: Made) -> None:
    """The picture's embedding is made once; a call of several pictures pairs them with prompts as diffusers does."""
    ran: list[str] = []
    call = {**CALL, "control_image": picture(21), "controlnet": "canny"}
    for more in ({}, {"controlnet_conditioning_scale": 0.5}, {"control_guidance_start": 0.4}, {"seed": 9}):
        ours(sd.ours, {**call, **more, "observe": lambda graph, _: ran.append(graph)})
    assert ran.count("controlnet_embedding-canny") == 1 and ran.count("controlnet-canny") == 8


@pytest.mark.parametrize("edges", [False, True])
def test_the_command(edges: bool, sd: Made, tmp_path: Path) -> None:
    """From a picture of a size that is not built, or its edges; the network is named, because the bundle has two."""
    picture(3, (100, 80)).save(tmp_path / "edges.png")
    options = ("--control-image", tmp_path / "edges.png", "--controlnet", "canny", "-o", tmp_path / "out.png")
    scale = ("--controlnet-conditioning-scale", 0.5, "--steps", 2, "--seed", 3)
    found = ("--canny", "100,200") if edges else ()
    done = called("turbochain", "generate", sd.ours.bundle.path, "a cat", *options, *scale, *found)
    assert done.returncode == 0, done.stderr
    given = picture(3, (100, 80)).resize(SIZE, Image.Resampling.LANCZOS)
    if edges:
        given = Image.fromarray(cv2.Canny(np.asarray(given), 100, 200)).convert("RGB")
    else:
        assert "edges.png: 100x80, drawn as 64x64" in done.stderr
    call = {**CALL, "image": given, "controlnet_conditioning_scale": 0.5}
    assert_same(np.asarray(Image.open(tmp_path / "out.png"))[None], theirs(sd.theirs("controlnet"), call))


REFUSED: dict[str, tuple[Call, str]] = {
    "no name": ({}, "several networks for one; choose controlnet='canny', t2i_adapter='sketch'"),
    "another name": ({"controlnet": "depth"}, "controlnet='depth': the bundle has 'canny'; choose one"),
    "two names": ({"controlnet": ["canny", "canny"]}, "a call uses one ControlNet; give its name"),
    "two networks": ({"controlnet": "canny", "t2i_adapter": "sketch"}, "a call uses one network; give one of the two"),
    "two scales": ({"controlnet": "canny", "controlnet_conditioning_scale": [1.0, 1.0]}, "give one number"),
    "no number": ({"controlnet": "canny", "controlnet_conditioning_scale": float("nan")}, "a finite number"),
    "too large": ({"controlnet": "canny", "controlnet_conditioning_scale": 1e39}, "scale=1e+39: a finite number"),
    "the end first": ({"controlnet": "canny", "control_guidance_start": 0.5, "control_guidance_end": 0.5}, "the start"),
    "guess mode": ({"controlnet": "canny", "guess_mode": True}, "a ControlNet is always used with the prompt"),
    "an adapter's number": ({"controlnet": "canny", "adapter_conditioning_scale": 1.0}, "'canny' is a ControlNet"),
    "SDXL's number": ({"t2i_adapter": "sketch", "adapter_conditioning_factor": 0.5}, "this model has none; leave it"),
    "no image": ({"controlnet": "canny", "control_image": None}, "controlnet was given, and no control image; give"),
    "no picture": ({"controlnet": "canny", "control_image": "edges.png"}, "control_image is of type str"),
    "too many": (
        {"controlnet": "canny", "control_image": [picture(0)] * 2},
        "control_image holds 2 pictures, and the call has 1 prompts: give one picture, or one for each prompt",
    ),
    "an adapter of an image": (
        {"t2i_adapter": "sketch", "image": picture(0), "control_image": picture(0)},
        "t2i_adapter='sketch' was given, and the chain image-to-image has no T2I-Adapter; choose text-to-image",
    ),
    "two images for one": (
        {"chain": "text-to-image", "controlnet": "canny", "image": picture(0)},
        "image was given, and the chain text-to-image reads none; leave it out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(sd: Made, case: str) -> None:
    call, sentence = REFUSED[case]
    with pytest.raises(InputError, match=re.escape(sentence)):
        ours(sd.ours, {**CALL, "control_image": picture(1), **call})


def test_a_bundle_without_a_network(sd: Made, bundle_of: BundleFactory) -> None:
    with Pipeline.load(bundle_of("sd")) as pipe, pytest.raises(InputError, match="--controlnet NAME=ID"):
        ours(pipe, {**CALL, "control_image": picture(1)})


def test_an_image_of_a_text_to_image_call_is_the_control_image(sd: Made) -> None:
    """As diffusers' pipeline names it: if a network is named for it, or the chain is."""
    first = ours(sd.ours, {**CALL, "control_image": picture(5), "controlnet": "canny"})
    np.testing.assert_array_equal(ours(sd.ours, {**CALL, "image": picture(5), "controlnet": "canny"}), first)
    started = ours(sd.ours, {**CALL, "image": picture(5), "strength": 1.0})
    assert (started != first).any()


SCALES = ({"controlnet_conditioning_scale": scale} for scale in (0.0, 0.5, 1.0))
PARTS = ({"control_guidance_start": start, "control_guidance_end": end} for start, end in ((0.2, 0.6), (0.25, 1.0)))
GUIDED: Call = {"guidance_scale": 4.0, "negative_prompt": "blurry"}
GRID: list[Call] = [*SCALES, *PARTS, GUIDED, {**GUIDED, "control_guidance_end": 0.5}]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def many(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Made]:
    """With more ControlNets, tasks and sizes, two pictures per pass; SDXL's second one is small, SD's reads BGR,
    the third has another number of layers in its attention than the UNet, as diffusers' -mid ones for SDXL.
    """
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    changes = {"sd": {"controlnet_conditioning_channel_order": "bgr"}, "sdxl": control_nets.small(2)}[family]
    second = control_nets.controlnet(checkpoints[family], folder / "second", seed=1, **changes)
    third = control_nets.controlnet(checkpoints[family], folder / "third", seed=2, transformer_layers_per_block=[1, 1])
    nets = {"second": str(second), "third": str(third)}
    tasks = ["text-to-image", "image-to-image", "inpainting", "stream"]
    how = {"steps": [1, 2, 4], "batch": 2, "size": [SIZE, (96, 64)], "controlnet": nets, "tasks": tasks}
    made = make(family, checkpoints[family], folder, **how)
    with made.ours:
        yield made


@pytest.mark.full
@pytest.mark.parametrize("net", ["canny", "second"])
@pytest.mark.parametrize("started", [False, True], ids=["text-to-image", "image-to-image"])
def test_the_grid_with_ten_seeds(many: Made, started: bool, net: str) -> None:
    """Each call with the pictures, prompts and noise of its own."""
    with compared() as apart:
        for i, more in enumerate(GRID):
            for seed in range(10):
                steps = (1, 2, 4)[(seed + i) % 3]
                image = {"image": picture(50 + seed), "strength": (1.0, 0.75)[steps == 4]} if started else {}
                call = {**CALL, "prompt": prompts(seed, 1)[0], "num_inference_steps": steps, "seed": seed}
                many.add(apart, {**call, **image, "control_image": picture(seed), **more}, net)
    print(f"\n{many.family}, {net}, {'image' if started else 'text'}-to-image: {apart!r}")


@pytest.mark.full
def test_batches_sizes_and_defaults(many: Made) -> None:
    """Pictures are paired with prompts, and repeated, as diffusers does it; its defaults of scales are the bundle's."""
    two, wide = [picture(1), picture(2)], (96, 64)
    each: list[Call] = [
        {"prompt": prompts(0, 2), "control_image": two},
        {"prompt": prompts(0, 2), "control_image": picture(3), "num_images_per_prompt": 2},
        {"prompt": prompts(0, 2), "control_image": two, "num_images_per_prompt": 2, "guidance_scale": 4.0},
        {"prompt": prompts(0, 3), "control_image": picture(3), "seed": [4, 5, 6]},
        {"control_image": picture(4, wide)},
        {"image": picture(5, wide), "control_image": picture(4, wide), "strength": 0.5},
        {"image": two[0], "control_image": two, "prompt": prompts(0, 2), "strength": 0.5},
    ]
    with compared() as apart:
        for call in each:
            many.add(apart, {**CALL, **call})
    print(f"\n{many.family}: {apart!r}")


@pytest.mark.full
def test_t2i_adapter_in_every_way(many: Made) -> None:
    factors = {"sd": [{}], "sdxl": [{"adapter_conditioning_factor": f} for f in (0.0, 0.3, 0.5, 1.0)]}[many.family]
    scales: list[Call] = [{"adapter_conditioning_scale": scale} for scale in (0.0, 0.5, 1.0)]
    with compared() as apart:
        for i, more in enumerate([*factors, *scales, GUIDED]):
            for seed in range(10):
                call = {**CALL, "seed": seed, "num_inference_steps": (1, 2, 4)[(i + seed) % 3], **more}
                mine = ours(many.ours, {**call, "control_image": picture(seed), "t2i_adapter": "sketch"})
                apart.add(mine, theirs(many.theirs("adapter", "sketch"), {**call, "image": picture(seed)}))
    print(f"\n{many.family}, T2I-Adapter: {apart!r}")


@pytest.mark.full
def test_verification(many: Made) -> None:
    """Every stage of every ControlNet and T2I-Adapter was compared with what diffusers' own made."""
    checks = next(found for found in many.ours.bundle.engines().values() if isinstance(found, Engine)).checks
    wanted = {
        f"{role}-{net}" for role in ("controlnet", "controlnet_embedding") for net in ("canny", "second", "third")
    }
    for name, of_chain in checks.items():
        stages = {check.stage.partition("@")[0] for check in of_chain}
        assert wanted <= stages or name.startswith(("inpainting", "stream")), name
        if name.startswith("text"):
            assert {"t2i_adapter-sketch", "t2i_scale"} <= stages


def test_one_cuda_graph_with_a_network_and_without(sd: Made) -> None:
    """Over the stand-in for CUDA: what one call leaves in the buffers is zeros again in the next."""
    steered = {**CALL, "control_image": picture(1), "controlnet": "canny"}
    sketched = {**CALL, "control_image": picture(1), "t2i_adapter": "sketch"}
    calls = [CALL, steered, CALL, {**steered, "guidance_scale": 3.0}, {**CALL, "guidance_scale": 3.0}, sketched, CALL]
    conform_in_each_way(sd.ours.bundle.path, KINDS, calls)


REFUSED_AT_BUILD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # changes of the config, options, sentence
    "several kinds": ({"_class_name": "ControlNetUnionModel"}, {}, "is of ControlNetUnionModel (one net for several"),
    "other widths": ({"block_out_channels": [32, 96]}, {}, "its block_out_channels, layers_per_block are [32, 96] and"),
    "other text": ({"cross_attention_dim": 32}, {}, "it has cross_attention_dim=32, and the UNet 64; choose one that"),
    "pooled": ({"global_pool_conditions": True}, {}, "it has global_pool_conditions=True, supported is False"),
    "other pictures": ({"conditioning_channels": 4}, {}, "it has conditioning_channels=4, supported is 3"),
    "no task": ({}, {"tasks": ["inpainting"]}, "diffusers draws text-to-image and image-to-image; add one of these to"),
    "no name": ({}, {"controlnet": ["canny edges=here"]}, "'canny edges': a name of letters, digits, - and _"),
    "no place": ({}, {"controlnet": ["lllyasviel/canny"]}, "NAME=ID or NAME=FOLDER was expected"),
    "twice": ({}, {"controlnet": ["a=x", "a=y"]}, "--controlnet a=y: there is one of that name already"),
    "nowhere": ({}, {"controlnet": ["a=x"]}, "--controlnet x is neither"),
}


@pytest.mark.parametrize("case", REFUSED_AT_BUILD)
def test_what_is_refused_at_build(sd: Made, tmp_path: Path, case: str) -> None:
    """Before any weight is loaded."""
    changes, options, sentence = REFUSED_AT_BUILD[case]
    net = shutil.copytree(sd.nets["canny"], tmp_path / "net")
    config = json.loads((net / "config.json").read_text())
    (net / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError, match=re.escape(sentence)):
        order = ExportOrder.of(str(sd.checkpoint), {"size": SIZE, "controlnet": [f"canny={net}"], **options})  # type: ignore[typeddict-item]
        jobs.prepare(print, order=order, requested=order.requested("fp32"), folder=tmp_path, force=False)


@pytest.mark.full
def test_inpainting_has_no_network(many: Made) -> None:
    """Its UNet is the one that reads zeros, and the stream's the plain one."""
    chains = many.ours.bundle.manifest.chains
    assert not any("canny" in mode for name in ("inpainting", "stream") for mode in chains[name].modes)
    call = {**CALL, "image": picture(1), "mask_image": picture(2).convert("L"), "control_image": picture(1)}
    with pytest.raises(
        InputError, match=r"the chain inpainting has no ControlNet or T2I-Adapter; choose text-to-image"
    ):
        ours(many.ours, {**call, "strength": 1.0})


FULL: list[dict[str, Any]] = [
    {"adapter_type": "full_adapter", "channels": [8, 16, 24, 24], "downscale_factor": 8, "in_channels": 1},
    {"adapter_type": "full_adapter_xl", "channels": [8, 16, 24, 24], "downscale_factor": 16, "in_channels": 3},
    {"adapter_type": "light_adapter", "channels": [8, 16, 24], "downscale_factor": 8, "in_channels": 3},
]


@pytest.mark.parametrize("config", FULL, ids=lambda config: str(config["adapter_type"]))
def test_the_sizes_of_features(config: dict[str, Any]) -> None:
    """TencentARC's types, at a size that is odd at the third level."""
    adapter = diffusers.T2IAdapter(**config, num_res_blocks=1)
    made = adapter(torch.zeros(1, config["in_channels"], 80, 144))
    shape = Shape(80, 144, 1)
    assert [(f.shape[1], (f.shape[2], f.shape[3])) for f in made] == t2i_adapter.features(config, shape)


@pytest.mark.full
def test_fp16(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The networks stay in fp16's range."""
    made = make("sd", checkpoints["sd"], tmp_path, precision="fp16")
    with made.ours as pipe:
        graphs = pipe.bundle.manifest.graphs
        assert {graphs[n].precision for n in ("unet", "controlnet-canny", "t2i_adapter-sketch")} == {"fp16"}
        call = {**CALL, "control_image": picture(1)}
        reference = theirs(made.theirs("controlnet"), {**CALL, "image": picture(1)})
        assert metrics.psnr(ours(pipe, {**call, "controlnet": "canny"}), reference) >= 38


def test_models_without_a_network() -> None:
    """LCM_Dreamshaper's pipelines have none; only text-to-image gives a UNet the guidance scale that it reads."""
    control = Control(KINDS_OF_CONTROL["controlnet"], "canny")
    with pytest.raises(InputError, match="diffusers draws LCM_Dreamshaper with no ControlNet; leave it out"):
        Controls(lcm.FAMILY, {"unet": {}}, [control]).check([], ["text-to-image"])
    reads_scale = Controls(sd_family.FAMILY, {"unet": {"time_cond_proj_dim": 256}}, [control])
    assert reads_scale.of("text-to-image") == [control] and reads_scale.of("image-to-image") == []
