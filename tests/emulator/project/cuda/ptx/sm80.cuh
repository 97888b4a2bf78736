/* SPDX-License-Identifier: MIT */
/* In place of src/cuda/ptx/sm80.cuh: what its instructions do, by the fragments' layouts in the PTX ISA, "Matrix Fragments for
 * mma.m16n8k16". */
#ifndef KDA_CUDA_PTX_SM80_CUH
#define KDA_CUDA_PTX_SM80_CUH

#include "copies.h"
#include "intrinsics.h"

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace kda {

/* ---- Products ---- */

struct MmaLane {
    float *d;
    const uint32_t *a;
    uint32_t b[2];
    bool accumulate;
};

/* d [16][8] = or += a [16][K] b [K][8], where `number` reads element `half` of a register, which holds 16 / K * 2. */
template <int K, class Number> void multiply(MmaLane *const *lanes, Number number) {
    constexpr int PACKED = K / 8; /* elements of a register */
    float a[16][K], b[K][8];
    for (int i = 0; i < emulator::LANES; i++)
        for (int half = 0; half < PACKED; half++) {
            int row = i / 4, column = i % 4 * PACKED + half;
            for (int r = 0; r < 4; r++)
                a[row + r % 2 * 8][column + r / 2 * K / 2] = number(lanes[i]->a[r], half);
            for (int r = 0; r < 2; r++)
                b[column + r * K / 2][row] = number(lanes[i]->b[r], half);
        }
    for (int i = 0; i < emulator::LANES; i++)
        for (int n = 0; n < 4; n++) {
            int row = i / 4 + n / 2 * 8, column = i % 4 * 2 + n % 2;
            float sum = lanes[i]->accumulate ? lanes[i]->d[n] : 0;
            for (int k = 0; k < K; k++)
                sum += a[row][k] * b[k][column];
            lanes[i]->d[n] = sum;
        }
}

inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    MmaLane mine = {d, a, {b0, b1}, true};
    emulator::together(mine, [](MmaLane *const *lanes) { multiply<16>(lanes, emulator::half_of_bf16); });
}

template <bool accumulate> void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    MmaLane mine = {d, a, {b0, b1}, accumulate};
    emulator::together(mine, [](MmaLane *const *lanes) {
        multiply<16>(lanes, [](uint32_t pair, bool high) {
            return __half2float(emulator::bits_as<__half>((uint16_t)(high ? pair >> 16 : pair)));
        });
    });
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    MmaLane mine = {d, a, {b0, b1}, true};
    emulator::together(mine, [](MmaLane *const *lanes) {
        multiply<8>(lanes, [](uint32_t x, bool) { return __uint_as_float(x & 0xffffe000u); });
    });
}

/* To nearest, ties away from zero. */
inline float round_tf32(float x) {
    return std::isfinite(x) ? __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u) : x;
}

/* ---- Matrices of 8x8 elements of 2 bytes, two of a row in a lane's register ---- */

struct MatrixLane {
    uint32_t *r;
    uint32_t row;
};

inline void load_matrices(uint32_t (&r)[4], uint32_t row, bool transposed) {
    MatrixLane mine = {r, row};
    emulator::together(mine, [=](MatrixLane *const *lanes) {
        for (int m = 0; m < 4; m++) {
            uint16_t x[8][8];
            for (int i = 0; i < 8; i++) {
                uint32_t address = lanes[m * 8 + i]->row;
                if (address % 16)
                    emulator::fail("ldmatrix of a row at %u, no multiple of 16", address);
                memcpy(x[i], emulator::shared_pointer(address, 16), 16);
            }
            for (int i = 0; i < emulator::LANES; i++) {
                int row = i / 4, column = i % 4 * 2;
                uint32_t low = transposed ? x[column][row] : x[row][column],
                         high = transposed ? x[column + 1][row] : x[row][column + 1];
                lanes[i]->r[m] = low | high << 16;
            }
        }
    });
}
inline void ldmatrix(uint32_t (&r)[4], uint32_t row) { load_matrices(r, row, false); }
inline void ldmatrix_transposed(uint32_t (&r)[4], uint32_t row) { load_matrices(r, row, true); }

inline uint32_t transpose(uint32_t x) {
    emulator::together(x, [](uint32_t *const *lanes) {
        uint32_t matrix[8][8];
        for (int i = 0; i < emulator::LANES; i++)
            for (int half = 0; half < 2; half++)
                matrix[i / 4][i % 4 * 2 + half] = *lanes[i] >> 16 * half & 0xffff;
        for (int i = 0; i < emulator::LANES; i++)
            *lanes[i] = matrix[i % 4 * 2][i / 4] | matrix[i % 4 * 2 + 1][i / 4] << 16;
    });
    return x;
}

/* ---- Copies ---- */

inline void copy_async(void *to, const void *from, bool real = true) { emulator::copy_piece(to, from, real); }
inline void copy_async_commit() { emulator::commit_pieces(); }
template <int pending> void copy_async_wait() { emulator::wait_for_pieces(pending); }

/* ---- Numbers ---- */

inline float max_or_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : fmaxf(x, y); }
inline float min_or_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : fminf(x, y); }

/* 0 for a denormal. */
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
inline float exp2_approximate(float x) { return flushed(exp2f(x)); }
inline float reciprocal_approximate(float x) { return flushed(1 / flushed(x)); }

inline uint32_t pack_bf16(float low, float high) {
    return emulator::bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
}
inline uint32_t pack_half(float low, float high) {
    return emulator::bits_as<uint32_t>(__floats2half2_rn(low, high));
}
inline float2 unpack_bf16(uint32_t x) {
    return make_float2(emulator::half_of_bf16(x, false), emulator::half_of_bf16(x, true));
}

} // namespace kda

#endif
