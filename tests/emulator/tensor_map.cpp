/* SPDX-License-Identifier: MIT */
#include "tensor_map.h"

#include "block.h"
#include "copies.h"
#include "numbers.h"

#include <algorithm>

namespace emulator {

namespace {

constexpr int RANK = 4, ELEMENT = 2, ALIGNMENT = 16;

struct Map {
    char *data;
    int64_t sizes[RANK], strides[RANK - 1]; /* the innermost dimension is contiguous */
    uint32_t columns, rows;                 /* of a box, which lies in dimensions 0 and 2 */
    bool swizzled;                          /* by 128 bytes */
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

struct Box {
    Map map;
    int32_t at[RANK];
    uint32_t address; /* in shared memory */
};

Box make_box(const CUtensorMap &map, const int32_t (&at)[RANK], const void *tile) {
    Box box;
    memcpy(&box.map, &map, sizeof box.map);
    std::copy(at, at + RANK, box.at);
    box.address = shared_address(tile);
    if (!box.map.swizzled || box.map.columns * ELEMENT != 128 || box.address % 1024)
        fail("only boxes of 128 bytes, swizzled, at multiples of 1024 are emulated");
    shared_pointer(box.address, (size_t)box.map.rows * box.map.columns * ELEMENT);
    return box;
}

/* Calls `copy` with each element's place in global memory, NULL outside of the tensor, and in shared memory. */
template <class Copy> void each_element(const Box &box, Copy copy) {
    const Map &m = box.map;
    auto within = [&](int i, int64_t at) { return at >= 0 && at < m.sizes[i]; };
    bool inside = within(1, box.at[1]) && within(3, box.at[3]);
    for (uint32_t row = 0; row < m.rows; row++)
        for (uint32_t column = 0; column < m.columns; column++) {
            int64_t x = (int64_t)box.at[0] + column, y = (int64_t)box.at[2] + row;
            uint32_t address = box.address + (row * m.columns + column) * ELEMENT;
            address ^= (address >> 7 & 7) << 4;
            char *there =
                m.data + box.at[3] * m.strides[2] + y * m.strides[1] + box.at[1] * m.strides[0] + x * ELEMENT;
            copy(inside && within(0, x) && within(2, y) ? there : nullptr, shared_pointer(address, ELEMENT));
        }
}

} // namespace

CUresult encode_map(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *data,
                    const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                    const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                    CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    if (type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || rank != RANK || box[1] != 1 || box[3] != 1 ||
        (uintptr_t)data % ALIGNMENT)
        return CUDA_ERROR_INVALID_VALUE;
    Map m = {};
    m.data = static_cast<char *>(data);
    m.columns = box[0], m.rows = box[2], m.swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
    for (int i = 0; i < RANK; i++)
        m.sizes[i] = (int64_t)sizes[i];
    for (int i = 0; i < RANK - 1; i++) {
        if (strides[i] % ALIGNMENT)
            return CUDA_ERROR_INVALID_VALUE;
        m.strides[i] = (int64_t)strides[i];
    }
    memcpy(map, &m, sizeof m);
    return CUDA_SUCCESS;
}

void bring_box(void *to, const CUtensorMap &map, const int32_t (&at)[4], uint64_t *barrier) {
    const Box box = make_box(map, at, to);
    auto copy = [box] {
        each_element(box, [](const char *there, char *here) {
            if (there)
                memcpy(here, there, ELEMENT);
            else
                memset(here, 0, ELEMENT);
        });
    };
    bring(copy, barrier, box.map.rows * box.map.columns * ELEMENT);
}

void take_box(const CUtensorMap &map, const int32_t (&at)[4], const void *from) {
    const Box box = make_box(map, at, from);
    take_away([box] {
        each_element(box, [](char *there, const char *here) {
            if (there)
                memcpy(there, here, ELEMENT);
        });
    });
}

} // namespace emulator
