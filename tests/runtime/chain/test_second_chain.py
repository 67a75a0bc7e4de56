"""A bundle of two chains that use all that the format has, against the same arithmetic in numpy."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import small_bundle
from small_bundle import CHAINS
from small_calls import GUIDED, PICTURES, PROMPTS, SCALES, assert_same, cases, changed, drawn, numbers
from small_graphs import BATCH, I2I, LATENTS, SIZES, T2I

from turbochain.runtime import Bundle, InputError, Pipeline
from turbochain.runtime.chain.plan import Run
from turbochain.runtime.chain.recording import OnDevice, Together, record
from turbochain.runtime.errors import Cancelled
from turbochain.runtime.inputs.noise import Generator, draw_run
from turbochain.runtime.request import Request

BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(params=BACKENDS)
def pipe(request: pytest.FixtureRequest, two_chains: Path) -> Iterator[Pipeline]:
    with Pipeline.load(two_chains, backend=request.param) as pipe:
        yield pipe


@pytest.fixture
def copy(two_chains: Path, copy_of: Callable[[Path], Path]) -> Path:
    """A copy that a test may change."""
    return copy_of(two_chains)


def loaded(pipe: Pipeline) -> frozenset[str]:
    assert pipe._executor is not None
    return pipe._executor.loaded


def test_a_graph_of_two_places_is_named_once(two_chains: Path) -> None:
    stages = [stage["graph"] for stage in json.loads((two_chains / "bundle.json").read_text())["chains"][T2I]["stages"]]
    assert [*Bundle.open(two_chains).manifest.chains[T2I].graphs] == sorted({*stages}, key=stages.index) != stages


@pytest.mark.parametrize("steps", [2, 3])
def test_a_call_without_its_mode(pipe: Pipeline, steps: int) -> None:
    assert_same(drawn(pipe, T2I, num_inference_steps=steps), by_hand.text_to_image(PROMPTS, 5, steps)["image"])


def test_one_graph_in_two_places(pipe: Pipeline) -> None:
    """With guidance the text encoder and the UNet run twice; the negative prompt is one for all, or one for each."""
    for negative in (None, "red snow", ["dog", "a cat"]):
        on: dict[str, Any] = {"guidance_scale": 2.5} if negative else {"inputs": GUIDED, "modes": ["guidance"]}
        ours = drawn(pipe, T2I, negative_prompt=negative, **on)
        texts = negative if isinstance(negative, list) else [negative or ""] * BATCH
        assert_same(ours, by_hand.text_to_image(PROMPTS, 5, 2, 2.5, texts)["image"])
    ran: list[str] = []
    pipe.forget()
    request = Request.make(pipe.bundle.open_chain(T2I), PROMPTS, seed=1, guidance_scale=2.5, negative_prompt="a")
    pipe.draw(request, observe=lambda graph, _: ran.append(graph))
    assert ran == ["text_encoder"] * 2 + ["unet", "unet", "step+guidance"] * 2 + ["vae_decoder"]


@pytest.mark.parametrize("seed", [5, [5, 6]], ids=["one generator", "one for each picture"])
def test_draws_in_their_order(pipe: Pipeline, seed: int | list[int]) -> None:
    """An image's draws, a hidden one among them: for each image with one generator, else for each picture."""
    for count in (1, 2):
        images = PICTURES[0, :count]
        ours = drawn(pipe, I2I, seed=seed, inputs={"input_image": images, **numbers()})
        assert_same(ours, by_hand.image_to_image(PROMPTS, images, seed, 0.75, 0.5, SCALES)["image"])
        pipe._held.clear()  # the stream begins again


def test_noise_that_is_given_takes_the_place_of_its_draw(pipe: Pipeline) -> None:
    noise = np.random.default_rng(8).standard_normal(LATENTS[T2I], np.float32)
    ours = drawn(pipe, T2I, latents=noise)
    assert_same(ours, by_hand.text_to_image(PROMPTS, 5, 2, latents=noise)["image"])


def test_a_hidden_draw_is_made_whatever_is_given(copy: Path) -> None:
    changed(
        copy,
        lambda m: m["chains"][I2I]["draws"].insert(0, {"name": "start_noise", "per": "picture", "discarded": True}),
    )
    chain, (torchs,) = Bundle.open(copy).open_chain(I2I), by_hand.seeded(5)
    given = np.ones(LATENTS[I2I], np.float32)
    made = draw_run(chain, chain.tables["2"], [Generator(5)], BATCH, given={"start_noise": given})
    by_hand.randn([torchs], given.shape)
    np.testing.assert_allclose(made["posterior_noise"], by_hand.randn([torchs], given.shape), atol=1e-6)
    assert (made["start_noise"] == given).all()


