"""Pack LoRAs into a graph's slots as FORMAT.md says, without the runtime's code; `lora_files` has the layers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lora_files import Layers

from turbochain.runtime.bundle.manifest import Graph


def groups(folder: Path, graph: Graph) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / graph.slots).read_text())
    return found


def parameters(folder: Path, graph: Graph) -> list[str]:
    return [member["parameter"] for group in groups(folder, graph) for member in group["members"]]


def sizes(graph: Graph) -> tuple[int, int]:
    shapes = {t.name: t.shape for t in graph.inputs}
    ((down,), (up,)) = shapes["lora_down"], shapes["lora_up"]
    return down, up


def pack(folder: Path, graph: Graph, loras: Sequence[tuple[Layers, float]] = ()) -> dict[str, np.ndarray]:
    """`lora_down` and `lora_up` of LoRAs, each with the weight that the user gives it."""
    added = {}  # (number of the LoRA, parameter) → the layer, and what multiplies it
    for i, (layers, weight) in enumerate(loras):
        for (component, module), layer in layers.items():
            if component == graph.component:
                added[i, f"{module.removeprefix('text_model.')}.weight"] = layer, weight
    ends = sizes(graph)
    described = groups(folder, graph)
    rank = ends[0] // sum(group["in"] * len(group["members"]) for group in described)
    downs, ups = [], []
    for group in described:
        columns = []
        for member in group["members"]:
            down, up = np.zeros((group["in"], rank)), np.zeros((rank, member["out"]))
            parameter, used = member["parameter"].removeprefix("text_model."), 0
            for i in range(len(loras)):
                if (i, parameter) in added:
                    layer, weight = added[i, parameter]
                    own = slice(used, used + layer.down.shape[0])
                    down[:, own] = layer.down.flatten(1).T
                    up[own] = layer.up.flatten(1).T * (layer.scale * weight)
                    used = own.stop
            columns.append(down)
            ups.append(up.reshape(-1))
        downs.append(np.concatenate(columns, axis=1).reshape(-1))
    made = {"lora_down": np.concatenate(downs), "lora_up": np.concatenate(ups)}
    assert tuple(map(len, made.values())) == ends
    return {name: values.astype(np.float32) for name, values in made.items()}
