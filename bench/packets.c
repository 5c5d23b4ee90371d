/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the benches of the data path need at full speed: sources, sinks, and the anchor of the udp backend, a
 * tunnel that moves one packet with each system call.
 *
 *   packets push SOCKET SECONDS            write to a connected TCP socket
 *   packets pull SOCKET SECONDS            read from one; prints the bytes of that time
 *   packets flood SOCKET SECONDS RATE BYTES ROW
 *                                          send RATE datagrams a second, or (0) as many as can be, on a connected
 *                                          UDP socket, ROW at a time (UDP_SEGMENT), so that the source costs little
 *   packets emit SOCKET SECONDS RATE HEX   send a frame on a bound packet socket as often: each by itself, at a
 *                                          fraction of what a UDP socket costs
 *   packets sink SOCKET SECONDS            receive datagrams; prints how many came in that time. With UDP_GRO on
 *                                          the socket it takes several at once, if the kernel has them so
 *   packets ask SOCKET SECONDS BYTES       send a datagram, wait for the answer, again; prints p50 and p99 in
 *                                          microseconds, how many were answered, and how many were not
 *   packets answer SOCKET                  send each datagram back to where it came from, until it is ended
 *   packets loop TUN SOCKET ADDRESS PORT   the anchor: until it is ended; TUN without virtio headers
 *
 * SOCKET and TUN are descriptors that were inherited: this program enters no namespace.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103 /* linux/udp.h */
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

enum { BATCH = 64, BUFFER = 1 << 22, MOST_ANSWERS = 1 << 20, PATIENCE_MS = 100 };

#define SHORTEST_S 30e-6 /* a sleep takes longer */
#define BURST_S 1e-4

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static int push(int fd, double seconds)
{
	static char buffer[BUFFER];
	double end = now() + seconds;

	while (now() < end) {
		if (send(fd, buffer, sizeof(buffer), MSG_NOSIGNAL) < 0)
			return errno == EPIPE || errno == ECONNRESET ? 0 : 1; /* the other end has had enough */
	}
	return 0;
}

static int pull(int fd, double seconds)
{
	static char buffer[BUFFER];
	double start = now(), elapsed = 0;
	uint64_t bytes = 0;

	for (; elapsed < seconds; elapsed = now() - start) {
		struct pollfd polled = {.fd = fd, .events = POLLIN};
		ssize_t length;

		if (poll(&polled, 1, 10) == 0)
			continue;
		length = recv(fd, buffer, sizeof(buffer), 0);
		if (length <= 0)
			break;
		bytes += (uint64_t)length;
	}
	printf("%.0f\n", (double)bytes / elapsed);
	return 0;
}

static void prepare(struct mmsghdr *messages, struct iovec *pieces, char *buffer, size_t size)
{
	memset(messages, 0, BATCH * sizeof(*messages));
	for (size_t i = 0; i < BATCH; i++) {
		pieces[i] = (struct iovec){.iov_base = buffer + i * size, .iov_len = size};
		messages[i].msg_hdr.msg_iov = &pieces[i];
		messages[i].msg_hdr.msg_iovlen = 1;
	}
}

static void wait_until(double time)
{
	double left = time - now();
	struct timespec pause = {.tv_sec = (time_t)left, .tv_nsec = (long)((left - (double)(time_t)left) * 1e9)};

	if (left > SHORTEST_S)
		nanosleep(&pause, NULL);
}

/* Send the same bytes for so long. rate: messages a second; 0: as many as can be. */
static void repeat(int fd, double seconds, double rate, char *bytes, size_t size)
{
	struct mmsghdr messages[BATCH];
	struct iovec pieces[BATCH];
	double start = now(), end = start + seconds, sent = 0;
	/* At a rate, what belongs into a tenth of a millisecond is sent at once. */
	unsigned int burst = rate > 0 && rate * BURST_S < BATCH ? 1 + (unsigned int)(rate * BURST_S) : BATCH;

	prepare(messages, pieces, bytes, 0);
	for (size_t i = 0; i < BATCH; i++)
		pieces[i].iov_len = size;
	while (now() < end) {
		(void)!sendmmsg(fd, messages, burst, 0);
		sent += burst;
		if (rate > 0)
			wait_until(start + sent / rate);
	}
}

static int flood(int fd, double seconds, double rate, size_t size, size_t row)
{
	static char buffer[BUFFER];
	int segment = (int)size;

	if (size > BUFFER / BATCH || row < 1 || row > BATCH)
		return 2;
	if (row > 1 && setsockopt(fd, IPPROTO_UDP, UDP_SEGMENT, &segment, sizeof(segment)) < 0)
		return 1;
	repeat(fd, seconds, rate / (double)row, buffer, size * row);
	return 0;
}

static int emit(int fd, double seconds, double rate, const char *hex)
{
	static char frame[BUFFER];
	size_t size = 0;

	for (unsigned int byte; size < BUFFER && sscanf(hex, "%2x", &byte) == 1; hex += 2)
		frame[size++] = (char)byte;
	if (size == 0 || *hex)
		return 2;
	repeat(fd, seconds, rate, frame, size);
	return 0;
}

