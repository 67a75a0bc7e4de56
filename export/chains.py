"""The chains of a bundle, one for each task, size and batch, and the graphs that they need. Torch-free."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from turbochain.export.controls import Controls
from turbochain.export.controls.kind import Control
from turbochain.export.families import Family, GraphSpec, Shape, common
from turbochain.export.tasks import Task
from turbochain.runtime.bundle.manifest import Chain, Feed, Stage, TableEntry
from turbochain.runtime.inputs.embeds import NEGATIVE
from turbochain.runtime.inputs.guidance import GUIDANCE, NEGATIVE_PROMPT


def of(tasks: Sequence[Task], shapes: Sequence[Shape]) -> list[tuple[Task, Shape]]:
    """Return the task and the shape of every chain, in the manifest's order; frames enter a stream one by one."""
    frames = list(dict.fromkeys(replace(shape, batch=1) for shape in shapes))
    return [(task, shape) for task in tasks for shape in (frames if task.streams else shapes)]


def chain_name(task: Task, shape: Shape, first: Shape) -> str:
    """Return the name of a task's chain; `first`: the bundle's first shape."""
    return task.name + _suffix(shape, first, batched=not task.streams)


def _suffix(shape: Shape, first: Shape, sized: bool = True, batched: bool = True) -> str:
    other = sized and (shape.height, shape.width) != (first.height, first.width)
    size = f"@{shape.width}x{shape.height}" if other else ""
    return size + (f"-b{shape.batch}" if batched and shape.batch != first.batch else "")


@dataclass(frozen=True)
class Placed:
    """A graph to trace."""

    spec: GraphSpec
    shape: Shape


