"""`synthetic:NAME`: a checkpoint of the true architecture with random weights, drawn when it is fetched."""

from dataclasses import dataclass
from pathlib import Path

from turbochain.export.sources import BY_SPELLING, Fetched, Source, SourceKind, Want, written_once
from turbochain.export.sources.presets import preset

PREFIX = "synthetic:"


@dataclass(frozen=True)
class Synthetic:
    """One of the presets; its name says all."""

    preset: str

    @property
    def name(self) -> str:
        """Return `synthetic:` and the preset."""
        return PREFIX + self.preset

    @property
    def local(self) -> None:
        """Return None: the same name gives the same weights."""

    @property
    def tiny_vae(self) -> Source:
        """Return one that is drawn too: the family's is on the hub."""
        return TinyVae(self.preset)

    def fetch(self, want: Want) -> Fetched:
        """Draw the checkpoint into `want.root`, unless it is there."""
        from turbochain.export.sources import synthetic

        def draw(folder: Path) -> None:
            synthetic.write_checkpoint(self.preset, folder, progress=want.progress, before_weights=want.before_weights)

        return Fetched(written_once(want.root / self.preset, draw))


@dataclass(frozen=True)
class TinyVae:
    """An AutoencoderTiny with random weights, for the latents of a preset."""

    preset: str

    @property
    def name(self) -> str:
        """Return the preset's name and "tiny"."""
        return f"{PREFIX}{self.preset}/tiny"

    @property
    def local(self) -> None:
        """Return None: the same name gives the same weights."""

    @property
    def tiny_vae(self) -> None:
        """Return None: it is one itself."""

    def fetch(self, want: Want) -> Fetched:
        """Draw the VAE into `want.root`, unless it is there."""
        from turbochain.export.sources import synthetic

        return Fetched(
            written_once(
                want.root / f"{self.preset}-tiny-vae", lambda folder: synthetic.write_tiny_vae(self.preset, folder)
            )
        )


def _find(name: str) -> Source | None:
    if not name.startswith(PREFIX):
        return None
    preset(name.removeprefix(PREFIX))
    return Synthetic(name.removeprefix(PREFIX))


KIND = SourceKind(f"{PREFIX}NAME", BY_SPELLING, _find, parts=False)