def test_a_stream_outlives_a_call(pipe: Pipeline) -> None:
    """Each picture reads what the last one left; what the other chain does between them does not matter."""
    stream: np.ndarray | float = 0.0
    for frame, images in enumerate(PICTURES):
        theirs = by_hand.image_to_image(PROMPTS, images, frame, 0.75, 0.5, SCALES, stream)
        assert_same(drawn(pipe, I2I, seed=frame, inputs={"input_image": images, **numbers()}), theirs["image"])
        drawn(pipe, T2I)
        stream = theirs["next_stream"][-1]


def test_a_cancelled_call_leaves_a_stream_as_it_was(pipe: Pipeline) -> None:
    given = {"input_image": PICTURES[0], **numbers()}
    first = by_hand.image_to_image(PROMPTS, PICTURES[0], 5, 0.75, 0.5, SCALES)
    assert_same(drawn(pipe, I2I, inputs=given), first["image"])
    asked = iter([False] * 5 + [True])
    request = Request.make(pipe.bundle.open_chain(I2I), PROMPTS, seed=6, inputs=given)
    with pytest.raises(Cancelled):
        pipe.draw(request, cancel=lambda: next(asked))
    second = by_hand.image_to_image(PROMPTS, PICTURES[0], 5, 0.75, 0.5, SCALES, first["next_stream"][-1])
    assert_same(drawn(pipe, I2I, inputs=given), second["image"])


def test_a_stream_begins_again_after_a_verification(tmp_path: Path) -> None:
    """A chain that is verified at its first use leaves recorded values in the buffers that it shares with another."""
    again = [({**case, "chain": "again"}, arrays) for case, arrays in cases() if case["chain"] == I2I]
    path = small_bundle.write(tmp_path / "x.bundle", [*cases(), *again])
    changed(path, lambda m: m["chains"].update(again=m["chains"][I2I]))
    given = {"input_image": PICTURES[0], **numbers()}
    first = by_hand.image_to_image(PROMPTS, PICTURES[0], 5, 0.75, 0.5, SCALES)
    second = by_hand.image_to_image(PROMPTS, PICTURES[0], 5, 0.75, 0.5, SCALES, first["next_stream"][-1])
    with Pipeline.load(path, backend="onnxruntime", chain=I2I) as pipe:
        assert_same(drawn(pipe, I2I, inputs=given), first["image"])
        assert_same(drawn(pipe, I2I, inputs=given), second["image"])
        assert_same(drawn(pipe, "again", inputs=given), first["image"])
        assert_same(drawn(pipe, I2I, inputs=given), second["image"])  # the two chains share the stream


def test_zeros_that_a_mode_makes_something_of(pipe: Pipeline) -> None:
    """The held zeros are zeros again after a call whose mode wrote that buffer."""
    stream: np.ndarray | float = 0.0
    for control in (None, PICTURES[1], None, PICTURES[2]):
        given = {"input_image": PICTURES[0], **numbers()}
        given |= {} if control is None else {"control_image": control}
        theirs = by_hand.image_to_image(PROMPTS, PICTURES[0], 5, 0.75, 0.5, SCALES, stream, control)
        assert_same(drawn(pipe, I2I, inputs=given, modes=[] if control is None else ["control"]), theirs["image"])
        stream = theirs["next_stream"][-1]


ENCODERS = {"text_encoder", "vae_encoder", "controlnet"}


def encoded(pipe: Pipeline, chain: str, **arguments: Any) -> tuple[np.ndarray, list[str]]:
    """The pictures of a call whose stream begins anew, and the encoders that ran for it."""
    pipe._held.clear()
    ran: list[str] = []
    arguments = {"prompt": PROMPTS, "seed": 5, "output_type": "uint8", **arguments}
    request = Request.make(pipe.bundle.open_chain(chain), **arguments)
    images = pipe.draw(request, observe=lambda graph, _: ran.append(graph)).images
    return images, [graph for graph in ran if graph in ENCODERS]


def test_what_an_encoder_made_is_kept(pipe: Pipeline) -> None:
    """A prompt's embeddings; an image's latents per image and seed, which is that of the noise that they are drawn
    with, whatever else of the call is another."""
    calls: list[tuple[int, int, float, list[str]]] = [
        (0, 5, 0.75, ["text_encoder", "vae_encoder"]),
        (0, 5, 0.75, []),
        (0, 5, 0.25, []),
        (1, 5, 0.75, ["vae_encoder"]),
        (0, 6, 0.75, ["vae_encoder"]),
        (0, 5, 0.75, []),
    ]
    for picture, seed, p, expected in calls:
        given = {"input_image": PICTURES[picture], **numbers(p)}
        images, ran = encoded(pipe, I2I, seed=seed, inputs=given)
        assert_same(images, by_hand.image_to_image(PROMPTS, PICTURES[picture], seed, p, 0.5, SCALES)["image"])
        assert ran == expected, (picture, seed, p)
    caches = (pipe.prompt_cache, pipe.image_cache)
    kept = [{name for made in cache._entries.values() for name in made} for cache in caches]
    assert kept == [{"prompt_embeds"}, {"image_latents"}]
    assert (len(pipe.prompt_cache), len(pipe.image_cache)) == (BATCH, 3 * BATCH)
    pipe.forget()
    assert len(pipe.prompt_cache) == len(pipe.image_cache) == pipe.prompt_cache.bytes == pipe.image_cache.bytes == 0
    assert encoded(pipe, I2I, inputs=given)[1] == ["text_encoder", "vae_encoder"]


