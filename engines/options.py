"""What a backend lets be chosen when it compiles: `OPTIONS` in its module, `-O NAME=VALUE` and `build(options=…)`."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turbochain.runtime import backends
from turbochain.runtime.errors import InputError

Value = bool | int | str
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
        """What a value may be, as a phrase."""
        if isinstance(self.default, bool):
            return "true or false"
        return ", ".join(self.choices) if self.choices else f"{self.least} to {self.most}"

    def read(self, value: object) -> Value:
        """A value of the option's type, also from its text; ValueError where it is none."""
        text = str(value).lower()
        if isinstance(self.default, bool):
            return _FLAGS[text] if text in _FLAGS else _none(value)
        if self.choices:
            return text if text in self.choices else _none(value)
        number = _none(value) if isinstance(value, bool | float) else int(text)
        return number if self.least <= number <= self.most else _none(value)


def _none(value: object) -> Any:
    raise ValueError(value)


def of(backend: str) -> dict[str, Option]:
    """The options of a backend by name."""
    found: dict[str, Option] = importlib.import_module(f"turbochain.engines.backends.{backend}").OPTIONS
    return found


def resolve(backend: str, given: Mapping[str, object]) -> dict[str, Value]:
    """Every option of the backend, as given or by default; InputError lists every name and value that is none."""
    known = of(backend)
    chosen: dict[str, Value] = {name: option.default for name, option in known.items()}
    problems = []
    for name, value in given.items():
        if name not in known:
            have = f"its options are {', '.join(known)}" if known else "it has none"
            problems.append(f"{backend} has no option {name!r}: {have}")
            continue
        try:
            chosen[name] = known[name].read(value)
        except ValueError:
            problems.append(f"option {name}={value}: {known[name].expected} was expected")
    if problems:
        raise InputError("; ".join(problems))
    return chosen


def settled(backend: str, chosen: Mapping[str, Value]) -> dict[str, Value]:
    """`chosen`, and for each option that this machine decides what it decides: `settle(chosen)` in the module."""
    settle = getattr(importlib.import_module(f"turbochain.engines.backends.{backend}"), "settle", dict)
    decided: dict[str, Value] = settle(chosen)
    return decided


def reads_graphs(backend: str) -> bool:
    """Whether its engines read the bundle's graphs: `READS_GRAPHS` in the module."""
    return bool(importlib.import_module(f"turbochain.engines.backends.{backend}").READS_GRAPHS)


def candidates(backend: str, settled: Mapping[str, Value]) -> list[dict[str, Value]]:
    """What an engine may be, best first, where verification decides: `candidates(settled)` in the module."""
    module = importlib.import_module(f"turbochain.engines.backends.{backend}")
    found: list[dict[str, Value]] = module.candidates(settled) if hasattr(module, "candidates") else [{}]
    return found


def changed(backend: str, chosen: Mapping[str, Value]) -> dict[str, Value]:
    """Those that are not the backend's defaults."""
    return {name: value for name, value in chosen.items() if value != of(backend)[name].default}


def parse(assignments: list[str]) -> dict[str, str]:
    """`NAME=VALUE` texts as a mapping; InputError for one that is none."""
    pairs = [a.partition("=") for a in assignments]
    if wrong := [a for a, (name, equals, _) in zip(assignments, pairs, strict=True) if not name or not equals]:
        raise InputError(f"-O {wrong[0]}: NAME=VALUE was expected, such as builder_optimization_level=5")
    return {name: value for name, _, value in pairs}


def described() -> str:
    """Every backend's options, for `--help`."""
    lines: list[str] = []
    for backend in backends.names():
        found = of(backend)
        lines += [f"options of {backend} (-O NAME=VALUE):"] if found else []
        for name, option in found.items():
            lines.append(f"  {name}: {option.help} ({option.expected}; default {str(option.default).lower()})")
    return "\n".join(lines)
