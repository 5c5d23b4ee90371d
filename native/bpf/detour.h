/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Some packets go through a VXLAN device of this host before the TUN device gets them, because the kernel does for its own
 * tunnels what it does for no program:
 *
 * - TCP that a network card cut comes in segments, and behind a tunnel the kernel merges them again (GRO). Routing, bridges
 *   and wires then carry one super-packet. It merges nothing that a program redirects.
 * - What comes over a virtual wire has never been cut, and keeps the marks of a tunnel (skb->encapsulation,
 *   SKB_GSO_UDP_TUNNEL) when a program takes its outer headers off: up to Linux 6.18 only the kernel's own tunnels clear
 *   them. Until then every bridge cuts TCP's super-packets, because none has offloads for tunnels, and datagrams in a row
 *   (UDP_SEGMENT) are cut in the wrong place. (For later ones BPF_F_ADJ_ROOM_DECAP_L4_UDP is under way.)
 *
 * VXLAN's headers are put in front of the inner packet, and the device's socket is given the datagram (bpf_sk_assign),
 * whatever port that names. Behind the device the inner packet goes the way of all others.
 *
 *	loden_decap --> INPUT --> socket of the VXLAN device --> GRO --> its ingress: loden_detour --> TUN
 */
#pragma once

#include <linux/tcp.h>

#include "maps.h"

/*
 * In skb->priority, from here to loden_detour: whoever else finds the device's port has not passed loden_decap. No packet
 * brings it along: a veth clears it, and a socket of this host may set more than 6 with CAP_NET_RAW or CAP_NET_ADMIN alone,
 * and could then send as any peer as well.
 */
#define DETOUR_MARK 0x4c4f444e
#define VNI_IS_VALID 0x08000000 /* RFC 7348 section 5 */

/* What stands between the outer IP header and the inner one. */
struct detour {
	struct udphdr udp;
	__be32 flags;
	__be32 vni;
	struct ethhdr ethernet;
} __attribute__((packed));

#define MOST_TCP_HEADER 60

#define DETOUR_BYTES ((__s32)(sizeof(struct detour) - sizeof(struct udphdr))) /* more than before */

_Static_assert(sizeof(struct detour) == 30, "as on the wire");

/*
 * Whether a TCP header, at a place of the frame, says no more than what has come: that may overtake what does. (In a fragment
 * other bytes are taken for it: its order says nothing.)
 */
static inline bool is_bare_ack(struct __sk_buff *skb, __u32 at)
{
	struct tcphdr tcp;

	if (skb->len > at + MOST_TCP_HEADER || bpf_skb_load_bytes(skb, at, &tcp, sizeof(tcp)))
		return false;
	return skb->len == at + tcp.doff * 4 && !(tcp.fin || tcp.syn || tcp.rst);
}

/*
 * Whether a packet is to go through the VXLAN device. Of TCP all does, that none overtakes another of its connection, but
 * not what is for this host itself: that ends here, and one connection is faster without.
 */
static inline bool needs_detour(struct __sk_buff *skb, __u8 protocol, bool is_own, __u32 at)
{
	if (!settings.detour_port)
		return false;
	return protocol == IPPROTO_TCP ? !is_own && !is_bare_ack(skb, at) : skb->gso_size;
}

/* Whether the socket of the VXLAN device gets the packet; there may be none, and the packet may be too long. */
static inline bool give_to(struct __sk_buff *skb, struct bpf_sock_tuple *to, __u32 size)
{
	struct bpf_sock *socket;
	bool is_given;

	if (skb->len - ETH_HLEN + DETOUR_BYTES > MOST_LENGTH)
		return false;
	socket = bpf_sk_lookup_udp(skb, to, size, BPF_F_CURRENT_NETNS, 0);
	if (!socket)
		return false;
	is_given = !bpf_sk_assign(skb, socket, 0);
	bpf_sk_release(socket);
	return is_given;
}

/*
 * Put VXLAN's headers in front of an inner packet of so many bytes. ip: those of the outer IP header, which says so already.
 */
