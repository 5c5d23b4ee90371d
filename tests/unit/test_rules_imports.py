# SPDX-License-Identifier: Apache-2.0
"""Imports point one way, as ARCHITECTURE has it, and what is heavy is loaded by those who use it."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path("src/loden")

#: From the top down. A package may import what stands below its line, and itself.
LAYERS = (
    ("cli",),
    ("lab",),
    (
        *("agent", "cleanup", "cloud_routes", "keeper", "kernel", "lock", "memory", "network_watch"),
        *("options", "peers", "plan", "reconcile"),
    ),
    ("stores", "backends", "firewall", "status"),
    ("clouds",),
    ("tables",),
    ("priority", "retry"),
    (
        "",
        "address",
        "backend_options",
        "errors",
        "interface",
        "lease",
        "members",
        "network",
        "secret",
        "subnet_file",
    ),
)
_RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
_VALUES = len(LAYERS) - 1

#: Packages that an agent has no use for, whatever else is installed.
HEAVY = (
    *("rich", "click", "loden.lab", "loden.cli", "pyroute2", "unittest", "http.server"),
    *("boto3", "botocore", "requests", "google", "alibabacloud_tea_openapi", "alibabacloud_credentials"),
)


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to("src").with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.update({str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)})
    return {name for name in found if name == "loden" or name.startswith("loden.")}


def part(module: str) -> str:
    """The package or single module below ``loden`` that a module belongs to."""
    return f"{module}.".split(".")[1]


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=str)
def test_imports_point_down(module: str, path: Path) -> None:
    own = part(module)
    assert own in _RANK, f"{module}: say in LAYERS where it belongs"
    for other in imported(path):
        target = part(other)
        if target not in _RANK and other.startswith("loden."):
            continue  # a name out of loden/__init__.py
        is_below = _RANK[target] > _RANK[own] or (_RANK[own] == _RANK[target] in (_VALUES, _RANK["agent"]))
        assert target == own or is_below, f"{module} imports {other}"


def test_one_module_touches_the_packet_engine() -> None:
    users = {module for module, path in modules() if "loden._engine" in imported(path)}
    assert users == {"loden.tables.engine"}


@pytest.mark.skipif(importlib.util.find_spec("loden.agent") is None, reason="there is no agent yet")
def test_agent_does_not_load_what_only_commands_need() -> None:
    script = "import sys, loden.agent; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded.intersection(HEAVY)


@pytest.mark.parametrize("module", LAYERS[-1][1:])
def test_values_load_no_asyncio(module: str) -> None:
    script = f"import sys, loden.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "asyncio" not in done.stdout.split()
