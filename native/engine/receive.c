/* SPDX-License-Identifier: Apache-2.0 */
/* From a UDP socket to the TUN device. */
#include "worker.h"

#include <errno.h>
#include <netinet/udp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#ifndef UDP_GRO
#define UDP_GRO 104 /* linux/udp.h */
#endif

enum {
	RX_BUFFER = 65536, /* as much as the kernel puts together */
	RX_MESSAGES = 64,
	RX_FEW = 4,	     /* at a time, while they are large: the processor's cache holds so many */
	RX_LARGE = 16384,    /* bytes of a message that make it so */
	RX_ASIDE = LAYOUT_SEGMENTS * CUT_HEADERS_MAX + PACKET_MAX, /* headers may say that they go on and on */
	RX_PATIENCE = 10000, /* errors in a row */
};

struct message {
	struct sockaddr_storage from;
	struct iovec piece;
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
};

struct receiver {
	struct worker *worker;
	const struct table *table;
	uint8_t *buffers;
	struct message messages[RX_MESSAGES];
	struct mmsghdr headers[RX_MESSAGES];
	unsigned int at_once;
	struct layout layout;	/* of the next large messages: the last merged packet's */
	struct layout expected; /* of the messages at hand */
	uint8_t *aside;		/* the headers of their packets, but for each first one */
	struct iovec pieces[RX_FEW][2 * LAYOUT_SEGMENTS]; /* where each of them goes */
	struct merger merger;
	bool is_gone;		 /* the TUN device */
	/* The last inner source and its peer: most packets come in rows. */
	const struct peer *peer;
	uint8_t source[16];
	size_t source_size;
	uint64_t peer_packets, peer_bytes;
};

/* A super-packet that the kernel does not take goes as the packets that it was made of. */
static int write_apart(struct receiver *receiver, const struct cut *cut, const struct iovec *pieces)
{
	const struct offload plain = {.type = OFFLOAD_NONE};
	uint8_t header[CUT_HEADERS_MAX];
	size_t at = cut->header;
	int result = 0;

	for (uint32_t i = 0; i < cut->count && result != -EBADFD; i++) {
		uint32_t length = cut_length(cut, i);
		struct iovec both[2] = {{.iov_base = header, .iov_len = cut->header}, {.iov_len = length}};

		for (; at >= pieces->iov_len; pieces++)
			at -= pieces->iov_len; /* no payload is in two pieces */
		both[1].iov_base = (uint8_t *)pieces->iov_base + at;
		at += length;
		cut_header(cut, i, both[1].iov_base, length, header);
		result = worker_write(receiver->worker, &plain, both, 2);
	}
	return result;
}

/* What came of writing so many packets. */
static void count_written(struct receiver *receiver, int result, uint32_t packets, uint64_t bytes)
{
	struct worker *worker = receiver->worker;

	switch (result) {
	case 0:
		worker_count(worker, COUNT_RX_PACKETS, packets);
		worker_count(worker, COUNT_RX_BYTES, bytes);
		break;
	case -EBADFD:
		receiver->is_gone = true;
		break;
	case -EAGAIN:
	case -ENOBUFS:
	case -ENOMEM:
		worker_drop(worker, DROP_FULL, packets);
		break;
	default: /* EIO: the device is down */
		worker_drop(worker, DROP_REFUSED, packets);
		break;
	}
}

static void on_merged(void *context, const struct offload *offload, struct merge *merge)
{
	struct receiver *receiver = context;
	struct packet whole = merge->first;
	struct cut cut;
	int result;

	if (receiver->is_gone)
		return;
	whole.length = merge->header + merge->total;
	if (merge->count > 1)
		receiver->layout = layout_of(merge->header, merge->size);
	result = worker_write(receiver->worker, offload, merge->pieces, merge->piece_count);
	if (result == 0 && merge->count > 1)
		worker_count(receiver->worker, COUNT_MERGED, merge->count);
	if (result == -EINVAL && offload->type == OFFLOAD_UDP && cut_init(&cut, offload, &whole) == DROP_NONE) {
		/* Before 399e0827642f ("driver/net/tun: Added features for USO.", v6.2) a TUN device takes none. */
		receiver->merger.no_udp = true;
		result = write_apart(receiver, &cut, merge->pieces);
	}
	count_written(receiver, result, merge->count, (uint64_t)merge->count * merge->header + merge->total);
}

static void count_peer(struct receiver *receiver)
{
	if (receiver->peer != NULL && receiver->peer_packets > 0) {
		traffic_add(&receiver->peer->traffic->rx_packets, receiver->peer_packets);
		traffic_add(&receiver->peer->traffic->rx_bytes, receiver->peer_bytes);
	}
	receiver->peer_packets = 0;
	receiver->peer_bytes = 0;
}

static const struct peer *peer_of(struct receiver *receiver, const struct packet *packet)
{
	const uint8_t *source = packet_source(packet);
	size_t size = packet->version == 4 ? 4 : 16;

	if (size == receiver->source_size && memcmp(source, receiver->source, size) == 0)
		return receiver->peer;
	count_peer(receiver);
	memcpy(receiver->source, source, size);
	receiver->source_size = size;
	receiver->peer = table_lookup(receiver->table, source, size);
	return receiver->peer;
}

