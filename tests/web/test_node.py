"""turbochain.mjs in Node: its pictures, noise and ids are Python's, and it refuses what Python refuses."""

import json
import queue
import random
import re
import shutil
import threading
import unicodedata
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import node
import numpy as np
import pytest
import torch
from conftest import ROOT, SIZE
from node import Node, Refused, values
from safetensors import safe_open
from static import static

from turbochain.export.sources.vocabulary import BEGIN, END, clip_vocabulary
from turbochain.runtime import Bundle, InputError, Pipeline
from turbochain.runtime.bundle import hashing
from turbochain.runtime.inputs import noise
from turbochain.runtime.inputs.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(bool(node.lacks()), reason=node.lacks())

GOLDEN = ROOT / "tests/golden/bundle"
SEEDS = [0, 1, 7, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 42, 12345678901, 2**53 - 1, 2**53, 2**63, 2**64 - 1]
SEEDS += [random.Random(i).getrandbits(64) for i in range(20 - len(SEEDS))]
COUNTS = [3, 16_384, 1, 5, 0, 17, 7, 1_003, 2, 1, 15, 31, 15, 16, 9]  # small draws leave half a pair to the next one
IMAGE = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def js(tmp_path_factory: pytest.TempPathFactory, sd: Path) -> Iterator[Node]:
    """Node with the SD miniature and the golden bundle, as the pipelines "sd" and "golden"."""
    with node.running(tmp_path_factory.mktemp("node")) as found:
        for name, path in (("sd", sd), ("golden", GOLDEN)):
            found.ask("load", pipe=name, url=str(path))
        yield found


@pytest.fixture(scope="module")
def python(sd: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd, threads=1) as pipe:
        yield pipe


def assert_same(picture: np.ndarray, expected: np.ndarray) -> None:
    """FORMAT.md's bound of a picture in fp32."""
    off = np.abs(picture.astype(int) - expected)
    assert off.max() <= 1 and np.mean(off > 0) <= 1e-3, (off.max(), np.mean(off > 0))


