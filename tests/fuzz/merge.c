/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes as packets that come one after the other, each behind its length in two bytes. The first byte of all
 * says whether their checksums are made right, without which few are merged, and whether their payloads are moved away
 * from their headers. What was merged is cut again: every packet has to come out as it went in.
 */
#include "fuzz.h"
#include "packet.h"

enum { MOST = 200 };

struct given {
	uint8_t *data;
	uint8_t *payload; /* where it was moved to, or NULL */
	uint32_t length;
	uint8_t *as_it_was;
};

struct state {
	struct given given[MOST];
	size_t count;
	size_t came_out;
};

static void mend_checksums(struct packet *packet)
{
	uint8_t *transport = packet->data + packet->network;
	uint32_t behind = packet->length - packet->network, place = packet->protocol == 6 ? 16 : 6;
	uint8_t pseudo[4] = {0, packet->protocol, (uint8_t)(behind >> 8), (uint8_t)behind};
	uint64_t sum = checksum_add(0, packet_source(packet), packet->version == 4 ? 8 : 32);
	uint16_t checksum = 0;

	if ((packet->protocol != 6 && packet->protocol != 17) || behind < place + 2 || packet->is_fragment)
		return;
	memcpy(transport + place, &checksum, sizeof(checksum));
	checksum = (uint16_t)~checksum_fold(checksum_add(checksum_add(sum, pseudo, 4), transport, behind));
	memcpy(transport + place, &checksum, sizeof(checksum));
}

static void mend_header(uint8_t *data, size_t length)
{
	size_t header = (data[0] & 15u) * 4u;
	uint16_t checksum = 0;

	if (data[0] >> 4 != 4 || header < 20 || header > length)
		return;
	memcpy(data + 10, &checksum, sizeof(checksum));
	checksum = (uint16_t)~checksum_fold(checksum_add(0, data, header));
	memcpy(data + 10, &checksum, sizeof(checksum));
}

/* The identification and the checksum over it are free where a packet may not be fragmented. */
static void forget_identification(uint8_t *data)
{
	if (data[0] >> 4 == 4 && (data[6] & 0x40)) {
		memset(data + 4, 0, 2);
		memset(data + 10, 0, 2);
	}
}

static struct given *find(struct state *state, const uint8_t *data, size_t length)
{
	for (size_t i = 0; i < state->count; i++) {
		struct given *given = &state->given[i];

		if (given->as_it_was != NULL && given->length == length && memcmp(given->as_it_was, data, length) == 0)
			return given;
	}
	return NULL;
}

static void free_given(struct given *given)
{
	free(given->data);
	free(given->payload);
}

static void require_known(struct state *state, uint8_t *data, size_t length)
{
	struct packet packet;
	struct given *given;

	REQUIRE(packet_parse(&packet, data, length) == DROP_NONE);
	forget_identification(data);
	given = find(state, data, length);
	REQUIRE(given != NULL);
	free(given->as_it_was);
	given->as_it_was = NULL;
	state->came_out++;
}

static uint8_t *whole_of(const struct merge *merge, size_t *length)
{
	uint8_t *whole;
	size_t used = 0;

	*length = 0;
	for (uint32_t i = 0; i < merge->piece_count; i++)
		*length += merge->pieces[i].iov_len;
	whole = malloc(*length);
	REQUIRE(whole != NULL);
	for (uint32_t i = 0; i < merge->piece_count; i++) {
		memcpy(whole + used, merge->pieces[i].iov_base, merge->pieces[i].iov_len);
		used += merge->pieces[i].iov_len;
	}
	return whole;
}

static void on_write(void *context, const struct offload *offload, struct merge *merge)
{
	struct state *state = context;
	struct packet packet;
	struct cut cut;
	size_t length;
	uint8_t *whole;

	REQUIRE(merge->count > 0 && merge->count <= MERGE_PIECES);
	REQUIRE(merge->piece_count > 0 && merge->piece_count <= MERGE_PIECES + 1);
	whole = whole_of(merge, &length);
	REQUIRE(length <= PACKET_MAX);
	if (offload->type == OFFLOAD_NONE) {
		REQUIRE(merge->count == 1 && offload->flags == 0);
		require_known(state, whole, length);
		free(whole);
		return;
	}
	REQUIRE(packet_parse(&packet, whole, length) == DROP_NONE && packet.length == length);
	REQUIRE(cut_init(&cut, offload, &packet) == DROP_NONE);
	REQUIRE(cut.count == merge->count);
	for (uint32_t i = 0; i < cut.count; i++) {
		uint8_t *segment = malloc(cut.header + cut.size);
		const uint8_t *payload = cut.payload + (size_t)i * cut.size;
		uint32_t size = cut_length(&cut, i);

		REQUIRE(segment != NULL);
		cut_header(&cut, i, payload, size, segment);
		memcpy(segment + cut.header, payload, size);
		require_known(state, segment, cut.header + size);
		free(segment);
	}
	free(whole);
}

/* Leave nothing of the payload behind the headers. */
static uint8_t *move_payload(struct packet *packet)
{
	uint32_t header = packet_headers(packet);
	uint8_t *copy;

	if (header == 0 || header == packet->length)
		return NULL;
	copy = copy_of(packet->data + header, packet->length - header);
	memset(packet->data + header, 0xee, packet->length - header);
	packet->payload = copy;
	return copy;
}

static void put(struct state *state, struct merger *merger, const uint8_t *data, size_t length, bool mend, bool apart)
{
	struct given *given = &state->given[state->count];
	uint8_t *copy = copy_of(data, length);
	struct packet packet;

	if (mend && length >= 20)
		mend_header(copy, length);
	if (packet_parse(&packet, copy, length) != DROP_NONE) {
		free(copy);
		return;
	}
	if (mend)
		mend_checksums(&packet);
	given->data = copy;
	given->length = packet.length;
	given->as_it_was = copy_of(copy, packet.length);
	forget_identification(given->as_it_was);
	given->payload = apart ? move_payload(&packet) : NULL;
	state->count++;
	merger_put(merger, &packet);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct merger merger;
	static struct state state;
	size_t at = 1;

	if (size < 1)
		return 0;
	state.count = 0;
	state.came_out = 0;
	merger_init(&merger, on_write, &state);
	while (size - at >= 2 && state.count < MOST) {
		size_t length = (size_t)data[at] << 8 | data[at + 1];

		at += 2;
		if (length > size - at)
			length = size - at;
		put(&state, &merger, data + at, length, (data[0] & 1) != 0, (data[0] & 2) != 0);
		at += length;
	}
	merger_flush(&merger);
	REQUIRE(state.came_out == state.count);
	for (size_t i = 0; i < state.count; i++)
		free_given(&state.given[i]);
	return 0;
}
