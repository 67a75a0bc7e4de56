"""One safetensors file of a hub repository, owner/name/file, that holds one part: a UNet, a VAE or a LoRA."""

import re
from dataclasses import dataclass

from turbochain.export.sources import ELSEWHERE, Fetched, Source, SourceKind, Want
from turbochain.export.sources.kinds.hub import Hub
from turbochain.export.sources.weight_files import PICKLES
from turbochain.runtime.errors import InputError

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; the repository's commit says all."""

    repository: str  # owner/name
    file: str  # its path in the repository

    @property
    def name(self) -> str:
        """Return repository and file."""
        return f"{self.repository}/{self.file}"

    @property
    def local(self) -> None:
        """Return None: the files of a revision are asked for by its name."""

    @property
    def tiny_vae(self) -> None:
        """Return None: the family's serves."""

    def fetch(self, want: Want) -> Fetched:
        """Download the file and the repository's licence, or find them in the hub's cache; convert it as a file here.

        Progress is in bytes. Raises InputError as `Hub.fetch_file`.
        """
        return Hub(self.repository).fetch_file(want, self.file)


def _find(name: str) -> Source | None:
    found = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)/((?:[\w.-]+/)*[\w.-]+(\.\w+))", name)
    if not found or found[3] not in (SUFFIX, *PICKLES):
        return None
    if found[3] in PICKLES:
        raise InputError(
            f"{name} is a pickle, and a .safetensors file was expected because loading a pickle runs code: take the "
            f"LoRA or the UNet that {found[1]} has as one (for DMD2: --recipe dmd2-4step)"
        )
    return HubFile(found[1], found[2])


KIND = SourceKind("a file of the hub (owner/name/….safetensors)", ELSEWHERE, _find, parts=True, wholes=False)
