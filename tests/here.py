"""Builds in the tests' own process, which trace each graph once in a session."""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kept import locked
from safetensors.torch import load_file

from turbochain.engines import BuildResult, build, jobs
from turbochain.export import api
from turbochain.export.chains import Placed
from turbochain.export.phases.phases import PhaseReport, Phases
from turbochain.export.prepared import Prepared
from turbochain.export.remedies import Remedy
from turbochain.export.requested import Requested
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.export.tables import columns
from turbochain.export.tracing import trace
from turbochain.runtime.bundle import strict_json
from turbochain.runtime.bundle.manifest import Graph
from turbochain.runtime.bundle.strict_json import convert

build_module = sys.modules["turbochain.engines.build"]  # the package has a function of that name


@dataclasses.dataclass
class Here(Phases):
    """Phases in this process, which has the libraries already; the processes of a build have tests of their own.

    Tracing is most of a miniature's build. What was traced of the same weights for the same inputs is copied.
    """

    def run(self, name: str, job: str, /, *, keep: bool = False, online: bool = False, **arguments: Any) -> Any:
        start = time.perf_counter()
        result = self.trace(**arguments) if job.endswith("export.jobs:graphs") else self._do(job, arguments)
        self.reports.append(PhaseReport(name, time.perf_counter() - start, 0))
        return strict_json.plain(result)

    def release(self) -> None:
        """End what a process would end with."""
        jobs.close()

    def trace(self, **arguments: Any) -> dict[str, Graph]:
        """Trace the graphs of a component, or copy what another build has traced."""
        return _Traced(**arguments).graphs()

    def _do(self, job: str, arguments: dict[str, Any]) -> Any:
        module, _, function = job.partition(":")
        return getattr(importlib.import_module(module), function)(lambda done, total: None, **arguments)


@functools.cache
def _keep_the_exporter() -> None:
    """Once: the collector need not look again, after each trace, at a hundred thousand objects that stay."""
    gc.collect()
    gc.freeze()


FOLDER: list[Path] = []
"""Where traced graphs are kept; a fixture says so."""

WHOLE = ("unet", "")
"""The components of which each graph has all weights, so that it does not matter which of them are traced together."""


@dataclasses.dataclass(frozen=True)
class _Traced:
    """The arguments of `export.jobs.graphs`."""

    requested: Requested
    prepared: Prepared
    folder: Path
    component: str
    remedies: dict[str, Remedy]

    def graphs(self) -> dict[str, Graph]:
        """Return the manifest's entries of the component's graphs, whose files are then in the folder."""
        wanted = self._wanted()
        kept = FOLDER[0] / self._weights()
        kept.mkdir(parents=True, exist_ok=True)
        with locked(kept / "lock"):
            known: dict[str, Graph] = {}
            for one in kept.glob("*/traced.json"):
                found = json.loads(one.read_text())
                same = {n: g for n, g in found["graphs"].items() if found["wanted"][n] == wanted.get(n)}
                if len(same) > len(known) and (len(same) == len(wanted) or self.component in WHOLE):
                    known, place = convert(dict[str, Graph], same), one.parent
            traced = self._trace([name for name in wanted if name not in known])
            if known:
                self._copy(known, place, self.folder)
            made = {name: traced.get(name) or known[name] for name in wanted}
            if traced:
                one = kept / str(len([*kept.iterdir()]))
                self._copy(made, self.folder, one)
                text = json.dumps({"wanted": wanted, "graphs": strict_json.plain(made)})
                (one / "traced.json").write_text(text)
        return made

    def _trace(self, names: Sequence[str]) -> dict[str, Graph]:
        if not names:
            return {}
        placed = self.prepared.layout(self.requested).graphs()
        wanted = [trace.TraceOrder(name, placed[name], self.remedies[name]) for name in names]
        checkpoint, opset = self.prepared.checkpoint, self.requested.opset
        made = trace.export_graphs(checkpoint, self.component, wanted, self._columns(), self.folder, opset)
        _keep_the_exporter()
        return made

    def _copy(self, graphs: dict[str, Graph], source: Path, target: Path) -> None:
        (target / "graphs").mkdir(parents=True, exist_ok=True)
        for file in {file for graph in graphs.values() for file in graph.all_files}:
            if (target / file).exists():  # data that graphs share
                assert (target / file).read_bytes() == (source / file).read_bytes(), file
            else:
                shutil.copyfile(source / file, target / file)

    def _wanted(self) -> dict[str, str]:
        """Return graph → all that is traced, but for the weights."""
        shapes = self._columns()
        placed = self.prepared.layout(self.requested).graphs().items()
        return {n: self._described(n, one, shapes) for n, one in placed if one.spec.component == self.component}

    def _columns(self) -> dict[str, tuple[int, ...]]:
        return columns(*(self.folder / chain.tables_file for chain in self.prepared.chains.values()))

    def _described(self, name: str, placed: Placed, columns: dict[str, tuple[int, ...]]) -> str:
        spec, shape = placed.spec, placed.shape
        inputs = {k: v or columns[k] for k, v in spec.inputs(self.prepared.checkpoint.configs, shape).items()}
        size = (shape.height, shape.width) if spec.sized else ()
        said = (spec.role, spec.module, spec.rank, spec.arguments(shape), inputs, spec.outputs, size, shape.batch)
        return repr((*said, self.remedies[name], self.requested.opset))

    def _weights(self) -> str:
        """Return a hash of the component: its files, its config, and what is fused into it."""
        checkpoint: Checkpoint = self.prepared.checkpoint
        found = hashlib.sha256(self.component.encode())
        if self.component:
            config = {key: v for key, v in checkpoint.configs[self.component].items() if not key.startswith("_")}
            fused = () if self.component == "vae" else checkpoint.adapters
            found.update(repr((config, checkpoint.index[self.component], [scale for _, scale in fused])).encode())
            files = (*checkpoint.parts[self.component].weights, *(path for path, _ in fused))
            for name, tensor in (pair for path in files for pair in sorted(load_file(path).items())):
                raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                found.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode() + raw.tobytes())
        return found.hexdigest()[:16]


@contextlib.contextmanager
def phases_here() -> Iterator[None]:
    """Do the phases of builds in this process (see `Here`): importing the exporter's libraries takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "Phases", Here)
        patch.setattr(build_module, "Phases", Here)
        yield


def build_here(*arguments: Any, **more: Any) -> BuildResult:
    """`turbochain.engines.build` without a process for its phases."""
    with phases_here():
        return build(*arguments, **more)
