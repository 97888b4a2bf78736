/* SPDX-License-Identifier: MIT */
/* Argument structs of callers that were built against an older header. */
#include "api/args.h"

#include "api/check.h"

#include <string.h>

flash_kda_status kda_args_read(const void *args, const struct kda_args_type *type, void *whole) {
    size_t size;
    if (!args)
        return INVALID("args is NULL; expected a %s", type->name);
    memcpy(&size, args, sizeof size);
    /* A struct's size is a multiple of its alignment, so that no member is cut in two. */
    if (size < type->least || (size <= type->size && size % _Alignof(flash_kda_prefill_args) != 0))
        return INVALID("args has struct_size %zu, the size of no %s; expected %zu (start it from %s)", size,
                       type->name, type->size, type->init);
    if (size > type->size)
        return INVALID("args has struct_size %zu, of a flash_kda.h newer than this library, which is %s; "
                       "expected at most %zu",
                       size, flash_kda_version(), type->size);
    memcpy(whole, args, size);
    memset((char *)whole + size, 0, type->size - size);
    return FLASH_KDA_OK;
}