@dataclass(frozen=True)
class Layout:
    """What decides a bundle's chains, but for their tables."""

    family: Family
    configs: Mapping[str, Any]  # component → config
    tasks: Sequence[Task]
    shapes: Sequence[Shape]  # the first is the default; all have one K
    zeros: bool = False  # whether no negative prompt means zeros, and not the encoding of ""
    clip_skip: int = 0  # how many of the text encoders' last layers a prompt is drawn without
    stream: int = 2  # frames under way in a stream, and the rows of its tables
    ranks: Sequence[int] = ()  # of the slots for adapters, ascending
    controls: Sequence[Control] = ()  # ControlNets and T2I-Adapters

    @property
    def guided(self) -> bool:
        """Return whether calls may have classifier-free guidance: not if the UNet reads the guidance scale itself."""
        return self.configs["unet"].get("time_cond_proj_dim") is None

    @property
    def posterior(self) -> bool:
        """Return whether the VAE makes a distribution of an image, from which its latents are drawn."""
        return self.configs["vae"]["_class_name"] != "AutoencoderTiny"

    @property
    def chains(self) -> list[tuple[Task, Shape]]:
        """Return the task and the shape of every chain, in the manifest's order."""
        return of(self.tasks, self.shapes)

    def name(self, task: Task, shape: Shape) -> str:
        """Return a chain's name."""
        return chain_name(task, shape, self.shapes[0])

    def tables_name(self, task: Task, shape: Shape) -> str:
        """Return the name of a chain's tables: those of the first shape, but for columns that depend on the size."""
        return task.name + _suffix(shape, self.shapes[0], sized=bool(self.family.constants), batched=False)

    def graph_name(self, role: str, shape: Shape) -> str:
        """Return a graph's name; those of the first shape have no suffix."""
        spec = self._specs(shape)[role]
        return role + _suffix(shape, self.shapes[0], sized=spec.sized, batched=not spec.of_rows)

    def graphs(self) -> dict[str, Placed]:
        """Return every graph of every chain, by its name."""
        found = {}
        for task, shape in self.chains:
            specs, of_rows = self._specs(shape), replace(shape, batch=self.stream, rows=self.stream)
            for stage in self._stages(task):
                spec = specs[stage.graph]
                found[self.graph_name(stage.graph, shape)] = Placed(spec, of_rows if spec.of_rows else shape)
        return found

    def precisions(self, precision: str, vae: str | None = None) -> dict[str, str]:
        """Return graph → precision, if the user wants `precision`, and `vae` for the VAE."""
        specs = {name: placed.spec for name, placed in self.graphs().items()}
        return {n: s.precision or (vae if vae and s.component == "vae" else precision) for n, s in specs.items()}

    def chain(self, task: Task, shape: Shape, tables: dict[str, TableEntry], defaults: Mapping[str, float]) -> Chain:
        """Return one chain."""
        stages = tuple(replace(s, graph=self.graph_name(s.graph, shape)) for s in self._stages(task))
        history = {"next_history": "history"} if shape.K > 1 else {}
        draws = (d for d in task.draws if self.posterior or d.name != "posterior_noise")
        return Chain(
            task=task.name,
            size=(shape.height, shape.width),
            batch=shape.batch,
            K=shape.K,
            stages=stages,
            feeds=self._feeds(task, shape),
            draws=(*draws, common.STEP_DRAW),
            carry={task.latents: "latents", **history},
            tables_file=f"tables/{self.tables_name(task, shape)}.safetensors",
            tables=tables,
            output="image",
            modes=() if task.streams else (*self._modes, *map(adapters_mode, self.ranks), *self._control_modes(task)),
            keep=common.kept(self.family) if task.streams else {},
            defaults={**defaults, **({"clip_skip": self.clip_skip} if self.clip_skip else {})},
            stream=self.stream if task.streams else 0,
        )

    def tokenizers(self) -> dict[str, str]:
        """Return the tokenizer folder of each feed of ids."""
        own = dict(self.family.tokenizers)
        return own | ({NEGATIVE + feed: folder for feed, folder in own.items()} if self.guided else {})

    @property
    def steered(self) -> Controls:
        """Return what steers the UNet, as a part of chains."""
        return Controls(self.family, self.configs, self.controls)

    @property
    def _modes(self) -> tuple[str, ...]:
        if not self.guided:
            return ()
        return (GUIDANCE, NEGATIVE_PROMPT) if self.zeros else (GUIDANCE,)

    def _control_modes(self, task: Task) -> list[str]:
        return [control.mode for control in self.steered.of(task.name)]

    def _specs(self, shape: Shape) -> dict[str, GraphSpec]:
        plain = common.graphs(self.family, shape.K, self.posterior, self.clip_skip, self.ranks)
        return self.steered.graphs(plain)

    def _stages(self, task: Task) -> list[Stage]:
        """Return the stages of a chain, with the names that graphs have at the first shape."""
        decoder = Stage("vae_decoder", "end", "picture", _renamed({"next_latents": task.latents}))
        unet, before = Stage("unet", "step", "prediction"), [*self.steered.before(task.name), *self._before(task)]
        prompt = own_prompt = self._with_wires(self.family.prompt_stages)
        if self.clip_skip:  # of the prompt alone: diffusers encodes a negative prompt with every layer
            skipping = (replace(stage, graph=stage.graph + common.CLIP_SKIP) for stage in self.family.prompt_stages)
            prompt = self._with_wires(skipping)
        if task.streams:
            return [*prompt, *self._before(task), *common.stream_stages(self.family), decoder]
        if not self.guided:
            steps = [*self._of_ranks(unet), Stage("step", "step", "state")]
            return [*prompt, *before, *steps, *task.after_step, decoder]
        mode = NEGATIVE_PROMPT if self.zeros else GUIDANCE
        specs = self._specs(self.shapes[0])
        negative = [replace(s, wires={**self._negated(specs[s.graph], s), **s.wires}, if_=(mode,)) for s in own_prompt]
        reads = {name: NEGATIVE + name for name in common.embeds(self.family)} | self.steered.negative_reads
        negative_unet = replace(unet, wires={**reads, "prediction": f"{NEGATIVE}prediction"}, if_=(GUIDANCE,))
        steps = [
            *self.steered.in_step(task.name, self.guided),
            *self._of_ranks(unet),
            *self._of_ranks(negative_unet),
            Stage("step", "step", "state", unless=(GUIDANCE,)),
            Stage("step+guidance", "step", "state", if_=(GUIDANCE,)),
        ]
        return [*prompt, *negative, *before, *steps, *task.after_step, decoder]

    def _with_wires(self, stages: Iterable[Stage]) -> tuple[Stage, ...]:
        """Return text encoders' stages with the names of their slots' inputs, if they have slots."""
        return tuple(replace(s, wires=common.slot_wires(s.graph)) if self.ranks else s for s in stages)

    def _of_ranks(self, unet: Stage) -> list[Stage]:
        """Return a UNet's stage, and those that run in its place if adapters are loaded: the one of the largest rank
        that is asked for."""
        modes = [adapters_mode(rank) for rank in self.ranks]
        slotted = [
            replace(
                unet,
                graph=graph,
                wires={**unet.wires, **common.slot_wires(graph)},
                if_=(*unet.if_, mode),
                unless=tuple(modes[i + 1 :]),
            )
            for i, (graph, mode) in enumerate(zip(common.slotted_unets(self.ranks), modes, strict=True))
        ]
        return [replace(unet, unless=tuple(modes)), *slotted]

    def _before(self, task: Task) -> list[Stage]:
        """Return the task's stages of the image; if need be, with an encoder of its own."""
        vae, plain = self.configs["vae"], self.family.vae_encoder == "VaeEncoder"
        normalized = not plain and all(vae.get(name) is not None for name in ("latents_mean", "latents_std"))
        if not (task.plain_latents and normalized):
            return list(task.before)
        return [replace(s, graph=common.PLAIN_ENCODER) if s.graph == "vae_encoder" else s for s in task.before]

    def _negated(self, spec: GraphSpec, stage: Stage) -> dict[str, str]:
        ends = (*spec.inputs(self.configs, self.shapes[0]), *spec.outputs)
        return {name: NEGATIVE + name for name in ends}

    def _feeds(self, task: Task, shape: Shape) -> dict[str, Feed]:
        feeds = {name: Feed("ids", "call") for name in self.family.tokenizers}
        if task.streams:
            feeds |= {name: Feed("zeros", "held") for name in common.kept(self.family).values()}
        elif self.guided:
            feeds |= {NEGATIVE + name: Feed("ids", "call", of=NEGATIVE_PROMPT) for name in self.family.tokenizers}
            zeros = common.embeds(self.family) if self.zeros else []
            feeds |= {NEGATIVE + name: Feed("zeros", "call") for name in zeros}
            feeds["guidance_scale"] = Feed("number", "call")
        return {
            **feeds,
            **{n: feed for n, feed in task.feeds.items() if self.posterior or n != "posterior_noise"},
            **({"history": Feed("history", "call")} if shape.K > 1 else {}),
            **common.step_feeds(self.family, slots=bool(self.ranks) and not task.streams),
            **{name: Feed("adapter", "held") for name in self._slots(task)},
            **({} if task.streams else self.steered.feeds(task.name, self.guided)),
        }

    def _slots(self, task: Task) -> list[str]:
        """Return the slots' inputs in a chain's graphs, by the names that it has for them."""
        slotted = (s for s in self._stages(task) if self._specs(self.shapes[0])[s.graph].rank)
        return list(dict.fromkeys(name for s in slotted for name in common.slot_wires(s.graph).values()))


def adapters_mode(rank: int) -> str:
    """Return the mode of calls with adapters whose ranks sum up to at most this one."""
    return f"adapters-{rank}"


def _renamed(wires: Mapping[str, str]) -> dict[str, str]:
    """Return the wires that change a name."""
    return {own: name for own, name in wires.items() if own != name}
