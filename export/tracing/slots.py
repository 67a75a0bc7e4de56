"""Give a graph slots: what adapters add to its layers comes from two inputs, and not from the weights.

A slot adds `(x @ down) @ up` to what a linear layer or a 1×1 convolution makes of x. All `down` matrices are one input
of the graph, and all `up` matrices another. Layers that read the same tensor are a group, with one product `x @ down`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from turbochain.export.tracing.traced import Traced
from turbochain.runtime.bundle import strict_json
from turbochain.runtime.chain.slots import DOWN, UP
from turbochain.runtime.inputs.slots import Group, Member

Layer: TypeAlias = nn.Linear | nn.Conv2d

ACTIVATED = "activated_time_embedding"
"""The UNet's input that adapters of `time_emb_proj` are applied to, if the table has these layers' results."""

PROJECTED = "time_projections"
"""The input with those results, which stands before `ACTIVATED`."""


@dataclass
class _Call:
    """What the hooks of the layers share in one call."""

    downs: list[torch.Tensor] = field(default_factory=list)  # of each group
    ups: list[list[torch.Tensor]] = field(default_factory=list)  # of each group's members
    products: dict[int, torch.Tensor] = field(default_factory=dict)  # group → what its members make their parts of


class Slotted(Traced):
    """A module with slots of a rank: it reads the inputs of the module, then `lora_down` and `lora_up`, 1-D fp32.

    A group with n members takes `in·n·rank` values of `lora_down`, read as [in, n·rank], and each of its members
    `rank·out` values of `lora_up`, read as [rank, out].
    """

    def __init__(
        self,
        module: Traced,
        model: nn.Module,
        rank: int,
        inputs: Mapping[str, torch.Tensor],
        projections: Mapping[str, int],
    ) -> None:
        """Give slots to those layers of `model` that `module`, which runs it, uses.

        `inputs`: an example of each input. `projections`: weight → how many values of the input `time_projections` it
        has made, if these get slots: they read the input `ACTIVATED`, which the module itself does not.
        """
        super().__init__()
        self.module, self.rank, self.names = module, rank, tuple(inputs)
        self.folded = module.folded
        self.dtype = next(model.parameters()).dtype
        self.groups: list[Group] = []
        if projections:
            of_time = tuple(Member(name, out) for name, out in projections.items())
            self.groups.append(Group(inputs[ACTIVATED].shape[-1], of_time))
        self._call = _Call()
        found = _readers(module, _layers(model), [value for name, value in inputs.items() if name != ACTIVATED])
        for group, layers in enumerate(found, len(self.groups)):
            for place, layer in enumerate(layers.values()):
                layer.register_forward_hook(self._hook(group, place, isinstance(layer, nn.Linear)))
            members = tuple(Member(name, layer.weight.shape[0]) for name, layer in layers.items())
            self.groups.append(Group(next(iter(layers.values())).weight.shape[1], members))

    @property
    def sizes(self) -> dict[str, int]:
        """Return how many values `lora_down` and `lora_up` have."""
        down = sum(group.in_ * len(group.members) for group in self.groups)
        return {DOWN: self.rank * down, UP: self.rank * sum(m.out for group in self.groups for m in group.members)}

    def text(self) -> str:
        """Return the slots' file: JSON with a line for each group."""
        return "[\n" + ",\n".join(json.dumps(strict_json.plain(group)) for group in self.groups) + "\n]\n"

    def forward(self, *inputs: torch.Tensor) -> Any:
        """See the class."""
        *own, down, up = inputs
        call, cut = self._call, _cut(down.to(self.dtype))
        call.downs = [cut(group.in_, self.rank * len(group.members)) for group in self.groups]
        cut = _cut(up.to(self.dtype))
        call.ups = [[cut(self.rank, member.out) for member in group.members] for group in self.groups]
        call.products = {}
        if ACTIVATED in self.names:
            product, place = own.pop(self.names.index(ACTIVATED)) @ call.downs[0].float(), self.names.index(PROJECTED)
            parts = [product[:, i * self.rank : (i + 1) * self.rank] @ up.float() for i, up in enumerate(call.ups[0])]
            own[place] = own[place] + torch.cat(parts, dim=-1)
        return self.module(*own)

    def _hook(self, group: int, place: int, linear: bool) -> Callable[..., torch.Tensor]:
        """Return the hook that adds a slot's part to its layer's result."""
        call, columns = self._call, slice(place * self.rank, (place + 1) * self.rank)

        def to_linear(_: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> torch.Tensor:
            if group not in call.products:
                call.products[group] = given[0] @ call.downs[group]
            return made + (call.products[group][..., columns] @ call.ups[group][place]).to(made.dtype)

        def to_convolution(_: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> torch.Tensor:
            if group not in call.products:
                vectors = given[0].reshape(*given[0].shape[:2], -1)
                call.products[group] = call.downs[group].transpose(0, 1) @ vectors
            up = call.ups[group][place].transpose(0, 1)
            return made + (up @ call.products[group][:, columns]).reshape(made.shape)

        return to_linear if linear else to_convolution


def _cut(values: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    """Return a function that takes matrices from the beginning of a tensor, one after the other.

    Slices: a Split into that many parts has its sizes in a file of their own, where ONNX Runtime does not look for
    them, and on a GPU it copies them in every run.
    """
    start = 0

    def cut(rows: int, columns: int) -> torch.Tensor:
        nonlocal start
        start += rows * columns
        return values[start - rows * columns : start].reshape(rows, columns)

    return cut


def _layers(model: nn.Module) -> dict[str, Layer]:
    """Return the layers that can have a slot, by the names of their weights."""
    found = {f"{name}.weight": module for name, module in model.named_modules()}
    return {name: module for name, module in found.items() if _multiplies(module)}


def _multiplies(module: nn.Module) -> TypeGuard[Layer]:
    """Return whether a layer is a product with one matrix, of every vector of its input."""
    if not isinstance(module, nn.Conv2d):
        return isinstance(module, nn.Linear)
    plain = (module.kernel_size, module.stride, module.padding, module.groups)
    return plain == ((1, 1), (1, 1), (0, 0), 1)


def _readers(module: nn.Module, layers: Mapping[str, Layer], inputs: Iterable[torch.Tensor]) -> list[dict[str, Layer]]:
    """Return the layers that the results of `module` depend on, in groups that read the same tensor, all in the order
    in which they do.

    A text encoder runs all of its layers, and its graph may be without the last ones.
    """
    groups: list[tuple[torch.Tensor, list[str]]] = []
    added: dict[str, torch.Tensor] = {}  # layer → a number that is added to what it makes

    def see(name: str, _: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> torch.Tensor:
        group = next((members for read, members in groups if read is given[0]), None)
        if group is None:
            groups.append((given[0], group := []))
        assert name not in added, f"{name} is run twice"
        group.append(name)
        added[name] = made.new_zeros((), requires_grad=True)
        return made + added[name]

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(see, name)).remove)
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # what computes nothing
        stack.enter_context(torch.enable_grad())
        results = module(*(fake.from_tensor(example) for example in inputs))
        total = torch.stack([r.sum() for r in (results if isinstance(results, tuple) else (results,))]).sum()
        gradients = torch.autograd.grad(total, list(added.values()), allow_unused=True)
    used = {name for name, gradient in zip(added, gradients, strict=True) if gradient is not None}
    found = [{name: layers[name] for name in members if name in used} for _, members in groups]
    return [members for members in found if members]
