"""A second chain for a bundle: the graphs of text-to-image, and a tiny graph of its own that hands the picture on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper
from safetensors import safe_open
from safetensors.numpy import save_file

from turbochain.runtime.bundle import hashing

FIRST, SECOND, GRAPH = "text-to-image", "second", "hand_on"


def edit_json(path: Path, edit: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def record(bundle: Path, *files: str) -> None:
    """Write down files as they are now."""
    records = {file: vars(hashing.describe(bundle / file)) for file in files}
    edit_json(bundle / "bundle.json", lambda m: m["files"].update(records))


def add_second_chain(bundle: Path, *, prediction: str = "prediction", off: int = 0) -> None:
    """Add the chain, with the recorded cases of the first one as its own.

    `prediction` says how the UNet is judged in it. `off` is added to its recorded pictures, modulo 256.
    """
    manifest = json.loads((bundle / "bundle.json").read_text())
    chain = json.loads(json.dumps(manifest["chains"][FIRST]))
    *_, decoder = chain["stages"]
    decoder["wires"] = {"image": "plain"}
    for stage in chain["stages"]:
        stage["judged"] = prediction if stage["graph"] == "unet" else stage["judged"]
    chain["stages"].append({"graph": GRAPH, "when": "end", "judged": "picture", "wires": {"picture": "plain"}})
    write_graph(bundle, manifest, [chain["batch"], *chain["size"], 3])
    manifest["chains"][SECOND] = chain
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    add_cases(bundle / "reference.safetensors", off)
    record(bundle, f"graphs/{GRAPH}.onnx", f"graphs/{GRAPH}.names.json", "reference.safetensors")


def write_graph(bundle: Path, manifest: dict[str, Any], shape: list[int]) -> None:
    """Write the graph of one node, and its entry into the manifest."""
    ends = [helper.make_tensor_value_info(name, TensorProto.UINT8, shape) for name in ("picture", "image")]
    graph = helper.make_graph([helper.make_node("Identity", ["picture"], ["image"])], GRAPH, ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, bundle / f"graphs/{GRAPH}.onnx")
    (bundle / f"graphs/{GRAPH}.names.json").write_text("{}")
    manifest["graphs"][GRAPH] = {
        "role": GRAPH,
        "component": "",
        "file": f"graphs/{GRAPH}.onnx",
        "data": [],
        "names": f"graphs/{GRAPH}.names.json",
        "precision": "fp32",
        "opset": 21,
        "inputs": [{"name": "picture", "dtype": "uint8", "shape": shape}],
        "outputs": [{"name": "image", "dtype": "uint8", "shape": shape}],
    }


def add_cases(path: Path, off: int) -> None:
    """Record every case of the first chain for the second one too, with what its decoder makes as `plain`."""
    with safe_open(path, framework="numpy") as file:
        cases = json.loads(file.metadata()["cases"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    for i, case in enumerate([*cases]):
        if case["chain"] != FIRST:
            continue
        mine = {name: tensors[name] for name in list(tensors) if name.startswith(f"{i}/")}
        mine[f"{i}/image"] = mine[f"{i}/image"] + mine[f"{i}/image"].dtype.type(off)
        mine[f"{i}/plain"] = mine[f"{i}/image"]
        tensors |= {name.replace(f"{i}/", f"{len(cases)}/", 1): value for name, value in mine.items()}
        cases.append({**case, "chain": SECOND})
    save_file(tensors, path, metadata={"cases": json.dumps(cases)})