def test_what_a_graph_of_a_mode_made_is_kept_too(pipe: Pipeline) -> None:
    given = {"input_image": PICTURES[0], **numbers()}
    for picture, expected in (
        (1, ["text_encoder", "vae_encoder", "controlnet"]),
        (1, []),
        (2, ["controlnet"]),
        (1, []),
    ):
        with_control = given | {"control_image": PICTURES[picture]}
        images, ran = encoded(pipe, I2I, inputs=with_control, modes=["control"])
        theirs = by_hand.image_to_image(PROMPTS, PICTURES[0], 5, 0.75, 0.5, SCALES, control=PICTURES[picture])
        assert_same(images, theirs["image"])
        assert ran == expected
    images, ran = encoded(pipe, I2I, inputs=given)
    assert_same(images, by_hand.image_to_image(PROMPTS, PICTURES[0], 5, 0.75, 0.5, SCALES)["image"])
    assert ran == []


def test_a_negative_prompt_that_is_some_prompt_is_known(pipe: Pipeline) -> None:
    """An entry is of a graph and a text, wherever in a chain it is read, and in whichever chain."""
    one, other = PROMPTS
    assert encoded(pipe, T2I)[1] == ["text_encoder"]
    for prompts, negative in ((PROMPTS, PROMPTS), ([other, one], one), ([one, one], PROMPTS)):
        images, ran = encoded(pipe, T2I, prompt=prompts, negative_prompt=negative, guidance_scale=2.5)
        texts = negative if isinstance(negative, list) else [negative] * BATCH
        assert_same(images, by_hand.text_to_image(prompts, 5, 2, 2.5, texts)["image"])
        assert ran == []
    assert encoded(pipe, I2I, inputs={"input_image": PICTURES[0], **numbers()})[1] == ["vae_encoder"]
    assert len(pipe.prompt_cache) == BATCH
    assert encoded(pipe, T2I, negative_prompt=[one, "snow"], guidance_scale=2.5)[1] == ["text_encoder"]
    assert len(pipe.prompt_cache) == BATCH + 1


@pytest.mark.parametrize("chain", [T2I, I2I])
def test_a_sample_has_all_that_a_chain_takes(pipe: Pipeline, chain: str) -> None:
    """Grey pictures, and zeros: what a bench times."""
    opened = pipe.bundle.open_chain(chain)
    request = Request.sample(opened, 2, "a cat")
    assert (request.prompts, request.seed, request.output_type) == (("a cat",) * BATCH, 0, "uint8")
    given = {name: array.value for name, array in request.inputs}
    if chain == T2I:
        assert given == {} and request == Request.make(opened, ["a cat"] * 2, seed=0, output_type="uint8")
        theirs = by_hand.text_to_image(["a cat"] * BATCH, 0, 2)
    else:
        grey = np.full((BATCH, *SIZES[I2I], 3), 128, np.uint8)
        np.testing.assert_array_equal(given.pop("input_image"), grey)
        assert {name: value.shape for name, value in given.items()} == {n: v.shape for n, v in numbers().items()}
        assert not any(value.any() for value in given.values())
        theirs = by_hand.image_to_image(["a cat"] * BATCH, grey, 0, 0.0, 0.0, [0.0] * 3)
    apart = np.abs(pipe.draw(request).images.astype(int) - theirs["image"])
    assert apart.max() <= 1


def test_the_prompt_cache_tells_modes_and_negative_prompts_apart(pipe: Pipeline) -> None:
    for negative in ("red", "dog", "red"):
        ours = drawn(pipe, T2I, negative_prompt=negative, inputs=GUIDED, modes=["guidance"])
        assert_same(ours, by_hand.text_to_image(PROMPTS, 5, 2, 2.5, [negative] * BATCH)["image"])
        assert_same(drawn(pipe, T2I, negative_prompt=negative), by_hand.text_to_image(PROMPTS, 5, 2)["image"])


