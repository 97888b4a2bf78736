/* SPDX-License-Identifier: MIT */
/*
 * Takes states through summaries: X <- X M + B, in fp32.
 *
 * A CTA works ROWS rows of V of one state, which stay in shared memory. M comes by slabs of SLAB rows; the next slab is on
 * its way in registers while one is multiplied. A thread sums up to SUMS groups of four channels, each for one row of V.
 */
#include "cuda/floats.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm80/kernels.h"

namespace kda {
namespace {

constexpr int THREADS = 256, ROWS = 16, SLAB = 32;

/* K padded; a row of M's slab begins in another bank than the one before it. */
template <int KP> struct Shared {
    float X[ROWS][KP];
    float M[SLAB][KP + 4];
};

template <int KP> constexpr int SUMS = ROWS *KP / 4 / THREADS; /* groups of a thread */
template <int KP> constexpr int AHEAD = SLAB *KP / THREADS;    /* elements of a slab that it fetches */

__device__ float load(const kda_matrix &m, int64_t i, int64_t j) {
    return load_float(m.data + i * m.row + j * m.column, m.dtype, 0);
}

/* Rows first .. first + ROWS - 1 of X; zeros beyond the matrix. */
template <int KP>
__device__ void load_rows(const kda_fold &f, const kda_matrix &m, int64_t first, Shared<KP> &shared) {
    for (int i = threadIdx.x; i < ROWS * KP; i += THREADS) {
        int v = i / KP, c = i % KP;
        bool real = m.data && first + v < f.value_dim && c < f.key_dim;
        shared.X[v][c] = real ? load(m, first + v, c) : 0.f;
    }
    __syncthreads();
}

template <int KP>
__device__ void store_rows(const kda_fold &f, const kda_matrix &m, int64_t first, const Shared<KP> &shared) {
    for (int i = threadIdx.x; m.data && i < ROWS * KP; i += THREADS) {
        int v = i / KP, c = i % KP;
        if (first + v < f.value_dim && c < f.key_dim)
            store_float(m.data + (first + v) * m.row + c * m.column, m.dtype, 0, shared.X[v][c]);
    }
}

/* Element number i of a slab, counted along the dimension of M that is contiguous. */
template <int KP> __device__ void place_in_slab(const kda_matrix &M, int i, int *from, int *to) {
    if (M.column <= M.row)
        *from = i / KP, *to = i % KP;
    else
        *from = i % SLAB, *to = i / SLAB;
}

template <int KP>
__device__ void fetch_slab(const kda_fold &f, const kda_matrix &M, int first, float (&ahead)[AHEAD<KP>]) {
#pragma unroll
    for (int n = 0; n < AHEAD<KP>; n++) {
        int from, to;
        place_in_slab<KP>(M, n * THREADS + threadIdx.x, &from, &to);
        ahead[n] = first + from < f.key_dim && to < f.key_dim ? load(M, first + from, to) : 0.f;
    }
}

template <int KP>
__device__ void follow_link(const kda_fold &f, int64_t summary, int64_t head, int64_t first,
                            Shared<KP> &shared) {
    const kda_matrix M = kda_fold_transition(&f, summary, head);
    const kda_matrix B = kda_fold_matrix(&f, &f.bias, summary, 0, head);
    float sums[SUMS<KP>][4], ahead[AHEAD<KP>];
    fetch_slab<KP>(f, M, 0, ahead);
#pragma unroll
    for (int n = 0; n < SUMS<KP>; n++) {
        int group = n * THREADS + threadIdx.x, v = group / (KP / 4), c = group % (KP / 4) * 4;
#pragma unroll
        for (int i = 0; i < 4; i++)
            sums[n][i] = first + v < f.value_dim && c + i < f.key_dim ? load(B, first + v, c + i) : 0.f;
    }
    for (int slab = 0; slab < f.key_dim; slab += SLAB) {
#pragma unroll
        for (int n = 0; n < AHEAD<KP>; n++) {
            int from, to;
            place_in_slab<KP>(M, n * THREADS + threadIdx.x, &from, &to);
            shared.M[from][to] = ahead[n];
        }
        __syncthreads();
        if (slab + SLAB < f.key_dim)
            fetch_slab<KP>(f, M, slab + SLAB, ahead);
#pragma unroll 4
        for (int from = 0; from < SLAB; from++)
#pragma unroll
            for (int n = 0; n < SUMS<KP>; n++) {
                int group = n * THREADS + threadIdx.x, v = group / (KP / 4), c = group % (KP / 4) * 4;
                float x = shared.X[v][slab + from];
                float4 m = *reinterpret_cast<const float4 *>(&shared.M[from][c]);
                sums[n][0] = fmaf(x, m.x, sums[n][0]), sums[n][1] = fmaf(x, m.y, sums[n][1]);
                sums[n][2] = fmaf(x, m.z, sums[n][2]), sums[n][3] = fmaf(x, m.w, sums[n][3]);
            }
        __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < SUMS<KP>; n++) {
        int group = n * THREADS + threadIdx.x, v = group / (KP / 4), c = group % (KP / 4) * 4;
        *reinterpret_cast<float4 *>(&shared.X[v][c]) =
            make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
    }
    __syncthreads();
}

template <int KP> __global__ void __launch_bounds__(THREADS) fold(const __grid_constant__ kda_fold f) {
    extern __shared__ __align__(16) char memory[];
    Shared<KP> &shared = *reinterpret_cast<Shared<KP> *>(memory);
    int64_t n = blockIdx.x / f.value_heads, head = blockIdx.x % f.value_heads, slot = kda_fold_slot(&f, n);
    int64_t tiles = (f.value_dim + ROWS - 1) / ROWS;
    if (slot < 0)
        return;
    for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
        int64_t first = tile * ROWS;
        load_rows<KP>(f, kda_fold_matrix(&f, &f.initial_state, slot, 0, head), first, shared);
        for (int64_t i = 0; i < f.links; i++) {
            int64_t summary = kda_fold_link(&f, n, i);
            store_rows<KP>(f, kda_fold_matrix(&f, &f.prefixes, n, i, head), first, shared);
            if (summary >= 0)
                follow_link<KP>(f, summary, head, first, shared);
        }
        store_rows<KP>(f, kda_fold_matrix(&f, &f.states, slot, 0, head), first, shared);
        __syncthreads();
    }
}

template <int KP> cudaError_t launch_padded(const kda_fold *f) {
    constexpr int64_t MAX_TILES = 1024;
    unsigned grid[2] = {(unsigned)(f->rows * f->value_heads),
                        (unsigned)kda_min64((f->value_dim + ROWS - 1) / ROWS, MAX_TILES)};
    return launch_kernel(fold<KP>, grid, THREADS, sizeof(Shared<KP>), f->stream, false, *f);
}

__global__ void __launch_bounds__(THREADS) clear_summaries(const __grid_constant__ kda_tensor t) {
    int64_t columns = t.shape[3], size = t.shape[2] * columns;
    char *matrix = t.data + blockIdx.x * t.stride[0] + blockIdx.y * t.stride[1];
    for (int64_t i = threadIdx.x; i < size; i += THREADS)
        reinterpret_cast<float *>(matrix + i / columns * t.stride[2])[i % columns] = 0;
}

} // namespace
} // namespace kda

cudaError_t kda_sm80_fold(const kda_fold *f) {
    return f->key_dim <= 64    ? kda::launch_padded<64>(f)
           : f->key_dim <= 128 ? kda::launch_padded<128>(f)
                               : kda::launch_padded<256>(f);
}

cudaError_t kda_sm80_clear_summaries(const kda_border *border, void *stream) {
    const kda_tensor &t = border->summaries;
    unsigned grid[2] = {(unsigned)t.shape[0], (unsigned)t.shape[1]};
    return grid[0] ? kda::launch_kernel(kda::clear_summaries, grid, kda::THREADS, 0, stream, false, t)
                   : cudaSuccess;
}
