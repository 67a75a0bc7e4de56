"""One contender of benchmarks/cpu.py, in a process and an environment of its own.

    python benchmarks/worker.py '{"contender": "eager-fp32", "source": "sd-turbo", "size": [512, 512], "batch": 1}'

Reads a job per line, {"prompt", "seed", "steps", "save"}, and writes a JSON object per line: first what loading took,
then for each job its seconds and what is known of its stages. With a job as "once" it does that one and ends. It
imports nothing but the contender's own libraries.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

Draw = Callable[[list[str], int, int], Any]
"""(prompts, seed, steps) → pictures [B, H, W, 3] uint8."""


def ours(spec: dict[str, Any], engine: str) -> Draw:
    """turbochain's pipeline with one engine of a bundle."""
    from turbochain.runtime import Pipeline

    pipe = Pipeline.load(spec["source"], engine=engine)

    def draw(prompts: list[str], seed: int, steps: int) -> Any:
        pipe.prompt_cache.clear()
        draw.stages.clear()  # type: ignore[attr-defined]
        pipe.observe = lambda graph, seconds: draw.stages.setdefault(graph, []).append(seconds)  # type: ignore[attr-defined]
        return pipe(prompts, seed=seed, num_inference_steps=steps, output_type="uint8").images

    draw.stages = {}  # type: ignore[attr-defined]
    return draw


def diffusers(spec: dict[str, Any], dtype: str, *, channels_last: bool = False, compiled: bool = False) -> Draw:
    """diffusers' own pipeline, eager or with torch.compile."""
    import torch

    torch.set_grad_enabled(False)
    module = importlib.import_module("diffusers")
    kind, variant = module.AutoPipelineForText2Image, spec.get("variant")
    pipe = kind.from_pretrained(spec["source"], torch_dtype=getattr(torch, dtype), variant=variant)
    if channels_last:
        for part in (pipe.unet, pipe.vae):
            part.to(memory_format=torch.channels_last)
    if compiled:
        pipe.unet.compile()
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    return _called(pipe, spec)


def optimum(spec: dict[str, Any], module: str, **options: Any) -> Draw:
    """Hugging Face's optimum, which exports the checkpoint on its first load; later ones take that export."""
    kind = {"optimum.onnxruntime": "ORTPipelineForText2Image", "optimum.intel": "OVPipelineForText2Image"}[module]
    made = getattr(importlib.import_module(module), kind)
    exported = Path(f"{spec['source']}-{module}")
    if not exported.exists():
        made.from_pretrained(spec["source"], export=True).save_pretrained(exported)
    if module == "optimum.intel":
        width, height = spec["size"]
        pipe = made.from_pretrained(exported, compile=False, **options)
        # Given a batch it takes twice as many, for guidance, and then refuses what Turbo asks for: left open.
        pipe.reshape(batch_size=-1, height=height, width=width, num_images_per_prompt=1)
        pipe.compile()
    else:
        pipe = made.from_pretrained(exported, **options)
    return _called(pipe, spec)


def _called(pipe: Any, spec: dict[str, Any]) -> Draw:
    import numpy
    import torch

    pipe.set_progress_bar_config(disable=True)
    width, height = spec["size"]

    def draw(prompts: list[str], seed: int, steps: int) -> Any:
        generator = torch.Generator("cpu").manual_seed(seed)
        asked = {"num_inference_steps": steps, "guidance_scale": 0.0, "generator": generator}
        return numpy.stack([numpy.asarray(i) for i in pipe(prompts, height=height, width=width, **asked).images])

    return draw


CONTENDERS: dict[str, Callable[[dict[str, Any]], Draw]] = {
    "eager-fp32": lambda spec: diffusers(spec, "float32"),
    "eager-bf16": lambda spec: diffusers(spec, "bfloat16"),
    "eager-bf16-channels-last": lambda spec: diffusers(spec, "bfloat16", channels_last=True),
    "compiled-fp32": lambda spec: diffusers(spec, "float32", channels_last=True, compiled=True),
    "compiled-bf16": lambda spec: diffusers(spec, "bfloat16", channels_last=True, compiled=True),
    "optimum-onnx": lambda spec: optimum(spec, "optimum.onnxruntime"),
    "optimum-intel-fp32": lambda spec: optimum(
        spec, "optimum.intel", ov_config={"INFERENCE_PRECISION_HINT": "f32", "CACHE_DIR": ""}
    ),
    "optimum-intel-bf16": lambda spec: optimum(
        spec, "optimum.intel", ov_config={"INFERENCE_PRECISION_HINT": "bf16", "CACHE_DIR": ""}
    ),
}
"""The peers. Every other name is an engine of ours, in the bundle that is the source."""

PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime", "openvino", "optimum", "optimum-intel", "optimum-onnx")


def main() -> None:
    """Load, then carry out jobs until the input ends."""
    spec = json.loads(sys.argv[1])
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for a result
    start = time.perf_counter()
    draw = CONTENDERS[spec["contender"]](spec) if spec["contender"] in CONTENDERS else ours(spec, spec["contender"])
    loaded = {"load_seconds": time.perf_counter() - start, "versions": _versions(), **_memory()}
    results.write(json.dumps(loaded) + "\n")
    for line in sys.stdin if "once" not in spec else [json.dumps(spec["once"])]:
        job = json.loads(line)
        start = time.perf_counter()
        pictures = draw([job["prompt"]] * spec["batch"], job["seed"], job["steps"])
        seconds = time.perf_counter() - start
        if job.get("save"):
            _save(job["save"], pictures)
        stages = {name: list(taken) for name, taken in getattr(draw, "stages", {}).items()}
        results.write(json.dumps({"seconds": seconds, "stages": stages, **_memory()}) + "\n")


def _save(path: str, pictures: Any) -> None:
    """All pictures as .npy, or the first in the format of its ending."""
    if path.endswith(".npy"):
        import numpy

        numpy.save(path, pictures)
    else:
        from PIL import Image

        Image.fromarray(pictures[0]).save(path)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _memory() -> dict[str, int]:
    """Peak resident memory of this process, and what of it is not of files now, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak_rss_bytes": "VmHWM", "rss_anon_bytes": "RssAnon"}
    return {name: 1024 * int(status[field].split()[0]) for name, field in names.items()}


if __name__ == "__main__":
    main()
