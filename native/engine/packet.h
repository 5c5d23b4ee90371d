/* SPDX-License-Identifier: Apache-2.0 */
/*
 * IP packets as bytes: checked, forwarded, cut, merged, fragmented, answered.
 *
 * Nothing here calls the system, keeps state outside its arguments, or trusts a length that a packet
 * states before it was compared with the bytes that are there.
 */
#ifndef LODEN_PACKET_H
#define LODEN_PACKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define PACKET_MAX 65535u	 /* bytes of an IP packet without jumbo payload */
#define CUT_HEADERS_MAX 512u	 /* of a super-packet: network and transport header, options included */
#define MERGE_PIECES 64u	 /* segments in one merged packet, as many as UDP_SEGMENT takes */
#define MERGE_FLOWS 8u		 /* flows that are being merged at the same time */
#define ICMP_MAX 1280u		 /* bytes of an error message: RFC 4443 section 2.4 (c) */

/* Why a packet goes no further. drop_names has the names that Python sees. */
enum drop {
	DROP_NONE,
	DROP_TRUNCATED,	   /* ends within its own header */
	DROP_OVERSIZED,	   /* larger than any buffer: MSG_TRUNC */
	DROP_VERSION,	   /* neither IPv4 nor IPv6 */
	DROP_HEADER,	   /* IPv4 header length below 20 */
	DROP_LENGTH,	   /* says that it is longer than what came, or shorter than its header */
	DROP_CHECKSUM,	   /* of the IPv4 header */
	DROP_OPTIONS,	   /* IPv4 options or IPv6 extension headers that do not add up */
	DROP_TTL,	   /* TTL or hop limit is used up */
	DROP_OFFLOAD,	   /* the virtio header does not fit the packet behind it */
	DROP_UNKNOWN_PEER, /* the outer source is no peer's */
	DROP_SPOOFED,	   /* the inner source is not in the subnet of the peer that sent it */
	DROP_NO_ROUTE,	   /* the inner destination is in nobody's subnet */
	DROP_NO_SOCKET,	   /* no socket of the peer's address family */
	DROP_TOO_BIG,	   /* for the peer's or the path's MTU, and may not be fragmented */
	DROP_FULL,	   /* the socket's buffer or the device's queue */
	DROP_UNREACHABLE,  /* the underlay has no way, or does not let us */
	DROP_REFUSED,	   /* the TUN device does not take it, or is down */
	DROP_COUNT,
};

extern const char *const drop_names[DROP_COUNT];

/* struct virtio_net_hdr of <linux/virtio_net.h>, in the machine's byte order; older headers lack USO. */
struct offload {
	uint8_t flags;
	uint8_t type;
	uint16_t header;
	uint16_t size;
	uint16_t checksum_start;
	uint16_t checksum_offset;
};
_Static_assert(sizeof(struct offload) == 10, "the header that TUN devices put before a packet");

enum {
	OFFLOAD_NEEDS_CHECKSUM = 1,
	OFFLOAD_NONE = 0,
	OFFLOAD_TCP4 = 1,
	OFFLOAD_TCP6 = 4,
	OFFLOAD_UDP = 5,
	OFFLOAD_ECN = 0x80,
};

/* What packet_parse found; the bytes stay where they are. */
struct packet {
	uint8_t *data;
	const uint8_t *payload; /* of TCP or UDP, where it does not lie behind the headers; else NULL */
	uint32_t length;    /* as the packet states it: what is behind does not belong to it */
	uint16_t network;   /* bytes of the IP header with its options or extension headers */
	uint8_t version;    /* 4 or 6 */
	uint8_t protocol;   /* what is behind the network header */
	bool has_options;   /* or extension headers */
	bool is_fragment;   /* first, later or atomic */
	bool is_later;	    /* not the first: there is no transport header */
	bool dont_fragment; /* DF; always for IPv6 */
};

/* Check a packet as a router does. Everything else here takes only what passed. */
enum drop packet_parse(struct packet *ret, uint8_t *data, size_t length);

/* Bytes of the network header and the TCP or UDP header behind it; 0: there is no whole one. */
uint32_t packet_headers(const struct packet *packet);

/* Source and destination: 4 or 16 bytes. */
const uint8_t *packet_source(const struct packet *packet);
const uint8_t *packet_target(const struct packet *packet);

