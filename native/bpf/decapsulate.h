/* SPDX-License-Identifier: Apache-2.0 */
/*
 * At the underlay's ingress: take the outer headers off a datagram for our port and hand what is in it to the TUN
 * device, as if it had come in there. The sender must be a peer, and the inner source lie in that peer's subnet.
 * What is not for us goes on its way; what takes more than looking goes to the socket's reader, the engine.
 */
#pragma once

#include "encapsulate.h"

/* What has to be behind an inner header where the outer one has a checksum; all that containers send has it. */
#define FIRST_BYTES 8
#define TCP_CHECKSUM 16 /* its place in TCP's header */

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

/*
 * Give a super-packet to the engine, which writes it to the TUN device as it is. It comes over a virtual wire, and the
 * kernel goes on to take it for a tunnel's: only its own tunnels can clear that mark (skb->encapsulation and
 * SKB_GSO_UDP_TUNNEL). A socket of its own, because that of our port must not let the kernel merge datagrams before they
 * come here, and then gets each by itself. Packets of the same flow that come by themselves may overtake it. Returns
 * whether there is such a socket: it goes with its agent.
 */
static inline bool hand_over(struct __sk_buff *skb)
{
	__u32 place = 0;
	struct bpf_sock *socket = bpf_map_lookup_elem(&row_socket, &place);
	bool is_given;

	if (!socket)
		return false;
	is_given = !bpf_sk_assign(skb, socket, 0);
	bpf_sk_release(socket);
	return is_given;
}

/*
 * Leave a super-packet of a peer to the engine: the verdict, or 0 if it goes on here. Datagrams in a row (UDP_SEGMENT)
 * would be cut in the wrong place. TCP's would be cut right, but wherever a device has no offloads for tunnels, which is so
 * of every bridge: two fifths of the speed. Nothing cuts what is for this host itself.
 *
 * A socket is told how large datagrams are, and of TCP's segments not: that stands in the place of the checksum, which is
 * the sum over the pseudo header and can be had again. transport: where TCP's header begins.
 */
static inline int leave(struct __sk_buff *skb, __u32 transport, __u8 protocol, bool is_own)
{
	__be16 size = bpf_htons(skb->gso_size);

	if (!skb->gso_size || (protocol == IPPROTO_TCP && is_own))
		return 0;
	if (!hand_over(skb))
		return protocol == IPPROTO_TCP ? 0 : pass(FROM_ENGINE);
	if (protocol == IPPROTO_TCP && bpf_skb_store_bytes(skb, transport + TCP_CHECKSUM, &size, sizeof(size), 0))
		return drop(DROP_FAILED);
	return pass(FROM_ENGINE);
}

static inline int decapsulate4(struct __sk_buff *skb)
{
	const __u32 headers = sizeof(struct headers4);
	struct headers4 *outer;
	struct iphdr *inner;
	struct subnet4 from = { .length = 32 };
	struct peer4 *peer;
	bool has_sum;
	__u32 length;
	int verdict;

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
	verdict = leave(skb, ETH_HLEN + headers + sizeof(*inner), inner->protocol, is_own4(inner->daddr));
	if (verdict)
		return verdict;
	age4(inner);
	if (peer)
		note(peer, rx, length);
	return deliver(skb, headers, length, has_sum);
}

static inline int decapsulate6(struct __sk_buff *skb)
{
	const __u32 headers = sizeof(struct headers6);
	struct headers6 *outer;
	struct ipv6hdr *inner;
	struct subnet6 from = { .length = 128 };
	struct peer6 *peer;
	bool has_sum;
	__u32 length;
	int verdict;

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
	verdict = leave(skb, ETH_HLEN + headers + sizeof(*inner), inner->nexthdr,
			is_own6(inner->daddr.in6_u.u6_addr32));
	if (verdict)
		return verdict;
	inner->hop_limit--;
	/* IPv4's checksum makes up for the change; here the sum that a card has made of all must follow. */
	bpf_csum_update(skb, 0xffff - bpf_htons(1));
	if (peer)
		note(peer, rx, length);
	return deliver(skb, headers, length, has_sum);
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
