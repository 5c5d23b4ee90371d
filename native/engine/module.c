/* SPDX-License-Identifier: Apache-2.0 */
/* loden._engine: the engine as Python sees it. src/loden/_engine.pyi has the contracts. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define CLEANUP(function) __attribute__((cleanup(function)))

typedef struct {
	PyObject_HEAD
	struct engine *engine;
} EngineObject;

static void free_object(PyObject **object)
{
	Py_XDECREF(*object);
}

static void free_memory(void *place)
{
	free(*(void **)place);
}

#define OBJECT PyObject *CLEANUP(free_object)
#define MEMORY CLEANUP(free_memory)

static PyObject *raise_errno(int result, const char *what)
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

/* Arguments */

/* An address in bytes; false with ValueError. */
static bool address_from(PyObject *object, const char *name, const uint8_t **bytes, size_t *size)
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

static bool prefix_from(PyObject *address, PyObject *length, struct prefix *ret)
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

static bool peer_from(PyObject *tuple, void *place)
{
	struct peer *ret = place;
	PyObject *fields[5];
	struct prefix prefix;
	const uint8_t *remote;
	uint32_t port, mtu;
	size_t size;

	if (!fields_of(tuple, 5, "a peer", fields) || !prefix_from(fields[0], fields[1], &prefix) ||
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

static bool drop_from(PyObject *tuple, void *place)
{
	PyObject *fields[2];

	return fields_of(tuple, 2, "a prefix", fields) && prefix_from(fields[0], fields[1], place);
}

static bool descriptor_from(PyObject *object, void *place)
{
	*(int *)place = PyObject_AsFileDescriptor(object);
	return *(int *)place >= 0;
}

/* An array of what a sequence holds, to be freed; NULL with an exception. */
static void *array_from(PyObject *sequence, size_t each, bool (*from)(PyObject *, void *), size_t *count)
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

/* Results */

static PyObject *address_to(struct key key, size_t size)
{
	char bytes[16];

	for (size_t i = 0; i < 8; i++) {
		bytes[i] = (char)(key.high >> (56 - 8 * i));
		bytes[8 + i] = (char)(key.low >> (56 - 8 * i));
	}
	return PyBytes_FromStringAndSize(bytes, (Py_ssize_t)size);
}

static PyObject *peer_to(const struct peer_report *report)
{
	const struct peer *peer = &report->peer;

	return Py_BuildValue("(NIy#II)", address_to(peer->prefix, peer->size), (unsigned int)peer->length,
			     (const char *)peer->remote, (Py_ssize_t)peer->remote_size, (unsigned int)peer->port,
			     (unsigned int)peer->mtu);
}

static PyObject *traffic_to(const struct peer_report *report)
{
	const struct peer *peer = &report->peer;

	return Py_BuildValue("(NIKKKK)", address_to(peer->prefix, peer->size), (unsigned int)peer->length,
			     (unsigned long long)report->tx_packets, (unsigned long long)report->tx_bytes,
			     (unsigned long long)report->rx_packets, (unsigned long long)report->rx_bytes);
}

static PyObject *list_of_peers(EngineObject *self, PyObject *(*to)(const struct peer_report *))
{
	MEMORY struct peer_report *reports = NULL;
	OBJECT list = NULL;
	size_t count = 0;
	int result;

	Py_BEGIN_ALLOW_THREADS
	result = engine_peers(self->engine, &reports, &count);
	Py_END_ALLOW_THREADS
	if (result < 0)
		return raise_errno(result, "list peers");
	list = PyList_New((Py_ssize_t)count);
	for (size_t i = 0; list != NULL && i < count; i++) {
		PyObject *one = to(&reports[i]);

		if (one == NULL || PyList_SetItem(list, (Py_ssize_t)i, one) < 0)
			return NULL;
	}
	return Py_XNewRef(list);
}

/* The type */

static bool source_from(PyObject *object, size_t size, const char *name, const uint8_t **ret)
{
	char *data;
	Py_ssize_t length;

	*ret = NULL;
	if (object == NULL)
		return true;
	if (PyBytes_AsStringAndSize(object, &data, &length) < 0)
		return false;
	if (length != 0 && (size_t)length != size) {
		PyErr_Format(PyExc_ValueError, "%s has %zu bytes or none, not %zd", name, size, length);
		return false;
	}
	if (length != 0)
		*ret = (const uint8_t *)data;
	return true;
}

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"tun", "udp", "source4", "source6", "allow_unknown", NULL};
	PyObject *tun, *udp, *source4 = NULL, *source6 = NULL;
	MEMORY int *tun_fds = NULL;
	MEMORY int *udp_fds = NULL;
	struct engine_config config = {.tun = NULL};
	int allow_unknown = 0, result;
	allocfunc allocate;
	EngineObject *self;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$OOp", names, &tun, &udp, &source4, &source6,
					 &allow_unknown))
		return NULL;
	if (!source_from(source4, 4, "source4", &config.source4) ||
	    !source_from(source6, 16, "source6", &config.source6))
		return NULL;
	config.tun = tun_fds = array_from(tun, sizeof(int), descriptor_from, &config.tun_count);
	if (tun_fds == NULL)
		return NULL;
	config.udp = udp_fds = array_from(udp, sizeof(int), descriptor_from, &config.udp_count);
	if (udp_fds == NULL)
		return NULL;
	config.allow_unknown = allow_unknown != 0;
	allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
	self = (EngineObject *)allocate(type, 0);
	if (self == NULL)
		return NULL;
	result = engine_create(&self->engine, &config);
	if (result < 0) {
		self->engine = NULL;
		Py_DECREF(self);
		return raise_errno(result, "make a packet engine");
	}
	return (PyObject *)self;
}

