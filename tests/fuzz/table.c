/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes as changes of a table and questions to it, each of twenty bytes: what to do, the length of a prefix,
 * an outer address in one byte, a port in one, an address in sixteen. Answers are compared with a list.
 */
#include "fuzz.h"
#include "lpm.h"

enum { STEP = 20, MOST = 64 };

struct entry {
	uint8_t address[16];
	uint8_t size, length, remote, port;
	bool is_there;
};

static bool holds(const struct entry *entry, const uint8_t *address, size_t size)
{
	if (!entry->is_there || entry->size != size)
		return false;
	for (unsigned int bit = 0; bit < entry->length; bit++) {
		if (((entry->address[bit / 8] ^ address[bit / 8]) >> (7 - bit % 8)) & 1)
			return false;
	}
	return true;
}

static const struct entry *longest(const struct entry *entries, const uint8_t *address, size_t size)
{
	const struct entry *found = NULL;

	for (size_t i = 0; i < MOST; i++) {
		if (holds(&entries[i], address, size) && (found == NULL || entries[i].length > found->length))
			found = &entries[i];
	}
	return found;
}

static struct entry *place_of(struct entry *entries, const struct entry *wanted)
{
	struct entry *free_place = NULL;

	for (size_t i = 0; i < MOST; i++) {
		if (!entries[i].is_there)
			free_place = &entries[i];
		else if (entries[i].size == wanted->size && entries[i].length == wanted->length &&
			 memcmp(entries[i].address, wanted->address, 16) == 0)
			return &entries[i];
	}
	return free_place;
}

static struct entry entry_from(const uint8_t *step)
{
	struct entry entry = {.size = step[0] & 1 ? 16 : 4, .remote = step[2], .port = step[3], .is_there = true};

	entry.length = (uint8_t)(step[1] % (entry.size * 8 + 1));
	for (unsigned int bit = 0; bit < entry.length; bit++)
		entry.address[bit / 8] |= (uint8_t)(step[4 + bit / 8] & (0x80 >> bit % 8));
	return entry;
}

static struct peer peer_of(const struct entry *entry)
{
	struct peer peer = {
		.prefix = key_of(entry->address, entry->size),
		.length = entry->length,
		.size = entry->size,
		.remote_size = entry->remote & 1 ? 16 : 4,
		.port = entry->port,
		.mtu = entry->remote,
	};

	peer.remote[0] = entry->remote;
	return peer;
}

static void require_same(const struct table *table, const struct entry *entries, const uint8_t *address, size_t size)
{
	const struct peer *peer = table_lookup(table, address, size);
	const struct entry *entry = longest(entries, address, size);
	const struct endpoint *endpoint;

	REQUIRE((peer == NULL) == (entry == NULL));
	if (peer == NULL)
		return;
	REQUIRE(peer->length == entry->length && peer->mtu == entry->remote && peer->port == entry->port);
	endpoint = &table->endpoints[peer->endpoint];
	REQUIRE(table_endpoint(table, &endpoint->address.any, endpoint->size) == peer->endpoint);
}

static struct table *change(struct table *old, struct peer *put, size_t put_count, struct prefix *drop, size_t drop_count)
{
	struct table *table;

	REQUIRE(table_build(&table, old, put, put_count, drop, drop_count) == 0);
	table_free(old);
	return table;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct entry entries[MOST] = {{.is_there = false}};
	struct table *table = change(NULL, NULL, 0, NULL, 0);

	for (; size >= STEP; data += STEP, size -= STEP) {
		struct entry wanted = entry_from(data), *place = place_of(entries, &wanted);
		struct peer peer = peer_of(&wanted);
		struct prefix prefix = {.key = peer.prefix, .length = peer.length, .size = peer.size};

		REQUIRE(is_prefix_valid(peer.prefix, peer.length, peer.size));
		if ((data[0] & 6) == 2 && place != NULL && place->is_there) {
			table = change(table, NULL, 0, &prefix, 1);
			place->is_there = false;
		} else if ((data[0] & 6) != 2 && place != NULL) {
			table = change(table, &peer, 1, &prefix, data[0] >> 7);
			*place = wanted;
		}
		require_same(table, entries, data + 4, wanted.size);
		require_same(table, entries, wanted.address, wanted.size);
	}
	table_free(table);
	return 0;
}