static inline int detour(struct __sk_buff *skb, __u32 ip, __u16 protocol, __u32 length)
{
	struct detour headers = {
		.udp = {
			/* As the socket has no peer: else NAT takes it away in INPUT since v6.6 (nf_nat_inet_port_was_mangled). */
			.source = 0,
			.dest = settings.port, /* which firewalls let in */
			.len = bpf_htons(sizeof(headers) + length),
		},
		.flags = bpf_htonl(VNI_IS_VALID),
		.vni = settings.detour_vni,
		.ethernet = { .h_proto = bpf_htons(protocol) },
	};

	for (int i = 0; i < ETH_ALEN; i++) /* no memcpy(): settings are volatile */
		headers.ethernet.h_source[i] = settings.detour_source[i];

	skb->priority = DETOUR_MARK;
	if (bpf_skb_adjust_room(skb, DETOUR_BYTES, BPF_ADJ_ROOM_NET, BPF_F_ADJ_ROOM_FIXED_GSO) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN + ip, &headers, sizeof(headers), BPF_F_RECOMPUTE_CSUM))
		return drop(DROP_FAILED);
	count(RX_PACKETS, 1);
	count(RX_BYTES, length);
	count(DETOURED, 1);
	/*
	 * And not TC_ACT_UNSPEC: the programs of others behind ours see no packet of the short way either, and nobody may
	 * put this one aside (mirred to an ifb does), because it holds no reference to the socket.
	 */
	return TC_ACT_OK;
}

static inline bool may_detour4(struct __sk_buff *skb, const struct headers4 *outer)
{
	struct bpf_sock_tuple to = { .ipv4 = {
		.saddr = outer->ip.saddr,
		.daddr = outer->ip.daddr,
		.sport = outer->udp.source,
		.dport = settings.detour_port,
	} };

	return give_to(skb, &to, sizeof(to.ipv4));
}

static inline bool may_detour6(struct __sk_buff *skb, const struct headers6 *outer)
{
	struct bpf_sock_tuple to = { .ipv6 = {
		.sport = outer->udp.source,
		.dport = settings.detour_port,
	} };

	copy6(to.ipv6.saddr, outer->ip.saddr.in6_u.u6_addr32);
	copy6(to.ipv6.daddr, outer->ip.daddr.in6_u.u6_addr32);
	return give_to(skb, &to, sizeof(to.ipv6));
}

static inline int detour4(struct __sk_buff *skb, struct headers4 *outer, __u32 length)
{
	outer->ip.tot_len = bpf_htons(length + sizeof(*outer) + DETOUR_BYTES);
	outer->ip.check = 0;
	outer->ip.check = ~header_sum(&outer->ip);
	return detour(skb, sizeof(outer->ip), ETH_P_IP, length);
}

static inline int detour6(struct __sk_buff *skb, struct headers6 *outer, __u32 length)
{
	outer->ip.payload_len = bpf_htons(length + sizeof(outer->udp) + DETOUR_BYTES);
	bpf_csum_update(skb, bpf_htons(DETOUR_BYTES));
	return detour(skb, sizeof(outer->ip), ETH_P_IPV6, length);
}

/* Whose packet has come out: its peer, if it has one. */
static inline struct passage *find_passage(struct __sk_buff *skb)
{
	struct subnet4 from4 = { .length = 32 };
	struct subnet6 from6 = { .length = 128 };
	struct peer4 *peer4;
	struct peer6 *peer6;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct iphdr, saddr), &from4.address, sizeof(from4.address)))
			return NULL;
		peer4 = bpf_map_lookup_elem(&peers4, &from4);
		return peer4 ? &peer4->passage : NULL;
	}
	if (bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr), from6.address, sizeof(from6.address)))
		return NULL;
	peer6 = bpf_map_lookup_elem(&peers6, &from6);
	return peer6 ? &peer6->passage : NULL;
}

/* At the VXLAN device's ingress: what has come this way is where it would have been without; strangers are not let in. */
SEC("tc")
int loden_detour(struct __sk_buff *skb)
{
	struct passage *passage;

	if (skb->priority != DETOUR_MARK)
		return drop(DROP_UNKNOWN);
	passage = find_passage(skb);
	if (passage)
		has_come_out(passage);
	return bpf_redirect(settings.tun, BPF_F_INGRESS); /* which clears the mark */
}
