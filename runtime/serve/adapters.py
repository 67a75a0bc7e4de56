"""The LoRA files that requests may name, and those that a pipeline has loaded."""

import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from turbochain.runtime.errors import InputError
from turbochain.runtime.pipeline import Pipeline

log = logging.getLogger("turbochain")

SUFFIX = ".safetensors"
LOADED_BYTES = 2**30
"""What the files of a pipeline's adapters may weigh together; those of one picture may weigh more."""

Chosen = tuple[tuple[str, float], ...]
"""The names and scales of a picture's adapters, in the order of the names; equal ones draw alike."""


@dataclass(frozen=True)
class AdapterFolder:
    """The adapters of a folder, by the names of their files; the folder is read once."""

    by_name: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | None) -> "AdapterFolder":
        """Return the safetensors files of a folder, none for None. Raises InputError if it is none, or a link leads out
        of it."""
        if folder is None:
            return cls()
        root = Path(folder).resolve()
        if not root.is_dir():
            raise InputError(f"--lora-dir {folder} is no folder: one with LoRA files (*{SUFFIX}) was expected")
        found = {}
        for path in sorted(root.glob(f"*{SUFFIX}")):
            if not path.resolve().is_relative_to(root):
                raise InputError(
                    f"--lora-dir {folder}: {path.name} is a link that leads out of the folder, and a file was "
                    "expected; copy the file there"
                )
            if path.is_file():
                found[path.name.removesuffix(SUFFIX)] = path.resolve()
        return cls(found)

    def chosen(self, loras: Iterable[tuple[str, float]]) -> Chosen:
        """Return a request's names and scales; scales under one name are added, and an adapter with scale 0 is left
        out.

        Raises InputError for a name that there is not, and a scale that is no number.
        """
        scales: dict[str, float] = {}
        for name, scale in loras:
            if name not in self.by_name:
                there = f"choose from {', '.join(self.by_name)}" if self.by_name else "none was given with --lora-dir"
                raise InputError(f"loras: there is no LoRA {name!r}: {there}")
            scales[name] = scales.get(name, 0.0) + scale
            if not math.isfinite(scales[name]):
                raise InputError(f"loras: the scale of {name} is {scales[name]}: a number was expected, such as 0.8")
        return tuple((name, scale) for name, scale in sorted(scales.items()) if scale)


class PipelineAdapters:
    """The adapters that one pipeline has loaded: none before a request names one, then those used last.

    Without any a pipeline that has loaded some draws through the same slots, with zeros: requests with and without may
    alternate.
    """

    def __init__(self, adapters: AdapterFolder, pipe: Pipeline) -> None:
        """Take the files, and a pipeline that nobody else gives adapters."""
        self._adapters, self._pipe = adapters, pipe
        self._bytes: OrderedDict[str, int] = OrderedDict()  # of each loaded one's file; the one used last is the last
        self._active: Chosen | None = ()  # None if a change has failed half-way

    def use(self, chosen: Chosen) -> None:
        """Let the pipeline draw with these adapters and no others. Raises InputError if it cannot."""
        if chosen == self._active:
            return
        self._active = None
        for name, _ in chosen:
            if name not in self._bytes:
                log.info("loading the LoRA %s", name)
                path = self._adapters.by_name[name]
                try:
                    self._pipe.load_lora_weights(path, adapter_name=name)
                except InputError as error:  # a client need not learn where the server's files lie
                    raise InputError(str(error).replace(str(path), f"{name}{SUFFIX}")) from error
                self._bytes[name] = path.stat().st_size
            self._bytes.move_to_end(name)
        while len(self._bytes) > len(chosen) and sum(self._bytes.values()) > LOADED_BYTES:
            name, _ = self._bytes.popitem(last=False)
            self._pipe.delete_adapters([name])
        self._pipe.set_adapters([name for name, _ in chosen], [scale for _, scale in chosen])
        self._active = chosen
