/* SPDX-License-Identifier: Apache-2.0 */
/*
 * At the TUN device's egress: put outer headers in front of a packet and send it out of the underlay's interface.
 * Super-packets pass whole; the kernel, or the network card, cuts them where it has to (SKB_GSO_UDP_TUNNEL).
 * What has no peer here goes on to the device's reader, the engine.
 */
#pragma once

#include "maps.h"

/*
 * Room in front: the outer headers, and before them an Ethernet header, which bpf_redirect_neigh() fills in. What the
 * kernel puts no headers in front of (super-packets that are neither TCP's nor UDP's, and what is in a tunnel already) is
 * left as it was: the device cuts it, for the engine.
 */
static inline bool has_room(struct __sk_buff *skb, __u32 headers, __u64 family)
{
	const __u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET | BPF_F_ADJ_ROOM_ENCAP_L4_UDP | family;

	return !bpf_skb_adjust_room(skb, headers, BPF_ADJ_ROOM_MAC, flags);
}

/* What one inner packet on the wire will have, in bytes; of a super-packet each piece. */
static inline __u32 wire_length(const struct __sk_buff *skb, __u32 header)
{
	/* TCP's header with all its options is 60 bytes: a piece may be taken for longer than it is, not for shorter. */
	return skb->gso_size ? header + 60 + skb->gso_size : skb->len;
}

static inline bool fits(const struct __sk_buff *skb, __u32 mtu, __u32 header, __u32 outer)
{
	return skb->len + outer <= (skb->gso_size ? MOST_LENGTH : MOST_WHOLE) &&
	       (!mtu || wire_length(skb, header) <= mtu);
}

/*
 * What the program at the other end leaves to its engine has to leave from this one: a checksum that a socket has left
 * to the card would come to user space unfinished, and of a super-packet nobody there would know the pieces' size.
 */
static inline bool is_plain4(const struct iphdr *inner)
{
	return inner->ihl == sizeof(*inner) / 4;
}

static inline bool is_plain6(const struct __sk_buff *skb, const struct ipv6hdr *inner)
{
	return !skb->gso_size || inner->nexthdr == IPPROTO_TCP || inner->nexthdr == IPPROTO_UDP;
}

/* Out of the interface, to a peer that is near, or to the router that the kernel looks up. */
static inline int send4(const struct peer4 *peer)
{
	struct bpf_redir_neigh next = { .nh_family = AF_INET, .ipv4_nh = peer->remote };

	return peer->is_near ? bpf_redirect_neigh(peer->device, &next, sizeof(next), 0) :
			       bpf_redirect_neigh(peer->device, NULL, 0, 0);
}

static inline int send6(const struct peer6 *peer)
{
	struct bpf_redir_neigh next = { .nh_family = AF_INET6 };

	copy6(next.ipv6_nh, peer->remote);
	return peer->is_near ? bpf_redirect_neigh(peer->device, &next, sizeof(next), 0) :
			       bpf_redirect_neigh(peer->device, NULL, 0, 0);
}

static inline int encapsulate4(struct __sk_buff *skb)
{
	struct iphdr *inner = (void *)(long)skb->data;
	struct subnet4 to = { .length = 32 };
	struct headers4 *outer;
	struct peer4 *peer;
	__u32 length = skb->len;

	if ((void *)(inner + 1) > (void *)(long)skb->data_end)
		return pass(TO_ENGINE);
	to.address = inner->daddr;
	peer = bpf_map_lookup_elem(&peers4, &to);
	if (!peer || !peer->device || !is_plain4(inner) || !fits(skb, peer->mtu, sizeof(*inner), sizeof(*outer)))
		return pass(TO_ENGINE);
	if (inner->ttl <= 1)
		return drop(DROP_TTL);
	if (!has_room(skb, sizeof(*outer), BPF_F_ADJ_ROOM_ENCAP_L3_IPV4))
		return pass(TO_ENGINE);
	if (bpf_skb_change_head(skb, ETH_HLEN, 0))
		return drop(DROP_FAILED);
	outer = (void *)(long)skb->data + ETH_HLEN;
	inner = (void *)(outer + 1);
	if ((void *)(inner + 1) > (void *)(long)skb->data_end)
		return drop(DROP_FAILED);
	age4(inner);

	outer->ip.version = 4;
	outer->ip.ihl = sizeof(outer->ip) / 4;
	outer->ip.tos = 0;
	outer->ip.tot_len = bpf_htons(length + sizeof(*outer));
	outer->ip.id = 0; /* never fragmented, so never told apart (RFC 6864) */
	outer->ip.frag_off = bpf_htons(IP_DF);
	outer->ip.ttl = 64;
	outer->ip.protocol = IPPROTO_UDP;
	outer->ip.saddr = settings.own4;
	outer->ip.daddr = peer->remote;
	outer->ip.check = 0;
	outer->ip.check = ~header_sum(&outer->ip);
	outer->udp.source = settings.port;
	outer->udp.dest = peer->port;
	outer->udp.len = bpf_htons(length + sizeof(outer->udp));
	outer->udp.check = 0; /* no checksum: the inner packet has its own */
	note(peer, tx, length);
	count(TX_PACKETS, 1);
	count(TX_BYTES, length);
	return send4(peer);
}

static inline int encapsulate6(struct __sk_buff *skb)
{
	struct ipv6hdr *inner = (void *)(long)skb->data;
	struct subnet6 to = { .length = 128 };
	struct headers6 *outer;
	struct peer6 *peer;
	__u32 length = skb->len;

	if ((void *)(inner + 1) > (void *)(long)skb->data_end)
		return pass(TO_ENGINE);
	copy6(to.address, inner->daddr.in6_u.u6_addr32);
	peer = bpf_map_lookup_elem(&peers6, &to);
	if (!peer || !peer->device || !is_plain6(skb, inner) ||
	    !fits(skb, peer->mtu, sizeof(*inner), sizeof(*outer)))
		return pass(TO_ENGINE);
	if (inner->hop_limit <= 1)
		return drop(DROP_TTL);
	if (!has_room(skb, sizeof(*outer), BPF_F_ADJ_ROOM_ENCAP_L3_IPV6))
		return pass(TO_ENGINE);
	if (bpf_skb_change_head(skb, ETH_HLEN, 0))
		return drop(DROP_FAILED);
	outer = (void *)(long)skb->data + ETH_HLEN;
	inner = (void *)(outer + 1);
	if ((void *)(inner + 1) > (void *)(long)skb->data_end)
		return drop(DROP_FAILED);
	inner->hop_limit--;

	outer->ip.version = 6;
	outer->ip.priority = 0;
	outer->ip.flow_lbl[0] = outer->ip.flow_lbl[1] = outer->ip.flow_lbl[2] = 0;
	outer->ip.payload_len = bpf_htons(length + sizeof(outer->udp));
	outer->ip.nexthdr = IPPROTO_UDP;
	outer->ip.hop_limit = 64;
	copy6(outer->ip.saddr.in6_u.u6_addr32, settings.own6);
	copy6(outer->ip.daddr.in6_u.u6_addr32, peer->remote);
	outer->udp.source = settings.port;
	outer->udp.dest = peer->port;
	outer->udp.len = bpf_htons(length + sizeof(outer->udp));
	outer->udp.check = 0; /* no checksum, as RFC 6935 allows for tunnels */
	note(peer, tx, length);
	count(TX_PACKETS, 1);
	count(TX_BYTES, length);
	return send6(peer);
}

SEC("tc")
int loden_encap(struct __sk_buff *skb)
{
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return encapsulate4(skb);
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return encapsulate6(skb);
	return pass(TO_ENGINE);
}
