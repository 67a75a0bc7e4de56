"""Does an engine make what diffusers made? Every stage alone, the schedule, and the whole chain.

The reference was recorded from diffusers' own pipeline in fp32 when the bundle was exported, so this needs
neither torch nor the checkpoint.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.runtime import backends, selection
from turbochain.runtime.bundle import strict_json, writing
from turbochain.runtime.bundle.manifest import COMPUTED, REFERENCE, Check, Engine
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain.plan import plan, stage_plan
from turbochain.runtime.checks import metrics
from turbochain.runtime.checks.bounds import AT_LEAST, BOUNDS, EMBEDDING_BOUND, SCHEDULE_BOUND, Bounds
from turbochain.runtime.checks.reference import Arrays, Case, read_cases
from turbochain.runtime.errors import InputError, VerificationError
from turbochain.runtime.inputs.noise import Generator, draw_run

log = logging.getLogger("turbochain")


def verify(
    bundle: Bundle,
    executor: Any,
    computed: Mapping[str, str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Check]:
    """Every figure for the engine that `executor` runs, the worst of all cases for each stage and metric.

    `computed`: graph → the precision that it is computed in, which says its bounds; see `precisions`.
    """
    cases = read_cases(bundle)
    worst: dict[tuple[str, str], Check] = {}
    for i, case in enumerate(cases):
        progress(i, len(cases))
        for check in _checks(bundle, executor, computed, case):
            key = (check.stage, check.metric)
            if key not in worst or _badness(check) > _badness(worst[key]):
                worst[key] = check
    progress(len(cases), len(cases))
    return list(worst.values())


def verify_bundle(
    path: str | Path,
    *,
    backend: str | None = None,
    device: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
) -> tuple[str, list[Check]]:
    """Hash every file of a bundle anew and verify its best engine for this machine, or `engine`: its name, its checks.

    The Python twin of `turbochain verify`. Raises what Pipeline.load raises; `require` raises where a check failed.
    """
    bundle = Bundle.open(path)
    bundle.check_files(full=True)
    name, chosen = selection.select(bundle, backend, device, engine)
    executor = selection.open_executor(bundle, name, chosen, device=device, threads=threads)
    try:
        checks = verify(bundle, executor, precisions(bundle, chosen))
    finally:
        executor.close()
    if not chosen.checks and all(c.passed for c in checks):
        _keep(bundle, name, chosen, checks)
    return name, checks


def open_verified(
    bundle: Bundle, name: str, chosen: Engine, *, device: str | None = None, threads: int | None = None
) -> Any:
    """`selection.open_executor`; an engine that was built for this machine on another one is verified first.

    The checks are then kept in its engine.json. Raises VerificationError, with nothing kept, where it fails them.
    """
    executor = selection.open_executor(bundle, name, chosen, device=device, threads=threads)
    if chosen.checks:
        return executor
    log.warning("the engine %s was built on another machine: it is verified now, as this is its first load", name)
    try:
        bundle.check_files([REFERENCE])
        checks = verify(bundle, executor, precisions(bundle, chosen))
        require(checks)
    except BaseException:
        executor.close()
        raise
    _keep(bundle, name, chosen, checks)
    return executor


def _keep(bundle: Bundle, name: str, chosen: Engine, checks: list[Check]) -> None:
    path = bundle.path / "engines" / name / "engine.json"
    try:
        writing.write_atomically(path, strict_json.write(dataclasses.replace(chosen, checks=tuple(checks))))
    except InputError as error:
        log.warning("the engine %s is verified anew at each load: %s", name, error)


def precisions(bundle: Bundle, chosen: Engine) -> dict[str, str]:
    """Graph → what the engine computes it in."""
    return backends.precisions(chosen.key.backend, chosen.options, bundle.manifest.graphs)


def require(checks: list[Check]) -> None:
    """Raise VerificationError that names every stage, figure and bound which failed."""
    failed = [c for c in checks if not c.passed]
    if failed:
        figures = "; ".join(f"{c.stage}: {c.metric} is {c.value:.3g}, the bound is {bound_text(c)}" for c in failed)
        raise VerificationError(f"the result differs from what diffusers produced: {figures}")


def bound_text(check: Check) -> str:
    """A check's bound and its direction: "≤ 0.001"."""
    return f"{'≥' if check.metric in AT_LEAST else '≤'} {check.bound:g}"


