"""Read and write JSON as frozen dataclasses, strictly: every problem is listed at once.

A key is the field's name; a field that is named like a Python keyword has a trailing underscore (`if_` is the key
"if"). A field with a default may be missing, so that a later version can add one and still read this version's files; a
field that has its default is not written.
"""

import dataclasses
import functools
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from turbochain.runtime.bundle import lfs
from turbochain.runtime.bundle.manifest import FEATURES, FORMAT_VERSION, Manifest
from turbochain.runtime.errors import BundleError

T = TypeVar("T")


def read(kind: type[T], path: Path) -> T:
    """Read the JSON file `path` as the dataclass `kind`; raises BundleError with every problem."""
    try:
        value = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except FileNotFoundError:
        named = "a bundle" if kind is Manifest else "an engine"
        raise BundleError(f"{path.parent} is not {named}: it has no {path.name}; build-engine makes one") from None
    except (OSError, ValueError, RecursionError) as error:
        if lfs.is_pointer(path):
            raise BundleError(f"{path} is a Git LFS pointer, not the file itself. {lfs.remedy(path.parent)}") from None
        raise BundleError(f"{path} cannot be read: {error}") from None
    _check_version(value, path)
    _check_features(value, path)
    try:
        return convert(kind, value)
    except ValueError as error:
        raise BundleError(f"{path} is not valid: {error}") from None


def convert(kind: type[T], value: Any) -> T:
    """Return JSON's `value` as `kind`: a dataclass, a container of dataclasses, a path or a plain type.

    Raises ValueError with every problem.
    """
    problems: list[str] = []
    result: T = _convert(kind, value, "", problems)
    if problems:
        raise ValueError("; ".join(problems))
    return result


def write(value: Any) -> str:
    """Return the JSON text of a dataclass (numbers in a row stay on one line)."""
    return _format(plain(value)) + "\n"


def plain(value: Any) -> Any:
    """Return a dataclass, or a container of dataclasses, as JSON values; a path becomes a text."""
    if dataclasses.is_dataclass(value):
        fields = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {_key(f.name): plain(v) for f, v in fields if not _is_default(f, v)}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _check_version(value: Any, path: Path) -> None:
    version = value.get("format_version") if isinstance(value, dict) else None
    if not isinstance(version, int) or version == FORMAT_VERSION:
        return
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {version}, and this turbochain reads version {FORMAT_VERSION}: "
            "pip install --upgrade turbochain"
        )
    raise BundleError(
        f"{path} has format version {version}, and this turbochain reads version {FORMAT_VERSION} alone: remove "
        f"{path.parent}, and build it again with build-engine SOURCE"
    )


def _check_features(value: Any, path: Path) -> None:
    """Raise BundleError if an optional feature is used that this version does not have, before its keys are read."""
    requires = value.get("requires") if isinstance(value, dict) else None
    if isinstance(requires, dict) and (unknown := {name: v for name, v in requires.items() if name not in FEATURES}):
        features = ", ".join(f"{name} (turbochain {version})" for name, version in unknown.items())
        raise BundleError(
            f"{path.parent} uses {features}, which this turbochain cannot read: pip install --upgrade turbochain"
        )


def _no_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}")


def _key(field: str) -> str:
    return field.removesuffix("_")


def _is_default(field: "dataclasses.Field[Any]", value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return field.default is not dataclasses.MISSING and value == field.default


def _format(value: Any, indent: str = "") -> str:
    deeper = indent + "  "
    if isinstance(value, dict) and not _is_short(value):
        items = [f"{deeper}{json.dumps(k)}: {_format(v, deeper)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return "[\n" + ",\n".join(deeper + _format(v, deeper) for v in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


def _is_short(value: dict[str, Any]) -> bool:
    """Return whether an object stands on one line: nothing in it holds an object."""
    nested = (v.values() if isinstance(v, dict) else v for v in value.values() if isinstance(v, dict | list))
    return not any(isinstance(v, dict) for v in value.values()) and not any(
        isinstance(i, dict) for n in nested for i in n
    )


def _convert(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Return JSON's `value` as `kind`: a dataclass, a container of dataclasses, or a plain type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _convert_dataclass(kind, value, where, problems)
    if origin in (tuple, list) and isinstance(value, list):
        kinds = arguments if len(arguments) == len(value) and ... not in arguments else arguments[:1] * len(value)
        return origin(
            _convert(k, v, f"{where}[{i}]", problems) for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict and isinstance(value, dict):
        return {k: _convert(arguments[1], v, f"{where}.{k}", problems) for k, v in value.items()}
    if origin is types.UnionType:
        return None if value is None else _convert(arguments[0], value, where, problems)
    if kind is Any or type(value) is kind:
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    name = getattr(kind, "__name__", str(kind))
    problems.append(f"{where.lstrip('.') or 'it'} should be {name}, and is {json.dumps(value)[:60]}")
    return None


class _Field(typing.NamedTuple):
    name: str
    kind: Any
    required: bool


@functools.cache
def _fields(kind: Any) -> dict[str, _Field]:
    """Return key → field of a dataclass, found once: it would be half of the work to open a bundle."""
    hints = typing.get_type_hints(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    return {_key(name): _Field(name, hint, name in required) for name, hint in hints.items()}


def _convert_dataclass(kind: Any, value: dict[str, Any], where: str, problems: list[str]) -> Any:
    fields, prefix = _fields(kind), where.lstrip(".") or "the top level"
    missing = [key for key, field in fields.items() if field.required and key not in value]
    problems += [f"{prefix} has the unknown key {k!r}" for k in value if k not in fields]
    problems += [f"{prefix} lacks the key {k!r}" for k in missing]
    known = {f.name: _convert(f.kind, value[k], f"{where}.{k}", problems) for k, f in fields.items() if k in value}
    return None if missing else kind(**known)
