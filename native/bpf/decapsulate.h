/* SPDX-License-Identifier: Apache-2.0 */
/*
 * At the underlay's ingress: take the outer headers off a datagram for our port and hand what is in it to the TUN
 * device, as if it had come in there. The sender must be a peer, and the inner source lie in that peer's subnet.
 * What is not for us goes on its way; what takes more than looking goes to the socket's reader, the engine.
 */
#pragma once

#include "detour.h"
#include "encapsulate.h"

/* What has to be behind an inner header where the outer one has a checksum; all that containers send has it. */
#define FIRST_BYTES 8

/* A sender of which no peer with this inner source is known: a stranger, or a peer that lies. */
static inline int refuse(const struct remote *from)
{
	return drop(bpf_map_lookup_elem(&remotes, from) ? DROP_SPOOFED : DROP_UNKNOWN);
}

/*
 * Take the outer headers away. A sender at the other end of a virtual wire leaves the outer checksum to be filled in
 * by the card (CHECKSUM_PARTIAL), and it would be, where that header is no more. The kernel forgets of it when the
 * place lies in front of the packet (skb_postpull_rcsum): it does when a few bytes more go, which then come back.
 */
static inline long strip(struct __sk_buff *skb, __u32 headers, bool has_sum)
{
	const __u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO;
	__u32 first[FIRST_BYTES / 4];

	if (!has_sum)
		return bpf_skb_adjust_room(skb, -(__s32)headers, BPF_ADJ_ROOM_MAC, flags);
	return bpf_skb_load_bytes(skb, ETH_HLEN + headers, first, sizeof(first)) ||
	       bpf_skb_adjust_room(skb, -(__s32)(headers + sizeof(first)), BPF_ADJ_ROOM_MAC, flags) ||
	       bpf_skb_adjust_room(skb, sizeof(first), BPF_ADJ_ROOM_MAC, flags) ||
	       bpf_skb_store_bytes(skb, ETH_HLEN, first, sizeof(first), BPF_F_RECOMPUTE_CSUM);
}

/* Hand what is in the outer headers to the TUN device. */
static inline int deliver(struct __sk_buff *skb, __u32 headers, __u32 length, bool has_sum)
{
	if (strip(skb, headers, has_sum))
		return drop(DROP_FAILED);
	count(RX_PACKETS, 1);
	count(RX_BYTES, length);
	return bpf_redirect(settings.tun, BPF_F_INGRESS);
}

/* Whether what goes through the VXLAN device comes out; of strangers nobody keeps book. */
static inline bool is_open(const struct passage *passage)
{
	if (!passage || may_pass(passage))
		return true;
	count(UNDETOURED, 1);
	return false;
}

static inline int decapsulate4(struct __sk_buff *skb)
{
	const __u32 headers = sizeof(struct headers4);
	struct headers4 *outer;
	struct iphdr *inner;
	struct subnet4 from = { .length = 32 };
	struct peer4 *peer;
	bool has_sum, is_needed, is_detoured;
	__u32 length;

	/* Up to the end of the inner header, where the packet has so much: some drivers leave it in fragments. */
	if (skb->data_end - skb->data < ETH_HLEN + headers + sizeof(*inner) &&
	    bpf_skb_pull_data(skb, ETH_HLEN + headers + sizeof(*inner)) && bpf_skb_pull_data(skb, ETH_HLEN + headers))
		return TC_ACT_UNSPEC;
	outer = (void *)(long)skb->data + ETH_HLEN;
	if ((void *)(outer + 1) > (void *)(long)skb->data_end)
		return TC_ACT_UNSPEC;
	if (outer->ip.protocol != IPPROTO_UDP || outer->ip.version != 4 || outer->ip.ihl != sizeof(outer->ip) / 4 ||
	    outer->udp.dest != settings.port || outer->ip.daddr != settings.own4)
		return TC_ACT_UNSPEC;
	if (outer->ip.frag_off & bpf_htons(IP_FRAGMENT))
		return pass(FROM_ENGINE);
	inner = (void *)(outer + 1);
	if ((void *)(inner + 1) > (void *)(long)skb->data_end)
		return drop(DROP_TRUNCATED);
	if (inner->version != 4)
		return drop(DROP_VERSION);
	if (inner->ihl < sizeof(*inner) / 4)
		return drop(DROP_LENGTH);
	length = skb->len - ETH_HLEN - headers;
	if (!skb->gso_size && bpf_ntohs(inner->tot_len) > length)
		return drop(DROP_LENGTH);
	/* Bytes behind the packet, several datagrams that the card has merged into one (UDP GRO). */
	if (bpf_ntohs(inner->tot_len) != length)
		return pass(FROM_ENGINE);
	has_sum = outer->udp.check;
	if (inner->ihl != sizeof(*inner) / 4 || (has_sum && length < sizeof(*inner) + FIRST_BYTES))
		return pass(FROM_ENGINE);
	if (header_sum(inner) != 0xffff)
		return drop(DROP_CHECKSUM);

	from.address = inner->saddr;
	peer = bpf_map_lookup_elem(&peers4, &from);
	if (peer && (outer->udp.source != peer->port || outer->ip.saddr != peer->remote))
		peer = NULL;
	if (!peer && !settings.allow_unknown) {
		struct remote stranger = { .port = outer->udp.source };

		stranger.address[0] = outer->ip.saddr;
		return refuse(&stranger);
	}
	if (inner->ttl <= 1)
		return drop(DROP_TTL);
	is_needed = !has_sum &&
		    needs_detour(skb, inner->protocol, is_own4(inner->daddr), ETH_HLEN + headers + sizeof(*inner));
	is_detoured = is_needed && is_open(peer ? &peer->passage : NULL) && may_detour4(skb, outer);
	/* Without a detour TCP goes on here and is cut where it has to be; of datagrams the socket gets each by itself. */
	if (skb->gso_size && inner->protocol != IPPROTO_TCP && !is_detoured)
		return pass(FROM_ENGINE);
	age4(inner);
	if (peer)
		note(peer, rx, length);
	if (peer && is_detoured)
		has_gone_in(&peer->passage);
	return is_detoured ? detour4(skb, outer, length) : deliver(skb, headers, length, has_sum);
}

