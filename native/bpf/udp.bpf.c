// SPDX-License-Identifier: Apache-2.0
/*
 * The fast path of the udp backend (docs/backends/udp.md): programs for tc, one object, because they share maps.
 *
 *	container --> TUN egress: loden_encap --> underlay's interface ~~~~> ingress: loden_decap --> TUN --> container
 *	                                   TCP and super-packets by a VXLAN device, at its ingress: loden_detour ^
 */
#include <stdbool.h>
#include <stddef.h>

#include "maps.h"
#include "detour.h"
#include "encapsulate.h"
#include "decapsulate.h"

/* None of the helpers that the programs call asks for the GPL. */
char LICENSE[] SEC("license") = "Apache-2.0";
