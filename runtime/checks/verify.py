"""Compare what an engine makes with what diffusers made: ids, every stage alone, the schedule, and the whole chain.

The reference was recorded from diffusers' own pipeline in fp32 when the bundle was exported, so this needs neither
torch nor the checkpoint.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from turbochain.runtime import backends, selection
from turbochain.runtime.adapters import Adapters
from turbochain.runtime.backends.contract import Executor
from turbochain.runtime.bundle import strict_json, writing
from turbochain.runtime.bundle.manifest import COMPUTED, REFERENCE, Check, Stage
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.chain.plan import graph_plan
from turbochain.runtime.chain.slots import ChainSlots
from turbochain.runtime.checks import bounds, metrics, reference
from turbochain.runtime.checks.bounds import AT_LEAST, Bounds
from turbochain.runtime.checks.recorded import Recorded, guided
from turbochain.runtime.checks.reference import Case, sample
from turbochain.runtime.errors import InputError, VerificationError
from turbochain.runtime.inputs.feeds import tokenizers
from turbochain.runtime.inputs.guidance import GUIDANCE
from turbochain.runtime.inputs.noise import Generator, draw_run
from turbochain.runtime.inputs.tokenizer import Tokenizer
from turbochain.runtime.selection import Found

log = logging.getLogger("turbochain")


def verify(
    chain: OpenChain,
    executor: Executor,
    computed: Mapping[str, str],
    progress: Callable[[int, int], None] = lambda done, total: None,
    adapters: Adapters | None = None,
    *,
    whole: bool = True,
) -> list[Check]:
    """Return every figure of a chain, the worst of all cases for each stage and metric; loads the graphs.

    `computed`: graph → the precision that it is computed in, which decides its bounds; see `precisions`. Each case is
    drawn in each mode of adapters too, with slots of zeros. A guided step that no case has, as of a further size, is
    compared with the table alone. `adapters`: compare only cases that were recorded with what is active there, which
    may be none. `whole`: go on after a case that failed.
    """
    of = () if adapters is None else adapters.files
    recorded = reference.read(chain.bundle, chain.name, adapters=adapters is not None)
    cases = [case for case in recorded.cases if case.adapters == of]
    if not cases:
        return []
    readers, own = tokenizers(chain), bounds.own_of_predictions(recorded.errors)
    slots, worst = ChainSlots(chain), dict[tuple[str, str], Check]()
    modes = ["", *slots.modes] if adapters is None else [next(iter(adapters.modes(chain)), "")]
    fed = {} if adapters is None else {n: adapters.value(chain, n) for n in slots.feeds if adapters.fed(chain, n)}
    for i, mode in enumerate(modes):
        every = [Recorded(chain, case, mode, fed) for case in cases]
        unseen = [] if i or adapters is not None else _guided_steps(chain, cases)
        graphs = {s.graph for s in chain.chain.stages if s in unseen or any(s.runs(one.modes) for one in every)}
        if adapters is not None:
            adapters.patch(executor, graphs)
        executor.load(graphs)  # one UNet at a time
        for j, one in enumerate(every):
            progress(i * len(cases) + j, len(modes) * len(cases))
            _keep_worst(worst, _checks(chain, executor, computed, readers, one, own, new_alone=i > 0))
            if not whole and not all(check.passed for check in worst.values()):
                return list(worst.values())
            if i == len(modes) - 1:
                one.case.made.clear()
        for stage in unseen:
            made = guided(chain, cases[0])
            _keep_worst(worst, _check_stage(chain, executor, stage, computed[stage.graph], made, own))
    progress(len(modes) * len(cases), len(modes) * len(cases))
    return list(worst.values())


def _guided_steps(chain: OpenChain, cases: Sequence[Case]) -> list[Stage]:
    """Return the steps of calls with guidance, if none of the cases is one."""
    if any(GUIDANCE in case.modes for case in cases):
        return []
    return [stage for stage in chain.chain.stages if stage.judged == "state" and GUIDANCE in stage.if_]


def _keep_worst(worst: dict[tuple[str, str], Check], checks: Iterable[Check]) -> None:
    """Put into `worst` those checks that are worse than what it has of their stage and metric."""
    for check in checks:
        key = (check.stage, check.metric)
        if key not in worst or _badness(check) > _badness(worst[key]):
            worst[key] = check


def verify_bundle(
    path: str | Path,
    *,
    chain: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    engine: str | None = None,
    engines: str | Path | None = None,
    threads: int | None = None,
    trust_engines: bool = False,
    lora: Sequence[tuple[Path, float]] = (),
) -> tuple[str, dict[str, list[Check]]]:
    """Hash every file of a bundle again and verify a chain (None: all that the engine runs) with its best engine for
    this machine, or with `engine`.

    `lora`: LoRA files with their weights, to compare the cases that were recorded with these and no others. Return the
    engine's name, and chain → checks, none if no such case was recorded. This is the Python twin of
    `turbochain verify`. Raises what Pipeline.load raises; `require` raises if a check failed.
    """
    bundle = Bundle.open(path, trust_engines=trust_engines)
    bundle.check_files(full=True)
    wanted = [bundle.open_chain(name) for name in (bundle.manifest.chains if chain is None else [chain])]
    found = selection.select_for_any(wanted, backend, device, engine, engines)
    executor, checks = selection.open_executor(bundle, found, device=device, threads=threads), {}
    try:
        adapters = _with(bundle, executor, lora) if lora else None
        for opened in wanted:
            if chain is None and selection.lacks(opened, found.engine):
                continue
            selection.admit(opened, found)
            checks[opened.name] = verify(opened, executor, precisions(opened, found), adapters=adapters)
            if adapters is None and not _is_verified(opened, found) and all(c.passed for c in checks[opened.name]):
                found = _keep(opened, found, checks[opened.name])
    finally:
        executor.close()
    return found.name, checks


def _with(bundle: Bundle, executor: Executor, lora: Sequence[tuple[Path, float]]) -> Adapters:
    adapters = Adapters(bundle, executor)
    for i, (path, _) in enumerate(lora):
        adapters.load(path, None, str(i))
    adapters.set([str(i) for i in range(len(lora))], [weight for _, weight in lora])
    return adapters


def prepare(chain: OpenChain, found: Found, executor: Executor) -> Found:
    """Hash everything of a chain and load what runs in no mode; verify it if its engine has not been on such a machine.

    Return the engine with its checks, which are kept in its engine.json. Raises VerificationError, with nothing kept,
    if it fails them.
    """
    selection.admit(chain, found)
    if _is_verified(chain, found):
        executor.load(stage.graph for stage in chain.chain.stages if stage.runs(()))  # others when their mode is used
        return found
    log.warning(
        "the engine %s was not verified on this machine yet: it is verified now, which happens once", found.name
    )
    chain.bundle.check_files([REFERENCE])
    checks = verify(chain, executor, precisions(chain, found))
    require(checks)
    executor.load(stage.graph for stage in chain.chain.stages if stage.runs(()))
    return _keep(chain, found, checks)


def _is_verified(chain: OpenChain, found: Found) -> bool:
    """Return whether the engine has checks of this very chain: same files, same wiring."""
    return chain.name in found.engine.checks and found.engine.verified.get(chain.name) == chain.digest


def _keep(chain: OpenChain, found: Found, checks: list[Check]) -> Found:
    engine = dataclasses.replace(
        found.engine,
        checks={**found.engine.checks, chain.name: tuple(checks)},
        verified={**found.engine.verified, chain.name: chain.digest},
    )
    try:
        writing.write_atomically(found.folder / "engine.json", strict_json.write(engine))
    except InputError as error:
        log.warning("the engine %s is verified again at each load: %s", found.name, error)
    return Found(found.folder, engine)


def precisions(chain: OpenChain, found: Found) -> dict[str, str]:
    """Return graph → what the engine computes it in."""
    return backends.precisions(found.engine.key.backend, found.engine.options, chain.graphs)


def require(checks: Sequence[Check]) -> None:
    """Raise VerificationError that names every stage, figure and bound which failed."""
    failed = [c for c in checks if not c.passed]
    if failed:
        figures = "; ".join(f"{c.stage}: {c.metric} is {value_text(c)}, the bound is {bound_text(c)}" for c in failed)
        raise VerificationError(f"the result differs from what diffusers produced: {figures}")


def value_text(check: Check) -> str:
    """Return a check's figure with three digits, or with as many as show on which side of its bound it lies."""

    def within(value: float) -> bool:
        return value >= check.bound if check.metric in AT_LEAST else value <= check.bound

    shown = (f"{check.value:.{digits}g}" for digits in range(3, 18))
    return next(text for text in shown if within(float(text)) == within(check.value))


