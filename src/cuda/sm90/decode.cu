/* SPDX-License-Identifier: MIT */
/*
 * Decode of one token, whose states the copy engine brings. One CTA works 64 or 128 columns of V of one state.
 *
 * With few states the time is that of one CTA, from when it may read what the work before has written to its
 * last store. So it asks for everything at once: first for what the token brings, then for the state, which
 * would keep it waiting. It finds all addresses before. A CTA has more of a state than registers hold, so it
 * prepares a token for more columns, and takes these from shared memory block by block as they arrive.
 */
#include "cuda/ptx/sm90.cuh"
#include "cuda/sm80/decode_inputs.cuh"
#include "cuda/sm90/kernels.h"

#include <cuda/ptx>

namespace kda {
namespace decode {
namespace {

namespace ptx = cuda::ptx;

constexpr int DIM = 128;

/* Threads and columns of V of a CTA; the columns come in blocks of a tile's size. AHEAD: the expected state is
 * brought to the L2 cache while the work before the kernel ends. That pays where multiprocessors or memory are
 * idle then. */
template <kda_dtype DTYPE, int COLUMNS_, bool AHEAD_> struct Staged {
    static constexpr bool AHEAD = AHEAD_;
    static constexpr int KP = DIM, THREADS = 2 * DIM, COLUMNS = COLUMNS_;
    using Tile = TileVFirst<Aligned<DTYPE>, DIM, THREADS, SMALL>;
    static constexpr int BLOCKS = COLUMNS / Tile::COLUMNS, ROW = DIM * (DTYPE == KDA_F32 ? 4 : 2); /* bytes */
    static constexpr bool ONCE = false; /* tokens need no decayed keys, as Channels have them */
    using Token = decode::Token<KP, COLUMNS, Tile::PARTS, ONCE>;
    __device__ static unsigned index(unsigned channel) { return Tile::index(channel); }
};

template <class S> struct Shared {
    alignas(128) char state[S::BLOCKS][S::Tile::COLUMNS][S::ROW];
    typename S::Token token;
    uint64_t arrived[S::BLOCKS];
    int slot; /* whose state is brought; -1: none is */
};

/* Addresses of a thread's part of what the token brings: of q, k, v and beta, or of g, dt_bias and A_log. */
template <class S> struct Addresses {
    using Threads = Inputs<S, 1, USUAL>;
    static_assert(Threads::SHARED_OUT && S::THREADS == 2 * S::KP);
    const char *at[4];

    __device__ Addresses(const Decode &d, const Sequence &s, int head, int column) {
        if (Threads::has_keys()) {
            int key_head = d.per_group ? (int)__umulhi(head, d.per_group) : head, channel = Threads::channel(0);
            at[0] = find_row_of<USUAL>(d.q, s, 0, key_head) + channel * 2;
            at[1] = find_row_of<USUAL>(d.k, s, 0, key_head) + channel * 2;
            at[2] = find_row_of<USUAL>(d.v, s, 0, head) + (column + min(channel, S::COLUMNS - 1)) * 2;
            at[3] = find_row_of<USUAL>(d.beta, s, 0, head);
        } else {
            int channel = Threads::gate(0);
            at[0] = at[3] = find_row_of<USUAL>(d.g, s, 0, head) + channel * 2;
            at[1] = d.dt_bias ? d.dt_bias + times(head, d.dt_bias_stride) + channel * 4 : at[0];
            at[2] = d.A_log ? d.A_log + times(head, d.A_log_stride) : at[0];
        }
    }

    /* Computes them here: the compiler would put that off until they are used. */
    __device__ void prefetch() const {
#pragma unroll
        for (int i = 0; i < 4; i++)
            prefetch_line(at[i]);
    }

    __device__ void load(const Decode &d, Threads &inputs) const {
        if (Threads::has_keys()) {
            inputs.k[0][0] = load_here(at[1], false);
            inputs.q[0][0] = load_here(at[0], false);
            inputs.v[0] = load_here(at[2], false);
            inputs.beta[0] = load_here(at[3], false);
        } else {
            inputs.g[0][0] = load_here(at[0], false);
            if (d.dt_bias)
                inputs.bias[0] = load_here(at[1], true);
            if (d.A_log)
                inputs.A_log[0] = load_here(at[2], true);
        }
    }
};

/* Asks for the state at `from`, or for none if there is no slot. */
template <class S> __device__ void bring(Shared<S> &shared, int slot, const char *from) {
    shared.slot = slot;
    if (slot < 0)
        return;
#pragma unroll
    for (int i = 0; i < S::BLOCKS; i++) {
        ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &shared.arrived[i],
                                       sizeof shared.state[i]);
        ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, &shared.state[i],
                           from + i * sizeof shared.state[i], sizeof shared.state[i], &shared.arrived[i]);
    }
}

/* Takes a thread's part of a block. */
template <class S> __device__ void take(const Shared<S> &shared, int block, typename S::Tile &tile) {
    using Tile = typename S::Tile;
    const char *at = &shared.state[block][Tile::row(0)][threadIdx.x % LANES * 16];
#pragma unroll
    for (int i = 0; i < Tile::ROWS; i++)
#pragma unroll
        for (int j = 0; j < Tile::ACROSS; j++)
            load_shared(reinterpret_cast<const float *>(at + i * Tile::STEP * S::ROW + j * LANES * 16),
                        reinterpret_cast<float(&)[4]>(tile.S[i][j]));
}

/* A thread's channels of a token, in registers for all blocks; as Tile::SharedChannels. */
template <class Tile> struct Channels {
    using Registers = float[Tile::ACROSS][Tile::VEC];
    Registers decay, k, q, dk; /* Tile::ONCE: q is decayed, too */

    template <class Token> __device__ explicit Channels(const Token &token) {
#pragma unroll
        for (int j = 0; j < Tile::ACROSS; j++)
#pragma unroll
            for (int part = 0; part < Tile::VEC; part += 4)
                Tile::load_channels(token, j, part, four(decay, j, part), four(k, j, part), four(q, j, part));
        if constexpr (Tile::ONCE)
#pragma unroll
            for (int j = 0; j < Tile::ACROSS; j++)
#pragma unroll
                for (int e = 0; e < Tile::VEC; e++) {
                    dk[j][e] = fmaf(k[j][e], decay[j][e], k[j][e]);
                    q[j][e] = fmaf(q[j][e], decay[j][e], q[j][e]);
                }
    }

    __device__ static float (&four(Registers &x, int j, int part))[4] {
        return reinterpret_cast<float(&)[4]>(x[j][part]);
    }
    __device__ static void copy(const Registers &from, int j, int part, float (&to)[4]) {
#pragma unroll
        for (int e = 0; e < 4; e++)
            to[e] = from[j][part + e];
    }
    __device__ void load(int j, int part, float (&its_decay)[4], float (&its_k)[4], float (&its_q)[4]) const {
        copy(decay, j, part, its_decay), copy(k, j, part, its_k), copy(q, j, part, its_q);
    }
    __device__ void load_decayed(int j, int part, float (&its_dk)[4], float (&its_dq)[4]) const {
        copy(dk, j, part, its_dk), copy(q, j, part, its_dq);
    }
    __device__ void load_change(int j, int part, float (&its_decay)[4], float (&its_k)[4]) const {
        copy(decay, j, part, its_decay), copy(k, j, part, its_k);
    }
};

template <class S>
__global__ void __launch_bounds__(S::THREADS, 2) decode(const __grid_constant__ Decode given) {
    using Tile = typename S::Tile;
    extern __shared__ __align__(128) char memory[];
    Shared<S> &shared = *reinterpret_cast<Shared<S> *>(memory);
    const Decode d = what_is_known<S, 1, USUAL>(given);
    int n = d.first_sequence + blockIdx.z, head = blockIdx.y, column = blockIdx.x * S::COLUMNS;
    char *state = d.state + times(head, d.state_head_stride) + column * S::ROW, *from = state; /* of slot 0 */
    int hint = -1;
    /* A guess: the work before may still write the index. */
    if (threadIdx.x == 0) {
        hint = starts_from_zero(d, n) ? -1 : in_pool(d, find_read_index(d, n));
        from += times(max(hint, 0), d.slot_stride);
        if (S::AHEAD && hint >= 0)
            bring_to_cache(from, sizeof shared.state);
#pragma unroll
        for (int i = 0; i < S::BLOCKS; i++)
            ptx::mbarrier_init(&shared.arrived[i], 1);
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    Sequence s = find_sequence(d);
    Inputs<S, 1, USUAL> inputs;
    Addresses<S> addresses(d, s, head, column);
    addresses.prefetch();
    char *out = nullptr;
    if (d.out.data)
        out = find_row_of<USUAL>(d.out, s, 0, head) + column * 2;
    wait_for_inputs();
    addresses.load(d, inputs);
    int index = find_read_index(d, n);
    bool from_zero = starts_from_zero(d, n);
    if (threadIdx.x == 0)
        bring(shared, hint, from);
    bool large = inputs.prepare(d, 1, &shared.token);
    s.slot = in_pool(d, index);
    if (__builtin_expect(any_of_cta(large), 0))
        normalise_large<S::THREADS>(&shared.token, 1);
    const Channels<Tile> channels(shared.token);
    Products sums = shared.token.all_products();
    Factors factor(d, sums);
    float beta = shared.token.beta;
    int brought = shared.slot;
    state += times(s.slot, d.slot_stride) + Tile::offset(d, 0);
#pragma unroll
    for (int block = 0; block < S::BLOCKS; block++) {
        Tile tile;
        if (brought >= 0) /* what is on its way is waited for in any case */
            while (!ptx::mbarrier_try_wait_parity(&shared.arrived[block], 0))
                ;
        if (s.slot < 0)
            continue;
        if (__builtin_expect(s.slot == brought && !from_zero, true))
            take(shared, block, tile);
        else
            tile.load(d, state, from_zero ? 0 : d.value_dim);
        tile.unpack(d);
        tile.step_columns(channels, sums, factor, beta, &shared.token.v[block * Tile::COLUMNS], out, KDA_BF16,
                          d.value_dim);
        if (!d.keep_state)
            tile.store(d, state, d.value_dim);
        state += Tile::COLUMNS * S::ROW;
        if (out)
            out += Tile::COLUMNS * 2;
    }
}

template <class S> cudaError_t launch_staged(const kda_decode *d) {
    dim3 grid((unsigned)(d->tokens.value_dim / S::COLUMNS), (unsigned)d->tokens.value_heads);
    return launch(decode<S>, shorten(d), d, grid, S::THREADS, (int)sizeof(Shared<S>), 0);
}

/* So many states to a multiprocessor, at most, are few. */
constexpr int FEW_STATES = 4;

int64_t count_states(const kda_decode *d) {
    return d->tokens.sequences * d->tokens.value_heads * (d->tokens.value_dim / DIM);
}

/* A CTA has half a state where there are multiprocessors enough for all halves. */
template <kda_dtype DTYPE> cudaError_t launch_dtype(const kda_decode *d, int processors) {
    int64_t states = count_states(d);
    if (2 * states <= processors)
        return launch_staged<Staged<DTYPE, DIM / 2, true>>(d);
    if (DTYPE == KDA_F32 || states <= FEW_STATES * processors)
        return launch_staged<Staged<DTYPE, DIM, false>>(d);
    return launch_staged<Staged<DTYPE, DIM, true>>(d);
}

} // namespace
} // namespace decode
} // namespace kda

bool kda_sm90_decode_takes(const kda_decode *d, int processors) {
    using namespace kda::decode;
    const kda_tokens &p = d->tokens;
    Decode s = shorten(d);
    bool laid_out = p.state_layout == FLASH_KDA_STATE_V_FIRST &&
                    s.row_stride == DIM * (int64_t)kda_dtype_size(d->state.dtype);
    return laid_out && d->max_tokens == 1 && !p.batch_invariant &&
           is_usual<Staged<KDA_F32, DIM, false>>(s, d) &&
           (d->state.dtype != KDA_F32 || count_states(d) <= FEW_STATES * processors);
}

cudaError_t kda_sm90_decode(const kda_decode *d, int processors) {
    using namespace kda::decode;
    return d->state.dtype == KDA_F32    ? launch_dtype<KDA_F32>(d, processors)
           : d->state.dtype == KDA_BF16 ? launch_dtype<KDA_BF16>(d, processors)
                                        : launch_dtype<KDA_F16>(d, processors);
}
