"""Show what a bundle holds, as text or plain values; reads only its manifests and tables."""

import dataclasses
from collections import defaultdict
from typing import Any

from turbochain.runtime import backends
from turbochain.runtime.bundle import quantization, strict_json
from turbochain.runtime.bundle.manifest import Engine, Gpu, Origin
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain import wiring
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.chain.slots import ChainSlots
from turbochain.runtime.chain.tables import Table
from turbochain.runtime.commands import console
from turbochain.runtime.errors import BundleError
from turbochain.runtime.inputs.slots import read_layout
from turbochain.runtime.selection import folders, has_device, misfit, rebuild


def as_json(bundle: Bundle) -> dict[str, Any]:
    """Return everything but the long columns of the tables."""
    m = bundle.manifest
    return {
        "path": str(bundle.path),
        "id": bundle.id,
        "family": m.family,
        "checkpoint": _origin(m.checkpoint),
        "graphs": {name: strict_json.plain(graph) for name, graph in m.graphs.items()},
        "chains": {name: _chain(bundle.open_chain(name)) for name in m.chains},
        "engines": {name: _engine(bundle, found) for name, found in _engines(bundle).items()},
        "created": m.created,
        "created_by": m.created_by,
    }


def _chain(chain: OpenChain) -> dict[str, Any]:
    entries = {name: dataclasses.asdict(entry) for name, entry in chain.chain.tables.items()}
    tables = {name: {**entry, "rows": _rows(chain.tables[name])} for name, entry in entries.items()}
    return {**strict_json.plain(chain.chain), "wiring": wires(chain), "tables": tables}


def _rows(table: Table) -> list[dict[str, Any]]:
    """Return the rows of a table as a scheduler's terms."""
    times = table.timesteps[table.index]
    return [
        {
            "timestep": float(times[row]),
            "input_scale": float(table.input_scale[row]),
            "m": table.m[row].tolist(),
            "v": table.v[row].tolist(),
            "w": table.w[row].tolist(),
            "start": table.start[row].tolist(),
            "draws_noise": bool(table.draws_noise[row]),
        }
        for row in range(table.rows)
    ]


def _engines(bundle: Bundle) -> dict[str, Engine | BundleError]:
    return {name: made for folder in folders(bundle) for name, made in bundle.engines(folder).items()}


def wires(chain: OpenChain) -> list[dict[str, str]]:
    """Return one entry per wire of a chain: name, where it comes from, where it goes, and the mode of that stage."""
    feeds, graphs = chain.chain.feeds, chain.graphs
    makers: dict[str, list[str]] = defaultdict(list)  # several if it depends on the mode
    for stage in chain.chain.stages:
        for t in wiring.outputs(stage, graphs):
            makers[t.name].append(stage.graph)
    made = {name: " or ".join(of) for name, of in makers.items()}
    when = {"call": "", "step": ", each step", "held": ", held"}
    found = []
    for stage in chain.chain.stages:
        for t in wiring.inputs(stage, graphs):
            feed = feeds.get(t.name)
            makers_of_feeds = {"column": "table", "zeros": "zeros"}
            source = f"{makers_of_feeds.get(feed.is_, 'caller')}{when[feed.when]}" if feed else ""
            source = " or ".join(filter(None, [made.get(t.name), source]))
            named = {"if": " and ".join(stage.if_), "unless": " or ".join(stage.unless)}
            mode = ", ".join(f"{word} {modes}" for word, modes in named.items() if modes)
            found.append({"name": t.name, "from": source, "to": stage.graph, "mode": mode})
    found += [
        {"name": a, "from": made[a], "to": f"{b} of the next step", "mode": ""} for a, b in chain.chain.carry.items()
    ]
    found += [
        {"name": a, "from": made[a], "to": f"{b} of the next call", "mode": ""} for a, b in chain.chain.keep.items()
    ]
    return [*found, {"name": chain.chain.output, "from": made[chain.chain.output], "to": "caller", "mode": ""}]


def as_text(bundle: Bundle) -> str:
    """Return the same for a person."""
    m, engines = bundle.manifest, _engines(bundle)
    graphs = [["graph", "precision", "weights", "features", "remedy"]]
    for name, graph in m.graphs.items():
        size = console.size(sum(m.files[f].size for f in graph.data))
        graphs.append([name, graph.precision, size, ", ".join(graph.features), graph.remedy])
    parts = [
        f"{bundle.path}: {m.family}, from {_sources(m.checkpoint)}",
        f"licence: {_licences(m.checkpoint)}",
        console.table(graphs),
        *(part for name in m.chains for part in _chain_text(bundle.open_chain(name))),
        *(_engine_text(name, _engine(bundle, found)) for name, found in engines.items()),
    ]
    if not engines:
        parts.append(f"no engine; build one: build-engine {bundle.path}")
    return "\n\n".join(parts)


