/* SPDX-License-Identifier: Apache-2.0 */
/* Any bytes as a packet: checked, forwarded, fragmented and answered. Two bytes in front choose the MTU. */
#include "fuzz.h"
#include "packet.h"

static void answer(const struct packet *packet, uint32_t mtu)
{
	static const uint8_t source[16] = {10, 5, 1};
	uint8_t *out = malloc(ICMP_MAX);
	struct packet again;

	REQUIRE(out != NULL);
	for (int kind = ICMP_NO_ROUTE; kind <= ICMP_TOO_BIG; kind++) {
		size_t length = packet_icmp(packet, (enum icmp)kind, mtu, source, out);

		REQUIRE(length <= ICMP_MAX);
		if (length > 0) {
			REQUIRE(packet_parse(&again, out, length) == DROP_NONE);
			REQUIRE(again.length == length);
			REQUIRE(packet_icmp(&again, (enum icmp)kind, mtu, source, out) == 0);
		}
	}
	free(out);
}

static void fragment(const struct packet *packet, uint32_t mtu)
{
	uint8_t *out = malloc(mtu > 0 ? mtu : 1);
	uint32_t offset = 0, payload = 0;
	size_t length;

	REQUIRE(out != NULL);
	while ((length = packet_fragment(packet, mtu, &offset, out, mtu)) > 0) {
		struct packet again;

		REQUIRE(length <= mtu);
		REQUIRE(packet_parse(&again, out, length) == DROP_NONE);
		payload += again.length - again.network;
		REQUIRE(payload == offset);
	}
	REQUIRE(offset == 0 || offset == packet->length - packet->network);
	free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct packet packet;
	uint32_t mtu;
	uint8_t *copy;

	if (size < 2)
		return 0;
	mtu = (uint32_t)data[0] << 8 | data[1];
	copy = copy_of(data + 2, size - 2);
	if (packet_parse(&packet, copy, size - 2) == DROP_NONE) {
		REQUIRE(packet.length <= size - 2 && packet.network <= packet.length);
		answer(&packet, mtu);
		if (packet.version == 4)
			fragment(&packet, mtu);
		if (packet_forward(&packet) == DROP_NONE)
			REQUIRE(packet_parse(&packet, copy, packet.length) == DROP_NONE);
	}
	free(copy);
	return 0;
}
