# SPDX-License-Identifier: Apache-2.0
"""The eBPF object that is shipped: built from the sources beside it, and laid out as Python packs it."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loden.address import Family
from loden.errors import NotSupported
from loden.tables import bpf, engine, udp_bpf

OBJECT = Path("src/loden/tables/udp.bpf.o")
HEADER = Path("native/bpf/maps.h")
#: Another clang makes another object of the same sources.
CLANG = 14


def lacks_compiler() -> str:
    """What of the compiler is not on this machine; empty where all of it is."""
    if not shutil.which("clang"):
        return "there is no clang"
    said = subprocess.run(["clang", "--version"], capture_output=True, text=True, check=True).stdout
    major = re.search(r"version (\d+)", said)
    if not major or int(major[1]) != CLANG:
        return f"clang is not of version {CLANG}: {said.splitlines()[0]}"
    if not Path("/usr/include/bpf/bpf_helpers.h").exists():
        return "there is no libbpf-dev"
    return lacks_bpftool()


def lacks_bpftool() -> str:
    return "" if shutil.which("bpftool") else "there is no bpftool"


def test_object_is_what_the_sources_make(tmp_path: Path) -> None:
    if lack := lacks_compiler():
        pytest.skip(lack)
    built = tmp_path / "built.o"
    done = subprocess.run(["scripts/build-bpf", built], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert built.read_bytes() == OBJECT.read_bytes(), "run scripts/build-bpf, and commit the object"


def test_object_names_no_place_on_the_machine_that_built_it() -> None:
    found = re.findall(rb"/(?:home|root|tmp|work|usr|build)/[\x20-\x7e]*", OBJECT.read_bytes())
    assert found == []


@pytest.fixture(scope="module")
def types() -> Mapping[int, Mapping[str, Any]]:
    """The types in the object (BTF), by number."""
    if lack := lacks_bpftool():
        pytest.skip(lack)
    line = ["bpftool", "--json", "btf", "dump", "file", str(OBJECT)]
    found = json.loads(subprocess.run(line, capture_output=True, check=True).stdout)["types"]
    return {one["id"]: one for one in found}


def fields(types: Mapping[int, Mapping[str, Any]], name: str) -> tuple[int, list[int]]:
    """A struct's size, and where its members begin, padding left out; of a variable, its type's.

    In the place of a member that is a struct itself stand those of that.
    """
    one = next(it for it in types.values() if it["name"] == name and it["kind"] in ("STRUCT", "VAR"))
    while one["kind"] != "STRUCT":  # VAR, CONST, VOLATILE
        one = types[one["type_id"]]
    found: list[int] = []
    for member in one["members"]:
        start, kind = member["bits_offset"] // 8, types[member["type_id"]]
        if kind["kind"] == "STRUCT":
            found += [start + place for place in fields(types, kind["name"])[1]]
        elif not member["name"].startswith("pad"):
            found.append(start)
    return one["size"], found


def places(layout: struct.Struct) -> list[int]:
    """Where each field of a format begins: where its bits appear when it alone has any."""
    empty = layout.unpack(bytes(layout.size))
    full = layout.unpack(b"\xff" * layout.size)
    packed = (layout.pack(*empty[:place], full[place], *empty[place + 1 :]) for place in range(len(empty)))
    return [bits.index(0xFF) for bits in packed]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("settings", udp_bpf._SETTINGS),
        ("subnet4", udp_bpf._SUBNET[Family.IPV4]),
        ("subnet6", udp_bpf._SUBNET[Family.IPV6]),
        ("peer4", udp_bpf._PEER[Family.IPV4]),
        ("peer6", udp_bpf._PEER[Family.IPV6]),
        ("remote", udp_bpf._REMOTE),
    ],
)
def test_layout_is_the_same_on_both_sides(
    types: Mapping[int, Mapping[str, Any]], name: str, layout: struct.Struct
) -> None:
    assert (layout.size, places(layout)) == fields(types, name)


def test_counters_have_the_same_order_on_both_sides() -> None:
    listed = re.search(r"enum counter \{(.*?)\};", HEADER.read_text(), re.DOTALL)
    assert listed is not None
    names = re.findall(r"^\t(\w+),", listed[1], re.MULTILINE)
    assert names.pop() == "COUNTERS"
    assert len(names) == len(udp_bpf.COUNTERS)
    # Drops have the names that the engine gives them; what is unknown is a peer.
    wrong = [
        (name, counter)
        for name, counter in zip(names, udp_bpf.COUNTERS, strict=True)
        if counter.removesuffix("_peer") != name.lower().removeprefix("drop_")
    ]
    assert wrong == []


def test_drops_are_counted_under_the_engines_names() -> None:
    """A status page adds both up by reason; what the kernel alone can fail at is the programs' own."""
    assert set(udp_bpf.DROPS) - set(engine.drop_reasons()) == {"failed"}


def test_limits_are_the_same_on_both_sides() -> None:
    text = HEADER.with_name("passage.h").read_text()
    found = dict(re.findall(r"^#define (MOST_MISSED|PATIENCE_NS) (\d+)", text, re.MULTILINE))
    assert found == {"MOST_MISSED": str(udp_bpf._MOST_MISSED), "PATIENCE_NS": str(udp_bpf._PATIENCE_NS)}


def test_other_byte_order_is_named() -> None:
    image = bytearray(OBJECT.read_bytes())
    image[5] = {"little": 2, "big": 1}[sys.byteorder]
    with pytest.raises(NotSupported, match=f"and this one is {sys.byteorder}-endian"):
        bpf.Object(bytes(image), b"")


def test_programs_need_no_gpl() -> None:
    """The licence in the object is the project's; a helper that asks for the GPL would not load."""
    assert b"Apache-2.0\0" in OBJECT.read_bytes()
