"""Bundles of all kinds in Node: with a ControlNet, slots, guidance, several sizes in fp16, weights in several files, in
full size."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import node
import numpy as np
import pytest
from conftest import ON
from here import build_here
from node import Node
from test_node import IMAGE, camel

from turbochain.engines import build
from turbochain.export.tracing import weights
from turbochain.runtime import Pipeline
from turbochain.runtime.web import export_web

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(node.lacks()), reason=node.lacks())]

Case = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def js(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with node.running(tmp_path_factory.mktemp("node")) as found:
        yield found


def assert_pythons_pictures(js: Node, bundle: Path, folder: Path, cases: list[Case], levels: int = 1) -> None:
    """Export a bundle, and let Node draw what Python draws of the bundle."""
    build_here(str(bundle), backend="web", device="cpu", engines=folder / "engines", quiet=True)
    site = export_web(bundle, folder / "site", "https://cdn.example", engines=folder / "engines")
    js.ask("load", pipe=str(site), url=str(site / "bundle"))
    with Pipeline.load(bundle, **ON) as pipe:
        for prompt, arguments in cases:
            (expected,) = pipe(prompt, output_type="uint8", **arguments).images
            given = dict(arguments)
            picture = js.picture(str(site), prompt, given.pop("image", None), options=camel(given))
            off = np.abs(picture.astype(int) - expected)
            assert off.max() <= levels, (prompt, arguments, off.max())


def test_a_controlnet_is_left_out(js: Node, controlled: Path, tmp_path: Path) -> None:
    cases: list[Case] = [("a", {"seed": 3, "num_inference_steps": 2}), ("b", {"seed": 1})]
    assert_pythons_pictures(js, controlled, tmp_path, cases)


def test_slots_are_left_empty(js: Node, slotted: Path, tmp_path: Path) -> None:
    assert_pythons_pictures(js, slotted, tmp_path, [("a", {"seed": 3, "num_inference_steps": 2})])


def test_guidance(js: Node, guided: Path, tmp_path: Path) -> None:
    cases: list[Case] = [
        ("a", {"seed": 3}),
        ("a", {"seed": 3, "negative_prompt": "b", "num_inference_steps": 4}),
        ("a", {"seed": 3, "guidance_scale": 0.5}),
        ("a", {"seed": 3, "image": IMAGE, "strength": 0.5}),
    ]
    assert_pythons_pictures(js, guided, tmp_path, cases)


def test_two_sizes_in_fp16(js: Node, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The forms round at other places than the bundle's graphs, so pictures may be as far apart as fp16 allows."""
    bundle = tmp_path / "x.bundle"
    how = {"precision": "fp16", "size": [(64, 64), (64, 96)], "steps": [1, 2], "quiet": True, **ON}
    build_here(str(checkpoints["sd"]), bundle, tasks=["text-to-image", "image-to-image"], **how)
    cases: list[Case] = [
        ("a", {"seed": 3}),
        ("a", {"seed": 3, "height": 96, "width": 64, "num_inference_steps": 2}),
        ("a", {"seed": 1, "image": IMAGE, "num_inference_steps": 2, "strength": 0.6}),
    ]
    assert_pythons_pictures(js, bundle, tmp_path, cases, levels=8)


def test_weights_in_several_files(
    js: Node, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "LIMIT", 2**18)
    bundle = tmp_path / "x.bundle"
    build_here(str(checkpoints["sdxl"]), bundle, tasks=["text-to-image"], steps=[1, 2], quiet=True, **ON)
    graphs = json.loads((bundle / "bundle.json").read_text())["graphs"]
    assert any(len(graph["data"]) > 1 for graph in graphs.values() if graph["role"] == "unet")
    cases: list[Case] = [("a", {"seed": 3}), ("a fox", {"seed": 2**40, "num_inference_steps": 2})]
    assert_pythons_pictures(js, bundle, tmp_path, cases)


def test_sd_turbo_in_full_size(js: Node, tmp_path: Path) -> None:
    """About 20 minutes, 12 GiB of disk, 10 GiB of memory: what a browser gets of the real model; random weights."""
    bundle = tmp_path / "x.bundle"
    how = {"precision": "fp16", "vae": "tiny", "tasks": ["text-to-image"], "steps": [1], "quiet": True, **ON}
    build("synthetic:sd-turbo", bundle, **how)
    assert_pythons_pictures(js, bundle, tmp_path, [("a photo of a cat", {"seed": 3})], levels=8)
    files = [path.stat().st_size for path in (tmp_path / "site").rglob("*") if path.is_file()]
    assert sum(files) > 2e9 > max(files)
