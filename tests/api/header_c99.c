/* SPDX-License-Identifier: MIT */
/* The public header, alone and first, in strict C99. */
#include "flash_kda.h"

int main(void) {
    flash_kda_prefill_args args = FLASH_KDA_PREFILL_ARGS_INIT;
    return args.struct_size != sizeof args || flash_kda_version()[0] == '\0';
}
