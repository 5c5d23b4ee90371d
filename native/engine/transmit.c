/* SPDX-License-Identifier: Apache-2.0 */
/* From a queue of the TUN device to the UDP sockets. */
#include "worker.h"

#include <errno.h>
#include <netinet/udp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103 /* linux/udp.h */
#endif

enum {
	TX_READ = 65536 + sizeof(struct offload), /* the most that one read gives */
	TX_BATCH = 65536,			  /* bytes read before they are sent */
	TX_PACKETS = 256,			  /* and packets */
	TX_MESSAGES = 128,
	TX_PIECES = 1024,
	TX_HEADERS = 32768,
	TX_SEGMENTS = 64,   /* UDP_MAX_SEGMENTS, before 1382e3b6a350 ("net: change maximum number of UDP segments
			       to 128", v6.9) */
	TX_MESSAGE = 65487, /* bytes in a message: its IP packet has 65535, headers of IPv6 and UDP included */
	TX_PATIENCE_MS = 5, /* for a full socket; then packets are dropped, as a device does */
	TX_REFUSALS = 3,    /* before a message is given up, see is_final */
};

/* Datagrams of one size for one peer, on their way into one system call. */
struct message {
	const struct peer *peer;
	struct iovec *pieces;
	uint32_t count;	     /* datagrams */
	uint32_t each;	     /* pieces in each: 1 or 2 */
	uint32_t size;	     /* bytes of each but the last */
	uint32_t bytes;	     /* of all */
	bool is_closed;	     /* a shorter one came: it is the last */
	union {
		char space[CMSG_SPACE(sizeof(uint16_t))];
		struct cmsghdr align;
	} control;
};

struct transmitter {
	struct worker *worker;
	const struct table *table;
	uint8_t packets[TX_BATCH + TX_READ]; /* as they were read */
	uint8_t headers[TX_HEADERS];	     /* of segments */
	size_t header_bytes;
	struct iovec pieces[TX_PIECES];
	size_t piece_count;
	struct message messages[TX_MESSAGES];
	struct mmsghdr sends[TX_MESSAGES];
	size_t message_count;
	int socket; /* of all messages */
	bool no_gso;
	uint8_t whole[PACKET_MAX];    /* a packet put together out of pieces */
	uint8_t fragment[PACKET_MAX]; /* of it */
	/* The last destination and its peer. */
	const struct peer *peer;
	uint8_t target[16];
	size_t target_size;
};

static int socket_of(const struct transmitter *transmitter, const struct peer *peer)
{
	return transmitter->worker->udp[peer->remote_size == 16];
}

static const struct endpoint *endpoint_of(const struct transmitter *transmitter, const struct peer *peer)
{
	return &transmitter->table->endpoints[peer->endpoint];
}

static void count_sent(struct transmitter *transmitter, const struct peer *peer, uint32_t packets, uint32_t bytes)
{
	worker_count(transmitter->worker, COUNT_UDP_SENDS, 1);
	worker_count(transmitter->worker, COUNT_TX_PACKETS, packets);
	worker_count(transmitter->worker, COUNT_TX_BYTES, bytes);
	traffic_add(&peer->traffic->tx_packets, packets);
	traffic_add(&peer->traffic->tx_bytes, bytes);
}

static enum drop reason_of(int error)
{
	switch (error) {
	case EAGAIN:
	case ENOBUFS:
	case ENOMEM:
		return DROP_FULL;
	case EMSGSIZE:
		return DROP_TOO_BIG;
	default: /* ENETUNREACH, EPERM of a firewall, ... */
		return DROP_UNREACHABLE;
	}
}

/* Whether the socket's owner wants to have what ICMP says about datagrams: it waits at the socket then. */
static bool hears_icmp(int socket, bool is_ipv6)
{
	int hears = 0, level = is_ipv6 ? IPPROTO_IPV6 : IPPROTO_IP;
	socklen_t size = sizeof(hears);

	return getsockopt(socket, level, is_ipv6 ? IPV6_RECVERR : IP_RECVERR, &hears, &size) == 0 && hears != 0;
}

/*
 * Whether what a socket has refused is not to be sent again. Where it hears ICMP, a call is told of an earlier datagram
 * instead of sending, whomever to (sock_alloc_send_pskb).
 */
static bool is_final(const struct transmitter *transmitter, int socket, int error, unsigned int *refusals)
{
	if (error == EINTR)
		return false;
	if (error == EAGAIN || ++*refusals == TX_REFUSALS ||
	    !hears_icmp(socket, socket == transmitter->worker->udp[1]))
		return true;
	worker_drain(socket);
	return false;
}

