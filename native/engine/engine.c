/* SPDX-License-Identifier: Apache-2.0 */
/* The engine's life, its table and its figures; packets are in transmit.c and receive.c. */
#include "worker.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/udp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#ifndef UDP_GRO
#define UDP_GRO 104 /* linux/udp.h */
#endif

#define CLEANUP(function) __attribute__((cleanup(function)))

static const char *const counter_names[COUNT_DROPS] = {
	[COUNT_TUN_PACKETS] = "tun_packets",
	[COUNT_UDP_PACKETS] = "udp_packets",
	[COUNT_TX_PACKETS] = "tx_packets",
	[COUNT_TX_BYTES] = "tx_bytes",
	[COUNT_RX_PACKETS] = "rx_packets",
	[COUNT_RX_BYTES] = "rx_bytes",
	[COUNT_SEGMENTS] = "segments",
	[COUNT_MERGED] = "merged",
	[COUNT_FRAGMENTS] = "fragments",
	[COUNT_ICMP] = "icmp",
	[COUNT_ICMP_LIMITED] = "icmp_limited",
	[COUNT_UDP_SENDS] = "udp_sends",
	[COUNT_UDP_RECEIVES] = "udp_receives",
	[COUNT_TUN_WRITES] = "tun_writes",
};

const char *counter_name(unsigned int counter)
{
	if (counter < COUNT_DROPS)
		return counter_names[counter];
	return counter < COUNTERS && counter != COUNT_DROPS ? drop_names[counter - COUNT_DROPS] : NULL;
}

static void lock_release(pthread_mutex_t **lock)
{
	pthread_mutex_unlock(*lock);
}

static pthread_mutex_t *lock_take(pthread_mutex_t *lock)
{
	pthread_mutex_lock(lock);
	return lock;
}

/* Until the end of the block. */
#define WITH_LOCK(lock) pthread_mutex_t *held CLEANUP(lock_release) __attribute__((unused)) = lock_take(lock)

/* Descriptors */

static void close_all(int *fds, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		if (fds[i] >= 0)
			close(fds[i]);
		fds[i] = -1;
	}
}

/* Duplicates; the count of those that are open is right also after a failure. */
static int duplicate(int *fds, size_t *count, const int *from, size_t from_count)
{
	for (*count = 0; *count < from_count; ++*count) {
		int flags, fd = fcntl(from[*count], F_DUPFD_CLOEXEC, 0);

		if (fd < 0)
			return -errno;
		fds[*count] = fd;
		flags = fcntl(fd, F_GETFL);
		if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0) {
			++*count;
			return -errno;
		}
	}
	return 0;
}

static int socket_family(int fd)
{
	int family = AF_UNSPEC, type = 0;
	socklen_t size = sizeof(int);

	if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &size) < 0)
		return -errno;
	size = sizeof(int);
	if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) < 0)
		return -errno;
	return type == SOCK_DGRAM && (family == AF_INET || family == AF_INET6) ? family : -EPROTOTYPE;
}

/* The number-th socket of a family, counted round; -1: there is none. */
static int socket_of_family(const struct engine *engine, int family, size_t number)
{
	int found[ENGINE_DESCRIPTORS];
	size_t count = 0;

	for (size_t i = 0; i < engine->udp_count; i++) {
		if (socket_family(engine->udp[i]) == family)
			found[count++] = engine->udp[i];
	}
	return count == 0 ? -1 : found[number % count];
}

static int prepare_sockets(const int *sockets, size_t count)
{
	const int on = 1;

	for (size_t i = 0; i < count; i++) {
		int family = socket_family(sockets[i]);

		if (family < 0)
			return family;
		/* A kernel that cannot put datagrams together gives them one by one. */
		(void)setsockopt(sockets[i], IPPROTO_UDP, UDP_GRO, &on, sizeof(on));
	}
	return 0;
}

/* Life */

