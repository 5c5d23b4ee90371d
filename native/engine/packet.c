/* SPDX-License-Identifier: Apache-2.0 */
/* Packets one by one: checked, forwarded, fragmented, answered. */
#include "bytes.h"

enum {
	ICMP_HEADER = 8,
	IPV4_DF = 0x4000,
	IPV4_MF = 0x2000,
	IPV4_OFFSET = 0x1fff,
	ICMP_TTL = 8, /* as flannel's: enough for a host's own bridges, and no loop lives long */
};

const char *const drop_names[DROP_COUNT] = {
	[DROP_NONE] = "",
	[DROP_TRUNCATED] = "truncated",
	[DROP_OVERSIZED] = "oversized",
	[DROP_VERSION] = "version",
	[DROP_HEADER] = "header",
	[DROP_LENGTH] = "length",
	[DROP_CHECKSUM] = "checksum",
	[DROP_OPTIONS] = "options",
	[DROP_TTL] = "ttl",
	[DROP_OFFLOAD] = "offload",
	[DROP_UNKNOWN_PEER] = "unknown_peer",
	[DROP_SPOOFED] = "spoofed",
	[DROP_NO_ROUTE] = "no_route",
	[DROP_NO_SOCKET] = "no_socket",
	[DROP_TOO_BIG] = "too_big",
	[DROP_FULL] = "full",
	[DROP_UNREACHABLE] = "unreachable",
	[DROP_REFUSED] = "refused",
};

/*
 * A 64-bit sum with end-around carry is congruent to the sum of its 16-bit words (RFC 1071 section 2 (C)).
 * Each sum counts its own carries, so that the additions do not wait for each other.
 */
uint64_t checksum_add(uint64_t sum, const uint8_t *data, size_t length)
{
	uint64_t sums[4] = {sum, 0, 0, 0}, carries[4] = {0, 0, 0, 0};
	uint8_t rest[8] = {0};

	for (; length >= 32; data += 32, length -= 32) {
		for (size_t i = 0; i < 4; i++) {
			uint64_t word = load64_raw(data + 8 * i);

			sums[i] += word;
			carries[i] += sums[i] < word;
		}
	}
	for (; length >= 8; data += 8, length -= 8) {
		uint64_t word = load64_raw(data);

		sums[0] += word;
		carries[0] += sums[0] < word;
	}
	if (length > 0) {
		uint64_t word;

		memcpy(rest, data, length);
		word = load64_raw(rest);
		sums[0] += word;
		carries[0] += sums[0] < word;
	}
	sum = sums[0];
	for (size_t i = 1; i < 4; i++) {
		sum += sums[i];
		carries[0] += (sum < sums[i]) + carries[i];
	}
	sum += carries[0];
	return sum + (sum < carries[0]);
}

uint16_t checksum_fold(uint64_t sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)sum;
}

/* Parsing */

static bool are_options_valid(const uint8_t *options, size_t length)
{
	enum { END = 0, NO_OPERATION = 1 };

	for (size_t at = 0; at < length && options[at] != END;) {
		if (options[at] == NO_OPERATION) {
			at++;
			continue;
		}
		if (length - at < 2 || options[at + 1] < 2 || options[at + 1] > length - at)
			return false;
		at += options[at + 1];
	}
	return true;
}

static enum drop parse_ipv4(struct packet *ret, uint8_t *data, size_t length)
{
	uint32_t header, total;
	uint16_t fragment;

	if (length < IPV4_HEADER)
		return DROP_TRUNCATED;
	header = (data[0] & 15u) * 4;
	total = load16(data + 2);
	if (header < IPV4_HEADER)
		return DROP_HEADER;
	if (header > length)
		return DROP_TRUNCATED;
	if (total < header || total > length)
		return DROP_LENGTH;
	if (checksum_fold(checksum_add(0, data, header)) != 0xffff)
		return DROP_CHECKSUM;
	if (!are_options_valid(data + IPV4_HEADER, header - IPV4_HEADER))
		return DROP_OPTIONS;
	if (data[8] == 0)
		return DROP_TTL;
	fragment = load16(data + 6);
	*ret = (struct packet){
		.data = data,
		.length = total,
		.network = (uint16_t)header,
		.version = 4,
		.protocol = data[9],
		.has_options = header > IPV4_HEADER,
		.is_fragment = (fragment & (IPV4_MF | IPV4_OFFSET)) != 0,
		.is_later = (fragment & IPV4_OFFSET) != 0,
		.dont_fragment = (fragment & IPV4_DF) != 0,
	};
	return DROP_NONE;
}

