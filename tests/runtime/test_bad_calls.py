"""Bad arguments of `turbochain` and of a pipeline: one clear sentence, and the pipeline still works."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import called, reseal
from onnx import TensorProto, helper, numpy_helper
from refusals import refused

from turbochain.runtime import Bundle, InputError, PictureError, Pipeline, TurbochainError

OUTPUTS = {
    "no folder": ("none/out.png", "there is no folder"),
    "a folder": ("folder.png", "it is a folder"),
    "no ending": ("out", "names no picture format; try .png"),
    "unknown ending": ("out.txt", "'.txt' names no picture format; try .png"),
    "a format that is only read": ("out.psd", "try .png"),
    "a format without colours": ("out.xbm", "cannot write mode RGB as XBM; try .png"),
    "a format of which PIL has the name": ("out.hdf", "HDF5 save handler not installed; try .png"),
    "no permission": ("/proc/out.png", "cannot write /proc/out.png"),
    "a full device": ("/dev/full", "cannot write /dev/full"),
    "below a file": ("file/out.png", "there is no folder file"),
    "long": ("x" * 300 + ".png", "cannot write"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_a_picture_that_cannot_be_written(sd: Path, tmp_path: Path, case: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("kept")
    output, expected = OUTPUTS[case]
    said = refused(called("turbochain", "generate", sd, "a cat", "-o", output, cwd=tmp_path))
    assert expected in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_full_disk_keeps_the_old_picture(sd: Path, tmp_path: Path) -> None:
    """In a mount namespace of its own, which needs no privilege."""
    (tmp_path / "disk").mkdir()
    script = (
        "mount -t tmpfs -o size=8k none disk && echo old > disk/out.png && "
        '"$@"; status=$?; cat disk/out.png; ls -A disk; exit $status'
    )
    line = [Path(sys.executable).with_name("turbochain"), "generate", sd, "a cat", "-o", "disk/out.png"]
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    done = subprocess.run([*own, *map(str, line)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "old\nout.png\n"), done
    assert done.stderr.startswith("turbochain: error: no space left to write disk/out.png"), done.stderr


COMMANDS = {
    "no bundle": (["generate", "none.bundle", "x"], "none.bundle is not a bundle: there is no such folder; build one:"),
    "steps": (["generate", "{sd}", "x", "--steps", "9"], "built for these step counts: 1, 2, 3, 4; build another"),
    "seed negative": (["generate", "{sd}", "x", "--seed", "-1"], "-1"),
    "seed large": (["generate", "{sd}", "x", "--seed", str(2**64)], str(2**64)),
    "backend": (["generate", "{sd}", "x", "--backend", "abacus"], "there is no backend 'abacus'"),
    "device": (["generate", "{sd}", "x", "--device", "tpu"], "tpu"),
    "threads": (["generate", "{sd}", "x", "--threads", "0"], "threads=0: a whole number of at least 1 was expected"),
    "threads many": (["generate", "{sd}", "x", "--threads", "1000"], "threads=1000: at most "),
    "prompt long": (["generate", "{sd}", "x" * 32769], "32,769 bytes long as UTF-8: expected at most 32,768"),
    "prompt not UTF-8": (["generate", "{sd}", b"caf\xe9"], "lone surrogate U+DCE9 at position 3"),
    "runs": (["bench", "{sd}", "--runs", "0"], "--runs 0: at least 1 was expected"),
    "bench steps": (["bench", "{sd}", "--steps", "0"], "built for these step counts: 1, 2, 3, 4; build another"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_arguments_of_turbochain(sd: Path, tmp_path: Path, case: str) -> None:
    arguments, expected = COMMANDS[case]
    line = [a if isinstance(a, bytes) else a.format(sd=sd) for a in arguments]
    done = called("turbochain", *line, cwd=tmp_path)
    assert expected in refused(done) and not list(tmp_path.iterdir())


NOISE = np.zeros((1, 4, 8, 8), np.float32)
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "prompt None": ({"prompt": None}, "prompt is None: give a prompt, or its prompt_embeds"),
    "prompt bytes": ({"prompt": b"a cat"}, "prompt is of type bytes: expected a str"),
    "prompt number": ({"prompt": 3}, "prompt is of type int: expected a str"),
    "prompt dict": ({"prompt": {"a": 1}}, "prompt is of type dict: expected a str"),
    "list with a number": ({"prompt": ["a", 3]}, "prompt is of type int: expected a str"),
    "no prompt": ({"prompt": []}, "at least one prompt was expected"),
    "NUL": ({"prompt": "a\0b"}, "NUL character at position 1"),
    "lone surrogate": ({"prompt": "ab\ud83d"}, "lone surrogate U+D83D at position 2"),
    "over 32 KiB": ({"prompt": "é" * 16385}, "32,770 bytes long as UTF-8: expected at most 32,768 (32 KiB)"),
    "second prompt": ({"prompt": ["fine", "a\0"]}, "NUL character"),
    "no steps": (
        {"num_inference_steps": 0},
        "=0: this bundle was built for these step counts: 1, 2, 3, 4;",
    ),
    "too many steps": ({"num_inference_steps": 5}, "num_inference_steps=5"),
    "steps float": ({"num_inference_steps": 1.0}, "num_inference_steps=1.0"),
    "steps bool": ({"num_inference_steps": True}, "num_inference_steps=True"),
    "steps text": ({"num_inference_steps": "1"}, "num_inference_steps='1'"),
    "seed negative": ({"seed": -1}, "-1"),
    "seed too large": ({"seed": 2**64}, str(2**64)),
    "seed bool": ({"seed": True}, "True"),
    "seed float": ({"seed": 1.0}, "seed=1.0"),
    "seed text": ({"seed": "1"}, "seed='1'"),
    "seed list short": ({"seed": [1], "prompt": ["a", "b"]}, "one integer for each of 2 pictures"),
    "seed list long": ({"seed": [1, 2]}, "one integer for each of 1 pictures"),
    "seed list empty": ({"seed": []}, "one integer for each of 1 pictures"),
    "seed list bad": ({"seed": [-1]}, "-1"),
    "seed list float": ({"seed": [0.5]}, "0.5"),
    "latents list": ({"latents": NOISE.tolist()}, "latents is of type list: an array of float32 [1, 4, 8, 8]"),
    "latents shape": ({"latents": NOISE[0]}, "latents is float32 [4, 8, 8]: an array of float32 [1, 4, 8, 8]"),
    "latents count": ({"latents": NOISE, "prompt": ["a", "b"]}, "an array of float32 [2, 4, 8, 8] was expected"),
    "latents dtype": ({"latents": NOISE.astype(np.float64)}, "latents is float64"),
    "latents fp16": ({"latents": NOISE.astype(np.float16)}, "latents is float16"),
    "latents NaN": ({"latents": np.full_like(NOISE, np.nan)}, "latents holds NaN or infinite values"),
    "latents infinite": ({"latents": np.full_like(NOISE, np.inf)}, "latents holds NaN or infinite values"),
    "guidance infinite": ({"guidance_scale": float("inf")}, "guidance_scale=inf: a finite number was expected"),
    "guidance beyond fp32": ({"guidance_scale": 1e39}, "guidance_scale=1e+39: a finite number was expected, in fp32"),
    "guidance an integer beyond fp64": ({"guidance_scale": 10**400}, "a finite number was expected, in fp32"),
    "guidance bool": ({"guidance_scale": True}, "guidance_scale=True"),
    "guidance NaN": ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    "guidance text": ({"guidance_scale": "0"}, "guidance_scale='0'"),
    "negative prompts": (
        {"negative_prompt": ["a", "b"], "guidance_scale": 2.0},
        "negative_prompt is a list of 2: one, or one for each of 1 prompts was expected",
    ),
    "negative prompt number": (
        {"negative_prompt": 3, "guidance_scale": 2.0},
        "the negative_prompt is of type int: expected a str",
    ),
    "no negative prompt": ({"negative_prompt": [], "guidance_scale": 2.0}, "negative_prompt=[]: at least one prompt"),
    "strength": ({"strength": 0.5}, "strength was given, and the chain text-to-image starts from no image; leave it"),
    "height zero": ({"height": 0}, "height=0"),
    "height text": ({"height": "64"}, "height='64': a multiple of 8 in pixels was expected; turbochain inspect shows"),
    "height float": ({"height": 64.0}, "height=64.0: a multiple of 8"),
    "width odd": ({"width": 100}, "width=100: a multiple of 8"),
    "width array": ({"width": np.array([64, 64])}, "width=array([64, 64]): a multiple of 8"),
    "modes text": ({"modes": "guidance"}, "modes='guidance': a list of names was expected; give ['guidance']"),
    "output type": ({"output_type": "pt"}, "output_type='pt': choose from pil, np, uint8"),
    "output type list": ({"output_type": ["pil"]}, "output_type=['pil']"),
    "no images": ({"num_images_per_prompt": 0}, "num_images_per_prompt=0: a whole number of at least 1"),
    "images float": ({"num_images_per_prompt": 1.5}, "num_images_per_prompt=1.5"),
    "images bool": ({"num_images_per_prompt": True}, "num_images_per_prompt=True"),
}
CHOICES: dict[str, tuple[dict[str, Any], str]] = {
    "height": ({"height": 128}, "this bundle is built for 64x64; build another with build-engine SOURCE --size 64x128"),
    "width": ({"width": 128, "height": 64}, "build-engine SOURCE --size 128x64"),
    "width of another chain": (
        {"width": 128, "chain": "text-to-image"},
        "height=64, width=128: the chain text-to-image is built for 64x64; leave out the chain or the size",
    ),
    "chain list": ({"chain": ["text-to-image"]}, "chain=['text-to-image']: this bundle has text-to-image, image-to"),
    "chain empty": ({"chain": ""}, "chain='': this bundle has text-to-image"),
}
"""Of these a chain is chosen, which a request has already."""


@pytest.fixture(scope="module")
def pipe(sd: Path):
    with Pipeline.load(sd) as loaded:
        yield loaded


@pytest.mark.parametrize("case", [*CALLS, *CHOICES])
def test_arguments_of_a_call(pipe: Pipeline, case: str) -> None:
    arguments, expected = {**CALLS, **CHOICES}[case]
    with pytest.raises(InputError) as caught:
        pipe(**{"prompt": "a cat", "seed": 0, **arguments})
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert pipe("a cat", seed=0, output_type="uint8").images.shape == (1, 64, 64, 3)  # and it still works


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": -1}, {"threads": 1.5}, {"threads": True}])
def test_threads(sd: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"threads=.*: a whole number of at least 1 was expected"):
        Pipeline.load(sd, **options)


def test_use_after_close(sd: Path) -> None:
    pipe = Pipeline.load(sd)
    pipe.close()
    pipe.close()
    for use in (lambda: pipe("a cat", seed=0), pipe.warmup):
        with pytest.raises(TurbochainError, match="the pipeline is closed; load it again"):
            use()


def replace(bundle: Path, graph: str, value: float) -> None:
    """Put a graph of the same inputs and outputs, all constant, in a bundle; hashes and engine stay consistent."""
    entry = Bundle.open(bundle).manifest.graphs[graph]
    types = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}
    inputs = [helper.make_tensor_value_info(t.name, types[t.dtype], t.shape) for t in entry.inputs]
    outputs = [helper.make_tensor_value_info(t.name, types[t.dtype], t.shape) for t in entry.outputs]
    (output,) = entry.outputs
    constant = numpy_helper.from_array(np.full(output.shape, value, output.dtype), "constant")
    nodes = [helper.make_node("Identity", ["constant"], [output.name])]
    body = helper.make_graph(nodes, graph, inputs, outputs, [constant])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, bundle / entry.file)
    reseal(bundle)


PICTURES = {
    "one value": ("vae_decoder", 128, "the model made a picture of one single value"),
    "NaN": ("unet", float("nan"), "the model made NaN or infinite latents"),
    "infinite": ("unet", float("inf"), "the model made NaN or infinite latents"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_what_is_no_picture_is_never_returned(sd: Path, copy_of, tmp_path: Path, case: str) -> None:
    bundle, (graph, value, expected) = copy_of(sd), PICTURES[case]
    replace(bundle, graph, value)
    with Pipeline.load(bundle) as pipe:
        for output_type in ("pil", "np", "uint8"):
            with pytest.raises(PictureError, match=expected):
                pipe("a cat", seed=0, output_type=output_type)
    said = refused(called("turbochain", "generate", bundle, "a cat", "-o", tmp_path / "out.png"), status=1)
    assert expected in said and f"turbochain verify {bundle}" in said and not (tmp_path / "out.png").exists()
    done = called("turbochain", "verify", bundle)
    assert done.returncode == 1 and f"{graph}: " in done.stderr and "FAILED" in done.stdout
