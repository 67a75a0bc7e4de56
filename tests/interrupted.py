"""Build a bundle on a disk that is full at first, and then by two commands at the same time."""

import json
import shutil
import sys
from pathlib import Path

import outside
from safetensors.torch import load_file, save_file

BUILD = """
import os, sys
from pathlib import Path
from turbochain.engines import cli
status = cli.main()
assert Path(cli.__file__).is_relative_to(os.environ["PYTHONPATH"]), cli.__file__
assert not {"torch", "diffusers", "transformers", "onnx"} & set(sys.modules)
sys.exit(status)
"""
SIZE = (72, 88)  # latents of 9×11, which do not halve evenly: diffusers gives the UNet's upsamplers their sizes
STORY = """
mount -t tmpfs -o size=200m none disk
head -c 189m /dev/zero > disk/ballast
"$@" --force 2> full; echo full $?; ls disk
rm disk/ballast
"$@" > first.out 2> first & first=$!
"$@" > second.out 2> second & second=$!
wait $first; echo first $?; wait $second; echo second $?; ls -A disk
cp -r disk/x.bundle .
"""
TOLD = "full 2 ballast x.bundle.partial first 0 second 0 x.bundle"


def write_source(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint as an fp16-only folder of the hub has it.

    Its scheduler takes the prediction for v. Its text encoders know the true end marker: transformers then pools at the
    first of them; with 2, as hubs have it, at the largest id.
    """
    shutil.copytree(checkpoint, folder)
    for path in folder.glob("*/*.safetensors"):
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
        save_file(tensors, path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
        path.unlink()
    _change(folder / "scheduler" / "scheduler_config.json", "prediction_type", "epsilon", "v_prediction")
    for path in folder.glob("text_encoder*/config.json"):
        _change(path, "eos_token_id", 2, 49407)


def _change(path: Path, key: str, before: object, after: object) -> None:
    config = json.loads(path.read_text())
    assert config[key] == before
    path.write_text(json.dumps(config | {key: after}))


def build(folder: Path, home: Path, *machine: str) -> None:
    """Build `x.bundle` of the checkpoint `folder`, in it, and leave there what each command said.

    On a small file system in a mount namespace of its own, which needs no privilege, with no network, and by what is
    installed in `home` (see `outside`); the commands load none of the exporter's libraries.
    """
    (folder / "disk").mkdir()
    own = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", STORY, "sh")
    shape = ("--precision", "fp32", "--size", "x".join(map(str, SIZE)), "--batch", "3", "--steps", "1-4")
    command = (sys.executable, "-P", "-c", BUILD, ".", "-o", "disk/x.bundle", *shape, "--tasks", "text-to-image")
    done = outside.run(*own, *command, *machine, home=home, cwd=folder)
    assert (done.stdout.split(), done.returncode) == (TOLD.split(), 0), done
