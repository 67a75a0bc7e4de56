"""A manifest that is not sound: refused with every problem named."""

import shutil
from pathlib import Path

import pytest
from tampering import (
    CHAIN,
    DECODER,
    DRAWS,
    FEEDS,
    OF,
    OF_DECODER,
    OF_STEP,
    OF_UNET,
    STAGES,
    STEP,
    TABLES,
    UNET,
    drop,
    edit_json,
    engine_json,
    put,
    refusal,
    together,
)

from turbochain.runtime import Bundle
from turbochain.runtime.bundle import strict_json
from turbochain.runtime.bundle.manifest import FEATURES, Engine, Manifest

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


def test_the_reader_gives_back_what_was_written(sd: Path, sdxl: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.json"
    for bundle in (sd, sdxl):
        for kind, path in ((Manifest, bundle / "bundle.json"), (Engine, engine_json(bundle))):
            value = strict_json.read(kind, path)
            again.write_text(strict_json.write(value))
            assert strict_json.read(kind, again) == value and again.read_text() == path.read_text()
