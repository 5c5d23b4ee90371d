# SPDX-License-Identifier: Apache-2.0
"""Loden: a container network fabric. Every host gets a subnet, every container reaches every other."""

__version__ = "0.1.0"
