"""Which calls of diffusers' pipelines are recorded, and how much of each. Torch-free."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from turbochain.export.chains import Layout
from turbochain.export.controls.kind import Control
from turbochain.export.sources.adapters import read_references
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.export.tasks import Trial
from turbochain.runtime.bundle.hashing import digest
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE, Chain, TableEntry
from turbochain.runtime.checks import bounds
from turbochain.runtime.inputs.adapters import Adapter
from turbochain.runtime.inputs.guidance import GUIDANCE, NEGATIVE_PROMPT

PROMPTS = (
    "a photo of a cat wearing a red hat, studio light",
    "a lighthouse on a cliff at dusk, oil painting",
    "une petite maison bleue près d'un lac, 水彩画",
    "",
)
"""One case per step count; the rows of a batch go on through the list. Added tokens have cases of their own."""

EXCERPT_ROWS = 2
"""The rows of the loop in an excerpt: with the second, what the sampler carries to it is judged too."""


@dataclass(frozen=True)
class Call:
    """A recorded call of a chain, as the metadata of the file has it."""

    chain: str
    table: str  # of the chain
    modes: list[str]
    prompt: list[str]
    seed: int
    num_inference_steps: int
    strength: float | None = None
    guidance_scale: float = 0.0
    adapters: list[tuple[str, float]] = field(default_factory=list)  # SHA-256 of a LoRA's file, scale
    errors: dict[str, dict[str, float]] = field(default_factory=dict)  # precision → metric → diffusers', against fp32


@dataclass(frozen=True)
class Extent:
    """How much of a call is recorded: all of it, or an excerpt."""

    rows: int | None = None  # of the loop, from the first, and what the last one leaves; None: all
    sampled: bool = False  # whether of what a ControlNet or T2I-Adapter makes there is a sample alone


WHOLE = Extent()


def of_layout(
    layout: Layout,
    chains: Mapping[str, Chain],
    scale: float,
    of_tokens: Sequence[str],
    can: Callable[[str, str], bool],
) -> Iterator[Call]:
    """Return the calls that are recorded. A chain of a further size or batch is tried once, as its graphs are those
    of the first with other shapes; and once with each ControlNet and T2I-Adapter, if diffusers `can`."""
    asked: list[tuple[str, str, Trial]] = []
    for task, shape in layout.chains:
        name = layout.name(task, shape)
        tables = chains[name].tables
        trials = [t for t in task.trials(_steps(chains[name]), layout.stream) if layout.guided or not t.guided]
        found = [(name, _table(tables, trial), trial) for trial in trials]
        known = {tables[table].guidance_scale for _, table, _ in found}
        for other in {entry.guidance_scale: None for entry in tables.values() if entry.guidance_scale not in known}:
            of_scale = {table: entry for table, entry in tables.items() if entry.guidance_scale == other}
            found.append((name, _table(of_scale, trials[0]), trials[0]))
        asked += found if shape == layout.shapes[0] else found[:1]
        modes = [c.mode for c in layout.steered.of(task.name) if can(task.name, c.mode)]
        asked += [
            (name, table, replace(trial, mode=m))
            for m in modes
            for _, table, trial in found[-1 if task.before else 0 :][:1]
        ]
    first = next(iter(chains))
    table, trial = next((table, trial) for name, table, trial in asked if name == first)
    prompts = [_rows(PROMPTS, i, chains[name].batch) for i, (name, _, _) in enumerate(asked)]
    for start in range(0, len(of_tokens), chains[first].batch):
        asked.append((first, table, Trial(trial.steps, trial.strength)))
        prompts.append(_rows(of_tokens, start, chains[first].batch))
    for i, ((name, table, trial), prompt) in enumerate(zip(asked, prompts, strict=True)):
        entry = chains[name].tables[table]
        yield Call(
            chain=name,
            table=table,
            modes=[*(_modes(layout) if trial.guided else []), *filter(None, [trial.mode])],
            prompt=prompt,
            seed=1000 + i,
            num_inference_steps=entry.steps,
            strength=trial.strength if entry.strength is None else entry.strength,
            guidance_scale=scale if trial.guided else entry.guidance_scale or 0.0,
        )


def with_loras(
    checkpoint: Checkpoint, layout: Layout, calls: Sequence[Call]
) -> Iterator[tuple[tuple[Adapter, float], Call]]:
    """Return a call with each LoRA of the order for the first chain of each task, but for a stream: the first of those
    that are recorded without, and its LoRA and strength."""
    names = [layout.name(task, layout.shapes[0]) for task in layout.tasks if not task.streams]
    for adapter, strength in read_references(checkpoint):
        known = digest(adapter.path)
        for name in names:
            plain = next(call for call in calls if call.chain == name)
            yield (adapter, strength), replace(plain, adapters=[(known, strength)], errors={})


def extent(layout: Layout, chain: Chain, control: Control | None) -> Extent:
    """Return how much is recorded of a call.

    There are excerpts of calls of a further size or batch, whose graphs are those of the first with other shapes, and
    of calls with a ControlNet, whose residuals are tens of megabytes in each row.
    """
    further = not chain.stream and _is_further(layout, chain)
    return Extent(EXCERPT_ROWS if further or control else None, further)


def _is_further(layout: Layout, chain: Chain) -> bool:
    first = layout.shapes[0]
    return (*chain.size, chain.batch) != (first.height, first.width, first.batch)


def drawn_again(layout: Layout, calls: Sequence[Call], chains: Mapping[str, Chain]) -> dict[int, bool]:
    """Return the calls of which diffusers' own error in a lower precision is recorded, and whether to their picture:
    those of many evaluations; of the first from text the first prediction is enough, and of those in which the UNet is
    judged with what an engine's own ControlNet or T2I-Adapter makes."""
    from_text = {i: call for i, call in enumerate(calls) if chains[call.chain].task == TEXT_TO_IMAGE}
    steered = {control.mode for control in layout.controls}
    sampled = [
        i for i, call in from_text.items() if steered & {*call.modes} and _is_further(layout, chains[call.chain])
    ]
    many = [i for i, c in enumerate(calls) if bounds.has_many(chains[c.chain].tables[c.table].rows, c.modes)]
    return dict.fromkeys([*list(from_text)[:1], *sampled], False) | dict.fromkeys(many, True)


def _rows(prompts: Sequence[str], start: int, batch: int) -> list[str]:
    return [prompts[(start + row) % len(prompts)] for row in range(batch)]


def _modes(layout: Layout) -> list[str]:
    """Return the modes of a guided call; with a negative prompt if that has text encoders of its own, to judge them."""
    return [GUIDANCE, NEGATIVE_PROMPT] if layout.zeros and layout.clip_skip else [GUIDANCE]


def _steps(chain: Chain) -> list[int]:
    return sorted({entry.steps for entry in chain.tables.values()})


def _table(tables: Mapping[str, TableEntry], trial: Trial) -> str:
    """Return the name of the first table of a trial."""
    begin = 0 if trial.strength is None else trial.steps - min(int(trial.steps * trial.strength), trial.steps)
    fits = (n for n, e in tables.items() if e.steps == trial.steps and (e.strength is not None or e.begin == begin))
    return next(fits)
