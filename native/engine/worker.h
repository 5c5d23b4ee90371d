/* SPDX-License-Identifier: Apache-2.0 */
/* What transmitters and receivers share; the engine's own. */
#ifndef LODEN_WORKER_H
#define LODEN_WORKER_H

#include "engine.h"

#include <pthread.h>
#include <time.h>

/* So many in a second. */
struct ration {
	time_t second;
	unsigned int used;
};

/* How busy the engine was when a worker last looked, and what the worker made of it. */
struct pace {
	uint64_t at_ms;	  /* CLOCK_MONOTONIC_COARSE */
	uint64_t packets; /* carried until then */
	bool is_batch;	  /* scheduled so by its own choice */
};

/*
 * How the segments of a connection are read if they are like those before them: so that what the next system call
 * takes, payloads or whole datagrams, lies side by side and is copied at once. In pieces of a segment that takes three
 * times as long where the kernel's memory is not in the cache.
 */
struct layout {
	uint32_t header; /* bytes of a segment's headers; 0: nothing is expected */
	uint32_t size;	 /* payload bytes of a segment */
};

#define LAYOUT_SEGMENTS 64u /* the most in 64 KiB that are worth it */

/* What to expect behind segments of such sizes; one of them fits into 64 KiB. */
static inline struct layout layout_of(uint32_t header, uint32_t size)
{
	if (size * LAYOUT_SEGMENTS <= PACKET_MAX || header + size > PACKET_MAX)
		return (struct layout){0};
	return (struct layout){.header = header, .size = size};
}

struct worker {
	struct engine *engine;
	void (*run)(struct worker *worker);
	pthread_t thread;
	bool is_running;
	char name[16];
	int tun;
	int udp[2]; /* IPv4, IPv6; -1: none. A receiver's own is the first. */
	int probe[2];
	struct ration icmp, news;
	struct pace pace;
	/*
	 * The table that this worker may be looking at: it is not freed as long as it stands here (a hazard
	 * pointer). NULL whenever the worker waits, so that waiting workers hold nothing.
	 */
	_Alignas(64) _Atomic(struct table *) reading;
	/* Written by this worker alone. */
	_Alignas(64) atomic_uint_least64_t counts[COUNTERS];
};

struct engine {
	struct worker *workers;
	size_t worker_count;
	int tun[ENGINE_DESCRIPTORS];
	int udp[ENGINE_DESCRIPTORS];
	size_t tun_count, udp_count;
	uint8_t source4[4], source6[16];
	bool has_source4, has_source6, allow_unknown;
	int stop_event; /* readable: workers end */
	int news_event;
	_Atomic(struct table *) table;
	atomic_bool stopping;
	pthread_mutex_t control; /* changes of the table, start and stop */
	struct table *retired;	 /* replaced, and perhaps still being read */
	pthread_mutex_t failing;
	struct engine_failure failure;
};

void transmit(struct worker *worker);
void receive(struct worker *worker);

/* Between these two the table stays. */
const struct table *worker_enter(struct worker *worker);
void worker_leave(struct worker *worker);

/*
 * Whether to go on. Waits until the descriptor is ready, the engine stops, or so many ms have passed (-1: for
 * ever). events: what to wait for, then what came.
 */
bool worker_wait(struct worker *worker, int fd, short *events, int timeout_ms);
bool worker_should_stop(const struct worker *worker);

/* Take away what ICMP said about datagrams of ours, if the socket's owner wants to have it. */
void worker_drain(int socket);

void worker_count(struct worker *worker, enum counter counter, uint64_t more);
void worker_drop(struct worker *worker, enum drop reason, uint64_t packets);
void worker_fail(struct worker *worker, int error, const char *what);
/* Make the eventfd readable because of a packet; not so often that its reader had nothing else to do. */
void worker_tell(struct worker *worker);

/* Write one packet to the TUN device: 0, or a negative errno; -EBADFD: the device is gone, and said so. */
int worker_write(struct worker *worker, const struct offload *offload, struct iovec *pieces, size_t count);

/* Answer a packet with an ICMP error, if it deserves one and there were not too many. */
void worker_icmp(struct worker *worker, const struct packet *packet, enum icmp kind, uint32_t mtu);

static inline void traffic_add(atomic_uint_least64_t *count, uint64_t more)
{
	atomic_fetch_add_explicit(count, more, memory_order_relaxed);
}

#endif
