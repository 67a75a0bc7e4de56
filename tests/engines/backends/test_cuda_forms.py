"""The forms of graphs for ONNX Runtime's CUDA provider, on its CPU provider: what they hold, and what they compute."""

from pathlib import Path

import onnx
import pytest
from conftest import HALF, BundleFactory
from cuda_forms import ON_HOST, assert_all_on_gpu, kinds, ragged, unequal

from turbochain.engines.backends.contract import Compilation
from turbochain.engines.backends.onnxruntime import BUILDER
from turbochain.runtime import Bundle, BundleError
from turbochain.runtime.backends import onnxruntime
from turbochain.runtime.backends import onnxruntime_sessions as sessions
from turbochain.runtime.backends.contract import Device, Opened
from turbochain.runtime.backends.cpu import CpuGraph
from turbochain.runtime.bundle.manifest import Gpu
from turbochain.runtime.checks import verify

GPU = Device("cuda", 0, Gpu("NVIDIA L4", "8.9", 24 * 2**30))


def compiled(bundle: Bundle, folder: Path, device: Device) -> list[str]:
    """Compile every graph of the bundle into the folder; the files that the builder names."""
    folder.mkdir()
    made = [
        BUILDER.compile(Compilation(bundle, g, folder, {}, device, folder, lambda *_: None))
        for g in bundle.manifest.graphs
    ]
    return [file for files in made for file in files]


@pytest.fixture(scope="module", params=HALF)
def forms(request: pytest.FixtureRequest, bundle_of: BundleFactory, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """An engine for a GPU of a bundle in fp16, opened: its folder has a form of every graph."""
    bundle, folder = Bundle.open(bundle_of(request.param, "fp16")), tmp_path_factory.mktemp("forms") / "engine"
    assert compiled(bundle, folder, GPU) == [f"{graph}.onnx" for graph in bundle.manifest.graphs]
    return Opened(bundle, folder, {}, GPU)


def optimised(
    forms: Opened, graph: str, file: Path, *, bare: bool = False, without: tuple[str, ...] = onnxruntime.CUDA_WITHOUT
) -> list[onnx.NodeProto]:
    """The nodes of a form, or of the graph as it was (`bare`), as ONNX Runtime runs it at its default level."""
    options = sessions.default_options()
    options.optimized_model_filepath = str(file)
    path = forms.bundle.path / forms.bundle.manifest.graphs[graph].file
    sessions.load(
        str(path) if bare else onnxruntime.read_form(forms, graph, options), graph, options, sessions.CPU, {}, without
    )
    return list(onnx.load(file, load_external_data=False).graph.node)


@pytest.fixture(scope="module")
def nodes(forms: Opened, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[onnx.NodeProto]]:
    """Graph → the nodes of its form as they run."""
    file = tmp_path_factory.mktemp("optimised") / "form.onnx"
    return {graph: optimised(forms, graph, file) for graph in forms.bundle.manifest.graphs}


def test_no_node_is_left_to_the_host(forms: Opened, nodes: dict[str, list[onnx.NodeProto]], tmp_path: Path) -> None:
    for graph, found in nodes.items():
        assert found and not kinds(found) & {*ON_HOST, "GroupNormalization", "Pad"}, graph
    assert kinds(optimised(forms, "vae_decoder", tmp_path / "was.onnx", bare=True)) & ON_HOST


def test_no_sizes_and_addresses_are_staged(
    forms: Opened, nodes: dict[str, list[onnx.NodeProto]], tmp_path: Path
) -> None:
    """The provider copies them from page-locked memory for unequal parts, and for more than 32 tensors.

    ONNX Runtime makes such a Split of SD's time projections unless it is kept from that.
    """
    for graph, found in nodes.items():
        assert not unequal(found), graph
        assert all(len(n.input) <= 32 for n in found if n.op_type == "Concat"), graph
        assert all(len(n.output) <= 32 for n in found if n.op_type == "Split"), graph
        assert not ragged(onnx.load(forms.folder / onnxruntime.form_file(graph), load_external_data=False)), graph
    made = unequal(optimised(forms, "unet", tmp_path / "with.onnx", without=()))
    assert len(made) == (forms.bundle.manifest.family == "sd")


def test_nor_is_the_row_that_sdxl_picks_of_each_text(sdxl: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(sdxl)
    path = bundle.plain("text_encoder_2") / bundle.manifest.graphs["text_encoder_2"].file
    assert "GatherND" in kinds(list(onnx.load(path, load_external_data=False).graph.node))
    assert_all_on_gpu(path, tmp_path)


def test_nor_is_one_of_a_graph_with_slots_or_control(slotted: Path, controlled: Path, tmp_path: Path) -> None:
    own = {"unet+lora", "controlnet-canny", "controlnet_embedding-canny", "t2i_adapter-sketch", "t2i_scale"}
    for bundle in map(Bundle.open, (slotted, controlled)):
        for name in own & bundle.manifest.graphs.keys():
            assert_all_on_gpu(bundle.plain(name) / bundle.manifest.graphs[name].file, tmp_path)
            own.remove(name)
    assert not own


class FormsOnCpu(onnxruntime.OnnxRuntimeCpu):
    """Runs the forms of an engine for a GPU, read as on one."""

    def load_graph(self, graph: str) -> CpuGraph:
        options = sessions.default_options()
        form = onnxruntime.read_form(self.opened, graph, options)
        session = sessions.load(form, graph, options, sessions.CPU, {}, onnxruntime.CUDA_WITHOUT)
        return onnxruntime._SessionGraph(graph, self.opened.bundle.manifest.graphs[graph], session, overrides=())


def test_the_forms_pass_against_diffusers(forms: Opened) -> None:
    executor = FormsOnCpu(forms)
    for name, its_own in (("text-to-image", "unet"), ("image-to-image", "vae_encoder")):
        chain = forms.bundle.open_chain(name)
        executor.load(chain.graphs)
        checks = verify.verify(chain, executor, dict.fromkeys(chain.graphs, "fp16"), lambda *_: None)
        verify.require(checks)
        assert {check.stage for check in checks} >= {its_own, "vae_decoder", "image"}
    executor.close()


def test_an_engine_without_a_form_says_what_to_do(forms: Opened, tmp_path: Path) -> None:
    bare = Opened(forms.bundle, tmp_path, {}, GPU)
    with pytest.raises(BundleError, match=r"unet\.onnx cannot be read: .*; remove .*, and build it again"):
        onnxruntime.read_form(bare, "unet", sessions.default_options())


def test_a_form_reads_no_other_data_than_its_graph(forms: Opened, tmp_path: Path) -> None:
    """The text encoder's data is in the bundle too, and the form of the UNet still must not name it."""
    (tmp_path / "unet.onnx").write_bytes((forms.folder / "text_encoder.onnx").read_bytes())
    with pytest.raises(BundleError, match=r"the form of 'graphs/unet\.onnx' reads 'text_encoder.*does not list"):
        onnxruntime.read_form(Opened(forms.bundle, tmp_path, {}, GPU), "unet", sessions.default_options())


def test_for_a_cpu_nothing_is_written(sd: Path, tmp_path: Path) -> None:
    assert compiled(Bundle.open(sd), tmp_path / "engine", Device("cpu")) == []
    assert not list((tmp_path / "engine").iterdir())
