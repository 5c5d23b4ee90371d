# SPDX-License-Identifier: Apache-2.0
"""Build the packet engine, ``loden._engine``, when the package is installed.

Without a compiler or Python's headers the package is installed all the same, and says so: the udp backend
then has its eBPF path alone. ``LODEN_REQUIRE_ENGINE=1`` makes that an error.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SOURCES = "native/engine"
_MODULE = "src/loden/_engine.abi3.so"
#: -O3: the checksums' loop is the engine's hottest.
_FLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-O3", "-g", "-fPIC", "-fvisibility=hidden", "-pthread", "-shared")


class EngineBuildHook(BuildHookInterface[Any]):
    """Hatchling's hook, named in ``pyproject.toml``; builds in place: an editable install has it too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; called by hatchling before a wheel is put together.

        Raises:
            RuntimeError: there is no engine, and the environment says that there has to be.
        """
        del version
        if self.target_name != "wheel":
            return
        module = Path(self.root, _MODULE)
        module.unlink(missing_ok=True)
        reason = build(Path(self.root, _SOURCES), module)
        if reason and os.environ.get("LODEN_REQUIRE_ENGINE", "") not in ("", "0"):
            raise RuntimeError(f"build the packet engine: {reason}")
        if reason:
            self.app.display_warning(
                f"loden is installed without the packet engine of the udp backend: {reason}"
            )
            return
        build_data["artifacts"].append(f"/{_MODULE}")
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"cp311-abi3-{platform}"


def build(sources: Path, module: Path, *, flags: Sequence[str] = (), headers: str = "") -> str:
    """Compile the extension; why there is none, empty where there is.

    Args:
        sources: the folder with the engine's C files.
        module: where the extension goes, whole or not at all.
        flags: more for the compiler, behind ``CFLAGS``; ``CC`` names another compiler.
        headers: the folder with ``Python.h``; empty for this interpreter's.
    """
    if not sys.platform.startswith("linux"):
        return f"it needs Linux, and this is {sys.platform}"
    compiler = _compiler()
    if not compiler:
        return "no C compiler (apt install gcc, or name one in CC)"
    headers = headers or sysconfig.get_paths()["include"]
    if not Path(headers, "Python.h").exists():
        return f"no {headers}/Python.h (apt install python3-dev)"
    extra = shlex.split(os.environ.get("CFLAGS", ""))
    files = sorted(str(path) for path in sources.glob("*.c"))
    new = module.with_suffix(".new")
    command = [*compiler, *_FLAGS, *extra, *flags, f"-isystem{headers}", *files, "-o", str(new)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"{shlex.join(command)} said:\n{done.stderr}"
    new.replace(module)  # whole or not at all: a running agent may have the old one mapped
    return ""


def _compiler() -> list[str]:
    asked = shlex.split(os.environ.get("CC", ""))
    for words in (asked, ["cc"], ["gcc"], ["clang"]):
        if words and shutil.which(words[0]):
            return words
    return []
