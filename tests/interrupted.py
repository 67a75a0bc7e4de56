"""One build that meets a full disk, a kill, and another build at the same time."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

BUILD = Path(sys.executable).with_name("build-engine")
SIZE, BATCH = (72, 88), 3
STORY = """
mount -t tmpfs -o size=200m none disk
head -c 186m /dev/zero > disk/ballast
"$@" --force 2> full; echo full $?; ls disk
rm disk/ballast
"$@" 2> killed & builder=$!
until grep -q "export text_encoder" disk/x.bundle.partial/state.json; do sleep 0.1; done; sleep 1
worker=$(pgrep -P $builder); kill -KILL $builder
runs() { grep -qs "^State:.[RSD]" /proc/$worker/status; }
for i in $(seq 100); do runs || break; sleep 0.1; done; runs || echo its worker has gone; ls disk
"$@" > first.out 2> first & first=$!
"$@" > second.out 2> second & second=$!
wait $first; echo first $?; wait $second; echo second $?; ls -A disk
cp -r disk/x.bundle .
"""
TOLD = "full 2 ballast x.bundle.partial its worker has gone x.bundle.partial first 0 second 0 x.bundle"


def write_source(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint as an fp16-only folder of the hub has it; its scheduler takes the prediction for v."""
    shutil.copytree(checkpoint, folder)
    for path in folder.glob("*/*.safetensors"):
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
        save_file(tensors, path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
        path.unlink()
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    assert config["prediction_type"] == "epsilon"
    path.write_text(json.dumps(config | {"prediction_type": "v_prediction"}))


def build(folder: Path, *machine: str) -> None:
    """Build `x.bundle` of the checkpoint `folder`, in it, and leave there what each command said.

    On a small file system in a mount namespace of its own, which needs no privilege.
    """
    (folder / "disk").mkdir()
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", STORY, "sh"]
    shape = ("--precision", "fp32", "--size", "x".join(map(str, SIZE)), "--batch", str(BATCH), "--steps", "1-4")
    tasks = ("--tasks", "text-to-image")
    line = [*own, str(BUILD), ".", "-o", "disk/x.bundle", *shape, *tasks, *machine]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.stdout.split() == TOLD.split(), done
