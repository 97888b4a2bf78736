/* SPDX-License-Identifier: MIT */
/* Version, status names and the thread's last error. */
#include "api/status.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char last_error[512];

void kda_explain(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
}

const char *flash_kda_last_error(void) { return last_error; }

const char *flash_kda_status_name(flash_kda_status status) {
    switch (status) {
    case FLASH_KDA_OK:
        return "FLASH_KDA_OK";
    case FLASH_KDA_ERROR_INVALID_ARGUMENT:
        return "FLASH_KDA_ERROR_INVALID_ARGUMENT";
    case FLASH_KDA_ERROR_UNSUPPORTED:
        return "FLASH_KDA_ERROR_UNSUPPORTED";
    case FLASH_KDA_ERROR_WORKSPACE_TOO_SMALL:
        return "FLASH_KDA_ERROR_WORKSPACE_TOO_SMALL";
    case FLASH_KDA_ERROR_CUDA:
        return "FLASH_KDA_ERROR_CUDA";
    case FLASH_KDA_ERROR_OUT_OF_MEMORY:
        return "FLASH_KDA_ERROR_OUT_OF_MEMORY";
    }
    return "unknown status";
}

#define TEXT(x)          #x
#define VERSION(x, y, z) TEXT(x) "." TEXT(y) "." TEXT(z)

const char *flash_kda_version(void) {
    return VERSION(FLASH_KDA_VERSION_MAJOR, FLASH_KDA_VERSION_MINOR, FLASH_KDA_VERSION_PATCH);
}
