"""`demo`: the small trained checkpoint that is part of this package."""

from pathlib import Path

from turbochain.export.sources import BY_SPELLING, Source, SourceKind
from turbochain.export.sources.kinds.folder import Folder

NAME = "demo"
FOLDER = Path(__file__).parents[2] / NAME
"""Where it lies."""


def _find(name: str) -> Source | None:
    return Folder(FOLDER) if name == NAME else None


KIND = SourceKind(NAME, BY_SPELLING, _find, parts=False)
