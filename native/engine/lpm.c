/* SPDX-License-Identifier: Apache-2.0 */
#include "lpm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* An outer address and port, in a form that can be hashed and compared whole. */
struct outer {
	uint8_t address[16];
	uint16_t port; /* in the machine's order */
	uint16_t size;
};

static const uint8_t mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

static uint64_t load_be(const uint8_t *data, size_t size)
{
	uint64_t value = 0;

	for (size_t i = 0; i < size; i++)
		value = value << 8 | data[i];
	return value;
}

struct key key_of(const uint8_t *address, size_t size)
{
	if (size == 4)
		return (struct key){.high = load_be(address, 4) << 32};
	return (struct key){.high = load_be(address, 8), .low = load_be(address + 8, 8)};
}

static int key_compare(struct key a, struct key b)
{
	if (a.high != b.high)
		return a.high < b.high ? -1 : 1;
	if (a.low != b.low)
		return a.low < b.low ? -1 : 1;
	return 0;
}

/* The bits that a prefix of that length leaves free; a shift by the width of a type is not defined. */
static struct key host_bits(uint32_t length)
{
	struct key bits = {.high = UINT64_MAX, .low = UINT64_MAX};

	if (length >= 64) {
		bits.high = 0;
		bits.low = length < 128 ? UINT64_MAX >> (length - 64) : 0;
	} else {
		bits.high = UINT64_MAX >> length;
	}
	return bits;
}

bool is_prefix_valid(struct key key, uint32_t length, size_t size)
{
	struct key bits = host_bits(length);

	return length <= size * 8 && (key.high & bits.high) == 0 && (key.low & bits.low) == 0;
}

static struct key last_of(const struct peer *peer)
{
	struct key bits = host_bits(peer->length);

	return (struct key){.high = peer->prefix.high | bits.high, .low = peer->prefix.low | bits.low};
}

/* Order: family, then address, then the wider prefix first. */
static int order(struct prefix a, struct prefix b)
{
	int compared;

	if (a.size != b.size)
		return a.size < b.size ? -1 : 1;
	compared = key_compare(a.key, b.key);
	return compared != 0 ? compared : (int)a.length - (int)b.length;
}

static struct prefix prefix_of(const struct peer *peer)
{
	return (struct prefix){.key = peer->prefix, .length = peer->length, .size = peer->size};
}

static int compare_prefixes(const void *a, const void *b)
{
	return order(*(const struct prefix *)a, *(const struct prefix *)b);
}

/* qsort keeps no order among equals, and the last put counts: the caller has numbered them in "endpoint". */
static int compare_puts(const void *a, const void *b)
{
	const struct peer *one = a, *other = b;
	int compared = order(prefix_of(one), prefix_of(other));

	if (compared != 0)
		return compared;
	return one->endpoint < other->endpoint ? -1 : one->endpoint > other->endpoint;
}

/* Ranges */

static void ranges_add(struct ranges *ranges, struct key start, uint32_t owner)
{
	size_t count = ranges->count;

	if (count > 0 && key_compare(ranges->starts[count - 1], start) == 0) {
		ranges->owners[count - 1] = owner;
		return;
	}
	ranges->starts[count] = start;
	ranges->owners[count] = owner;
	ranges->count++;
}

/* End the ranges of prefixes that do not reach as far as next (NULL: of all). open: the innermost last. */
static size_t ranges_close(struct ranges *ranges, const struct peer *peers, const uint32_t *open, size_t depth,
			   const struct key *next)
{
	while (depth > 0) {
		struct key last = last_of(&peers[open[depth - 1]]);

		if (next != NULL && key_compare(last, *next) >= 0)
			break;
		depth--;
		last.low++;
		last.high += last.low == 0;
		if (last.low != 0 || last.high != 0) /* else it reached to the last address there is */
			ranges_add(ranges, last, depth > 0 ? open[depth - 1] : RANGE_FREE);
	}
	return depth;
}

static int ranges_build(struct ranges *ranges, const struct peer *peers, uint32_t first, uint32_t end)
{
	uint32_t open[130]; /* prefixes within each other: one a length */
	size_t depth = 0, room = 2 * (size_t)(end - first) + 1;

	ranges->starts = malloc(room * sizeof(*ranges->starts));
	ranges->owners = malloc(room * sizeof(*ranges->owners));
	if (ranges->starts == NULL || ranges->owners == NULL)
		return -ENOMEM;
	ranges_add(ranges, (struct key){0}, RANGE_FREE);
	for (uint32_t i = first; i < end; i++) {
		depth = ranges_close(ranges, peers, open, depth, &peers[i].prefix);
		ranges_add(ranges, peers[i].prefix, i);
		open[depth++] = i;
	}
	ranges_close(ranges, peers, open, depth, NULL);
	return 0;
}

