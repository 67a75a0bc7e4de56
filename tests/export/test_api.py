"""`turbochain.export.export`: a checkpoint becomes a bundle without an engine; an order is checked before any work."""

import math
from pathlib import Path

import pytest

from turbochain.export import export
from turbochain.export.order import ExportOrder
from turbochain.export.requested import Requested
from turbochain.runtime import Bundle, InputError
from turbochain.runtime.bundle.strict_json import convert


@pytest.fixture
def bundle(exported: Path) -> Path:
    return exported


def test_a_bundle_without_an_engine(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    opened.check_files(full=True)
    assert not (bundle / "engines").exists()
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]
    found = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert found == {*opened.manifest.files, "bundle.json", "source.json"}
    order = ExportOrder("demo", sizes=((512, 512),), batches=(1,), steps=(1, 2, 4), tasks=("text-to-image",))
    assert convert(Requested, opened.manifest.request) == order.requested("fp32")


def test_the_steps_and_the_tasks_if_none_are_given(sd: Path) -> None:
    opened = Bundle.open(sd)
    requested = convert(Requested, opened.manifest.request)
    assert requested.steps == (1, 2, 3, 4) and requested.tasks == ("text-to-image", "image-to-image")
    assert [*opened.manifest.chains] == ["text-to-image", "image-to-image"]


def test_every_part_tells_where_it_came_from(bundle: Path) -> None:
    origin = Bundle.open(bundle).manifest.checkpoint
    assert (origin.source, origin.pipeline_class) == ("demo", "StableDiffusionPipeline")
    assert list(origin.parts) == ["text_encoder", "unet", "vae", "tokenizer", "scheduler"]
    for part in origin.parts.values():
        told = (part.source, part.revision, part.variant, part.license, part.terms)
        assert told == ("demo", None, None, "apache-2.0", ("LICENSE", "README.md"))
    assert {name: list(part.weights) for name, part in origin.parts.items() if part.weights} == {
        "text_encoder": ["model.safetensors"],
        "unet": ["diffusion_pytorch_model.safetensors"],
        "vae": ["diffusion_pytorch_model.safetensors"],
    }


def test_a_second_export_does_nothing_and_another_is_refused(bundle: Path) -> None:
    def times() -> dict[Path, int]:
        files = (path for path in bundle.rglob("*") if path.is_file() and path.name != "source.json")
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    assert export("demo", bundle, steps=[4, 2, 1, 2], tasks=["text-to-image"], quiet=True) == bundle
    for other, said in (
        ({"steps": [1]}, r"steps is \[1, 2, 4\] there and \[1\] here"),
        ({"steps": [1, 2, 4], "precision": "fp16"}, "precision is 'fp32' there and 'fp16' here"),
        (
            {"steps": [1, 2, 4], "vae": "tiny"},
            "vae is None there and 'tiny' here; files of the source have changed: vae/.*",
        ),
        ({"steps": [1, 2, 4], "eta": 1.0}, r"eta is None there and 1\.0 here"),
    ):
        with pytest.raises(InputError, match=rf"holds another build \({said}\): choose another path with -o"):
            export("demo", bundle, tasks=["text-to-image"], quiet=True, **other)  # type: ignore[arg-type]
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
        ExportOrder(
            "demo",
            precision="int8",
            vae_precision="fp16",
            sizes=((512, 512), (100, 64)),
            batches=(1, 0),
            steps=(0,),
            opset=3,
            guidance_scale=-1,
            guidance_scales=(math.inf,),
            strengths=(0.5, 1.5),
            tasks=(),
        )
    words = ("precision 'int8'", "'fp16' of the VAE", "size 100x64", "batch 0", "steps [0]", "opset 3")
    words += ("guidance scale -1", "guidance scale inf", "strength 1.5", "tasks: at least one")
    assert all(word in str(caught.value) for word in words)
    assert "512x512" not in str(caught.value) and "strength 0.5" not in str(caught.value)
