"""The arguments of diffusers' `__call__` that a bundle cannot follow: one that changes nothing there is accepted."""

from collections.abc import Mapping
from dataclasses import dataclass

from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import InputError


@dataclass(frozen=True)
class _Other:
    """One such argument."""

    instead: str  # why it is refused, and what to do
    harmless: tuple[object, ...] = (None,)  # the values with which diffusers draws the same picture as without it


_ROWS = _Other("the timesteps of a bundle are those of its tables; choose one with num_inference_steps")
_SIZE = "the engines are built for one size and no crop; leave it out"
_SCORE = "only a refiner reads one, and there is none here; leave it out"
_CALLBACK = _Other("a call runs no code between its steps; observe= is told of every launch, and cancel= ends it early")
_IMAGE = _Other("the bundle has no IP-Adapter; leave it out")

_OTHERS: Mapping[str, _Other] = {
    "prompt_2": _Other("all text encoders read prompt; leave it out", (None, "")),
    "timesteps": _ROWS,
    "sigmas": _ROWS,
    "denoising_end": _Other(
        "a call makes every step; output_type='latent' gives what the last one leaves", (None, 1.0)
    ),
    "denoising_start": _Other("a call begins where strength says; give strength"),
    "original_inference_steps": _ROWS,
    "padding_mask_crop": _Other("the picture is inpainted whole; crop it, call, and paste the result"),
    "masked_image_latents": _Other("the UNet reads no masked image; leave it out"),
    "aesthetic_score": _Other(_SCORE, (None, 6.0)),
    "negative_aesthetic_score": _Other(_SCORE, (None, 2.5)),
    "eta": _Other("the tables are made with another; leave it out, or build a bundle with build-engine SOURCE --eta"),
    "ip_adapter_image": _IMAGE,
    "ip_adapter_image_embeds": _IMAGE,
    "return_dict": _Other("a call returns a PipelineOutput; leave it out, and read .images of that", (True,)),
    "cross_attention_kwargs": _Other(
        "adapters are scaled between calls; leave it out, and give the scale to pipe.set_adapters(names, weights)",
        (None, {}, {"scale": 1.0}),
    ),
    "original_size": _Other(_SIZE),  # also that of the bundle
    "target_size": _Other(_SIZE),  # likewise
    "crops_coords_top_left": _Other(_SIZE, ((0, 0),)),
    "clip_skip": _Other(
        "the text encoders are built for another; leave it out, or build a bundle with build-engine SOURCE --clip-skip",
        (None,),  # also that of the bundle
    ),
    "callback_on_step_end": _CALLBACK,
    "callback": _CALLBACK,
}
_OF_CALLBACKS = ("callback_on_step_end_tensor_inputs", "callback_steps")  # no one reads them without a callback
_OF_GUIDANCE: Mapping[str, tuple[object, ...]] = {
    "negative_prompt_2": (None,),
    "negative_original_size": (None,),
    "negative_crops_coords_top_left": (None, (0, 0)),
    "negative_target_size": (None,),
    "guidance_rescale": (None, 0),
}
"""Argument → its values without effect, which with guidance at most 1 all are."""


def check_others(chain: OpenChain, given: Mapping[str, object], *, negative: bool) -> list[str]:
    """Return those of `given` that were meant to do something and, as in diffusers without guidance, do nothing.

    `negative`: whether the chain reads a negative prompt. Raises InputError for an argument of diffusers' that would
    change the picture, TypeError for a name that diffusers does not have either.
    """
    idle = []
    for name, value in given.items():
        if name in _OTHERS:
            built = {
                "original_size": chain.size,
                "target_size": chain.size,
                **{name: chain.chain.defaults.get(name, 0) for name in ("clip_skip", "eta")},
            }
            if not _is_one_of(value, (*_OTHERS[name].harmless, built.get(name))):
                raise InputError(f"{name} was given: {_OTHERS[name].instead}")
        elif name in _OF_GUIDANCE:
            if _is_one_of(value, _OF_GUIDANCE[name]):
                continue
            if negative:
                raise InputError(f"{name} was given: this chain's guidance takes only a negative prompt; leave it out")
            idle.append(name)
        elif name not in _OF_CALLBACKS:
            raise TypeError(f"a call takes no argument {name!r}")
    return idle


def _is_one_of(value: object, known: tuple[object, ...]) -> bool:
    """Compare plain values: an array or a tensor is none of them."""
    value = tuple(value) if isinstance(value, list) else value
    return isinstance(value, type(None) | int | float | str | tuple | dict) and value in known
