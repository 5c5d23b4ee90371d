/* SPDX-License-Identifier: Apache-2.0 */
/* The engine's decisions as functions of bytes, without threads and descriptors, for comparison with others. */
#include "binding.h"

#include <string.h>

/* A packet in memory of its own, of exactly its size: what reads behind it is found. */
static uint8_t *copy_bytes(PyObject *bytes, size_t *length)
{
	char *data;
	Py_ssize_t size;
	uint8_t *copy;

	if (PyBytes_AsStringAndSize(bytes, &data, &size) < 0)
		return NULL;
	copy = malloc(size > 0 ? (size_t)size : 1);
	if (copy == NULL) {
		PyErr_NoMemory();
		return NULL;
	}
	memcpy(copy, data, (size_t)size);
	*length = (size_t)size;
	return copy;
}

static PyObject *raise_drop(enum drop reason)
{
	PyErr_SetString(PyExc_ValueError, drop_names[reason]);
	return NULL;
}

static PyObject *bytes_of(const void *data, size_t length)
{
	return PyBytes_FromStringAndSize(data, (Py_ssize_t)length);
}

static bool append_bytes(PyObject *list, PyObject *bytes)
{
	OBJECT held = bytes;

	return held != NULL && PyList_Append(list, held) == 0;
}

static PyObject *compare_check(PyObject *module, PyObject *bytes)
{
	size_t length;
	MEMORY uint8_t *data = copy_bytes(bytes, &length);
	struct packet packet;
	enum drop reason;

	(void)module;
	if (data == NULL)
		return NULL;
	reason = packet_parse(&packet, data, length);
	if (reason != DROP_NONE)
		return raise_drop(reason);
	return Py_BuildValue("(IIINNNN)", (unsigned int)packet.length, (unsigned int)packet.network,
			     (unsigned int)packet.protocol, PyBool_FromLong(packet.has_options),
			     PyBool_FromLong(packet.is_fragment), PyBool_FromLong(packet.is_later),
			     PyBool_FromLong(packet.dont_fragment));
}

static PyObject *compare_forward(PyObject *module, PyObject *bytes)
{
	size_t length;
	MEMORY uint8_t *data = copy_bytes(bytes, &length);
	struct packet packet;
	enum drop reason;

	(void)module;
	if (data == NULL)
		return NULL;
	reason = packet_parse(&packet, data, length);
	if (reason == DROP_NONE)
		reason = packet_forward(&packet);
	if (reason != DROP_NONE)
		return raise_drop(reason);
	return bytes_of(data, packet.length);
}

static PyObject *compare_checksum(PyObject *module, PyObject *bytes)
{
	size_t length;
	MEMORY uint8_t *data = copy_bytes(bytes, &length);
	uint8_t folded[2];
	uint16_t sum;

	(void)module;
	if (data == NULL)
		return NULL;
	sum = checksum_fold(checksum_add(0, data, length));
	memcpy(folded, &sum, sizeof(folded));
	return PyLong_FromLong(folded[0] << 8 | folded[1]);
}

static PyObject *segments_of(const struct cut *cut)
{
	OBJECT list = PyList_New(0);

	for (uint32_t i = 0; list != NULL && i < cut->count; i++) {
		const uint8_t *payload = cut->payload + (size_t)i * cut->size;
		uint32_t length = cut_length(cut, i);
		MEMORY uint8_t *segment = malloc(cut->header + length);

		if (segment == NULL)
			return PyErr_NoMemory();
		cut_header(cut, i, payload, length, segment);
		memcpy(segment + cut->header, payload, length);
		if (!append_bytes(list, bytes_of(segment, cut->header + length)))
			return NULL;
	}
	return Py_XNewRef(list);
}

static PyObject *compare_segment(PyObject *module, PyObject *bytes)
{
	size_t length;
	MEMORY uint8_t *data = copy_bytes(bytes, &length);
	struct offload offload;
	struct packet packet;
	struct cut cut;
	enum drop reason = DROP_TRUNCATED;

	(void)module;
	if (data == NULL)
		return NULL;
	if (length >= sizeof(offload)) {
		memcpy(&offload, data, sizeof(offload));
		reason = packet_parse(&packet, data + sizeof(offload), length - sizeof(offload));
	}
	if (reason != DROP_NONE)
		return raise_drop(reason);
	if (offload.type == OFFLOAD_NONE) {
		reason = offload_finish(&offload, &packet);
		return reason != DROP_NONE ? raise_drop(reason)
					   : Py_BuildValue("[N]", bytes_of(packet.data, packet.length));
	}
	reason = cut_init(&cut, &offload, &packet);
	return reason != DROP_NONE ? raise_drop(reason) : segments_of(&cut);
}

static void merged_to_list(void *context, const struct offload *offload, struct merge *merge)
{
	PyObject **list = context;
	size_t length = sizeof(*offload), used = sizeof(*offload);
	MEMORY uint8_t *whole = NULL;

	for (uint32_t i = 0; i < merge->piece_count; i++)
		length += merge->pieces[i].iov_len;
	whole = malloc(length);
	if (*list == NULL || whole == NULL) {
		Py_CLEAR(*list);
		return;
	}
	memcpy(whole, offload, sizeof(*offload));
	for (uint32_t i = 0; i < merge->piece_count; i++) {
		memcpy(whole + used, merge->pieces[i].iov_base, merge->pieces[i].iov_len);
		used += merge->pieces[i].iov_len;
	}
	if (!append_bytes(*list, bytes_of(whole, length)))
		Py_CLEAR(*list);
}

struct copy {
	uint8_t *data;
	size_t length;
};