static void worker_init(struct worker *worker, struct engine *engine, size_t number)
{
	bool is_receiver = number >= engine->tun_count;
	size_t index = is_receiver ? number - engine->tun_count : number;

	worker->engine = engine;
	worker->run = is_receiver ? receive : transmit;
	worker->probe[0] = -1;
	worker->probe[1] = -1;
	snprintf(worker->name, sizeof(worker->name), "loden-%s-%u", is_receiver ? "rx" : "tx", (uint8_t)index);
	if (is_receiver) {
		worker->tun = engine->tun[index % engine->tun_count];
		worker->udp[0] = engine->udp[index];
		worker->udp[1] = -1;
		return;
	}
	worker->tun = engine->tun[index];
	worker->udp[0] = socket_of_family(engine, AF_INET, index);
	worker->udp[1] = socket_of_family(engine, AF_INET6, index);
	/* A kernel without IPv6 opens no such socket, and has no such path to ask for either. */
	worker->probe[0] = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	worker->probe[1] = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
}

static int engine_init(struct engine *engine, const struct engine_config *config)
{
	struct table *table;
	size_t count;
	int result;

	engine->allow_unknown = config->allow_unknown;
	engine->has_source4 = config->source4 != NULL;
	if (config->source4 != NULL)
		memcpy(engine->source4, config->source4, sizeof(engine->source4));
	engine->has_source6 = config->source6 != NULL;
	if (config->source6 != NULL)
		memcpy(engine->source6, config->source6, sizeof(engine->source6));
	engine->stop_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	engine->news_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (engine->stop_event < 0 || engine->news_event < 0)
		return -errno;
	result = duplicate(engine->tun, &engine->tun_count, config->tun, config->tun_count);
	if (result == 0)
		result = duplicate(engine->udp, &engine->udp_count, config->udp, config->udp_count);
	if (result == 0)
		result = prepare_sockets(engine->udp, engine->udp_count);
	if (result == 0)
		result = table_build(&table, NULL, NULL, 0, NULL, 0);
	if (result < 0)
		return result;
	atomic_init(&engine->table, table);
	count = engine->tun_count + engine->udp_count;
	engine->workers = aligned_alloc(_Alignof(struct worker), count * sizeof(*engine->workers));
	if (engine->workers == NULL)
		return -ENOMEM;
	memset(engine->workers, 0, count * sizeof(*engine->workers));
	for (; engine->worker_count < count; engine->worker_count++)
		worker_init(&engine->workers[engine->worker_count], engine, engine->worker_count);
	return 0;
}

static void engine_deinit(struct engine *engine)
{
	engine_stop(engine);
	for (size_t i = 0; i < engine->worker_count; i++)
		close_all(engine->workers[i].probe, 2);
	free(engine->workers);
	close_all(engine->tun, engine->tun_count);
	close_all(engine->udp, engine->udp_count);
	close_all(&engine->stop_event, 1);
	close_all(&engine->news_event, 1);
	while (engine->retired != NULL) {
		struct table *table = engine->retired;

		engine->retired = table->next;
		table_free(table);
	}
	table_free(atomic_load(&engine->table));
	pthread_mutex_destroy(&engine->control);
	pthread_mutex_destroy(&engine->failing);
}

int engine_create(struct engine **ret, const struct engine_config *config)
{
	struct engine *engine;
	int result;

	if (config->tun_count == 0 || config->tun_count > ENGINE_DESCRIPTORS || config->udp_count == 0 ||
	    config->udp_count > ENGINE_DESCRIPTORS)
		return -EINVAL;
	engine = calloc(1, sizeof(*engine));
	if (engine == NULL)
		return -ENOMEM;
	pthread_mutex_init(&engine->control, NULL);
	pthread_mutex_init(&engine->failing, NULL);
	engine->stop_event = -1;
	engine->news_event = -1;
	result = engine_init(engine, config);
	if (result < 0) {
		engine_destroy(engine);
		return result;
	}
	*ret = engine;
	return 0;
}

void engine_destroy(struct engine *engine)
{
	engine_deinit(engine);
	free(engine);
}

static void *worker_main(void *argument)
{
	struct worker *worker = argument;

	worker->run(worker);
	return NULL;
}

/* Signals are for the threads that expect them. */
static int worker_start(struct worker *worker)
{
	sigset_t all, before;
	int result;

	worker->pace = (struct pace){0}; /* a new thread is an ordinary one */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	result = pthread_create(&worker->thread, NULL, worker_main, worker);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (result != 0)
		return -result;
	worker->is_running = true;
	(void)pthread_setname_np(worker->thread, worker->name);
	return 0;
}

