"""ControlNets and T2I-Adapters in a bundle: their graphs, stages and feeds, and the UNets that read them. Torch-free.

Each is a component of the checkpoint and a mode of the chains whose task diffusers has a pipeline for. The UNet reads
what it makes in place of zeros, which it reads in all other calls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from turbochain.export.controls import controlnet, t2i_adapter
from turbochain.export.controls.kind import Configs, Control, ControlKind
from turbochain.export.families import Family, GraphSpec, Inputs, Shape, common
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE, Feed, Stage
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.embeds import NEGATIVE
from turbochain.runtime.inputs.guidance import GUIDANCE

KINDS: Mapping[str, ControlKind] = {kind.name: kind for kind in (controlnet.KIND, t2i_adapter.KIND)}
"""The kinds by their names, in the order in which a UNet reads what they make."""


@dataclass(frozen=True)
class Controls:
    """The ControlNets and T2I-Adapters of a bundle."""

    family: Family
    configs: Configs
    all: Sequence[Control]  # those of one kind side by side, in the order of `KINDS`

    def of(self, task: str) -> list[Control]:
        """Return those that a task's calls can use. If the UNet reads the guidance scale, only text-to-image has any:
        the other pipelines do not give it that scale."""
        if task != TEXT_TO_IMAGE and self.configs["unet"].get("time_cond_proj_dim") is not None:
            return []
        return [control for control in self.all if task in self.family.steered[control.kind.name].pipelines]

    def graphs(self, specs: Mapping[str, GraphSpec]) -> dict[str, GraphSpec]:
        """Return role → specification, with UNets that read what is made for them, but not those of streams."""
        if not self.all:
            return dict(specs)
        found = {name: self._reading(s) if s.role == "unet" and not s.of_rows else s for name, s in specs.items()}
        return {**found, **{n: s for c in self.all for n, s in c.kind.specs(self.family, self.configs, c).items()}}

    def reads(self, configs: Configs, shape: Shape) -> Inputs:
        """Return what the UNet reads beside what the plain one reads."""
        found: Inputs = {}
        for kind, first in self._kinds.items():
            found |= kind.reads(configs, shape, first.component)
        return found

    def before(self, task: str) -> list[Stage]:
        """Return the stages that make something of the control image alone."""
        return [
            Stage(graph, "image", "residuals", if_=(control.mode,), unless=earlier)
            for control, earlier in self._in_turn(task)
            for graph in control.kind.specs(self.family, self.configs, control)
            if graph != control.kind.of_step(control)
        ]

    def in_step(self, task: str, guided: bool) -> list[Stage]:
        """Return the stages that run before the UNet's; `guided`: whether the chain has a negative half."""
        found = []
        for control, earlier in self._in_turn(task):
            graph = control.kind.of_step(control)
            stage = Stage(graph, "step", "residuals", if_=(control.mode,), unless=earlier)
            found.append(stage)
            if guided and control.kind.halves:
                spec = control.kind.specs(self.family, self.configs, control)[graph]
                ends = {*spec.inputs(self.configs, Shape(8, 8, 1)), *spec.outputs}
                own = [n for n in (*common.embeds(self.family), *self._halved) if n in ends]
                wires = {name: NEGATIVE + name for name in own}
                found.append(replace(stage, wires=wires, if_=(GUIDANCE, control.mode)))
        return found

    @property
    def negative_reads(self) -> dict[str, str]:
        """Return what the negative half's UNet reads in place of the other half's tensors."""
        return {name: NEGATIVE + name for name in self._halved}

    def feeds(self, task: str, guided: bool) -> dict[str, Feed]:
        """Return the feeds of a chain that is no stream."""
        found: dict[str, Feed] = {}
        for control in self.of(task):
            found |= control.kind.feeds(self.family, self.configs, control)
        names = [*self.reads(self.configs, Shape(8, 8, 1)), *(self.negative_reads.values() if guided else ())]
        return found | {name: Feed("zeros", "held") for name in names}

    def check(self, shapes: Sequence[Shape], tasks: Sequence[str]) -> None:
        """Raise InputError if one does not fit this UNet or these shapes, or if no task can use it."""
        for control in self.all:
            pipelines = self.family.steered[control.kind.name].pipelines if self.family.steered else {}
            if not pipelines:
                raise InputError(
                    f"{control.option}: diffusers draws {self.family.title} with no {control.kind.title}; leave it out"
                )
            if not any(control in self.of(task) for task in tasks):
                raise InputError(
                    f"{control.option}: with a {control.kind.title} diffusers draws {' and '.join(pipelines)}; add one "
                    "of these to --tasks"
                )
            problems = [p for shape in shapes for p in control.kind.problems(self.configs, control.component, shape)]
            if problems:
                told = "; ".join(dict.fromkeys(problems))
                raise InputError(f"{control.option} does not fit: {told}; {control.kind.advice}")

    @property
    def _kinds(self) -> dict[ControlKind, Control]:
        """Return the kinds that there are, and the first of each."""
        found: dict[ControlKind, Control] = {}
        for control in self.all:
            found.setdefault(control.kind, control)
        return found

    @property
    def _halved(self) -> list[str]:
        """Return which of the UNet's inputs have tensors of their own in the negative half."""
        found: list[str] = []
        for kind, first in self._kinds.items():
            if kind.halves:
                found += kind.reads(self.configs, Shape(8, 8, 1), first.component)
        return found

    def _in_turn(self, task: str) -> list[tuple[Control, tuple[str, ...]]]:
        """Return a task's controls, each with the modes of those before it: at most one of a kind runs."""
        of_task = self.of(task)
        return [(c, tuple(o.mode for o in of_task[:i] if o.kind is c.kind)) for i, c in enumerate(of_task)]

    def _reading(self, unet: GraphSpec) -> GraphSpec:
        def inputs(configs: Configs, shape: Shape) -> Inputs:
            return {**unet.inputs(configs, shape), **self.reads(configs, shape)}

        return replace(unet, inputs=inputs, reads=tuple(kind.feature for kind in self._kinds))
