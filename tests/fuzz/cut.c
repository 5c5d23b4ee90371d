/* SPDX-License-Identifier: Apache-2.0 */
/* Any bytes as what a TUN device gives: a virtio header and a packet, which is finished or cut. */
#include "fuzz.h"
#include "packet.h"

static void require_whole(const struct cut *cut, const struct packet *packet)
{
	uint32_t payload = 0;

	REQUIRE(cut->header + cut->total == packet->length);
	for (uint32_t i = 0; i < cut->count; i++) {
		uint32_t length = cut_length(cut, i);
		uint8_t *segment = malloc(cut->header + length);
		struct packet again;

		REQUIRE(segment != NULL);
		REQUIRE(length > 0 && length <= cut->size && length <= cut->total - payload);
		cut_header(cut, i, cut->payload + payload, length, segment);
		memcpy(segment + cut->header, cut->payload + payload, length);
		REQUIRE(packet_parse(&again, segment, cut->header + length) == DROP_NONE);
		REQUIRE(again.length == cut->header + length && again.network == packet->network);
		payload += length;
		free(segment);
	}
	REQUIRE(payload == cut->total);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct offload offload;
	struct packet packet;
	struct cut cut;
	uint8_t *copy;

	if (size < sizeof(offload))
		return 0;
	memcpy(&offload, data, sizeof(offload));
	size -= sizeof(offload);
	copy = copy_of(data + sizeof(offload), size);
	if (packet_parse(&packet, copy, size) == DROP_NONE) {
		if (offload.type != OFFLOAD_NONE && cut_init(&cut, &offload, &packet) == DROP_NONE)
			require_whole(&cut, &packet);
		(void)offload_finish(&offload, &packet);
	}
	free(copy);
	return 0;
}
