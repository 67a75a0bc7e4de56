"""Another VAE in the place of the checkpoint's own: `--vae`."""

from pathlib import Path

from turbochain.export.sources import hub
from turbochain.export.sources.checkpoint import Checkpoint, is_hub_id, read_json
from turbochain.runtime.errors import InputError

TINY = "tiny"
CLASSES = ("AutoencoderTiny", "AutoencoderKL")
SCALE = 0.18215  # AutoencoderKL's scaling_factor where its config.json names none


def find(checkpoint: Path, name: str | None) -> Path | None:
    """The folder of the VAE `name`: "tiny" (the family's tiny decoder), a hub id or a local folder; None: its own.

    Raises InputError where there is none such, or where the tiny one decodes other latents than this model's.
    """
    if name is None:
        return None
    if name == TINY:
        family = Checkpoint(checkpoint, None).family
        found = read_json(checkpoint / "vae/config.json").get("scaling_factor", SCALE)
        if found != family.latents_scale:
            raise InputError(
                f"--vae tiny: {family.tiny_vae} decodes latents whose scaling_factor is {family.latents_scale}, and "
                f"the VAE of {checkpoint} has {found}: they mean something else; give --vae the folder of one for it"
            )
        name = family.tiny_vae
    if Path(name).is_dir():
        folder = Path(name).resolve()
    elif is_hub_id(name):
        folder = hub.fetch_model(name)
    else:
        raise InputError(f"--vae {name} is neither {TINY}, nor a folder here, nor a hub id (owner/name)")
    kind = read_json(folder / "config.json").get("_class_name")
    if kind not in CLASSES:
        raise InputError(f"--vae {name}: its config.json is of {kind}, and {' or '.join(CLASSES)} was expected")
    return folder
