"""Change a bundle so that it computes something else, which its verification must notice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from conftest import reseal
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

Copy = Callable[[Path], Path]
Change = Callable[[Path, Path], None]  # a bundle, the checkpoint that it was made of
Arrays = dict[str, np.ndarray]

TABLES = "tables/text-to-image.safetensors"
STEPS = (1, 2, 3, 4)


def in_graph(name: str, change: Callable[[Any], None]) -> Change:
    """A change of one ONNX graph."""

    def apply(path: Path, _: Path = Path()) -> None:
        file = path / "graphs" / f"{name}.onnx"
        proto = onnx.load(file, load_external_data=False)
        change(proto.graph)
        file.write_bytes(proto.SerializeToString())
        onnx.checker.check_model(file)

    return apply


def in_tables(change: Callable[..., None]) -> Change:
    """A change of the arrays of the table file, which may read the checkpoint."""

    def apply(path: Path, checkpoint: Path = Path()) -> None:
        arrays = load_file(path / TABLES)
        change(arrays, checkpoint)
        save_file(arrays, path / TABLES)

    return apply


def in_reference(path: Path, change: Callable[[Arrays, list[dict[str, Any]]], object]) -> None:
    """Change the recorded tensors and the list of cases, then write the manifest's records of the files again."""
    file = path / "reference.safetensors"
    with safe_open(file, "numpy") as opened:
        cases = json.loads(opened.metadata()["cases"])
    arrays = load_file(file)
    change(arrays, cases)
    save_file(arrays, file, {"cases": json.dumps(cases)})
    reseal(path)


def in_rows(field: str, change: Callable[[np.ndarray], Any], *, at_step: int = 0) -> Change:
    """A change of one step's row in every table that has it."""

    def edit(arrays: Arrays, _: Path) -> None:
        for steps in STEPS[at_step:]:
            rows = arrays[f"{steps}/{field}"]
            rows[at_step] = change(rows[at_step])

    return in_tables(edit)


def scaled(field: str, factor: float) -> Change:
    """A row, a column or a number, multiplied."""
    if "/" not in field and field != "init_noise_sigma":
        return in_rows(field, lambda row: row * factor)
    names = [field] if "/" in field else [f"{steps}/{field}" for steps in STEPS]
    return in_tables(lambda arrays, _: arrays.update({n: np.asarray(arrays[n] * np.float32(factor)) for n in names}))


def then(graph: Any, output: str, operator: str, constant: Any, **attributes: Any) -> None:
    """Let `operator(output, constant)` take the place of a graph's output."""
    producer = next(n for n in graph.node if output in n.output)
    producer.output[list(producer.output).index(output)] = "right"
    graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(constant), "wrong"))
    graph.node.append(onnx.helper.make_node(operator, ["right", "wrong"], [output], **attributes))


def floor_for_round(graph: Any) -> None:
    (node,) = (n for n in graph.node if n.op_type == "Round")
    node.op_type = "Floor"


def no_final_norm(graph: Any) -> None:
    (node,) = (n for n in graph.node if "prompt_embeds" in n.output)
    assert node.op_type == "LayerNormalization"
    node.CopyFrom(onnx.helper.make_node("Identity", [node.input[0]], list(node.output)))


def hidden_state_before(graph: Any) -> None:
    """The text encoder's last hidden state but one, normed: what diffusers reads with `clip_skip`."""
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    *_, first_of_last_layer, _, final = norms
    assert "prompt_embeds" in final.output
    final.input[0] = first_of_last_layer.input[0]


def blind_to_pooled(graph: Any) -> None:
    for node in graph.node:
        node.input[:] = ["zeroed" if name == "pooled_prompt_embeds" else name for name in node.input]
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0), "zero"))
    graph.node.insert(0, onnx.helper.make_node("Mul", ["pooled_prompt_embeds", "zero"], ["zeroed"]))


def resnets(unet: UNet2DConditionModel) -> list[ResnetBlock2D]:
    return [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]


def column_of(checkpoint: Path, timestep: float) -> tuple[str, np.ndarray]:
    """The column that depends on the timestep [1, n], by diffusers' own modules, and its name."""
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    with torch.inference_mode():
        embedding = unet.time_embedding(unet.get_time_embed(torch.zeros(1), torch.tensor(timestep)))
        if unet.config.addition_embed_type == "text_time":
            return "columns/time_embeds", embedding.numpy()
        projected = [resnet.time_emb_proj(resnet.nonlinearity(embedding)) for resnet in resnets(unet)]
    return "columns/time_projections", torch.cat(projected, dim=-1).numpy()


def timestep(offset: int, *, at_step: int = 0) -> Change:
    """The columns of another timestep in that step's row of every table."""

    def edit(arrays: Arrays, checkpoint: Path) -> None:
        for place in {int(arrays[f"{steps}/index"][at_step]) for steps in STEPS[at_step:]}:
            time = float(arrays["timesteps"][place])
            name, right = column_of(checkpoint, time)
            np.testing.assert_allclose(arrays[name][place], right, rtol=1e-5, atol=1e-5)
            arrays[name][place] = column_of(checkpoint, time + offset)[1]

    return in_tables(edit)