/* Sending one by one */

/* One datagram, now. Returns 0 or a negative errno. */
static int send_one(struct transmitter *transmitter, const struct peer *peer, struct iovec *pieces, size_t count)
{
	const struct endpoint *endpoint = endpoint_of(transmitter, peer);
	struct msghdr header = {
		.msg_name = (void *)(uintptr_t)&endpoint->address,
		.msg_namelen = endpoint->size,
		.msg_iov = pieces,
		.msg_iovlen = count,
	};
	int socket = socket_of(transmitter, peer), error = 0;
	unsigned int refusals = 0;
	ssize_t sent;

	do {
		sent = sendmsg(socket, &header, MSG_DONTWAIT);
		error = sent < 0 ? errno : 0;
	} while (error && !is_final(transmitter, socket, error, &refusals));
	if (error)
		return -error;
	count_sent(transmitter, peer, 1, (uint32_t)sent);
	return 0;
}

/*
 * Bytes of an inner packet that the path to a peer takes, as the kernel has it: that of a socket which is
 * connected to the peer, because the kernel tells it of no other. 0: not known.
 */
static uint32_t path_mtu(struct transmitter *transmitter, const struct peer *peer)
{
	const struct endpoint *endpoint = endpoint_of(transmitter, peer);
	bool is_ipv6 = peer->remote_size == 16;
	int probe = transmitter->worker->probe[is_ipv6], mtu = 0;
	uint32_t outer = is_ipv6 ? 48 : 28;
	socklen_t size = sizeof(mtu);

	if (probe < 0 || connect(probe, &endpoint->address.any, endpoint->size) < 0)
		return 0;
	if (getsockopt(probe, is_ipv6 ? IPPROTO_IPV6 : IPPROTO_IP, is_ipv6 ? IPV6_MTU : IP_MTU, &mtu, &size) < 0)
		return 0;
	return mtu > (int)outer ? (uint32_t)mtu - outer : 0;
}

/* What else to say to a sender whose packet was too big: RFC 1191 section 7. */
static uint32_t next_lower_mtu(uint32_t length)
{
	static const uint32_t plateaus[] = {32000, 17914, 8166, 4352, 2002, 1492, 1280, 1006, 508, 296};

	for (size_t i = 0; i < sizeof(plateaus) / sizeof(plateaus[0]); i++) {
		if (plateaus[i] < length)
			return plateaus[i];
	}
	return 68;
}

/* Returns false if nothing fits. */
static bool send_fragments(struct transmitter *transmitter, const struct peer *peer, const struct packet *packet,
			   uint32_t mtu)
{
	struct worker *worker = transmitter->worker;
	uint32_t offset = 0;
	size_t length;

	if (mtu > sizeof(transmitter->fragment))
		mtu = sizeof(transmitter->fragment);
	for (;;) {
		struct iovec piece = {.iov_base = transmitter->fragment};
		int result;

		length = packet_fragment(packet, mtu, &offset, transmitter->fragment, sizeof(transmitter->fragment));
		if (length == 0)
			return offset > 0;
		piece.iov_len = length;
		result = send_one(transmitter, peer, &piece, 1);
		if (result < 0) {
			worker_drop(worker, reason_of(-result), 1);
			return true;
		}
		worker_count(worker, COUNT_FRAGMENTS, 1);
	}
}

/*
 * A packet that does not fit the peer or the path is fragmented if it may be, and its sender told otherwise.
 * packets: how many are dropped if it may not: those behind it in its super-packet too.
 * Returns whether it went, in fragments.
 */
static bool too_big(struct transmitter *transmitter, const struct peer *peer, const struct packet *packet, uint32_t mtu,
		    uint32_t packets)
{
	struct worker *worker = transmitter->worker;

	if (!packet->dont_fragment && send_fragments(transmitter, peer, packet, mtu))
		return true;
	worker_drop(worker, DROP_TOO_BIG, packets);
	worker_icmp(worker, packet, ICMP_TOO_BIG, mtu);
	worker_tell(worker);
	return false;
}

/* Put a datagram's pieces together. Returns its bytes. */
static size_t gather(struct transmitter *transmitter, const struct iovec *pieces, size_t count)
{
	size_t length = 0;

	for (size_t i = 0; i < count; i++) {
		if (pieces[i].iov_len > sizeof(transmitter->whole) - length)
			break;
		memcpy(transmitter->whole + length, pieces[i].iov_base, pieces[i].iov_len);
		length += pieces[i].iov_len;
	}
	return length;
}