static void engine_dealloc(PyObject *object)
{
	EngineObject *self = (EngineObject *)object;
	PyTypeObject *type = Py_TYPE(object);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	if (self->engine != NULL) {
		Py_BEGIN_ALLOW_THREADS
		engine_destroy(self->engine);
		Py_END_ALLOW_THREADS
	}
	release(object);
	Py_DECREF(type);
}

static PyObject *engine_method_start(PyObject *object, PyObject *ignored)
{
	EngineObject *self = (EngineObject *)object;
	int result;

	(void)ignored;
	Py_BEGIN_ALLOW_THREADS
	result = engine_start(self->engine);
	Py_END_ALLOW_THREADS
	if (result < 0)
		return raise_errno(result, "start the packet engine's threads");
	Py_RETURN_NONE;
}

static PyObject *engine_method_stop(PyObject *object, PyObject *ignored)
{
	EngineObject *self = (EngineObject *)object;

	(void)ignored;
	Py_BEGIN_ALLOW_THREADS
	engine_stop(self->engine);
	Py_END_ALLOW_THREADS
	Py_RETURN_NONE;
}

static PyObject *engine_method_change(PyObject *object, PyObject *args)
{
	EngineObject *self = (EngineObject *)object;
	PyObject *puts, *drops;
	MEMORY struct peer *put_array = NULL;
	MEMORY struct prefix *drop_array = NULL;
	size_t put_count = 0, drop_count = 0;
	int result;

	if (!PyArg_ParseTuple(args, "OO", &puts, &drops))
		return NULL;
	put_array = array_from(puts, sizeof(*put_array), peer_from, &put_count);
	if (put_array == NULL)
		return NULL;
	drop_array = array_from(drops, sizeof(*drop_array), drop_from, &drop_count);
	if (drop_array == NULL)
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	result = engine_change(self->engine, put_array, put_count, drop_array, drop_count);
	Py_END_ALLOW_THREADS
	if (result < 0)
		return raise_errno(result, "change peers");
	Py_RETURN_NONE;
}

static PyObject *engine_method_peers(PyObject *object, PyObject *ignored)
{
	(void)ignored;
	return list_of_peers((EngineObject *)object, peer_to);
}

static PyObject *engine_method_peer_counters(PyObject *object, PyObject *ignored)
{
	(void)ignored;
	return list_of_peers((EngineObject *)object, traffic_to);
}

static bool set_count(PyObject *dict, const char *name, unsigned long long value)
{
	OBJECT number = PyLong_FromUnsignedLongLong(value);

	return number != NULL && PyDict_SetItemString(dict, name, number) == 0;
}

static PyObject *engine_method_counters(PyObject *object, PyObject *ignored)
{
	EngineObject *self = (EngineObject *)object;
	OBJECT dict = PyDict_New();
	uint64_t counts[COUNTERS];
	size_t tables;

	(void)ignored;
	if (dict == NULL)
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	engine_counters(self->engine, counts, &tables);
	Py_END_ALLOW_THREADS
	for (unsigned int i = 0; i < COUNTERS; i++) {
		if (counter_name(i) != NULL && !set_count(dict, counter_name(i), counts[i]))
			return NULL;
	}
	if (!set_count(dict, "tables", tables))
		return NULL;
	return Py_NewRef(dict);
}