/* Bytes of an extension header; 0: this is none, or nothing behind it can be read. */
static uint32_t extension_length(uint8_t protocol, const uint8_t *extension)
{
	switch (protocol) {
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_DSTOPTS:
	case IPPROTO_MH:
	case 139: /* host identity protocol */
	case 140: /* shim6 */
		return (extension[1] + 1u) * 8;
	case IPPROTO_FRAGMENT:
		return 8;
	case IPPROTO_AH:
		return (extension[1] + 2u) * 4;
	default:
		return 0;
	}
}

static enum drop parse_ipv6(struct packet *ret, uint8_t *data, size_t length)
{
	static const uint8_t nothing[8] = {0};
	uint32_t at = IPV6_HEADER;
	struct packet packet = {.data = data, .version = 6, .dont_fragment = true};

	if (length < IPV6_HEADER)
		return DROP_TRUNCATED;
	packet.length = IPV6_HEADER + load16(data + 4);
	if (packet.length > length)
		return DROP_LENGTH;
	if (data[7] == 0)
		return DROP_TTL;
	packet.protocol = data[6];
	while (!packet.is_later && extension_length(packet.protocol, nothing) > 0) {
		uint32_t size;

		if (packet.length - at < 8)
			return DROP_OPTIONS;
		size = extension_length(packet.protocol, data + at);
		if (size > packet.length - at)
			return DROP_OPTIONS;
		if (packet.protocol == IPPROTO_FRAGMENT) {
			packet.is_fragment = true;
			packet.is_later = (load16(data + at + 2) & 0xfff8) != 0;
		}
		packet.protocol = data[at];
		packet.has_options = true;
		at += size;
	}
	if (at > UINT16_MAX)
		return DROP_OPTIONS;
	packet.network = (uint16_t)at;
	*ret = packet;
	return DROP_NONE;
}

enum drop packet_parse(struct packet *ret, uint8_t *data, size_t length)
{
	if (length == 0)
		return DROP_TRUNCATED;
	switch (data[0] >> 4) {
	case 4:
		return parse_ipv4(ret, data, length);
	case 6:
		return parse_ipv6(ret, data, length);
	default:
		return DROP_VERSION;
	}
}

const uint8_t *packet_source(const struct packet *packet)
{
	return packet->data + (packet->version == 4 ? 12 : 8);
}

const uint8_t *packet_target(const struct packet *packet)
{
	return packet_source(packet) + address_size(packet);
}

enum drop packet_forward(struct packet *packet)
{
	uint8_t *hops = packet->data + (packet->version == 4 ? 8 : 7);
	uint32_t checksum;

	if (*hops <= 1)
		return DROP_TTL;
	--*hops;
	if (packet->version == 4) {
		checksum = load16(packet->data + 10) + 0x0100u;
		store16(packet->data + 10, checksum + (checksum >= 0xffff));
	}
	return DROP_NONE;
}

/* Fragments */

/* The options that every fragment carries: those with the copied bit. Returns their padded length. */
static uint32_t copy_options(const uint8_t *options, uint32_t length, uint8_t *out)
{
	enum { END = 0, NO_OPERATION = 1, COPIED = 0x80 };
	uint32_t used = 0;

	for (uint32_t at = 0; at < length && options[at] != END;) {
		uint32_t size = options[at] == NO_OPERATION ? 1 : options[at + 1];

		if (options[at] & COPIED) {
			memcpy(out + used, options + at, size);
			used += size;
		}
		at += size;
	}
	while (used % 4 != 0)
		out[used++] = END;
	return used;
}

size_t packet_fragment(const struct packet *packet, uint32_t mtu, uint32_t *offset, uint8_t *out, size_t capacity)
{
	uint32_t behind = packet->length - packet->network, header = packet->network, length;
	uint16_t fragment = load16(packet->data + 6);

	if (*offset >= behind || capacity < mtu || mtu < (uint32_t)packet->network + 8)
		return 0;
	memcpy(out, packet->data, IPV4_HEADER);
	if (*offset == 0) {
		memcpy(out + IPV4_HEADER, packet->data + IPV4_HEADER, header - IPV4_HEADER);
	} else {
		header = IPV4_HEADER + copy_options(packet->data + IPV4_HEADER, header - IPV4_HEADER, out + IPV4_HEADER);
		out[0] = (uint8_t)(0x40 | header / 4);
	}
	length = mtu - header;
	if (length < behind - *offset) {
		length &= ~7u;
		fragment |= IPV4_MF;
	} else {
		length = behind - *offset; /* MF stays as it was: this may be a fragment of a fragment */
	}
	store16(out + 6, fragment + *offset / 8);
	memcpy(out + header, packet->data + packet->network + *offset, length);
	write_network_length(out, 4, header, header + length);
	*offset += length;
	return header + length;
}

