/* SPDX-License-Identifier: MIT */
/* What DLPack 1.x has beyond the header that the library is built against: the versioned capsule, and the table of C
 * functions by which a framework hands over its arrays without a capsule (attribute `__dlpack_c_exchange_api__` of the
 * array's type, since 1.2). Layouts are those of https://dmlc.github.io/dlpack/latest/c_api.html. */
#ifndef KDA_PYTHON_DLPACK1_H
#define KDA_PYTHON_DLPACK1_H

#include <dlpack/dlpack.h>
#include <stdint.h>

#define DLPACK1_CAPSULE          "dltensor_versioned"
#define DLPACK0_CAPSULE          "dltensor"
#define DLPACK1_EXCHANGE_CAPSULE "dlpack_exchange_api"

enum { DLPACK1_MAJOR = 1, DLPACK1_READ_ONLY = 1 };

struct dlpack1_version {
    uint32_t major, minor;
};

struct dlpack1_managed {
    struct dlpack1_version version;
    void *manager_ctx;
    void (*deleter)(struct dlpack1_managed *self); /* may be NULL */
    uint64_t flags;
    DLTensor tensor;
};

struct dlpack1_exchange {
    struct dlpack1_version version;
    const struct dlpack1_exchange *previous; /* of an older major version, or NULL */
    /* A new array like the prototype: dtype, shape and device are read. 0, or -1 after set_error(). */
    int (*allocate)(DLTensor *prototype, struct dlpack1_managed **out, void *error_context,
                    void (*set_error)(void *error_context, const char *kind, const char *message));
    int (*managed_from_object)(void *object, struct dlpack1_managed **out);
    int (*managed_to_object)(struct dlpack1_managed *managed, void **object);
    /* A view that lives as long as the object; may be NULL. 0, or -1 with a Python exception. */
    int (*view_object)(void *object, DLTensor *out);
    /* The framework's current stream of a device. 0, or -1 with a Python exception. */
    int (*current_stream)(DLDeviceType device_type, int32_t device_id, void **stream);
};

#endif