static PyObject *engine_method_fileno(PyObject *object, PyObject *ignored)
{
	(void)ignored;
	return PyLong_FromLong(engine_fileno(((EngineObject *)object)->engine));
}

static PyObject *engine_method_failure(PyObject *object, PyObject *ignored)
{
	struct engine_failure failure = engine_failure(((EngineObject *)object)->engine);

	(void)ignored;
	if (failure.error == 0)
		Py_RETURN_NONE;
	return Py_BuildValue("(is)", failure.error, failure.what);
}

static PyMethodDef engine_methods[] = {
	{"start", engine_method_start, METH_NOARGS, NULL},
	{"stop", engine_method_stop, METH_NOARGS, NULL},
	{"change", engine_method_change, METH_VARARGS, NULL},
	{"peers", engine_method_peers, METH_NOARGS, NULL},
	{"counters", engine_method_counters, METH_NOARGS, NULL},
	{"peer_counters", engine_method_peer_counters, METH_NOARGS, NULL},
	{"fileno", engine_method_fileno, METH_NOARGS, NULL},
	{"failure", engine_method_failure, METH_NOARGS, NULL},
	{NULL, NULL, 0, NULL},
};

static PyType_Slot engine_slots[] = {
	{Py_tp_new, (void *)engine_new},
	{Py_tp_dealloc, (void *)engine_dealloc},
	{Py_tp_methods, engine_methods},
	{0, NULL},
};

static PyType_Spec engine_spec = {
	.name = "loden._engine.Engine",
	.basicsize = sizeof(EngineObject),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = engine_slots,
};

/* The pure functions, for comparison with others */

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

static PyObject *module_check(PyObject *module, PyObject *bytes)
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

static PyObject *module_forward(PyObject *module, PyObject *bytes)
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

static PyObject *module_checksum(PyObject *module, PyObject *bytes)
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

static PyObject *module_segment(PyObject *module, PyObject *bytes)
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

	for (uint32_t i = 0; i < merge->count; i++)
		length += merge->pieces[i].iov_len;
	whole = malloc(length);
	if (*list == NULL || whole == NULL) {
		Py_CLEAR(*list);
		return;
	}
	memcpy(whole, offload, sizeof(*offload));
	for (uint32_t i = 0; i < merge->count; i++) {
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

static PyObject *module_merge(PyObject *module, PyObject *sequence)
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

static PyObject *module_fragment(PyObject *module, PyObject *args)
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

static PyObject *module_icmp(PyObject *module, PyObject *args)
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

static PyObject *module_lookup(PyObject *module, PyObject *args)
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

static PyMethodDef module_methods[] = {
	{"_check", module_check, METH_O, NULL},
	{"_forward", module_forward, METH_O, NULL},
	{"_checksum", module_checksum, METH_O, NULL},
	{"_segment", module_segment, METH_O, NULL},
	{"_merge", module_merge, METH_O, NULL},
	{"_fragment", module_fragment, METH_VARARGS, NULL},
	{"_icmp", module_icmp, METH_VARARGS, NULL},
	{"_lookup", module_lookup, METH_VARARGS, NULL},
	{NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module)
{
	OBJECT type = PyType_FromSpec(&engine_spec);
	OBJECT reasons = NULL;

	if (type == NULL || PyModule_AddObjectRef(module, "Engine", type) < 0)
		return -1;
	reasons = PyTuple_New(DROP_COUNT - 1);
	for (int i = 1; reasons != NULL && i < DROP_COUNT; i++) {
		if (PyTuple_SetItem(reasons, i - 1, PyUnicode_FromString(drop_names[i])) < 0)
			return -1;
	}
	return reasons == NULL ? -1 : PyModule_AddObjectRef(module, "DROP_REASONS", reasons);
}

static PyModuleDef_Slot module_slots[] = {
	{Py_mod_exec, (void *)module_exec},
	{0, NULL},
};

static struct PyModuleDef module_definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "loden._engine",
	.m_methods = module_methods,
	.m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__engine(void);

PyMODINIT_FUNC PyInit__engine(void)
{
	return PyModuleDef_Init(&module_definition);
}
