"""The inspector of TensorRT's engines: layers, fusions, and each graph's error."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, BundleFactory

from turbochain.runtime import Bundle

NO_DRIVER = "there is no NVIDIA driver on this machine"

pytestmark = pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")


@pytest.fixture(scope="module")
def inspector() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks/inspect_engines.py"))


def test_the_inspector_lists_layers_and_fusions(
    inspector: dict[str, Any], bundle_of: BundleFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bundle_of("sd", "fp16")
    assert inspector["main"]([str(bundle), "--graph", "text_encoder", "--layers"]) == 0
    shown = capsys.readouterr()
    assert f"nothing is compared: {NO_DRIVER}" in shown.err
    graph, layers, fused, wide, *types = shown.out.splitlines()[2].split()
    assert (graph, fused, wide) == ("text_encoder", "3", "0") and shown.out.count("_mha_") == 3
    assert int(layers) == sum(int(n) for n in types[::2]) == len(shown.out.split("\n\n")[1].splitlines()) - 2
    assert inspector["main"]([str(bundle), "--graph", "tower"]) == 2
    assert "there is no graph tower: choose from " in capsys.readouterr().err


def test_the_rewritten_graphs_have_fewer_layers(
    inspector: dict[str, Any], bundle_of: BundleFactory, tmp_path: Path
) -> None:
    """Three copies of an attention's Q, K and V are one, and each doubling goes with the convolution after it."""
    import result

    for graph in ("text_encoder", "vae_decoder"):  # the file gets the rows of both
        assert inspector["main"]([str(bundle_of("sd", "fp16")), "--graph", graph, "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    text, vae = result.read(path).compiled
    assert (text.graph, vae.graph) == ("text_encoder", "vae_decoder")
    assert text.as_in_bundle.fused_attentions == text.rewritten.fused_attentions == 3
    assert text.rewritten.layers == text.as_in_bundle.layers - 2 * 3
    before, after = vae.as_in_bundle, vae.rewritten
    assert "deconv" not in before.kinds and after.kinds["deconv"] == 3
    assert after.kinds["correlation"] == before.kinds["correlation"] - 3 and after.layers <= before.layers - 3
    assert text.rewritten.fp32_inside == 0 and after.fp32_inside <= before.fp32_inside  # of the VAE in full size none


@pytest.mark.full
def test_nothing_of_sdxls_unet_is_in_fp32(inspector: dict[str, Any], bundle_of: BundleFactory, tmp_path: Path) -> None:
    import result

    assert inspector["main"]([str(bundle_of("sdxl", "fp16")), "--graph", "unet", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    (unet,) = result.read(path).compiled
    before, after = unet.as_in_bundle, unet.rewritten
    assert before.fp32_inside == after.fp32_inside == 0
    assert before.fused_attentions == after.fused_attentions > 0
    assert after.kinds["deconv"] == 1 and after.kinds["correlation"] == before.kinds["correlation"] - 1


def test_the_inspector_compares_graph_by_graph(inspector: dict[str, Any], bundle_of: BundleFactory) -> None:
    """With the fp32 graphs as engines, over every chain: each errs as fp16 does, and less than the next graphs would
    inherit."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    half, single = (Bundle.open(bundle_of("sd", precision)) for precision in ("fp16", "fp32"))

    def runner(graph: str) -> OnnxrtRunner:
        return OnnxrtRunner(SessionFromOnnx(str(single.path / single.manifest.graphs[graph].file)), name="fp32")

    _, *rows = inspector["comparison"]([half.open_chain(name) for name in half.manifest.chains], runner)
    assert sorted(row[0] for row in rows if row[1] != "guided_prediction") == sorted(half.manifest.graphs)
    errors = {graph: float(error) for graph, _, error, _, _ in rows}
    assert [errors.pop(graph) for graph in ("step", "step+guidance", "start")] == [0, 0, 0]  # fp32 in both bundles
    assert all(1e-5 < error < 1e-2 for error in errors.values()), errors