def bound_text(check: Check) -> str:
    """Return a check's bound and its direction: "≤ 0.001"."""
    return f"{'≥' if check.metric in AT_LEAST else '≤'} {check.bound:g}"


def _badness(check: Check) -> tuple[bool, float]:
    """Return a value that is larger for a worse figure, beside its bound: figures of one stage may have several."""
    if math.isnan(check.value):
        return True, math.inf
    part = check.value / check.bound if check.bound else check.value
    return not check.passed, -part if check.metric in AT_LEAST else part


def _judge(stage: str, limits: Bounds, result: np.ndarray, reference: np.ndarray) -> Iterator[Check]:
    for metric, bound in limits.items():
        value = metrics.METRICS[metric](result, reference)
        passed = value >= bound if metric in AT_LEAST else value <= bound
        yield Check(stage, metric, value, bound, bool(passed and np.isfinite(result).all()))


def _checks(
    chain: OpenChain,
    executor: Executor,
    computed: Mapping[str, str],
    readers: Mapping[str, Tokenizer],
    recorded: Recorded,
    own: Bounds,
    new_alone: bool,
) -> Iterator[Check]:
    """Return a case's figures; `new_alone`: check only those single stages that a call with the case's own modes does
    not run."""
    if not new_alone:
        for name, tokenizer in readers.items():
            if not chain.chain.feeds[name].of:  # no other text is recorded
                yield from _judge("ids", bounds.IDS, tokenizer.encode(recorded.case.prompt), recorded.value(name, 0))
        yield from _check_schedule(chain, recorded)
    for stage in chain.chain.stages:
        if stage.runs(recorded.modes) and not (new_alone and stage.runs(recorded.case.modes)):
            yield from _check_stage(chain, executor, stage, computed[stage.graph], recorded, own)
    least = max((computed[g] for g in chain.graphs), key=COMPUTED.index)
    yield from _check_chain(chain, executor, bounds.of_image(least, recorded.case.errors), recorded)


