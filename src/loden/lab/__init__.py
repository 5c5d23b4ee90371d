# SPDX-License-Identifier: Apache-2.0
"""Many hosts on one machine: network namespaces, each with the real agent, and containers behind them.

::

    topology    what is to exist: hosts, containers, segments; pure
    network     the agents' network configuration; pure
    wiring      how it hangs together, namespace by namespace; pure
    namespaces  makes it exist, with iproute2
    agents      starts the agents and waits until they are ready
    probe       who reaches whom
    throughput  what a connection carries, beside the bare underlay
    state       what a lab left on the machine, written ahead, so that a crash can be cleaned
    processes   who runs inside a lab, and how to end it
    userns      the same without root
    lab         the steps, in order
"""