static enum drop take(struct receiver *receiver, uint32_t endpoint, struct packet *packet)
{
	const struct peer *peer = peer_of(receiver, packet);
	enum drop reason;

	if (!receiver->worker->engine->allow_unknown && (peer == NULL || peer->endpoint != endpoint))
		return DROP_SPOOFED;
	reason = packet_forward(packet);
	if (reason != DROP_NONE)
		return reason;
	receiver->peer_packets++;
	receiver->peer_bytes += packet->length;
	merger_put(&receiver->merger, packet);
	return DROP_NONE;
}

static uint8_t *aside_of(const struct receiver *receiver, size_t index)
{
	return receiver->aside + index * RX_ASIDE;
}

/* A message, and how it lies. */
struct arrival {
	uint8_t *data;
	uint8_t *aside; /* the headers of all packets but the first; NULL: each is in front of its payload */
	struct layout layout;
	size_t length;
	size_t each; /* bytes of each datagram but the last */
};

/* How large the datagrams are that the kernel has put together. */
static void read_control(struct arrival *arrival, struct msghdr *header)
{
	arrival->each = arrival->length;
	for (struct cmsghdr *one = CMSG_FIRSTHDR(header); one != NULL; one = CMSG_NXTHDR(header, one)) {
		if (one->cmsg_level == IPPROTO_UDP && one->cmsg_type == UDP_GRO) {
			int size;

			memcpy(&size, CMSG_DATA(one), sizeof(size));
			if (size > 0 && (size_t)size < arrival->length)
				arrival->each = (size_t)size;
		}
	}
}

/* Put the headers back in front of their payloads. */
static void put_together(struct arrival *arrival)
{
	size_t header = arrival->layout.header, size = arrival->layout.size, each = header + size;

	for (size_t i = (arrival->length - 1) / each; i > 0; i--) {
		uint8_t *place = arrival->data + i * each;
		size_t left = arrival->length - i * each, first = left < header ? left : header;
		size_t length = left < each ? left - first : size;

		memmove(place + first, arrival->data + header + i * size, length);
		memcpy(place, arrival->aside + (i - 1) * header, first);
	}
	arrival->aside = NULL;
}

/* A message's packet, with its headers where they lie. */
static enum drop parse(struct arrival *arrival, size_t at, size_t length, struct packet *packet)
{
	size_t header = arrival->layout.header, number;
	enum drop reason;

	if (arrival->aside == NULL || at == 0)
		return packet_parse(packet, arrival->data + at, length);
	number = at / arrival->each;
	reason = packet_parse(packet, arrival->aside + (number - 1) * header, length);
	packet->payload = arrival->data + header + number * arrival->layout.size;
	return reason;
}

static enum drop take_packet(struct receiver *receiver, struct arrival *arrival, uint32_t endpoint, size_t at,
			     size_t length)
{
	struct packet packet;
	enum drop reason = parse(arrival, at, length, &packet);

	if (arrival->aside != NULL && at > 0 &&
	    (reason != DROP_NONE || packet_headers(&packet) != arrival->layout.header)) {
		merger_flush(&receiver->merger); /* what is to be moved */
		put_together(arrival);
		reason = parse(arrival, at, length, &packet);
	}
	if (reason != DROP_NONE)
		return reason;
	return take(receiver, endpoint, &packet);
}

static void take_message(struct receiver *receiver, size_t index)
{
	struct worker *worker = receiver->worker;
	struct mmsghdr *header = &receiver->headers[index];
	struct arrival arrival = {
		.data = receiver->buffers + index * RX_BUFFER,
		.layout = receiver->expected,
		.length = header->msg_len,
	};
	uint32_t endpoint = table_endpoint(receiver->table, header->msg_hdr.msg_name, header->msg_hdr.msg_namelen);
	bool is_stranger = endpoint == ENDPOINT_UNKNOWN && !worker->engine->allow_unknown;
	size_t at = 0, first = arrival.layout.header + arrival.layout.size;

	if (header->msg_hdr.msg_flags & MSG_TRUNC) {
		worker_count(worker, COUNT_UDP_PACKETS, 1);
		worker_drop(worker, DROP_OVERSIZED, 1);
		return;
	}
	read_control(&arrival, &header->msg_hdr);
	if (header->msg_hdr.msg_iovlen > 1 && arrival.length > first && !is_stranger) {
		arrival.aside = aside_of(receiver, index);
		if (arrival.each != first)
			put_together(&arrival);
	}
	do {
		size_t left = arrival.length - at;
		size_t length = left < arrival.each ? left : arrival.each;
		enum drop reason = DROP_UNKNOWN_PEER;

		if (!is_stranger)
			reason = take_packet(receiver, &arrival, endpoint, at, length);
		worker_count(worker, COUNT_UDP_PACKETS, 1);
		if (reason != DROP_NONE)
			worker_drop(worker, reason, 1);
		at += length;
	} while (at < arrival.length);
}

