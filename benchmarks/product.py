"""Everything that the benchmarks use of turbochain: sources, builds, bundles and the pipeline.

Imported by a contender's process too, which must not load more than a user's does: imports are inside the functions.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workload import PLAIN, Workload, arguments

if TYPE_CHECKING:
    from turbochain.export.sources.checkpoint import Checkpoint
    from turbochain.runtime import Pipeline

TASK = PLAIN.task
"""What is measured: bundles are built for no other."""


def checkpoint(source: str, folder: Path) -> "Checkpoint":
    """Return a source as a checkpoint on disk; a synthetic one is written into `folder` once. Raises InputError."""
    from turbochain.export.sources import Want, find, parts

    return parts.fetch(find(source), Want(folder), {})


def with_vae(own: "Checkpoint", source: str, vae: str, folder: Path) -> "Checkpoint":
    """Return a checkpoint like `own` with another VAE, made of links; for a synthetic one "tiny" has random weights."""
    from turbochain.export.sources import Want, find, parts
    from turbochain.export.sources.checkpoint import open_folder

    made = parts.fetch(find(source), Want(folder), {"vae": vae})
    linked = folder / f"{own.folder.name}-{re.sub('[^a-z0-9]+', '-', vae.lower())}"
    linked.mkdir(exist_ok=True)
    for name, part in made.parts.items():
        (linked / name).unlink(missing_ok=True)
        (linked / name).symlink_to(part.folder.resolve())
    (linked / "model_index.json").write_text(json.dumps(made.index))
    return open_folder(linked, own.variant)


def build(
    source: "Checkpoint",
    bundle: Path,
    *,
    backend: str,
    options: Mapping[str, Any],
    device: str,
    precision: str,
    size: tuple[int, int],
    batch: int,
    steps: Sequence[int],
    workload: Workload = PLAIN,
) -> str:
    """See that a bundle is there with an engine, and return the engine's name. Raises what `engines.build` raises."""
    from turbochain.engines import build

    where = {"backend": backend, "options": options, "device": device, "chains": [workload.task]}
    if (bundle / "bundle.json").exists():
        return build(str(bundle), bundle, **where).engine  # type: ignore[arg-type]
    # Built even if memory looks too small: a build that fails is a row with its reason.
    shape = {"size": size, "batch": batch, "steps": list(steps), "precision": precision, "tasks": [workload.task]}
    guidance = {"guidance_scale": workload.guidance_scale or None}
    return build(str(source.folder), bundle, **where, **shape, **guidance, force=True).engine  # type: ignore[arg-type]


@dataclass(frozen=True)
class Launches:
    """The launches of one graph in a call."""

    name: str
    file: Path  # its ONNX graph
    launches: int
    of_prompt: bool  # skipped if the prompt's embeddings are kept


def step_counts(bundle: Path) -> list[int]:
    """Return the step counts that a bundle has tables for, ascending."""
    from turbochain.runtime import Bundle

    return Bundle.open(bundle).open_chain().steps


def stages(bundle: Path, steps: int) -> list[Launches]:
    """Return the stages of a text-to-image call of `steps` steps."""
    from turbochain.runtime import Bundle

    chain = Bundle.open(bundle).open_chain()
    table = chain.chain.tables[chain.find(steps)]
    return [
        Launches(
            name=stage.graph,
            file=bundle / chain.graphs[stage.graph].file,
            launches=table.rows if stage.when == "step" else 1,
            of_prompt=stage.when == "prompt",
        )
        for stage in chain.chain.stages
        if stage.runs(())
    ]


class Drawer:
    """turbochain's pipeline, as worker.py wants a contender."""

    def __init__(self, pipe: "Pipeline", precision: dict[str, str], spec: Mapping[str, Any]) -> None:
        self._pipe, self._mode, self.precision = pipe, spec["mode"], precision
        self._call = arguments(dict(spec))
        self._on_gpu = pipe.device.kind != "cpu"
        self.stages: dict[str, list[float]] = {}

    def draw(self, prompts: list[str], seed: int, steps: int) -> Any:
        """Return pictures [B, H, W, 3] uint8; see contenders.Contender for the modes."""
        if self._mode != "cached":
            self._pipe.forget()
        self.stages = {}
        # On a GPU, observed stages are launched one by one instead of as one CUDA graph.
        observe = self._note if self._mode == "stages" or not self._on_gpu else None
        given = {"num_inference_steps": steps, "output_type": "uint8", "observe": observe}
        self._output = self._pipe(prompts, seed=seed, **given, **self._call)
        return self._output.images

    def _note(self, name: str, seconds: float) -> None:
        self.stages.setdefault(name, []).append(seconds)

    def gpu_seconds(self) -> float | None:
        """Return how long the GPU worked for the last call; None on a CPU."""
        return self._output.device_seconds if self._on_gpu else None

    def remark(self) -> str | None:
        """Return why the last call was not one CUDA graph; None if it was, and on a CPU."""
        return self._output.uncaptured and f"not one CUDA graph: {self._output.uncaptured}"


def drawer(spec: Mapping[str, Any]) -> Drawer:
    """Load one of a bundle's engines; `spec` as worker.py has it."""
    from turbochain.runtime import Pipeline
    from turbochain.runtime.backends import precisions

    task = spec["workload"]["task"] if spec.get("workload") else None
    pipe = Pipeline.load(spec["source"], chain=task, engine=spec["engine"], device=spec["device"])
    made = pipe.bundle.engines()[spec["engine"]]
    graphs = pipe.bundle.open_chain(task).graphs
    computed = precisions(made.key.backend, made.options, graphs)
    return Drawer(pipe, {graph.role: computed[name] for name, graph in graphs.items() if graph.component}, spec)


def drawer_of_torch(spec: Mapping[str, Any]) -> Drawer:
    """Load the checkpoint's modules as PyTorch's own stages of a bundle, under our executor (a GPU is needed)."""
    import torch

    import torch_stages
    from turbochain.export.sources.checkpoint import open_folder
    from turbochain.runtime import Bundle

    torch.backends.cudnn.benchmark = True
    bundle, place = Bundle.open(spec["bundle"]), torch_stages.OnGpu(torch.device(spec["device"]).index or 0)
    made = torch_stages.of_checkpoint(open_folder(Path(spec["source"]), spec["variant"]), bundle, place.device)
    graphs = bundle.manifest.graphs
    if spec["compiled"]:
        made = torch_stages.compiled(made, bundle, place.device)
    pipe = torch_stages.pipeline(bundle, made, place, spec["device"])
    return Drawer(pipe, {g.role: g.precision for g in graphs.values() if g.component}, spec)


def export(source: "Checkpoint", bundle: Path, **shape: Any) -> None:
    """See that a bundle is there, with or without an engine; `shape` as `build` has it. Raises what `export` raises."""
    from turbochain.export import export as make

    if not (bundle / "bundle.json").exists():
        make(str(source.folder), bundle, force=True, tasks=[TASK], **shape)


def upcasts(checkpoint: "Checkpoint") -> bool:
    """Return whether diffusers' fp16 pipeline runs the VAE in fp32."""
    return checkpoint.family.name == "sdxl" and bool(checkpoint.configs["vae"].get("force_upcast"))


def vae_exponents(bundle: Path) -> dict[str, int]:
    """Return what rescales the VAE of a bundle for fp16, as its export decided: module → exponent."""
    import torch_stages
    from turbochain.runtime import Bundle

    return torch_stages.remedies_of(Bundle.open(bundle), "fp16")["vae_decoder"].exponents
