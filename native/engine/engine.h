/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The packet engine: worker threads between the queues of a TUN device and UDP sockets.
 *
 *     TUN queue ──readv─▶ check, route, cut ──sendmmsg, UDP_SEGMENT──▶ UDP socket      a transmitter each queue
 *     TUN queue ◀─writev── merge, check ◀──────recvmmsg, UDP_GRO────── UDP socket      a receiver each socket
 *
 * Functions return 0 or a negative errno. One engine may be used by several threads.
 */
#ifndef LODEN_ENGINE_H
#define LODEN_ENGINE_H

#include "lpm.h"
#include "packet.h"

struct engine;

#define ENGINE_DESCRIPTORS 64u /* most TUN queues, and most sockets */

struct engine_config {
	const int *tun; /* each is duplicated, and becomes non-blocking */
	size_t tun_count;
	const int *udp;
	size_t udp_count;
	const uint8_t *source4; /* the source of ICMP errors; NULL: none are sent */
	const uint8_t *source6;
	bool allow_unknown;
};

enum counter {
	COUNT_TUN_PACKETS,  /* read from the TUN device; a super-packet is one */
	COUNT_UDP_PACKETS,  /* datagrams received */
	COUNT_TX_PACKETS,   /* datagrams sent, one inner packet each */
	COUNT_TX_BYTES,	    /* of these inner packets */
	COUNT_RX_PACKETS,   /* inner packets handed to the TUN device */
	COUNT_RX_BYTES,
	COUNT_SEGMENTS,	    /* inner packets that were cut from super-packets */
	COUNT_MERGED,	    /* inner packets that were handed on as part of a super-packet */
	COUNT_FRAGMENTS,    /* made here */
	COUNT_ICMP,	    /* errors sent */
	COUNT_ICMP_LIMITED, /* errors not sent because there were too many */
	COUNT_UDP_SENDS,    /* messages given to the socket; each carries up to 64 datagrams */
	COUNT_UDP_RECEIVES,
	COUNT_TUN_WRITES,
	COUNT_DROPS, /* here the drops begin: COUNT_DROPS + enum drop */
	COUNTERS = COUNT_DROPS + DROP_COUNT,
};

/* NULL where there is none: no drop has no reason. */
const char *counter_name(unsigned int counter);

struct engine_failure {
	int error; /* positive errno; 0: none */
	char what[64];
};

int engine_create(struct engine **ret, const struct engine_config *config);
/* Stops it first. */
void engine_destroy(struct engine *engine);

/* Both may be called at any time, and again. */
int engine_start(struct engine *engine);
void engine_stop(struct engine *engine);

/* As table_build. Packets keep moving; the old table goes with its last reader. */
int engine_change(struct engine *engine, struct peer *puts, size_t put_count, struct prefix *drops, size_t drop_count);

/* A copy, to be freed; what peer->traffic counted is in the array behind it. */
struct peer_report {
	struct peer peer;
	uint64_t tx_packets, tx_bytes, rx_packets, rx_bytes;
};

int engine_peers(struct engine *engine, struct peer_report **ret, size_t *count);

/* counts: COUNTERS of them. tables: how many exist, the one in use included. */
void engine_counters(struct engine *engine, uint64_t *counts, size_t *tables);

/* An eventfd: a worker has stopped by itself, or a packet was too big. */
int engine_fileno(const struct engine *engine);
struct engine_failure engine_failure(struct engine *engine);

#endif