def _chain_text(chain: OpenChain) -> list[str]:
    height, width = chain.size
    found = [["wire", "from", "to", "mode", "tensor"]]
    for w in wires(chain):
        tensor = chain.tensors[w["name"]]
        found.append([w["name"], w["from"], w["to"], w["mode"], f"{tensor.dtype} {list(tensor.shape)}"])
    rows, entries = [["table", "row", "timestep", "input_scale", "m", "v", "w"]], chain.chain.tables
    first = next(iter(entries.values()))
    shown = [n for n, e in entries.items() if dataclasses.replace(e, steps=first.steps, rows=first.rows) == first]
    for name in shown:
        for i, row in enumerate(_rows(chain.tables[name])):
            latents = (row["m"][0][0], row["v"][0], row["w"][0])
            figures = (f"{v:.6g}" for v in (row["timestep"], row["input_scale"], *latents))
            rows.append([name if i == 0 else "", str(i), *figures])
    defaults = (f"{name} {value:g}" for name, value in chain.chain.defaults.items())
    more = [
        *([f"modes {', '.join(chain.chain.modes)}"] if chain.chain.modes else []),
        f"by default {', '.join(defaults)}" if chain.chain.defaults else "",
        _slots(chain),
        f"{chain.chain.stream} frames under way" if chain.chain.stream else "",
        f"{chain.chain.K} tensors go round the loop; m, v and w are shown for the latents" if chain.chain.K > 1 else "",
    ]
    others = [name for name in entries if name not in shown]
    return [
        "; ".join([f"chain {chain.name}: {width}x{height}, batch {chain.batch}", *filter(None, more)]),
        console.table(found, left=5),
        console.table(rows),
        *([f"further tables: {'; '.join(others)}"] if others else []),
    ]


def _slots(chain: OpenChain) -> str:
    """Return the ranks of the chain's UNet slots, as a phrase."""
    slots = ChainSlots(chain)
    graphs = [slots.graphs(mode).get("unet") for mode in slots.modes]
    ranks = [str(read_layout(chain.bundle, graph).rank) for graph in graphs if graph]
    return f"slots for adapters of rank {' or '.join(ranks)}" if ranks else ""


def _origin(origin: Origin) -> dict[str, Any]:
    """Return where the checkpoint's parts came from, without the hashes of their weights."""
    found = strict_json.plain(origin)
    for part in found["parts"].values():
        del part["weights"]
    return found


def _sources(origin: Origin) -> str:
    """Return where the whole came from, then the parts that came from elsewhere."""
    told = {name: p.source + (f" at {p.revision}" if p.revision else "") for name, p in origin.parts.items()}
    own = [told[name] for name, p in origin.parts.items() if p.source == origin.source]
    others = [f"{name} from {told[name]}" for name, p in origin.parts.items() if p.source != origin.source]
    return ", ".join([own[0] if own else origin.source, *others])


def _licences(origin: Origin) -> str:
    """Return the licence of all parts, or each one's if they differ."""
    told = {name: p.license or "the checkpoint does not say; see its model card" for name, p in origin.parts.items()}
    if len(set(told.values())) == 1:
        return next(iter(told.values()))
    return "; ".join(f"{name}: {licence}" for name, licence in told.items())


def _engine(bundle: Bundle, found: Engine | BundleError) -> dict[str, Any]:
    """Return an engine's manifest, and which chains it runs on this machine."""
    if isinstance(found, BundleError):
        return {"fits": False, "chains": [], "reason": str(found)}
    reasons = {name: misfit(bundle.open_chain(name), found) for name in bundle.manifest.chains}
    runs, reason = [name for name, r in reasons.items() if not r], next((r for r in reasons.values() if r), None)
    mend = rebuild(bundle, found) if reason else None
    told = {"fits": bool(runs), "chains": runs, "reason": reason, "rebuild": mend, "int8": _in_int8(bundle, found)}
    return {**told, **dataclasses.asdict(found)}


def _in_int8(bundle: Bundle, engine: Engine) -> dict[str, tuple[int, int]]:
    """Return graph → how many layers the engine computes in int8, and of how many; of graphs that are described."""
    graphs = bundle.manifest.graphs
    described = [name for name in engine.graphs if name in graphs and graphs[name].quantization]
    return quantization.count(bundle, engine.key.backend, engine.options, described)


def _engine_text(name: str, engine: dict[str, Any]) -> str:
    if "key" not in engine:
        return f"engine {name}: does not fit: {engine['reason']}"
    key = engine["key"]
    where = Gpu(**key["gpu"]) if key["gpu"] else key["device"]
    options = "".join(f", {k}={v}" for k, v in (engine["ordered"] | engine["settled"]).items())
    size = sum(graph["bytes"] for graph in engine["graphs"].values())
    checked = [
        f"{chain} checked: " + "; ".join(f"{c['stage']} {c['metric']} {c['value']:.3g}" for c in checks)
        for chain, checks in engine["checks"].items()
    ]
    return "\n  ".join(
        [
            f"engine {name}: {_fit(engine)}",
            f"{key['backend']} on {where}, {key['library']} {key['version']}{options}, {console.size(size)}",
            *quantization.told(engine["int8"]),
            *(checked or ["unverified: it is checked when it is first loaded on such a machine"]),
        ]
    )


def _fit(engine: dict[str, Any]) -> str:
    """Return which chains an engine runs on this machine, why it does not run the others, and what mends that."""
    reason, mend = engine["reason"], engine["rebuild"]
    if not reason and (command := backends.get(engine["key"]["backend"]).elsewhere):
        return f"for {command}; it draws here only if it is named"
    if not reason:
        return "fits this machine"
    if engine["fits"]:
        return f"fits this machine for {', '.join(engine['chains'])} alone: {reason}\n  to add the others: {mend}"
    where = "one that fits" if has_device(engine["key"]["backend"]) else "on a machine that has one"
    return f"does not fit: {reason}\n  {where}: {mend}"
