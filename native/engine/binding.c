/* SPDX-License-Identifier: Apache-2.0 */
#include "binding.h"

#include <errno.h>
#include <string.h>

PyObject *raise_errno(int result, const char *what)
{
	int error = -result;
	PyObject *value;

	if (error == ENOMEM)
		return PyErr_NoMemory();
	value = Py_BuildValue("(is)", error, what);
	if (value != NULL) {
		PyErr_SetObject(PyExc_OSError, value);
		Py_DECREF(value);
	}
	return NULL;
}

bool address_from(PyObject *object, const char *name, const uint8_t **bytes, size_t *size)
{
	char *data;
	Py_ssize_t length;

	if (PyBytes_AsStringAndSize(object, &data, &length) < 0)
		return false;
	if (length != 4 && length != 16) {
		PyErr_Format(PyExc_ValueError, "%s has 4 or 16 bytes, not %zd", name, length);
		return false;
	}
	*bytes = (const uint8_t *)data;
	*size = (size_t)length;
	return true;
}

/* A number from 0 to most; false with ValueError or TypeError. */
static bool number_from(PyObject *object, const char *name, long most, uint32_t *ret)
{
	long value = PyLong_AsLong(object);

	if (value == -1 && PyErr_Occurred()) {
		if (PyErr_ExceptionMatches(PyExc_OverflowError))
			PyErr_Format(PyExc_ValueError, "%s is 0 to %ld", name, most);
		return false;
	}
	if (value < 0 || value > most) {
		PyErr_Format(PyExc_ValueError, "%s is 0 to %ld, not %ld", name, most, value);
		return false;
	}
	*ret = (uint32_t)value;
	return true;
}

static bool prefix_from_fields(PyObject *address, PyObject *length, struct prefix *ret)
{
	const uint8_t *bytes;
	uint32_t bits;
	size_t size;

	if (!address_from(address, "prefix", &bytes, &size) ||
	    !number_from(length, "length", (long)size * 8, &bits))
		return false;
	*ret = (struct prefix){.key = key_of(bytes, size), .length = (uint8_t)bits, .size = (uint8_t)size};
	if (!is_prefix_valid(ret->key, bits, size)) {
		PyErr_SetString(PyExc_ValueError, "prefix has bits behind its length");
		return false;
	}
	return true;
}

static bool fields_of(PyObject *tuple, Py_ssize_t count, const char *name, PyObject **fields)
{
	if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != count) {
		PyErr_Format(PyExc_TypeError, "%s is a tuple of %zd", name, count);
		return false;
	}
	for (Py_ssize_t i = 0; i < count; i++)
		fields[i] = PyTuple_GetItem(tuple, i);
	return true;
}

bool peer_from(PyObject *tuple, void *place)
{
	struct peer *ret = place;
	PyObject *fields[5];
	struct prefix prefix;
	const uint8_t *remote;
	uint32_t port, mtu;
	size_t size;

	if (!fields_of(tuple, 5, "a peer", fields) || !prefix_from_fields(fields[0], fields[1], &prefix) ||
	    !address_from(fields[2], "remote", &remote, &size) || !number_from(fields[3], "port", UINT16_MAX, &port) ||
	    !number_from(fields[4], "mtu", PACKET_MAX, &mtu))
		return false;
	*ret = (struct peer){
		.prefix = prefix.key,
		.length = prefix.length,
		.size = prefix.size,
		.remote_size = (uint8_t)size,
		.port = (uint16_t)port,
		.mtu = mtu,
	};
	memcpy(ret->remote, remote, size);
	return true;
}

bool prefix_from(PyObject *tuple, void *place)
{
	PyObject *fields[2];

	return fields_of(tuple, 2, "a prefix", fields) && prefix_from_fields(fields[0], fields[1], place);
}

void *array_from(PyObject *sequence, size_t each, bool (*from)(PyObject *, void *), size_t *count)
{
	Py_ssize_t length = PySequence_Size(sequence);
	MEMORY char *array = NULL;
	char *result;

	if (length < 0)
		return NULL;
	array = calloc((size_t)length + 1, each);
	if (array == NULL)
		return PyErr_NoMemory();
	for (Py_ssize_t i = 0; i < length; i++) {
		OBJECT item = PySequence_GetItem(sequence, i);

		if (item == NULL || !from(item, array + (size_t)i * each))
			return NULL;
	}
	*count = (size_t)length;
	result = array;
	array = NULL;
	return result;
}

PyObject *address_to(struct key key, size_t size)
{
	char bytes[16];

	for (size_t i = 0; i < 8; i++) {
		bytes[i] = (char)(key.high >> (56 - 8 * i));
		bytes[8 + i] = (char)(key.low >> (56 - 8 * i));
	}
	return PyBytes_FromStringAndSize(bytes, (Py_ssize_t)size);
}

PyObject *peer_to(const struct peer_report *report)
{
	const struct peer *peer = &report->peer;

	return Py_BuildValue("(NIy#II)", address_to(peer->prefix, peer->size), (unsigned int)peer->length,
			     (const char *)peer->remote, (Py_ssize_t)peer->remote_size, (unsigned int)peer->port,
			     (unsigned int)peer->mtu);
}
