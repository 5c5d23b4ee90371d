# SPDX-License-Identifier: Apache-2.0
"""What a backend reads from its part of the network configuration.

A backend says what it understands in one frozen struct: names as users write them, types, defaults, and
limits as ``msgspec.Meta``. From that struct come the decoding, the messages and ``loden config check``.
"""

from typing import Any, TypeVar

import msgspec
import msgspec.inspect

from loden.errors import ConfigError
from loden.members import folded, read_object, show, unknown_key_note
from loden.secret import Secret

OptionsT = TypeVar("OptionsT", bound=msgspec.Struct)


def decode_options(raw: bytes, options: type[OptionsT]) -> tuple[OptionsT, tuple[str, ...]]:
    """A backend's options, and notes on members that it does not know.

    Args:
        raw: the members as JSON text (:attr:`loden.network.Network.backend`); names in any case.
        options: the struct of the backend's options.

    Raises:
        ConfigError: the first of what :func:`check_options` finds.
    """
    found, errors, notes = check_options(raw, options)
    if found is None:
        raise errors[0]
    return found, notes


def check_options(
    raw: bytes, options: type[OptionsT]
) -> tuple[OptionsT | None, tuple[ConfigError, ...], tuple[str, ...]]:
    """A backend's options or everything that is wrong with them, and notes on unknown members.

    Types are strict (``"1"`` is no number) and null counts as absent, as in Go.

    Args:
        raw, options: as :func:`decode_options` takes them.
    """
    try:
        members = folded(read_object(raw, key="Backend"))
    except ConfigError as error:
        return None, (error,), ()
    members.pop("type", None)
    values, errors = {}, []
    fields = msgspec.structs.fields(options)
    for field in fields:
        key = f"Backend.{field.encode_name}"
        _, value = members.pop(field.encode_name.casefold(), ("", None))
        try:
            if value is not None:
                values[field.name] = msgspec.convert(value, field.type, dec_hook=_hide)
            elif field.required:
                errors.append(ConfigError(key, "missing", hint=allowed(field.type)))
        except msgspec.ValidationError:
            shown = "what it holds" if _is_secret(field.type) else show(value)
            errors.append(ConfigError(key, f"{shown} is not allowed", hint=allowed(field.type)))
    known = [f"Backend.{field.encode_name}" for field in fields]
    notes = tuple(unknown_key_note(f"Backend.{name}", known) for name, _ in members.values())
    if errors:
        return None, tuple(errors), notes
    try:
        return options(**values), (), notes
    except ValueError as error:  # what fits each member and not the whole
        return None, (ConfigError("Backend", str(error)),), notes


def printable(options: msgspec.Struct) -> dict[str, Any]:
    """Options under the names that users write, as JSON members; secrets stay hidden."""
    members: dict[str, Any] = msgspec.to_builtins(options, enc_hook=repr)
    return members


def _hide(kind: type, value: object) -> Secret:
    if kind is not Secret or not isinstance(value, str):
        raise ValueError("not a text")
    return Secret(value)


def _is_secret(kind: object) -> bool:
    return kind is Secret


def allowed(kind: object) -> str:
    """The values that a type lets through, in words for a person.

    Args:
        kind: an option's annotation.
    """
    return _allowed_by(msgspec.inspect.type_info(kind))


def _allowed_by(info: msgspec.inspect.Type) -> str:
    if isinstance(info, msgspec.inspect.Metadata):
        info = info.type
    match info:
        case msgspec.inspect.BoolType():
            return "true or false, without quotes"
        case msgspec.inspect.IntType(ge=low, le=high) if low is not None and high is not None:
            return f"a whole number from {low} to {high}, without quotes"
        case msgspec.inspect.IntType():
            return "a whole number, without quotes"
        case msgspec.inspect.StrType(min_length=shortest):
            return f"a text of {shortest} characters or more, in quotes" if shortest else "a text in quotes"
        case msgspec.inspect.CustomType(cls=cls) if cls is Secret:
            return "a text in quotes"
        case msgspec.inspect.UnionType(types=types):
            rest = [one for one in types if not isinstance(one, msgspec.inspect.NoneType)]
            return " or ".join(_allowed_by(one) for one in rest)
        case msgspec.inspect.VarTupleType(item_type=item):
            return f"a list, each {_allowed_by(item)}"
        case msgspec.inspect.LiteralType(values=values):
            return "one of " + ", ".join(show(value) for value in values)
        case _:
            return f"a value of the type {info}"
