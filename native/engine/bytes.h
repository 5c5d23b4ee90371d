/* SPDX-License-Identifier: Apache-2.0 */
/* Fields of packets, for packet.c and segment.c. */
#ifndef LODEN_BYTES_H
#define LODEN_BYTES_H

#include "packet.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <string.h>

enum {
	IPV4_HEADER = 20,
	IPV6_HEADER = 40,
	TCP_HEADER = 20,
	UDP_HEADER = 8,
};

/* Packets lie at any address: every access goes through these. "raw" is in network order. */

static inline uint16_t load16_raw(const uint8_t *data)
{
	uint16_t value;

	memcpy(&value, data, sizeof(value));
	return value;
}

static inline uint16_t load16(const uint8_t *data)
{
	return ntohs(load16_raw(data));
}

static inline uint32_t load32(const uint8_t *data)
{
	uint32_t value;

	memcpy(&value, data, sizeof(value));
	return ntohl(value);
}

static inline uint64_t load64_raw(const uint8_t *data)
{
	uint64_t value;

	memcpy(&value, data, sizeof(value));
	return value;
}

static inline void store16_raw(uint8_t *data, uint16_t value)
{
	memcpy(data, &value, sizeof(value));
}

static inline void store16(uint8_t *data, uint32_t value)
{
	store16_raw(data, htons((uint16_t)value));
}

static inline void store32(uint8_t *data, uint32_t value)
{
	value = htonl(value);
	memcpy(data, &value, sizeof(value));
}

static inline uint16_t checksum_of(uint64_t sum)
{
	return (uint16_t)~checksum_fold(sum);
}

static inline size_t address_size(const struct packet *packet)
{
	return packet->version == 4 ? 4 : 16;
}

static inline uint32_t pseudo_sum(const struct packet *packet)
{
	uint8_t protocol[2] = {0, packet->protocol};
	uint64_t sum = checksum_add(0, packet_source(packet), 2 * address_size(packet));

	return checksum_fold(checksum_add(sum, protocol, sizeof(protocol)));
}

/* Lengths go into the pseudo header of IPv6 in 32 bits: the upper 16 are zero in ours. */
static inline uint64_t pseudo_length(uint32_t pseudo, uint32_t length)
{
	return (uint64_t)pseudo + htons((uint16_t)length);
}

/* And the IPv4 checksum with it. */
static inline void write_network_length(uint8_t *data, uint8_t version, uint32_t network, uint32_t length)
{
	if (version == 6) {
		store16(data + 4, length - IPV6_HEADER);
		return;
	}
	store16(data + 2, length);
	store16_raw(data + 10, 0);
	store16_raw(data + 10, checksum_of(checksum_add(0, data, network)));
}

#endif
