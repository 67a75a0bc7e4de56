"""A stream of camera frames against diffusers' image-to-image pipeline, frame by frame."""

import dataclasses
import gc
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import image_graphs
import lora_files
import numpy as np
import pytest
from conftest import ON, SIZE, BundleFactory, reseal
from cuda_forms import assert_all_on_gpu
from here import build_here
from image_calls import Call, compared, picture, prompts, strength, theirs
from PIL import Image
from safetensors.numpy import load_file, save_file
from standin import StandIn, pipeline, standing_in

from turbochain.engines import options
from turbochain.engines.backends import tensorrt
from turbochain.export import tables
from turbochain.export.order import ExportOrder
from turbochain.export.requested import Requested
from turbochain.export.sources import synthetic
from turbochain.runtime import (
    Bundle,
    BundleError,
    Cancelled,
    InputError,
    PictureError,
    Pipeline,
    Stream,
    TurbochainError,
)
from turbochain.runtime.backends.tensorrt import target
from turbochain.runtime.checks.verify import verify_bundle
from turbochain.runtime.commands import bench, inspect
from turbochain.runtime.inputs.similar import Similar
from turbochain.runtime.request import Request

pytestmark = pytest.mark.usefixtures("one_thread")

ANCESTRAL = "EulerAncestralDiscreteScheduler"
FRAMES = [picture(0), picture(1), picture(2), picture(2), np.asarray(picture(4)), picture(5, (80, 72))]
PROMPTS = prompts(0, 2) * 3
SEEDS = [5, 6, 7, 8, 2**64 - 1, 5]
CALL: Mapping[str, Any] = {"num_inference_steps": 4, "strength": 0.8, "seed": 3, "output_type": "uint8"}
"""Of the shared bundle, whose frames make 3 steps."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A bundle with a stream, and diffusers' pipeline."""

    path: Path
    theirs: Any
    calls: Sequence[Call]


def of_rows(rows: int) -> list[Call]:
    """Arguments of which all make so many steps."""
    return [{"num_inference_steps": steps, "strength": strength(steps, rows)} for steps in range(rows, 5)]


