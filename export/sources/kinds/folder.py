"""A local folder in diffusers' format."""

from dataclasses import dataclass
from pathlib import Path

from turbochain.export.sources import ON_DISK, Fetched, Source, SourceKind, Want


@dataclass(frozen=True)
class Folder:
    """A folder; a bundle tells its name and not its path, so it may be given away."""

    path: Path

    @property
    def name(self) -> str:
        """Return the folder's own name."""
        return self.path.name

    @property
    def local(self) -> Path:
        """Return the folder."""
        return self.path

    @property
    def tiny_vae(self) -> None:
        """Return None: the family's serves."""

    def fetch(self, want: Want) -> Fetched:
        """Return the folder as it is: nothing has to be brought."""
        return Fetched(self.path, variant=want.variant)


def _find(name: str) -> Source | None:
    return Folder(Path(name).resolve()) if name and Path(name).is_dir() else None


KIND = SourceKind("a folder here", ON_DISK, _find, parts=True, variants=True)
