"""`turbochain bench --profile`, against the operators that ONNX counts in the graphs."""

import json
from collections import Counter
from pathlib import Path

import onnx
import pytest
from conftest import command

from turbochain.engines import build
from turbochain.runtime.commands.profile import as_text, profile

CONVOLUTIONS = {"onnxruntime": ("Conv", "FusedConv"), "openvino": ("Convolution ", "ConvolutionBackpropData ")}


@pytest.mark.parametrize("backend", CONVOLUTIONS)
def test_every_operator_is_counted(sd: Path, copy_of, backend: str) -> None:
    bundle = copy_of(sd)
    options = {"inference_precision": "fp32"} if backend == "openvino" else {}
    build(str(bundle), backend=backend, options=options, quiet=True)
    found = profile(bundle, backend=backend, runs=2)
    assert set(found) == {"text_encoder", "unet", "step", "vae_decoder"}
    for graph, operators in found.items():
        ops = Counter(node.op_type for node in onnx.load(bundle / f"graphs/{graph}.onnx").graph.node)
        convolutions = [o for o in operators if o.kind.startswith(CONVOLUTIONS[backend])]
        assert sum(o.count for o in convolutions) == ops["Conv"], graph
        assert [o.seconds for o in operators] == sorted((o.seconds for o in operators), reverse=True)
        assert sum(o.seconds for o in operators) > 0
    lines = as_text(found).splitlines()
    assert lines[0].split() == ["stage", "operator", "count", "ms", "share"] and lines[2].startswith("text_encoder ")


def test_the_command_shows_it(sd: Path) -> None:
    line = ("bench", sd, "--backend", "onnxruntime", "--runs", 1, "--warmup", 0, "--profile")
    shown = command("turbochain", *line).stdout
    assert "end to end" in shown and "share" in shown and "MatMul" in shown
    value = json.loads(command("turbochain", *line, "--json").stdout)
    assert {"kind", "count", "seconds"} == set(value["profile"]["unet"][0]) and value["end_to_end"]["n"] == 1