/* The underlay has refused a datagram for its size. Returns whether those behind it can be tried. */
static bool path_too_small(struct transmitter *transmitter, const struct message *message, uint32_t index)
{
	size_t length = gather(transmitter, message->pieces + (size_t)index * message->each, message->each);
	uint32_t mtu = path_mtu(transmitter, message->peer);
	struct packet packet;

	if (packet_parse(&packet, transmitter->whole, length) != DROP_NONE)
		return true; /* it was one when it was read */
	if (mtu == 0 || mtu >= packet.length)
		mtu = next_lower_mtu(packet.length);
	worker_tell(transmitter->worker);
	return too_big(transmitter, message->peer, &packet, mtu, message->count - index);
}

/* What the kernel does not take as one message goes as single datagrams, each with an error of its own. */
static void send_apart(struct transmitter *transmitter, const struct message *message)
{
	for (uint32_t i = 0; i < message->count; i++) {
		struct iovec *pieces = message->pieces + (size_t)i * message->each;
		int result = send_one(transmitter, message->peer, pieces, message->each);

		if (result == -EMSGSIZE) {
			if (!path_too_small(transmitter, message, i))
				return;
		} else if (result < 0) {
			worker_drop(transmitter->worker, reason_of(-result), 1);
		}
	}
}

/* Sending many */

static void seal(struct transmitter *transmitter, size_t index)
{
	struct message *message = &transmitter->messages[index];
	const struct endpoint *endpoint = endpoint_of(transmitter, message->peer);
	uint16_t size = (uint16_t)message->size;
	struct msghdr *header = &transmitter->sends[index].msg_hdr;
	struct cmsghdr *control;

	*header = (struct msghdr){
		.msg_name = (void *)(uintptr_t)&endpoint->address,
		.msg_namelen = endpoint->size,
		.msg_iov = message->pieces,
		.msg_iovlen = (size_t)message->count * message->each,
	};
	if (message->count == 1)
		return;
	header->msg_control = &message->control;
	header->msg_controllen = sizeof(message->control);
	control = CMSG_FIRSTHDR(header);
	control->cmsg_level = IPPROTO_UDP;
	control->cmsg_type = UDP_SEGMENT;
	control->cmsg_len = CMSG_LEN(sizeof(size));
	memcpy(CMSG_DATA(control), &size, sizeof(size));
}

/* Returns whether the socket has room again. */
static bool wait_for_room(struct transmitter *transmitter)
{
	for (unsigned int refusals = 0; refusals < TX_REFUSALS; refusals++) {
		short events = POLLOUT;

		if (!worker_wait(transmitter->worker, transmitter->socket, &events, TX_PATIENCE_MS))
			return false;
		if (events & POLLOUT)
			return true;
		if (!(events & POLLERR))
			return false;
		worker_drain(transmitter->socket); /* what ICMP said wakes us too */
	}
	return false;
}

/* The first message from index on was refused. Returns how many messages are done with. */
static size_t refused(struct transmitter *transmitter, size_t index, int error)
{
	struct worker *worker = transmitter->worker;
	const struct message *message = &transmitter->messages[index];
	size_t left = transmitter->message_count - index;

	switch (error) {
	case EAGAIN:
		if (wait_for_room(transmitter))
			return 0;
		for (size_t i = index; i < transmitter->message_count; i++)
			worker_drop(worker, DROP_FULL, transmitter->messages[i].count);
		return left;
	case EIO: /* before 10154dbded6d ("udp: Allow GSO transmit from devices with no checksum offload", v6.11) */
		transmitter->no_gso |= message->count > 1;
		send_apart(transmitter, message);
		return 1;
	case EINVAL: /* a segment is larger than the path's MTU */
	case EMSGSIZE:
		send_apart(transmitter, message);
		return 1;
	default:
		worker_drop(worker, reason_of(error), message->count);
		return 1;
	}
}

static void flush(struct transmitter *transmitter)
{
	unsigned int refusals = 0;
	size_t done = 0;

	for (size_t i = 0; i < transmitter->message_count; i++)
		seal(transmitter, i);
	while (done < transmitter->message_count) {
		int sent = sendmmsg(transmitter->socket, transmitter->sends + done,
				    (unsigned int)(transmitter->message_count - done), MSG_DONTWAIT);

		if (sent < 0) {
			int error = errno;

			if (is_final(transmitter, transmitter->socket, error, &refusals)) {
				done += refused(transmitter, done, error);
				refusals = 0;
			}
			continue;
		}
		refusals = 0;
		for (int i = 0; i < sent; i++, done++) {
			const struct message *message = &transmitter->messages[done];

			count_sent(transmitter, message->peer, message->count, message->bytes);
		}
	}
	transmitter->message_count = 0;
	transmitter->piece_count = 0;
	transmitter->header_bytes = 0;
}