def _check_schedule(chain: OpenChain, recorded: Recorded) -> Iterator[Check]:
    """Check the table against what the scheduler and the UNet did: each step's arithmetic, the columns of the time."""
    yield from _judge("schedule", bounds.STATE, recorded.walked[:, 0], recorded.rows("next_latents"))
    for name in chain.feeds("column"):
        if name in recorded.tensors:
            yield from _judge("schedule", bounds.COLUMN, recorded.columns[name], recorded.tensors[name])


def _check_stage(
    chain: OpenChain, executor: Executor, stage: Stage, precision: str, recorded: Recorded, own: Bounds
) -> Iterator[Check]:
    """Run a stage alone on its recorded inputs; a stage in the loop runs in every recorded row."""
    graph = chain.graphs[stage.graph]
    plan, bound = graph_plan(stage.graph, graph), bounds.of_stage(precision, stage.judged, graph.model_class, own)
    for row, feeds in recorded.fed(stage):
        results = executor.execute(plan, feeds).arrays
        for tensor in graph.outputs:
            name = stage.wires.get(tensor.name, tensor.name)
            if name in recorded.tensors:
                yield from _judge(stage.graph, bound, results[tensor.name], recorded.value(name, row))
            elif recorded.case.has_samples:
                recorded.case.made[name, row] = results[tensor.name].copy()
                if (part := recorded.sample(name, row)) is not None:
                    yield from _judge(stage.graph, bound, sample(results[tensor.name]), part)


def _check_chain(chain: OpenChain, executor: Executor, bound: Bounds, recorded: Recorded) -> Iterator[Check]:
    """Run the whole chain, ids to picture, with our own noise; the bound is that of the least precise stage.

    A stream starts from zeros, and the same frame enters until its first picture is finished.
    """
    case = recorded.case
    noise = draw_run(chain, recorded.table, [Generator(case.seed)], chain.batch)
    plan = chain.plan(case.table, modes=recorded.modes)
    held, stream = recorded.feeds("held"), chain.chain.stream
    executor.hold(plan, {name: np.zeros_like(value) for name, value in held.items()} if stream else held)
    fed = {**recorded.feeds("call"), **recorded.feeds("step"), **recorded.columns, **noise}
    for _ in range(stream or 1):
        image = executor.execute(plan, fed).arrays[chain.chain.output]
    yield from _judge("image", bound, image, case.tensors[chain.chain.output])
