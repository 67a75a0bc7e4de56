"""`turbochain bench --profile`, against the operators that ONNX counts in the graphs."""

import json
from collections import Counter
from pathlib import Path

import onnx
import pytest
from conftest import called, command
from here import build_here

from turbochain.runtime.bundle.manifest import IMAGE_TO_IMAGE
from turbochain.runtime.commands.profile import as_text, profile

CONVOLUTIONS = {"onnxruntime": ("Conv", "FusedConv"), "openvino": ("Convolution ", "ConvolutionBackpropData ")}
CONVOLVING = ("unet", "vae_encoder", "vae_decoder")


@pytest.mark.parametrize("backend", CONVOLUTIONS)
def test_every_operator_is_counted(sd: Path, copy_of, backend: str) -> None:
    bundle = copy_of(sd)
    options = {"inference_precision": "fp32"} if backend == "openvino" else {}
    build_here(str(bundle), backend=backend, options=options, chains=[IMAGE_TO_IMAGE], quiet=True)
    found = profile(bundle, chain=IMAGE_TO_IMAGE, backend=backend, runs=2, steps=2, strength=0.5)
    assert set(found) == {"text_encoder", "vae_encoder", "start", "unet", "step", "vae_decoder"}
    for graph, operators in found.items():
        ops = Counter(node.op_type for node in onnx.load(bundle / f"graphs/{graph}.onnx").graph.node)
        convolutions = [o for o in operators if o.kind.startswith(CONVOLUTIONS[backend])]
        assert sum(o.count for o in convolutions) == ops["Conv"] and bool(convolutions) == (graph in CONVOLVING), graph
        assert [o.seconds for o in operators] == sorted((o.seconds for o in operators), reverse=True)
        assert sum(o.seconds for o in operators) > 0
    lines = as_text(found).splitlines()
    assert lines[0].split() == ["stage", "operator", "count", "ms", "share"] and lines[2].startswith("text_encoder ")


def test_the_command_shows_it(sd: Path) -> None:
    line = ("bench", sd, "--backend", "onnxruntime", "--runs", 1, "--warmup", 0, "--profile")
    shown = command("turbochain", *line).stdout
    assert "end to end" in shown and "share" in shown and "MatMul" in shown
    value = json.loads(called("turbochain", *line, "--json").stdout)
    assert {"kind", "count", "seconds"} == set(value["profile"]["unet"][0]) and value["end_to_end"]["n"] == 1


def test_bench_of_a_chain_with_an_image(sd: Path) -> None:
    """At a strength, which decides how many of the steps are made; the encoders run in the first of two calls."""
    line = ("bench", sd, "--chain", IMAGE_TO_IMAGE, "--backend", "onnxruntime", "--runs", 2, "--warmup", 0)
    done = called("turbochain", *line, "--steps", 4, "--strength", 0.5, "--json")
    value = json.loads(done.stdout)
    assert [value[k] for k in ("chain", "steps", "strength", "evaluations")] == [IMAGE_TO_IMAGE, 4, 0.5, 2]
    launches = {graph: timing["n"] for graph, timing in value["stages"].items()}
    assert launches == {"text_encoder": 2, "vae_encoder": 2, "start": 4, "unet": 8, "step": 8, "vae_decoder": 4}
    shown = called("turbochain", *line, "--steps", 4, "--strength", 0.5).stdout.splitlines()[0]
    assert shown.endswith(": image-to-image, 64x64, batch 1, 4 step(s), 2 evaluation(s), strength 0.5")
    refused = called("turbochain", "bench", sd, "--strength", 0.5)
    assert (
        refused.returncode == 2 and "strength was given, and the chain text-to-image starts from no" in refused.stderr
    )