/* Errors */

static bool is_icmp_wanted_ipv4(const struct packet *packet, enum icmp kind)
{
	const uint8_t *source = packet_source(packet), *target = packet_target(packet);
	uint8_t type;

	if (source[0] == 0 || source[0] == 127 || source[0] >= 224 || target[0] >= 224)
		return false;
	if (packet->protocol != IPPROTO_ICMP)
		return true;
	if (kind == ICMP_NO_ROUTE || packet->length <= packet->network)
		return false; /* as flannel: none about any ICMP */
	type = packet->data[packet->network];
	return !(type == 3 || type == 4 || type == 5 || type == 11 || type == 12);
}

static bool is_icmp_wanted_ipv6(const struct packet *packet, enum icmp kind)
{
	static const uint8_t unspecified[16] = {0};
	const uint8_t *source = packet_source(packet), *target = packet_target(packet);
	uint8_t type;

	if (source[0] == 0xff || memcmp(source, unspecified, sizeof(unspecified)) == 0)
		return false;
	if (target[0] == 0xff && kind != ICMP_TOO_BIG)
		return false;
	if (packet->protocol != IPPROTO_ICMPV6)
		return true;
	if (packet->length <= packet->network)
		return false;
	type = packet->data[packet->network];
	return type >= 128 && type != 137; /* no errors about errors and redirects */
}

static size_t icmp_ipv4(const struct packet *packet, size_t quoted, enum icmp kind, uint32_t mtu, uint8_t *out)
{
	uint8_t *icmp = out + IPV4_HEADER;
	size_t length = IPV4_HEADER + ICMP_HEADER + quoted;

	out[0] = 0x45;
	out[8] = ICMP_TTL;
	out[9] = IPPROTO_ICMP;
	memcpy(out + 16, packet_source(packet), 4);
	write_network_length(out, 4, IPV4_HEADER, (uint32_t)length);
	icmp[0] = 3;
	icmp[1] = kind == ICMP_TOO_BIG ? 4 : 0;
	if (kind == ICMP_TOO_BIG)
		store16(icmp + 6, mtu < UINT16_MAX ? mtu : UINT16_MAX);
	memcpy(icmp + ICMP_HEADER, packet->data, quoted);
	store16_raw(icmp + 2, checksum_of(checksum_add(0, icmp, ICMP_HEADER + quoted)));
	return length;
}

static size_t icmp_ipv6(const struct packet *packet, size_t quoted, enum icmp kind, uint32_t mtu, uint8_t *out)
{
	uint8_t *icmp = out + IPV6_HEADER;
	uint32_t length = (uint32_t)(ICMP_HEADER + quoted);
	struct packet answer = {.data = out, .version = 6, .protocol = IPPROTO_ICMPV6};

	out[0] = 0x60;
	store16(out + 4, length);
	out[6] = IPPROTO_ICMPV6;
	out[7] = ICMP_TTL;
	memcpy(out + 24, packet_source(packet), 16);
	icmp[0] = kind == ICMP_TOO_BIG ? 2 : 1;
	if (kind == ICMP_TOO_BIG)
		store32(icmp + 4, mtu);
	memcpy(icmp + ICMP_HEADER, packet->data, quoted);
	store16_raw(icmp + 2,
		    checksum_of(checksum_add(pseudo_length(pseudo_sum(&answer), length), icmp, length)));
	return IPV6_HEADER + length;
}

size_t packet_icmp(const struct packet *packet, enum icmp kind, uint32_t mtu, const uint8_t *source, uint8_t *out)
{
	bool is_ipv4 = packet->version == 4;
	size_t quoted = is_ipv4 ? packet->network + 8u : ICMP_MAX - IPV6_HEADER - ICMP_HEADER;
	bool is_wanted = is_ipv4 ? is_icmp_wanted_ipv4(packet, kind) : is_icmp_wanted_ipv6(packet, kind);

	if (packet->is_later || !is_wanted)
		return 0;
	if (quoted > packet->length)
		quoted = packet->length;
	memset(out, 0, IPV6_HEADER + ICMP_HEADER);
	memcpy(out + (is_ipv4 ? 12 : 8), source, address_size(packet));
	return is_ipv4 ? icmp_ipv4(packet, quoted, kind, mtu, out) : icmp_ipv6(packet, quoted, kind, mtu, out);
}
