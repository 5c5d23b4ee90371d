# SPDX-License-Identifier: Apache-2.0
"""How the engine is built: by which compilers, without one, and with what watches over its memory."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hatch_build import build
from tests.fuzz.make_corpus import CORPUS, corpus
from tests.sanitized import run_sanitized

SOURCES = Path("native/engine")
WARNINGS = (
    "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wmissing-prototypes", "-Wvla", "-Werror",
)  # fmt: skip


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_engine_compiles_without_a_warning(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    monkeypatch.setenv("CC", compiler)
    assert build(SOURCES, tmp_path / "_engine.abi3.so", flags=WARNINGS) == ""


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_program_of_the_benches_compiles_without_a_warning(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    command = [compiler, "-std=gnu11", "-D_GNU_SOURCE", "-O2", *WARNINGS, "bench/packets.c", "-o"]
    done = subprocess.run([*command, tmp_path / "packets"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_missing_compiler_headers_and_errors_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "_engine.abi3.so"
    assert "/nowhere/Python.h (apt install python3-dev)" in build(SOURCES, module, headers="/nowhere")
    assert "unrecognized" in build(SOURCES, module, flags=("-fno-such-flag", "-fsyntax-only"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert build(SOURCES, module) == "no C compiler (apt install gcc, or name one in CC)"
    assert list(tmp_path.iterdir()) == []


def wheel(folder: Path, **environment: str) -> tuple[str, str]:
    """Build a wheel of this tree, in a copy; its file's name, or what went wrong, and everything it said."""
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "src", "native"):
        source = Path(name)
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, tree)
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(
        command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    names = [path.name for path in folder.glob("*.whl")]
    return (names[0] if names else ""), done.stdout + done.stderr


def test_package_has_the_engine(tmp_path: Path) -> None:
    name, said = wheel(tmp_path, LODEN_REQUIRE_ENGINE="1")
    assert "-cp311-abi3-linux_" in name, said
    assert "loden/_engine.abi3.so" in zipfile.ZipFile(tmp_path / name).namelist()


def test_package_without_a_compiler_has_none_and_says_so(tmp_path: Path) -> None:
    name, said = wheel(tmp_path, PATH=str(tmp_path), CC="")
    assert "-py3-none-any" in name, said
    assert "loden/_engine.abi3.so" not in zipfile.ZipFile(tmp_path / name).namelist()
    assert "without the packet engine of the udp backend: no C compiler" in said


def test_package_without_a_compiler_is_an_error_where_the_engine_is_required(tmp_path: Path) -> None:
    name, said = wheel(tmp_path, PATH=str(tmp_path), CC="", LODEN_REQUIRE_ENGINE="1")
    assert name == ""
    assert "build the packet engine: no C compiler" in said


def test_host_without_the_extension_is_told_what_to_do(tmp_path: Path) -> None:
    """A copy of the package without it, in an interpreter that finds no other."""
    shutil.copytree("src/loden", tmp_path / "loden", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    script = """
from loden.errors import NotSupported
from loden.tables import engine
assert "apt install gcc python3-dev" in engine.is_available(), engine.is_available()
try:
    engine.Engine([0], [0])
except NotSupported as error:
    assert "was not compiled" in str(error), error
else:
    raise AssertionError
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_corpus_is_what_its_script_makes() -> None:
    made = dict(corpus())
    kept = {str(path.relative_to(CORPUS)): path.read_bytes() for path in CORPUS.rglob("*.bin")}
    assert kept == made


@pytest.mark.parametrize("target", sorted(path.stem for path in Path("tests/fuzz").glob("*.c")))
def test_fuzzing_breaks_nothing(target: str, tmp_path: Path) -> None:
    """For two seconds; ``make fuzz`` goes on for longer."""
    if shutil.which("clang") is None:
        pytest.skip("clang is not installed")
    environment = {**os.environ, "FUZZ_DIR": str(tmp_path)}
    done = subprocess.run(
        ["scripts/fuzz", "2", target], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "nothing broke" in done.stdout


def test_sanitizers_have_nothing_to_say(tmp_path: Path) -> None:
    names = ("layouts", "packets", "table")
    run_sanitized(tmp_path, *(f"tests/unit/test_engine_{name}.py" for name in names))
