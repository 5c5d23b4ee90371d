/* SPDX-License-Identifier: Apache-2.0 */
/* Between Python's objects and the engine's values; what module.c and compare.c share. */
#ifndef LODEN_BINDING_H
#define LODEN_BINDING_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "engine.h"

#include <stdlib.h>

#define CLEANUP(function) __attribute__((cleanup(function)))

static inline void free_object(PyObject **object)
{
	Py_XDECREF(*object);
}

static inline void free_memory(void *place)
{
	free(*(void **)place);
}

/* What is declared with these is let go at the end of the block. */
#define OBJECT PyObject *CLEANUP(free_object)
#define MEMORY CLEANUP(free_memory)

/* NULL, with OSError or MemoryError. result: a negative errno. */
PyObject *raise_errno(int result, const char *what);

/* These return false with an exception; "name" is for its message. */
bool address_from(PyObject *object, const char *name, const uint8_t **bytes, size_t *size);
bool peer_from(PyObject *tuple, void *place);   /* struct peer */
bool prefix_from(PyObject *tuple, void *place); /* struct prefix */

/* An array of what a sequence holds, to be freed, one element of zeros behind; NULL with an exception. */
void *array_from(PyObject *sequence, size_t each, bool (*from)(PyObject *, void *), size_t *count);

PyObject *address_to(struct key key, size_t size);
PyObject *peer_to(const struct peer_report *report);

/* The functions of the module for comparison with a reference; ended by one without a name. */
extern PyMethodDef compare_methods[];

#endif
