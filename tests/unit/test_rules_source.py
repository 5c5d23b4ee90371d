# SPDX-License-Identifier: Apache-2.0
"""What every source file keeps to; each test names the place that does not."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDERS = ("src", "native", "tests", "bench", "scripts", ".ci")
SPDX = "SPDX-License-Identifier: Apache-2.0"

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files(*folders: str) -> list[Path]:
    found = (path for folder in folders for path in Path(folder).rglob("*"))
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def python(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in files(*folders):
        if path.suffix == ".py":
            yield path, ast.parse(path.read_text())


def nodes(*folders: str) -> Iterator[tuple[str, ast.AST]]:
    """Every node, with the place to name."""
    for path, tree in python(*folders):
        for node in ast.walk(tree):
            yield f"{path}:{getattr(node, 'lineno', 1)}", node


@pytest.mark.parametrize(
    "command", ["ruff format --check .", "ruff check .", "mypy"], ids=["format", "lint", "types"]
)
def test_tools_have_nothing_to_say(command: str) -> None:
    name, *arguments = command.split()
    assert shutil.which(name, path=str(Path(sys.executable).parent)), f"{name} is not installed"
    done = subprocess.run(
        [sys.executable, "-m", name, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_says_its_licence() -> None:
    code = [
        path
        for path in files(*FOLDERS)
        if path.suffix in (".py", ".pyi", ".c", ".h", "") and path.stat().st_size
    ]
    assert [str(path) for path in code if SPDX not in "\n".join(path.read_text().splitlines()[:2])] == []


def test_only_commands_end_the_process() -> None:
    exits = {"exit", "_exit", "abort"}
    found = [
        place
        for place, node in nodes("src")
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in exits
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("sys", "os")
        and not place.startswith("src/loden/cli/")
    ]
    assert found == []


def test_file_modes_are_octal() -> None:
    """``chmod(755)`` is 0o1363."""
    takes_mode = {"chmod", "fchmod", "mkdir", "makedirs", "open", "mkfifo", "umask"}
    wrong = []
    for path, tree in python("src", "tests"):
        text = path.read_text()
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
            numbers = [arg for arg in given if isinstance(arg, ast.Constant) and type(arg.value) is int]
            if name in takes_mode:
                wrong += [
                    f"{path}:{arg.lineno}"
                    for arg in numbers
                    if not str(ast.get_source_segment(text, arg)).startswith("0o")
                ]
    assert wrong == []


def test_tasks_start_in_groups_only() -> None:
    """``group.create_task`` has an owner; ``asyncio.create_task`` has none."""
    found = [
        place
        for place, node in nodes("src")
        if isinstance(node, ast.Attribute)
        and node.attr in ("create_task", "ensure_future")
        and (isinstance(node.value, ast.Name) and node.value.id in ("asyncio", "loop"))
    ]
    assert found == []


#: What only one module does (ARCHITECTURE.md), and how it shows in a line of code.
_GATES = {
    "src/loden/tables/bpf.py": r"libbpf|\bbpf_[a-z]+|\bsyscall\b",
    "src/loden/tables/engine.py": r"\b_engine\b",
    "src/loden/tables/netlink.py": r"\bAF_NETLINK\b",
}


def without_prose(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name and every text in a module, with its line; docstrings left out."""
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | Function)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.alias):
            yield node.lineno, node.name
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, str(node.module)


@pytest.mark.parametrize("gate", _GATES, ids=lambda gate: Path(gate).stem)
def test_one_module_alone_goes_to_the_kernel_by_each_way(gate: str) -> None:
    """One calls bpf(2), one touches the packet engine, one opens AF_NETLINK."""
    seen = {
        f"{path}:{line}": str(path)
        for path, tree in python("src")
        for line, text in without_prose(tree)
        if re.search(_GATES[gate], text)
    }
    assert gate in seen.values(), "the pattern finds nothing any more"
    assert [place for place, path in seen.items() if path != gate] == []


def c_code() -> Iterator[tuple[str, str]]:
    """Every line of C, comments and texts taken out, with the place to name."""
    for path in files("native"):
        if path.suffix in (".c", ".h"):
            text = re.sub(
                r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\])*\"",
                lambda match: "\n" * match[0].count("\n"),
                path.read_text(),
                flags=re.DOTALL,
            )
            for number, line in enumerate(text.splitlines(), 1):
                yield f"{path}:{number}", line


def test_c_never_ends_the_process_and_copies_nothing_unbounded() -> None:
    """It is a library: what it cannot do is the caller's to hear of."""
    banned = re.compile(r"\b(exit|_exit|abort|assert|strcpy|strcat|sprintf|vsprintf|gets|alloca)\s*\(")
    lines = list(c_code())
    assert lines
    assert [place for place, line in lines if banned.search(line)] == []


def documented(docstring: str) -> set[str]:
    """The names in the ``Args:`` of a docstring; ``a, b: text`` names two."""
    match = re.search(r"^( *)Args:\n((?:\1 +.*\n?|\n)*)", docstring, re.MULTILINE)
    if match is None:
        return set()
    first = re.search(r"^ +", match[2])
    indent = first[0] if first else ""
    heads = re.findall(rf"^{indent}(\w[\w, *]*):", match[2], re.MULTILINE)
    return {name.strip(" *") for head in heads for name in head.split(",")}


def parameters(function: Function) -> set[str]:
    every = function.args
    given = [*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg, every.kwarg]
    return {argument.arg for argument in given if argument is not None}


def is_public(name: str) -> bool:
    return not name.startswith("_")


def test_documented_parameters_exist() -> None:
    wrong = []
    for path, tree in python("src"):
        for node in ast.walk(tree):
            if isinstance(node, Function):
                known = parameters(node)
            elif isinstance(node, ast.ClassDef):
                known = {
                    item.target.id
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                }
                known |= {
                    name for item in node.body if isinstance(item, Function) for name in parameters(item)
                }
            else:
                continue
            for name in documented(ast.get_docstring(node) or "") - known:
                wrong.append(f"{path}:{node.lineno}: {node.name} documents {name}")
    assert wrong == []


def test_public_functions_and_classes_are_documented() -> None:
    wrong = []
    for path, tree in python("src"):
        for node in tree.body:
            if (
                isinstance(node, Function | ast.ClassDef)
                and is_public(node.name)
                and not ast.get_docstring(node)
            ):
                wrong.append(f"{path}:{node.lineno}: {node.name}")
    assert wrong == []
