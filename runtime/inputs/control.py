"""The arguments of a call that steer the UNet with a picture: a ControlNet's or a T2I-Adapter's, named as in diffusers.

A network has the name that the bundle was built with, and is a mode of the chains that can use it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from turbochain.runtime.bundle.manifest import IMAGE_TO_IMAGE, TEXT_TO_IMAGE
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain import wiring
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs import pictures
from turbochain.runtime.inputs.numbers import LARGEST, is_number


class ControlOptions(TypedDict, total=False):
    """What a call takes beside the others if the bundle has a ControlNet or a T2I-Adapter; None: not given."""

    control_image: object
    """A picture, or one for each prompt (see `inputs.pictures`), resized to what is drawn. In a text-to-image call
    `image` may be given instead, as diffusers' text-to-image pipelines call it."""
    controlnet: str | None
    """The name of the ControlNet (None: the only one)."""
    controlnet_conditioning_scale: float | None
    """What its residuals are multiplied by (None: diffusers' default, 1.0, with an image to start from 0.8)."""
    control_guidance_start: float | None
    control_guidance_end: float | None
    """The shares of the steps from which and up to which it is used (None: 0.0 and 1.0)."""
    t2i_adapter: str | None
    """The name of the T2I-Adapter (None: the only one)."""
    adapter_conditioning_scale: float | None
    """What its features are multiplied by (None: 1.0)."""
    adapter_conditioning_factor: float | None
    """The share of the steps in which it is used; of SDXL alone (None: 1.0)."""
    guess_mode: bool
    """Refused unless it is False."""


@dataclass(frozen=True)
class NetKind:
    """What the arguments of one kind are called."""

    title: str
    argument: str  # that names one
    prefix: str  # what its modes begin with
    scale: str
    others: tuple[str, ...]


CONTROLNET = NetKind(
    "ControlNet",
    "controlnet",
    "control-",
    "controlnet_conditioning_scale",
    ("control_guidance_start", "control_guidance_end"),
)
T2I_ADAPTER = NetKind(
    "T2I-Adapter", "t2i_adapter", "t2i-", "adapter_conditioning_scale", ("adapter_conditioning_factor",)
)
_ROLES: Mapping[str, NetKind] = {"controlnet_embedding": CONTROLNET, "t2i_adapter": T2I_ADAPTER}
"""The role of the graph that reads the control image → what it belongs to."""

NUMBERS: Mapping[str, NetKind] = {"conditioning_scale": CONTROLNET, "adapter_conditioning_scale": T2I_ADAPTER}
"""The feeds of every step that say how strongly it is used."""

IMAGES = {"control_image": "RGB", "grey_control_image": "L"}
"""The feeds of control images → PIL's name for what they hold."""


@dataclass(frozen=True)
class Net:
    """A ControlNet or T2I-Adapter of a chain."""

    kind: NetKind
    mode: str
    image: str  # the feed of its picture

    @property
    def name(self) -> str:
        """Return the name that calls have for it."""
        return self.mode.removeprefix(self.kind.prefix)


def nets(chain: OpenChain) -> list[Net]:
    """Return the ControlNets and T2I-Adapters of a chain."""
    found = []
    for stage in chain.chain.stages:
        kind = _ROLES.get(chain.graphs[stage.graph].role)
        if kind is not None:
            (image,) = wiring.inputs(stage, chain.graphs)
            found.append(Net(kind, stage.if_[0], image.name))
    return found


@dataclass(frozen=True)
class Steering:
    """What a call asks for; `net` None: nothing."""

    net: Net | None = None
    image: object = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    factor: float | None = None

    @property
    def modes(self) -> frozenset[str]:
        """Return the modes that it switches on."""
        return frozenset() if self.net is None else frozenset([self.net.mode])

    def feeds(self, chain: OpenChain, table: str, prompts: int, repeats: int) -> dict[str, np.ndarray]:
        """Return what the chain is fed: the pictures, and a scale for each row of the table. Raises InputError.

        `prompts`, `repeats`: the pictures of the call are their product.
        """
        if self.net is None:
            return {}
        images = pictures.pixels("control_image", self.image, chain.size, IMAGES[self.net.image])
        if len(images) not in (1, prompts):
            raise InputError(
                f"control_image holds {len(images)} pictures, and the call has {prompts} prompts: give one picture, or "
                "one for each prompt"
            )
        if len(images) > 1 and self.net.kind is CONTROLNET:
            images = np.repeat(images, repeats, axis=0)  # diffusers repeats a T2I-Adapter's features as a whole
        entry = chain.chain.tables[table]
        scales = [self.scale * keep for keep in self._kept(entry.rows, entry.steps)]
        number = next(name for name, kind in NUMBERS.items() if kind is self.net.kind)
        return {self.net.image: images, number: np.array(scales, np.float32)[:, None]}

    def _kept(self, rows: int, steps: int) -> list[float]:
        """Return for each row 1.0 if the net is used in it, else 0.0: diffusers' own comparisons of floats."""
        if self.net is not None and self.net.kind is T2I_ADAPTER:
            last = rows if self.factor is None else int(steps * self.factor)
            return [float(i < last) for i in range(rows)]
        return [1.0 - float(i / rows < self.start or (i + 1) / rows > self.end) for i in range(rows)]


