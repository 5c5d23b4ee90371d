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
	TX_GAPS = LAYOUT_SEGMENTS * CUT_HEADERS_MAX, /* bytes that it leaves out */
	TX_BATCH = 65536,			  /* bytes before they are sent, gaps included */
	TX_PACKETS = 256,			  /* and packets */
	TX_OTHERS = 8, /* packets behind a super-packet until none is expected: pieces cost the small ones */
	TX_MESSAGES = 128,
	TX_PIECES = 1024,
	TX_HEADERS = 32768,
	TX_SEGMENTS = 64,   /* UDP_MAX_SEGMENTS, before 1382e3b6a350 ("net: change maximum number of UDP segments
			       to 128", v6.9) */
	TX_MESSAGE = 65487, /* bytes in a message: its IP packet has 65535, headers of IPv6 and UDP included */
	TX_PATIENCE_MS = 5, /* for a full socket; then packets are dropped, as a device does */
	TX_REFUSALS = 3,    /* before a message is given up, see is_final */
};

/* What one read gave. In front of each segment's payload is a gap for its headers: so its datagram is one piece. */
struct found {
	uint8_t *data; /* the packet: behind the virtio header */
	size_t length; /* of the packet */
	struct layout layout;
};

/* Datagrams of one size for one peer, on their way into one system call. */
struct message {
	const struct peer *peer;
	struct iovec *pieces;
	uint32_t piece_count;
	uint32_t count;	     /* datagrams */
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
	uint8_t packets[TX_BATCH + TX_READ + TX_GAPS]; /* as they were read */
	struct layout layout;			       /* of the next one: the last super-packet's */
	uint32_t others;			       /* packets since then */
	uint8_t headers[TX_HEADERS];		       /* of segments without gaps */
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

/* Put one datagram of a message together in transmitter->whole. Returns its bytes. */
static size_t gather(struct transmitter *transmitter, const struct message *message, uint32_t index)
{
	size_t skip = (size_t)index * message->size, wanted = message->bytes - skip, length = 0;

	if (wanted > message->size)
		wanted = message->size;
	for (uint32_t i = 0; i < message->piece_count && length < wanted; i++) {
		const struct iovec *piece = &message->pieces[i];
		size_t more = piece->iov_len > skip ? piece->iov_len - skip : 0;

		if (more > wanted - length)
			more = wanted - length;
		if (more > 0)
			memcpy(transmitter->whole + length, (uint8_t *)piece->iov_base + skip, more);
		skip -= piece->iov_len < skip ? piece->iov_len : skip;
		length += more;
	}
	return length;
}

/*
 * The underlay has refused a datagram, which is in transmitter->whole, for its size. Returns whether those behind it
 * can be tried.
 */
static bool path_too_small(struct transmitter *transmitter, const struct message *message, uint32_t index,
			   size_t length)
{
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
		struct iovec piece = {.iov_base = transmitter->whole, .iov_len = gather(transmitter, message, i)};
		int result = send_one(transmitter, message->peer, &piece, 1);

		if (result == -EMSGSIZE) {
			if (!path_too_small(transmitter, message, i, piece.iov_len))
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
		.msg_iovlen = message->piece_count,
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
static bool can_join(const struct transmitter *transmitter, const struct peer *peer, uint32_t length)
{
	const struct message *last = &transmitter->messages[transmitter->message_count - 1];

	return !transmitter->no_gso && last->peer == peer && !last->is_closed && last->count < TX_SEGMENTS &&
	       length <= last->size && length <= TX_MESSAGE - last->bytes;
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

static void add_piece(struct transmitter *transmitter, struct message *message, struct iovec piece)
{
	struct iovec *last = message->piece_count > 0 ? &message->pieces[message->piece_count - 1] : NULL;

	if (last != NULL && (uint8_t *)last->iov_base + last->iov_len == piece.iov_base) {
		last->iov_len += piece.iov_len;
		return;
	}
	transmitter->pieces[transmitter->piece_count++] = piece;
	message->piece_count++;
}

/* Send one datagram of one or two pieces, together with its neighbours. Room was reserved for it. */
static void append(struct transmitter *transmitter, const struct peer *peer, const struct iovec *pieces, uint32_t count)
{
	uint32_t length = 0;
	struct message *message;

	for (uint32_t i = 0; i < count; i++)
		length += (uint32_t)pieces[i].iov_len;
	if (transmitter->message_count > 0 && can_join(transmitter, peer, length)) {
		message = &transmitter->messages[transmitter->message_count - 1];
		message->is_closed = length < message->size;
	} else {
		message = &transmitter->messages[transmitter->message_count++];
		message->peer = peer;
		message->pieces = transmitter->pieces + transmitter->piece_count;
		message->piece_count = 0;
		message->count = 0;
		message->size = length;
		message->bytes = 0;
		message->is_closed = length >= TX_MESSAGE;
	}
	message->count++;
	message->bytes += length;
	for (uint32_t i = 0; i < count; i++)
		add_piece(transmitter, message, pieces[i]);
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
	const uint8_t *payload = cut->payload + (size_t)index * cut->stride;
	uint32_t length = cut_length(cut, index);
	struct packet packet;

	cut_header(cut, index, payload, length, transmitter->whole);
	memcpy(transmitter->whole + cut->header, payload, length);
	if (packet_parse(&packet, transmitter->whole, cut->header + length) == DROP_NONE)
		too_big(transmitter, peer, &packet, peer->mtu, 1);
}

static enum drop send_cut(struct transmitter *transmitter, const struct peer *peer, const struct offload *offload,
			  const struct packet *packet, uint32_t gap)
{
	uint8_t headers[CUT_HEADERS_MAX];
	struct cut cut;
	enum drop reason = cut_init(&cut, offload, packet);

	if (reason != DROP_NONE)
		return reason;
	if (cut.count > 1) { /* else its size may be more than there is */
		transmitter->layout = layout_of(cut.header, cut.size);
		transmitter->others = 0;
	}
	memcpy(headers, cut.headers, cut.header); /* those of the first segment are written over them */
	cut.headers = headers;
	cut.stride += gap;
	for (uint32_t i = 0; i < cut.count; i++) {
		uint8_t *payload = packet->data + cut.header + (size_t)i * cut.stride;
		uint32_t length = cut_length(&cut, i);
		struct iovec pieces[2] = {{.iov_len = cut.header}, {.iov_base = payload, .iov_len = length}};

		if (peer->mtu != 0 && cut.header + length > peer->mtu) {
			flush(transmitter); /* what was before it goes before it */
			segment_too_big(transmitter, peer, &cut, i);
			continue;
		}
		reserve(transmitter, peer, cut.header);
		if (i == 0 || gap > 0) {
			pieces[0].iov_base = payload - cut.header;
		} else {
			pieces[0].iov_base = transmitter->headers + transmitter->header_bytes;
			transmitter->header_bytes += cut.header;
		}
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

/* Bytes between the payloads of a packet's segments; 0: it lies in one piece. */
static uint32_t gap_of(const struct found *found)
{
	return found->length > found->layout.header + found->layout.size ? found->layout.header : 0;
}

static void close_gaps(struct found *found)
{
	uint32_t gap = gap_of(found), size = found->layout.size;
	size_t at = gap + size, skipped = gap;

	for (; gap > 0 && at < found->length; at += size, skipped += gap)
		memmove(found->data + at, found->data + at + skipped,
			found->length - at < size ? found->length - at : size);
	found->layout = (struct layout){0};
}

/* Whether there is a gap in front of each segment but the first, and nowhere else. */
static bool do_gaps_fit(const struct found *found, const struct offload *offload, const struct packet *packet)
{
	struct cut cut;

	return packet->length == found->length && cut_init(&cut, offload, packet) == DROP_NONE &&
	       cut.header == found->layout.header && cut.size == found->layout.size;
}

static enum drop parse(struct found *found, const struct offload *offload, struct packet *packet)
{
	enum drop reason = packet_parse(packet, found->data, found->length);

	if (gap_of(found) == 0 || (reason == DROP_NONE && do_gaps_fit(found, offload, packet)))
		return reason;
	close_gaps(found);
	return packet_parse(packet, found->data, found->length);
}

static enum drop take(struct transmitter *transmitter, const struct offload *offload, struct found *found)
{
	const struct peer *peer;
	struct packet packet;
	enum drop reason = parse(found, offload, &packet);
	uint32_t segments;

	if (reason != DROP_NONE)
		return reason;
	peer = peer_of(transmitter, &packet);
	if (peer == NULL) {
		close_gaps(found);
		worker_icmp(transmitter->worker, &packet, ICMP_NO_ROUTE, 0);
		return DROP_NO_ROUTE;
	}
	if (socket_of(transmitter, peer) < 0)
		return DROP_NO_SOCKET;
	if (is_cut_too_big(peer, offload, &packet, &segments)) {
		close_gaps(found);
		too_big(transmitter, peer, &packet, peer->mtu, segments);
		return DROP_NONE;
	}
	reason = packet_forward(&packet);
	if (reason != DROP_NONE)
		return reason;
	if (offload->type == OFFLOAD_NONE)
		return send_whole(transmitter, peer, offload, &packet);
	return send_cut(transmitter, peer, offload, &packet, gap_of(found));
}

/* Where the bytes of a read go. Returns how many pieces. */
static size_t lay_out(struct iovec *pieces, uint8_t *data, const struct layout *layout)
{
	uint32_t each = layout->header + layout->size;
	size_t left = TX_READ, first = layout->header > 0 ? sizeof(struct offload) + each : left, count = 1;
	uint8_t *place = data + first + layout->header;

	pieces[0] = (struct iovec){.iov_base = data, .iov_len = first};
	for (left -= first; left > 0; place += each) {
		size_t length = left < layout->size ? left : layout->size;

		pieces[count++] = (struct iovec){.iov_base = place, .iov_len = length};
		left -= length;
	}
	return count;
}

/* Read one packet, and put it among what is to be sent. Returns the bytes that it takes up, or a negative errno. */
static ssize_t take_next(struct transmitter *transmitter, uint8_t *data)
{
	struct found found = {.data = data + sizeof(struct offload), .layout = transmitter->layout};
	struct iovec pieces[LAYOUT_SEGMENTS + 1];
	size_t count = lay_out(pieces, data, &found.layout);
	ssize_t length = readv(transmitter->worker->tun, pieces, (int)count), used;
	enum drop reason = DROP_TRUNCATED;
	struct offload offload;

	if (length < 0)
		return -errno;
	worker_count(transmitter->worker, COUNT_TUN_PACKETS, 1);
	if (++transmitter->others == TX_OTHERS)
		transmitter->layout = (struct layout){0};
	used = length;
	if ((size_t)length > sizeof(offload)) {
		memcpy(&offload, data, sizeof(offload));
		found.length = (size_t)length - sizeof(offload);
		used += LAYOUT_SEGMENTS * gap_of(&found);
		reason = take(transmitter, &offload, &found);
	}
	if (reason != DROP_NONE)
		worker_drop(transmitter->worker, reason, 1);
	return used;
}

/* Read what is there, up to a batch, and send it. Returns how many packets, or a negative errno. */
static int take_batch(struct transmitter *transmitter)
{
	int result = 0, count = 0;
	size_t used = 0;

	transmitter->table = worker_enter(transmitter->worker);
	transmitter->target_size = 0;
	while (used < TX_BATCH && count < TX_PACKETS) {
		ssize_t length = take_next(transmitter, transmitter->packets + used);

		if (length < 0) {
			result = (int)length;
			break;
		}
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
	transmitter->layout = (struct layout){0};
	transmitter->others = 0;
	transmitter->header_bytes = 0;
	transmitter->piece_count = 0;
	transmitter->message_count = 0;
	transmitter->socket = -1;
	transmitter->no_gso = false;
	transmit_all(transmitter);
	free(transmitter);
}