/* Whether a datagram can go with the last message; there is one. */
static bool can_join(const struct transmitter *transmitter, const struct peer *peer, uint32_t each, uint32_t length)
{
	const struct message *last = &transmitter->messages[transmitter->message_count - 1];

	return !transmitter->no_gso && last->peer == peer && last->each == each &&
	       !last->is_closed && last->count < TX_SEGMENTS && length <= last->size &&
	       length <= TX_MESSAGE - last->bytes;
}

/* Make room for a datagram of up to two pieces, one of them a header of so many bytes. */
static void reserve(struct transmitter *transmitter, const struct peer *peer, uint32_t header)
{
	int socket = socket_of(transmitter, peer);

	if (transmitter->message_count > 0 &&
	    (transmitter->socket != socket || transmitter->message_count == TX_MESSAGES ||
	     transmitter->piece_count + 2 > TX_PIECES || transmitter->header_bytes + header > TX_HEADERS))
		flush(transmitter);
	transmitter->socket = socket;
}

/* Send one datagram, together with its neighbours. Room was reserved for it. */
static void append(struct transmitter *transmitter, const struct peer *peer, const struct iovec *pieces, uint32_t each)
{
	struct iovec *place = transmitter->pieces + transmitter->piece_count;
	struct message *message;
	uint32_t length = 0;

	for (uint32_t i = 0; i < each; i++) {
		place[i] = pieces[i];
		length += (uint32_t)pieces[i].iov_len;
	}
	transmitter->piece_count += each;
	if (transmitter->message_count > 0 && can_join(transmitter, peer, each, length)) {
		message = &transmitter->messages[transmitter->message_count - 1];
		message->is_closed = length < message->size;
		message->count++;
		message->bytes += length;
		return;
	}
	message = &transmitter->messages[transmitter->message_count++];
	message->peer = peer;
	message->pieces = place;
	message->count = 1;
	message->each = each;
	message->size = length;
	message->bytes = length;
	message->is_closed = length >= TX_MESSAGE;
}

/* Packets */

static const struct peer *peer_of(struct transmitter *transmitter, const struct packet *packet)
{
	const uint8_t *target = packet_target(packet);
	size_t size = packet->version == 4 ? 4 : 16;

	if (size == transmitter->target_size && memcmp(target, transmitter->target, size) == 0)
		return transmitter->peer;
	memcpy(transmitter->target, target, size);
	transmitter->target_size = size;
	transmitter->peer = table_lookup(transmitter->table, target, size);
	return transmitter->peer;
}

/* A segment that is too big for the peer and may be fragmented. */
static void segment_too_big(struct transmitter *transmitter, const struct peer *peer, const struct cut *cut,
			    uint32_t index)
{
	const uint8_t *payload = cut->payload + (size_t)index * cut->size;
	uint32_t length = cut_length(cut, index);
	struct packet packet;

	cut_header(cut, index, payload, length, transmitter->whole);
	memcpy(transmitter->whole + cut->header, payload, length);
	if (packet_parse(&packet, transmitter->whole, cut->header + length) == DROP_NONE)
		too_big(transmitter, peer, &packet, peer->mtu, 1);
}

static enum drop send_cut(struct transmitter *transmitter, const struct peer *peer, const struct offload *offload,
			  const struct packet *packet)
{
	struct cut cut;
	enum drop reason = cut_init(&cut, offload, packet);

	if (reason != DROP_NONE)
		return reason;
	for (uint32_t i = 0; i < cut.count; i++) {
		uint8_t *payload = packet->data + cut.header + (size_t)i * cut.size;
		uint32_t length = cut_length(&cut, i);
		struct iovec pieces[2] = {{.iov_len = cut.header}, {.iov_base = payload, .iov_len = length}};

		if (peer->mtu != 0 && cut.header + length > peer->mtu) {
			flush(transmitter); /* what was before it goes before it */
			segment_too_big(transmitter, peer, &cut, i);
			continue;
		}
		reserve(transmitter, peer, cut.header);
		pieces[0].iov_base = transmitter->headers + transmitter->header_bytes;
		transmitter->header_bytes += cut.header;
		cut_header(&cut, i, payload, length, pieces[0].iov_base);
		append(transmitter, peer, pieces, 2);
	}
	worker_count(transmitter->worker, COUNT_SEGMENTS, cut.count);
	return DROP_NONE;
}

