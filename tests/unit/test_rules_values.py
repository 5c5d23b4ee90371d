# SPDX-License-Identifier: Apache-2.0
"""Frozen means frozen: what a value holds cannot be changed either.

Private classes may be mutable, as the bookkeeping of their module; those that are frozen are so throughout.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

import loden

_MUTABLE = (list, dict, set, bytearray, MutableMapping, MutableSequence, MutableSet)


def value_classes() -> Iterator[type]:
    for info in pkgutil.walk_packages(loden.__path__, "loden."):
        module = importlib.import_module(info.name)
        for _, found in inspect.getmembers(module, inspect.isclass):
            is_value = issubclass(found, msgspec.Struct) or dataclasses.is_dataclass(found)
            is_bookkeeping = found.__name__.startswith("_") and is_value and not is_frozen(found)
            if found.__module__ == info.name and is_value and not is_bookkeeping:
                yield found


def is_frozen(found: type) -> bool:
    if issubclass(found, msgspec.Struct):
        return bool(found.__struct_config__.frozen)
    parameters: Any = found.__dict__["__dataclass_params__"]
    return bool(parameters.frozen)


def mutable_parts(annotation: object) -> Iterator[object]:
    """The mutable types in an annotation, at any depth."""
    origin = getattr(annotation, "__origin__", annotation)
    if isinstance(origin, type) and issubclass(origin, _MUTABLE):
        yield annotation
    for part in get_args(annotation):
        yield from mutable_parts(part)


@pytest.mark.parametrize(
    "found", list(value_classes()), ids=lambda found: f"{found.__module__}.{found.__qualname__}"
)
def test_value_is_frozen_through_and_through(found: type) -> None:
    assert is_frozen(found)
    hints = get_type_hints(found)
    fields = {name: hints[name] for name in hints if name in inspect.get_annotations(found)}
    assert {name: part for name, hint in fields.items() for part in mutable_parts(hint)} == {}