def test_embeds_in_place_of_the_prompt_leave_the_negative_prompt_to_its_stage(pipe: Pipeline) -> None:
    reference = by_hand.text_to_image(PROMPTS, 5, 2, 2.5, ["red", "dog"])
    given = {"prompt": None, "prompt_embeds": reference["prompt_embeds"], "negative_prompt": ["red", "dog"]}
    assert_same(drawn(pipe, T2I, **given, inputs=GUIDED, modes=["guidance"]), reference["image"])
    with pytest.raises(
        InputError, match="guidance_rescale was given: this chain's guidance takes only a negative prompt"
    ):
        drawn(pipe, T2I, **given, inputs=GUIDED, modes=["guidance"], guidance_rescale=0.5)


def test_latents_are_what_the_last_row_leaves(pipe: Pipeline) -> None:
    """Without the history that goes round the loop too; what a call keeps for the next one, it keeps all the same."""
    call = {"inputs": {"input_image": PICTURES[0], **numbers()}}
    pipe._held.clear()
    first = by_hand.image_to_image(PROMPTS, PICTURES[0], 5, 0.75, 0.5, SCALES)
    latents = drawn(pipe, I2I, **call, output_type="latent")
    np.testing.assert_allclose(latents, first["next_latents"][-1], rtol=0, atol=1e-5)
    second = by_hand.image_to_image(PROMPTS, PICTURES[0], 5, 0.75, 0.5, SCALES, first["next_stream"][-1])
    assert_same(drawn(pipe, I2I, **call), second["image"])


def plain(chain: str) -> set[str]:
    """The graphs of a chain that a call without any mode runs."""
    return {stage.graph for stage in CHAINS[chain].stages if stage.runs(())}


def test_graphs_load_when_their_chain_is_first_used_and_buffers_are_shared(two_chains: Path) -> None:
    with Pipeline.load(two_chains, backend="onnxruntime") as pipe:
        assert loaded(pipe) == plain(T2I) < {*CHAINS[T2I].graphs}
        drawn(pipe, T2I)
        before = {t: a.ctypes.data for t, a in pipe._executor._buffers.items()}  # type: ignore[union-attr]
        drawn(pipe, I2I, inputs={"input_image": PICTURES[0], **numbers()})
        assert loaded(pipe) == plain(T2I) | plain(I2I)
        after = {t: a.ctypes.data for t, a in pipe._executor._buffers.items()}  # type: ignore[union-attr]
        assert before == {t: after[t] for t in before}
        assert sum(t.name == "prompt_embeds" for t in after) == 1  # both chains' text
        assert {t.shape for t in after if t.name == "latents"} == set(LATENTS.values())
    with Pipeline.load(two_chains, backend="onnxruntime", chain=I2I) as pipe:
        assert loaded(pipe) == plain(I2I)


def test_a_gpu_shares_no_constant_between_tables(two_chains: Path) -> None:
    """Two chains have a two-step table each, and every row is a buffer of its own."""
    opened = Bundle.open(two_chains)
    both = {name: opened.open_chain(name) for name in CHAINS}
    assert not np.array_equal(both[T2I].columns("2")["v"][0], both[I2I].columns("2")["v"][0][:1])
    recordings = {name: record(chain.plan("2"), opened.manifest.graphs) for name, chain in both.items()}
    buffers = {name: set(recording.constants) for name, recording in recordings.items()}
    assert buffers[T2I] and not buffers[T2I] & buffers[I2I]
    assert not set(recordings[T2I].constants.values()) & set(recordings[I2I].constants.values())
    three = record(both[T2I].plan("3"), opened.manifest.graphs)
    assert not set(three.constants) & buffers[T2I]


def test_a_gpu_keeps_a_stream_and_runs_one_graph_once_at_a_time(two_chains: Path) -> None:
    opened = Bundle.open(two_chains)
    recording = record(opened.open_chain(I2I).plan("2"), opened.manifest.graphs)
    assert recording.kept == {"stream"}  # what a rehearsal must leave alone
    assert recording.actions[-2:-1] == (OnDevice("next_stream", "stream"),)
    assert not {"stream", "residual"} & set(recording.uploads)
    guided = record(opened.open_chain(T2I).plan("2", modes=["guidance"]), opened.manifest.graphs)
    assert guided.kept == set()
    groups = [[launch.graph for launch in a.launches] for a in guided.actions if isinstance(a, Together)]
    assert all(len(group) == len(set(group)) for group in groups)
    assert [g for group in groups for g in group].count("text_encoder") == 2


def test_a_plan_runs_the_stages_of_its_modes(two_chains: Path) -> None:
    chain = Bundle.open(two_chains).open_chain(I2I)
    for modes in ([], ["control"]):
        plan = chain.plan("2", modes=modes)
        assert ("controlnet" in plan.graphs) == bool(modes)
        assert sum(isinstance(o, Run) and o.graph == "step@24x8" for o in plan.operations) == 3  # two steps, three rows
