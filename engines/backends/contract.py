"""The types of a builder: `Builder` says how a backend compiles, `Option` what can be chosen when it does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbochain.runtime.backends.contract import Device
from turbochain.runtime.bundle.opened import Bundle

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is; an exception that it raises ends the work."""
Value = bool | int | str
Options = Mapping[str, Any]

_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Option:
    """One option. Its type is its default's: a flag, a whole number from `least` to `most`, or one of `choices`."""

    default: Value
    help: str
    least: int = 0
    most: int = 0
    choices: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """Return what a value may be, as a phrase."""
        if isinstance(self.default, bool):
            return "true or false"
        return ", ".join(self.choices) if self.choices else f"{self.least} to {self.most}"

    def read(self, value: object) -> Value:
        """Return a value, or the value that a text says, in the option's type; ValueError if it is not allowed."""
        text = str(value).lower()
        if isinstance(self.default, bool):
            return _FLAGS[text] if text in _FLAGS else _refuse(value)
        if self.choices:
            return text if text in self.choices else _refuse(value)
        number = _refuse(value) if isinstance(value, bool | float) else int(text)
        return number if self.least <= number <= self.most else _refuse(value)


def _refuse(value: object) -> Any:
    raise ValueError(value)


@dataclass(frozen=True)
class Compilation:
    """One graph to compile."""

    bundle: Bundle
    graph: str  # its name; its files have been hashed
    folder: Path  # where its files go
    options: Options  # of the key, and those of the candidate that is tried first
    device: Device
    cache: Path  # folder for what makes later builds quicker
    progress: Progress

    @property
    def path(self) -> Path:
        """Return the graph's file, beside which its data lies."""
        return self.bundle.plain(self.graph) / self.bundle.manifest.graphs[self.graph].file


def write_nothing(compilation: Compilation) -> list[str]:
    """Compile nothing: for a backend that compiles graphs in memory when it loads them."""
    return []


def unchanged(options: Options) -> dict[str, Any]:
    """Return the options as they are: for a backend whose options the machine does not decide."""
    return dict(options)


def none_implied(precision: str) -> dict[str, Any]:
    """Return no option, for a backend that computes in what the graphs are in."""
    return {}


def only_one(options: Options) -> list[dict[str, Any]]:
    """Return one candidate: for a backend whose options the verification does not decide."""
    return [{}]


@dataclass(frozen=True)
class Builder:
    """How a backend compiles: the constant `BUILDER` of its module. Nothing imports the library before it is called."""

    name: str  # of the backend, as in turbochain.runtime.backends
    reads_graphs: bool  # whether its engines read the bundle's graphs; each is then loaded once when it is compiled
    options: Mapping[str, Option]  # by name: part of an engine's key
    compile: Callable[[Compilation], list[str]] = write_nothing
    # Write what an engine needs for a graph and return the files' names. They must be the same for every candidate.
    settle: Callable[[Options], dict[str, Any]] = unchanged
    # Return the options with those that this machine decides; InputError if it lacks what they ask for.
    candidates: Callable[[Options], list[dict[str, Any]]] = only_one
    # Return what the options that the verification decides may be, best first; the first that passes is taken.
    of_precision: Callable[[str], dict[str, Any]] = none_implied
    # Return the options, unless they are given, of a build that is ordered in this precision.
    int8_of: tuple[str, ...] = ()  # the precisions of the graphs that it computes in int8, on a CPU
    left: str = ""  # pattern of the files that loading leaves beside an engine's own: they may stay, and may be missing
