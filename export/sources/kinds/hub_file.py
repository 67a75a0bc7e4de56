"""One safetensors file of a hub repository, owner/name/file, that holds one part: a UNet, a VAE or a LoRA."""

import re
from dataclasses import dataclass

from turbochain.export.sources import ELSEWHERE, Fetched, Kind, Source, Want
from turbochain.export.sources.checkpoint import PICKLES, refuse_pickle
from turbochain.export.sources.kinds.hub import Hub


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
        """Download the file, the config.json beside it and the repository's licence, or find them in the hub's cache.

        Progress is in bytes. Raises InputError as `Hub.fetch_file`.
        """
        return Hub(self.repository).fetch_file(want, self.file)


def _find(name: str) -> Source | None:
    endings = "|".join(map(re.escape, (".safetensors", *PICKLES)))
    found = re.fullmatch(rf"([\w-][\w.-]*/[\w.-]+)/((?:[\w.-]+/)*[\w.-]+(?:{endings}))", name)
    if not found:
        return None
    refuse_pickle(name)
    return HubFile(*found.groups())


KIND = Kind("a file of the hub (owner/name/….safetensors)", ELSEWHERE, _find, parts=True, wholes=False)
