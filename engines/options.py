"""The options of the backends as text and values: `-O NAME=VALUE` and `build(options=…)`."""

from collections.abc import Mapping

from turbochain.engines import backends
from turbochain.engines.backends.contract import Option, Value
from turbochain.runtime.errors import InputError


def of(backend: str) -> Mapping[str, Option]:
    """Return the options of a backend by name."""
    return backends.get(backend).options


def resolve(backend: str, given: Mapping[str, object]) -> dict[str, Value]:
    """Return every option of the backend, as given or by default; InputError lists every name and value that is
    wrong."""
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


def changed(backend: str, chosen: Mapping[str, Value]) -> dict[str, Value]:
    """Return the options that are not the backend's defaults."""
    return {name: value for name, value in chosen.items() if value != of(backend)[name].default}


def parse(assignments: list[str]) -> dict[str, str]:
    """Return `NAME=VALUE` texts as a mapping; InputError if one has another form."""
    pairs = [a.partition("=") for a in assignments]
    if wrong := [a for a, (name, equals, _) in zip(assignments, pairs, strict=True) if not name or not equals]:
        raise InputError(f"-O {wrong[0]}: NAME=VALUE was expected, such as builder_optimization_level=5")
    return {name: value for name, _, value in pairs}


def described() -> str:
    """Return every backend's options as text, for `--help`."""
    lines: list[str] = []
    for name, builder in backends.known().items():
        lines += [f"options of {name} (-O NAME=VALUE):"] if builder.options else []
        for option, of_it in builder.options.items():
            lines.append(f"  {option}: {of_it.help} ({of_it.expected}; default {str(of_it.default).lower()})")
    return "\n".join(lines)
