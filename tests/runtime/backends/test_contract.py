"""Every backend and every executor is what its type says."""

import importlib
import inspect
import pkgutil
from collections import abc
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from turbochain.engines import backends as builders
from turbochain.engines.backends.contract import Builder
from turbochain.runtime import backends
from turbochain.runtime.backends.contract import Backend, Executor
from turbochain.runtime.backends.cpu import CpuExecutor
from turbochain.runtime.backends.gpu import GpuExecutor

MODULES = [
    name
    for package in (backends, builders)
    for _, name, _ in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
]

METHODS = [name for name, member in vars(Executor).items() if inspect.isfunction(member) and not name.startswith("_")]


def test_every_constant_of_a_backend_is_of_its_type() -> None:
    """Each backend has a runtime's half and a builder's half, of the same name as their modules."""
    found: dict[str, dict[str, Any]] = {"BACKEND": {}, "BUILDER": {}}
    for name in MODULES:
        module = importlib.import_module(name)
        for constant, members in found.items():
            if constant in vars(module):
                members[name.rpartition(".")[2]] = vars(module)[constant]
    assert all(type(backend) is Backend for backend in found["BACKEND"].values())
    assert all(type(builder) is Builder for builder in found["BUILDER"].values())
    assert found["BACKEND"].keys() == found["BUILDER"].keys() == {*backends.names()}
    for members in found.values():
        assert {module: member.name for module, member in members.items()} == {n: n for n in members}


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [CpuExecutor, GpuExecutor])
def test_an_executor_has_all_of_the_protocol(kind: type, method: str) -> None:
    """So whoever is given one need not ask: the same parameters, and of the base classes' subclasses too."""
    found = {kind, *kind.__subclasses__()}
    assert len(found) >= 3  # two backends on each kind of device
    for executor in found:
        assert _parameters(getattr(executor, method)) == _parameters(getattr(Executor, method)), executor
    assert isinstance(inspect.getattr_static(kind, "loaded"), property)


def _arity(function: Callable[..., Any]) -> list[Any]:
    return [p.kind for p in inspect.signature(function).parameters.values() if p.default is inspect.Parameter.empty]


@pytest.mark.parametrize("kind", [Backend, Builder])
def test_the_functions_of_a_backend_take_what_the_type_says(kind: type) -> None:
    everyone = [backends.get(n) if kind is Backend else builders.get(n) for n in backends.names()]
    for field, hint in get_type_hints(kind).items():
        wanted = next((h for h in (hint, *get_args(hint)) if get_origin(h) is abc.Callable), None)
        for one in everyone if wanted else ():
            function = getattr(one, field)
            if function is not None:
                assert len(_arity(function)) == len(get_args(wanted)[0]), (one.name, field)
            else:
                assert type(None) in get_args(hint), (one.name, field)
