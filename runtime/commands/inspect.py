"""What a bundle holds, as text or plain values; reads only its manifests."""

import dataclasses
from typing import Any

from turbochain.runtime.bundle.manifest import Engine, Gpu
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.commands import console
from turbochain.runtime.errors import BundleError
from turbochain.runtime.selection import has_device, misfit, rebuild


def as_json(bundle: Bundle) -> dict[str, Any]:
    """Everything but the long rows of timestep embeddings."""
    m = bundle.manifest
    return {
        "path": str(bundle.path),
        "family": m.family,
        "checkpoint": {k: v for k, v in dataclasses.asdict(m.checkpoint).items() if k != "weights"},
        "size": dict(zip(("height", "width"), bundle.size, strict=True)),
        "batch": bundle.batch,
        "stages": {name: dataclasses.asdict(graph) for name, graph in m.graphs.items()},
        "wiring": wiring(bundle),
        "schedules": {
            steps: {
                "p": s.p,
                "q": s.q,
                "rows": [{k: v for k, v in vars(r).items() if k != "timestep_embedding"} for r in s.rows],
            }
            for steps, s in bundle.chain.schedules.items()
        },
        "engines": {name: _engine(bundle, found) for name, found in bundle.engines().items()},
        "created": m.created,
        "created_by": m.created_by,
    }


def wiring(bundle: Bundle) -> list[dict[str, str]]:
    """One entry per wire of the text-to-image chain: name, where it comes from, where it goes."""
    chain, graphs = bundle.chain, bundle.manifest.graphs
    made = {t.name: g for g in chain.graphs for t in graphs[g].outputs}
    sources = {
        **dict.fromkeys(chain.inputs, "caller"),
        **dict.fromkeys(chain.step_inputs, "caller, each step"),
    }
    wires = []
    for g in chain.graphs:
        column = "schedule, at load" if g in chain.once else "schedule, each step"
        for t in graphs[g].inputs:
            wires.append({"name": t.name, "from": made.get(t.name) or sources.get(t.name, column), "to": g})
    wires += [{"name": a, "from": made[a], "to": f"{b} of the next step"} for a, b in chain.carry.items()]
    return [*wires, {"name": chain.output, "from": made[chain.output], "to": "caller"}]


def as_text(bundle: Bundle) -> str:
    """The same for a person."""
    m = bundle.manifest
    engines = bundle.engines()
    height, width = bundle.size
    c = m.checkpoint
    source = c.source + (f" at {c.revision}" if c.revision else "")
    stages = [["stage", "precision", "weights", "remedy"]]
    for name, graph in m.graphs.items():
        size = console.size(sum(m.files[f].size for f in graph.data))
        stages.append([name, graph.precision, size, graph.remedy])
    wires = [["wire", "from", "to", "tensor"]]
    for w in wiring(bundle):
        tensor = bundle.tensors[w["name"]]
        wires.append([w["name"], w["from"], w["to"], f"{tensor.dtype} {list(tensor.shape)}"])
    steps = [["steps", "row", "timestep", "input_scale", "a", "b", "c"]]
    for count, schedule in bundle.chain.schedules.items():
        for i, r in enumerate(schedule.rows):
            figures = (f"{v:.6g}" for v in (r.timestep, r.input_scale, r.a, r.b, r.c))
            steps.append([count if i == 0 else "", str(i), *figures])
    parts = [
        f"{bundle.path}: {m.family}, {width}x{height}, batch {bundle.batch}, from {source}",
        f"licence: {c.license or 'the checkpoint does not say; see its model card'}",
        console.table(stages),
        console.table(wires, left=4),
        console.table(steps),
        *(_engine_text(name, _engine(bundle, found)) for name, found in engines.items()),
    ]
    if not engines:
        parts.append(f"no engine; build one: build-engine {bundle.path}")
    return "\n\n".join(parts)


def _engine(bundle: Bundle, found: Engine | BundleError) -> dict[str, Any]:
    if isinstance(found, BundleError):
        return {"fits": False, "reason": str(found)}
    reason = misfit(bundle, found)
    mend = rebuild(bundle, found) if reason else None
    return {"fits": reason is None, "reason": reason, "rebuild": mend, **dataclasses.asdict(found)}


def _engine_text(name: str, engine: dict[str, Any]) -> str:
    fits = "fits this machine" if engine["fits"] else f"does not fit: {engine['reason']}"
    if "key" not in engine:
        return f"engine {name}: {fits}"
    if engine["rebuild"]:
        here = has_device(engine["key"]["backend"])
        fits += f"\n  {'one that fits' if here else 'on a machine that has one'}: {engine['rebuild']}"
    worst = "; ".join(f"{c['stage']} {c['metric']} {c['value']:.3g}" for c in engine["checks"])
    key = engine["key"]
    where = Gpu(**key["gpu"]) if key["gpu"] else key["device"]
    options = "".join(f", {k}={v}" for k, v in (engine["ordered"] | engine["settled"]).items())
    return (
        f"engine {name}: {fits}\n  {key['backend']} on {where}, {key['library']} {key['version']}{options}, "
        f"{console.size(sum(engine['bytes'].values()))}\n  "
        + (f"checked: {worst}" if worst else "unverified: it is checked when it is first loaded on such a machine")
    )
