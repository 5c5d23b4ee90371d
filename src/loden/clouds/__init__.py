# SPDX-License-Identifier: Apache-2.0
"""Clouds, one file each; each imports its vendor's client when a host is to work with it, and not before."""