const struct peer *table_lookup(const struct table *table, const uint8_t *address, size_t size)
{
	const struct ranges *ranges = size == 4 ? &table->ipv4 : &table->ipv6;
	struct key key = key_of(address, size);
	const struct key *base = ranges->starts;
	uint32_t owner;

	/* The last start that is not behind the key; without branches that the processor has to guess. */
	for (size_t count = ranges->count; count > 1;) {
		size_t half = count / 2;
		const struct key *middle = base + half;
		bool is_behind = middle->high > key.high || (middle->high == key.high && middle->low > key.low);

		base = is_behind ? base : middle;
		count -= half;
	}
	owner = ranges->owners[base - ranges->starts];
	return owner == RANGE_FREE ? NULL : &table->peers[owner];
}

/* Endpoints */

static uint32_t hash(const struct outer *outer)
{
	uint64_t value = load_be(outer->address, 8) ^ (load_be(outer->address + 8, 8) * 0x9e3779b97f4a7c15u);

	value = (value ^ outer->port) * 0xff51afd7ed558ccdu;
	return (uint32_t)(value >> 32);
}

static bool outer_of_socket(struct outer *ret, const struct sockaddr *address, size_t size)
{
	*ret = (struct outer){.size = 0};
	if (address->sa_family == AF_INET && size >= sizeof(struct sockaddr_in)) {
		struct sockaddr_in from;

		memcpy(&from, address, sizeof(from));
		memcpy(ret->address, &from.sin_addr, 4);
		ret->port = ntohs(from.sin_port);
		ret->size = 4;
	} else if (address->sa_family == AF_INET6 && size >= sizeof(struct sockaddr_in6)) {
		struct sockaddr_in6 from;
		const uint8_t *bytes;

		memcpy(&from, address, sizeof(from));
		bytes = from.sin6_addr.s6_addr;
		ret->size = memcmp(bytes, mapped, sizeof(mapped)) == 0 ? 4 : 16;
		memcpy(ret->address, ret->size == 4 ? bytes + 12 : bytes, ret->size);
		ret->port = ntohs(from.sin6_port);
	}
	return ret->size != 0;
}

static struct outer outer_of_peer(const struct peer *peer)
{
	struct outer outer = {.port = peer->port, .size = peer->remote_size};

	memcpy(outer.address, peer->remote, peer->remote_size);
	return outer;
}

static void endpoint_init(struct endpoint *endpoint, const struct outer *outer)
{
	*endpoint = (struct endpoint){.size = 0};
	if (outer->size == 4) {
		endpoint->address.ipv4.sin_family = AF_INET;
		endpoint->address.ipv4.sin_port = htons(outer->port);
		memcpy(&endpoint->address.ipv4.sin_addr, outer->address, 4);
		endpoint->size = sizeof(endpoint->address.ipv4);
	} else {
		endpoint->address.ipv6.sin6_family = AF_INET6;
		endpoint->address.ipv6.sin6_port = htons(outer->port);
		memcpy(&endpoint->address.ipv6.sin6_addr, outer->address, 16);
		endpoint->size = sizeof(endpoint->address.ipv6);
	}
}

/* The slot that holds an endpoint or could. */
static uint32_t *endpoint_slot(const struct table *table, const struct outer *wanted)
{
	for (uint32_t at = hash(wanted);; at++) {
		uint32_t *slot = &table->slots[at & table->mask];
		const struct endpoint *there;
		struct outer outer;

		if (*slot == 0)
			return slot;
		there = &table->endpoints[*slot - 1];
		if (outer_of_socket(&outer, &there->address.any, there->size) && outer.size == wanted->size &&
		    outer.port == wanted->port && memcmp(outer.address, wanted->address, sizeof(outer.address)) == 0)
			return slot;
	}
}

static int endpoints_build(struct table *table)
{
	uint32_t size = 4, used = 0;

	while (size < 2 * table->count)
		size *= 2;
	table->mask = size - 1;
	table->slots = calloc(size, sizeof(*table->slots));
	table->endpoints = calloc(table->count + 1, sizeof(*table->endpoints));
	if (table->slots == NULL || table->endpoints == NULL)
		return -ENOMEM;
	for (size_t i = 0; i < table->count; i++) {
		struct outer outer = outer_of_peer(&table->peers[i]);
		uint32_t *slot = endpoint_slot(table, &outer);

		if (*slot == 0) {
			endpoint_init(&table->endpoints[used], &outer);
			*slot = ++used;
		}
		table->peers[i].endpoint = *slot - 1;
	}
	return 0;
}

