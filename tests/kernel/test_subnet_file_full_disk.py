# SPDX-License-Identifier: Apache-2.0
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from loden.errors import FileError
from loden.subnet_file import write_atomic


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one page of data."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_full_disk_leaves_the_old_file_and_says_what_to_change(small_disk: Path) -> None:
    path = small_disk / "subnet.env"
    write_atomic(str(path), "A=1\n")
    with pytest.raises(FileError, match="No space left on device") as caught:
        write_atomic(str(path), "B" * 20_000)
    assert "room" in caught.value.hint
    assert path.read_text() == "A=1\n"
    assert [entry.name for entry in small_disk.iterdir()] == ["subnet.env"]
