"""Give a graph slots: what adapters add to its layers comes as two inputs, and not with the weights.

A slot adds `(x @ down) @ up` to what a linear layer or a 1×1 convolution makes of x. All `down` matrices are one input
of the graph, and all `up` matrices another. Layers that read the same tensor are a group, with one product `x @ down`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from turbochain.export.tracing.modules import SDUNet

Layer = nn.Linear | nn.Conv2d

ACTIVATED = "activated_time_embedding"
"""The input of a UNet's graph that adapters of its `time_emb_proj` are applied to, if the table has their results."""

DOWN, UP = "lora_down", "lora_up"
"""The inputs with the matrices of all slots."""


@dataclass(frozen=True)
class Member:
    """A layer with a slot."""

    parameter: str  # its weight, in the component
    out: int


@dataclass(frozen=True)
class Group:
    """The layers that read one tensor, in the order in which they do."""

    width: int  # of what they read
    members: list[Member]

    def plain(self) -> dict[str, Any]:
        """Return the group as the slots' file has it."""
        return {"in": self.width, "members": [asdict(member) for member in self.members]}


@dataclass
class _Call:
    """What the hooks of the layers share in one call."""

    downs: list[torch.Tensor] = field(default_factory=list)  # of each group
    ups: list[list[torch.Tensor]] = field(default_factory=list)  # of each group's members
    products: dict[int, torch.Tensor] = field(default_factory=dict)  # group → what its members make their parts of


class Slotted(nn.Module):
    """A module with slots of a rank: it reads the inputs of the module, then `lora_down` and `lora_up`, 1-D fp32.

    A group with n members takes `in·n·rank` values of `lora_down`, read as [in, n·rank], and each of its members
    `rank·out` values of `lora_up`, read as [rank, out].
    """

    def __init__(self, module: nn.Module, model: nn.Module, rank: int, inputs: Mapping[str, torch.Tensor]) -> None:
        """Give slots to those layers of `model` that `module`, which runs it, uses.

        `inputs`: an example of each input of the module. If `ACTIVATED` is the last one, the module is an SDUNet, does
        not read it, and has slots for the projections of the time, whose results it is given.
        """
        super().__init__()
        self.module, self.rank, self.names = module, rank, tuple(inputs)
        self.folded = getattr(module, "folded", ())
        self.dtype = next(model.parameters()).dtype
        self.groups: list[Group] = []
        if ACTIVATED in inputs:
            assert isinstance(module, SDUNet)
            of_time = [Member(name, out) for name, out in module.projections.items()]
            self.groups.append(Group(inputs[ACTIVATED].shape[-1], of_time))
        self._call = _Call()
        found = _readers(module, _layers(model), [value for name, value in inputs.items() if name != ACTIVATED])
        for group, layers in enumerate(found, len(self.groups)):
            for place, layer in enumerate(layers.values()):
                layer.register_forward_hook(self._hook(group, place, isinstance(layer, nn.Linear)))
            members = [Member(name, layer.weight.shape[0]) for name, layer in layers.items()]
            self.groups.append(Group(next(iter(layers.values())).weight.shape[1], members))

    @property
    def sizes(self) -> dict[str, int]:
        """Return how many values `lora_down` and `lora_up` have."""
        down = sum(group.width * len(group.members) for group in self.groups)
        return {DOWN: self.rank * down, UP: self.rank * sum(m.out for group in self.groups for m in group.members)}

    def text(self) -> str:
        """Return the slots' file: JSON with a line for each group."""
        return "[\n" + ",\n".join(json.dumps(group.plain()) for group in self.groups) + "\n]\n"

    def forward(self, *inputs: torch.Tensor) -> Any:
        """See the class."""
        *own, down, up = inputs
        downs = down.to(self.dtype).split([self.rank * group.width * len(group.members) for group in self.groups])
        ups = iter(up.to(self.dtype).split([self.rank * m.out for group in self.groups for m in group.members]))
        call = self._call
        call.downs = [flat.reshape(group.width, -1) for flat, group in zip(downs, self.groups, strict=True)]
        call.ups = [[next(ups).reshape(self.rank, -1) for _ in group.members] for group in self.groups]
        call.products = {}
        if self.names[-1] == ACTIVATED:
            product, place = own.pop() @ call.downs[0].float(), self.names.index("time_projections")
            parts = zip(product.split(self.rank, dim=-1), call.ups[0], strict=True)
            own[place] = own[place] + torch.cat([part @ up.float() for part, up in parts], dim=-1)
        return self.module(*own)

    def _hook(self, group: int, place: int, linear: bool) -> Callable[..., torch.Tensor]:
        """Return what adds a slot's part to the result of its layer."""
        call, columns = self._call, slice(place * self.rank, (place + 1) * self.rank)

        def to_linear(_: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> torch.Tensor:
            if group not in call.products:
                call.products[group] = given[0] @ call.downs[group]
            return made + (call.products[group][..., columns] @ call.ups[group][place]).to(made.dtype)

        def to_convolution(_: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> torch.Tensor:
            if group not in call.products:
                call.products[group] = call.downs[group].T @ given[0].flatten(2)
            return made + (call.ups[group][place].T @ call.products[group][:, columns]).reshape(made.shape)

        return to_linear if linear else to_convolution


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
    """Return the layers that `module` runs, in groups that read the same tensor, all in the order in which they do."""
    groups: list[tuple[torch.Tensor, dict[str, Layer]]] = []

    def see(name: str, layer: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        group = next((members for read, members in groups if read is given[0]), None)
        if group is None:
            groups.append((given[0], group := {}))
        group[name] = layers[name]

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(see, name)).remove)
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # what computes nothing
        module(*(fake.from_tensor(example) for example in inputs))
    return [members for _, members in groups]