@pytest.fixture(scope="module")
def ancestral(sd: Path, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """SD of three frames, with a scheduler that draws noise, and text-to-image."""
    path = tmp_path_factory.mktemp("stream") / "x.bundle"
    what: dict[str, Any] = {
        "tasks": ["text-to-image", "stream"],
        "steps": [3, 4],
        "stream_batch": 3,
        "scheduler": ANCESTRAL,
    }
    build_here(str(checkpoints["sd"]), path, precision="fp32", size=SIZE, quiet=True, **what, **ON)
    reference, _ = image_graphs.pipelines(checkpoints["sd"], "sd")
    reference.scheduler = getattr(diffusers, ANCESTRAL).from_config(reference.scheduler.config)
    return Made(path, reference, of_rows(3))


FULL: Mapping[str, dict[str, Any]] = {
    "sd": {"stream_batch": 2, "tasks": ["image-to-image", "stream"], "batch": [3, 1]},
    "sdxl": {"stream_batch": 3, "tasks": ["stream"]},  # Euler ancestral is the checkpoint's own
    "lcm": {"stream_batch": 2, "tasks": ["stream"], "steps": [2]},
}


@pytest.fixture(scope="module", params=["ancestral", *(pytest.param(name, marks=pytest.mark.full) for name in FULL)])
def made(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Made:
    name: str = request.param
    if name == "ancestral":
        found: Made = request.getfixturevalue(name)
        return found
    path = tmp_path_factory.mktemp(name) / "x.bundle"
    checkpoint = checkpoints.get(name, path.with_name("checkpoint"))
    if name not in checkpoints:
        synthetic.write_checkpoint("lcm-sd15-mini", checkpoint)
    build_here(str(checkpoint), path, precision="fp32", size=SIZE, quiet=True, **FULL[name], **ON)
    if name in checkpoints:
        return Made(path, image_graphs.pipelines(checkpoint, name)[0], of_rows(FULL[name]["stream_batch"]))
    theirs = diffusers.LatentConsistencyModelImg2ImgPipeline.from_pretrained(checkpoint, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    # Its sampler makes every step at each strength; without guidance its UNet still reads a scale.
    return Made(path, theirs, [{"num_inference_steps": 2, "strength": 0.8, "guidance_scale": 8.5}])


@pytest.fixture(scope="module")
def pipe(ancestral: Made) -> Iterator[Pipeline]:
    with Pipeline.load(ancestral.path, chain="stream", backend="onnxruntime") as pipe:
        yield pipe


def through(stream: Stream, frames: Sequence[Any], between: Callable[[], object] = lambda: None) -> list[np.ndarray]:
    """The pictures of these frames, and of none other; `between` is called before each."""
    found = []
    for frame in frames:
        between()
        if made := stream(frame):
            found.append(made.images)
    return [*found, *(made.images for made in stream.flush())]


@pytest.fixture(scope="module")
def right(pipe: Pipeline) -> list[np.ndarray]:
    """What a stream that nothing disturbs makes of `FRAMES`."""
    with pipe.stream("a cat", **CALL) as stream:
        return through(stream, FRAMES)


def assert_equal(ours: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> None:
    for one, other in zip(ours, right, strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_frame_is_the_picture_of_diffusers_own_call(made: Made) -> None:
    """Each with its own prompt and seed, whatever those of the frames beside it are."""
    opened = Bundle.open(made.path).open_chain("stream")
    rows = opened.chain.stream
    with Pipeline.load(made.path, chain="stream") as pipe, compared() as apart:
        for call in made.calls:
            with pipe.stream("", **call, output_type="uint8") as stream:
                outputs = []
                for frame, stream.prompt, seed in zip(FRAMES, PROMPTS, SEEDS, strict=True):
                    outputs.append(stream(frame, seed=seed))
                assert outputs[: rows - 1] == [None] * (rows - 1)
                found = [one for one in [*outputs[rows - 1 :], *stream.flush()] if one]
            assert [one.seed for one in found] == SEEDS
            assert [one.resized for one in found] == [None] * 5 + [(72, 80)]
            for one, frame, prompt, seed in zip(found, FRAMES, PROMPTS, SEEDS, strict=True):
                image = Image.fromarray(frame) if isinstance(frame, np.ndarray) else frame
                image = image.resize(SIZE, Image.Resampling.LANCZOS)
                apart.add(one.images, theirs(made.theirs, {**call, "prompt": prompt, "image": image, "seed": seed}))
    print(f"\nstream of {rows}: {apart!r}")


def test_what_a_bundle_says_of_it(made: Made) -> None:
    bundle = Bundle.open(made.path)
    chain = bundle.open_chain("stream")
    assert chain.chain.tables[Request.sample(chain).table].rows == chain.chain.stream  # by the default strength
    assert {"keep", "stream"} <= bundle.manifest.requires.keys()
    assert len([file for file in bundle.manifest.files if file.endswith(".data") and "/unet.fp32" in file]) == 1
    text = inspect.as_text(bundle)
    assert f"{chain.chain.stream} frames under way" in text
    assert "stream_latents of the next call" in text


def test_defaults_make_a_picture(pipe: Pipeline) -> None:
    with pipe.stream("a cat", output_type="uint8") as stream:
        assert len(through(stream, FRAMES[:1])) == 1
    pipe.warmup(chain="stream")


def test_other_calls_come_between_frames(pipe: Pipeline, right: list[np.ndarray]) -> None:
    seeds = iter(range(10))

    def between() -> None:
        pipe("a dog", chain="text-to-image", seed=next(seeds), num_inference_steps=3)
        pipe.forget()

    with pipe.stream("a cat", **CALL) as stream:
        assert_equal(through(stream, FRAMES[:3], between), right[:3])


@pytest.mark.full
def test_a_chain_is_verified_between_frames(
    ancestral: Made, right: list[np.ndarray], copy_of: Callable[[Path], Path]
) -> None:
    path = copy_of(ancestral.path)
    (file,) = path.glob("engines/*/engine.json")
    engine = json.loads(file.read_text())
    del engine["verified"]["text-to-image"]
    file.write_text(json.dumps(engine))
    with Pipeline.load(path, chain="stream") as pipe:
        calls = iter([lambda: None, lambda: pipe("a dog", num_inference_steps=3), *[lambda: None] * 4])
        assert_equal(through(pipe.stream("a cat", **CALL), FRAMES, lambda: next(calls)()), right)
    assert "text-to-image" in json.loads(file.read_text())["verified"]


def test_a_cancelled_frame_has_not_entered(pipe: Pipeline, right: list[np.ndarray]) -> None:
    launches = iter([0, 1, 2, 3, 4, 5])

    def between() -> None:
        asked = iter([False] * next(launches) + [True])
        with pytest.raises(Cancelled):
            stream(picture(9), cancel=lambda: next(asked))

    with pipe.stream("a cat", **CALL) as stream:
        assert_equal(through(stream, FRAMES, between), right)


def test_one_stream_at_a_time_and_each_begins_anew(pipe: Pipeline, right: list[np.ndarray]) -> None:
    first = pipe.stream("a dog", **{**CALL, "seed": 8})
    assert first(picture(7)) is None
    with pytest.raises(InputError, match=r"another stream of this pipeline is open, .*: close that one, or load"):
        pipe.stream("a cat")
    with pytest.raises(InputError, match="another stream"):
        pipe.warmup(chain="stream")
    assert first(picture(8)) is None and first(picture(8)) is not None
    first.close()
    with pytest.raises(TurbochainError, match="the stream is closed; open another"):
        first(picture(7))
    with pipe.stream("a cat", **CALL) as second:
        assert_equal(through(second, FRAMES[:3]), right[:3])
        assert_equal(through(second, FRAMES[:2]), right[:2])  # after a flush
        first.close()  # once more, which does not concern the other
        with pytest.raises(InputError, match="another stream"):
            pipe.stream("a cat")
    third = pipe.stream("a cat", **CALL)
    third(picture(7))
    del third  # without a word
    gc.collect()
    with pipe.stream("a cat", **CALL) as fourth:
        assert_equal(through(fourth, FRAMES[:2]), right[:2])


def test_a_flush_may_be_left_before_its_end(pipe: Pipeline, right: list[np.ndarray]) -> None:
    with pipe.stream("a cat", **CALL) as stream:
        assert [stream(frame) for frame in FRAMES[:2]] == [None, None]
        np.testing.assert_array_equal(next(stream.flush()).images, right[0])
        assert_equal(through(stream, FRAMES[2:4]), right[1:4])
        assert list(stream.flush()) == []


def test_nan_is_an_error_only_where_a_frame_is(pipe: Pipeline, right: list[np.ndarray]) -> None:
    executor, tensor = pipe._executor, pipe.bundle.open_chain("stream").tensors["stream_latents"]
    with pipe.stream("a cat", **CALL) as stream:
        stream(FRAMES[0])
        buffer = executor._buffer(tensor)  # type: ignore[union-attr]
        buffer[1] = np.nan  # where no frame is
        assert stream(FRAMES[1]) is None
        np.testing.assert_array_equal(getattr(stream(FRAMES[2]), "images", None), right[0])
        buffer[1] = np.nan  # the second frame
        with pytest.raises(PictureError, match="NaN"):
            stream(FRAMES[3])
        assert_equal(through(stream, []), right[2:4])


def test_similar_frames_are_skipped(pipe: Pipeline, right: list[np.ndarray]) -> None:
    with pipe.stream("a cat", **CALL, similar_image_threshold=0.98, max_skipped=2) as stream:
        entered = [stream(picture(0)) for _ in range(3)]  # none is skipped before there is a picture
        assert entered[:2] == [None, None] and entered[2]
        np.testing.assert_array_equal(entered[2].images, right[0])
        found = [stream(picture(0)) for _ in range(4)]
        assert found[0] is entered[2] and found[1] is entered[2]
        assert found[2] is not entered[2] and found[3] is found[2]
        assert stream(picture(1)) is not found[2]
        last = stream(picture(1))
        stream.prompt = "a dog"
        assert stream(picture(1)) is not last  # a new prompt is drawn at once


def test_a_new_adapter_is_drawn_at_once(pipe: Pipeline, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    layers = lora_files.draw(checkpoints["sd"], only="attn1.to_q")
    file = lora_files.write(tmp_path / "lora.safetensors", layers, "peft")
    with pipe.stream("a cat", **CALL, similar_image_threshold=0.98) as stream:
        made = [stream(picture(0)) for _ in range(4)]
        assert made[3] is made[2]
        pipe.load_lora_weights(file)
        try:
            one = stream(picture(0))
            assert one and one is not made[3] and one.adapters and stream(picture(0)) is one
        finally:
            pipe.unload_lora_weights()
        two = stream(picture(0))
        assert two and two is not one and not two.adapters


def test_the_more_alike_frames_are_the_more_are_skipped() -> None:
    random = np.random.default_rng(0)
    base = random.integers(0, 256, (1, 16, 16, 3), np.uint8)
    shares = []
    for noise in (0, 10, 20, 40, 80):
        other = np.clip(base + random.normal(0, noise, base.shape), 0, 255).astype(np.uint8)
        one, two = (frame.astype(np.float64).reshape(-1) / 127.5 - 1 for frame in (base, other))
        cosine = one @ two / np.sqrt((one @ one) * (two @ two))
        similar, again = Similar(0.9, 10**6, 5), Similar(0.9, 10**6, 5)
        assert not similar.skips(other)  # nothing has entered yet
        similar.entered(base)
        again.entered(base)
        decided = [similar.skips(other) for _ in range(2000)]
        assert decided == [again.skips(other) for _ in range(2000)]
        shares.append(np.mean(decided))
        assert abs(shares[-1] - max(0.0, 1 - (1 - cosine) / (1 - 0.9))) < 0.03
    assert shares[0] == 1 and shares[-1] == 0 and len({round(share, 2) for share in shares}) >= 4


def test_what_is_refused(pipe: Pipeline, sd: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(InputError, match=match):
            pipe.stream(options.pop("prompt", "a cat"), **options)

    listed = "a frame of this stream makes 3, .*num_inference_steps=3 with strength 1, num_inference_steps=4 with "
    refused(
        f"num_inference_steps=4 makes 2 steps: {listed}strength 0.75 to below 1", num_inference_steps=4, strength=0.5
    )
    refused(f"strength=0.1: {listed}", strength=0.1)
    refused("num_inference_steps=2: this bundle was built for these step counts: 3, 4", num_inference_steps=2)
    refused("the chain stream has no guidance; leave it out", guidance_scale=3.0)
    refused("it is no stream; leave chain out", chain="text-to-image")
    refused("prompt", prompt=["a cat"])
    refused("similar_image_threshold=1: a number from 0 to below 1 was expected", similar_image_threshold=1)
    refused("height='64': a multiple of 8 in pixels was expected", height="64")
    refused("max_skipped=-1", similar_image_threshold=0.9, max_skipped=-1)
    with pytest.raises(TypeError, match="negative_prompt"):
        pipe.stream("a cat", negative_prompt="fog")  # type: ignore[call-arg]
    for chain in ("stream", pipe.bundle.open_chain("stream").name):
        with pytest.raises(InputError, match=r"takes one frame after the other: open it with pipe.stream\(prompt\)"):
            pipe("a cat", image=picture(0), chain=chain)
    with pipe.stream("a cat") as stream:
        for frame, match in (("cat.png", "frame is of type str"), ([picture(0)] * 2, "frame has 2 pictures")):
            with pytest.raises(InputError, match=match):
                stream(frame)
    with Pipeline.load(sd) as other, pytest.raises(InputError, match=r"not for stream: build another .*tasks stream"):
        other.stream("a cat")


def test_orders_that_are_refused(checkpoints: dict[str, Path]) -> None:
    for given, match in (
        ({"stream_batch": 5, "tasks": ("stream",)}, "stream_batch 5: 2 to 4 frames were expected"),
        ({"stream_batch": 3, "tasks": ("text-to-image",)}, "stream_batch 3: it is for the task stream; add that"),
    ):
        with pytest.raises(InputError, match=match):
            ExportOrder("demo", **given)  # type: ignore[arg-type]
    checkpoint = image_graphs.checkpoint(checkpoints["sd"])
    requested = Requested("x", {}, "fp32", tasks=("text-to-image", "stream"))
    with pytest.raises(InputError, match="a frame of the stream makes 4 steps, and the bundle is to make at most 2"):
        tables.make(checkpoint, dataclasses.replace(requested, stream_batch=4, steps=(1, 2)))
    multistep = dataclasses.replace(checkpoint, scheduler={"_class_name": "DPMSolverMultistepScheduler"})
    with pytest.raises(InputError, match=r"DPMSolverMultistepScheduler reads what it kept .* choose another"):
        tables.make(multistep, requested)


def test_the_pipeline_is_closed_or_forked(ancestral: Made) -> None:
    pipe = Pipeline.load(ancestral.path, chain="stream")
    stream = pipe.stream("a cat", **CALL)
    stream(FRAMES[0])
    if not (child := os.fork()):
        status = 1
        try:
            stream(FRAMES[1])
        except TurbochainError as error:
            status = 0 if "before this process was forked" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    pipe.close()
    with pytest.raises(TurbochainError, match="the pipeline is closed"):
        stream(FRAMES[1])
    with pytest.raises(TurbochainError, match="the pipeline is closed"):
        list(stream.flush())
    stream.close()


class Forgetful(StandIn):
    """Prepares a plan again whenever another one ran in between."""

    most_plans = 1


def test_on_a_gpu(ancestral: Made, right: list[np.ndarray]) -> None:
    """Over the stand-in, with another chain, new and known prompts, and a frame that is cancelled, in between."""
    with standing_in() as runtime:
        with pipeline(ancestral.path, Forgetful) as pipe:
            stream = pipe.stream("a cat", **CALL)
            seeds = iter(range(10))

            def between() -> None:
                seed = next(seeds)
                asked = iter([False] * seed + [True])
                with pytest.raises(Cancelled):
                    stream(picture(9), observe=lambda graph, seconds: None, cancel=lambda: next(asked))
                if seed % 2:
                    pipe(f"a dog {seed}", chain="text-to-image", seed=seed, num_inference_steps=3)

            assert_equal(through(stream, FRAMES[:3], between), right[:3])
        assert (runtime.problems(), runtime.leaked()) == ([], [])


@pytest.mark.full
def test_bench(ancestral: Made) -> None:
    found = bench.bench(ancestral.path, chain="stream", runs=1, warmup=0, backend="onnxruntime")
    assert (found.evaluations, found.batch) == (3, 1)
    assert {n: timing.n for n, timing in found.stages.items()} == {
        **dict.fromkeys(("vae_encoder", "start", "enter", "unet+stream", "step+stream", "vae_decoder"), 2),
        "text_encoder": 1,
    }


@pytest.mark.parametrize("field", ["w", *(pytest.param(field, marks=pytest.mark.full) for field in ("v", "index"))])
def test_a_table_with_its_rows_in_another_order_is_noticed(
    ancestral: Made, copy_of: Callable[[Path], Path], field: str
) -> None:
    path = copy_of(ancestral.path)
    file = path / "tables/stream.safetensors"
    arrays = {name: np.roll(a, 1, 0) if name.endswith(f"/{field}") else a for name, a in load_file(file).items()}
    save_file(arrays, file)
    reseal(path)
    failed = {check.stage for check in verify_bundle(path, chain="stream")[1]["stream"] if not check.passed}
    assert {"schedule", "image"} <= failed


@pytest.mark.full
def test_openvino(ancestral: Made, right: list[np.ndarray], tmp_path: Path) -> None:
    how: dict[str, Any] = {"engines": tmp_path, "backend": "openvino", "device": "cpu"}
    build_here(str(ancestral.path), **how, options={"inference_precision": "fp32"}, quiet=True)
    with Pipeline.load(ancestral.path, chain="stream", **how) as pipe, compared() as apart:
        for ours, theirs in zip(through(pipe.stream("a cat", **CALL), FRAMES), right, strict=True):
            apart.add(ours, theirs)


@pytest.mark.full
@pytest.mark.parametrize("graph", ["enter", "unet+stream", "step+stream"])
def test_tensorrt_builds_its_graphs(ancestral: Made, graph: str) -> None:
    said: list[str] = []
    where = (ancestral.path / "graphs" / f"{graph}.onnx", graph, options.resolve("tensorrt", {}), target("sm89"))
    watched = (lambda done, total: None, lambda severity, text: said.append(text))
    assert tensorrt.serialize(*where, Path("/nowhere"), *watched).nbytes > 1000 and said


def test_no_node_of_them_is_left_to_the_host_on_a_gpu(ancestral: Made, tmp_path: Path) -> None:
    """Of ONNX Runtime's forms."""
    for graph in ("enter", "unet+stream", "step+stream"):
        assert_all_on_gpu(ancestral.path / "graphs" / f"{graph}.onnx", tmp_path)


def test_names_of_several_sizes_and_batches(checkpoints: dict[str, Path]) -> None:
    opened = image_graphs.checkpoint(checkpoints["sd"])
    requested = Requested(
        "x", {}, "fp32", tasks=("stream",), sizes=((64, 64), (96, 64)), batches=(4, 1), stream_batch=3
    )
    layout = requested.layout(opened.family, opened.configs)
    assert [layout.name(task, shape) for task, shape in layout.chains] == ["stream", "stream@96x64"]
    graphs = layout.graphs()
    assert {"text_encoder-b1", "unet+stream", "unet+stream@96x64", "vae_decoder@96x64-b1"} <= graphs.keys()
    assert {name: graph.shape.batch for name, graph in graphs.items() if "stream" in name or "enter" in name} == {
        f"{name}{size}": 3 for name in ("enter", "unet+stream", "step+stream") for size in ("", "@96x64")
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stream": 1}, "it is no stream of 1 frames"),
        ({"stream": 4}, "the table 3 lacks the stream's 4 rows"),
        ({"stream": 0}, "the column m is"),
        ({"batch": 3}, "it is no stream of 3 frames"),
    ],
)
def test_manifests_that_are_refused(ancestral: Made, tmp_path: Path, change: dict[str, int], told: str) -> None:
    manifest = json.loads((ancestral.path / "bundle.json").read_text())
    manifest["chains"]["stream"] |= change
    (tmp_path / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=told):
        Bundle.open(tmp_path)


def test_the_unet_is_that_of_the_shared_bundle(ancestral: Made, bundle_of: BundleFactory) -> None:
    """So that the UNet of both chains is one data file, whichever of them was traced."""
    ours, shared = Bundle.open(ancestral.path), Bundle.open(bundle_of("sd"))
    assert ours.graph_digest("unet") == shared.graph_digest("unet")
    assert set(ours.manifest.graphs["unet"].data) <= set(ours.manifest.graphs["unet+stream"].data)
