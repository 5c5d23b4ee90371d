# SPDX-License-Identifier: Apache-2.0
"""The etcd store, from the top down: ``store`` · ``records`` and ``claims`` (pure) · ``client`` (endpoints,
users, deadlines) · ``channel`` (one connection) · ``messages`` (what goes over it, pure) · ``place`` (what
URLs and flags say).
"""
