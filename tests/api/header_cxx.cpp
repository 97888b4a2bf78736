/* SPDX-License-Identifier: MIT */
/* The public header, alone and first, in C++: it compiles and its functions link as C. */
#include "flash_kda.h"

int main() {
    flash_kda_prefill_args args = FLASH_KDA_PREFILL_ARGS_INIT;
    size_t bytes = 0;
    bool refused = flash_kda_prefill_workspace_size(&args, &bytes) == FLASH_KDA_ERROR_INVALID_ARGUMENT;
    return args.struct_size == sizeof args && args.q == nullptr && refused ? 0 : 1;
}
