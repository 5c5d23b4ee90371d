/* SPDX-License-Identifier: Apache-2.0 */
/* loden._engine: the engine as Python sees it. src/loden/_engine.pyi has the contracts. */
#include "binding.h"

typedef struct {
	PyObject_HEAD
	struct engine *engine;
} EngineObject;

static bool descriptor_from(PyObject *object, void *place)
{
	*(int *)place = PyObject_AsFileDescriptor(object);
	return *(int *)place >= 0;
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
	drop_array = array_from(drops, sizeof(*drop_array), prefix_from, &drop_count);
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
	.m_methods = compare_methods,
	.m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__engine(void);

PyMODINIT_FUNC PyInit__engine(void)
{
	return PyModuleDef_Init(&module_definition);
}
