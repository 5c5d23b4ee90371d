# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, by who can mend it.

::

    LodenError                 message, and a hint that says what to change
    ├── ConfigError            the network configuration, a flag, a file a person wrote
    ├── FileError              a file cannot be read or written
    ├── InterfaceError         no interface or address as asked for
    ├── StoreError
    │   ├── StoreUnavailable   does not answer, is busy, is full: trying again can help
    │   ├── StoreUnusable      corrupt, unreadable, another version: a person must act
    │   └── Conflict           compare-and-swap lost: somebody else wrote first
    ├── LeaseError
    │   ├── MalformedLease     a key or a value in the store that is no lease
    │   ├── NoFreeSubnet       the range is used up
    │   ├── DuplicateAddress   another live host announces our public address
    │   └── PeerUnreachable    the backend has no way to that peer's address
    ├── KernelError            an errno, the operation and the object it was about
    │   └── NotSupported       the kernel has no such thing, or we may not use it
    ├── CloudError             a cloud's API or metadata service refused, failed or does not answer
    │   ├── CloudUnavailable   throttled, down or late: the same call may work later
    │   ├── CloudDenied        the credentials are missing, expired or may not do this
    │   ├── ForeignRoute       somebody else's route is where ours should be
    │   └── RoutesFull         the cloud's quota of routes is used up
    ├── FirewallError          a firewall tool is missing, too old or busy, or refused our rules
    ├── AlreadyRunning         another agent works in this network namespace
    └── LabError               the lab cannot do as asked

Every message reads ``operation object: reason``; the remedy is the *hint*.
"""

import errno as errnos
import os


class LodenError(Exception):
    """Base of all errors that Loden raises on purpose.

    Args:
        message: what was being done, with which value, and what came back.
        hint: what the reader can change; empty where nothing is known to help.
    """

    #: True where starting again cannot help until a person changed something.
    is_final: bool = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(LodenError):
    """A value that a person wrote is not usable.

    Args:
        key: the key's path, such as ``Backend.VNI``; empty for the whole text.
        reason: what is wrong with it, with the value in it.
        hint: what is allowed.
    """

    def __init__(self, key: str, reason: str, *, hint: str = "") -> None:
        super().__init__(f"{key}: {reason}" if key else reason, hint=hint)
        self.key = key
        self.reason = reason


class FileError(LodenError):
    """The system refused one operation on one file.

    Args:
        operation: a verb, such as ``write``.
        path: of the file.
        error: what the system said.
        hint: what the reader can change.
    """

    def __init__(self, operation: str, path: str, error: OSError, *, hint: str = "") -> None:
        super().__init__(f"{operation} {path}: {error.strerror or error}", hint=hint)
        self.path = path


class InterfaceError(LodenError):
    """No interface, or no address on it, fits what was asked for."""


class StoreError(LodenError):
    """The place where leases live did not do as asked."""


class StoreUnavailable(StoreError):
    """The store does not answer now; the same call may work later."""


class StoreUnusable(StoreError):
    """The store answers, and what it holds or allows cannot be worked with."""

    is_final = True


class Conflict(StoreError):
    """The record is not what the caller last saw: somebody else wrote it."""


class LeaseError(LodenError):
    """A lease cannot be read, taken or kept."""


class MalformedLease(LeaseError):
    """A key or a value that is no lease; it concerns that key alone."""


class NoFreeSubnet(LeaseError):
    """Every subnet between SubnetMin and SubnetMax is taken."""


class DuplicateAddress(LeaseError):
    """Another live host holds a lease under our public address."""


class PeerUnreachable(LeaseError):
    """The backend cannot carry packets to a peer; it concerns that peer alone."""


class KernelError(LodenError):
    """The kernel refused one operation on one object.

    Args:
        operation: a verb, such as ``add``.
        subject: the object in the form that ``ip`` prints it.
        errno: the positive error number.
        detail: the kernel's own extended message, when it sent one.
    """

    def __init__(self, operation: str, subject: str, errno: int, *, detail: str = "", hint: str = "") -> None:
        name = errnos.errorcode.get(errno, str(errno))
        said = f"{os.strerror(errno)} [{name}]"
        super().__init__(
            f"{operation} {subject}: {f'{detail}; ' if detail else ''}{said}",
            hint=hint or _HINTS.get(errno, ""),
        )
        self.operation = operation
        self.subject = subject
        self.errno = errno
        self.detail = detail
        self.is_final = type(self).is_final or errno in _HINTS


_HINTS = {
    errnos.EPERM: "run as root, or give the process CAP_NET_ADMIN",
    errnos.EACCES: "run as root, or give the process CAP_NET_ADMIN",
}


def errno_of(error: LodenError) -> int:
    """The kernel's number for an error; 0 where it is not the kernel's."""
    return error.errno if isinstance(error, KernelError) else 0


class NotSupported(KernelError):
    """The running kernel lacks the feature."""

    is_final = True


class CloudError(LodenError):
    """A cloud did not do as asked.

    Args:
        operation: a verb, such as ``add``.
        subject: the object, with the value that it was about.
        reason: what came back. Never the request, which may hold credentials.
        code: the cloud's own name for it, such as ``RouteAlreadyExists``; empty where there was none.
        hint: what the reader can change.
    """

    def __init__(self, operation: str, subject: str, reason: str, *, code: str = "", hint: str = "") -> None:
        super().__init__(f"{operation} {subject}: {reason}{f' [{code}]' if code else ''}", hint=hint)
        self.operation = operation
        self.subject = subject
        self.reason = reason
        self.code = code


class CloudUnavailable(CloudError):
    """The cloud does not answer now, or not so often; the same call may work later."""


class CloudDenied(CloudError):
    """The credentials are missing or expired, or their policy does not allow the call."""


class ForeignRoute(CloudError):
    """A route that is not the fabric's has the range of one that is wanted; it is left alone."""


class RoutesFull(CloudError):
    """There is no room for another route before somebody raises the quota."""


class FirewallError(LodenError):
    """The firewall cannot be read or changed now; the same call may work later."""


class AlreadyRunning(LodenError):
    """One network namespace has one agent."""

    is_final = True


class LabError(LodenError):
    """The lab cannot be made, used or removed as asked."""
