"""Descriptions of user code and of the values that it uses, as JSON: what an identity covers beyond the text of files.

The code of a notebook or script is described function by function, with what it names; that of files by the files. The
values of the function around a function (its closure) are in no text, and are described wherever it was written.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import inspect
import json
import linecache
from collections.abc import Iterable
from enum import Enum
from pathlib import PurePath
from types import FunctionType, MethodType, ModuleType, NoneType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from kdpipe.stages.plugins.code_text import (
    changed_attributes,
    changed_names,
    class_text,
    function_text,
    functions_of,
    global_names,
    is_written_in,
    place_of,
)
from kdpipe.stages.plugins.module_source import MAIN, is_own, modules_sha256, true_name


class NotDescribedError(Exception):
    """A value that has no description; the text is its type."""


class ClosureError(Exception):
    """A value of a closure that has no description; the text is its name and type."""


class Description:
    """Functions and classes with what they use, and values that refer to them by number.

    Args:
        strict: Whether to refuse closures that cannot be described, and not leave out what cannot be.
        tensors: Whether tensors and arrays can be described.

    Attributes:
        parts: The description of each function and class.
    """

    def __init__(self, *, strict: bool, tensors: bool = True) -> None:
        self.parts: list[dict[str, Any]] = []
        self._strict, self._tensors = strict, tensors
        self._found: dict[int, tuple[int, Any]] = {}  # with the object, so that its id stays its own

    def sha256(self) -> str:
        """Return the digest of the parts: of one part that is a file or text, that of this file or text."""
        if len(self.parts) == 1 and self.parts[0].keys() == {"source"}:
            return str(self.parts[0]["source"])
        return sha256_of(self.parts)

    def code(self, found: Any, module: str | None = None) -> int:
        """Return the number of the part of a class or function, which is added if it is new.

        Args:
            found: The class or function.
            module: The name of its module, for the object whose digest it is, which has no name in it; by default the
                one in which it was written.

        Raises:
            OSError: There is no source; or TypeError.
            ClosureError: It uses something that cannot be described.
        """
        if id(found) not in self._found:
            number, part = len(self.parts), dict[str, Any]()
            self._found[id(found)] = number, found
            self.parts.append(part)
            is_named, module = module is None, module or _module_of(found)
            written_in_main = module in MAIN
            is_class, is_python = inspect.isclass(found), hasattr(found, "__code__")
            if written_in_main:
                part["source"] = _sha256((class_text(found) if is_class else function_text(found)).encode())
            else:
                part["source"] = modules_sha256([module])
            if is_named:
                part["name"] = found.__qualname__
                part["place"] = place_of(found, in_file=not written_in_main) if is_python else None
            if is_class and (written_in_main or "<locals>" in found.__qualname__):
                part.update(self._members(found))
            elif not is_class:
                part.update(self._surroundings(found))
        return self._found[id(found)][0]

    def add_state(self, owner: Any) -> None:
        """Add a part with the attributes of a callable object, or of the one that a method is bound to."""
        values = {} if inspect.isclass(owner) else getattr(owner, "__dict__", {})
        if described := self._fitting(dict(values)):
            self.parts.append({"state": described})

    @functools.singledispatchmethod
    def value(self, found: Any) -> Any:
        """Return the description of a value. Raises NotDescribedError, or as `code` does."""
        kind = type(found)
        if inspect.isroutine(found) or isinstance(found, np.ufunc):  # a built-in one, or wrapped by lru_cache
            wrapped = getattr(found, "__wrapped__", None)
            return {"name": _name(found)} if wrapped is None else self.value(wrapped)
        is_settings = isinstance(found, SimpleNamespace | argparse.Namespace) or dataclasses.is_dataclass(found)
        if hasattr(found, "__dict__") and (is_settings or is_own(kind.__module__)):
            return {"object": [self.value(kind), self.value(vars(found))]}
        raise NotDescribedError(f"a {_name(kind)}")

    @value.register(NoneType | int | float | str)
    def _(self, found: Any) -> Any:
        return found

    @value.register(list | tuple)
    def _(self, found: Any) -> Any:
        return [self.value(each) for each in found]

    @value.register(set | frozenset)
    def _(self, found: Any) -> Any:
        return {"set": sorted(json.dumps(self.value(each)) for each in found)}

    @value.register
    def _(self, found: dict) -> Any:  # type: ignore[type-arg]
        return {"dict": [[self.value(key), self.value(each)] for key, each in found.items()]}

    @value.register
    def _(self, found: Enum) -> Any:
        return {"enum": [_name(type(found)), found.name]}

    @value.register(bytes | complex | range | slice | PurePath | torch.dtype | np.generic | np.dtype)
    def _(self, found: Any) -> Any:
        return {"value": repr(found)}

    @value.register
    def _(self, found: torch.device) -> Any:  # where something runs does not decide what it is
        return {"value": "device"}

    @value.register(torch.Tensor | np.ndarray)
    def _(self, found: Any) -> Any:
        if not self._tensors:
            raise NotDescribedError(f"a {_name(type(found))}")
        return {"array": _array(found)}

    @value.register
    def _(self, found: functools.partial) -> Any:  # type: ignore[type-arg]
        return {"partial": self.value([found.func, found.args, found.keywords])}

    @value.register
    def _(self, found: ModuleType) -> Any:
        name = found.__name__
        return {"module": modules_sha256([name]) if name not in MAIN and is_own(name) else name}

    @value.register
    def _(self, found: MethodType) -> Any:
        return {"method": self.value([found.__self__, found.__func__])}

    @value.register(FunctionType | type)
    def _(self, found: Any) -> Any:
        if is_own(_module_of(found)):
            return {"code": self.code(found)}
        return {"name": _name(found), **({} if inspect.isclass(found) else self._surroundings(found))}

    @value.register
    def _(self, found: nn.Module) -> Any:
        if found.state_dict():
            raise NotDescribedError(f"a network, {_name(type(found))}")
        return {"network": self.modules(found), "classes": [self.value(type(each)) for each in found.modules()]}

    def modules(self, model: nn.Module) -> list[Any]:
        """Return the type, repr and plain public attributes of each module of a network, without its state dict."""
        return [
            [path, _name(type(module)), module.extra_repr(), self._attributes(module)]
            for path, module in model.named_modules(remove_duplicate=False)
        ]

    def _surroundings(self, function: Any) -> dict[str, Any]:
        """Describe what a function uses beyond its text: its closure, and in a notebook or script what it names."""
        if not hasattr(function, "__code__"):
            wrapped = getattr(function, "__wrapped__", None)
            return {} if wrapped is None else {"wrapped": self._fitting({"": wrapped})}
        code, module = function.__code__, _module_of(function)
        found: dict[str, Any] = {}
        if hasattr(function, "__wrapped__"):
            found["wrapped"] = self._fitting({"": function.__wrapped__})
        if is_own(module) or not hasattr(function, "__wrapped__"):
            found["closure"] = self._closure(function, strict=self._strict and is_own(module))
        if module in MAIN:
            names = (global_names(code) - changed_names(code)) & function.__globals__.keys()
            found["globals"] = self._fitting({name: function.__globals__[name] for name in names})
        if module in MAIN or (is_own(module) and "<locals>" in code.co_qualname):
            defaults = {str(number): each for number, each in enumerate(function.__defaults__ or ())}
            found["defaults"] = self._fitting({**defaults, **(function.__kwdefaults__ or {})})
        return {key: each for key, each in found.items() if each}

    def _closure(self, function: Any, *, strict: bool) -> dict[str, Any]:
        values, state = {}, {"__class__", *changed_names(function.__code__)}  # the former is that of `super()`
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name in state:
                continue
            try:
                values[name] = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        if not strict:
            return self._fitting(values)
        described = {}
        for name, each in values.items():
            try:
                described[name] = self.value(each)
            except (NotDescribedError, RecursionError) as error:
                raise ClosureError(f"`{name}`, {error}") from error
        return described

    def _members(self, kind: type) -> dict[str, Any]:
        """Describe the base classes of a class, its methods, and the values of its attributes."""
        methods: dict[str, Any] = {}
        for name, member in sorted(vars(kind).items()):
            functions = functions_of(member)
            own = [self._surroundings(each) for each in functions if is_written_in(each, kind)]
            own += [self.value(each) for each in functions if not is_written_in(each, kind) and not _is_generated(each)]
            if any(own):
                methods[name] = own
        values = {
            name: each for name, each in vars(kind).items() if not name.startswith("__") and not functions_of(each)
        }
        bases = [self.value(base) for base in kind.__bases__ if base is not object]
        found = {"bases": bases, "methods": methods, "values": self._fitting(values)}
        return {key: each for key, each in found.items() if each}

    def _attributes(self, module: nn.Module) -> dict[str, Any]:
        state = {"training", *changed_attributes(type(module).forward)}
        public = {name for name in vars(module) if not name.startswith("_")} - state
        described = self._fitting({name: vars(module)[name] for name in public})
        if is_own(type(module).__module__):
            buffers = {name: each for name, each in module.named_buffers(recurse=False) if name not in state}
            extra = buffers.keys() - module.state_dict().keys()  # the others count with the weights
            described |= {name: _array(buffers[name]) for name in sorted(extra)}
        return described

    def _fitting(self, values: dict[str, Any]) -> dict[str, Any]:
        """Describe those of some values that can be described, in the order of their names."""
        described = {}
        for name, each in sorted(values.items()):
            try:
                described[name] = self.value(each)
            except (NotDescribedError, RecursionError):
                continue
        return described


def sha256_of(description: Any) -> str:
    """Return the digest of a description."""
    return _sha256(json.dumps(description, sort_keys=True).encode())


def own_bases(kinds: Iterable[type]) -> list[type]:
    """Return those of some classes and their base classes that are not a library's, each once."""
    return list(dict.fromkeys(base for kind in kinds for base in kind.__mro__ if is_own(base.__module__)))


def _module_of(found: Any) -> str:
    """Return the name of the module in which a class or function was written, not of one that it was wrapped for."""
    name = found.__globals__.get("__name__") if hasattr(found, "__globals__") else found.__module__
    return str(name)


def _is_generated(function: FunctionType) -> bool:
    """Return whether a method has no text, as those that `dataclass` makes from what is described already."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and not linecache.getlines(code.co_filename)


def _name(found: Any) -> str:
    module = true_name(str(getattr(found, "__module__", None)))
    return f"{module}.{getattr(found, '__qualname__', getattr(found, '__name__', type(found).__name__))}"


def _array(found: torch.Tensor | np.ndarray[Any, Any]) -> list[Any]:
    try:
        tensor = torch.as_tensor(found).detach().cpu().contiguous()
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    except (TypeError, RuntimeError, NotImplementedError) as error:  # of strings, objects; sparse
        raise NotDescribedError(f"a {_name(type(found))}") from error
    return [str(tensor.dtype), list(tensor.shape), _sha256(content)]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