static inline int decapsulate6(struct __sk_buff *skb)
{
	const __u32 headers = sizeof(struct headers6);
	struct headers6 *outer;
	struct ipv6hdr *inner;
	struct subnet6 from = { .length = 128 };
	struct peer6 *peer;
	bool has_sum, is_needed, is_detoured;
	__u32 length;

	if (skb->data_end - skb->data < ETH_HLEN + headers + sizeof(*inner) &&
	    bpf_skb_pull_data(skb, ETH_HLEN + headers + sizeof(*inner)) && bpf_skb_pull_data(skb, ETH_HLEN + headers))
		return TC_ACT_UNSPEC;
	outer = (void *)(long)skb->data + ETH_HLEN;
	if ((void *)(outer + 1) > (void *)(long)skb->data_end)
		return TC_ACT_UNSPEC;
	/* Extension headers, a fragment's among them, are for the stack and the engine. */
	if (outer->ip.nexthdr != IPPROTO_UDP || outer->ip.version != 6 || outer->udp.dest != settings.port ||
	    !same6(outer->ip.daddr.in6_u.u6_addr32, settings.own6))
		return TC_ACT_UNSPEC;
	inner = (void *)(outer + 1);
	if ((void *)(inner + 1) > (void *)(long)skb->data_end)
		return drop(DROP_TRUNCATED);
	if (inner->version != 6)
		return drop(DROP_VERSION);
	length = skb->len - ETH_HLEN - headers;
	if (!skb->gso_size && bpf_ntohs(inner->payload_len) + sizeof(*inner) > length)
		return drop(DROP_LENGTH);
	if (bpf_ntohs(inner->payload_len) + sizeof(*inner) != length)
		return pass(FROM_ENGINE);
	has_sum = outer->udp.check;
	if (has_sum && length < sizeof(*inner) + FIRST_BYTES)
		return pass(FROM_ENGINE);

	copy6(from.address, inner->saddr.in6_u.u6_addr32);
	peer = bpf_map_lookup_elem(&peers6, &from);
	if (peer && (outer->udp.source != peer->port || !same6(outer->ip.saddr.in6_u.u6_addr32, peer->remote)))
		peer = NULL;
	if (!peer && !settings.allow_unknown) {
		struct remote stranger = { .port = outer->udp.source };

		copy6(stranger.address, outer->ip.saddr.in6_u.u6_addr32);
		return refuse(&stranger);
	}
	if (inner->hop_limit <= 1)
		return drop(DROP_TTL);
	is_needed = !has_sum && needs_detour(skb, inner->nexthdr, is_own6(inner->daddr.in6_u.u6_addr32),
					     ETH_HLEN + headers + sizeof(*inner));
	is_detoured = is_needed && is_open(peer ? &peer->passage : NULL) && may_detour6(skb, outer);
	if (skb->gso_size && inner->nexthdr != IPPROTO_TCP && !is_detoured)
		return pass(FROM_ENGINE);
	inner->hop_limit--;
	/* IPv4's checksum makes up for the change; here the sum that a card has made of all must follow. */
	bpf_csum_update(skb, 0xffff - bpf_htons(1));
	if (peer)
		note(peer, rx, length);
	if (peer && is_detoured)
		has_gone_in(&peer->passage);
	return is_detoured ? detour6(skb, outer, length) : deliver(skb, headers, length, has_sum);
}

SEC("tc")
int loden_decap(struct __sk_buff *skb)
{
	if (skb->vlan_present)
		return TC_ACT_UNSPEC;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return decapsulate4(skb);
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return decapsulate6(skb);
	return TC_ACT_UNSPEC;
}