static void stop_locked(struct engine *engine)
{
	const uint64_t one = 1;
	uint64_t taken;
	ssize_t ignored;

	atomic_store(&engine->stopping, true);
	ignored = engine->stop_event < 0 ? 0 : write(engine->stop_event, &one, sizeof(one));
	for (size_t i = 0; i < engine->worker_count; i++) {
		if (engine->workers[i].is_running)
			pthread_join(engine->workers[i].thread, NULL);
		engine->workers[i].is_running = false;
	}
	ignored = engine->stop_event < 0 ? 0 : read(engine->stop_event, &taken, sizeof(taken));
	(void)ignored;
}

static void forget_failure(struct engine *engine)
{
	WITH_LOCK(&engine->failing);

	engine->failure.error = 0;
}

int engine_start(struct engine *engine)
{
	WITH_LOCK(&engine->control);

	if (engine->workers[0].is_running)
		return 0;
	forget_failure(engine);
	atomic_store(&engine->stopping, false);
	for (size_t i = 0; i < engine->worker_count; i++) {
		int result = worker_start(&engine->workers[i]);

		if (result < 0) {
			stop_locked(engine);
			return result;
		}
	}
	return 0;
}

void engine_stop(struct engine *engine)
{
	WITH_LOCK(&engine->control);

	stop_locked(engine);
}

/* The table */

static bool is_being_read(const struct engine *engine, const struct table *table)
{
	for (size_t i = 0; i < engine->worker_count; i++) {
		if (atomic_load(&engine->workers[i].reading) == table)
			return true;
	}
	return false;
}

/* Free what nobody reads any more: at most one table for each worker stays. Returns how many do. */
static size_t reap_locked(struct engine *engine)
{
	struct table **place = &engine->retired;
	size_t left = 0;

	while (*place != NULL) {
		struct table *table = *place;

		if (is_being_read(engine, table)) {
			place = &table->next;
			left++;
			continue;
		}
		*place = table->next;
		table_free(table);
	}
	return left;
}

int engine_change(struct engine *engine, struct peer *puts, size_t put_count, struct prefix *drops, size_t drop_count)
{
	WITH_LOCK(&engine->control);
	struct table *old = atomic_load(&engine->table), *table;
	int result = table_build(&table, old, puts, put_count, drops, drop_count);

	if (result < 0)
		return result;
	atomic_store(&engine->table, table);
	old->next = engine->retired;
	engine->retired = old;
	reap_locked(engine);
	return 0;
}

int engine_peers(struct engine *engine, struct peer_report **ret, size_t *count)
{
	WITH_LOCK(&engine->control);
	const struct table *table = atomic_load(&engine->table);
	struct peer_report *reports = malloc((table->count + 1) * sizeof(*reports));

	if (reports == NULL)
		return -ENOMEM;
	for (size_t i = 0; i < table->count; i++) {
		struct traffic *traffic = table->peers[i].traffic;

		reports[i] = (struct peer_report){
			.peer = table->peers[i],
			.tx_packets = atomic_load_explicit(&traffic->tx_packets, memory_order_relaxed),
			.tx_bytes = atomic_load_explicit(&traffic->tx_bytes, memory_order_relaxed),
			.rx_packets = atomic_load_explicit(&traffic->rx_packets, memory_order_relaxed),
			.rx_bytes = atomic_load_explicit(&traffic->rx_bytes, memory_order_relaxed),
		};
	}
	*count = table->count;
	*ret = reports;
	return 0;
}

/* Figures */

void engine_counters(struct engine *engine, uint64_t *counts, size_t *tables)
{
	WITH_LOCK(&engine->control);

	memset(counts, 0, COUNTERS * sizeof(*counts));
	for (size_t i = 0; i < engine->worker_count; i++) {
		for (size_t j = 0; j < COUNTERS; j++)
			counts[j] += atomic_load_explicit(&engine->workers[i].counts[j], memory_order_relaxed);
	}
	*tables = 1 + reap_locked(engine);
}

int engine_fileno(const struct engine *engine)
{
	return engine->news_event;
}

struct engine_failure engine_failure(struct engine *engine)
{
	WITH_LOCK(&engine->failing);

	return engine->failure;
}
