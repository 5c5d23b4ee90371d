/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which peer has an address, and which peer a datagram came from.
 *
 * A table never changes once it is built: readers need no lock, and a change is a new table.
 */
#ifndef LODEN_LPM_H
#define LODEN_LPM_H

#include <netinet/in.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

/* An address as a number that compares: IPv4 stands in the upper 32 bits. */
struct key {
	uint64_t high, low;
};

struct key key_of(const uint8_t *address, size_t size);

/* Sent to and received from a peer; outlives the tables it is in, for as long as its prefix stands. */
struct traffic {
	_Alignas(64) atomic_uint_least64_t tx_packets; /* one worker's line, then another's */
	atomic_uint_least64_t tx_bytes;
	_Alignas(64) atomic_uint_least64_t rx_packets;
	atomic_uint_least64_t rx_bytes;
	size_t users; /* tables that name it; changed by those who change tables, one at a time */
};

struct peer {
	struct key prefix;
	uint32_t mtu;	   /* most bytes of an inner packet; 0: no limit known */
	uint32_t endpoint; /* index into table->endpoints */
	uint16_t port;
	uint8_t length;	     /* of the prefix, in bits */
	uint8_t size;	     /* bytes of an address in the prefix: 4 or 16 */
	uint8_t remote_size; /* the same of the outer address */
	uint8_t remote[16];
	struct traffic *traffic;
};

/* Where datagrams go to and come from. */
struct endpoint {
	union {
		struct sockaddr any;
		struct sockaddr_in ipv4;
		struct sockaddr_in6 ipv6;
	} address;
	socklen_t size;
};

/* All addresses of a family, as ranges in order: each begins where the one before ends. */
struct ranges {
	struct key *starts;
	uint32_t *owners; /* index of the peer; RANGE_FREE: nobody's */
	size_t count;
};

#define RANGE_FREE UINT32_MAX

struct table {
	struct peer *peers; /* by address size, prefix, length */
	size_t count;
	struct ranges ipv4, ipv6;
	struct endpoint *endpoints;
	uint32_t *slots; /* hash of endpoints: index + 1 */
	uint32_t mask;
	struct table *next; /* among those that wait for their last reader */
};

/* What goes out of a table: peers of these prefixes. */
struct prefix {
	struct key key;
	uint8_t length;
	uint8_t size;
};

/* Whether no bit is set behind the prefix's length, and the length fits the family. */
bool is_prefix_valid(struct key key, uint32_t length, size_t size);

/*
 * The table that comes after another one.
 *
 * old: NULL for the first. puts: their traffic and endpoint are filled in; of several with one prefix the
 * last counts; they win over drops. Both are put in order.
 * Returns 0, or -ENOMEM, and then nothing has changed.
 */
int table_build(struct table **ret, const struct table *old, struct peer *puts, size_t put_count, struct prefix *drops,
		size_t drop_count);
void table_free(struct table *table);

/* The peer with the longest prefix that holds an address; NULL: nobody. */
const struct peer *table_lookup(const struct table *table, const uint8_t *address, size_t size);

#define ENDPOINT_UNKNOWN UINT32_MAX

/* The endpoint that a datagram came from, also if the socket reports IPv4 as mapped into IPv6. */
uint32_t table_endpoint(const struct table *table, const struct sockaddr *address, size_t size);

#endif
