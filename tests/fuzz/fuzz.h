/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What all fuzz targets share. Each takes what libFuzzer makes up, and ends the process where the engine reads or
 * writes outside a buffer (the sanitizers see that) or breaks a promise (REQUIRE sees that).
 */
#ifndef LODEN_FUZZ_H
#define LODEN_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REQUIRE(fact)                                                             \
	do {                                                                      \
		if (!(fact)) {                                                    \
			fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #fact); \
			abort();                                                  \
		}                                                                 \
	} while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A copy of exactly that size, so that the byte behind it is nobody's; to be freed. */
static inline uint8_t *copy_of(const uint8_t *data, size_t size)
{
	uint8_t *copy = malloc(size > 0 ? size : 1);

	REQUIRE(copy != NULL);
	if (size > 0)
		memcpy(copy, data, size);
	return copy;
}

#endif