def camel(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments as JavaScript has them; a seed beyond its numbers is a BigInt."""
    named = {re.sub(r"_(.)", lambda m: m[1].upper(), name): value for name, value in arguments.items()}
    return {n: str(value) if n == "seed" and value >= 2**53 else value for n, value in named.items()}


CASES = [
    ("a red fox", {"seed": 0}),
    ("ΟΔΥΣΣΕΥΣ, a lighthouse 🏳️‍🌈", {"seed": 7, "num_inference_steps": 2}),
    ("", {"seed": 2**32 - 1, "num_inference_steps": 3, "guidance_scale": 4.5}),
    ("窓辺の猫 " * 40, {"seed": 2**63 + 5, "num_inference_steps": 4, "guidance_scale": 3, "negative_prompt": "blue"}),
    ("a robot", {"seed": 3, "image": IMAGE, "num_inference_steps": 4, "strength": 0.55}),
    ("a robot", {"seed": 3, "image": IMAGE}),
]


@pytest.mark.parametrize(("prompt", "arguments"), CASES)
def test_a_picture_is_python_s(js: Node, python: Pipeline, prompt: str, arguments: dict[str, Any]) -> None:
    (expected,) = python(prompt, output_type="uint8", **arguments).images
    given = dict(arguments)
    assert_same(js.picture("sd", prompt, given.pop("image", None), options=camel(given)), expected)


def test_a_picture_is_diffusers_own(js: Node) -> None:
    """Those of the golden bundle's reference: a history, guidance, and images to start from."""
    with safe_open(GOLDEN / "reference.safetensors", "np") as file:
        for i, case in enumerate(json.loads(file.metadata()["cases"])):
            options = {"seed": case["seed"], "numInferenceSteps": case["num_inference_steps"]}
            options |= {"guidanceScale": case["guidance_scale"]}
            image = None
            if case["chain"] == "image-to-image":
                options, image = {**options, "strength": case["strength"]}, file.get_tensor(f"{i}/input_image")[0]
            assert_same(
                js.picture("golden", case["prompt"][0], image, options=options), file.get_tensor(f"{i}/image")[0]
            )


def test_noise_is_pytorch_s(js: Node) -> None:
    for seed in SEEDS:
        ours, theirs = noise.Generator(seed), torch.Generator("cpu").manual_seed(seed)
        drawn = js.ask("noise", seed=seed if seed < 2**53 else str(seed), counts=COUNTS)
        for count, text in zip(COUNTS, drawn, strict=True):
            found, expected = values(text, np.float32), torch.randn(count, generator=theirs).numpy()
            np.testing.assert_allclose(found, expected, rtol=0, atol=0 if count < 16 else 1e-6)
            np.testing.assert_allclose(found, ours.randn(count), rtol=0, atol=0 if count < 16 else 1e-6)


def odd_prompts(count: int) -> list[str]:
    """Texts from all planes, with what the libraries treat differently, and many times as long as the model's length.

    No character is newer than Python's Unicode, and no mark than 3.2's: libraries have tables of different age.
    """
    rng = random.Random(1)
    pieces = [
        "Σ",
        "ΑΣ",
        "σς",
        "\ufeff",
        "\x85",
        "\u200d",
        "\x01",
        "\xa0",
        "İ",
        "ß",
        "ﬁ",
        "e\u0301",
        "\u212b",
        "٣",
        "½",
        "A",
        "the",
    ]
    pieces += ["<|endoftext|>", "<|ENDOFTEXT|>", "<|startoftext|>", "</w>", "!", "!!", "it's", "'S", '"', " ", "\n"]
    pieces += ["👩🏿\u200d🚀", "🏴\U000e0067\U000e0062\U000e007f", "1\ufe0f\u20e3", "🇮🇸"]

    def character() -> str:
        while True:
            found = chr(rng.randrange(rng.choice([0x250, 0x3000, 0x20000, 0x110000])))
            known = unicodedata.category(found) not in ("Cn", "Cs") and found != "\0"
            if known and unicodedata.combining(found) == unicodedata.ucd_3_2_0.combining(found):
                return found

    lengths = rng.choices([1, 4, 20, 200], [10, 40, 45, 5], k=count)
    return ["".join(character() if rng.random() < 0.6 else rng.choice(pieces) for _ in range(n)) for n in lengths]


def write_clip(path: Path, pad: str) -> Path:
    """Write the golden bundle's tokenizer with CLIP's vocabulary: transformers' would take seconds to load."""
    tokenizer = json.loads((GOLDEN / "tokenizer.json").read_text())
    vocabulary, merges = clip_vocabulary()
    tokenizer["model"] |= {"vocab": vocabulary, "merges": merges}
    _, *markers = tokenizer["added_tokens"]
    tokenizer["added_tokens"] = [{**markers[0], "content": c, "id": vocabulary[c]} for c in sorted({pad, BEGIN, END})]
    tokenizer["post_processor"] |= {"cls": [BEGIN, vocabulary[BEGIN]], "sep": [END, vocabulary[END]]}
    path.write_text(json.dumps(tokenizer))
    return path


@pytest.mark.parametrize(("pad", "pad_id", "count"), [("<|endoftext|>", 49407, 1000), ("!", 0, 200)])
def test_ids_are_python_s(js: Node, tmp_path: Path, pad: str, pad_id: int, count: int) -> None:
    """With CLIP's own vocabulary."""
    path = write_clip(tmp_path / "tokenizer.json", pad)
    entry = {"max_length": 77, "pad_token": pad, "pad_id": pad_id}
    prompts = odd_prompts(count)
    expected = Tokenizer(path, **entry).encode(prompts)
    found = js.ask("ids", file=str(path), entry={"file": "", **entry}, prompts=prompts)
    wrong = [p for p, text, ids in zip(prompts, found, expected, strict=True) if (values(text, np.int32) != ids).any()]
    assert not wrong, f"{len(wrong)} of {count} differ, the first is {wrong[0]!r}"


def test_a_token_of_several_vectors_is_written_out(js: Node, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads((GOLDEN / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    first = len(tokenizer["model"]["vocab"])
    for i, token in enumerate(["<cat>", "<cat>_1", "<cat>_2", "midj", "midj_1", "Own", "Own_1"], first):
        tokenizer["added_tokens"].append({"id": i, "content": token, **plain})
    path.write_text(json.dumps(tokenizer))
    entry = {"max_length": 77, "pad_token": "!", "pad_id": 0, "expansions": {"<cat>": 3, "midj": 2, "Own": 2}}
    prompts = ["a <cat>, <CAT>x midj", "<cat>", "Own", "an Own $& midjourney", "x " * 74 + "<cat>", "<cat>_1 midj<cat>"]
    expected = Tokenizer(path, **entry).encode(prompts)
    found = js.ask("ids", file=str(path), entry={"file": "", **entry}, prompts=prompts)
    assert [values(text, np.int32).tolist() for text in found] == expected.tolist()
    with pytest.raises(Refused, match=r"no token <cat>_3, and bundle\.json says it does"):
        js.ask("ids", file=str(path), entry={"file": "", **entry, "expansions": {"<cat>": 4}}, prompts=[])


BAD: list[tuple[str, dict[str, Any]]] = [
    ("a", {"num_inference_steps": 9}),
    ("a", {"num_inference_steps": 0}),
    ("a", {"seed": -1}),
    ("a", {"seed": 2**64}),
    ("a", {"seed": 0.5}),
    ("a", {"strength": 0.5}),
    ("a", {"image": "fox.png"}),
    ("a", {"image": IMAGE, "strength": 1.5}),
    ("a", {"image": IMAGE, "strength": 0.2, "num_inference_steps": 4}),
    ("a", {"image": IMAGE, "strength": 0.0}),
    ("a", {"height": 72}),
    ("a", {"guidance_scale": 1e39}),
    ("a", {"nonsense": 1}),
    ("a\ud83dz", {}),
    ("a", {"guidance_scale": 2, "negative_prompt": "\udc00"}),
    ("a\0", {}),
    ("é" * 17_000, {}),
]


@pytest.mark.parametrize(("prompt", "arguments"), BAD, ids=range(len(BAD)))
def test_what_python_refuses_is_refused(js: Node, python: Pipeline, prompt: str, arguments: dict[str, Any]) -> None:
    with pytest.raises((InputError, TypeError)):
        python(prompt, output_type="uint8", **arguments)
    options = camel(arguments)
    image = options.pop("image") if isinstance(options.get("image"), np.ndarray) else None
    with pytest.raises(Refused) as refused:
        js.picture("sd", prompt, image, options=options)
    assert refused.value.name == "InputError", refused.value


def test_what_only_javascript_can_be_asked_is_refused_too(js: Node) -> None:
    answers = js.ask("odd", pipe="sd", url=str(GOLDEN), width=SIZE[1], height=SIZE[0])
    assert answers and {name: error for name, error in answers.items() if error != "InputError"} == {}


def test_the_least_strength_that_is_named_makes_a_step(js: Node) -> None:
    with pytest.raises(Refused, match="makes no step") as refused:
        js.picture("sd", "a", IMAGE, options={"strength": 0.1, "numInferenceSteps": 3})
    least = float(refused.value.message.split()[-1])
    js.picture("sd", "a", IMAGE, options={"strength": least, "numInferenceSteps": 3})


def test_an_image_of_another_size_is_refused_as_node_has_no_canvas(js: Node) -> None:
    with pytest.raises(Refused, match="image is 32x64: 64x64 was expected"):
        js.picture("sd", "a", IMAGE[:, :32], options={})


def test_alpha_is_dropped(js: Node) -> None:
    with_alpha = np.dstack([IMAGE, IMAGE[..., 0]])
    plain, other = (js.picture("sd", "a", image, options={"seed": 1}) for image in (IMAGE, with_alpha))
    np.testing.assert_array_equal(plain, other)


def test_a_cancelled_call_leaves_the_next_picture_as_it_was(js: Node) -> None:
    before = js.picture("sd", "a fox", options={"seed": 5, "numInferenceSteps": 2})
    for after in (1, 3, 5):
        with pytest.raises(Refused) as refused:
            js.picture("sd", "another", options={"seed": 6, "numInferenceSteps": 4}, end=after)
        assert refused.value.name == "AbortError"
    np.testing.assert_array_equal(js.picture("sd", "a fox", options={"seed": 5, "numInferenceSteps": 2}), before)


def test_a_seed_that_is_drawn_is_told(js: Node) -> None:
    first, second = (js.ask("draw", pipe="sd", prompt="a", options={}) for _ in range(2))
    assert first["seed"] != second["seed"] and first["data"] != second["data"]
    again = js.ask("draw", pipe="sd", prompt="a", options={"seed": int(first["seed"])})
    assert again["data"] == first["data"]


FILES = ["graphs/unet.onnx", "graphs/unet.fp32-0.data", "tables/text-to-image.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["other", "shorter", "longer", "missing"])
def test_a_damaged_file_is_refused_before_it_is_parsed(js: Node, tmp_path: Path, file: str, how: str) -> None:
    """What would be parsed is no file of its kind, so that its parser would say something else."""
    path = shutil.copytree(GOLDEN, tmp_path / "bundle") / file
    size = path.stat().st_size
    content = {"other": size, "shorter": size - 1, "longer": size + 1, "missing": 0}[how] * b"\x81"
    path.write_bytes(content) if content else path.unlink()
    said = {"other": "is damaged: it has the SHA-256", "missing": "cannot be read", "longer": "has more bytes than"}
    with pytest.raises(Refused, match=f"{re.escape(file)} {said.get(how, f'has {size - 1} bytes')}") as refused:
        js.ask("load", pipe="damaged", url=str(tmp_path / "bundle"))
    assert refused.value.name == "InputError"


@pytest.mark.parametrize("more", [0, 5])
def test_a_large_file_is_hashed_in_chunks(js: Node, tmp_path: Path, more: int) -> None:
    path, size = tmp_path / "large.data", hashing.CHUNK + more
    with path.open("wb") as file:
        file.truncate(size)  # takes no room on the disk
    manifest = json.loads((GOLDEN / "bundle.json").read_text())
    manifest["files"]["large.data"] = vars(hashing.describe(path))
    (tmp_path / "bundle.json").write_text(json.dumps(manifest))
    assert js.ask("read", url=str(tmp_path), file="large.data") == size


def test_a_bundle_comes_over_http_with_progress(js: Node) -> None:
    with static(GOLDEN) as server:
        told = js.ask("load", pipe="http", url=server.url, tasks=["image-to-image"])["told"]
        with pytest.raises(Refused, match=r"none/bundle\.json cannot be read .*404"):
            js.ask("load", pipe="none", url=f"{server.url}/none")
    bundle = Bundle.open(GOLDEN)
    files = set(bundle.open_chain("image-to-image").files)
    total = sum(bundle.manifest.files[file].size for file in files)
    assert {progress["file"] for progress in told} == files and {progress["total"] for progress in told} == {total}
    loaded = [progress["loaded"] for progress in told]
    assert loaded == sorted(loaded) and loaded[-1] == total
    image = IMAGE[:32, :32].copy()
    pictures = [js.picture(pipe, "a", image, options={"seed": 1}) for pipe in ("http", "golden")]
    np.testing.assert_array_equal(*pictures)


def renamed(folder: Path, name: str) -> Path:
    """Return a copy of the golden bundle whose UNet's graph has another name."""
    path = shutil.copytree(GOLDEN, folder)
    manifest = json.loads((path / "bundle.json").read_text())
    graph = manifest["graphs"]["unet"]
    manifest["files"][name] = manifest["files"].pop(graph["file"])
    (path / graph["file"]).rename(path / name)
    graph["file"] = name
    (path / "bundle.json").write_text(json.dumps(manifest))
    return path


def test_names_that_addresses_write_otherwise(js: Node, tmp_path: Path) -> None:
    """A + is a space to some servers, and what follows a # is never asked for."""
    path = renamed(tmp_path / "a folder, 100%", "graphs/unet +1#é%41?.onnx")
    with static(tmp_path) as server:
        js.ask("load", pipe="odd", url=f"{server.url}/a%20folder,%20100%25?version=2#top")
        js.ask("load", pipe="odd file", url=str(path))
        (asked,) = (of for of in server.asked if "/unet%20" in of)
    assert asked == "/a%20folder,%20100%25/graphs/unet%20%2B1%23%C3%A9%2541%3F.onnx"
    pictures = [js.picture(pipe, "a", options={"seed": 1}) for pipe in ("odd", "odd file", "golden")]
    np.testing.assert_array_equal(pictures[0], pictures[2])
    np.testing.assert_array_equal(pictures[1], pictures[2])


def test_a_file_that_is_too_long_is_not_read_to_its_end(js: Node) -> None:
    """The server writes it until the connection is closed; if nobody closed it, its turn to write would never come."""
    ends: queue.Queue[str] = queue.Queue()

    class Endless(SimpleHTTPRequestHandler):
        timeout = 20

        def __init__(self, *given: Any) -> None:
            super().__init__(*given, directory=str(GOLDEN))

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            if not self.path.endswith("tokenizer.json"):
                return super().do_GET()
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(1 << 20):
                    self.wfile.write(bytes(1 << 16))
                ends.put("written")
            except OSError as error:
                ends.put(type(error).__name__)

    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        with pytest.raises(Refused, match=r"tokenizer\.json has more bytes than"):
            js.ask("load", pipe="endless", url=f"http://127.0.0.1:{server.server_port}")
        assert ends.get(timeout=30) in ("ConnectionResetError", "BrokenPipeError")
        server.shutdown()
        thread.join(20)


def changed(change: Callable[[dict[str, Any]], object], folder: Path) -> str:
    manifest = json.loads((GOLDEN / "bundle.json").read_text())
    change(manifest)
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return str(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["requires"].update(control="0.1.0", stream="0.1.0"), "has control, stream, and cannot be read"),
        (lambda m: m.update(format_version=3), "has format_version 3, and cannot be read"),
        (lambda m: [chain.update(batch=2) for chain in m["chains"].values()], "has no chain that makes one picture"),
        (lambda m: m["files"].pop("tokenizer.json"), "has no record of tokenizer.json"),
        (lambda m: m["files"]["tokenizer.json"].update(size="1"), "has no record of tokenizer.json"),
        (lambda m: m["files"]["tokenizer.json"].update(size=2**52), "there is no memory for them"),
        (lambda m: m["graphs"].pop("unet"), "bundle.json is not whole"),
        (lambda m: m["tokenizers"].clear(), "bundle.json is not whole"),
        (lambda m: m.pop("files"), "bundle.json is not whole"),
        (lambda m: m["chains"]["text-to-image"].pop("stages"), "bundle.json is not whole"),
    ],
    ids=["features", "version", "batches", "record", "size", "memory", "graph", "tokenizer", "files", "stages"],
)
def test_a_bundle_that_is_not_for_it_is_refused(js: Node, tmp_path: Path, change: Any, said: str) -> None:
    url = changed(change, shutil.copytree(GOLDEN, tmp_path / "bundle"))
    with pytest.raises(Refused, match=said) as refused:
        js.ask("load", pipe="other", url=url)
    assert refused.value.name == "InputError"


def test_what_it_says_of_its_tasks(js: Node, tmp_path: Path) -> None:
    told = js.ask("load", pipe="again", url=str(GOLDEN))
    assert told["backend"] == "cpu"
    assert told["tasks"] == {
        "text-to-image": {"sizes": [[32, 32]], "steps": [1, 3], "strengths": [], "strength": None},
        "image-to-image": {"sizes": [[32, 32]], "steps": [1, 3], "strengths": [], "strength": 1 / 3},
    }
