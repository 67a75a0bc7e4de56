"""Bundle → engine: compiled in `.building/` of the folder for engines, and renamed when it is verified."""

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from turbochain.engines import backends as builders
from turbochain.engines import calibration, installed, options
from turbochain.engines.order import EngineOrder
from turbochain.export.phases.phases import SMALL, Phases, now, versions
from turbochain.export.phases.resume import Finished, empty, leave_nothing
from turbochain.runtime.bundle import quantization, strict_json, writing
from turbochain.runtime.bundle.manifest import FORMAT_VERSION, Check, Engine, EngineGraph, EngineKey
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.checks import verify
from turbochain.runtime.errors import InputError, NoSpace, PhaseDied, TurbochainError, VerificationError
from turbochain.runtime.selection import Found

Checks = dict[str, tuple[Check, ...]]
JOBS = "turbochain.engines.jobs"


def install(phases: Phases, bundle: Bundle, order: EngineOrder, folder: Path) -> Found:
    """Return the engine that was ordered, with all graphs of its chains; build missing ones in the locked `folder`.

    An engine of the same key keeps its graphs that are unchanged in the bundle. One for another machine cannot be
    verified here: it has no checks until it is loaded there. If a build fails or is cancelled, its files are deleted
    and the old engine stays as it was. If it is killed or the disk is full, finished graphs stay for the next build.
    """
    wanted, key = installed.chains_of(bundle, order.chains), installed.key_of(order)
    bundle.check_files({file for chain in wanted for file in chain.files})
    writing.recover_directories(folder)
    found = list(installed.find(bundle, order.engines, key))
    for whole, usable in found:
        if whole == usable and not installed.lacks(usable.engine, wanted, verified=order.target is None):
            _tidy(phases, folder)
            return whole
    quantized = _in_int8(wanted, key)
    building, final = folder / ".building", folder / installed.folder_name(key)
    try:
        bundle = calibration.describe(phases, bundle, quantized)
        wanted = installed.chains_of(bundle, order.chains)
        building.mkdir(exist_ok=True)
        made = _Build(phases, bundle, order, key, wanted, building, found[0][1] if found else None).run()
        writing.write_atomically(building / "engine.json", strict_json.write(made))
        empty(building, keep=(*made.files, "engine.json", *_left(key, building)))
        writing.replace_directory(building, final)
    except (NoSpace, PhaseDied):
        raise
    except (TurbochainError, KeyboardInterrupt):
        with suppress(OSError):
            leave_nothing(building)
        _tidy(phases, folder)
        raise
    except OSError as error:
        raise InputError(f"cannot write {final}: {error.strerror}") from error
    finally:
        phases.release()
    _tidy(phases, folder)
    return Found(final, made)


def _in_int8(chains: Sequence[OpenChain], key: EngineKey) -> list[str]:
    """Return the names of the graphs that an engine of this key computes in int8; InputError if the backend cannot."""
    graphs = {name: graph for chain in chains for name, graph in chain.graphs.items()}
    found, able = quantization.of(graphs, key.options), builders.get(key.backend).int8_of
    for name in found:
        if key.device != "cpu" or graphs[name].precision not in able:
            raise InputError(
                f"option int8: {key.backend} has it on a CPU, of graphs in {' and '.join(able)}, and {name} is in "
                f"{graphs[name].precision}, on {key.device}: leave it out, or build a bundle with --precision {able[0]}"
            )
    return found


def _left(key: EngineKey, folder: Path) -> list[str]:
    """Return the names of the files that loading an engine left in its folder for the next load."""
    pattern = builders.get(key.backend).left
    return [path.name for path in folder.glob(pattern)] if pattern else []


def _tidy(phases: Phases, folder: Path) -> None:
    """Remove the log, and the folder if no engine is in it."""
    if phases.log:
        phases.log.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


