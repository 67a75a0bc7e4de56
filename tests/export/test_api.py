"""`turbochain.export.export`: a checkpoint becomes a bundle without an engine; an order is checked before any work."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SIZE

from turbochain.export import export
from turbochain.export.order import ExportOrder, Recipe
from turbochain.runtime import Bundle, InputError
from turbochain.runtime.bundle.strict_json import convert

SHAPE: dict[str, Any] = {"size": SIZE, "steps": [2, 1, 2], "quiet": True}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle from a synthetic source; the process that asked for it has loaded none of the exporter's libraries."""
    path = tmp_path_factory.mktemp("export") / "mini.bundle"
    code = (
        "import json, sys; from turbochain.export import export\n"
        "print(export('synthetic:sd-turbo-mini', sys.argv[1], **json.loads(sys.argv[2])))\n"
        "assert not {'torch', 'diffusers', 'transformers', 'onnx'} & set(sys.modules)"
    )
    line = [sys.executable, "-c", code, path, json.dumps(SHAPE)]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.stderr, done.returncode) == (f"{path}\n", "", 0), done
    return path


def test_a_bundle_without_an_engine(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    opened.check_files(full=True)
    assert not (bundle / "engines").exists()
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]
    found = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert found == {*opened.manifest.files, "bundle.json"}
    recipe = convert(Recipe, opened.manifest.request)
    assert recipe == Recipe("synthetic:sd-turbo-mini", {}, "fp32", height=SIZE[1], width=SIZE[0], steps=(1, 2))


def test_every_part_tells_where_it_came_from(bundle: Path) -> None:
    origin = Bundle.open(bundle).manifest.checkpoint
    assert (origin.source, origin.pipeline_class) == ("synthetic:sd-turbo-mini", "StableDiffusionPipeline")
    assert list(origin.parts) == ["text_encoder", "unet", "vae", "tokenizer", "scheduler"]
    for part in origin.parts.values():
        told = (part.source, part.revision, part.variant, part.license, part.terms)
        assert told == ("synthetic:sd-turbo-mini", None, None, "apache-2.0", ("LICENSE", "README.md"))
    assert {name: list(part.weights) for name, part in origin.parts.items() if part.weights} == {
        "text_encoder": ["model.safetensors"],
        "unet": ["diffusion_pytorch_model.safetensors"],
        "vae": ["diffusion_pytorch_model.safetensors"],
    }


def test_a_second_export_does_nothing_and_another_is_refused(bundle: Path) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in bundle.rglob("*") if path.is_file()}

    before = times()
    assert export("synthetic:sd-turbo-mini", bundle, **SHAPE) == bundle
    for other, said in (
        ({"steps": [1]}, r"steps is \[1, 2\] there and \[1\] here"),
        ({"precision": "fp16"}, "precision is 'fp32' there and 'fp16' here"),
        ({"vae": "tiny"}, "vae is None there and 'tiny' here"),
        ({"revision": "v2"}, "revision is None there and 'v2' here"),
    ):
        with pytest.raises(InputError, match=rf"holds another build \({said}\): choose another path with -o"):
            export("synthetic:sd-turbo-mini", bundle, **{**SHAPE, **other})
    assert times() == before


def test_a_bundle_is_no_checkpoint(bundle: Path) -> None:
    with pytest.raises(InputError, match=r"is a bundle already, and a checkpoint was expected: .* build-engine "):
        export(str(bundle))


@pytest.mark.parametrize("given", [{"source": "nothing"}, {"vae": "nothing"}, {"source": "synthetic:x"}])
def test_what_cannot_be_found_leaves_nothing(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        export(**{"source": "demo", **given})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_an_order_lists_every_problem() -> None:
    with pytest.raises(InputError) as caught:
        ExportOrder("demo", precision="int8", vae_precision="fp16", size=(100, 64), batch=0, steps=(0,), opset=3)
    words = ("precision 'int8'", "'fp16' of the VAE", "size 100x64", "batch 0", "steps [0]", "opset 3")
    assert all(word in str(caught.value) for word in words)
