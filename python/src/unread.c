/* SPDX-License-Identifier: MIT */
/* What the library says of calls whose tensors nobody reads. */
#include "unread.h"

enum { HEAD_DIM = 128 };

/* A tensor that nobody reads: its address is owned by nobody and far from every other. */
static DLTensor unread(int i, DLDevice device, uint8_t code, uint8_t bits, int ndim, int64_t *shape) {
    return (DLTensor){.data = (void *)((uintptr_t)(i + 1) << 56),
                      .device = device,
                      .ndim = ndim,
                      .dtype = {code, bits, 1},
                      .shape = shape};
}

static flash_kda_status size_of(int64_t T, int64_t H, int64_t N, int64_t *cu_seqlens, size_t *bytes) {
    bool cuda = flash_kda_backend_available(FLASH_KDA_BACKEND_CUDA);
    DLDevice device = {cuda ? kDLCUDA : kDLCPU, 0};
    int64_t rows[4] = {1, T, H, HEAD_DIM}, ends[1] = {N + 1};
    DLTensor q = unread(0, device, kDLBfloat, 16, 4, rows), k = unread(1, device, kDLBfloat, 16, 4, rows),
             v = unread(2, device, kDLBfloat, 16, 4, rows), g = unread(3, device, kDLBfloat, 16, 4, rows),
             out = unread(4, device, kDLBfloat, 16, 4, rows), beta = unread(5, device, kDLBfloat, 16, 3, rows),
             sequences = unread(6, device, kDLInt, 64, 1, ends);
    /* Bytes depend on the number of sequences, not on where they end. */
    sequences.data = cu_seqlens;
    cu_seqlens[0] = 0;
    for (int64_t n = 1; n <= N; n++)
        cu_seqlens[n] = T;
    flash_kda_prefill_args args = FLASH_KDA_PREFILL_ARGS_INIT;
    args.q = &q;
    args.k = &k;
    args.v = &v;
    args.g = &g;
    args.beta = &beta;
    args.out = &out;
    args.cu_seqlens = &sequences;
    args.gate = FLASH_KDA_GATE_SOFTPLUS;
    args.beta_mode = FLASH_KDA_BETA_SIGMOID;
    args.flags = FLASH_KDA_QK_NORM;
    return flash_kda_prefill_workspace_size(&args, bytes);
}

static bool read_size(PyObject *object, const char *name, long long least, int64_t *out) {
    long long value = PyLong_AsLongLong(object);
    if (PyErr_Occurred())
        return false;
    if (value < least || value > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s is %lld; expected %lld to %d", name, value, least, INT32_MAX);
        return false;
    }
    *out = value;
    return true;
}

PyObject *fwd_workspace_size(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    (void)module;
    int64_t T, H, N;
    size_t bytes = 0;
    if (count != 3) {
        PyErr_Format(PyExc_TypeError, "%zd arguments; expected 3", count);
        return NULL;
    }
    if (!read_size(arguments[0], "T_total", 0, &T) || !read_size(arguments[1], "H", 1, &H) ||
        !read_size(arguments[2], "N", 1, &N))
        return NULL;
    int64_t *cu_seqlens = PyMem_Malloc((size_t)(N + 1) * sizeof *cu_seqlens);
    if (!cu_seqlens)
        return PyErr_NoMemory();
    flash_kda_status status = size_of(T, H, N, cu_seqlens, &bytes);
    PyMem_Free(cu_seqlens);
    return status ? call_raise(status) : PyLong_FromSize_t(bytes);
}

PyObject *backward_available(PyObject *module, PyObject *backend) {
    (void)module;
    long value = PyLong_AsLong(backend);
    if (value == -1 && PyErr_Occurred())
        return NULL;
    if (!flash_kda_backend_available((flash_kda_backend)value))
        return PyBool_FromLong(0);
    DLDevice device = {value == FLASH_KDA_BACKEND_CUDA ? kDLCUDA : kDLCPU, 0};
    int64_t one[4] = {1, 1, 1, 1};
    DLTensor q = unread(0, device, kDLFloat, 32, 4, one), k = unread(1, device, kDLFloat, 32, 4, one),
             v = unread(2, device, kDLFloat, 32, 4, one), g = unread(3, device, kDLFloat, 32, 4, one),
             beta = unread(4, device, kDLFloat, 32, 3, one), d_out = unread(5, device, kDLFloat, 32, 4, one);
    flash_kda_backward_args args = FLASH_KDA_BACKWARD_ARGS_INIT;
    args.q = &q;
    args.k = &k;
    args.v = &v;
    args.g = &g;
    args.beta = &beta;
    args.d_out = &d_out;
    args.backend = (flash_kda_backend)value;
    size_t bytes;
    return PyBool_FromLong(flash_kda_backward_workspace_size(&args, &bytes) == FLASH_KDA_OK);
}
