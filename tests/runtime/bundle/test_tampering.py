"""A bundle that is not what was built: refused before anything of it is used, with every problem named."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import called
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file

from turbochain.runtime import Bundle, BundleError, Pipeline
from turbochain.runtime.bundle import hashing, strict_json
from turbochain.runtime.bundle.manifest import FEATURES, Engine, Manifest
from turbochain.runtime.checks import verify

CHAIN = "text-to-image"
Edit = Callable[[dict[str, Any]], object]


def edit_json(path: Path, edit: Edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def put(*keys: str | int, value: Any) -> Edit:
    def edit(node: Any) -> None:
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return edit


def drop(*keys: str | int) -> Edit:
    def edit(node: Any) -> None:
        for key in keys[:-1]:
            node = node[key]
        del node[keys[-1]]

    return edit


def together(*edits: Edit) -> Edit:
    return lambda value: [edit(value) for edit in edits]


def rehash(bundle: Path, *names: str) -> None:
    """Make bundle.json say what the files are now."""
    records = {name: vars(hashing.describe(bundle / name)) for name in names}
    edit_json(bundle / "bundle.json", lambda m: m["files"].update(records))


def refit(bundle: Path) -> None:
    """Make engine.json say that the engine was built from the graphs as they are now."""
    opened = Bundle.open(bundle)
    edits = (put("graphs", name, "digest", value=opened.graph_digest(name)) for name in opened.manifest.graphs)
    edit_json(engine_json(bundle), together(*edits))


def engine_json(bundle: Path) -> Path:
    (found,) = bundle.glob("engines/*/engine.json")
    return found


def refusal(bundle: Path) -> str:
    """What Pipeline.load says, as one line."""
    with pytest.raises(BundleError) as caught:
        Pipeline.load(bundle)
    message = str(caught.value)
    assert "\n" not in message
    return message


UNET, STEP, DECODER = ("graphs", "unet"), ("graphs", "step"), ("graphs", "vae_decoder")
OF = ("chains", CHAIN)
FEEDS, STAGES, DRAWS, TABLES = (*OF, "feeds"), (*OF, "stages"), (*OF, "draws"), (*OF, "tables")
PROMPT, _, OF_UNET, _, OF_STEP, _, OF_DECODER = ((*STAGES, i) for i in range(7))  # between them those of guidance
MANIFEST_EDITS = {
    "unknown key": (put("speed", value="fast"), "the top level has the unknown key 'speed'"),
    "unknown nested key": (put(*UNET, "speed", value=1), "graphs.unet has the unknown key 'speed'"),
    "unknown key in a row": (
        put(*STAGES, 2, "d", value=0.0),
        f"chains.{CHAIN}.stages[2] has the unknown key 'd'",
    ),
    "missing key": (drop("family"), "the top level lacks the key 'family'"),
    "missing nested key": (drop(*OF, "carry"), "chains.text-to-image lacks the key 'carry'"),
    "missing word": (drop(*FEEDS, "noise", "is"), f"chains.{CHAIN}.feeds.noise lacks the key 'is'"),
    "text for a number": (
        put(*TABLES, "1", "rows", value="14"),
        f'chains.{CHAIN}.tables.1.rows should be int, and is "14"',
    ),
    "true for a number": (put(*UNET, "opset", value=True), "graphs.unet.opset should be int, and is true"),
    "number for text": (put("created", value=3), "created should be str, and is 3"),
    "number for a name": (
        put(*OF_UNET, "wires", value={"latents": 3}),
        f"chains.{CHAIN}.stages[2].wires.latents should be str, and is 3",
    ),
    "object for a list": (put(*UNET, "data", value={}), "graphs.unet.data should be tuple"),
    "list for an object": (put("graphs", value=[]), "graphs should be dict, and is []"),
    "null": (put("files", value=None), "files should be dict, and is null"),
    "newer format": (
        together(put("format_version", value=3), put("from the future", value=1)),
        "format version 3, and this turbochain reads version 2: pip install --upgrade turbochain",
    ),
    "older format": (
        together(put("format_version", value=1), drop("requires"), put(*OF, "loop", value=["unet"])),
        "format version 1, and this turbochain reads version 2 alone: remove ",
    ),
    "format of a wrong type": (put("format_version", value="2"), 'format_version should be int, and is "2"'),
    "feature of a later version": (
        together(put("requires", value={"telepathy": "9.9"}), put("thoughts", value={})),
        "uses telepathy (turbochain 9.9), which this turbochain cannot read: pip install --upgrade turbochain",
    ),
    "no chain": (put("chains", value={}), "bundle.json is not valid: there is no chain"),
    "graph that is not there": (
        drop(*UNET),
        "chain text-to-image names the graph unet, which the bundle lacks",
    ),
    "name produced twice": (
        put(*DECODER, "outputs", 0, "name", value="next_latents"),
        "next_latents is produced twice, by step and vae_decoder",
    ),
    "name produced and fed": (
        put(*FEEDS, "image", value={"is": "noise", "when": "call"}),
        "image is produced twice, by the caller and vae_decoder",
    ),
    "input without a source": (drop(*FEEDS, "noise"), "the input noise of step has no source"),
    "input that a later graph makes": (
        put("graphs", "text_encoder", "inputs", 0, "name", value="image"),
        "the input image of text_encoder has no source",
    ),
    "input that only a step has": (
        put("graphs", "text_encoder", "inputs", 0, "name", value="noise"),
        "the input noise of text_encoder has no source",
    ),
    "input that only the loop makes": (
        put("graphs", "text_encoder", "inputs", 0, "name", value="prediction"),
        "the input prediction of text_encoder has no source",
    ),
    "column that only a step has": (
        put("graphs", "text_encoder", "inputs", 0, "name", value="time_projections"),
        "the input time_projections of text_encoder has no source",
    ),
    "a column that is made and fed": (
        put(*UNET, "outputs", 0, "name", value="v"),
        "v is produced twice, by the caller and unet",
    ),
    "fed and not read": (put(*FEEDS, "mask", value={"is": "mask", "when": "call"}), "nothing reads the feed mask"),
    "kind of feed unknown": (
        put(*FEEDS, "noise", "is", value="music"),
        "the feed noise has 'music', and one of ids, embeds, noise, ",
    ),
    "when of a feed unknown": (
        put(*FEEDS, "noise", "when", value="often"),
        "the feed noise has 'often', and one of call, step, held was expected",
    ),
    "scale of a feed unknown": (
        put(*FEEDS, "latents", "scale", value="loud"),
        "the feed latents has 'loud', and one of , init_noise_sigma was expected",
    ),
    "column that is fed once": (
        put(*FEEDS, "v", "when", value="call"),
        "the column v is float32 [1] for each call, and not float32 [1] for each step",
    ),
    "column of another shape": (
        together(
            *(put("graphs", g, "inputs", i, "shape", value=[2, 2]) for g, i in (("step", 3), ("step+guidance", 5)))
        ),
        "the column m is float32 [2, 2] for each step, and not float32 [1, 1] for each step",
    ),
    "column that the table lacks": (
        put(*FEEDS, "input_ids", "is", value="column"),
        "constants/input_ids is missing, and float32 [1, 77] was expected",
    ),
    "column of the time that is fed once": (
        put(*FEEDS, "time_projections", "when", value="call"),
        "constants/time_projections is missing",
    ),
    "order of the stages": (
        lambda m: m["chains"][CHAIN]["stages"].reverse(),
        "its stages are not in the order prompt, image, step, end",
    ),
    "no stage": (put(*STAGES, value=[]), "no graph produces its output image"),
    "place of a stage unknown": (
        put(*OF_UNET, "when", value="sometimes"),
        "the stage unet has 'sometimes', and one of prompt, image, step, end was expected",
    ),
    "judgement unknown": (
        put(*OF_UNET, "judged", value="taste"),
        "the stage unet has 'taste', and one of text, image_latents, residuals, prediction, state, picture was",
    ),
    "mode that the chain lacks": (
        put(*OF_UNET, "if", value=["magic"]),
        "the stage unet depends on the mode 'magic', which the chain lacks",
    ),
    "unless a mode that the chain lacks": (
        put(*OF_UNET, "unless", value=["magic"]),
        "the stage unet depends on the mode 'magic', which the chain lacks",
    ),
    "mode in which an input has no source": (
        put(*OF_UNET, "unless", value=["guidance"]),
        "the input prediction of step+guidance has no source",
    ),
    "mode without which an output is not made": (
        put(*OF_DECODER, "if", value=["guidance"]),
        "no graph produces its output image",
    ),
    "mode in which a name is produced twice": (
        lambda m: (
            m["chains"][CHAIN].update(modes=["guidance", "a", "b"]),
            m["chains"][CHAIN]["stages"].insert(2, {**m["chains"][CHAIN]["stages"][2], "if": ["b"]}),
        ),
        "prediction is produced twice, by unet and unet",
    ),
    "wire of nothing": (
        put(*OF_DECODER, "wires", value={"latents": "next_latents"}),
        "the stage vae_decoder renames latents, which its graph lacks",
    ),
    "wire from nowhere": (
        put(*OF_DECODER, "wires", value={"next_latents": "blended"}),
        "the input blended of vae_decoder has no source",
    ),
    "wire to what is made already": (
        put(*OF_STEP, "wires", value={"next_latents": "prediction"}),
        "prediction is produced twice, by unet and step",
    ),
    "wire between different shapes": (
        put(*OF_STEP, "wires", value={"noise": "prompt_embeds"}),
        "in text_encoder and float32[1, 4, 8, 8] in step",
    ),
    "shapes of two ends": (
        put(*DECODER, "inputs", 0, "shape", value=[1, 4, 8, 9]),
        "next_latents is float32[1, 4, 8, 8] in step and float32[1, 4, 8, 9] in vae_decoder",
    ),
    "dtypes of two ends": (
        put(*DECODER, "inputs", 0, "dtype", value="float16"),
        "next_latents is float32[1, 4, 8, 8] in step and float16[1, 4, 8, 8] in vae_decoder",
    ),
    "shapes of two inputs": (
        put(*UNET, "inputs", 0, "shape", value=[1, 4, 8, 9]),
        "latents is float32[1, 4, 8, 9] in unet and float32[1, 4, 8, 8] in step",
    ),
    "shapes across the loop": (
        together(*(put(*graph, "inputs", 0, "shape", value=[1, 4, 8, 9]) for graph in (UNET, STEP))),
        "carry next_latents → latents joins tensors of different dtype or shape",
    ),
    "carry from nowhere": (put(*OF, "carry", value={"x": "latents"}), "carry x → latents does not join"),
    "carry from before the loop": (
        put(*OF, "carry", value={"prompt_embeds": "latents"}),
        "carry prompt_embeds → latents does not join an output and an input of the loop",
    ),
    "carry to what each step is fed": (
        put(*OF, "carry", value={"next_latents": "noise"}),
        "carry next_latents → noise does not join an output and an input of the loop",
    ),
    "nothing carried": (put(*OF, "carry", value={}), "the chain carries nothing from one step to the next"),
    "keep in what is not held": (
        put(*OF, "keep", value={"next_latents": "latents"}),
        "keep next_latents → latents does not join something that is made and a held feed",
    ),
    "keep from nowhere": (
        together(put(*OF, "keep", value={"x": "noise"}), put(*FEEDS, "noise", "when", value="held")),
        "keep x → noise does not join something that is made and a held feed",
    ),
    "shapes of what is kept": (
        together(put(*OF, "keep", value={"image": "noise"}), put(*FEEDS, "noise", "when", value="held")),
        "keep image → noise joins tensors of different dtype or shape",
    ),
    "draw of nothing": (
        lambda m: m["chains"][CHAIN]["draws"].append({"name": "x", "per": "picture"}),
        "the draw x has no such tensor",
    ),
    "noise that is not drawn": (drop(*DRAWS, 1), "it draws ['latents'], and its noise is ['latents', 'noise']"),
    "noise whose draw is discarded": (put(*DRAWS, 0, "discarded", value=True), "it draws ['noise'], and its noise is"),
    "noise that is drawn twice": (
        lambda m: m["chains"][CHAIN]["draws"].append({"name": "latents", "per": "picture"}),
        "it draws ['latents', 'latents', 'noise'], and its noise is ['latents', 'noise']",
    ),
    "draw for whom": (
        put(*DRAWS, 0, "per", value="film"),
        "the draw latents has 'film', and one of picture, image, image_alone, masked_image was expected",
    ),
    "K without history": (put(*OF, "K", value=2), "K is 2, and its history is []"),
    "K of none": (put(*OF, "K", value=0), "the column v is float32 [1] for each step, and not float32 [0] for each"),
    "history with one tensor": (
        put(*FEEDS, "latents", "is", value="history"),
        "K is 1, and its history is ['latents']",
    ),
    "dtype unknown": (put(*UNET, "inputs", 0, "dtype", value="object"), "graph unet: latents has dtype object"),
    "dtype that no boundary has": (
        put(*UNET, "inputs", 0, "dtype", value="float64"),
        "graph unet: latents has dtype float64",
    ),
    "size zero": (put(*DECODER, "outputs", 0, "shape", value=[0, 64, 64, 3]), "image has dtype uint8 and shape [0,"),
    "no output": (put(*OF, "output", value="film"), "no graph produces its output film"),
    "output that is fed": (put(*OF, "output", value="latents"), "no graph produces its output latents"),
    "output that is no picture": (
        put(*OF, "output", value="next_latents"),
        "the output next_latents is float32 [1, 4, 8, 8], and not uint8 [1, 64, 64, 3]",
    ),
    "size that is not the picture's": (
        put(*OF, "size", value=[64, 128]),
        "the output image is uint8 [1, 64, 64, 3], and not uint8 [1, 64, 128, 3]",
    ),
    "batch that is not the picture's": (put(*OF, "batch", value=2), "and not uint8 [2, 64, 64, 3]"),
    "precision unknown": (put(*UNET, "precision", value="fp4"), "fp4"),
    "row too few": (
        put(*TABLES, "2", "rows", value=1),
        "2/m is float32 [2, 1, 1], and float32 [1, 1, 1] was expected",
    ),
    "row too many": (
        put(*TABLES, "1", "rows", value=10**15),
        f"1/m is float32 [1, 1, 1], and float32 [{10**15}, 1, 1] was expected",
    ),
    "rows of none": (put(*TABLES, "1", "rows", value=-1), "the table 1 has 1 steps, -1 rows, and begins at 0"),
    "no schedule": (put(*TABLES, value={}), "there is no table"),
    "table that begins after its end": (
        put(*TABLES, "2", "begin", value=2),
        "the table 2 has 2 steps, 2 rows, and begins at 2",
    ),
    "strength of a wrong type": (
        put(*TABLES, "2", "strength", value="0.5"),
        f"chains.{CHAIN}.tables.2.strength should be ",
    ),
    "default of a wrong type": (
        put(*OF, "defaults", "guidance_scale", value="none"),
        f'chains.{CHAIN}.defaults.guidance_scale should be float, and is "none"',
    ),
    "table that the file lacks": (put(*TABLES, "7", value={"steps": 7, "rows": 7}), "7/m is missing, and float32 [7,"),
    "NaN in a schedule": (put(*TABLES, "1", "rows", value=float("nan")), "NaN"),
    "tables that are not listed": (
        put(*OF, "tables_file", value="tables/other.safetensors"),
        "chain text-to-image names tables/other.safetensors, which is not in files",
    ),
    "tables that are another file": (put(*OF, "tables_file", value="tokenizer.json"), "tokenizer.json cannot be read"),
    "file that is not listed": (
        put(*UNET, "file", value="graphs/other.onnx"),
        "graph unet names graphs/other.onnx, which is not in files",
    ),
    "tokenizer that is not listed": (
        drop("files", "tokenizer.json"),
        "tokenizer negative_input_ids names tokenizer.json, which is not in files",
    ),
    "reference that is not listed": (
        drop("files", "reference.safetensors"),
        "the reference names reference.safetensors, which is not in files",
    ),
    "file outside": (
        together(
            put("tokenizers", "input_ids", "file", value="../x"),
            put("files", "../x", value={"size": 1, "sha256": ""}),
        ),
        "'../x' is not a path inside the bundle",
    ),
    "no tokenizer": (put("tokenizers", value={}), "the tokenizer for input_ids is missing"),
    "prompt length": (put("tokenizers", "input_ids", "max_length", value=10), "input_ids gives 10 ids, which is not"),
    "padding": (put("tokenizers", "input_ids", "pad_id", value=7), "the bundle says 7"),
}


@pytest.mark.parametrize("case", MANIFEST_EDITS)
def test_a_manifest_that_is_not_sound(sd: Path, copy_of, case: str) -> None:
    bundle, (edit, expected) = copy_of(sd), MANIFEST_EDITS[case]
    edit_json(bundle / "bundle.json", edit)
    assert expected in refusal(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"bundle"', "[" * 100_000, "\ud800"])
def test_a_manifest_that_is_no_json_object(sd: Path, copy_of, text: str) -> None:
    bundle = copy_of(sd)
    (bundle / "bundle.json").write_text(text, "utf-8", "surrogatepass")
    assert str(bundle / "bundle.json") in refusal(bundle)


def test_every_problem_of_a_manifest_is_listed(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    edits = (put("speed", value=1), drop("family"), put("created", value=3), put(*UNET, "opset", value="x"))
    edit_json(bundle / "bundle.json", together(*edits))
    message = refusal(bundle)
    assert all(word in message for word in ("'speed'", "'family'", "created should be", "graphs.unet.opset"))
    shutil.copy(sd / "bundle.json", bundle)
    wiring = (
        put(*DECODER, "outputs", 0, "name", value="film"),
        drop(*FEEDS, "noise"),
        put(*OF, "carry", value={}),
    )
    edit_json(bundle / "bundle.json", together(*wiring))
    message = refusal(bundle)
    assert all(word in message for word in ("its output image", "input noise of step", "carries nothing"))
    shutil.copy(sd / "bundle.json", bundle)
    tensors = (
        put(*OF, "size", value=[128, 64]),
        drop(*DRAWS, 1),
        put(*TABLES, "2", "rows", value=0),
        drop("tokenizers", "input_ids"),
    )
    edit_json(bundle / "bundle.json", together(*tensors))
    message = refusal(bundle)
    assert all(word in message for word in ("[1, 128, 64, 3]", "it draws ['latents']", "table 2 has", "input_ids is"))


def test_an_older_format_is_to_be_built_again(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    edit_json(bundle / "bundle.json", put("format_version", value=1))
    assert refusal(bundle).endswith(f": remove {bundle}, and build it again with build-engine SOURCE")


def test_known_features_are_read(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    edit_json(bundle / "bundle.json", put("requires", value=dict.fromkeys(FEATURES, "0.1")))
    assert Bundle.open(bundle).manifest.requires.keys() == {*FEATURES}


TABLE = f"tables/{CHAIN}.safetensors"
Arrays = dict[str, np.ndarray]


def change(key: str, how: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.update({key: how(arrays[key])})


def hold(key: str, value: float) -> Callable[[Arrays], object]:
    return change(key, lambda array: np.append(array.ravel()[:-1], array.dtype.type(value)).reshape(array.shape))


TIME = "columns/time_projections"
TIMES = len({999, 499, 666, 332, 749, 249})  # of 1 to 4 steps with a trailing spacing
TABLE_EDITS = {
    "dtype": (change("2/m", np.float64), "2/m is float64 [2, 1, 1], and float32 [2, 1, 1] was expected"),
    "half precision": (change(TIME, np.float16), f"{TIME} is float16 ["),
    "no flags": (change("4/draws_noise", np.uint8), "4/draws_noise is uint8 [4], and bool [4] was expected"),
    "long index": (change("1/index", np.int64), "1/index is int64 [1], and int32 [1] was expected"),
    "shape": (change("2/v", np.ravel), "2/v is float32 [2], and float32 [2, 1] was expected"),
    "row too few": (change("3/w", lambda w: w[1:]), "3/w is float32 [2, 1], and float32 [3, 1] was expected"),
    "number that is a row": (change("1/init_noise_sigma", np.atleast_1d), "1/init_noise_sigma is float32 [1], and"),
    "missing": (lambda arrays: arrays.pop("4/start"), "4/start is missing, and float32 [4, 2] was expected"),
    "NaN": (hold("1/v", np.nan), "1/v holds NaN or infinite values"),
    "infinite": (hold("2/input_scale", np.inf), "2/input_scale holds NaN or infinite values"),
    "NaN in a column": (hold(TIME, np.nan), f"{TIME} holds NaN or infinite values"),
    "NaN as a timestep": (hold("timesteps", np.nan), "timesteps holds NaN or infinite values"),
    "index too large": (hold("2/index", TIMES), f"2/index names a timestep that there is none of: there are {TIMES}"),
    "index below zero": (hold("2/index", -1), f"2/index names a timestep that there is none of: there are {TIMES}"),
    "no timesteps": (lambda arrays: arrays.pop("timesteps"), "timesteps is missing, and float32 [0] was expected"),
    "timesteps of a wrong shape": (
        change("timesteps", np.atleast_2d),
        f"timesteps is float32 [1, {TIMES}], and float32 [{TIMES}] was expected",
    ),
    "one timestep that is no list": (change("timesteps", lambda t: t[0]), "timesteps is float32 [], and float32 [1]"),
    "no column": (lambda arrays: arrays.pop(TIME), f"{TIME} is missing, and float32 [{TIMES}, 1, "),
    "short column": (change(TIME, lambda column: column[..., 1:]), f"{TIME} is float32 [{TIMES}, 1, "),
    "timestep without a column": (change(TIME, lambda column: column[1:]), f"{TIME} is float32 [{TIMES - 1}, 1, "),
}


@pytest.mark.parametrize("case", TABLE_EDITS)
def test_tables_that_are_not_sound(sd: Path, copy_of, case: str) -> None:
    bundle, (edit, expected) = copy_of(sd), TABLE_EDITS[case]
    arrays = load_file(bundle / TABLE)
    edit(arrays)
    save_file(
        {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}, bundle / TABLE
    )
    rehash(bundle, TABLE)
    message = refusal(bundle)
    assert expected in message and f"{bundle / TABLE} is not what the manifest says" in message


def in_bfloat16(path: Path) -> None:
    save_torch_file({n: t.bfloat16() if n == "1/m" else t for n, t in load_torch_file(path).items()}, path)


NO_TABLES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "header": lambda path: path.write_bytes(b"\xff" * 100),
    "bfloat16": in_bfloat16,
}


@pytest.mark.parametrize("case", NO_TABLES)
def test_a_table_file_that_cannot_be_read(sd: Path, copy_of, case: str) -> None:
    """Its hash is right."""
    bundle = copy_of(sd)
    NO_TABLES[case](bundle / TABLE)
    rehash(bundle, TABLE)
    message = refusal(bundle)
    assert str(bundle / TABLE) in message and ("cannot be read" in message or "1/m is " in message)
    assert command_refuses("inspect", bundle) and command_refuses("verify", bundle)


def command_refuses(*words: object) -> bool:
    done = called("turbochain", *words)
    return (done.returncode, done.stdout) == (2, "") and TABLE in done.stderr


def test_every_problem_of_a_table_file_is_listed_once(sdxl: Path, copy_of) -> None:
    bundle = copy_of(sdxl)
    arrays = load_file(bundle / TABLE)
    arrays["1/m"] = arrays["1/m"][:0]
    for name in ("2/v", "constants/time_ids_embeds", "columns/time_embeds"):
        del arrays[name]
    save_file(arrays, bundle / TABLE)
    rehash(bundle, TABLE)
    message = refusal(bundle)
    for name in ("1/m", "2/v", "constants/time_ids_embeds", "columns/time_embeds"):
        assert message.count(f"{name} is ") == 1, name


def test_what_is_no_bundle(tmp_path: Path) -> None:
    assert "there is no such folder; build one: build-engine SOURCE" in refusal(tmp_path / "none")
    assert "it has no bundle.json; build-engine makes one" in refusal(tmp_path)
    (tmp_path / "file").touch()
    assert "it is a file; build one: build-engine SOURCE" in refusal(tmp_path / "file")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    """One bit in the middle, size and times as before."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


