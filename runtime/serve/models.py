"""The bundles that are served, by the names that clients use."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from turbochain.runtime.bundle import hub
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.errors import InputError
from turbochain.runtime.serve.adapters import AdapterFolder
from turbochain.runtime.serve.errors import Refused
from turbochain.runtime.serve.settings import Settings


@dataclass(frozen=True)
class Model:
    """A bundle under its name."""

    name: str
    bundle: Bundle
    source: str  # what `Pipeline.load` takes: a folder, or an id on the hub

    @property
    def created(self) -> int:
        """Return when the bundle was written, in seconds since 1970."""
        return int((self.bundle.path / "bundle.json").stat().st_mtime)


@dataclass(frozen=True)
class Models:
    """All that are served, the first is the default, and the LoRA files that may be added to them."""

    by_name: Mapping[str, Model]
    adapters: AdapterFolder

    @classmethod
    def open(cls, settings: Settings) -> "Models":
        """Read and check the manifest of every bundle, and list the LoRA files.

        Raises BundleError, and InputError if two bundles have one name or the folder of the LoRA files is none.
        """
        found: dict[str, Model] = {}
        names = settings.model_names or tuple(map(name_of, settings.bundles))
        for name, source in zip(names, settings.bundles, strict=True):
            if name in found:
                raise InputError(f"two bundles are named {name}: give each its own with --model-name")
            found[name] = Model(name, Bundle.open(source, trust_engines=settings.trust_engines), source)
        return cls(found, AdapterFolder.open(settings.lora_dir))

    @property
    def first(self) -> Model:
        """Return the default."""
        return next(iter(self.by_name.values()))

    def find(self, name: str | None) -> Model:
        """Return the model that a client names. If there is only one, every name means it; raises Refused (404)."""
        if len(self.by_name) == 1 or not name:
            return self.first
        return self.exactly(name)

    def exactly(self, name: str) -> Model:
        """Return the model with this very name; raises Refused (404)."""
        if name not in self.by_name:
            raise Refused(
                404,
                f"there is no model {name!r}: choose from {', '.join(self.by_name)}",
                param="model",
                code="model_not_found",
            )
        return self.by_name[name]


def name_of(source: str) -> str:
    """Return a bundle's default name: its folder's, without `.bundle`, or its id on the hub."""
    path = Path(source)
    if not path.is_dir() and (found := hub.id_of(source)):
        return found
    return path.resolve().name.removesuffix(".bundle")
