/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whether what a peer sends through the VXLAN device (detour.h) comes out of it. A firewall may close the port in INPUT, for
 * some peers or for all, a strict rp_filter may drop what comes from some, or the program behind the device be gone. Then the
 * peer's packets do without, and one is sent there after 1, 2, 4 ... 64 s to see whether it comes out. So does each peer
 * begin: with one packet, and without the detour until that has come out.
 */
#pragma once

#include <linux/types.h>

#include <bpf/bpf_helpers.h>

#define inline __always_inline

/* More than one that is lost for another reason; a burst goes in before any of it comes out, so patience decides. */
#define MOST_MISSED 3
#define PATIENCE_NS 100000000ULL /* many times what a packet takes, less than TCP waits to send it again */
#define FIRST_WAIT_S 1
#define LAST_WAIT_S 64
#define NS_PER_S 1000000000ULL

/* All CPUs share it: packets may come out on another one (RPS, threaded NAPI). A new one has missed MOST_MISSED. */
struct passage {
	__u32 missed; /* went in since one came out */
	__u32 wait;   /* from the last try to the next, s */
	__u64 since;  /* when they were MOST_MISSED, ns of the monotonic clock */
	__u64 next;   /* when the next is to be tried */
};

/* Whether nothing comes out any more. */
static inline bool is_shut(const struct passage *passage, __u64 now)
{
	return passage->missed >= MOST_MISSED && now - passage->since > PATIENCE_NS;
}

/* Whether a packet may go in now. */
static inline bool may_pass(const struct passage *passage)
{
	__u64 now;

	if (passage->missed < MOST_MISSED)
		return true;
	now = bpf_ktime_get_coarse_ns();
	return !is_shut(passage, now) || now >= passage->next;
}

static inline void has_gone_in(struct passage *passage)
{
	__u32 missed = __sync_fetch_and_add(&passage->missed, 1) + 1;
	__u64 now;

	if (missed < MOST_MISSED)
		return;
	now = bpf_ktime_get_coarse_ns();
	if (missed == MOST_MISSED)
		passage->since = now;
	if (!is_shut(passage, now))
		return;
	/* A try, and not one of a burst: less and less often, until it has been well for long. */
	if (!passage->wait || now > passage->next + LAST_WAIT_S * NS_PER_S)
		passage->wait = FIRST_WAIT_S;
	else if (passage->wait < LAST_WAIT_S)
		passage->wait *= 2;
	passage->next = now + passage->wait * NS_PER_S;
}

static inline void has_come_out(struct passage *passage)
{
	if (passage->missed)
		passage->missed = 0;
}