DAMAGES = {
    "missing": (Path.unlink, "is missing"),
    "truncated": (cut, "is truncated"),
    "too long": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "is too long"),
    "bit flipped": (flip, "is damaged"),
}
READ = (
    "tokenizer.json",
    TABLE,
    *(f"graphs/{g}.onnx" for g in ("text_encoder", "unet", "step", "step+guidance", "vae_decoder")),
    *(f"graphs/{c}.data" for c in ("text_encoder.fp32-0", "text_encoder.onnx", "unet.fp32-0", "vae.fp32-0")),
)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", READ)
def test_a_damaged_file_is_not_loaded(sd: Path, copy_of, name: str, damage: str) -> None:
    bundle, (break_, expected) = copy_of(sd), DAMAGES[damage]
    break_(bundle / name)
    message = refusal(bundle)
    assert f"{name!r} {expected}" in message and "remove it and run build-engine SOURCE again" in message


def test_every_listed_file_is_checked_in_full(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    names = list(Bundle.open(bundle).manifest.files)
    for name in names:
        flip(bundle / name)
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle).check_files(full=True)
    assert f"{len(names)} files are not what the manifest says" in str(caught.value)
    assert all(f"{name!r} is damaged" in str(caught.value) for name in names)


def test_every_file_on_disk_is_listed(sd: Path) -> None:
    on_disk = {str(p.relative_to(sd)) for p in sd.rglob("*") if p.is_file()}
    listed = {"bundle.json", "source.json", *Bundle.open(sd).manifest.files}
    assert {name for name in on_disk if not name.startswith("engines/")} == listed