/* Take one hop off TTL or hop limit; the IPv4 checksum follows without a new sum (RFC 1624). */
enum drop packet_forward(struct packet *packet);

/* The ones' complement sum of the bytes in the machine's order, to be continued at even offsets. */
uint64_t checksum_add(uint64_t sum, const uint8_t *data, size_t length);
/* The same in 16 bits, not complemented: 0xffff over data that carries its right checksum. */
uint16_t checksum_fold(uint64_t sum);

/* Fill in the checksum that the kernel left to the device. */
enum drop offload_finish(const struct offload *offload, struct packet *packet);

/* A super-packet, and how it becomes packets of wire size. */
struct cut {
	const uint8_t *headers; /* network and transport */
	const uint8_t *payload;
	uint32_t header; /* bytes of the headers */
	uint32_t network;
	uint32_t size;	 /* payload bytes of each segment but the last */
	uint32_t stride; /* from one payload to the next */
	uint32_t total;	 /* payload bytes of all */
	uint32_t count;
	uint32_t pseudo; /* sum over the pseudo header but for its length */
	uint8_t version;
	uint8_t protocol;
};

enum drop cut_init(struct cut *ret, const struct offload *offload, const struct packet *packet);
/* Payload bytes of a segment. */
uint32_t cut_length(const struct cut *cut, uint32_t index);
/*
 * Write the headers (cut->header bytes) that one segment has in front of its payload, as the kernel's own
 * segmentation writes them. The payload is given for its checksum: in a merged packet the segments are apart.
 */
void cut_header(const struct cut *cut, uint32_t index, const uint8_t *payload, uint32_t length, uint8_t *out);

/* One flow's neighbouring segments, on their way to become one packet. */
struct merge {
	struct packet first;
	struct iovec pieces[MERGE_PIECES + 1]; /* the first one's headers, all payloads; neighbours are one */
	uint32_t piece_count;
	uint32_t count;			   /* segments; 0: this place is free */
	uint32_t header;		   /* bytes of network and transport header */
	uint32_t size;			   /* payload bytes of the first */
	uint32_t total;			   /* payload bytes of all */
	uint32_t next_sequence;
	uint16_t next_id;
	uint16_t id_step;
	bool is_closed; /* nothing can follow: a short one came, or a push */
};

/*
 * Takes packets in the order in which they came, gives them on merged. The order within a flow stays; flows
 * may overtake each other, as they do in the kernel's GRO.
 */
struct merger {
	struct merge flows[MERGE_FLOWS];
	uint32_t oldest;
	bool no_udp; /* the kernel takes no UDP super-packets */
	/* Write one packet: pieces[0..piece_count) hold segments that came one by one, described by the offload. */
	void (*write)(void *context, const struct offload *offload, struct merge *merge);
	void *context;
};

void merger_init(struct merger *merger, void (*write)(void *, const struct offload *, struct merge *), void *context);
/* Packets stay where they are until merger_flush: the headers of a first one are written to. */
void merger_put(struct merger *merger, const struct packet *packet);
void merger_flush(struct merger *merger);

/*
 * The next fragment of an IPv4 packet (RFC 791).
 *
 * offset: 0 before the first call, then as it was left. capacity: of out; at least mtu.
 * Returns its bytes, 0 when there is none left; 0 at once if the MTU has no room for 8 bytes of payload.
 */
size_t packet_fragment(const struct packet *packet, uint32_t mtu, uint32_t *offset, uint8_t *out, size_t capacity);

enum icmp {
	ICMP_NO_ROUTE, /* type 3 code 0; ICMPv6 type 1 code 0 */
	ICMP_TOO_BIG,  /* type 3 code 4; ICMPv6 type 2 */
};

/*
 * The ICMP error that a packet deserves, of the packet's family.
 *
 * Of IPv4, its header and 8 bytes are quoted; of IPv6, as much as fits.
 * source: 4 or 16 bytes. out: ICMP_MAX bytes.
 * Returns its bytes, 0 when it deserves none: RFC 1122 section 3.2.2, RFC 4443 section 2.4 (e).
 */
size_t packet_icmp(const struct packet *packet, enum icmp kind, uint32_t mtu, const uint8_t *source, uint8_t *out);

#endif
