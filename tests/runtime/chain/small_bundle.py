"""A bundle of tiny graphs written by hand, whose two chains use all that the format has.

`text-to-image` (16×16): a text encoder and a UNet in two places each, with guidance as a mode. `image-to-image` (8×24):
pictures as feeds, a start, three tensors round the loop, a mode with a graph of its own, and a stream that outlives a
call. The text encoder serves both. `by_hand.py` has the same arithmetic in numpy.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tokenizers
from safetensors.numpy import save_file
from small_graphs import BATCH, CHANNELS, I2I, LENGTH, SIZES, T2I, WORDS, graphs

from turbochain.runtime import backends
from turbochain.runtime.bundle import hashing, strict_json
from turbochain.runtime.bundle.manifest import (
    FEATURES,
    FORMAT_VERSION,
    Chain,
    Draw,
    Engine,
    EngineGraph,
    EngineKey,
    Feed,
    Graph,
    Manifest,
    Origin,
    Stage,
    TableEntry,
    Tensor,
    TokenizerFile,
)
from turbochain.runtime.bundle.opened import Bundle

ROWS = {T2I: {2: 2, 3: 3}, I2I: {2: 3}}
"""Chain → steps → evaluations."""
OPTIONS: dict[str, dict[str, Any]] = {
    "onnxruntime": {"int8": "none"},
    "openvino": {"inference_precision": "fp32", "int8": "none"},
}


COLUMNS = {name: Feed("column", "step") for name in ("input_scale", "time", "m", "v", "w")} | {
    "extent": Feed("column", "call")
}
CHAINS = {
    T2I: Chain(
        task=T2I,
        size=SIZES[T2I],
        batch=BATCH,
        K=1,
        modes=("guidance",),
        stages=(
            Stage("text_encoder", "prompt", "text"),
            Stage(
                "text_encoder",
                "prompt",
                "text",
                {"input_ids": "negative_input_ids", "prompt_embeds": "negative_prompt_embeds"},
                if_=("guidance",),
            ),
            Stage("unet", "step", "prediction"),
            Stage(
                "unet",
                "step",
                "prediction",
                {"prompt_embeds": "negative_prompt_embeds", "prediction": "negative_prediction"},
                if_=("guidance",),
            ),
            Stage("step", "step", "state", unless=("guidance",)),
            Stage("step+guidance", "step", "state", if_=("guidance",)),
            Stage("vae_decoder", "end", "picture"),
        ),
        feeds={
            "input_ids": Feed("ids", "call"),
            "negative_input_ids": Feed("ids", "call", of="negative_prompt"),
            "latents": Feed("noise", "call", scale="init_noise_sigma"),
            "noise": Feed("noise", "step"),
            "guidance_scale": Feed("number", "call"),
            **COLUMNS,
        },
        draws=(Draw("latents", "picture"), Draw("noise", "picture")),
        carry={"next_latents": "latents"},
        tables_file=f"tables/{T2I}.safetensors",
        tables={str(steps): TableEntry(steps, rows) for steps, rows in ROWS[T2I].items()},
        output="image",
    ),
    I2I: Chain(
        task=I2I,
        size=SIZES[I2I],
        batch=BATCH,
        K=3,
        modes=("control",),
        stages=(
            Stage("text_encoder", "prompt", "text"),
            Stage("vae_encoder", "image", "image_latents"),
            Stage("start", "image", "state"),
            Stage("controlnet", "image", "residuals", if_=("control",)),
            Stage("unet@24x8", "step", "prediction"),
            Stage("step@24x8", "step", "state"),
            Stage("vae_decoder@24x8", "end", "picture"),
        ),
        feeds={
            "input_ids": Feed("ids", "call"),
            "input_image": Feed("image", "call"),
            "control_image": Feed("image", "call"),
            "posterior_noise": Feed("noise", "call"),
            "start_noise": Feed("noise", "call"),
            "noise": Feed("noise", "step"),
            "p": Feed("number", "call"),
            "q": Feed("number", "call"),
            "conditioning_scale": Feed("number", "step"),
            "history": Feed("history", "call"),
            "stream": Feed("zeros", "held"),
            "residual": Feed("zeros", "held"),
            **COLUMNS,
        },
        draws=(
            Draw("posterior_noise", "image"),
            Draw("start_noise", "picture"),
            Draw("posterior_noise", "image", discarded=True),
            Draw("noise", "picture"),
        ),
        carry={"next_latents": "latents", "next_history": "history"},
        keep={"next_stream": "stream"},
        tables_file=f"tables/{I2I}.safetensors",
        tables={str(steps): TableEntry(steps, rows) for steps, rows in ROWS[I2I].items()},
        output="image",
    ),
}


def tables(chain: str) -> dict[str, np.ndarray]:
    """Return the arrays of a chain's table file."""
    return arrays(chain, CHAINS[chain].K, ROWS[chain])


