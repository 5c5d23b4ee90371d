# SPDX-License-Identifier: Apache-2.0
"""Doubles of clouds: their APIs on the wire, their metadata services, and the router of a VPC.

The vendors' own clients talk to them unchanged. A double keeps what the real cloud keeps about instances and
routes, refuses what the real one refuses, and writes down every call.
"""
