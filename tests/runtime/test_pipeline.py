"""What a call promises besides the right picture: output types, passes, threads, caching, memory, seeds."""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIZE
from diffusers import DiffusionPipeline
from PIL import Image

from turbochain.runtime import Bundle, Cancelled, InputError, Pipeline, TurbochainError, selection
from turbochain.runtime.backends import cpus
from turbochain.runtime.commands.bench import bench
from turbochain.runtime.commands.inspect import wires
from turbochain.runtime.inputs.cache import ENTRIES, StageCache

PROMPTS = ["a red fox", "", "рыжий кот", "a robot 🤖", "a cat, oil painting", "a lighthouse", "窓辺の猫"]
LONG = "an extraordinarily photorealistic Portrait of Astronauts riding unicorns, " * 9


@pytest.fixture(scope="module")
def one(sd: Path) -> Iterator[Pipeline]:
    """One picture per pass."""
    with Pipeline.load(sd) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def three(sdxl: Path) -> Iterator[Pipeline]:
    """Three pictures per pass."""
    with Pipeline.load(sdxl) as pipe:
        yield pipe


class Ran(Counter[str]):
    """How often each graph was launched in the calls that it observes."""

    def __call__(self, graph: str, seconds: float) -> None:
        assert seconds > 0
        self.update([graph])


@pytest.fixture
def ran(one: Pipeline) -> Ran:
    """For calls of `one`, from empty caches on."""
    one.forget()
    return Ran()


def uint8(pipe: Pipeline, prompt: Any, **arguments: Any) -> np.ndarray:
    return pipe(prompt, output_type="uint8", **arguments).images


def test_output_types_are_one_picture(three: Pipeline) -> None:
    seeds = [1, 2]
    levels = uint8(three, PROMPTS[:2], seed=seeds)
    assert levels.dtype == np.uint8
    assert levels.shape == (2, SIZE[1], SIZE[0], 3)
    pictures = three(PROMPTS[:2], seed=seeds).images
    assert [(type(p), p.mode, p.size) for p in pictures] == [(Image.Image, "RGB", SIZE)] * 2
    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in pictures]), levels)
    floats = three(PROMPTS[:2], seed=seeds, output_type="np").images
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(floats, levels.astype(np.float32) / np.float32(255))