def _badness(check: Check) -> float:
    if math.isnan(check.value):
        return math.inf
    return -check.value if check.metric in AT_LEAST else check.value


def _judge(stage: str, bounds: Bounds, result: np.ndarray, reference: np.ndarray) -> Iterator[Check]:
    for metric, bound in bounds.items():
        value = getattr(metrics, metric)(result, reference)
        passed = value >= bound if metric in AT_LEAST else value <= bound
        yield Check(stage, metric, value, bound, bool(passed and np.isfinite(result).all()))


def _checks(bundle: Bundle, executor: Any, computed: Mapping[str, str], case: Case) -> Iterator[Check]:
    table = selection.feeds(bundle, executor, case.steps)
    yield from _check_schedule(table, case)
    for name in bundle.chain.graphs:
        if name not in bundle.chain.once:  # what these make is in the table, which the loop's stages read
            yield from _check_stage(bundle, executor, name, BOUNDS[computed[name]], table, case)
    least = max((computed[g] for g in bundle.chain.graphs), key=COMPUTED.index)
    yield from _check_chain(bundle, executor, BOUNDS[least]["image"], table, case)


def _check_schedule(table: Arrays, case: Case) -> Iterator[Check]:
    """The table against what the scheduler did: the timestep embedding and each step's arithmetic."""
    recorded = case.tensors
    yield from _judge(
        "schedule",
        {"max_abs": EMBEDDING_BOUND},
        table["timestep_embedding"],
        recorded["timestep_embedding"],
    )
    x, prediction, noise = (recorded[k].astype(np.float64) for k in ("latents", "prediction", "noise"))
    a, b, c = (table[k].reshape(-1, 1, 1, 1, 1) for k in "abc")
    yield from _judge(
        "schedule",
        {"relative_l2": SCHEDULE_BOUND},
        a * x + b * prediction + c * noise,
        recorded["next_latents"],
    )


def _check_stage(
    bundle: Bundle, executor: Any, name: str, bounds: dict[str, Bounds], table: Arrays, case: Case
) -> Iterator[Check]:
    graph = bundle.manifest.graphs[name]
    stage = stage_plan(name, graph)
    recorded = {**case.tensors, **table}
    if name in bundle.chain.before:
        results = executor.execute(stage, recorded)
        for tensor in graph.outputs:
            yield from _judge(name, bounds["text"], results[tensor.name], recorded[tensor.name])
    elif name in bundle.chain.after:
        feeds = {**recorded, "next_latents": recorded["next_latents"][-1]}
        results = executor.execute(stage, feeds)
        bound = bounds.get(graph.model_class, bounds["decoder"])
        yield from _judge(name, bound, results[bundle.chain.output], recorded["image"])
    else:
        per_step = {*bundle.chain.step_inputs, *table, *bundle.chain.carry.values()}
        for row in range(case.steps):
            feeds = {k: v[row] if k in per_step else v for k, v in recorded.items()}
            out = executor.execute(stage, feeds)["next_latents"].astype(np.float64)
            prediction = (out - feeds["a"] * feeds["latents"] - feeds["c"] * feeds["noise"]) / feeds["b"]
            yield from _judge(name, bounds["prediction"], prediction, recorded["prediction"][row])


def _check_chain(bundle: Bundle, executor: Any, bounds: Bounds, table: Arrays, case: Case) -> Iterator[Check]:
    """Ids → picture with our own noise; the bound is that of the least precise stage."""
    shape = bundle.tensors["latents"].shape
    start, noise = draw_run(bundle.schedule(case.steps), [Generator(case.seed)], shape)
    ids = {name: case.tensors[name] for name in bundle.manifest.tokenizers}
    feeds = {**table, **ids, "latents": start, "noise": noise}
    steps = plan(bundle.chain, bundle.manifest.graphs, case.steps)
    image = executor.execute(steps, feeds)[bundle.chain.output]
    yield from _judge("image", bounds, image, case.tensors["image"])
