/* SPDX-License-Identifier: MIT */
/*
 * Decode alone. One CTA works some columns of V of one state.
 *
 * With few states the time is that of one CTA from its first instruction to its last. So addresses take few
 * multiplications, and instructions have conditions instead of branches around them.
 */
#include "cuda/sm80/decode_inputs.cuh"
#include "cuda/sm80/kernels.h"

namespace kda {
namespace decode {
namespace {

/* ---- The kernel ----------------------------------------------------------------------------------- */

/* CTAs of a multiprocessor, as registers allow. Threads with 16-bit states hold twice as many elements, and
 * several tokens on their way take registers, too. FEW: one CTA, and that of the next call. */
template <class Tile, int BATCH, Kind kind> constexpr int resident() {
    int threads = Tile::PIECES == SMALL ? 1024 : Tile::VEC == 8 || Tile::KP > 128 ? 512 : BATCH > 1 ? 640 : 768;
    return kind == FEW ? 2 : threads / Tile::THREADS;
}

/* FEW: the kernel guesses where the state is while the work before it ends, when it may not yet rely on that.
 * The guess brings the state into the cache and lets its loads be the first. Later it is compared with the slot
 * as it is then. */
template <class Tile, int BATCH, Kind kind>
__global__ void __launch_bounds__(Tile::THREADS, resident<Tile, BATCH, kind>())
    decode(const __grid_constant__ Decode given) {
    extern __shared__ __align__(16) char memory[];
    typename Tile::Token *tokens = reinterpret_cast<typename Tile::Token *>(memory); /* max_tokens of them */
    __shared__ typename Tile::Scratch scratch;
    constexpr bool HINT = kind == FEW && BEGINS_EARLY;
    const Decode d = what_is_known<Tile, BATCH, kind>(given);
    int n = d.first_sequence + blockIdx.z, head = blockIdx.y, column = blockIdx.x * Tile::COLUMNS;
    int columns = d.value_dim - (kind == GENERAL ? column : 0);
    char *state = d.state + times(head, d.state_head_stride) + Tile::offset(d, column); /* of slot 0 */
    Tile tile;
    Inputs<Tile, BATCH, kind> inputs;
    int hint = 0, index;
    char *at;
    if (HINT) {
        hint = max(in_pool(d, find_read_index(d, n)), 0);
        at = state + times(hint, d.slot_stride);
        Tile::prefetch(d, at);
    }
    wait_for_inputs();
    if (HINT)
        tile.load(d, at, columns);
    else
        index = find_read_index(d, n);
    bool from_zero = starts_from_zero(d, n);
    __syncwarp(); /* or the compiler would issue it later, and the state waits for it */
    Sequence s = find_sequence(d);
    inputs.load(d, s, head, column, columns, 0); /* before it is known whether there is a state, or a token */
    if (HINT) {
        index = find_read_index(d, n);
    } else {
        /* The warp issues all of that before it reads the index. A read that spans no other lanes would be
         * moved up. */
        __syncwarp();
        s.slot = in_pool(d, __reduce_max_sync(~0u, index));
        if (s.slot < 0 || s.length < 1)
            return;
        tile.load(d, at = state + times(s.slot, d.slot_stride), from_zero ? 0 : columns);
    }
    if (BATCH == 1)
        s.length = 1;
    bool large = false;
    for (int begin = 0;;) {
        large |= inputs.prepare(d, min(BATCH, s.length - begin), tokens + begin);
        begin += BATCH;
        if (begin >= s.length)
            break;
        inputs.load(d, s, head, column, columns, begin);
    }
    if (HINT) {
        s.slot = in_pool(d, index);
        if (s.slot < 0)
            return;
        if (s.slot != hint || from_zero)
            tile.load(d, at = state + times(s.slot, d.slot_stride), from_zero ? 0 : columns);
    }
    char *out = nullptr;
    if (d.out.data)
        out = find_row_of<kind>(d.out, s, 0, head) + times(column, size_of(d.out.dtype));
    large = any_of_cta(large);
    if (__builtin_expect(large, 0))
        normalise_large<Tile::THREADS>(tokens, s.length);
    if (large || !inputs.DECAYS_KEYS)
        decay_keys<Tile>(tokens, s.length);
    tile.unpack(d);
#pragma unroll 1
    for (int t = 0; t < s.length; t++) {
        tile.step(d, tokens[t], scratch, t, out, d.out.dtype, columns);
        if (out)
            out += d.out.token;
        if (d.columns) { /* a state after every token */
            int slot = find_written_slot(d, s, t);
            if (slot >= 0)
                tile.store(d, state + times(slot, d.slot_stride), columns);
        }
    }
    if (!d.columns && !d.keep_state)
        tile.store(d, at, columns);
}

template <class Tile> int64_t count_parts(const kda_decode *d) {
    return (d->tokens.value_dim + Tile::COLUMNS - 1) / Tile::COLUMNS;
}

template <class Tile, int BATCH, Kind kind> cudaError_t launch_kind(const kda_decode *d, const Decode &s) {
    int bytes = (int)d->max_tokens * (int)sizeof(typename Tile::Token);
    dim3 grid((unsigned)count_parts<Tile>(d), (unsigned)d->tokens.value_heads);
    return launch(decode<Tile, BATCH, kind>, s, d, grid, Tile::THREADS, bytes,
                  (int)sizeof(typename Tile::Scratch));
}

/* few: there are so few states that FEW is wanted, if it is made. */
template <class Tile, int BATCH> cudaError_t launch_tile(const kda_decode *d, bool few) {
    Decode s = shorten(d);
    if constexpr (Tile::KP == 128 && !std::is_same_v<typename Tile::Access, Elementwise>)
        if (is_usual<Tile>(s, d)) {
            if constexpr (Tile::PIECES == SMALL)
                if (few)
                    return launch_kind<Tile, BATCH, FEW>(d, s);
            return launch_kind<Tile, BATCH, USUAL>(d, s);
        }
    return launch_kind<Tile, BATCH, GENERAL>(d, s);
}

/* Small: tiles of few pieces, or void. They are for one token, and so few states that all CTAs run at once. */
template <class Tile, class Small> cudaError_t launch_batch(const kda_decode *d) {
    if constexpr (!std::is_void_v<Small>) {
        int processors = 0;
        cudaError_t error =
            cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, d->tokens.device);
        if (error)
            return error;
        int64_t ctas = count_parts<Small>(d) * d->tokens.value_heads; /* of a sequence; all of them: */
        ctas = d->tokens.sequences > INT_MAX / ctas ? INT_MAX : ctas * d->tokens.sequences;
        /* Their sums run in another order. */
        bool may_differ = !d->tokens.batch_invariant;
        if (may_differ && d->max_tokens == 1 && ctas <= processors * resident<Small, 1, USUAL>())
            return launch_tile<Small, 1>(d, ctas <= processors);
    }
    return d->max_tokens == 1 ? launch_tile<Tile, 1>(d, false) : launch_tile<Tile, 4>(d, false);
}

template <class Access, int KP> cudaError_t launch_layout(const kda_decode *d) {
    constexpr bool HAS_SMALL = KP <= 128 && !std::is_same_v<Access, Elementwise>;
    using SmallVFirst = TileVFirst<Access, HAS_SMALL ? KP : 64, 256, SMALL>;
    using SmallKFirst = TileKFirst<Access, HAS_SMALL ? KP : 64, KP * LANES / SMALL, SMALL>;
    if (d->tokens.state_layout == FLASH_KDA_STATE_V_FIRST)
        return launch_batch<TileVFirst<Access, KP, 128, LARGE>,
                            std::conditional_t<HAS_SMALL, SmallVFirst, void>>(d);
    return launch_batch<TileKFirst<Access, KP, KP * LANES / LARGE, LARGE>,
                        std::conditional_t<HAS_SMALL, SmallKFirst, void>>(d);
}

} // namespace
} // namespace decode
} // namespace kda

cudaError_t kda_sm80_decode(const kda_decode *d, bool aligned) {
    using namespace kda::decode;
    return with_access(d, aligned, [&](auto access, auto key_dim) {
        return launch_layout<decltype(access), decltype(key_dim)::value>(d);
    });
}