def test_np_is_within_half_a_level_of_diffusers_floats(one: Pipeline, checkpoints: dict[str, Path]) -> None:
    theirs = DiffusionPipeline.from_pretrained(checkpoints["sd"], local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(5)
    options = {
        "guidance_scale": 0.0,
        "num_inference_steps": 1,
        "output_type": "np",
        "height": SIZE[1],
        "width": SIZE[0],
    }
    reference = theirs(PROMPTS[0], generator=generator, **options).images
    result = one(PROMPTS[0], seed=5, **options).images
    assert result.shape == reference.shape
    assert result.dtype == reference.dtype
    assert np.abs(result - reference).max() <= 0.5 / 255 + 1e-4  # half a level, and the error before rounding


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_many_prompts_equal_single_calls(one: Pipeline, three: Pipeline, batch: int, count: int) -> None:
    pipe = {1: one, 3: three}[batch]
    prompts, seeds = PROMPTS[:count], list(range(10, 10 + count))
    pipe.prompt_cache.clear()
    together = uint8(pipe, prompts, seed=seeds, num_inference_steps=2)
    pipe.prompt_cache.clear()
    alone = [uint8(pipe, p, seed=[s], num_inference_steps=2)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert len(together) == count
    np.testing.assert_array_equal(together, np.stack(alone))


MEMORY = """
import sys
from turbochain.runtime import Pipeline

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024

with Pipeline.load(sys.argv[1], threads=1, prompt_cache_bytes=2**20) as pipe:  # 53 prompts fill it
    for i in range(100):
        pipe(f"prompt {i}", seed=i, output_type="uint8")
    before = resident()
    for i in range(400):
        pipe(f"prompt {i}", seed=i, output_type="uint8")
    print(resident() - before)
"""


def test_memory_does_not_grow_over_400_calls(sd: Path) -> None:
    """One call's picture or embeddings kept would be 5 or 8 MiB in all."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(sd)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2  # MiB


def test_buffers_stay_where_they_are(sd: Path) -> None:
    bundle = Bundle.open(sd)
    chain = bundle.open_chain()
    executor = selection.open_executor(bundle, selection.select(chain))
    executor.load(chain.graphs)
    random, addresses = np.random.default_rng(0), {}
    for steps in (1, 3, 1):
        table = str(steps)
        feeds = {n: random.standard_normal((steps, *t.shape), np.float32) for n, t in chain.tensors.items()}
        feeds |= chain.columns(table) | {
            "latents": feeds["latents"][0],
            "guidance_scale": np.float32([2]),
            **dict.fromkeys(("input_ids", "negative_input_ids"), np.full((1, 77), 7, np.int32)),
        }
        everything = [name for name in chain.tensors if name != "image"]
        results = executor.execute(chain.plan(table, modes=chain.chain.modes, downloads=everything), feeds).arrays
        assert set(results) == set(chain.tensors)
        now = {name: array.ctypes.data for name, array in results.items()}
        assert now == (addresses or now)
        addresses = now
    executor.close()


def test_a_result_is_not_a_buffer(one: Pipeline) -> None:
    first = uint8(one, "a", seed=1)
    kept = first.copy()
    assert not np.array_equal(uint8(one, "b", seed=2), kept)
    np.testing.assert_array_equal(first, kept)


def test_several_threads_make_the_pictures_of_one(three: Pipeline) -> None:
    calls = [
        {"prompt": PROMPTS[i % 5 : i % 5 + 1 + i % 2], "seed": i, "num_inference_steps": 1 + i % 4} for i in range(24)
    ]
    three.prompt_cache.clear()
    expected = [uint8(three, **call) for call in calls]
    three.prompt_cache.clear()
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda call: uint8(three, **call), calls))
    for result, reference in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, reference)


def threads_alive() -> int:
    """Count this process's threads: the fewest of 20 looks, as Linux lists a thread for a moment after its end."""
    return min(len(os.listdir("/proc/self/task")) for _ in range(20) if not time.sleep(0.01))


@pytest.mark.usefixtures("all_cores")
def test_threads_are_what_was_asked(sd: Path, one: Pipeline) -> None:
    expected, started = uint8(one, "a cat", seed=1, num_inference_steps=3), {}
    most = cpus.available()
    for threads in (1, most):
        before = threads_alive()
        with Pipeline.load(sd, threads=threads) as pipe:
            started[threads] = threads_alive() - before
            difference = np.abs(uint8(pipe, "a cat", seed=1, num_inference_steps=3).astype(int) - expected)
        assert difference.max() <= 1
        assert (difference > 0).mean() <= 1e-3
    models = [graph for graph in one.bundle.open_chain().graphs.values() if graph.component]
    assert started == {1: 0, most: len(models) * (most - 1)}  # the calling thread is each graph's first


@pytest.mark.usefixtures("all_cores")
def test_a_containers_quota_bounds_the_default(sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "quota", lambda: 1)  # a container's files have tests of their own
    before = threads_alive()
    with Pipeline.load(sd) as pipe:
        assert threads_alive() == before
        uint8(pipe, "a cat", seed=1)


def test_a_repeated_prompt_skips_the_text_encoder(one: Pipeline, ran: Ran) -> None:
    call = {"seed": 1, "num_inference_steps": 2, "observe": ran}
    first = uint8(one, "a cat", **call)
    assert ran == {"text_encoder": 1, "unet": 2, "step": 2, "vae_decoder": 1}
    again = uint8(one, "a cat", **call)
    assert ran == {"text_encoder": 1, "unet": 4, "step": 4, "vae_decoder": 2}
    np.testing.assert_array_equal(again, first)
    other = uint8(one, "a dog", **call)
    assert ran["text_encoder"] == 2
    assert not np.array_equal(other, first)
    np.testing.assert_array_equal(uint8(one, "  A CAT ", **call), first)
    assert ran["text_encoder"] == 2  # the key is the token ids


def test_no_cache_runs_the_text_encoder_every_time(sd: Path, one: Pipeline) -> None:
    ran = Ran()
    with Pipeline.load(sd, prompt_cache_bytes=0) as pipe:
        pictures = [uint8(pipe, "a cat", seed=1, observe=ran) for _ in range(3)]
    assert ran["text_encoder"] == 3
    for picture in pictures:
        np.testing.assert_array_equal(picture, uint8(one, "a cat", seed=1))


def test_the_pipeline_bounds_its_cache(sd: Path) -> None:
    entry = Bundle.open(sd).open_chain().tensors["prompt_embeds"].nbytes
    with Pipeline.load(sd, prompt_cache_bytes=3 * entry + 1) as pipe:
        for prompt in PROMPTS:
            uint8(pipe, prompt, seed=0)
            assert pipe.prompt_cache.bytes <= 3 * entry + 1
        assert len(pipe.prompt_cache) == 3


def _embeds(*values: int) -> dict[str, np.ndarray]:
    return {"prompt_embeds": np.repeat(np.float32(values)[:, None], 25, axis=1)}  # 100 bytes a prompt


def _known(cache: StageCache, keys: list[bytes]) -> list[bytes]:
    return [key for key in keys if key in cache._entries]


def test_a_cache_forgets_the_least_recently_used() -> None:
    cache, keys = StageCache(300), [b"a", b"b", b"c", b"d"]
    for i, key in enumerate(keys[:3]):
        cache.put([key], _embeds(i))
    assert cache.get([b"a"]) is not None  # now b is the oldest
    cache.put([b"d"], _embeds(3))
    assert _known(cache, keys) == [b"a", b"c", b"d"]
    assert (len(cache), cache.bytes) == (3, 300)


def test_a_cache_of_small_entries_is_bounded_in_their_number() -> None:
    cache = StageCache(2**30)
    for i in range(ENTRIES + 2):
        cache.put([i], _embeds(i))
    assert (len(cache), cache.bytes) == (ENTRIES, 100 * ENTRIES)
    assert cache.get([1]) is None and cache.get([2]) is not None


def test_a_cache_gives_a_batch_whole_or_not_at_all() -> None:
    cache = StageCache(1000)
    cache.put([b"a", b"b"], _embeds(1, 2))
    assert cache.get([b"a", b"x"]) is None
    got = cache.get([b"b", b"a", b"b"])
    assert got is not None
    np.testing.assert_array_equal(got["prompt_embeds"][:, 0], [2, 1, 2])


def test_a_cache_keeps_copies_within_its_bound() -> None:
    cache, embeds = StageCache(100), _embeds(1)
    cache.put([b"a"], embeds)
    embeds["prompt_embeds"][:] = 9
    kept = cache.get([b"a"])
    assert kept is not None and kept["prompt_embeds"].max() == 1
    cache.put([b"b"], {"prompt_embeds": np.zeros((1, 26), np.float32)})  # larger than the bound by itself
    assert (_known(cache, [b"a", b"b"]), cache.bytes) == ([b"a"], 100)
    cache.clear()
    assert (len(cache), cache.bytes, cache.get([b"a"])) == (0, 0, None)


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def test_truncation_is_warned_of_as_diffusers_does(
    one: Pipeline, three: Pipeline, checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    theirs = DiffusionPipeline.from_pretrained(checkpoints["sd"], local_files_only=True)
    messages = _Messages()
    logging.getLogger("diffusers").addHandler(messages)
    try:
        with caplog.at_level(logging.WARNING, logger="diffusers"):  # whatever another test has set
            theirs.encode_prompt(LONG, "cpu", 1, False)
    finally:
        logging.getLogger("diffusers").removeHandler(messages)
    (lost,) = (found[1] for text in messages.texts if (found := re.search(r"truncated.*\['(.*)'\]", text)))
    for pipe in (one, three):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="turbochain"):
            uint8(pipe, LONG, seed=0)
        (record,) = (r for r in caplog.records if r.name == "turbochain")  # SDXL's second encoder: not once more
        dropped = record.getMessage().partition("dropped: ")[2]
        assert LONG.endswith(dropped)  # as the user wrote it, capitals and all
        assert "".join(dropped.lower().split()) == "".join(lost.split())


def test_a_prompt_that_fits_is_not_warned_of(one: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="turbochain"):
        uint8(one, "cat " * 75, seed=0)
        assert not caplog.records
        uint8(one, "cat " * 76, seed=0)
        assert len(caplog.records) == 1


def test_no_seed_draws_one_that_can_be_given_again(one: Pipeline) -> None:
    outs = [one("a cat", output_type="uint8") for _ in range(2)]
    assert outs[0].seed != outs[1].seed
    assert not np.array_equal(outs[0].images, outs[1].images)
    for out in outs:
        assert isinstance(out.seed, int) and 0 <= out.seed < 2**64
        np.testing.assert_array_equal(uint8(one, "a cat", seed=out.seed), out.images)


def test_a_seed_may_be_numpys(one: Pipeline) -> None:
    theirs = one("a cat", seed=np.uint64(2**64 - 1), output_type="uint8")
    assert theirs.seed == 2**64 - 1 and type(theirs.seed) is int
    assert np.array_equal(theirs.images, one("a cat", seed=2**64 - 1, output_type="uint8").images)


def test_seed_0_is_a_seed(one: Pipeline) -> None:
    outs = [one("a cat", seed=0, output_type="uint8") for _ in range(2)]
    assert [out.seed for out in outs] == [0, 0]
    np.testing.assert_array_equal(outs[0].images, outs[1].images)
    assert not np.array_equal(outs[0].images, uint8(one, "a cat", seed=1))
    assert one(["a", "b"], seed=[0, 1]).seed == [0, 1]


def test_closed_pipelines_refuse(sd: Path) -> None:
    with Pipeline.load(sd) as pipe:
        assert pipe("a cat", seed=0).images
    with pytest.raises(TurbochainError, match="closed"):
        pipe("a cat", seed=0)
    pipe.close()  # twice is once


def test_the_usual_snippet(one: Pipeline) -> None:
    """stabilityai's model cards, after the pipeline is loaded."""
    pipe = one
    prompt = "A cinematic shot of a baby racoon wearing an intricate italian priest robe."

    image = pipe(prompt=prompt, num_inference_steps=1, guidance_scale=0.0).images[0]

    assert isinstance(image, Image.Image)
    assert image.size == SIZE


@pytest.mark.parametrize("guidance_scale", [0, 0.0, 0.5, 1, 1.0])
def test_guidance_up_to_1_is_none(one: Pipeline, guidance_scale: float) -> None:
    result = uint8(one, "a cat", seed=1, guidance_scale=guidance_scale)
    np.testing.assert_array_equal(result, uint8(one, "a cat", seed=1))


def test_height_and_width_may_be_the_bundles(one: Pipeline) -> None:
    expected = uint8(one, "a cat", seed=1)
    for size in ({"height": SIZE[1]}, {"width": SIZE[0]}, {"height": SIZE[1], "width": SIZE[0]}):
        np.testing.assert_array_equal(uint8(one, "a cat", seed=1, **size), expected)
    for size in ({"height": 128}, {"width": 512}, {"height": 128, "width": SIZE[0]}):
        with pytest.raises(InputError, match=f"built for {SIZE[1]}x{SIZE[0]}"):
            uint8(one, "a cat", seed=1, **size)


def test_steps_default_to_the_fewest(one: Pipeline, ran: Ran) -> None:
    first = uint8(one, "a cat", seed=1, observe=ran)
    np.testing.assert_array_equal(first, uint8(one, "a cat", seed=1, num_inference_steps=1, observe=ran))
    assert ran["unet"] == 2


def test_an_image_of_another_size_is_said(one: Pipeline) -> None:
    """The output has the size that the image had, if it is not the one that was drawn."""
    for size, expected in ((SIZE, None), ((100, 60), (60, 100)), ((64, 72), (72, 64))):
        image = Image.effect_noise(size, 90).convert("RGB")
        call: dict[str, Any] = {"strength": 0.5, "num_inference_steps": 2, "seed": 1, "output_type": "uint8"}
        found = one("a cat", image=image, **call)
        assert found.resized == expected
        same = one("a cat", image=image.resize(SIZE, Image.Resampling.LANCZOS), **call)
        assert same.resized is None
        np.testing.assert_array_equal(found.images, same.images)
    assert one("a cat", seed=1).resized is None


def test_a_known_image_skips_the_vae_encoder(one: Pipeline, ran: Ran) -> None:
    """Its latents are drawn with the seed's noise; strength and prompt do not matter to them."""
    images = [Image.effect_noise(SIZE, sigma).convert("RGB") for sigma in (50, 90)]
    call: dict[str, Any] = {"strength": 0.5, "num_inference_steps": 2, "observe": ran}
    first = uint8(one, "a cat", image=images[0], seed=1, **call)
    assert ran == {"text_encoder": 1, "vae_encoder": 1, "start": 1, "unet": 1, "step": 1, "vae_decoder": 1}
    np.testing.assert_array_equal(uint8(one, "a cat", image=images[0], seed=1, **call), first)
    uint8(one, "a dog", image=images[0], seed=1, **call | {"strength": 1.0})
    assert (ran["vae_encoder"], ran["text_encoder"], ran["start"]) == (1, 2, 3)
    uint8(one, "a cat", image=images[1], seed=1, **call)
    uint8(one, "a cat", image=images[0], seed=2, **call)
    assert (ran["vae_encoder"], ran["text_encoder"], len(one.image_cache)) == (3, 2, 3)
    one.forget()
    np.testing.assert_array_equal(uint8(one, "a cat", image=images[0], seed=1, **call), first)
    assert (ran["vae_encoder"], ran["text_encoder"], len(one.image_cache)) == (4, 3, 1)


def test_no_image_cache_runs_the_vae_encoder_every_time(sd: Path, one: Pipeline) -> None:
    ran, call = Ran(), {"image": Image.effect_noise(SIZE, 90).convert("RGB"), "strength": 1.0, "seed": 1}
    with Pipeline.load(sd, image_cache_bytes=0) as pipe:
        pictures = [uint8(pipe, "a cat", observe=ran, **call) for _ in range(2)]
    assert (ran["vae_encoder"], ran["text_encoder"]) == (2, 1)
    for picture in pictures:
        np.testing.assert_array_equal(picture, uint8(one, "a cat", **call))


def test_the_bench_times_what_runs_for_a_picture(sd: Path) -> None:
    result = bench(sd, runs=2, warmup=0, steps=3)
    assert {name: timing.n for name, timing in result.stages.items()} == {
        "text_encoder": 2,
        "unet": 12,
        "step": 12,
        "vae_decoder": 4,
    }
    assert (result.evaluations, result.strength, result.guidance_scale) == (3, None, 0.0)


def test_the_wiring_tells_when(one: Pipeline) -> None:
    found = [(w["name"], w["from"], w["to"]) for w in wires(one.bundle.open_chain())]
    assert found[0] == ("input_ids", "caller", "text_encoder")
    for wire in (
        ("time_projections", "table, each step", "unet"),
        ("noise", "caller, each step", "step"),
        ("prediction", "unet", "step"),
        ("noise", "caller, each step", "step+guidance"),
        ("guidance_scale", "caller", "step+guidance"),
        ("negative_prompt_embeds", "text_encoder", "unet"),
        ("next_latents", "step or step+guidance", "latents of the next step"),
        ("image", "vae_decoder", "caller"),
    ):
        assert wire in found, wire
    found = [(w["name"], w["from"], w["to"]) for w in wires(one.bundle.open_chain("image-to-image"))]
    assert {("p", "table", "start"), ("image_latents", "vae_encoder", "start"), ("latents", "start", "unet")} <= {
        *found
    }


def test_warmup_runs_everything_and_changes_nothing(sd: Path, one: Pipeline) -> None:
    ran = Ran()
    with Pipeline.load(sd) as pipe:
        pipe.warmup(3)
        np.testing.assert_array_equal(uint8(pipe, "a cat", seed=1), uint8(one, "a cat", seed=1))
        uint8(pipe, "", seed=1, observe=ran)
        assert ran == {"unet": 1, "step": 1, "vae_decoder": 1}  # so the text encoder has run, on the empty prompt


class After:
    """A `cancel` that ends the call when it is asked for the time of this number, from 0 on."""

    def __init__(self, position: int | None = None) -> None:
        self.position, self.asked = position, 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked - 1 == self.position


@pytest.mark.parametrize("known", [False, True])
def test_a_call_may_be_cancelled_before_any_launch(one: Pipeline, ran: Ran, known: bool) -> None:
    """The next pictures are as if it had never been made, and the cache holds whole prompts alone."""
    call = {"seed": 3, "num_inference_steps": 3}
    others, expected = uint8(one, "a dog", **call), uint8(one, ["a cat", "a fox"], **call)
    one.prompt_cache.clear()
    uint8(one, ["a dog", *["a cat", "a fox"] * known], **call, observe=ran)
    kept, per_picture = one.prompt_cache.bytes, 7 if known else 8
    for position in range(2 * per_picture):
        ran.clear()
        with pytest.raises(Cancelled):
            one(["a cat", "a fox"], **call, cancel=After(position), observe=ran)
        assert ran.total() == position  # nothing is launched after it has been asked
        assert len(one.prompt_cache) == (3 if known else 1 + position // per_picture)
        np.testing.assert_array_equal(uint8(one, "a dog", **call), others)
        np.testing.assert_array_equal(uint8(one, ["a cat", "a fox"], **call), expected)
        one.prompt_cache.clear()
        uint8(one, ["a dog", *["a cat", "a fox"] * known], **call)
        assert one.prompt_cache.bytes == kept
    never = After()
    np.testing.assert_array_equal(uint8(one, ["a cat", "a fox"], **call, cancel=never), expected)
    assert never.asked == 2 * per_picture


def test_an_observer_that_raises_ends_the_call(one: Pipeline) -> None:
    expected = uint8(one, "a cat", seed=1)

    def observe(graph: str, seconds: float) -> None:
        if graph == "step":
            raise KeyError(graph)

    with pytest.raises(KeyError):
        one("a cat", seed=1, observe=observe)
    np.testing.assert_array_equal(uint8(one, "a cat", seed=1), expected)


def test_a_result_says_what_its_own_call_took(one: Pipeline) -> None:
    """Also if other threads draw at the same time."""
    seen: dict[int, list[float]] = {seed: [] for seed in range(6)}
    with ThreadPoolExecutor(3) as pool:
        outs = list(
            pool.map(
                lambda seed: one("a cat", seed=seed, observe=lambda graph, seconds: seen[seed].append(seconds)), seen
            )
        )
    for seed, out in enumerate(outs):
        assert out.seed == seed and out.uncaptured is None
        assert out.seconds >= out.device_seconds == pytest.approx(sum(seen[seed])) and out.device_seconds > 0


DIGESTS = """
import hashlib, json, sys
from turbochain.runtime import Pipeline

with Pipeline.load(sys.argv[1]) as pipe:
    prompts = json.loads(sys.argv[2])
    pictures = [pipe(p, seed=i, num_inference_steps=1 + i % 4, output_type="uint8") for i, p in enumerate(prompts)]
print(json.dumps([hashlib.sha256(p.images.tobytes()).hexdigest() for p in pictures]))
"""


def test_every_process_makes_the_same_pictures(sdxl: Path, three: Pipeline) -> None:
    line = [sys.executable, "-c", DIGESTS, str(sdxl), json.dumps(PROMPTS)]
    runs = [subprocess.run(line, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    pictures = [uint8(three, p, seed=i, num_inference_steps=1 + i % 4) for i, p in enumerate(PROMPTS)]
    expected = [hashlib.sha256(p.tobytes()).hexdigest() for p in pictures]
    assert [json.loads(run) for run in runs] == [expected, expected]
