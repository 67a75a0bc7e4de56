"""LoRA adapters in a bundle with slots: loaded, set and unloaded between two pictures."""

import gc
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import control_nets
import lora_files
import numpy as np
import openvino_engine
import psutil
import pytest
from conftest import ON, SIZE
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from here import build_here
from image_calls import picture
from lora_files import Layers
from test_lora_patch import CALL, load, theirs
from test_parity import assert_same_picture, load_diffusers

from turbochain.runtime import Bundle, InputError, Pipeline, TurbochainError
from turbochain.runtime.backends import openvino
from turbochain.runtime.checks import metrics
from turbochain.runtime.checks.bounds import BOUNDS
from turbochain.runtime.serve.models import Models
from turbochain.runtime.serve.pipelines import Pipelines
from turbochain.runtime.serve.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(checkpoint: Path, **how: Any) -> Layers:
    """A random adapter of all that has a slot: linear layers and 1×1 convolutions, but for those in the tables."""
    drawn = lora_files.draw(checkpoint, **how)
    small = {place: layer for place, layer in drawn.items() if layer.down.shape[2:] in ((), (1, 1))}
    return {place: layer for place, layer in small.items() if "time_embedding" not in place[1]}


@pytest.fixture(scope="module")
def files(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters a and b have the ranks 4 and 3; c has rank 2, and only the UNet's matrices."""
    folder = tmp_path_factory.mktemp("loras")
    drawn = {
        "a": draw(checkpoints["sd"], seed=1, alphas=(2.0,)),
        "b": draw(checkpoints["sd"], seed=2, ranks=(3,)),
        "c": draw(checkpoints["sd"], seed=3, ranks=(2,), only="unet"),
    }
    return {n: lora_files.write(folder / f"{n}.safetensors", of, "kohya") for n, of in drawn.items()}


@pytest.fixture(scope="module")
def shared_pipe(slotted: Path) -> Iterator[Pipeline]:
    with load(slotted) as found:
        yield found


@pytest.fixture
def pipe(shared_pipe: Pipeline) -> Iterator[Pipeline]:
    yield shared_pipe
    shared_pipe.unload_lora_weights()


def load_all(pipe: Pipeline, files: dict[str, Path]) -> None:
    for name, file in files.items():
        pipe.load_lora_weights(file, adapter_name=name)


def test_pictures_are_those_of_diffusers_with_peft(
    pipe: Pipeline, files: dict[str, Path], checkpoints: dict[str, Path]
) -> None:
    """One adapter, two side by side, negative and zero weights, components of their own weights; names as there."""
    reference = load_diffusers(checkpoints["sd"])
    of_unet = {name: file for name, file in files.items() if name != "b"}  # transformers loses the text of the first
    for of in (pipe, reference):
        assert of.get_active_adapters() == []
        load_all(of, of_unet)
    assert_same_picture(pipe(**CALL).images, theirs(reference, CALL))  # a in the text encoder, c in the UNet
    for names, weights in (
        (["a", "c"], [0.7, -0.4]),
        ("a", 0.8),
        (["c"], None),
        (["c", "a"], [{"unet": 0.5}, {"unet": 0.3, "text_encoder": 0.0}]),
    ):
        for of in (pipe, reference):
            of.set_adapters(names, weights)
        assert pipe.get_active_adapters() == reference.get_active_adapters()
        assert pipe.get_list_adapters() == reference.get_list_adapters()
        assert_same_picture(pipe(**CALL).images, theirs(reference, CALL))
    for of in (pipe, reference):
        of.delete_adapters("c")
    assert pipe.get_active_adapters() == reference.get_active_adapters() == ["a"]


def build(checkpoint: Path, bundle: Path, **how: Any) -> Path:
    """Build a bundle of a test's own."""
    how = {"precision": "fp32", "size": SIZE, "tasks": ["text-to-image"], "steps": [2], "quiet": True, **ON, **how}
    return build_here(str(checkpoint), bundle, **how).bundle


@pytest.mark.full
def test_pictures_of_sdxl_are_those_of_diffusers_with_peft(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Both text encoders, and with guidance the negative prompt's pass of the UNet."""
    path = build(checkpoints["sdxl"], tmp_path / "x.bundle", lora_rank=4)
    drawn = draw(checkpoints["sdxl"], seed=1, alphas=(2.0,))
    drawn = {place: layer for place, layer in drawn.items() if place[1] != "add_embedding.linear_1"}
    file = lora_files.write(tmp_path / "x.safetensors", drawn, "peft")  # of kohya's diffusers leaves out add_embedding
    reference = load_diffusers(checkpoints["sdxl"])
    with load(path) as pipe:
        for of in (pipe, reference):
            of.load_lora_weights(file.parent, weight_name=file.name, adapter_name="x")
            of.set_adapters("x", 0.6)
        for scale in (0.0, 3.0):
            call = CALL | {"guidance_scale": scale}
            assert_same_picture(pipe(**call).images, theirs(reference, call))


def test_equal_states_give_equal_bits(pipe: Pipeline, slotted: Path, files: dict[str, Path]) -> None:
    """A, B, both, A, none, in whatever order; without adapters those of a pipeline that never had one."""
    with load(slotted) as other:
        untouched = other(**CALL).images
        assert "unet+lora" not in other._opened().loaded
    np.testing.assert_array_equal(pipe(**CALL).images, untouched)
    load_all(pipe, files)
    made: dict[str, np.ndarray] = {"": untouched}
    for state in ("a", "b", "ab", "a", "", "bc", "cb", "ba", "c", "b", ""):
        pipe.set_adapters(list(state), 0.5)
        out = pipe(**CALL)
        assert out.adapters == tuple((name, 0.5) for name in state)
        expected = made.setdefault("".join(sorted(state)), out.images)
        np.testing.assert_array_equal(out.images, expected, err_msg=state)
    assert len({images.tobytes() for images in made.values()}) == len(made)
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(pipe(**CALL).images, untouched)


def test_a_weight_that_changes_is_the_only_thing_that_changes(pipe: Pipeline, files: dict[str, Path]) -> None:
    """A pipeline that goes from one weight to the next makes what one makes that begins with it."""
    pipe.load_lora_weights(files["a"], adapter_name="a")
    made = {}
    for weight in (1.0, 0.25, -1.0, 0.25):
        pipe.set_adapters("a", weight)
        made.setdefault(weight, []).append(pipe(**CALL).images)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(files["a"], adapter_name="x")
    pipe.set_adapters("x", 0.25)
    for images in made[0.25]:
        np.testing.assert_array_equal(pipe(**CALL).images, images)


def test_a_kohya_and_a_peft_file_of_one_adapter_give_equal_pictures(
    pipe: Pipeline, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    layers, made = draw(checkpoints["sd"], seed=5), []
    for naming in lora_files.NAMINGS:
        file = lora_files.write(tmp_path / f"{naming}.safetensors", layers, naming)
        pipe.load_lora_weights(file)
        made.append(pipe(**CALL).images)
    assert pipe.get_active_adapters() == ["default_3"]
    for images in made:
        np.testing.assert_array_equal(images, made[0])


@pytest.mark.full
def test_the_mode_is_that_of_the_least_rank_that_holds_all_that_are_loaded(
    checkpoints: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    """So that calls with other adapters do not alternate between two graphs."""
    ran: list[str] = []
    path = build(checkpoints["sd"], tmp_path / "x.bundle", lora_rank=[4, 8])

    def graphs(*state: str) -> set[str]:
        pipe.set_adapters(state)
        ran.clear()
        pipe(**CALL, observe=lambda graph, seconds: ran.append(graph))
        return {graph for graph in ran if graph.startswith("unet")}

    with load(path) as pipe:
        pipe.load_lora_weights(files["a"], adapter_name="a")
        assert graphs("a") == graphs() == {"unet+lora"}
        pipe.load_lora_weights(files["b"], adapter_name="b")
        assert graphs("a") == graphs() == graphs("a", "b") == {"unet+lora-8"}
        pipe.load_lora_weights(files["c"], adapter_name="c")
        assert graphs("a", "c") == graphs("b") == {"unet+lora-8"}
        pipe.delete_adapters(["b", "c"])
        assert graphs("a") == {"unet+lora"}
        with pytest.raises(InputError, match="'b' is not loaded"):
            graphs("b")


@pytest.mark.full
def test_an_adapter_and_a_control_image_draw_together(
    checkpoints: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    """As in diffusers, the adapter changes the UNet and the text encoder, and the ControlNet stays as it is."""
    folder = control_nets.controlnet(checkpoints["sd"], tmp_path / "canny")
    path = build(checkpoints["sd"], tmp_path / "x.bundle", lora_rank=8, controlnet={"canny": str(folder)})
    options = {"safety_checker": None, "requires_safety_checker": False, "local_files_only": True}
    net = ControlNetModel.from_pretrained(folder)
    reference = StableDiffusionControlNetPipeline.from_pretrained(checkpoints["sd"], controlnet=net, **options)
    reference.set_progress_bar_config(disable=True)
    steered, image = {"controlnet_conditioning_scale": 0.8, "control_guidance_end": 0.5}, picture(1)
    calls = [CALL | more for more in ({}, steered, {"guidance_scale": 3.0, "negative_prompt": "blurry", **steered})]
    with load(path) as pipe:
        plain = [pipe(**call, control_image=image).images for call in calls]
        for of in (pipe, reference):
            load_all(of, {name: file for name, file in files.items() if name != "b"})
            of.set_adapters(["a", "c"], [0.7, -0.4])
        for call, without in zip(calls, plain, strict=True):
            drawn = pipe(**call, control_image=image).images
            assert_same_picture(drawn, theirs(reference, {**call, "image": image}))
            for other in (without, pipe(**CALL).images):
                assert np.abs(drawn.astype(int) - other).max() > 3
        pipe.unload_lora_weights()
        for call, without in zip(calls, plain, strict=True):
            np.testing.assert_array_equal(pipe(**call, control_image=image).images, without)


def test_a_prompt_is_kept_for_each_state_of_the_text_encoder(pipe: Pipeline, files: dict[str, Path]) -> None:
    ran: list[str] = []

    def encodes(*state: str) -> bool:
        pipe.set_adapters(state)
        ran.clear()
        pipe(**CALL, observe=lambda graph, seconds: ran.append(graph))
        return "text_encoder" in ran

    pipe.forget()
    load_all(pipe, files)
    assert [encodes("a"), encodes("b"), encodes("a"), encodes(), encodes("c"), encodes("b")] == [
        *(True, True, False, True),
        *(False, False),  # c changes the UNet alone
    ]


def test_what_does_not_fit_is_refused(
    pipe: Pipeline, files: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def of(name: str, **how: Any) -> Path:
        return lora_files.write(tmp_path / f"{name}.safetensors", lora_files.draw(checkpoints["sd"], **how), "kohya")

    convolutions, time, large = (
        of("conv", only="conv1"),
        of("time", only="time_embedding"),
        of("large", ranks=(9,), only="to_q"),
    )
    for file in (convolutions, time):
        with pytest.raises(InputError, match=rf"no slot for it: .* build-engine SOURCE --lora {file}$"):
            pipe.load_lora_weights(file)
    with pytest.raises(InputError, match=r"rank 9 in the unet, .* hold 8; build another .*--lora-rank 9"):
        pipe.load_lora_weights(large)
    with pytest.raises(InputError, match=r"one LoRA file was expected in it .*weight_name"):
        pipe.load_lora_weights(tmp_path)
    pipe.load_lora_weights(files["a"].parent, weight_name="a.safetensors", adapter_name="a")
    with pytest.raises(InputError, match="'a': an adapter of this name is loaded"):
        pipe.load_lora_weights(files["b"], adapter_name="a")
    for names, weights, message in (
        ("b", 1.0, "'b' is not loaded; choose from a"),
        (["a", "a"], 1.0, "there twice"),
        (["a"], [1.0, 2.0], "has 2, and 1 adapters are named"),
        (["a"], float("nan"), "nan for 'a'; a finite number"),
        (["a"], {"unet": "much"}, "'much' for 'a'; a finite number"),
        (["a"], {"vae": 0.5}, "'vae' is no component; choose from unet, text_encoder"),
        ([["a"]], 1.0, "is no name; one name or a list"),
    ):
        with pytest.raises(InputError, match=message):
            pipe.set_adapters(names, weights)
    with pytest.raises(InputError, match="'b' is not loaded"):
        pipe.delete_adapters("b")
    load_all(pipe, {name: files[name] for name in "bc"})
    pipe.set_adapters("b")
    with pytest.raises(InputError, match=r"a, b, c have the rank 9 together in the unet, .* hold 8; .*--lora-rank 9"):
        pipe.set_adapters(["a", "b", "c"])
    assert pipe.get_active_adapters() == ["b"]
    pipe.delete_adapters(["b", "c"])
    assert (pipe.get_active_adapters(), pipe(**CALL).adapters) == (["a"], (("a", 1.0),))
    pipe.set_adapters("a", {"unet": 0.5})
    assert pipe(**CALL).adapters == (("a", 0.5),)  # that of the UNet


def test_an_adapter_is_refused_where_a_bundle_has_no_place_for_it(slotted: Path, sd: Path) -> None:
    with pytest.raises(InputError, match=r"lora='slots': .*no slots for adapters; build another .*--lora-rank"):
        load(sd, lora="slots")
    with pytest.raises(InputError, match="lora='both'"):
        load(slotted, lora="both")


def test_slots_can_be_passed_over(slotted: Path, checkpoints: dict[str, Path], pipe: Pipeline, tmp_path: Path) -> None:
    """The same adapter as other weights: the same picture within a level, and no UNet with slots."""
    layers = {place: layer for place, layer in draw(checkpoints["sd"], seed=6).items() if "time" not in place[1]}
    file = lora_files.write(tmp_path / "x.safetensors", layers, "kohya")
    with load(slotted, lora="patch") as patched:
        for of in (pipe, patched):
            of.load_lora_weights(file)
        assert_same_picture(patched(**CALL).images, pipe(**CALL).images)
        assert "unet+lora" not in patched._opened().loaded


@pytest.mark.usefixtures("all_cores")
def test_another_thread_changes_adapters_between_calls(slotted: Path, files: dict[str, Path]) -> None:
    """Each call of several batches is drawn with one state, which its output tells."""
    call = CALL | {"prompt": ["a cat"] * 2, "seed": [1, 2], "num_inference_steps": 1}
    with load(slotted) as pipe:
        load_all(pipe, {name: files[name] for name in "ab"})
        right = {}
        for name in "ab":
            pipe.set_adapters(name)
            right[name] = pipe(**call).images
        done, stop = [], threading.Event()

        def swap() -> None:
            while not stop.is_set():
                for name in "ab":
                    pipe.set_adapters(name)

        thread = threading.Thread(target=swap)
        thread.start()
        try:
            for _ in range(5):
                out = pipe(**call)
                done.append(out.adapters[0][0])
                np.testing.assert_array_equal(out.images, right[done[-1]])
        finally:
            stop.set()
            thread.join()
        pipe.close()
        with pytest.raises(TurbochainError, match="closed"):
            pipe.set_adapters("a")


@pytest.mark.full
def test_swaps_take_no_memory(pipe: Pipeline, files: dict[str, Path]) -> None:
    load_all(pipe, files)

    def swap(count: int) -> int:
        for i in range(count):
            pipe.set_adapters(("a", "b", ["a", "c"], [])[i % 4], 0.5 + i % 3)
            pipe(**CALL | {"num_inference_steps": 1, "prompt": f"{i % 2}"})
            if i % 10 == 0:
                pipe.load_lora_weights(files["c"], adapter_name="again")
                pipe.delete_adapters("again")
        gc.collect()
        return psutil.Process().memory_info().rss

    before = swap(20)
    assert swap(100) - before < 2**21


@pytest.fixture(scope="module")
def on_openvino(slotted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`slotted` with OpenVINO's engine in fp32."""
    return openvino_engine.copied(slotted, tmp_path_factory.mktemp("openvino"))


def unets(pipe: Pipeline) -> set[str]:
    """The graphs of the UNet that are in memory."""
    return {graph for graph in pipe._opened().loaded if graph.startswith("unet")}


def draw_states(pipe: Pipeline, files: dict[str, Path], states: Iterable[str]) -> dict[str, np.ndarray]:
    """Draw without adapters, then with a and b loaded; equal states must give equal bits, and others other ones."""
    made = {"unloaded": pipe(**CALL).images}
    load_all(pipe, {name: files[name] for name in "ab"})
    for state in states:
        pipe.set_adapters(list(state), 0.5)
        images = pipe(**CALL).images
        np.testing.assert_array_equal(images, made.setdefault(state, images), err_msg=state)
    assert len({images.tobytes() for name, images in made.items() if name}) == len(made) - ("" in made)
    return made


def test_openvino_draws_with_slots_and_has_one_unet(on_openvino: Path, pipe: Pipeline, files: dict[str, Path]) -> None:
    with Pipeline.load(on_openvino, threads=1) as ours:
        made = draw_states(ours, files, ("a", "b", "a", ""))
        assert (ours._found.engine.key.backend, unets(ours)) == ("openvino", {"unet+lora"})
        ours.unload_lora_weights()
        np.testing.assert_array_equal(ours(**CALL).images, made["unloaded"])
        assert unets(ours) == {"unet"}
    assert_same_picture(made[""], made["unloaded"])
    load_all(pipe, files)
    for state in "ab":
        pipe.set_adapters(state, 0.5)
        assert_same_picture(made[state], pipe(**CALL).images)


@pytest.mark.full
def test_openvino_draws_with_slots_in_bf16(
    slotted: Path, pipe: Pipeline, files: dict[str, Path], tmp_path: Path
) -> None:
    if not openvino.has_bf16():
        pytest.skip("this CPU does not compute in bf16")
    with Pipeline.load(openvino_engine.copied(slotted, tmp_path, "bf16"), threads=1) as ours:
        made = draw_states(ours, files, ("a", "b", "a", "", "b", ""))
    bounds = BOUNDS["bf16"]["image"]
    load_all(pipe, files)
    for state in ("", "a", "b"):
        pipe.set_adapters([*state], 0.5)
        right = pipe(**CALL).images if state else made["unloaded"]
        assert metrics.psnr(made[state], right) >= bounds["psnr"]
        assert metrics.ssim(made[state], right) >= bounds["ssim"]


@pytest.mark.full
def test_both_unets_stay_if_all_are_to_be_kept(on_openvino: Path, files: dict[str, Path]) -> None:
    with Pipeline.load(on_openvino, threads=1, keep_all=True) as pipe:
        seen = [unets(pipe)]
        pipe.load_lora_weights(files["a"])
        for _ in range(2):
            pipe(**CALL)
            seen.append(unets(pipe))
            pipe.unload_lora_weights()
    both = {"unet", "unet+lora"}
    assert seen == [{"unet"}, both, both]


@pytest.mark.full
@pytest.mark.parametrize("fits", [True, False])
def test_a_server_keeps_both_unets_if_both_fit(on_openvino: Path, files: dict[str, Path], fits: bool) -> None:
    """Which is known of the files' sizes: each graph has its own copy of what it shares with others."""
    graphs = Bundle.open(on_openvino).manifest.graphs
    weight = {name: sum((on_openvino / file).stat().st_size for file in g.files) for name, g in graphs.items()}
    folder = str(files["a"].parent)
    settings = Settings((str(on_openvino),), threads=1, lora_dir=folder, memory_bytes=sum(weight.values()) - (not fits))
    models = Models.open(settings)
    pipelines = Pipelines(models, settings)
    seen = []
    for chosen in ((), (("a", 1.0),), ()):
        pipe = pipelines.get(models.first, chosen)
        pipe(**CALL)
        seen.append(unets(pipe))
    pipelines.close()
    with_slots = {"unet", "unet+lora"} if fits else {"unet+lora"}
    assert seen == [{"unet"}, with_slots, with_slots]


def test_a_model_weighs_more_if_requests_may_name_adapters(slotted: Path, files: dict[str, Path]) -> None:
    """Without any no UNet with slots is ever loaded."""
    graphs = Bundle.open(slotted).manifest.graphs
    weight = {name: sum((slotted / file).stat().st_size for file in g.files) for name, g in graphs.items()}
    for folder, expected in ((str(files["a"].parent), 0), (None, weight["unet+lora"])):
        settings = Settings((str(slotted),), lora_dir=folder)
        models = Models.open(settings)
        assert Pipelines(models, settings)._weight(models.first) == sum(weight.values()) - expected
