/* SPDX-License-Identifier: Apache-2.0 */
#include "packet.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <string.h>

enum {
	IPV4_HEADER = 20,
	IPV6_HEADER = 40,
	TCP_HEADER = 20,
	UDP_HEADER = 8,
	ICMP_HEADER = 8,
	IPV4_DF = 0x4000,
	IPV4_MF = 0x2000,
	IPV4_OFFSET = 0x1fff,
	TCP_FLAGS = 13, /* offsets into the TCP header */
	TCP_CHECKSUM = 16,
	UDP_CHECKSUM = 6,
	TCP_FIN = 0x01,
	TCP_PSH = 0x08,
	TCP_ACK = 0x10,
	TCP_ECE = 0x40,
	TCP_CWR = 0x80,
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

/* Packets lie at any address: every access goes through these. "raw" is in network order. */

static uint16_t load16_raw(const uint8_t *data)
{
	uint16_t value;

	memcpy(&value, data, sizeof(value));
	return value;
}

static uint16_t load16(const uint8_t *data)
{
	return ntohs(load16_raw(data));
}

static uint32_t load32(const uint8_t *data)
{
	uint32_t value;

	memcpy(&value, data, sizeof(value));
	return ntohl(value);
}

static uint64_t load64_raw(const uint8_t *data)
{
	uint64_t value;

	memcpy(&value, data, sizeof(value));
	return value;
}

static void store16_raw(uint8_t *data, uint16_t value)
{
	memcpy(data, &value, sizeof(value));
}

static void store16(uint8_t *data, uint32_t value)
{
	store16_raw(data, htons((uint16_t)value));
}

static void store32(uint8_t *data, uint32_t value)
{
	value = htonl(value);
	memcpy(data, &value, sizeof(value));
}

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

static uint16_t checksum_of(uint64_t sum)
{
	return (uint16_t)~checksum_fold(sum);
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

static size_t address_size(const struct packet *packet)
{
	return packet->version == 4 ? 4 : 16;
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

/* Transport checksums */

static uint32_t pseudo_sum(const struct packet *packet)
{
	uint8_t protocol[2] = {0, packet->protocol};
	uint64_t sum = checksum_add(0, packet_source(packet), 2 * address_size(packet));

	return checksum_fold(checksum_add(sum, protocol, sizeof(protocol)));
}

/* Lengths go into the pseudo header of IPv6 in 32 bits: the upper 16 are zero in ours. */
static uint64_t pseudo_length(uint32_t pseudo, uint32_t length)
{
	return (uint64_t)pseudo + htons((uint16_t)length);
}

static uint32_t checksum_place(uint8_t protocol)
{
	return protocol == IPPROTO_TCP ? TCP_CHECKSUM : UDP_CHECKSUM;
}

enum drop offload_finish(const struct offload *offload, struct packet *packet)
{
	uint32_t start = offload->checksum_start, place = start + offload->checksum_offset;
	uint16_t checksum;

	if (!(offload->flags & OFFLOAD_NEEDS_CHECKSUM))
		return DROP_NONE;
	if (start < packet->network || place + 2 > packet->length)
		return DROP_OFFLOAD;
	/* The field holds the sum over the pseudo header and takes part in the sum. */
	checksum = checksum_of(checksum_add(0, packet->data + start, packet->length - start));
	if (checksum == 0 && packet->protocol == IPPROTO_UDP)
		checksum = 0xffff; /* 0 means that there is none */
	store16_raw(packet->data + place, checksum);
	return DROP_NONE;
}

/* Bytes of the TCP or UDP header; 0: there is no whole one. */
static uint32_t transport_length(const struct packet *packet)
{
	const uint8_t *transport = packet->data + packet->network;
	uint32_t there = packet->length - packet->network, length;

	if (packet->is_fragment)
		return 0;
	if (packet->protocol == IPPROTO_UDP)
		return there >= UDP_HEADER ? UDP_HEADER : 0;
	if (packet->protocol != IPPROTO_TCP || there < TCP_HEADER)
		return 0;
	length = (transport[12] >> 4) * 4u;
	return length >= TCP_HEADER && length <= there ? length : 0;
}

/* Cutting */

static bool is_offload_of(const struct offload *offload, const struct packet *packet)
{
	switch (offload->type & ~OFFLOAD_ECN) {
	case OFFLOAD_TCP4:
		return packet->version == 4 && packet->protocol == IPPROTO_TCP;
	case OFFLOAD_TCP6:
		return packet->version == 6 && packet->protocol == IPPROTO_TCP;
	case OFFLOAD_UDP:
		return packet->protocol == IPPROTO_UDP;
	default:
		return false;
	}
}

/*
 * Behind an IPv6 routing header the destination in the sum is not the one in the header: the kernel's own
 * sum, in the checksum's place with the length of all, knows it.
 */
static uint32_t cut_pseudo_sum(const struct offload *offload, const struct packet *packet)
{
	uint32_t place = packet->network + checksum_place(packet->protocol);
	uint16_t length;

	if (!(offload->flags & OFFLOAD_NEEDS_CHECKSUM) || offload->checksum_start != packet->network)
		return pseudo_sum(packet);
	length = htons((uint16_t)(packet->length - packet->network));
	return checksum_fold((uint64_t)load16_raw(packet->data + place) + (uint16_t)~length);
}

enum drop cut_init(struct cut *ret, const struct offload *offload, const struct packet *packet)
{
	uint32_t transport, header;

	if (!is_offload_of(offload, packet) || offload->size == 0)
		return DROP_OFFLOAD;
	transport = transport_length(packet);
	header = packet->network + transport;
	if (transport == 0 || header > CUT_HEADERS_MAX || header >= packet->length)
		return DROP_OFFLOAD;
	*ret = (struct cut){
		.headers = packet->data,
		.payload = packet->data + header,
		.header = header,
		.network = packet->network,
		.size = offload->size,
		.total = packet->length - header,
		.count = (packet->length - header + offload->size - 1) / offload->size,
		.pseudo = cut_pseudo_sum(offload, packet),
		.version = packet->version,
		.protocol = packet->protocol,
	};
	return DROP_NONE;
}

uint32_t cut_length(const struct cut *cut, uint32_t index)
{
	return index + 1 < cut->count ? cut->size : cut->total - index * cut->size;
}

static void write_network_length(uint8_t *data, uint8_t version, uint32_t network, uint32_t length)
{
	if (version == 6) {
		store16(data + 4, length - IPV6_HEADER);
		return;
	}
	store16(data + 2, length);
	store16_raw(data + 10, 0);
	store16_raw(data + 10, checksum_of(checksum_add(0, data, network)));
}

void cut_header(const struct cut *cut, uint32_t index, const uint8_t *payload, uint32_t length, uint8_t *out)
{
	uint8_t *transport = out + cut->network;
	uint32_t transport_size = cut->header - cut->network;
	uint8_t *checksum = transport + checksum_place(cut->protocol);
	uint64_t sum;

	memcpy(out, cut->headers, cut->header);
	if (cut->version == 4)
		store16(out + 4, load16(out + 4) + index);
	write_network_length(out, cut->version, cut->network, cut->header + length);
	if (cut->protocol == IPPROTO_UDP) {
		store16(transport + 4, UDP_HEADER + length);
	} else {
		store32(transport + 4, load32(transport + 4) + index * cut->size);
		if (index + 1 < cut->count)
			transport[TCP_FLAGS] &= (uint8_t)~(TCP_FIN | TCP_PSH);
		if (index > 0)
			transport[TCP_FLAGS] &= (uint8_t)~TCP_CWR;
	}
	store16_raw(checksum, 0);
	sum = checksum_add(pseudo_length(cut->pseudo, transport_size + length), transport, transport_size);
	store16_raw(checksum, checksum_of(checksum_add(sum, payload, length)));
	if (cut->protocol == IPPROTO_UDP && load16_raw(checksum) == 0)
		store16_raw(checksum, 0xffff);
}

/* Merging */

/*
 * Whether a packet can be part of a merged one: its bytes can be had again from the merged one. So nothing
 * but plain data: no options of IP, no flag that stands for one segment alone, a checksum that is right.
 */
static bool is_segment(const struct packet *packet, uint32_t *header)
{
	const uint8_t *transport = packet->data + packet->network;
	uint32_t size = transport_length(packet), behind = packet->length - packet->network;
	uint64_t sum;

	if (size == 0 || size >= behind || packet->has_options)
		return false;
	if (packet->version == 4 && (packet->data[6] & 0x80)) /* the reserved bit */
		return false;
	if (packet->protocol == IPPROTO_TCP) {
		uint8_t flags = transport[TCP_FLAGS];

		if (!(flags & TCP_ACK) || (flags & ~(TCP_ACK | TCP_PSH | TCP_ECE)))
			return false;
	} else if (load16(transport + 4) != behind || load16_raw(transport + UDP_CHECKSUM) == 0) {
		return false;
	}
	sum = pseudo_length(pseudo_sum(packet), behind);
	if (checksum_fold(checksum_add(sum, transport, behind)) != 0xffff)
		return false;
	*header = packet->network + size;
	return true;
}

static bool has_push(const struct packet *packet)
{
	return packet->protocol == IPPROTO_TCP && (packet->data[packet->network + TCP_FLAGS] & TCP_PSH);
}

static bool is_same_pair(const struct packet *one, const struct packet *other)
{
	return one->version == other->version && one->protocol == other->protocol &&
	       memcmp(packet_source(one), packet_source(other), 2 * address_size(one)) == 0;
}

static bool is_same_flow(const struct packet *one, const struct packet *other)
{
	return is_same_pair(one, other) && memcmp(one->data + one->network, other->data + other->network, 4) == 0;
}

/* All that has to be the same but addresses and ports; both packets are segments without options of IP. */
static bool are_headers_alike(const struct packet *one, const struct packet *other, uint32_t header)
{
	const uint8_t *a = one->data, *b = other->data;
	uint32_t options = one->network + TCP_HEADER;

	if (one->version == 4) {
		/* type of service; DF; TTL */
		if (a[1] != b[1] || a[6] != b[6] || a[8] != b[8])
			return false;
	} else if (memcmp(a, b, 4) != 0 || a[7] != b[7]) {
		return false; /* traffic class, flow label; hop limit */
	}
	if (one->protocol == IPPROTO_UDP)
		return true;
	a += one->network;
	b += one->network;
	/* acknowledgement, offset; flags but for the push; window; urgent pointer; options */
	return memcmp(a + 8, b + 8, 5) == 0 && ((a[TCP_FLAGS] ^ b[TCP_FLAGS]) & ~TCP_PSH) == 0 &&
	       memcmp(a + 14, b + 14, 2) == 0 && memcmp(a + 18, b + 18, 2) == 0 &&
	       memcmp(one->data + options, other->data + options, header - options) == 0;
}

/* header: all of the packet where it stays alone. */
static void merge_start(struct merge *merge, const struct packet *packet, uint32_t header)
{
	const uint8_t *transport = packet->data + packet->network;
	bool is_tcp = packet->protocol == IPPROTO_TCP && header < packet->length;

	merge->first = *packet;
	merge->pieces[0] = (struct iovec){.iov_base = packet->data, .iov_len = packet->length};
	merge->count = 1;
	merge->header = header;
	merge->size = packet->length - header;
	merge->total = merge->size;
	merge->next_sequence = is_tcp ? load32(transport + 4) + merge->size : 0;
	merge->next_id = packet->version == 4 ? load16(packet->data + 4) : 0;
	merge->id_step = 0;
	merge->is_closed = is_tcp && has_push(packet);
}

/*
 * Cut again, the identifications are numbered on. Where a packet may not be fragmented they mean nothing
 * (RFC 6864 section 4.1), and senders that give them all the same one are merged too.
 */
static bool does_id_follow(const struct merge *merge, const struct packet *packet, uint16_t *step)
{
	if (packet->version == 6)
		return true;
	*step = (uint16_t)(load16(packet->data + 4) - merge->next_id);
	if (*step > 1 || (*step == 0 && !packet->dont_fragment))
		return false;
	return merge->count == 1 || *step == merge->id_step;
}

static bool merge_add(struct merge *merge, const struct packet *packet, uint32_t header)
{
	const uint8_t *transport = packet->data + packet->network;
	uint32_t length = packet->length - header;
	uint16_t step = 0;

	if (merge->is_closed || merge->count == MERGE_PIECES || header != merge->header)
		return false;
	if (length > merge->size || merge->header + merge->total + length > PACKET_MAX)
		return false;
	if (!are_headers_alike(&merge->first, packet, header) || !does_id_follow(merge, packet, &step))
		return false;
	if (packet->protocol == IPPROTO_TCP) {
		if (load32(transport + 4) != merge->next_sequence)
			return false;
		merge->next_sequence += length;
		merge->first.data[merge->first.network + TCP_FLAGS] |= transport[TCP_FLAGS] & TCP_PSH;
	}
	merge->pieces[merge->count++] = (struct iovec){.iov_base = packet->data + header, .iov_len = length};
	merge->total += length;
	merge->next_id = (uint16_t)(merge->next_id + step);
	merge->id_step = step;
	merge->is_closed = length < merge->size || has_push(packet);
	return true;
}

/* Make the first one's headers those of all; its checksum is left to the device. */
static struct offload merge_finish(struct merge *merge)
{
	struct packet *first = &merge->first;
	uint8_t *transport = first->data + first->network;
	uint32_t behind = merge->header - first->network + merge->total;
	bool is_tcp = first->protocol == IPPROTO_TCP;

	if (merge->count == 1)
		return (struct offload){.type = OFFLOAD_NONE};
	write_network_length(first->data, first->version, first->network, merge->header + merge->total);
	if (!is_tcp)
		store16(transport + 4, behind);
	store16_raw(transport + checksum_place(first->protocol),
		    checksum_fold(pseudo_length(pseudo_sum(first), behind)));
	return (struct offload){
		.flags = OFFLOAD_NEEDS_CHECKSUM,
		.type = !is_tcp ? OFFLOAD_UDP : first->version == 4 ? OFFLOAD_TCP4 : OFFLOAD_TCP6,
		.header = (uint16_t)merge->header,
		.size = (uint16_t)merge->size,
		.checksum_start = first->network,
		.checksum_offset = (uint16_t)checksum_place(first->protocol),
	};
}

void merger_init(struct merger *merger, void (*write)(void *, const struct offload *, struct merge *), void *context)
{
	merger->oldest = 0;
	merger->no_udp = false;
	merger->write = write;
	merger->context = context;
	for (size_t i = 0; i < MERGE_FLOWS; i++)
		merger->flows[i].count = 0;
}

static void merger_write(struct merger *merger, struct merge *merge)
{
	struct offload offload;

	if (merge->count == 0)
		return;
	offload = merge_finish(merge);
	merger->write(merger->context, &offload, merge);
	merge->count = 0;
}

/* A packet by itself; what came before it between the same two addresses goes first. */
static void merger_pass(struct merger *merger, const struct packet *packet)
{
	struct merge alone; /* the pieces beyond the first stay as they are: zeroing them would cost more than the rest */

	for (size_t i = 0; i < MERGE_FLOWS; i++) {
		if (merger->flows[i].count > 0 && is_same_pair(&merger->flows[i].first, packet))
			merger_write(merger, &merger->flows[i]);
	}
	merge_start(&alone, packet, packet->length);
	merger_write(merger, &alone);
}

/* Where a flow's next packet goes: its own place, a free one, or the one that has waited longest. */
static struct merge *merger_place(struct merger *merger, const struct packet *packet)
{
	struct merge *free = NULL;

	for (size_t i = 0; i < MERGE_FLOWS; i++) {
		struct merge *merge = &merger->flows[i];

		if (merge->count == 0)
			free = merge;
		else if (is_same_flow(&merge->first, packet))
			return merge;
	}
	if (free == NULL) {
		free = &merger->flows[merger->oldest];
		merger->oldest = (merger->oldest + 1) % MERGE_FLOWS;
		merger_write(merger, free);
	}
	return free;
}

void merger_put(struct merger *merger, const struct packet *packet)
{
	struct merge *merge;
	uint32_t header;

	if (!is_segment(packet, &header) || (merger->no_udp && packet->protocol == IPPROTO_UDP)) {
		merger_pass(merger, packet);
		return;
	}
	merge = merger_place(merger, packet);
	if (merge->count > 0) {
		if (merge_add(merge, packet, header))
			return;
		merger_write(merger, merge);
	}
	merge_start(merge, packet, header);
}

void merger_flush(struct merger *merger)
{
	for (size_t i = 0; i < MERGE_FLOWS; i++)
		merger_write(merger, &merger->flows[i]);
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