def is_control_image(bundle: Bundle, image: object, mask_image: object, others: Mapping[str, object]) -> bool:
    """Return whether `image` of a call without a chain is a control image: as in diffusers' text-to-image pipelines.

    So it is if a network is named for it, or if the bundle has no image-to-image. `others`: the further arguments.
    """
    if image is None or mask_image is not None or others.get("control_image") is not None:
        return False
    chains = [bundle.open_chain(name) for name in bundle.manifest.chains]
    if not any(nets(chain) for chain in chains):
        return False
    named = any(others.get(kind.argument) is not None for kind in (CONTROLNET, T2I_ADAPTER))
    return named or not any(chain.chain.task == IMAGE_TO_IMAGE for chain in chains)


def steering(chain: OpenChain, image: object, others: dict[str, object]) -> tuple[object, Steering]:
    """Take the arguments of `ControlOptions` out of `others`; return what is left of `image`, and what they ask for.

    Raises InputError if they do not fit the chain or one another.
    """
    given = {name: others.pop(name) for name in ControlOptions.__annotations__ if name in others}
    given = {name: value for name, value in given.items() if value is not None}
    if given.pop("guess_mode", False):
        raise InputError("guess_mode=True: a ControlNet is always used with the prompt; leave it out")
    found = nets(chain)
    if found and chain.chain.task == TEXT_TO_IMAGE and image is not None and "control_image" not in given:
        given, image = {**given, "control_image": image}, None
    if not given:
        return image, Steering()
    picture = given.pop("control_image", None)
    if not found:
        raise InputError(_no_net(chain, next(iter(given), "control_image")))
    if picture is None:
        raise InputError(f"{next(iter(given))} was given, and no control image; give control_image, or leave it out")
    net = _chosen(chain, found, given)
    for name in given:
        if name not in (net.kind.scale, *net.kind.others):
            raise InputError(f"{name} was given, and {net.name!r} is a {net.kind.title}; leave it out")
    return image, Steering(net, picture, **_numbers(chain, net.kind, given))


def find(chain: OpenChain, name: str) -> Net:
    """Return the ControlNet or T2I-Adapter with a name; InputError if the chain has none."""
    for net in nets(chain):
        if net.name == name:
            return net
    found = nets(chain)
    raise InputError(_unknown(chain, CONTROLNET, name, found) if found else _no_net(chain, f"controlnet={name!r}"))


def _chosen(chain: OpenChain, found: list[Net], given: dict[str, object]) -> Net:
    """Remove the names of networks from the arguments, and return the network that they choose."""
    named = {kind: given.pop(kind.argument) for kind in (CONTROLNET, T2I_ADAPTER) if kind.argument in given}
    if len(named) > 1:
        raise InputError("controlnet and t2i_adapter were given, and a call uses one network; give one of the two")
    for kind, name in named.items():
        if isinstance(name, list | tuple):
            raise InputError(f"{kind.argument}={name!r}: a call uses one {kind.title}; give its name")
        of_kind = [net for net in found if net.kind is kind]
        if match := [net for net in of_kind if net.name == name]:
            return match[0]
        raise InputError(_unknown(chain, kind, name, of_kind))
    if len(found) > 1:
        told = ", ".join(f"{net.kind.argument}={net.name!r}" for net in found)
        raise InputError(f"a control image was given, and the bundle has several networks for one; choose {told}")
    return found[0]


def _numbers(chain: OpenChain, kind: NetKind, given: Mapping[str, object]) -> dict[str, float]:
    """Return the fields of `Steering` that are numbers, as diffusers checks them."""
    for name, value in given.items():
        if isinstance(value, list | tuple):
            raise InputError(f"{name}={value!r}: a call uses one {kind.title}; give one number")
        if not is_number(value) or not abs(value) <= LARGEST:
            raise InputError(f"{name}={value!r}: a finite number was expected")
    numbers = {name: float(value) for name, value in given.items() if is_number(value)}
    scale = numbers.get(kind.scale, chain.chain.defaults.get(kind.scale, 1.0))
    if kind is T2I_ADAPTER:
        (argument,) = kind.others
        if argument in numbers and argument not in chain.chain.defaults:
            raise InputError(f"{argument} was given: diffusers' pipeline of this model has none; leave it out")
        factor = numbers.get(argument, chain.chain.defaults.get(argument))
        return {"scale": scale} if factor is None else {"scale": scale, "factor": factor}
    start, end = numbers.get("control_guidance_start", 0.0), numbers.get("control_guidance_end", 1.0)
    if not 0 <= start < end <= 1:
        raise InputError(
            f"control_guidance_start={start:g}, control_guidance_end={end:g}: shares of the steps from 0 to 1 were "
            "expected, the start below the end"
        )
    return {"scale": scale, "start": start, "end": end}


def _unknown(chain: OpenChain, kind: NetKind, name: object, found: list[Net]) -> str:
    """Return that none of `found` has the name; if it is empty, that the chain has none of the kind."""
    told = f"{kind.argument}={name!r}"
    if not found:
        return _no_net(chain, told, kind)
    option = f"--{kind.argument.replace('_', '-')} {name}=ID"
    has = ", ".join(repr(net.name) for net in found)
    return f"{told}: the bundle has {has}; choose one, or build another with build-engine SOURCE {option}"


def _no_net(chain: OpenChain, argument: str, kind: NetKind | None = None) -> str:
    """Return the error for arguments of a network that the chain does not have."""
    bundle, kinds = chain.bundle, (CONTROLNET, T2I_ADAPTER) if kind is None else (kind,)
    able = [name for name in bundle.manifest.chains if any(n.kind in kinds for n in nets(bundle.open_chain(name)))]
    option = f"--{kinds[0].argument.replace('_', '-')} NAME=ID"
    mend = f"choose {' or '.join(able)}" if able else f"build another bundle with build-engine SOURCE {option}"
    return f"{argument} was given, and the chain {chain.name} has no {' or '.join(k.title for k in kinds)}; {mend}"
