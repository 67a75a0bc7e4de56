"""Read and write JSON as frozen dataclasses, strictly: every problem is listed at once."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from turbochain.runtime.bundle.manifest import FORMAT_VERSION
from turbochain.runtime.errors import BundleError

T = TypeVar("T")


def read(kind: type[T], path: Path) -> T:
    """Read `path` (JSON) as the dataclass `kind`; BundleError lists every problem."""
    try:
        value = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except FileNotFoundError:
        raise BundleError(f"{path.parent} is not a bundle: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from None
    version = value.get("format_version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {version}, and this turbochain reads up to {FORMAT_VERSION}: "
            "pip install --upgrade turbochain"
        )
    problems: list[str] = []
    if isinstance(version, int) and version < 1:
        problems.append(f"there is no format version {version}")
    result = _convert(kind, value, "", problems)
    if problems:
        raise BundleError(f"{path} is not valid: " + "; ".join(problems))
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}")


def write(value: Any) -> str:
    """The JSON text of a manifest dataclass (numbers in a row stay on one line)."""
    return _format(dataclasses.asdict(value)) + "\n"


def _format(value: Any, indent: str = "") -> str:
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        items = [f"{deeper}{json.dumps(k)}: {_format(v, deeper)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(v, dict) for v in value):
        return "[\n" + ",\n".join(deeper + _format(v, deeper) for v in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


def _convert(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """`value` from JSON as `kind`, a dataclass, a container of such, or a plain type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _convert_dataclass(kind, value, where, problems)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], v, f"{where}[{i}]", problems) for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _convert(arguments[1], v, f"{where}.{k}", problems) for k, v in value.items()}
    if origin is types.UnionType:
        return None if value is None else _convert(arguments[0], value, where, problems)
    if kind is Any or type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    name = getattr(kind, "__name__", str(kind))
    problems.append(f"{where.lstrip('.') or 'it'} should be {name}, and is {json.dumps(value)[:60]}")
    return None


def _convert_dataclass(kind: Any, value: dict[str, Any], where: str, problems: list[str]) -> Any:
    """A field with a default may be missing: so a later version can add one and still read this version's files."""
    hints = typing.get_type_hints(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    prefix = where.lstrip(".") or "the top level"
    problems += [f"{prefix} has the unknown key {k!r}" for k in value if k not in hints]
    problems += [f"{prefix} lacks the key {k!r}" for k in hints if k in required and k not in value]
    known = {k: _convert(h, value[k], f"{where}.{k}", problems) for k, h in hints.items() if k in value}
    return kind(**known) if required <= set(known) else None