@pytest.mark.parametrize("names", [("unet.onnx", "vae_decoder.onnx"), ("unet.fp32-0.data", "vae.fp32-0.data")])
def test_two_files_exchanged(sd: Path, copy_of, names: tuple[str, str]) -> None:
    bundle = copy_of(sd)
    one, other = (bundle / "graphs" / name for name in names)
    spare = bundle / "spare"
    one.rename(spare)
    other.rename(one)
    spare.rename(other)
    message = refusal(bundle)
    assert all(f"graphs/{name}" in message for name in names)


def test_a_folder_or_link_in_the_place_of_a_file(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    path = bundle / "graphs/unet.onnx"
    path.unlink()
    path.mkdir()
    assert "'graphs/unet.onnx' is not a regular file" in refusal(bundle)
    path.rmdir()
    path.symlink_to(sd / "graphs/unet.onnx")
    assert "a symbolic link leads outside" in refusal(bundle)


def point_to(location: str) -> Callable[[Path], None]:
    """Make the decoder read one initializer from `location`."""

    def tamper(bundle: Path) -> None:
        path = bundle / "graphs/vae_decoder.onnx"
        model = onnx.load(path, load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.external_data)
        entry = next(e for e in tensor.external_data if e.key == "location")
        entry.value = location.format(bundle=bundle)
        path.write_bytes(model.SerializeToString())

    return tamper


def link_outside(bundle: Path) -> None:
    (bundle.parent / "outside.data").write_bytes((bundle / "graphs/vae.fp32-0.data").read_bytes())
    (bundle / "graphs/link.data").symlink_to(bundle.parent / "outside.data")
    point_to("link.data")(bundle)
    record = vars(hashing.describe(bundle / "graphs/link.data"))
    edits = (put("files", "graphs/link.data", value=record), put(*DECODER, "data", value=["graphs/link.data"]))
    edit_json(bundle / "bundle.json", together(*edits))


EXTERNAL = {
    "absolute": (point_to("/etc/passwd"), "reads a file outside"),
    "absolute, inside": (point_to("{bundle}/graphs/vae.fp32-0.data"), "reads a file outside"),
    "above": (point_to("../../secret"), "reads a file outside"),
    "above and back": (point_to("../../sd-fp32.bundle/graphs/vae.fp32-0.data"), "reads a file outside"),
    "link": (link_outside, "a symbolic link leads outside"),
    "of another graph": (point_to("unet.fp32-0.data"), "which the manifest does not list"),
}


@pytest.mark.parametrize("case", EXTERNAL)
def test_a_graph_that_reads_elsewhere(sd: Path, copy_of, case: str) -> None:
    bundle, (tamper, expected) = copy_of(sd), EXTERNAL[case]
    tamper(bundle)
    rehash(bundle, "graphs/vae_decoder.onnx")
    refit(bundle)
    assert expected in refusal(bundle)


def test_a_graph_that_is_no_onnx(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    (bundle / "graphs/unet.onnx").write_bytes(b"\xff" * 100)
    rehash(bundle, "graphs/unet.onnx")
    refit(bundle)
    assert "graphs/unet.onnx" in refusal(bundle)


def test_a_graph_that_is_not_what_the_manifest_says(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    chains = Bundle.open(sd).manifest.chains
    sizes = (put("chains", name, "size", value=[64, 128]) for name in chains)
    edits = (put(*DECODER, "outputs", 0, "shape", value=[1, 64, 128, 3]), *sizes)
    edit_json(bundle / "bundle.json", together(*edits))
    message = refusal(bundle)
    assert "graphs/vae_decoder.onnx" in message and "[1, 64, 64, 3]" in message and "[1, 64, 128, 3]" in message


ENGINE_EDITS = {
    "another version": (put("key", "version", value="0.0.1"), "it was built with onnxruntime 0.0.1"),
    "another library": (put("key", "library", value="onnxruntime-gpu"), "it was built with onnxruntime-gpu"),
    "another device": (put("key", "device", value="sm_90"), "it is for sm_90, and this device is cpu"),
    "another backend": (put("key", "backend", value="abacus"), "the backend abacus, which this version does not have"),
    "no backend": (put("key", "backend", value="host"), "the backend host, which this version does not have"),
    "other graphs": (put("graphs", "unet", "digest", value="00"), "it was built from other graphs"),
    "fewer graphs": (drop("graphs", "unet"), "it lacks unet of the chain text-to-image"),
    "unknown key": (put("speed", value=1), "the top level has the unknown key 'speed'"),
    "missing key": (drop("key", "device"), "key lacks the key 'device'"),
    "newer format": (put("format_version", value=9), "format version 9"),
    "older format": (put("format_version", value=1), "format version 1"),
}


@pytest.mark.parametrize("case", ENGINE_EDITS)
def test_an_engine_that_does_not_fit(sd: Path, copy_of, case: str) -> None:
    bundle, (edit, expected) = copy_of(sd), ENGINE_EDITS[case]
    edit_json(engine_json(bundle), edit)
    message = refusal(bundle)
    assert expected in message and message.endswith(f"build one: build-engine {bundle}")


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_an_engine_whose_manifest_is_damaged(sd: Path, copy_of, text: str) -> None:
    bundle = copy_of(sd)
    engine_json(bundle).write_text(text)
    message = refusal(bundle)
    assert "engine.json" in message and message.endswith(f"build one: build-engine {bundle}")


def test_an_engines_options_and_files(sd: Path) -> None:
    """What the verification settled holds in place of what the key has, and every graph's files are the engine's."""
    (engine,) = Bundle.open(sd).engines().values()
    assert isinstance(engine, Engine)
    record = hashing.FileRecord(1, "0" * 64)
    graphs = {name: replace(graph, files={f"{name}.engine": record}) for name, graph in engine.graphs.items()}
    options = {"inference_precision": "auto", "threads": 1}
    changed = replace(
        engine, graphs=graphs, key=replace(engine.key, options=options), settled={"inference_precision": "fp32"}
    )
    assert changed.options == {"inference_precision": "fp32", "threads": 1}
    assert changed.files == {f"{name}.engine": record for name in engine.graphs} and len(engine.graphs) > 1


def test_an_engine_that_is_being_built_is_not_there_yet(sd: Path, copy_of) -> None:
    path = copy_of(sd)
    (engine,) = Bundle.open(path).engines()
    (path / "engines" / engine).rename(path / "engines" / f".{engine}")
    assert Bundle.open(path).engines() == {}


def test_no_engine(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    shutil.rmtree(bundle / "engines")
    assert refusal(bundle).endswith(f"(it has none); build one: build-engine {bundle}")


@pytest.mark.parametrize("name", ["plan.bin", "../../../plan.bin"])
def test_a_file_of_an_engine(sd: Path, copy_of, name: str) -> None:
    bundle = copy_of(sd)
    edit_json(engine_json(bundle), put("graphs", "unet", "files", name, value={"size": 1, "sha256": "0" * 64}))
    expected = "is not a path inside" if name.startswith(".") else "is missing"
    assert f"{name!r} {expected}" in refusal(bundle)
    with pytest.raises(BundleError, match=f"'{re.escape(name)}' {expected}"):
        verify.verify_bundle(bundle)


def test_a_second_engine_that_fits_serves(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    engine = engine_json(bundle)
    shutil.copytree(engine.parent, engine.parent.with_name("other"))
    engine.write_text("{")
    with Pipeline.load(bundle) as pipe:
        assert pipe.engine_name == "other"


COMMANDS = {
    "manifest": (lambda b: edit_json(b / "bundle.json", put("speed", value=1)), "unknown key 'speed'", "gvi"),
    "newer": (lambda b: edit_json(b / "bundle.json", put("format_version", value=3)), "format version 3", "gvi"),
    "older": (lambda b: edit_json(b / "bundle.json", put("format_version", value=1)), "build it again with", "gvi"),
    "tables": (lambda b: flip(b / TABLE), f"'{TABLE}' is damaged", "gvi"),
    "not JSON": (lambda b: (b / "bundle.json").write_text("{"), "cannot be read", "gvi"),
    "wiring": (lambda b: edit_json(b / "bundle.json", drop(*UNET)), "the graph unet, which the bundle lacks", "gvi"),
    "bit": (lambda b: flip(b / "graphs/unet.fp32-0.data"), "'graphs/unet.fp32-0.data' is damaged", "gv"),
    "reference": (lambda b: flip(b / "reference.safetensors"), "'reference.safetensors' is damaged", "v"),
    "licence": (lambda b: (b / "LICENSE").unlink(), "'LICENSE' is missing", "v"),
    "engine": (lambda b: engine_json(b).write_text("{"), "has no engine for this machine", "gv"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_commands_refuse(sd: Path, copy_of, tmp_path: Path, case: str) -> None:
    bundle, (tamper, expected, which) = copy_of(sd), COMMANDS[case]
    tamper(bundle)
    picture = tmp_path / "out.png"
    lines = {
        "g": ("generate", bundle, "a cat", "-o", picture),
        "v": ("verify", bundle, "--json"),
        "i": ("inspect", bundle),
    }
    for letter in which:
        done = called("turbochain", *lines[letter])
        assert (done.returncode, done.stdout) == (2, ""), done
        assert done.stderr.startswith("turbochain: error: ") and done.stderr.count("\n") == 1, done.stderr
        assert expected in done.stderr
    assert not picture.exists()


def test_inspect_shows_a_damaged_engine(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    engine_json(bundle).write_text("{")
    done = called("turbochain", "inspect", bundle, "--json")
    (engine,) = json.loads(done.stdout)["engines"].values()
    assert done.returncode == 0 and not engine["fits"] and "cannot be read" in engine["reason"]


def test_the_reader_gives_back_what_was_written(sd: Path, sdxl: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.json"
    for bundle in (sd, sdxl):
        for kind, path in ((Manifest, bundle / "bundle.json"), (Engine, engine_json(bundle))):
            value = strict_json.read(kind, path)
            again.write_text(strict_json.write(value))
            assert strict_json.read(kind, again) == value and again.read_text() == path.read_text()