uint32_t table_endpoint(const struct table *table, const struct sockaddr *address, size_t size)
{
	struct outer outer;
	uint32_t slot;

	if (!outer_of_socket(&outer, address, size))
		return ENDPOINT_UNKNOWN;
	slot = *endpoint_slot(table, &outer);
	return slot == 0 ? ENDPOINT_UNKNOWN : slot - 1;
}

/* Tables */

static struct traffic *traffic_create(void)
{
	struct traffic *traffic = aligned_alloc(_Alignof(struct traffic), sizeof(struct traffic));

	if (traffic != NULL)
		memset(traffic, 0, sizeof(*traffic));
	return traffic;
}

static int table_add(struct table *table, const struct peer *peer, struct traffic *traffic)
{
	if (traffic == NULL)
		traffic = traffic_create();
	if (traffic == NULL)
		return -ENOMEM;
	traffic->users++;
	table->peers[table->count] = *peer;
	table->peers[table->count++].traffic = traffic;
	return 0;
}

/* Merge what stood, in order, with what is put, in order, leaving out what goes. */
static int table_merge(struct table *table, const struct table *old, const struct peer *puts, size_t put_count,
		       const struct prefix *drops, size_t drop_count)
{
	size_t old_count = old == NULL ? 0 : old->count, at = 0, put = 0, drop = 0;
	int result = 0;

	while (result == 0 && (at < old_count || put < put_count)) {
		struct traffic *traffic = NULL;
		int compared;

		if (put + 1 < put_count && order(prefix_of(&puts[put]), prefix_of(&puts[put + 1])) == 0) {
			put++;
			continue;
		}
		compared = at == old_count    ? 1
			   : put == put_count ? -1
					      : order(prefix_of(&old->peers[at]), prefix_of(&puts[put]));
		if (compared >= 0) {
			if (compared == 0)
				traffic = old->peers[at++].traffic;
			result = table_add(table, &puts[put++], traffic);
			continue;
		}
		while (drop < drop_count && order(drops[drop], prefix_of(&old->peers[at])) < 0)
			drop++;
		if (drop == drop_count || order(drops[drop], prefix_of(&old->peers[at])) != 0)
			result = table_add(table, &old->peers[at], old->peers[at].traffic);
		at++;
	}
	return result;
}

static int table_index(struct table *table)
{
	uint32_t split = 0, count = (uint32_t)table->count;
	int result;

	while (split < count && table->peers[split].size == 4)
		split++;
	result = ranges_build(&table->ipv4, table->peers, 0, split);
	if (result == 0)
		result = ranges_build(&table->ipv6, table->peers, split, count);
	return result == 0 ? endpoints_build(table) : result;
}

int table_build(struct table **ret, const struct table *old, struct peer *puts, size_t put_count, struct prefix *drops,
		size_t drop_count)
{
	size_t room = (old == NULL ? 0 : old->count) + put_count;
	struct table *table;
	int result = -ENOMEM;

	if (room >= UINT32_MAX / 4)
		return -ENOMEM;
	for (size_t i = 0; i < put_count; i++)
		puts[i].endpoint = (uint32_t)i;
	if (put_count > 1)
		qsort(puts, put_count, sizeof(*puts), compare_puts);
	if (drop_count > 1)
		qsort(drops, drop_count, sizeof(*drops), compare_prefixes);
	table = calloc(1, sizeof(*table));
	if (table == NULL)
		return -ENOMEM;
	table->peers = malloc((room + 1) * sizeof(*table->peers));
	if (table->peers != NULL)
		result = table_merge(table, old, puts, put_count, drops, drop_count);
	if (result == 0)
		result = table_index(table);
	if (result != 0) {
		table_free(table);
		return result;
	}
	*ret = table;
	return 0;
}

void table_free(struct table *table)
{
	if (table == NULL)
		return;
	for (size_t i = 0; i < table->count; i++) {
		if (--table->peers[i].traffic->users == 0)
			free(table->peers[i].traffic);
	}
	free(table->peers);
	free(table->ipv4.starts);
	free(table->ipv4.owners);
	free(table->ipv6.starts);
	free(table->ipv6.owners);
	free(table->endpoints);
	free(table->slots);
	free(table);
}