def arrays(chain: str, K: int, all_rows: Mapping[int, int]) -> dict[str, np.ndarray]:
    """Return the arrays of tables, by their steps: random rows, the second of each table without a draw."""
    numbers = np.random.default_rng([*chain.encode()])

    def normal(*shape: int) -> np.ndarray:
        return numbers.standard_normal(shape, np.float32)

    most = max(all_rows.values())
    made = {
        "timesteps": np.arange(most, 0, -1, np.float32) * 300,
        "columns/time": normal(most, 1, CHANNELS, 1, 1),
        "constants/extent": normal(1),
    }
    for steps, rows in all_rows.items():
        made |= {
            f"{steps}/m": 0.5 * normal(rows, K, K),
            f"{steps}/v": normal(rows, K),
            f"{steps}/w": 0.3 * normal(rows, K),
            f"{steps}/input_scale": normal(rows),
            f"{steps}/draws_noise": np.arange(rows) != 1,
            f"{steps}/start": normal(rows, 2),
            f"{steps}/init_noise_sigma": np.array(1.5, np.float32),
            f"{steps}/index": np.arange(rows, dtype=np.int32)[::-1] + most - rows,
        }
    return {name: np.asarray(array, order="C") for name, array in made.items()}


@dataclass(frozen=True)
class Content:
    """What a bundle consists of."""

    graphs: Mapping[str, tuple[str, str]]  # graph → its role and its text
    chains: dict[str, Chain]
    tables: Mapping[str, dict[str, np.ndarray]]  # chain → the arrays of its table file


def write(folder: Path, cases: list[tuple[dict[str, Any], dict[str, np.ndarray]]]) -> Path:
    """Write the bundle with these recorded cases (metadata, tensors), and an engine of each backend; return it."""
    return write_content(folder, Content(graphs(), CHAINS, {name: tables(name) for name in CHAINS}), cases)


def write_content(folder: Path, content: Content, cases: list[tuple[dict[str, Any], dict[str, np.ndarray]]]) -> Path:
    """Write a bundle of this with recorded cases, and an engine of each backend; return it."""
    for name in ("graphs", "tables"):
        (folder / name).mkdir(parents=True)
    entries = {name: _write_graph(folder, name, role, text) for name, (role, text) in content.graphs.items()}
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    for chain, table in content.tables.items():
        save_file(table, folder / content.chains[chain].tables_file)
    recorded = {f"{i}/{name}": np.ascontiguousarray(a) for i, (_, case) in enumerate(cases) for name, a in case.items()}
    save_file(recorded, folder / "reference.safetensors", metadata={"cases": json.dumps([case for case, _ in cases])})
    files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    ids = TokenizerFile("tokenizer.json", LENGTH, WORDS[0], 0)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        family="sd",
        requires=dict.fromkeys(FEATURES, "0.1.0"),
        checkpoint=Origin("by hand", "StableDiffusionPipeline", {}),
        request={},
        created="2026-01-01T00:00:00+00:00",
        created_by={},
        tokenizers={"input_ids": ids, "negative_input_ids": ids},
        graphs=entries,
        chains=content.chains,
        files={file: hashing.describe(folder / file) for file in files},
    )
    (folder / "bundle.json").write_text(strict_json.write(manifest))
    for backend in OPTIONS:
        write_engine(folder, backend, list(entries))
    return folder


def write_engine(folder: Path, backend: str, names: list[str]) -> None:
    """Write an engine of these graphs that nobody has verified; the CPU backends read the bundle's own graphs."""
    bundle = Bundle.open(folder)
    library, version = backends.require(backend)
    engine = Engine(
        format_version=FORMAT_VERSION,
        key=EngineKey(backend, "cpu", library, version, OPTIONS[backend]),
        graphs={name: EngineGraph(bundle.graph_digest(name), {}, 0, 0.0, 0) for name in names},
        checks={},
        verify_peak_bytes=0,
        created="2026-01-01T00:00:00+00:00",
        created_by={},
    )
    (folder / "engines" / backend).mkdir(parents=True, exist_ok=True)
    (folder / "engines" / backend / "engine.json").write_text(strict_json.write(engine))


def _write_graph(folder: Path, name: str, role: str, text: str) -> Graph:
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 21]>' + text)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / f"graphs/{name}.onnx")
    (folder / f"graphs/{name}.names.json").write_text("{}")
    inputs, outputs = (tuple(map(_tensor, ends)) for ends in (model.graph.input, model.graph.output))
    return Graph(role, "", f"graphs/{name}.onnx", (), f"graphs/{name}.names.json", "fp32", 21, inputs, outputs)


def _tensor(value: Any) -> Tensor:
    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return Tensor(value.name, dtype, tuple(d.dim_value for d in kind.shape.dim))
