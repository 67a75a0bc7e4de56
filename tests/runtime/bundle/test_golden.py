"""The golden bundle is as FORMAT.md says, to the byte, and a reader written from that page draws its pictures."""

import dataclasses
import hashlib
import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ON, ROOT
from tokenizers import Tokenizer

from turbochain.engines import build
from turbochain.runtime import Bundle, Pipeline
from turbochain.runtime.bundle import manifest, strict_json

GOLDEN = ROOT / "tests/golden/bundle"
FORMAT, FEATURES, CHECKS, ENGINES = (
    (ROOT / page).read_text()
    for page in ("runtime/FORMAT.md", "runtime/FEATURES.md", "runtime/checks/README.md", "engines/README.md")
)
DTYPES = {"F32": np.float32, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}


def safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file, read as the safetensors format says."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, t in header.items():
        start, end = (8 + length + offset for offset in t["data_offsets"])
        found[name] = np.frombuffer(raw[start:end], DTYPES[t["dtype"]]).reshape(t["shape"])
    return found


class Reader:
    """Draws a picture with the golden bundle: FORMAT.md in numpy, torch's generator and ONNX Runtime."""

    def __init__(self, path: Path, chain: str = "text-to-image") -> None:
        self.manifest = json.loads((path / "bundle.json").read_text())
        self.chain = self.manifest["chains"][chain]
        self.tables = safetensors(path / self.chain["tables_file"])
        self.tokenizers = {
            n: Tokenizer.from_file(str(path / t["file"])) for n, t in self.manifest["tokenizers"].items()
        }
        self.sessions = {
            name: onnxruntime.InferenceSession(path / graph["file"], providers=["CPUExecutionProvider"])
            for name, graph in self.manifest["graphs"].items()
        }
        self.shapes = {
            stage.get("wires", {}).get(t["name"], t["name"]): t["shape"]
            for stage in self.chain["stages"]
            for ends in ("inputs", "outputs")
            for t in self.manifest["graphs"][stage["graph"]][ends]
        }

    def ids(self, feed: str, prompt: str) -> np.ndarray:
        entry = self.manifest["tokenizers"][feed]
        self.tokenizers[feed].no_truncation()
        self.tokenizers[feed].no_padding()
        found, length = self.tokenizers[feed].encode(prompt).ids, entry["max_length"]
        found = found if len(found) <= length else [*found[: length - 1], found[-1]]
        return np.array([[*found, *[entry["pad_id"]] * (length - len(found))]], np.int32)

    def column(self, table: str, name: str, row: int) -> np.ndarray:
        if name in ("p", "q"):
            value = self.tables[f"{table}/start"][0, "pq".index(name)]
        elif f"{table}/{name}" in self.tables:
            value = self.tables[f"{table}/{name}"][row]
        elif f"columns/{name}" in self.tables:
            value = self.tables[f"columns/{name}"][self.tables[f"{table}/index"][row]]
        else:
            value = self.tables[f"constants/{name}"]
        return value.reshape(self.shapes[name])

    def run(self, when: str, mode: str, now: dict[str, np.ndarray]) -> None:
        stages = [s for s in self.chain["stages"] if s["when"] == when]
        for stage in (s for s in stages if set(s.get("if", [])) <= {mode} and mode not in s.get("unless", [])):
            session, wires = self.sessions[stage["graph"]], stage.get("wires", {})
            fed = {i.name: now[wires.get(i.name, i.name)] for i in session.get_inputs()}
            for end, value in zip(session.get_outputs(), session.run(None, fed), strict=True):
                now[wires.get(end.name, end.name)] = value

    def draw(
        self,
        prompt: str,
        seed: int,
        steps: int,
        *,
        begin: int = 0,
        image: np.ndarray | None = None,
        guidance: float = 0.0,
        negative: str = "",
    ) -> np.ndarray:
        (table,) = (n for n, t in self.chain["tables"].items() if (t["steps"], t.get("begin", 0)) == (steps, begin))
        feeds, rows = self.chain["feeds"], self.chain["tables"][table]["rows"]
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn: dict[str, Any] = {}
        for one in self.chain["draws"]:
            draws = self.tables[f"{table}/draws_noise"] if feeds[one["name"]]["when"] == "step" else [True]
            shape = self.shapes[one["name"]]
            noise = [torch.randn(shape, generator=generator).numpy() if d else np.zeros(shape, "f4") for d in draws]
            scale = feeds[one["name"]].get("scale")
            drawn[one["name"]] = [n * self.tables[f"{table}/{scale}"] if scale else n for n in noise]
        now: dict[str, Any] = {"input_image": image, "guidance_scale": np.array([guidance], np.float32)}
        mode = "guidance" if guidance > 1 else ""
        for name, feed in feeds.items():
            if feed["is"] == "ids":
                now[name] = self.ids(name, negative if feed.get("of") == "negative_prompt" else prompt)
            elif feed["is"] == "column" and feed["when"] == "call":
                now[name] = self.column(table, name, 0)
            elif feed["is"] == "history":
                now[name] = np.zeros(self.shapes[name], np.float32)
            elif name in drawn and feed["when"] == "call":
                (now[name],) = drawn[name]
        self.run("prompt", mode, now)
        self.run("image", mode, now)
        for row in range(rows):
            if row:
                now |= {target: now[source] for source, target in self.chain["carry"].items()}
            per_step = [name for name, feed in feeds.items() if feed["when"] == "step"]
            now |= {n: drawn[n][row] if n in drawn else self.column(table, n, row) for n in per_step}
            self.run("step", mode, now)
        self.run("end", mode, now)
        return now[self.chain["output"]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with an engine, which was verified against what diffusers produced."""
    path = tmp_path_factory.mktemp("golden") / "golden.bundle"
    shutil.copytree(GOLDEN, path)
    build(str(path), quiet=True, **ON)
    return path


def test_every_file_has_its_record() -> None:
    records = json.loads((GOLDEN / "bundle.json").read_text())["files"]
    found = {str(p.relative_to(GOLDEN)): p.read_bytes() for p in GOLDEN.rglob("*") if p.is_file()}
    raw = found.pop("bundle.json")
    assert raw.endswith(b"\n")
    sizes = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in found.items()}
    assert sizes == records
    listed = {name: [r["size"], r["sha256"]] for name, r in sorted(records.items())}
    opened = Bundle.open(GOLDEN)
    backwards = dataclasses.replace(opened.manifest, files=dict(reversed(opened.manifest.files.items())))
    for bundle in (opened, Bundle(GOLDEN, backwards)):
        assert bundle.id == hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def test_the_pages_words_are_those_that_are_read() -> None:
    rows = FORMAT.partition("| `is` | `when` | contents |")[2].partition("\n\n")[0].splitlines()[2:]
    feeds: dict[str, list[str]] = {}
    for kinds, when, contents in (row.strip("| ").split(" | ", 2) for row in rows):
        plain, _, more = when.partition("(")
        feeds |= {kind: re.findall(r"call|step|held", plain) for kind in re.findall(r"`(\w+)`", kinds)}
        for kind, also in re.findall(r"`(\w+)` also (\w+)", more):
            feeds[kind].append(also)
        if "`of`" in contents:
            assert ["", *re.findall(r'`of` is "(\w+)"', contents)] == [*manifest.TEXTS]
    assert feeds == {kind: [*when] for kind, when in manifest.FEEDS.items()}
    (features,) = re.findall(r"^\| `requires` \|.*?\}: (.*?)\. A reader", FORMAT, re.M)
    assert sorted(re.findall(r"`(\w+)`", features)) == sorted(manifest.FEATURES)
    (per,) = re.findall(r"`per`, one of (.*?)\. A `discarded`", FORMAT, re.S)
    assert sorted(re.findall(r'"(\w+)": ', per)) == sorted(manifest.PER)
    (judged,) = re.findall(r"`judged` says what it makes, which decides\s+the bound: ([^.]*)\.", CHECKS)
    assert sorted(re.findall(r"`(\w+)`", judged)) == sorted(manifest.JUDGED)


@pytest.mark.parametrize("dtype", manifest.DTYPES)
def test_a_tensor_is_as_large_as_numpys(dtype: str) -> None:
    """A GPU's buffers are allocated and copied by it."""
    assert manifest.Tensor("x", dtype, (2, 3, 5)).nbytes == np.zeros((2, 3, 5), dtype).nbytes


def test_a_graphs_digest_is_that_of_all_its_files() -> None:
    """The .onnx first, then its data: an engine of other weights does not fit."""
    opened = Bundle.open(GOLDEN)
    for name, graph in json.loads((GOLDEN / "bundle.json").read_text())["graphs"].items():
        hashes = [hashlib.sha256((GOLDEN / file).read_bytes()).hexdigest() for file in (graph["file"], *graph["data"])]
        assert opened.graph_digest(name) == hashlib.sha256("".join(hashes).encode()).hexdigest()


def test_the_manifest_is_written_as_it_was_read() -> None:
    path = GOLDEN / "bundle.json"
    assert strict_json.write(strict_json.read(manifest.Manifest, path)).encode() == path.read_bytes()


def is_excerpt(part: Any, whole: Any) -> bool:
    """Return whether `whole` has all that `part` has; lists are whole."""
    if not isinstance(part, dict):
        return bool(part == whole)
    return all(name in whole and is_excerpt(value, whole[name]) for name, value in part.items())


def test_the_pages_example_is_of_the_golden_bundle() -> None:
    blocks = re.findall(r"(?:^    .*\n)+", FORMAT, re.M)
    (example,) = (json.loads(block) for block in blocks if '"stages"' in block)
    assert is_excerpt(example, json.loads((GOLDEN / "bundle.json").read_text()))
    example["chains"]["text-to-image"]["stages"].pop()
    assert not is_excerpt(example, json.loads((GOLDEN / "bundle.json").read_text()))


@pytest.mark.parametrize(
    "kind",
    [value for value in vars(manifest).values() if dataclasses.is_dataclass(value)],
    ids=lambda kind: kind.__name__,
)
def test_the_pages_have_every_key(kind: Any) -> None:
    engines = (manifest.Engine, manifest.EngineKey, manifest.EngineGraph, manifest.Gpu, manifest.Check)
    page = ENGINES if kind in engines else FORMAT
    for field in dataclasses.fields(kind):
        key = field.name.removesuffix("_")
        assert re.search(rf'[`"]{key}[`"(]', page), key


def test_every_optional_feature_has_its_words() -> None:
    """On the first page, under a heading of the second, or where the reference is described."""
    headings = {word for line in re.findall(r"^## (.*)$", FEATURES, re.M) for word in line.split(" and ")}
    of_reference = re.findall(r"requires `(\w+)`", CHECKS)
    assert headings | {"modes", "multistep", "wires", *of_reference} == {*manifest.FEATURES}


@pytest.mark.parametrize(
    ("prompt", "seed", "steps"), [("a small red star", 0, 1), ("", 2**32 + 5, 3), ("cat " * 99, 7, 3)]
)
def test_a_reader_written_from_the_page_draws_the_same(built: Path, prompt: str, seed: int, steps: int) -> None:
    expected = Reader(GOLDEN).draw(prompt, seed, steps)
    with Pipeline.load(built) as pipe:
        found = pipe(prompt, seed=seed, num_inference_steps=steps, output_type="uint8").images
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3


@pytest.mark.parametrize(("strength", "begin"), [(1.0, 0), (0.7, 1), (0.34, 2)])
@pytest.mark.parametrize("guidance", [0.0, 4.5])
def test_it_draws_the_same_of_an_image(built: Path, strength: float, begin: int, guidance: float) -> None:
    image = np.random.default_rng(begin).integers(0, 256, (1, 32, 32, 3), np.uint8)
    call = ("a small red star", 7, 3)
    more = {"begin": begin, "image": image, "guidance": guidance, "negative": "cat"}
    expected = Reader(GOLDEN, "image-to-image").draw(*call, **more)
    with Pipeline.load(built) as pipe:
        prompt, seed, steps = call
        found = pipe(
            prompt,
            image=image,
            strength=strength,
            guidance_scale=guidance,
            negative_prompt="cat" if guidance else None,
            seed=seed,
            num_inference_steps=steps,
            output_type="uint8",
        ).images
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3


def test_that_reader_draws_what_diffusers_drew() -> None:
    recorded = safetensors(GOLDEN / "reference.safetensors")
    raw = (GOLDEN / "reference.safetensors").read_bytes()
    cases = json.loads(json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"]["cases"])
    assert {(case["chain"], *case["modes"]) for case in cases} == {
        (chain, *mode) for chain in ("text-to-image", "image-to-image") for mode in ((), ("guidance",))
    }
    for i, case in enumerate(cases):
        reader = Reader(GOLDEN, case["chain"])
        table = reader.chain["tables"][case["table"]]
        assert table["steps"] == case["num_inference_steps"]
        found = reader.draw(
            *case["prompt"],
            case["seed"],
            table["steps"],
            begin=table.get("begin", 0),
            image=recorded.get(f"{i}/input_image"),
            guidance=case["guidance_scale"],
        )
        assert np.abs(found.astype(int) - recorded[f"{i}/image"]).max() <= 1
        times = recorded["columns/time_projections"][recorded[f"{i}/time_projections"]]
        rows = [reader.column(case["table"], "time_projections", row) for row in range(table["rows"])]
        np.testing.assert_allclose(times, rows, rtol=1e-5, atol=1e-6)
