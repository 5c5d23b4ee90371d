/* SPDX-License-Identifier: Apache-2.0 */
/* Packets and super-packets: checksums left to a device, cutting, merging. */
#include "bytes.h"

enum {
	TCP_FLAGS = 13, /* offsets into the TCP header */
	TCP_CHECKSUM = 16,
	UDP_CHECKSUM = 6,
	TCP_FIN = 0x01,
	TCP_PSH = 0x08,
	TCP_ACK = 0x10,
	TCP_ECE = 0x40,
	TCP_CWR = 0x80,
};

/* Transport checksums */

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

uint32_t packet_headers(const struct packet *packet)
{
	uint32_t transport = transport_length(packet);

	return transport == 0 ? 0 : packet->network + transport;
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

static uint8_t offload_type(const struct packet *packet)
{
	if (packet->protocol != IPPROTO_TCP)
		return OFFLOAD_UDP;
	return packet->version == 4 ? OFFLOAD_TCP4 : OFFLOAD_TCP6;
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
		.stride = offload->size,
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

static const uint8_t *payload_of(const struct packet *packet, uint32_t header)
{
	return packet->payload != NULL ? packet->payload : packet->data + header;
}

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
	*header = packet->network + size;
	sum = pseudo_length(pseudo_sum(packet), behind);
	sum = checksum_add(sum, transport, packet->payload != NULL ? size : behind);
	if (packet->payload != NULL)
		sum = checksum_add(sum, packet->payload, behind - size);
	return checksum_fold(sum) == 0xffff;
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

static void add_piece(struct merge *merge, const uint8_t *data, uint32_t length)
{
	struct iovec *last = merge->piece_count > 0 ? &merge->pieces[merge->piece_count - 1] : NULL;

	if (last != NULL && (uint8_t *)last->iov_base + last->iov_len == data) {
		last->iov_len += length;
		return;
	}
	merge->pieces[merge->piece_count++] = (struct iovec){.iov_base = (void *)(uintptr_t)data, .iov_len = length};
}

/* header: all of the packet where it stays alone. */
static void merge_start(struct merge *merge, const struct packet *packet, uint32_t header)
{
	const uint8_t *transport = packet->data + packet->network;
	bool is_tcp = packet->protocol == IPPROTO_TCP && header < packet->length;

	merge->first = *packet;
	merge->piece_count = 0;
	add_piece(merge, packet->data, packet->payload != NULL ? packet_headers(packet) : packet->length);
	if (packet->payload != NULL)
		add_piece(merge, packet->payload, packet->length - packet_headers(packet));
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
	add_piece(merge, payload_of(packet, header), length);
	merge->count++;
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
		.type = offload_type(first),
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
