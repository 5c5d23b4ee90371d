/* SPDX-License-Identifier: Apache-2.0 */
#include "worker.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
	ICMP_PER_SECOND = 1000, /* RFC 4443 section 2.4 (f) wants a limit, RFC 1812 section 4.3.2.8 the same */
	NEWS_PER_SECOND = 100,
	PACE_MS = 20,		/* how often a worker looks how busy it is */
	FAST_PER_MS = 30,	/* packets in both directions: some 350 Mbit/s of TCP in packets of 1500 bytes */
};

/*
 * The table is written down before it is used, and is the right one only if it still is the table afterwards:
 * whoever replaces it looks at what is written down after it has put the new one in place.
 */
const struct table *worker_enter(struct worker *worker)
{
	struct engine *engine = worker->engine;
	struct table *table = atomic_load(&engine->table), *again;

	for (;;) {
		atomic_store(&worker->reading, table);
		again = atomic_load(&engine->table);
		if (again == table)
			return table;
		table = again;
	}
}

void worker_leave(struct worker *worker)
{
	atomic_store_explicit(&worker->reading, NULL, memory_order_release);
}

bool worker_should_stop(const struct worker *worker)
{
	return atomic_load_explicit(&worker->engine->stopping, memory_order_relaxed);
}

/* Packets that the engine has carried, in both directions. */
static uint64_t carried(struct engine *engine)
{
	uint64_t packets = 0;

	for (size_t i = 0; i < engine->worker_count; i++) {
		packets += atomic_load_explicit(&engine->workers[i].counts[COUNT_TX_PACKETS], memory_order_relaxed) +
			   atomic_load_explicit(&engine->workers[i].counts[COUNT_RX_PACKETS], memory_order_relaxed);
	}
	return packets;
}

/* The calls themselves: musl's functions of these names do nothing. */
static long scheduler(void)
{
	return syscall(SYS_sched_getscheduler, 0);
}

static bool set_scheduler(int policy)
{
	static const struct sched_param none = {.sched_priority = 0};

	return syscall(SYS_sched_setscheduler, 0, policy, &none) == 0;
}

/*
 * While the engine carries many packets, its workers do not take the processor from whoever sends or reads them
 * (SCHED_BATCH): those get further at a time, and the workers find more at a time, and find it in the cache. Of
 * few packets each is worth an interruption. All workers do the same: acknowledgements are few, and come with many.
 * A policy that somebody else has chosen is kept.
 */
static void follow_pace(struct worker *worker)
{
	struct pace *pace = &worker->pace;
	struct timespec now;
	uint64_t ms, packets;
	bool is_fast;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	ms = (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
	if (ms - pace->at_ms < PACE_MS)
		return;
	packets = carried(worker->engine);
	is_fast = packets - pace->packets >= (ms - pace->at_ms) * FAST_PER_MS;
	pace->at_ms = ms;
	pace->packets = packets;
	if (is_fast && !pace->is_batch && scheduler() == SCHED_OTHER) {
		pace->is_batch = set_scheduler(SCHED_BATCH);
	} else if (!is_fast && pace->is_batch) {
		if (scheduler() == SCHED_BATCH)
			(void)set_scheduler(SCHED_OTHER);
		pace->is_batch = false;
	}
}

bool worker_wait(struct worker *worker, int fd, short *events, int timeout_ms)
{
	struct pollfd polled[2] = {
		{.fd = worker->engine->stop_event, .events = POLLIN},
		{.fd = fd, .events = *events},
	};

	follow_pace(worker);
	if (worker->pace.is_batch && timeout_ms < 0)
		timeout_ms = PACE_MS; /* so that the first packet after many finds an ordinary thread */
	if (poll(polled, 2, timeout_ms) < 0 && errno != EINTR) {
		worker_fail(worker, errno, "poll");
		return false;
	}
	*events = polled[1].revents;
	return !worker_should_stop(worker);
}

void worker_drain(int socket)
{
	char control[512];
	struct msghdr header = {.msg_control = control, .msg_controllen = sizeof(control)};

	while (recvmsg(socket, &header, MSG_ERRQUEUE | MSG_DONTWAIT) >= 0)
		header = (struct msghdr){.msg_control = control, .msg_controllen = sizeof(control)};
}

void worker_count(struct worker *worker, enum counter counter, uint64_t more)
{
	atomic_uint_least64_t *count = &worker->counts[counter];

	atomic_store_explicit(count, atomic_load_explicit(count, memory_order_relaxed) + more, memory_order_relaxed);
}

void worker_drop(struct worker *worker, enum drop reason, uint64_t packets)
{
	worker_count(worker, (enum counter)(COUNT_DROPS + (unsigned int)reason), packets);
}

static bool is_due(struct ration *ration, unsigned int per_second)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	if (now.tv_sec != ration->second)
		*ration = (struct ration){.second = now.tv_sec};
	return ration->used < per_second && ++ration->used;
}

static void tell(struct worker *worker)
{
	const uint64_t one = 1;
	/* It cannot fail but by being full, and then it is readable already. */
	ssize_t ignored = write(worker->engine->news_event, &one, sizeof(one));

	(void)ignored;
}

void worker_tell(struct worker *worker)
{
	if (is_due(&worker->news, NEWS_PER_SECOND))
		tell(worker);
}

void worker_fail(struct worker *worker, int error, const char *what)
{
	struct engine *engine = worker->engine;

	pthread_mutex_lock(&engine->failing);
	if (engine->failure.error == 0) {
		engine->failure.error = error;
		snprintf(engine->failure.what, sizeof(engine->failure.what), "%s", what);
	}
	pthread_mutex_unlock(&engine->failing);
	tell(worker);
}

int worker_write(struct worker *worker, const struct offload *offload, struct iovec *pieces, size_t count)
{
	struct iovec all[MERGE_PIECES + 2];
	ssize_t written;

	if (count > MERGE_PIECES + 1)
		return -EINVAL;
	all[0] = (struct iovec){.iov_base = (void *)(uintptr_t)offload, .iov_len = sizeof(*offload)};
	memcpy(all + 1, pieces, count * sizeof(*pieces));
	worker_count(worker, COUNT_TUN_WRITES, 1);
	do {
		written = writev(worker->tun, all, (int)count + 1);
	} while (written < 0 && errno == EINTR);
	if (written >= 0)
		return 0;
	if (errno == EBADFD || errno == EBADF || errno == ENODEV) {
		worker_fail(worker, errno, "write to the TUN device");
		return -EBADFD;
	}
	return -errno;
}

void worker_icmp(struct worker *worker, const struct packet *packet, enum icmp kind, uint32_t mtu)
{
	const struct engine *engine = worker->engine;
	const struct offload plain = {.type = OFFLOAD_NONE};
	const uint8_t *source = packet->version == 4 ? engine->source4 : engine->source6;
	uint8_t answer[ICMP_MAX];
	struct iovec piece = {.iov_base = answer};

	if (!(packet->version == 4 ? engine->has_source4 : engine->has_source6))
		return;
	piece.iov_len = packet_icmp(packet, kind, mtu, source, answer);
	if (piece.iov_len == 0)
		return;
	if (!is_due(&worker->icmp, ICMP_PER_SECOND)) {
		worker_count(worker, COUNT_ICMP_LIMITED, 1);
		return;
	}
	if (worker_write(worker, &plain, &piece, 1) == 0)
		worker_count(worker, COUNT_ICMP, 1);
}