static enum drop send_whole(struct transmitter *transmitter, const struct peer *peer, const struct offload *offload,
			    struct packet *packet)
{
	struct iovec piece = {.iov_base = packet->data, .iov_len = packet->length};
	enum drop reason = offload_finish(offload, packet);

	if (reason != DROP_NONE)
		return reason;
	if (peer->mtu != 0 && packet->length > peer->mtu) {
		flush(transmitter);
		too_big(transmitter, peer, packet, peer->mtu, 1);
		return DROP_NONE;
	}
	reserve(transmitter, peer, 0);
	append(transmitter, peer, &piece, 1);
	return DROP_NONE;
}

/* Whether all of a super-packet is refused because its segments do not fit. */
static bool is_cut_too_big(const struct peer *peer, const struct offload *offload, const struct packet *packet,
			   uint32_t *segments)
{
	struct cut cut;

	if (offload->type == OFFLOAD_NONE || peer->mtu == 0 || !packet->dont_fragment)
		return false;
	if (cut_init(&cut, offload, packet) != DROP_NONE)
		return false;
	*segments = cut.count;
	return cut.header + cut_length(&cut, 0) > peer->mtu;
}

static enum drop take(struct transmitter *transmitter, const struct offload *offload, uint8_t *data, size_t length)
{
	const struct peer *peer;
	struct packet packet;
	enum drop reason = packet_parse(&packet, data, length);
	uint32_t segments;

	if (reason != DROP_NONE)
		return reason;
	peer = peer_of(transmitter, &packet);
	if (peer == NULL) {
		worker_icmp(transmitter->worker, &packet, ICMP_NO_ROUTE, 0);
		return DROP_NO_ROUTE;
	}
	if (socket_of(transmitter, peer) < 0)
		return DROP_NO_SOCKET;
	if (is_cut_too_big(peer, offload, &packet, &segments)) {
		too_big(transmitter, peer, &packet, peer->mtu, segments);
		return DROP_NONE;
	}
	reason = packet_forward(&packet);
	if (reason != DROP_NONE)
		return reason;
	if (offload->type == OFFLOAD_NONE)
		return send_whole(transmitter, peer, offload, &packet);
	return send_cut(transmitter, peer, offload, &packet);
}

static void take_read(struct transmitter *transmitter, uint8_t *data, size_t length)
{
	struct offload offload;
	enum drop reason = DROP_TRUNCATED;

	worker_count(transmitter->worker, COUNT_TUN_PACKETS, 1);
	if (length > sizeof(offload)) {
		memcpy(&offload, data, sizeof(offload));
		reason = take(transmitter, &offload, data + sizeof(offload), length - sizeof(offload));
	}
	if (reason != DROP_NONE)
		worker_drop(transmitter->worker, reason, 1);
}

/* Read what is there, up to a batch, and send it. Returns how many packets, or a negative errno. */
static int take_batch(struct transmitter *transmitter)
{
	int result = 0, count = 0;
	size_t used = 0;

	transmitter->table = worker_enter(transmitter->worker);
	transmitter->target_size = 0;
	while (used < TX_BATCH && count < TX_PACKETS) {
		uint8_t *data = transmitter->packets + used;
		ssize_t length = read(transmitter->worker->tun, data, TX_READ);

		if (length < 0) {
			result = -errno;
			break;
		}
		take_read(transmitter, data, (size_t)length);
		used += (size_t)length;
		count++;
	}
	flush(transmitter);
	worker_leave(transmitter->worker);
	return count > 0 ? count : result;
}

static void transmit_all(struct transmitter *transmitter)
{
	struct worker *worker = transmitter->worker;

	while (!worker_should_stop(worker)) {
		int result = take_batch(transmitter);
		short events = POLLIN;

		if (result == -EAGAIN) {
			if (!worker_wait(worker, worker->tun, &events, -1))
				return;
		} else if (result < 0 && result != -EINTR) {
			worker_fail(worker, -result, "read from the TUN device");
			return;
		}
	}
}

void transmit(struct worker *worker)
{
	struct transmitter *transmitter = malloc(sizeof(*transmitter));

	if (transmitter == NULL) {
		worker_fail(worker, ENOMEM, "start a transmitter");
		return;
	}
	transmitter->worker = worker;
	transmitter->header_bytes = 0;
	transmitter->piece_count = 0;
	transmitter->message_count = 0;
	transmitter->socket = -1;
	transmitter->no_gso = false;
	transmit_all(transmitter);
	free(transmitter);
}
