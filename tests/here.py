"""Builds in the tests' own process, which trace each graph once in a session."""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kept import locked

from turbochain.engines import BuildResult, build
from turbochain.export import api, jobs
from turbochain.export.chains import Placed
from turbochain.export.order import Recipe
from turbochain.export.phases.phases import PhaseReport, Phases
from turbochain.export.prepared import Prepared
from turbochain.export.remedies import Remedy
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.export.tables import columns
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
        result = self.trace(**arguments) if "component" in arguments else self._do(job, arguments)
        self.reports.append(PhaseReport(name, time.perf_counter() - start, 0))
        return strict_json.plain(result)

    def trace(self, **arguments: Any) -> dict[str, Graph]:
        """Trace the graphs of a component, or copy what another build has traced."""
        return _Traced(**arguments).graphs()

    def _do(self, job: str, arguments: dict[str, Any]) -> Any:
        module, _, function = job.partition(":")
        return getattr(importlib.import_module(module), function)(lambda done, total: None, **arguments)


FOLDER: list[Path] = []
"""Where traced graphs are kept; conftest says so."""


@dataclasses.dataclass(frozen=True)
class _Traced:
    """The arguments of `jobs.graphs`."""

    recipe: Recipe
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
            for one in sorted(kept.glob("*/traced.json")):
                found = json.loads(one.read_text())
                if wanted.items() <= found["wanted"].items():
                    graphs = convert(dict[str, Graph], found["graphs"])
                    return self._copy({name: graphs[name] for name in wanted}, one.parent, self.folder)
            traced = jobs.graphs(lambda done, total: None, **vars(self))
            one = kept / str(len([*kept.iterdir()]))
            self._copy(traced, self.folder, one)
            text = json.dumps({"wanted": wanted, "graphs": strict_json.plain(traced)})
            (one / "traced.json").write_text(text)
        return traced

    def _copy(self, graphs: dict[str, Graph], source: Path, target: Path) -> dict[str, Graph]:
        (target / "graphs").mkdir(parents=True, exist_ok=True)
        for file in {file for graph in graphs.values() for file in (*graph.files, graph.names)}:
            shutil.copyfile(source / file, target / file)
        return graphs

    def _wanted(self) -> dict[str, str]:
        """Return graph → all that is traced, but for the weights."""
        shapes = columns(self.folder / next(iter(self.prepared.chains.values())).tables_file)
        placed = self.prepared.layout(self.recipe).graphs().items()
        return {n: self._described(n, one, shapes) for n, one in placed if one.spec.component == self.component}

    def _described(self, name: str, placed: Placed, columns: dict[str, tuple[int, ...]]) -> str:
        spec, shape = placed.spec, placed.shape
        inputs = {k: v or columns[k] for k, v in spec.inputs(self.prepared.checkpoint.configs, shape).items()}
        size = (shape.height, shape.width) if spec.sized else ()
        said = (spec.role, spec.module, spec.arguments(shape), inputs, spec.outputs, size, shape.batch)
        return repr((*said, self.remedies[name], self.recipe.opset))

    def _weights(self) -> str:
        """Return a hash of the component: its files, its config, and what is fused into it."""
        checkpoint: Checkpoint = self.prepared.checkpoint
        found = hashlib.sha256(self.component.encode())
        if self.component:
            config = {key: v for key, v in checkpoint.configs[self.component].items() if not key.startswith("_")}
            scales = [scale for _, scale in checkpoint.adapters]
            found.update(repr((config, checkpoint.index[self.component], scales)).encode())
            files = (*checkpoint.parts[self.component].weights, *(path for path, _ in checkpoint.adapters))
            for path in files:
                found.update(path.read_bytes())
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