@dataclasses.dataclass
class _Build:
    """One build of one engine."""

    phases: Phases
    bundle: Bundle
    order: EngineOrder
    key: EngineKey
    wanted: list[OpenChain]
    folder: Path  # where it is built
    old: Found | None  # the usable part of an engine with the same key

    def run(self) -> Engine:
        """Compile missing graphs and verify; return the engine, which then has its files in the folder."""
        self.state = Finished(self.folder, dataclasses.asdict(self.key))
        candidates = builders.get(self.key.backend).candidates(self.key.options)
        graphs, checks = self._keep()
        if self.old and self.old.engine.settled in candidates:  # those before it have failed
            candidates = candidates[candidates.index(self.old.engine.settled) :]
        elif self.old:
            checks = {}
        for name in dict.fromkeys(name for chain in self.wanted for name in chain.graphs):
            if name not in graphs:
                graphs[name] = self._compile(name, {**self.key.options, **candidates[0]})
        settled = candidates[0]
        if self.order.target is None:
            settled, checks = self._verify(candidates, checks)
        verifying = [r.peak_bytes for r in self.phases.reports if r.name.startswith("verify ")]
        return Engine(
            format_version=FORMAT_VERSION,
            key=self.key,
            graphs={name: graphs[name] for name in self.bundle.manifest.graphs if name in graphs},
            checks=checks,
            verify_peak_bytes=max([*verifying, self.old.engine.verify_peak_bytes if self.old else 0]),
            created=now(),
            created_by=versions("turbochain", self.key.library, "numpy"),
            ordered=options.changed(self.key.backend, self.order.options),
            settled=settled,
            verified={name: self.bundle.open_chain(name).digest for name in checks},
        )

    def _keep(self) -> tuple[dict[str, EngineGraph], Checks]:
        """Link the files that are kept into the folder; return their graphs, and the checks that stay valid."""
        if self.old is None:
            return {}, {}
        for file in (*self.old.engine.files, *_left(self.key, self.old.folder)):
            writing.link(self.old.folder / file, self.folder / file)
        return dict(self.old.engine.graphs), dict(self.old.engine.checks)

    def _arguments(self, chosen: dict[str, Any]) -> dict[str, Any]:
        return {
            "path": str(self.bundle.path),
            "backend": self.key.backend,
            "folder": str(self.folder),
            "options": chosen,
            "device": self.order.device,
        }

    def _keeps(self) -> bool:
        """Return whether the process that compiled a graph goes on: what it has loaded is what is verified next."""
        files = {file for chain in self.wanted for graph in chain.graphs.values() for file in graph.data}
        small = sum(self.bundle.manifest.files[file].size for file in files) <= SMALL
        return small or builders.get(self.key.backend).reads_graphs

    def _compile(self, name: str, chosen: dict[str, Any]) -> EngineGraph:
        """Compile a graph, unless a build that was interrupted did."""
        digest = self.bundle.graph_digest(name, chosen)
        done = f"compile {name} {digest}"

        def compile() -> dict[str, Any]:
            more = {"target": self.order.target, "cache": str(self._cache()), "name": name}
            how = self._arguments(chosen) | more
            written = self.phases.run(f"compile {name}", f"{JOBS}:compile", keep=self._keeps(), **how)
            report = self.phases.reports[-1]
            return {"files": written, "seconds": report.seconds, "peak_bytes": report.peak_bytes}

        result = self.state.once(done, compile, lambda result: result["files"])
        files = self.state.records(done)
        read = self.bundle.manifest.graphs[name].files if builders.get(self.key.backend).reads_graphs else ()
        size = sum(r.size for r in files.values()) + sum(self.bundle.manifest.files[f].size for f in read)
        return EngineGraph(digest, files, size, result["seconds"], result["peak_bytes"])

    def _cache(self) -> Path:
        """Return the folder for timings: as ordered, else beside the bundle, or the engines if they are elsewhere."""
        engines = self.folder.parent
        return self.order.cache or (self.bundle.path if engines.parent == self.bundle.path else engines).parent

    def _verify(self, candidates: list[dict[str, Any]], checks: Checks) -> tuple[dict[str, Any], Checks]:
        """Return the first of the candidates that passes in every chain, and the checks.

        `checks` are those that passed with the first one. Raises VerificationError if the last one fails.
        """
        names = [c for c in self.bundle.manifest.chains if c in checks or c in {chain.name for chain in self.wanted}]
        for candidate, following in zip(candidates, [*candidates[1:], None], strict=True):
            try:
                self._check_int8(candidate)
                last = following is None
                return candidate, {name: checks.get(name) or self._check(name, candidate, last) for name in names}
            except VerificationError as error:
                if following is None and quantization.of(self.bundle.manifest.graphs, self.key.options):
                    raise VerificationError(f"{error}. Fewer layers in int8 were tried: leave the option out") from None
                if following is None:
                    raise
                checks = {}
                if not self.phases.quiet:
                    print(f"{_text(candidate)}: {error}; next: {_text(following)}", file=sys.stderr)
        raise AssertionError("there is always a candidate")

    def _check_int8(self, candidate: dict[str, Any]) -> None:
        """Raise VerificationError if int8 was asked for, and not one layer is in it."""
        chosen = {**self.key.options, **candidate}
        counted = quantization.count(self.bundle, self.key.backend, chosen, [n for c in self.wanted for n in c.graphs])
        if counted and not any(kept for kept, _ in counted.values()):
            raise VerificationError(f"no layer of {' or '.join(counted)} adds so little in int8")

    def _check(self, chain: str, candidate: dict[str, Any], last: bool) -> tuple[Check, ...]:
        """Verify a chain; return its checks, or raise VerificationError: of the last candidate with all that failed."""
        how = self._arguments({**self.key.options, **candidate}) | {"chain": chain, "whole": last}
        found = self.phases.run(f"verify {chain}", f"{JOBS}:check", keep=True, **how)  # chains have graphs in common
        checks = tuple(Check(**c) for c in found)
        try:
            verify.require(checks)
        except VerificationError as error:
            several = len(self.bundle.manifest.chains) > 1
            raise VerificationError(f"chain {chain}: {error}" if several else str(error)) from None
        return checks


def _text(settled: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settled.items())
