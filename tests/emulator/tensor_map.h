/* SPDX-License-Identifier: MIT */
/* Tensor maps: how the copy engine finds a box of a tensor. The emulator lays them out its own way, in the 128 bytes that CUDA
 * keeps opaque. */
#ifndef EMULATOR_TENSOR_MAP_H
#define EMULATOR_TENSOR_MAP_H

#include <cstdint>
#include <cuda.h>

namespace emulator {

/* Stands in for cuTensorMapEncodeTiled. */
CUresult encode_map(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *data,
                    const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                    const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);

/* Has the copy engine bring the box at `at` to shared memory, or take it away. Outside of the tensor it brings zeros and
 * takes nothing. */
void bring_box(void *to, const CUtensorMap &map, const int32_t (&at)[4], uint64_t *barrier);
void take_box(const CUtensorMap &map, const int32_t (&at)[4], const void *from);

} // namespace emulator

#endif
