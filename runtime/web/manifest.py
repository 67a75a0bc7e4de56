"""What of a bundle a site has: the chains that its page draws, and the files that they read."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from turbochain.runtime.backends.onnxruntime import form_file
from turbochain.runtime.bundle import strict_json
from turbochain.runtime.bundle.hashing import FileRecord
from turbochain.runtime.bundle.manifest import IMAGE_TO_IMAGE, TEXT_TO_IMAGE, Chain, Feed, Graph, TokenizerFile
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.bundle.paths import resolve_inside
from turbochain.runtime.chain import wiring
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.guidance import GUIDANCE, NEGATIVE_PROMPT
from turbochain.runtime.selection import Found, admit, folders, lacks

TASKS = (TEXT_TO_IMAGE, IMAGE_TO_IMAGE)
"""The tasks that the page has."""
MODES = (GUIDANCE, NEGATIVE_PROMPT)
"""The modes that calls in the browser can switch on. Those of LoRAs and of pictures that steer are left out."""
BACKEND = "web"


@dataclass(frozen=True)
class SiteFile:
    """A file of the site's bundle."""

    source: Path
    record: FileRecord


@dataclass(frozen=True)
class Reduced:
    """A bundle as a site has it."""

    manifest: Mapping[str, Any]  # JSON
    parts: Mapping[str, SiteFile]  # path in the site's bundle → where it comes from

    @property
    def text(self) -> str:
        """Return its `bundle.json`."""
        return strict_json.write(self.manifest)


def reduce(bundle: Bundle, engines: str | Path | None = None) -> Reduced:
    """Return what a site has of a bundle, its files hashed, with the forms of its newest engine for browsers.

    `engines`: the folder of the engines (see `selection.folders`). Raises InputError if there is no such engine, or
    the bundle has no chain that the page draws; BundleError if a file is not as it was.
    """
    built, found = _engine(bundle, _drawn(bundle), engines)
    m = bundle.manifest
    chains = {chain.name: _chain(chain.chain, m.graphs) for chain in built}
    for chain in built:
        admit(chain, found)
    graphs = {name: _graph(m.graphs[name]) for name in m.graphs if any(name in c.graphs for c in chains.values())}
    ids = {name for chain in chains.values() for name, feed in chain.feeds.items() if feed.is_ == "ids"}
    tokenizers = {name: tokenizer for name, tokenizer in m.tokenizers.items() if name in ids}
    terms = [file for part in m.checkpoint.parts.values() for file in part.terms]
    bundle.check_files(terms)
    whole = [*(file for graph in graphs.values() for file in graph.data), *(c.tables_file for c in chains.values())]
    whole += [*(t.file for t in tokenizers.values()), *terms]
    parts = {file: SiteFile(resolve_inside(bundle.path, file), m.files[file]) for file in whole}
    for name, graph in graphs.items():
        form = resolve_inside(found.folder, form_file(name))
        bundle.check_form(name, form.read_bytes())
        parts[graph.file] = SiteFile(form, found.engine.graphs[name].files[form_file(name)])
    manifest = {
        "format_version": m.format_version,
        "id": bundle.id,
        "family": m.family,
        "requires": _requires(m.requires, chains, tokenizers),
        "checkpoint": _origin(bundle),
        "tokenizers": tokenizers,
        "graphs": {name: _without(graph, "names") for name, graph in graphs.items()},
        "chains": chains,
        "files": {file: parts[file].record for file in sorted(parts)},
    }
    return Reduced(strict_json.plain(manifest), parts)


def _drawn(bundle: Bundle) -> list[OpenChain]:
    """Return the chains that the page draws; InputError if there is none."""
    chains = [bundle.open_chain(name) for name in bundle.manifest.chains]
    found = [chain for chain in chains if chain.chain.task in TASKS and chain.batch == 1]
    if not found:
        has = ", ".join(f"{chain.chain.task} with batch {chain.batch}" for chain in chains)
        raise InputError(
            f"{bundle.path} has nothing that a page draws: {has}; {' or '.join(TASKS)}, one picture at a time, was "
            "expected: build another with build-engine SOURCE --batch 1"
        )
    return found


def _engine(bundle: Bundle, chains: list[OpenChain], engines: str | Path | None) -> tuple[list[OpenChain], Found]:
    """Return the newest engine for browsers that was verified with one of the chains as it is now, and these chains."""
    found = [
        Found(folder / name, made)
        for folder in folders(bundle, engines)
        for name, made in bundle.engines(folder).items()
        if not isinstance(made, InputError) and made.key.backend == BACKEND
    ]
    usable = {
        one.folder: [c for c in chains if not lacks(c, one.engine) and one.engine.verified.get(c.name) == c.digest]
        for one in found
    }
    best = max((one for one in found if usable[one.folder]), key=lambda one: one.engine.created, default=None)
    if best is None:
        why = "is of another bundle than it is now" if found else "is missing"
        kept = "" if engines is None else f" --engines {shlex.quote(str(engines))}"
        raise InputError(
            f"{bundle.path}: the engine for browsers {why}, and a site is made of its files; build it: "
            f"build-engine {shlex.quote(str(bundle.path))} --backend {BACKEND}{kept}"
        )
    return usable[best.folder], best


def _chain(chain: Chain, graphs: Mapping[str, Graph]) -> Chain:
    """Return a chain without the stages of other modes, and the feeds that only they read.

    A graph with slots that runs in every call reads zeros for ever.
    """
    stages = tuple(
        replace(stage, unless=tuple(mode for mode in stage.unless if mode in MODES))
        for stage in chain.stages
        if all(mode in MODES for mode in stage.if_)
    )
    read = {t.name for stage in stages for t in wiring.inputs(stage, graphs)}
    feeds = {
        name: Feed("zeros", "held") if feed.is_ == "adapter" else feed
        for name, feed in chain.feeds.items()
        if name in read
    }
    return replace(chain, stages=stages, feeds=feeds, modes=tuple(mode for mode in chain.modes if mode in MODES))


def _graph(graph: Graph) -> Graph:
    """Return a graph without what only adapters and pictures that steer are for; these inputs of it are zeros."""
    return replace(graph, features=(), slots="", quantization="")


def _requires(
    requires: Mapping[str, str], chains: Mapping[str, Chain], tokenizers: Mapping[str, TokenizerFile]
) -> dict[str, str]:
    """Return those of the bundle's optional features that the site uses too."""
    every = chains.values()
    used = {
        "modes": any(chain.modes for chain in every),
        "multistep": any(chain.K > 1 for chain in every),
        "wires": any(stage.wires for chain in every for stage in chain.stages),
        "expansions": any(tokenizer.expansions for tokenizer in tokenizers.values()),
    }
    return {name: version for name, version in requires.items() if used.get(name)}


def _origin(bundle: Bundle) -> dict[str, Any]:
    """Return where the checkpoint's parts came from, and their licences."""
    origin, kept = bundle.manifest.checkpoint, ("source", "revision", "license", "terms")
    parts = {name: {key: getattr(part, key) for key in kept} for name, part in origin.parts.items()}
    return {"source": origin.source, "parts": parts}


def _without(value: Any, *keys: str) -> dict[str, Any]:
    return {key: entry for key, entry in strict_json.plain(value).items() if key not in keys}