static bool copy_from(PyObject *bytes, void *place)
{
	struct copy *copy = place;

	copy->data = copy_bytes(bytes, &copy->length);
	return copy->data != NULL;
}

static void free_copies(struct copy **copies)
{
	for (struct copy *one = *copies; one != NULL && one->data != NULL; one++)
		free(one->data);
	free(*copies);
}

static PyObject *compare_merge(PyObject *module, PyObject *sequence)
{
	size_t count = 0;
	struct copy *CLEANUP(free_copies) copies = array_from(sequence, sizeof(*copies), copy_from, &count);
	MEMORY struct merger *merger = malloc(sizeof(*merger));
	OBJECT list = NULL;

	(void)module;
	if (copies == NULL)
		return NULL;
	if (merger == NULL)
		return PyErr_NoMemory();
	list = PyList_New(0);
	merger_init(merger, merged_to_list, &list);
	for (size_t i = 0; i < count; i++) {
		struct packet packet;
		enum drop reason = packet_parse(&packet, copies[i].data, copies[i].length);

		if (reason != DROP_NONE)
			return raise_drop(reason);
		merger_put(merger, &packet);
	}
	merger_flush(merger);
	return list == NULL ? PyErr_NoMemory() : Py_NewRef(list);
}

static PyObject *compare_fragment(PyObject *module, PyObject *args)
{
	PyObject *bytes;
	unsigned int mtu;
	size_t length, size;
	MEMORY uint8_t *data = NULL;
	MEMORY uint8_t *out = NULL;
	OBJECT list = PyList_New(0);
	struct packet packet;
	uint32_t offset = 0;
	enum drop reason;

	(void)module;
	if (list == NULL || !PyArg_ParseTuple(args, "OI", &bytes, &mtu))
		return NULL;
	data = copy_bytes(bytes, &length);
	out = malloc(mtu > 0 ? mtu : 1);
	if (data == NULL || out == NULL)
		return data == NULL ? NULL : PyErr_NoMemory();
	reason = packet_parse(&packet, data, length);
	if (reason != DROP_NONE)
		return raise_drop(reason);
	while ((size = packet_fragment(&packet, mtu, &offset, out, mtu)) > 0) {
		if (!append_bytes(list, bytes_of(out, size)))
			return NULL;
	}
	return Py_NewRef(list);
}

static PyObject *compare_icmp(PyObject *module, PyObject *args)
{
	PyObject *bytes, *source_object;
	unsigned int mtu;
	size_t length, source_size;
	MEMORY uint8_t *data = NULL;
	const uint8_t *source;
	uint8_t out[ICMP_MAX];
	struct packet packet;
	enum drop reason;

	(void)module;
	if (!PyArg_ParseTuple(args, "OOI", &bytes, &source_object, &mtu) ||
	    !address_from(source_object, "source", &source, &source_size))
		return NULL;
	data = copy_bytes(bytes, &length);
	if (data == NULL)
		return NULL;
	reason = packet_parse(&packet, data, length);
	if (reason != DROP_NONE)
		return raise_drop(reason);
	if (source_size != (packet.version == 4 ? 4 : 16)) {
		PyErr_SetString(PyExc_ValueError, "source is not of the packet's family");
		return NULL;
	}
	return bytes_of(out, packet_icmp(&packet, mtu == 0 ? ICMP_NO_ROUTE : ICMP_TOO_BIG, mtu, source, out));
}

static void free_table(struct table **table)
{
	table_free(*table);
}

static bool table_from(PyObject *puts_object, struct table **ret)
{
	size_t count = 0;
	MEMORY struct peer *puts = array_from(puts_object, sizeof(*puts), peer_from, &count);
	int result;

	if (puts == NULL)
		return false;
	result = table_build(ret, NULL, puts, count, NULL, 0);
	if (result < 0)
		raise_errno(result, "build a table");
	return result == 0;
}

static PyObject *compare_lookup(PyObject *module, PyObject *args)
{
	PyObject *peers, *addresses;
	struct table *CLEANUP(free_table) table = NULL;
	OBJECT list = PyList_New(0);
	Py_ssize_t count;

	(void)module;
	if (list == NULL || !PyArg_ParseTuple(args, "OO", &peers, &addresses) || !table_from(peers, &table))
		return NULL;
	count = PySequence_Size(addresses);
	for (Py_ssize_t i = 0; i < count; i++) {
		OBJECT item = PySequence_GetItem(addresses, i);
		const struct peer *peer;
		const uint8_t *bytes;
		size_t size;

		if (item == NULL || !address_from(item, "address", &bytes, &size))
			return NULL;
		peer = table_lookup(table, bytes, size);
		if (peer != NULL) {
			struct peer_report report = {.peer = *peer};

			if (!append_bytes(list, peer_to(&report)))
				return NULL;
		} else if (PyList_Append(list, Py_None) < 0) {
			return NULL;
		}
	}
	return count < 0 ? NULL : Py_NewRef(list);
}

PyMethodDef compare_methods[] = {
	{"_check", compare_check, METH_O, NULL},
	{"_forward", compare_forward, METH_O, NULL},
	{"_checksum", compare_checksum, METH_O, NULL},
	{"_segment", compare_segment, METH_O, NULL},
	{"_merge", compare_merge, METH_O, NULL},
	{"_fragment", compare_fragment, METH_VARARGS, NULL},
	{"_icmp", compare_icmp, METH_VARARGS, NULL},
	{"_lookup", compare_lookup, METH_VARARGS, NULL},
	{NULL, NULL, 0, NULL},
};