/* Datagrams in a message: the kernel says how large each is where it has put several together. */
static uint64_t datagrams_in(struct mmsghdr *message)
{
	unsigned int length = message->msg_len;
	int size = 0;

	for (struct cmsghdr *one = CMSG_FIRSTHDR(&message->msg_hdr); one; one = CMSG_NXTHDR(&message->msg_hdr, one)) {
		if (one->cmsg_level == IPPROTO_UDP && one->cmsg_type == UDP_GRO)
			memcpy(&size, CMSG_DATA(one), sizeof(size));
	}
	return size > 0 ? (length + (unsigned int)size - 1) / (unsigned int)size : 1;
}

static int sink(int fd, double seconds)
{
	static char buffer[BUFFER];
	static union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} controls[BATCH];
	struct mmsghdr messages[BATCH];
	struct iovec pieces[BATCH];
	double start = now(), elapsed = 0;
	uint64_t received = 0;

	prepare(messages, pieces, buffer, BUFFER / BATCH);
	for (; elapsed < seconds; elapsed = now() - start) {
		struct pollfd polled = {.fd = fd, .events = POLLIN};
		int count;

		if (poll(&polled, 1, 10) == 0)
			continue;
		for (size_t i = 0; i < BATCH; i++) {
			messages[i].msg_hdr.msg_control = &controls[i];
			messages[i].msg_hdr.msg_controllen = sizeof(controls[i]);
		}
		count = recvmmsg(fd, messages, BATCH, MSG_DONTWAIT, NULL);
		for (int i = 0; i < count; i++)
			received += datagrams_in(&messages[i]);
	}
	printf("%.0f\n", (double)received / elapsed);
	return 0;
}

static int compare(const void *one, const void *other)
{
	float left = *(const float *)one, right = *(const float *)other;

	return (left > right) - (left < right);
}

static int ask(int fd, double seconds, size_t size)
{
	static float took[MOST_ANSWERS];
	static char question[BUFFER], answer[BUFFER];
	double end = now() + seconds;
	size_t count = 0, lost = 0;
	uint32_t number = 0;

	if (size < sizeof(number) || size > BUFFER)
		return 2;
	while (now() < end && count < MOST_ANSWERS) {
		struct pollfd polled = {.fd = fd, .events = POLLIN};
		double start = now();

		number++;
		memcpy(question, &number, sizeof(number));
		if (send(fd, question, size, 0) < 0)
			return 1;
		do {
			if (poll(&polled, 1, PATIENCE_MS) == 0) {
				lost++;
				break;
			}
			if (recv(fd, answer, sizeof(answer), 0) < 0)
				return 1;
			/* a late answer to an earlier question is none to this one */
		} while (memcmp(answer, question, sizeof(number)) != 0);
		if (memcmp(answer, question, sizeof(number)) == 0)
			took[count++] = (float)((now() - start) * 1e6);
	}
	if (count == 0)
		return 1;
	qsort(took, count, sizeof(*took), compare);
	printf("%.2f %.2f %zu %zu\n", (double)took[count / 2], (double)took[count * 99 / 100], count, lost);
	return 0;
}

static int answer(int fd)
{
	static char buffer[BUFFER];

	for (;;) {
		struct sockaddr_storage from;
		socklen_t length = sizeof(from);
		ssize_t size = recvfrom(fd, buffer, sizeof(buffer), 0, (struct sockaddr *)&from, &length);

		if (size < 0 || sendto(fd, buffer, (size_t)size, 0, (struct sockaddr *)&from, length) < 0)
			return 1;
	}
}

static int loop(int tun, int udp, const char *address, uint16_t port)
{
	struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons(port)};
	struct pollfd polled[2] = {{.fd = tun, .events = POLLIN}, {.fd = udp, .events = POLLIN}};
	static char packet[65536];
	ssize_t length;

	if (inet_pton(AF_INET, address, &peer.sin_addr) != 1)
		return 2;
	while (poll(polled, 2, -1) > 0) {
		if (polled[0].revents) {
			length = read(tun, packet, sizeof(packet));
			if (length < 0)
				return 1;
			(void)!sendto(udp, packet, (size_t)length, 0, (struct sockaddr *)&peer, sizeof(peer));
		}
		if (polled[1].revents) {
			length = recv(udp, packet, sizeof(packet), 0);
			if (length > 0)
				(void)!write(tun, packet, (size_t)length);
		}
	}
	return 1;
}

int main(int count, char **words)
{
	const char *what = count > 1 ? words[1] : "";

	if (count == 4 && strcmp(what, "push") == 0)
		return push(atoi(words[2]), atof(words[3]));
	if (count == 4 && strcmp(what, "pull") == 0)
		return pull(atoi(words[2]), atof(words[3]));
	if (count == 7 && strcmp(what, "flood") == 0)
		return flood(atoi(words[2]), atof(words[3]), atof(words[4]), (size_t)atoi(words[5]),
			     (size_t)atoi(words[6]));
	if (count == 6 && strcmp(what, "emit") == 0)
		return emit(atoi(words[2]), atof(words[3]), atof(words[4]), words[5]);
	if (count == 4 && strcmp(what, "sink") == 0)
		return sink(atoi(words[2]), atof(words[3]));
	if (count == 5 && strcmp(what, "ask") == 0)
		return ask(atoi(words[2]), atof(words[3]), (size_t)atoi(words[4]));
	if (count == 3 && strcmp(what, "answer") == 0)
		return answer(atoi(words[2]));
	if (count == 6 && strcmp(what, "loop") == 0)
		return loop(atoi(words[2]), atoi(words[3]), words[4], (uint16_t)atoi(words[5]));
	fprintf(stderr, "packets: see the top of its source for what it does\n");
	return 2;
}
