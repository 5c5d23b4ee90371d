# SPDX-License-Identifier: Apache-2.0
"""``subnet.env``: what the host got, for container runtimes and for the agent's next start (COMPAT §6)."""

import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from loden.address import Family, Prefix, format_address
from loden.errors import FileError
from loden.lease import Lease
from loden.network import Network

_log = logging.getLogger(__name__)

#: The least MTU with which the kernel lets an interface have an address of the family.
_LEAST_MTU = {Family.IPV4: 68, Family.IPV6: 1280}
_PREFIXES = {Family.IPV4: "FLANNEL", Family.IPV6: "FLANNEL_IPV6"}
_MOST_BYTES = 65536


class Previous(msgspec.Struct, frozen=True):
    """What the agent wrote at its last start; a family that is not there was not in it.

    Args:
        networks: the cluster's ranges.
        subnets: this host's, masked.
    """

    networks: Mapping[Family, Prefix]
    subnets: Mapping[Family, Prefix]


def render(network: Network, lease: Lease, *, mtu: int, ip_masq: bool = False) -> str:
    """The file's text: two lines a family, then MTU and masquerading.

    A family that cannot live with the MTU is left out: no container could be given its address, and none
    would start for that.

    Args:
        network: says which families there are.
        lease: the host's own; it has a leg in each of them.
        mtu: of the containers' interfaces, in bytes: the backend's overhead is already off.
        ip_masq: whether the agent masquerades what leaves the network.
    """
    lines = []
    for part in network.ranges:
        leg = lease.leg(part.family)
        if leg is not None and mtu >= _LEAST_MTU[part.family]:
            prefix = _PREFIXES[part.family]
            lines.append(f"{prefix}_NETWORK={part.network}")
            lines.append(f"{prefix}_SUBNET={format_address(leg.subnet.gateway)}/{leg.subnet.length}")
    lines.append(f"FLANNEL_MTU={mtu}")
    lines.append(f"FLANNEL_IPMASQ={'true' if ip_masq else 'false'}")
    return "\n".join(lines) + "\n"


def write_atomic(path: str, text: str) -> None:
    """Put a text in a file's place: a reader finds the old or the new whole, after any crash.

    Folders above it are made, mode 0755; the file's mode is 0644 whatever the umask. Blocks on the disk.

    Args:
        path: of the file.
        text: all of it.

    Raises:
        FileError: the old file, where there was one, is as it was.
    """
    target = Path(path)
    try:
        _make_folder(target.parent)
        with _locked(target.parent) as folder:
            temporary = f".{target.name}.tmp"
            try:
                _write_synced(temporary, text.encode(), folder)
                os.rename(temporary, target.name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise
            os.fsync(folder)
    except OSError as error:
        raise FileError(
            "write", path, error, hint="make room or rights there, or choose another place with --subnet-file"
        ) from error


def read_previous(path: str) -> Previous:
    """What an earlier start left in the file; nothing where there is no file, or none that can be read.

    Lines that say nothing usable are skipped, and so are lists of more than one subnet (COMPAT §2.6).

    Args:
        path: of the file.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_BYTES).decode(errors="replace")
    except FileNotFoundError:
        text = ""
    except OSError as error:
        _log.warning("read %s: %s; the subnet of the last start is not known", path, error.strerror)
        text = ""
    values = dict(_assignments(text))
    return Previous(
        networks={family: found for family in Family if (found := _single(values, family, "NETWORK"))},
        subnets={family: found for family in Family if (found := _single(values, family, "SUBNET"))},
    )


def _assignments(text: str) -> Iterator[tuple[str, str]]:
    """``KEY=VALUE`` lines as dotenv has them: ``export`` before, quotes around, a comment behind."""
    for line in text.splitlines():
        key, equals, value = line.strip().removeprefix("export ").partition("=")
        value = value.strip()
        if value[:1] in ("'", '"'):
            value = value[1:].partition(value[0])[0]
        else:
            value = value.partition(" #")[0].strip()
        if equals and not key.startswith("#"):
            yield key.strip(), value


def _single(values: Mapping[str, str], family: Family, what: str) -> Prefix | None:
    entries = [entry.strip() for entry in values.get(f"{_PREFIXES[family]}_{what}", "").split(",")]
    found = []
    for entry in entries:
        with suppress(ValueError):
            found.append(Prefix.parse(entry))
    return found[0] if len(found) == 1 and found[0].family is family else None


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, mode 0755 whatever the umask; one that is there stays as it is."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with suppress(FileExistsError):
            path.mkdir()
            path.chmod(0o755)


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """The folder, open and locked: of two writers one waits, so one name for the temporary file is enough.

    With one name a killed writer leaves nothing that the next would not overwrite.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _write_synced(name: str, data: bytes, folder: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o644, dir_fd=folder)
    with open(descriptor, "wb", buffering=0) as file:
        os.fchmod(file.fileno(), 0o644)
        written = file.write(data)
        if written != len(data):
            file.write(data[written:])  # the kernel wrote a part, so this says why not the rest
        os.fsync(file.fileno())
