/* SPDX-License-Identifier: Apache-2.0 */
/*
 * To be loaded before the C library: the system calls as older kernels answer them. A TUN device takes no UDP
 * super-packet (before 6.2), and a device without checksum offload none from a socket (before 6.11).
 */
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

enum { OFFLOAD_SIZE = 10, OFFLOAD_UDP = 5 };

ssize_t writev(int fd, const struct iovec *pieces, int count)
{
	ssize_t (*real)(int, const struct iovec *, int) = (ssize_t(*)(int, const struct iovec *, int))dlsym(RTLD_NEXT, "writev");

	if (count > 1 && pieces[0].iov_len == OFFLOAD_SIZE && ((const uint8_t *)pieces[0].iov_base)[1] == OFFLOAD_UDP) {
		errno = EINVAL;
		return -1;
	}
	return real(fd, pieces, count);
}

int sendmmsg(int fd, struct mmsghdr *messages, unsigned int count, int flags)
{
	int (*real)(int, struct mmsghdr *, unsigned int, int) =
		(int (*)(int, struct mmsghdr *, unsigned int, int))dlsym(RTLD_NEXT, "sendmmsg");
	unsigned int plain = 0;

	while (plain < count && messages[plain].msg_hdr.msg_controllen == 0)
		plain++;
	if (plain == 0) {
		errno = EIO;
		return -1;
	}
	return real(fd, messages, plain, flags);
}
