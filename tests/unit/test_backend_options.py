# SPDX-License-Identifier: Apache-2.0
import sys
from typing import Annotated, Literal

import msgspec
import pytest

from loden.backend_options import check_options, decode_options
from loden.errors import ConfigError
from loden.members import show


class Options(
    msgspec.Struct, frozen=True, rename={"vni": "VNI", "port": "Port", "mode": "Mode", "psk": "PSK"}
):
    vni: Annotated[int, msgspec.Meta(ge=1, le=16777215)] = 1
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    mode: Literal["separate", "auto"] = "separate"
    psk: Annotated[str, msgspec.Meta(min_length=8)] = "12345678"


class Required(msgspec.Struct, frozen=True, rename={"psk": "PSK", "encap": "Encap"}):
    psk: str
    encap: bool = False


def test_absent_and_null_options_have_their_defaults() -> None:
    assert decode_options(b"{}", Options) == (Options(), ())
    assert decode_options(b'{"VNI": null}', Options) == (Options(), ())


def test_options_match_in_any_case_and_the_type_is_not_one() -> None:
    options, notes = decode_options(b'{"type": "vxlan", "vni": 7, "PORT": 8472, "mode": "auto"}', Options)
    assert options == Options(vni=7, port=8472, mode="auto")
    assert notes == ()


def test_unknown_options_are_noted() -> None:
    _, notes = decode_options(b'{"VIN": 7}', Options)
    assert notes == ("Backend.VIN: unknown key, ignored; did you mean Backend.VNI?",)


@pytest.mark.parametrize(
    ("text", "key", "allowed"),
    [
        (b'{"VNI": 0}', "Backend.VNI", "from 1 to 16777215"),
        (b'{"VNI": "1"}', "Backend.VNI", "from 1 to 16777215"),
        (b'{"VNI": true}', "Backend.VNI", "from 1 to 16777215"),
        (b'{"VNI": 1.0}', "Backend.VNI", "from 1 to 16777215"),
        (b'{"Port": 65536}', "Backend.Port", "from 0 to 65535"),
        (b'{"Mode": "x"}', "Backend.Mode", '"auto", "separate"'),
        (b'{"PSK": "short"}', "Backend.PSK", "8 characters or more"),
    ],
)
def test_wrong_options_are_named_with_what_is_allowed(text: bytes, key: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode_options(text, Options)
    assert caught.value.key == key
    assert allowed in caught.value.hint


def test_all_wrong_options_are_found_and_missing_ones_too() -> None:
    _, errors, _ = check_options(b'{"Encap": 1}', Required)
    assert [error.key for error in errors] == ["Backend.PSK", "Backend.Encap"]
    assert [error.reason for error in errors] == ["missing", "1 is not allowed"]


def test_text_that_is_no_object_is_one_error() -> None:
    _, errors, _ = check_options(b"[]", Options)
    assert [error.key for error in errors] == ["Backend"]


def test_value_that_is_too_deep_to_be_shown_is_refused_all_the_same() -> None:
    """What the parser got through with few callers around it may be too much with more."""
    value: object = 1
    for _ in range(sys.getrecursionlimit()):
        value = [value]
    assert show(value) == "a value of too many levels"
