"""A safetensors file here that holds one part: a UNet, a VAE or a LoRA."""

from dataclasses import dataclass
from pathlib import Path

from turbochain.export.sources import ON_DISK, Fetched, Kind, Source, Want
from turbochain.export.sources.checkpoint import refuse_pickle


@dataclass(frozen=True)
class PartFile:
    """A file; a bundle tells its name and not its path, so it may be given away."""

    path: Path

    @property
    def name(self) -> str:
        """Return the file's own name."""
        return self.path.name

    @property
    def local(self) -> Path:
        """Return the file."""
        return self.path

    @property
    def tiny_vae(self) -> None:
        """Return None: the family's serves."""

    def fetch(self, want: Want) -> Fetched:
        """Return the file as it is: nothing has to be brought."""
        return Fetched(self.path.parent, file=self.path)


def _find(name: str) -> Source | None:
    path = Path(name).resolve()
    if not path.is_file():
        return None
    refuse_pickle(name)
    return PartFile(path)


KIND = Kind("a safetensors file here", ON_DISK, _find, parts=True, wholes=False)