def another_index(arrays: Arrays, _: Path) -> None:
    for steps in STEPS[1:]:
        index = arrays[f"{steps}/index"]
        index[:2] = index[1::-1]


def resnets_exchanged(arrays: Arrays, checkpoint: Path) -> None:
    """The columns of two neighbouring ResNets, which have as many channels each."""
    widths = [r.time_emb_proj.out_features for r in resnets(UNet2DConditionModel.from_pretrained(checkpoint / "unet"))]
    first = next(i for i, width in enumerate(widths) if width == widths[i + 1])
    start, column = sum(widths[:first]), arrays["columns/time_projections"]
    both = slice(start, start + 2 * widths[first])
    column[..., both] = np.roll(column[..., both], widths[first], axis=-1)


def draws_exchanged(path: Path, _: Path) -> None:
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["chains"]["text-to-image"]["draws"].reverse()
    (path / "bundle.json").write_text(json.dumps(manifest))


def coefficients_exchanged(graph: Any) -> None:
    for node in graph.node:
        node.input[:] = [{"v": "w", "w": "v"}.get(name, name) for name in node.input]


def predictions_exchanged(graph: Any) -> None:
    other = {"prediction": "negative_prediction", "negative_prediction": "prediction"}
    for node in graph.node:
        node.input[:] = [other.get(name, name) for name in node.input]


def pooled_zeroed(graph: Any) -> None:
    then(graph, "pooled_prompt_embeds", "Mul", np.float32(0))


def channels_swapped(graph: Any) -> None:
    then(graph, "image", "Gather", np.int64([2, 1, 0]), axis=3)


def not_a_number(graph: Any) -> None:
    then(graph, "prediction", "Add", np.float32("nan"))


TIME_HIT, ROW_HIT = {"schedule", "unet", "image"}, {"schedule", "step", "image"}
MUTATIONS: dict[str, tuple[str, Change, set[str]]] = {
    "no final norm": ("sd", in_graph("text_encoder", no_final_norm), {"text_encoder", "image"}),
    "another hidden state": ("sd", in_graph("text_encoder", hidden_state_before), {"text_encoder", "image"}),
    "timestep + 1": ("sd", timestep(1, at_step=1), TIME_HIT),
    "timestep - 1": ("sdxl", timestep(-1), TIME_HIT),
    "another row's timestep": ("sd", in_tables(another_index), TIME_HIT),
    "w = 0": ("sdxl", in_rows("w", lambda row: 0), ROW_HIT),
    "noise not drawn": ("sdxl", in_rows("draws_noise", lambda row: False), {"image"}),
    "draws exchanged": ("sdxl", draws_exchanged, {"image"}),
    "pooled embeds zeroed": ("sdxl", in_graph("text_encoder_2", pooled_zeroed), {"text_encoder_2", "image"}),
    "pooled embeds not read": ("sdxl", in_graph("unet", blind_to_pooled), {"unet", "image"}),
    "floor for round": ("sd", in_graph("vae_decoder", floor_for_round), {"vae_decoder", "image"}),
    "channels swapped": ("sdxl", in_graph("vae_decoder", channels_swapped), {"vae_decoder", "image"}),
    "time projections": ("sd", scaled("columns/time_projections", 1.01), TIME_HIT),
    "ResNets exchanged": ("sd", in_tables(resnets_exchanged), TIME_HIT),
    "time embedding": ("sdxl", scaled("columns/time_embeds", 1.01), TIME_HIT),
    "time ids": ("sdxl", scaled("constants/time_ids_embeds", 1.05), {"unet", "image"}),
    "NaN": ("sd", in_graph("unet", not_a_number), {"unet", "image"}),
    "v and w exchanged": ("sdxl", in_graph("step", coefficients_exchanged), {"step", "image"}),
    "v and w exchanged with guidance": (
        "sdxl",
        in_graph("step+guidance", coefficients_exchanged),
        {"step+guidance", "image"},
    ),
    "guidance from the wrong prompt": (
        "sd",
        in_graph("step+guidance", predictions_exchanged),
        {"step+guidance", "image"},
    ),
    "m": ("sd", scaled("m", 1.005), ROW_HIT | {"step+guidance"}),
    "v": ("sdxl", scaled("v", 0.995), ROW_HIT | {"step+guidance"}),
    "w": ("sdxl", scaled("w", 1.02), ROW_HIT),
    "input_scale": ("sd", scaled("input_scale", 1.02), {"unet", "image"}),
    "init_noise_sigma": ("sd", scaled("init_noise_sigma", 1.01), {"image"}),
}
"""What is wrong → family, change, and the stages that must be named."""
