/* SPDX-License-Identifier: Apache-2.0 */
/* What all programs share: settings, maps, counters and headers. */
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "passage.h"

#define MOST_PEERS 131072
#define MOST_LENGTH 65535 /* of an IP packet, and so of an outer one */
#define MOST_WHOLE 15360 /* of a packet that is none of several: the kernel adds room to four pages of memory at most */
#define AF_INET 2
#define AF_INET6 10
#define IP_DF 0x4000
#define IP_FRAGMENT 0x3fff /* "more fragments", and the offset */

/*
 * Settings, written once before the programs are loaded. Addresses and the port are in network byte order. They have a
 * section of their own: the compiler puts constants of its own into .rodata.
 */
const volatile struct {
	__be32 own4;    /* outer addresses of this host; all zero where it has none */
	__be32 own6[4];
	__be16 port;    /* UDP port of this host */
	__u8 allow_unknown; /* take in whatever arrives, as flannel does */
	__u8 pad;
	__u32 tun;      /* index of the TUN device */
	__be32 inside4; /* this host's address in the tunnel; the next one is that of its containers' bridge */
	__be32 inside6[4];
	__be32 detour_vni;  /* of the VXLAN device of detour.h, as its header has it */
	__be16 detour_port; /* the device's UDP port; 0: there is none */
	__u8 detour_source[6]; /* of our frames to it; secret, because GRO merges frames of one source alone, and asks nobody */
} settings SEC(".rodata.settings") = {};

/*
 * What one CPU counts and what others read or count lie a cache line apart: beside each other they cost a twentieth of
 * TCP's throughput.
 */
#define CACHE_LINE 64

struct peer4 {
	__be32 remote;  /* where the peer is reached */
	__be16 port;
	__u16 mtu;      /* most bytes of an inner packet; 0: whatever the TUN device carries */
	__u32 device;   /* index of the outgoing interface; 0: let the engine find a way */
	__u8 length;    /* of the subnet's prefix: a look-up from outside may find a wider one, another peer's */
	__u8 is_near;   /* on the interface's own network: no route has to be looked up */
	__u8 pad[CACHE_LINE - 14];
	__u64 tx_packets, tx_bytes;
	__u8 pad2[CACHE_LINE - 16];
	__u64 rx_packets, rx_bytes;
	struct passage passage; /* of its packets through the VXLAN device */
};

struct peer6 {
	__be32 remote[4];
	__be16 port;
	__u16 mtu;
	__u32 device;
	__u8 length;
	__u8 is_near;
	__u8 pad[CACHE_LINE - 26];
	__u64 tx_packets, tx_bytes;
	__u8 pad2[CACHE_LINE - 16];
	__u64 rx_packets, rx_bytes;
	struct passage passage; /* of its packets through the VXLAN device */
};

struct subnet4 {
	__u32 length; /* of the prefix, bits */
	__be32 address;
};

struct subnet6 {
	__u32 length;
	__be32 address[4];
};

/* Where a peer is reached: an IPv4 address fills the first word. */
struct remote {
	__be32 address[4];
	__be16 port;
	__u16 pad;
};

/* The peers, by the subnet of their containers. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MOST_PEERS);
	__type(key, struct subnet4);
	__type(value, struct peer4);
} peers4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MOST_PEERS);
	__type(key, struct subnet6);
	__type(value, struct peer6);
} peers6 SEC(".maps");

/* Where any peer is reached, and how many subnets are behind it: tells a stranger from a peer that lies. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MOST_PEERS);
	__type(key, struct remote);
	__type(value, __u32);
} remotes SEC(".maps");

/* Indexes of the counters; tables/udp_bpf.py has their names, in this order. */
enum counter {
	TX_PACKETS,
	TX_BYTES,
	RX_PACKETS,
	RX_BYTES,
	TO_ENGINE,    /* a packet for the TUN's reader: no peer known, too big, no way known, not plain */
	FROM_ENGINE,  /* a datagram for a socket's reader: fragments, options, several packets, rows */
	DETOURED,     /* of what came in, sent through the VXLAN device */
	UNDETOURED,   /* of what came in, not sent there because nothing comes out */
	DROP_TTL,     /* the inner packet has lived long enough */
	DROP_UNKNOWN, /* the datagram's sender is no peer */
	DROP_SPOOFED, /* the sender is a peer, the inner source is not in its subnet */
	DROP_TRUNCATED,
	DROP_VERSION,
	DROP_LENGTH,
	DROP_CHECKSUM,
	DROP_FAILED,  /* the kernel could not add, remove or change headers */
	COUNTERS,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* Outer headers. */
struct headers4 {
	struct iphdr ip;
	struct udphdr udp;
};

struct headers6 {
	struct ipv6hdr ip;
	struct udphdr udp;
};

_Static_assert(sizeof(struct headers4) == 28 && sizeof(struct headers6) == 48, "as on the wire");

static inline void copy6(__be32 to[4], const volatile __be32 from[4])
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
}

static inline bool same6(const volatile __be32 one[4], const volatile __be32 other[4])
{
	return one[0] == other[0] && one[1] == other[1] && one[2] == other[2] && one[3] == other[3];
}

static inline bool is_own4(__be32 address)
{
	return bpf_ntohl(address) - bpf_ntohl(settings.inside4) <= 1;
}

static inline bool is_own6(const volatile __be32 address[4])
{
	const volatile __be32 *own = settings.inside6;

	return address[0] == own[0] && address[1] == own[1] && address[2] == own[2] &&
	       bpf_ntohl(address[3]) - bpf_ntohl(own[3]) <= 1;
}

static inline void count(__u32 what, __u64 by)
{
	__u64 *counter = bpf_map_lookup_elem(&counters, &what);

	if (counter)
		*counter += by; /* this CPU's own, and programs of one hook do not interrupt each other */
}

static inline int drop(__u32 why)
{
	count(why, 1);
	return TC_ACT_SHOT;
}

/* TC_ACT_UNSPEC and not TC_ACT_OK: the programs of others behind ours get their turn. */
static inline int pass(__u32 where)
{
	count(where, 1);
	return TC_ACT_UNSPEC;
}

/* One more packet and its bytes; a peer's counters are shared by all CPUs. */
#define note(peer, direction, bytes)                                                                           \
	do {                                                                                                   \
		__sync_fetch_and_add(&(peer)->direction##_packets, 1);                                         \
		__sync_fetch_and_add(&(peer)->direction##_bytes, (bytes));                                     \
	} while (0)

/* A TTL that goes down by one takes 0x0100 from its word and gives it to the checksum (RFC 1141). */
static inline void age4(struct iphdr *ip)
{
	__u32 sum = bpf_ntohs(ip->check) + 0x0100;

	ip->check = bpf_htons(sum + (sum >= 0xffff));
	ip->ttl--;
}

/* The one's complement sum of a header without options: 0xffff where its checksum is right. */
static inline __u32 header_sum(const struct iphdr *ip)
{
	const __u16 *word = (const void *)ip;
	__u32 sum = 0;

#pragma unroll
	for (int i = 0; i < (int)sizeof(*ip) / 2; i++)
		sum += word[i];
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}
