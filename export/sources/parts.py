"""Parts from elsewhere (`--vae`, `--unet`, `--lora`, `--controlnet`), and the checkpoint that they make together with
the rest."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from turbochain.export.controls.kind import Control
from turbochain.export.families import Family
from turbochain.export.sources import LORA, Source, Want, find
from turbochain.export.sources.checkpoint import Checkpoint, Part, check_configs, open_folder
from turbochain.export.sources.weight_files import read_json, settled_variant
from turbochain.runtime.errors import InputError

TINY = "tiny"
"""The name of the AutoencoderTiny that belongs to the checkpoint, as a VAE."""

CLASSES = {"vae": ("AutoencoderTiny", "AutoencoderKL"), "unet": ("UNet2DConditionModel",)}
"""Component that another part may replace → the classes that the part may have."""

SCALE = 0.18215  # AutoencoderKL's scaling_factor if its config.json names none

CheckRoom = Callable[[Family, Mapping[str, Any], Mapping[str, int], int], None]


def fetch(
    source: Source,
    want: Want,
    parts: Mapping[str, str],
    check_room: CheckRoom | None = None,
    controls: Mapping[Control, str] = MappingProxyType({}),
) -> Checkpoint:
    """Bring a checkpoint onto this disk with the `parts` (component → name) that replace its own, and check it.

    `controls`: what steers its UNet → name.
    `check_room(family, configs, counts, bytes to come)` is called before weights are downloaded or drawn, and at the
    end; it may raise. Raises InputError if anything is missing, damaged or not supported.
    """

    def before_weights(folder: Path, counts: dict[str, int], coming: int) -> None:
        replaced, steering = _replacements(source, want, folder, parts), _fetch_controls(want, controls)
        checkpoint = Checkpoint(folder, want.variant, source.name, None, replaced, controls=steering)
        check_configs(checkpoint)
        counts = counts | {c: part.parameters() for c, part in (replaced | steering).items()}
        if missing := [c for c in checkpoint.family.components if c not in counts]:
            raise InputError(f"{source.name} has no safetensors weights of {', '.join(missing)}")
        if check_room:
            check_room(checkpoint.family, checkpoint.configs, counts, coming)

    fetched = source.fetch(replace(want, skip=tuple(parts), before_weights=before_weights))
    replaced = _replacements(source, want, fetched.folder, parts)
    steering = _fetch_controls(want, controls)
    checkpoint = open_folder(fetched.folder, fetched.variant, source.name, fetched.commit, replaced, steering)
    if check_room:
        counts = {c: checkpoint.parameters(c) for c in checkpoint.components}
        check_room(checkpoint.family, checkpoint.configs, counts, 0)
    return checkpoint


def _replacements(source: Source, want: Want, folder: Path, parts: Mapping[str, str]) -> dict[str, Part]:
    """Return component → the part `parts` names for the checkpoint in `folder`, fetched."""
    found = {}
    for component, name in parts.items():
        other = _tiny(source, folder) if name == TINY else find(name, component)
        own = folder / component / "config.json"  # a part in one file has none
        config = read_json(own) if own.is_file() else None
        wanted = Want(want.root, component, variant=want.variant, part_config=config, progress=want.progress)
        fetched = other.fetch(wanted)
        kind = read_json(fetched.folder / "config.json").get("_class_name")
        if kind not in CLASSES[component]:
            expected = " or ".join(CLASSES[component])
            raise InputError(f"--{component} {name}: its config.json is of {kind}, and {expected} was expected")
        variant = settled_variant([fetched.folder], want.variant)
        found[component] = Part(fetched.folder, fetched.home or fetched.folder, other.name, fetched.commit, variant)
    return found


def _fetch_controls(want: Want, controls: Mapping[Control, str]) -> dict[str, Part]:
    """Bring ControlNets and T2I-Adapters onto this disk: control → name becomes component → part.

    Raises InputError as `fetch`, and for what is of another class.
    """
    found = {}
    for control, name in controls.items():
        source = find(name, control.kind.name.replace("_", "-"))
        fetched = source.fetch(Want(want.root, control.component, variant=want.variant, progress=want.progress))
        config = read_json(fetched.folder / "config.json")
        if (kind := config.get("_class_name")) not in control.kind.classes or "num_control_type" in config:
            several = " (one net for several kinds of picture)" if "Union" in f"{kind}" else ""
            raise InputError(
                f"{control.option}={name}: its config.json is of {kind}{several}, and {control.kind.classes[0]} was "
                f"expected: choose a {control.kind.title} for one kind of picture"
            )
        variant = settled_variant([fetched.folder], want.variant)
        found[control.component] = Part(
            fetched.folder, fetched.home or fetched.folder, source.name, fetched.commit, variant
        )
    return found


def fetch_loras(want: Want, loras: Mapping[str, str]) -> dict[str, Part]:
    """Bring LoRAs onto this disk: key (lora, lora-2, …) → name becomes key → part. Raises InputError as `fetch`."""
    found = {}
    for key, name in loras.items():
        source = find(name, LORA)
        fetched = source.fetch(Want(want.root, part=key, progress=want.progress))
        found[key] = Part(fetched.folder, fetched.home or fetched.folder, source.name, fetched.commit)
    return found


def _tiny(source: Source, folder: Path) -> Source:
    """Return the source of the tiny VAE; InputError if it decodes other latents than this model's."""
    family = Checkpoint(folder).family
    found = read_json(folder / "vae" / "config.json").get("scaling_factor", SCALE)
    if found != family.latents_scale:
        raise InputError(
            f"--vae tiny: {family.tiny_vae} decodes latents whose scaling_factor is {family.latents_scale}, and "
            f"the VAE of {folder} has {found}: the two do not fit; give --vae the folder of a tiny VAE for it"
        )
    return source.tiny_vae or find(family.tiny_vae, "vae")
