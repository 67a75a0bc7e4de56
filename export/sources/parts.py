"""Parts from elsewhere (`--vae`, `--unet`, `--lora`), and the checkpoint that they make together with the rest."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from turbochain.export.families import Family
from turbochain.export.sources import Fetched, Source, Want, find
from turbochain.export.sources.checkpoint import (
    STEMS,
    Checkpoint,
    Part,
    check_configs,
    open_folder,
    read_json,
    settled_variant,
)
from turbochain.runtime.errors import InputError

TINY = "tiny"
"""The name of the AutoencoderTiny that belongs to the checkpoint, as a VAE."""

CLASSES = {"vae": ("AutoencoderTiny", "AutoencoderKL"), "unet": ("UNet2DConditionModel",)}
"""The components that another part may replace → the classes that it may have."""

SCALE = 0.18215  # AutoencoderKL's scaling_factor if its config.json names none

CheckRoom = Callable[[Family, Mapping[str, Any], Mapping[str, int], int], None]


def fetch(source: Source, want: Want, parts: Mapping[str, str], check_room: CheckRoom | None = None) -> Checkpoint:
    """Bring a checkpoint onto this disk with the `parts` (component → name) that replace its own, and check it.

    `check_room(family, configs, counts, bytes to come)` is called before weights are downloaded or drawn, and at the
    end; it may raise. Raises InputError if anything is missing, damaged or not supported.
    """

    def before_weights(folder: Path, counts: dict[str, int], coming: int) -> None:
        replaced = _replacements(source, want, folder, parts)
        checkpoint = Checkpoint(folder, want.variant, source.name, None, replaced)
        check_configs(checkpoint)
        counts = counts | {c: part.parameters() for c, part in replaced.items()}
        if missing := [c for c in checkpoint.family.components if c not in counts]:
            raise InputError(f"{source.name} has no safetensors weights of {', '.join(missing)}")
        if check_room:
            check_room(checkpoint.family, checkpoint.configs, counts, coming)

    fetched = source.fetch(replace(want, skip=tuple(parts), before_weights=before_weights))
    replaced = _replacements(source, want, fetched.folder, parts)
    checkpoint = open_folder(fetched.folder, fetched.variant, source.name, fetched.commit, replaced)
    if check_room:
        counts = {c: checkpoint.parameters(c) for c in checkpoint.family.components}
        check_room(checkpoint.family, checkpoint.configs, counts, 0)
    return checkpoint


def _replacements(source: Source, want: Want, folder: Path, parts: Mapping[str, str]) -> dict[str, Part]:
    """Return component → the part `parts` names for the checkpoint in `folder`, fetched."""
    found = {}
    for component, name in parts.items():
        other = _tiny(source, folder) if name == TINY else find(name, component)
        wanted = Want(want.root, part=component, variant=want.variant, progress=want.progress)
        fetched = other.fetch(wanted)
        part = _part(other, fetched, want, component, folder / component)
        kind = read_json(part.folder / "config.json").get("_class_name")
        if kind not in CLASSES[component]:
            expected = " or ".join(CLASSES[component])
            raise InputError(f"--{component} {name}: its config.json is of {kind}, and {expected} was expected")
        found[component] = part
    return found


def _part(source: Source, fetched: Fetched, want: Want, component: str, own: Path) -> Part:
    """Return what was fetched as a part; a file alone becomes a folder, with the config beside it, or else `own`'s."""
    if fetched.file is None:
        variant = settled_variant([fetched.folder], want.variant)
        return Part(fetched.folder, fetched.folder, source.name, fetched.commit, variant)
    beside = fetched.file.with_name("config.json")
    config = beside if config_beside(fetched.file, component) else own / "config.json"
    folder = _linked(want, component, fetched.file, f"{STEMS[0]}.safetensors")
    if config.is_file():  # if it is not, the check of the class says so
        shutil.copyfile(config, folder / "config.json")
    return Part(folder, fetched.folder if fetched.commit else folder, source.name, fetched.commit)


def config_beside(file: Path, component: str) -> bool:
    """Return whether the config.json beside a file of weights is one of such a component."""
    path = file.with_name("config.json")
    return path.is_file() and read_json(path).get("_class_name") in CLASSES[component]


def fetch_loras(want: Want, loras: Mapping[str, str]) -> dict[str, Part]:
    """Bring LoRAs onto this disk: key (lora, lora-2, …) → name becomes key → part. Raises InputError as `fetch`."""
    found = {}
    for key, name in loras.items():
        source = find(name, "lora")
        fetched = source.fetch(Want(want.root, part="lora", progress=want.progress))
        if fetched.file is None:
            raise InputError(f"--lora {name} is a folder, and a .safetensors file was expected: name the file in it")
        folder = _linked(want, key, fetched.file, fetched.file.name)
        home = fetched.folder if fetched.commit else folder
        found[key] = Part(folder, home, source.name, fetched.commit, file=folder / fetched.file.name)
    return found


def _linked(want: Want, key: str, file: Path, name: str) -> Path:
    """Return the folder `key` of `want.root` with nothing but a link to `file`, of this name."""
    folder = want.root / "parts" / key
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / name).symlink_to(file.resolve())
    return folder.resolve()


def _tiny(source: Source, folder: Path) -> Source:
    """Return the source of the tiny VAE; InputError if it decodes other latents than this model's."""
    family = Checkpoint(folder).family
    found = read_json(folder / "vae" / "config.json").get("scaling_factor", SCALE)
    if found != family.latents_scale:
        raise InputError(
            f"--vae tiny: {family.tiny_vae} decodes latents whose scaling_factor is {family.latents_scale}, and "
            f"the VAE of {folder} has {found}: they mean something else; give --vae the folder of one for it"
        )
    return source.tiny_vae or find(family.tiny_vae, "vae")
