# SPDX-License-Identifier: Apache-2.0
"""What to masquerade and to forward (COMPAT §9), and how it gets into the kernel.

``rules`` decides, and is pure. ``iptables`` and ``nftables`` each render the rules, and compare them with
what stands. ``choice`` says which of them a host gets. ``keeper`` keeps the rules standing in it, and
``elsewhere`` looks after the others. Both ask ``view`` what has changed, and that asks the kernel, by
``nfnetlink`` and ``legacy``.
"""
