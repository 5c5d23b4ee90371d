# SPDX-License-Identifier: Apache-2.0
"""The options of commands that work on a store: those of ``loden run``."""

import functools
import os
from collections.abc import Callable
from typing import Any

import click

from loden.cli.run import identifier, read_given
from loden.options import STORE_FLAGS, StoreOptions, build_store, read_store_environment
from loden.stores import open_store
from loden.stores.base import Store

Command = Callable[..., Any]


def store_options(function: Command) -> Command:
    """Give a command the options; it takes what they come to as the keyword argument *store*."""

    @functools.wraps(function)
    def call(*args: object, **given: Any) -> object:
        texts = {identifier(flag): given.pop(identifier(flag)) for flag in STORE_FLAGS}
        store = build_store(read_given(STORE_FLAGS, texts), read_store_environment(os.environ))
        return function(*args, store=store, **given)

    for flag in reversed(STORE_FLAGS):
        text = flag.help + (f" [default: {flag.default}]" if flag.default else "")
        name = (f"--{flag.name}", identifier(flag))
        call = click.option(*name, multiple=True, metavar=flag.metavar, help=text)(call)
    return call


def opened(store: StoreOptions, *, create: bool = False) -> Store:
    """A handle to it; see :func:`loden.stores.open_store`."""
    return open_store(store.url, access=store.access, create=create)