/*
 * Where the bytes of a message go that is expected to be of segments: all payloads side by side, behind the headers
 * of the first; the others' headers aside. Returns how many pieces.
 */
static size_t lay_out(struct receiver *receiver, size_t index, const struct layout *layout)
{
	uint8_t *data = receiver->buffers + index * RX_BUFFER, *aside = aside_of(receiver, index);
	struct iovec *pieces = receiver->pieces[index];
	size_t left = RX_BUFFER - layout->header - layout->size, count = 1;

	pieces[0] = (struct iovec){.iov_base = data, .iov_len = layout->header + layout->size};
	for (data += pieces[0].iov_len; left > 0;) {
		size_t first = left < layout->header ? left : layout->header;
		size_t length = left - first < layout->size ? left - first : layout->size;

		pieces[count++] = (struct iovec){.iov_base = aside, .iov_len = first};
		pieces[count++] = (struct iovec){.iov_base = data, .iov_len = length};
		aside += first;
		data += length;
		left -= first + length;
	}
	return count;
}

static void prepare(struct receiver *receiver)
{
	bool is_expected = receiver->at_once == RX_FEW && receiver->layout.header > 0;

	receiver->expected = receiver->layout;
	for (size_t i = 0; i < receiver->at_once; i++) {
		struct message *message = &receiver->messages[i];

		message->piece = (struct iovec){.iov_base = receiver->buffers + i * RX_BUFFER, .iov_len = RX_BUFFER};
		receiver->headers[i].msg_hdr = (struct msghdr){
			.msg_name = &message->from,
			.msg_namelen = sizeof(message->from),
			.msg_iov = is_expected ? receiver->pieces[i] : &message->piece,
			.msg_iovlen = is_expected ? lay_out(receiver, i, &receiver->layout) : 1,
			.msg_control = &message->control,
			.msg_controllen = sizeof(message->control),
		};
	}
}

static void take_messages(struct receiver *receiver, unsigned int count)
{
	bool are_large = false;

	receiver->table = worker_enter(receiver->worker);
	receiver->source_size = 0;
	receiver->peer = NULL;
	for (unsigned int i = 0; i < count; i++) {
		take_message(receiver, i);
		are_large |= receiver->headers[i].msg_len >= RX_LARGE;
	}
	merger_flush(&receiver->merger);
	count_peer(receiver);
	worker_leave(receiver->worker);
	worker_count(receiver->worker, COUNT_UDP_RECEIVES, count);
	if (are_large)
		receiver->at_once = RX_FEW;
	else if (count == receiver->at_once)
		receiver->at_once = RX_MESSAGES;
}

/* Whether a datagram has come, or an error to take out of the way. */
static bool wait_for_more(struct receiver *receiver)
{
	short events = POLLIN;
	bool result = worker_wait(receiver->worker, receiver->worker->udp[0], &events, -1);

	if (events & POLLERR)
		worker_drain(receiver->worker->udp[0]);
	return result;
}

/* Whether the socket can still be used: errors that others caused are about datagrams, not about it. */
static bool can_go_on(struct receiver *receiver, int error, unsigned int *errors)
{
	switch (error) {
	case EINTR:
		return true;
	case EAGAIN:
		*errors = 0;
		return wait_for_more(receiver);
	case EBADF:
	case ENOTSOCK:
	case EINVAL:
	case EFAULT:
		break;
	default:
		worker_drain(receiver->worker->udp[0]);
		if (error == EMSGSIZE)
			worker_tell(receiver->worker);
		if (++*errors < RX_PATIENCE)
			return true;
	}
	worker_fail(receiver->worker, error, "receive from the UDP socket");
	return false;
}

static void receive_all(struct receiver *receiver)
{
	struct worker *worker = receiver->worker;
	unsigned int errors = 0;

	while (!receiver->is_gone && !worker_should_stop(worker)) {
		int count;

		prepare(receiver);
		count = recvmmsg(worker->udp[0], receiver->headers, receiver->at_once, MSG_DONTWAIT, NULL);
		if (count > 0) {
			errors = 0;
			take_messages(receiver, (unsigned int)count);
		} else if (!can_go_on(receiver, errno, &errors)) {
			return;
		}
	}
}

void receive(struct worker *worker)
{
	struct receiver *receiver = calloc(1, sizeof(*receiver));

	/* Not touched before a message comes that fills it: the kernel gives no memory before that. */
	if (receiver != NULL) {
		receiver->buffers = malloc((size_t)RX_MESSAGES * RX_BUFFER);
		receiver->aside = calloc(RX_FEW, RX_ASIDE);
	}
	if (receiver == NULL || receiver->buffers == NULL || receiver->aside == NULL) {
		worker_fail(worker, ENOMEM, "start a receiver");
	} else {
		receiver->worker = worker;
		receiver->at_once = RX_MESSAGES;
		merger_init(&receiver->merger, on_merged, receiver);
		receive_all(receiver);
	}
	if (receiver != NULL) {
		free(receiver->buffers);
		free(receiver->aside);
	}
	free(receiver);
}
