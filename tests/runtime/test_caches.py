"""What encoders made is kept for later calls, and the caches stay within their bounds."""

from pathlib import Path
from typing import Any

import numpy as np
from conftest import SIZE
from launches import PROMPTS, Ran, uint8
from PIL import Image

from turbochain.runtime import Bundle, Pipeline
from turbochain.runtime.inputs.cache import ENTRIES, StageCache


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
