/* SPDX-License-Identifier: MIT */
/*
 * libflashkda: Kimi Delta Attention (KDA), the gated delta rule with one decay per channel.
 *
 * KDA replaces a growing key/value cache by a state S [K, V] per value head. Token by token
 * (Kimi Linear, arXiv:2510.26692, section 3; docs/maths.md gives every form this library uses):
 *
 *     S <- diag(exp(a_t)) S                   decay; a_t <= 0 is the log decay of each channel
 *     S <- S + beta_t k_t (v_t - S^T k_t)^T   delta rule; beta_t is the step
 *     o_t = scale * S^T q_t                   read-out
 *
 * A whole program: one sequence of 64 tokens and 2 heads, in fp32, on the CPU.
 *
 *     #include <flash_kda.h>
 *     #include <stdio.h>
 *     #include <stdlib.h>
 *
 *     enum { B = 1, T = 64, H = 2, K = 128, V = 128 };
 *     static float q[B][T][H][K], k[B][T][H][K], v[B][T][H][V], g[B][T][H][K], beta[B][T][H], out[B][T][H][V];
 *
 *     static DLTensor tensor(void *data, int ndim, int64_t *shape) {
 *         return (DLTensor){.data = data, .device = {.device_type = kDLCPU}, .ndim = ndim,
 *                           .dtype = {.code = kDLFloat, .bits = 32, .lanes = 1}, .shape = shape};
 *     }
 *
 *     int main(void) {
 *         int64_t of_q[] = {B, T, H, K}, of_v[] = {B, T, H, V}, of_beta[] = {B, T, H};
 *         DLTensor tq = tensor(q, 4, of_q), tk = tensor(k, 4, of_q), tg = tensor(g, 4, of_q);
 *         DLTensor tv = tensor(v, 4, of_v), tout = tensor(out, 4, of_v), tbeta = tensor(beta, 3, of_beta);
 *
 *         flash_kda_prefill_args args = FLASH_KDA_PREFILL_ARGS_INIT;
 *         args.q = &tq, args.k = &tk, args.v = &tv, args.g = &tg, args.beta = &tbeta, args.out = &tout;
 *         args.gate = FLASH_KDA_GATE_SOFTPLUS;
 *         args.beta_mode = FLASH_KDA_BETA_SIGMOID;
 *         args.flags = FLASH_KDA_QK_NORM;
 *
 *         size_t bytes = 0;
 *         flash_kda_status status = flash_kda_prefill_workspace_size(&args, &bytes);
 *         void *workspace = malloc(bytes);
 *         if (status == FLASH_KDA_OK)
 *             status = flash_kda_prefill(&args, workspace, bytes);
 *         if (status != FLASH_KDA_OK)
 *             fprintf(stderr, "%s\n", flash_kda_last_error());
 *         free(workspace);
 *         return status != FLASH_KDA_OK;
 *     }
 *
 * How to use it, from the first call to the last:
 *
 *  1. Describe every tensor by a DLPack DLTensor. The device in it chooses the backend, strides are
 *     honoured, nothing is copied or kept after the call.
 *  2. Fill a flash_kda_prefill_args, started from FLASH_KDA_PREFILL_ARGS_INIT.
 *  3. Ask flash_kda_prefill_workspace_size() how much scratch memory the call needs, and bring it.
 *  4. Call flash_kda_prefill(). A status other than FLASH_KDA_OK means that nothing was written;
 *     flash_kda_last_error() says in a sentence which argument was wrong.
 *  5. Go on from the states it left, one token or a few at a time, with flash_kda_decode().
 *  6. Or train: flash_kda_backward() gives the gradients of everything that a prefill reads.
 *  7. Share one long sequence among several GPUs or machines: prefill and backward run in two halves, between which the
 *     caller exchanges small summaries and flash_kda_fold() makes states of them. docs/parallel.md shows it.
 *
 * The library never prints, aborts, exits or keeps a reference to an argument. Every function may be called
 * from several threads at once, as long as the calls do not write the same memory, and in a child after fork.
 * No call needs more than 32 KiB of stack. The library believes what a DLTensor says: memory in use must be as
 * large as shape, strides and byte_offset make it.
 *
 * Shapes: B batch, T tokens, N sequences, H query/key heads, HV value heads (a multiple of H; value
 * head h reads query/key head h / (HV / H)), K and V head dims of keys and values.
 */
#ifndef FLASH_KDA_H
#define FLASH_KDA_H

#include <dlpack/dlpack.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define FLASH_KDA_API __attribute__((visibility("default")))
#else
#define FLASH_KDA_API
#endif

/* ---- Version, status, errors ------------------------------------------------------------------ */

/* Semantic version. Fields are only ever appended to the argument structs, whose first member carries
 * their size, so that a program built against 0.x keeps working with a later 0.y of the same soname. */
#define FLASH_KDA_VERSION_MAJOR 0
#define FLASH_KDA_VERSION_MINOR 1
#define FLASH_KDA_VERSION_PATCH 0

/* Version of the library at run time, for example "0.1.0". */
FLASH_KDA_API const char *flash_kda_version(void);

typedef enum flash_kda_status {
    FLASH_KDA_OK = 0,
    FLASH_KDA_ERROR_INVALID_ARGUMENT = 1,    /* rank, shape, dtype, stride, range, aliasing ... */
    FLASH_KDA_ERROR_UNSUPPORTED = 2,         /* backend, device or level not in this build or machine */
    FLASH_KDA_ERROR_WORKSPACE_TOO_SMALL = 3, /* see flash_kda_prefill_workspace_size */
    FLASH_KDA_ERROR_CUDA = 4,                /* an error of the CUDA runtime that this call saw, by name */
    FLASH_KDA_ERROR_OUT_OF_MEMORY = 5,       /* decode or fold in host memory: no scratch */
} flash_kda_status;

/* Name of a status, for example "FLASH_KDA_ERROR_UNSUPPORTED". Never NULL. */
FLASH_KDA_API const char *flash_kda_status_name(flash_kda_status status);

/* The sentence that belongs to the last failed call of this thread: which argument, what it was, what
 * was expected. Never NULL; empty if no call of this thread has failed. Valid until the thread's next
 * failing call. */
FLASH_KDA_API const char *flash_kda_last_error(void);

/* ---- Backends ---------------------------------------------------------------------------------- */

typedef enum flash_kda_backend {
    FLASH_KDA_BACKEND_AUTO = 0,      /* by the device of q: cpu for host memory, cuda for CUDA memory */
    FLASH_KDA_BACKEND_REFERENCE = 1, /* the oracle: token recurrence in fp64, one thread, exact and slow */
    FLASH_KDA_BACKEND_CPU = 2,       /* chunked form, SIMD, threads */
    FLASH_KDA_BACKEND_CUDA = 3,      /* chunked form on tensor cores, sm_80 and later; if built with nvcc */
} flash_kda_backend;

/* Name of a backend ("auto", "reference", "cpu", "cuda"); NULL for a value that is none. */
FLASH_KDA_API const char *flash_kda_backend_name(flash_kda_backend backend);

/* 1 if this build can run the backend on this machine, else 0. For cuda: there is a device of compute
 * capability 8.0 or higher. */
FLASH_KDA_API int flash_kda_backend_available(flash_kda_backend backend);

/* Levels of the CPU backend that this build has and this CPU can run, lowest first, ended by NULL:
 * "generic", then "avx2", "avx512", "avx512bf16" on x86-64 or "neon" on AArch64. */
FLASH_KDA_API const char *const *flash_kda_cpu_levels(void);

/* The level that the next call would run on: the fastest of flash_kda_cpu_levels(), which is the highest but
 * on Intel's processors, where it is "avx512" before "avx512bf16"; or the one that the environment variable
 * FLASH_KDA_CPU names. NULL, with flash_kda_last_error(), if it names a level that cannot run here. */
FLASH_KDA_API const char *flash_kda_cpu_level(void);

/* The most threads that a call with num_threads 0 takes, its caller among them. These are the processors that
 * this process may use, by affinity and by the quota of its cgroup, but no more than the environment variable
 * FLASH_KDA_NUM_THREADS says or, without that, OMP_NUM_THREADS. The first call that asks decides for the life
 * of the process. 0, with flash_kda_last_error(), if FLASH_KDA_NUM_THREADS is no number above 0. A call takes
 * fewer threads where more do not pay or cannot be had. docs/threads.md says how they work. */
FLASH_KDA_API int flash_kda_cpu_threads(void);

/* ---- Prefill ----------------------------------------------------------------------------------- */

/* How the log decay a [HV, K] of a token comes from g. Softplus and sigmoid give a <= 0. With NONE that is the
 * caller's business: a positive a is no error, and no backend clamps it. The channel grows by exp(a), as the
 * recurrence says. fp32 then has its limits: growth that later decay takes back costs digits of what is left,
 * and growth beyond 3e38 gives infinity or NaN. In a prefill on CUDA a log decay below -10 counts as -10 for
 * two tokens of one chunk of 32 that lie to either side, so growth must not make up for stronger decay
 * there. */
typedef enum flash_kda_gate {
    FLASH_KDA_GATE_NONE = 0,     /* a = g */
    FLASH_KDA_GATE_SOFTPLUS = 1, /* a = -exp(A_log) softplus(g + dt_bias) */
    FLASH_KDA_GATE_SIGMOID = 2,  /* a = lower_bound sigmoid(exp(A_log) (g + dt_bias)) */
} flash_kda_gate;

/* How the step of a token comes from beta. */
typedef enum flash_kda_beta {
    FLASH_KDA_BETA_GIVEN = 0,         /* beta itself */
    FLASH_KDA_BETA_SIGMOID = 1,       /* sigmoid(beta) */
    FLASH_KDA_BETA_TWICE_SIGMOID = 2, /* 2 sigmoid(beta): allows negative eigenvalues */
} flash_kda_beta;

/* Order of the last two dimensions of every state: [.., V, K] (FlashKDA, serving engines) or
 * [.., K, V] (flash-linear-attention). Below, states are written [.., V, K]. */
typedef enum flash_kda_state_layout {
    FLASH_KDA_STATE_V_FIRST = 0,
    FLASH_KDA_STATE_K_FIRST = 1,
} flash_kda_state_layout;

/* What the gate of the norm goes through. */
typedef enum flash_kda_norm_activation {
    FLASH_KDA_NORM_SIGMOID = 0, /* times sigmoid(norm_gate) */
    FLASH_KDA_NORM_SILU = 1,    /* times norm_gate sigmoid(norm_gate) */
} flash_kda_norm_activation;

typedef enum flash_kda_flags {
    /* q and k are divided by sqrt(sum of squares + 1e-6), per token and head. */
    FLASH_KDA_QK_NORM = 1 << 0,
    /* A sequence's bits do not depend on what it is batched with nor on num_threads. Costs speed only
     * where there are many more threads than sequences times value heads. */
    FLASH_KDA_BATCH_INVARIANT = 1 << 1,
    /* Decode only: the state is read, not written. */
    FLASH_KDA_KEEP_STATE = 1 << 2,
    /* padding_slot is given. Not in backward. */
    FLASH_KDA_PADDING_SLOT = 1 << 3,
} flash_kda_flags;

/* What a call does of a prefill or backward whose sequences may begin or go on in other calls, as a rule those of other
 * ranks: a sequence's tokens are cut into ranges, and each call has one range of it. */
typedef enum flash_kda_phase {
    FLASH_KDA_PHASE_WHOLE = 0,  /* all of it: no sequence crosses a border */
    FLASH_KDA_PHASE_BEGIN = 1,  /* what does not depend on other calls, and the summaries for them */
    FLASH_KDA_PHASE_FINISH = 2, /* the rest, once the states from other calls are there */
} flash_kda_phase;

/*
 * Arguments of prefill. Every pointer may be NULL unless it says "required"; what is NULL costs nothing.
 *
 * dtypes: "float" below is fp32, fp16 or bf16, chosen for each tensor by itself. Arithmetic is fp32; on
 * level avx512bf16 the large products take bf16 operands (accumulated in fp32) if q, k, v and out are all
 * bf16. Ask for an fp32 out to have fp32 arithmetic there too. On CUDA the large products always take bf16
 * operands, and the inverse of a chunk takes tf32. Numbers below 2^-126 count as 0.
 *
 * NaN and infinity: they go where the recurrence takes them and no further. Those of one sequence or head reach
 * no other. Those in a column of v reach only that column; those in a row of q reach only that row of out. On
 * CUDA what they reach may begin up to 31 tokens before them. Norms are right for rows of any length: those of
 * q and k and those of decode's outputs.
 *
 * Strides: free and not negative (a stride of 0 on an input repeats it), but the last dimension of q, k,
 * v, g, out, dt_bias and of every state must be contiguous. A strides pointer of NULL means compact.
 *
 * Memory: out, final_state, checkpoints and the states of convolutions may overlap neither each other nor an
 * input nor the workspace, but they may interleave, as parts of one page for each slot. There are two exceptions:
 * final_state may be initial_state itself (same address, dtype and strides: in place), and checkpoints may be the
 * state pool itself if both are addressed by indices.
 *
 * Every tensor is on the device of q, the index tensors too. In host memory the contents of cu_seqlens,
 * state_indices and the checkpoint_* tensors are checked before anything runs. In CUDA memory the host does not
 * read them: indices out of range are kept within the tensors, and the caller must use no slot twice.
 *
 * CUDA: a call launches its kernels on `stream` and returns. It neither allocates nor synchronises, and the
 * host reads no device memory. So a graph can capture it and replay it with other contents of every tensor.
 */
typedef struct flash_kda_prefill_args {
    size_t struct_size; /* sizeof(flash_kda_prefill_args), set by FLASH_KDA_PREFILL_ARGS_INIT. A program
                           built against an older header sets a smaller one: what it did not have yet is
                           zero. A larger one is an error */

    /* -- Inputs and output -- */
    const DLTensor *q;       /* required, float [B, T, H, K], 1 <= K <= 256 */
    const DLTensor *k;       /* required, float [B, T, H, K] */
    const DLTensor *v;       /* required, float [B, T, HV, V], V >= 1 */
    const DLTensor *g;       /* required, float [B, T, HV, K]: raw gate, or the log decay in nats a token */
    const DLTensor *beta;    /* required, float [B, T, HV] */
    const DLTensor *A_log;   /* float [HV]; NULL: exp(A_log) is 1. Not with FLASH_KDA_GATE_NONE */
    const DLTensor *dt_bias; /* float [HV, K]; NULL: 0. Not with FLASH_KDA_GATE_NONE */
    const DLTensor *out;     /* required, float [B, T, HV, V], written */

    /* -- What to compute -- */
    flash_kda_gate gate;
    double lower_bound; /* sigmoid gate only: in [-5, 0), nats a token */
    flash_kda_beta beta_mode;
    double scale;   /* 0: 1 / sqrt(K); within the range of fp32 */
    uint32_t flags; /* flash_kda_flags, FLASH_KDA_KEEP_STATE excepted */

    /* -- Packed sequences: B = 1, sequence n is tokens cu_seqlens[n] .. cu_seqlens[n + 1] - 1 -- */
    const DLTensor *cu_seqlens; /* int32 or int64 [N + 1], from 0 to T, never falling; NULL: N = B dense
                                   sequences of T tokens. A sequence may be empty: its state passes through */

    /* -- States, fp32 or bf16, each by itself -- */
    flash_kda_state_layout state_layout; /* of initial_state, final_state and checkpoints */
    const DLTensor *initial_state;       /* [N, HV, V, K] or, with state_indices, [slots, HV, V, K]; NULL: 0 */
    const DLTensor *final_state;         /* same shape, written */
    const DLTensor *state_indices;       /* int32 or int64 [N]: the slot of each sequence in initial_state and
                                            final_state, no slot twice; -1: padding, nothing of that sequence
                                            is read or written, its rows of out and checkpoints included */

    /* -- Interior checkpoints: checkpoints with either checkpoint_every or checkpoint_offsets -- */
    const DLTensor *checkpoints; /* fp32 or bf16, written; its shape is said below */
    int64_t checkpoint_every;    /* n > 0: row j of a sequence is its state after min((j + 1) n, length) tokens.
                                    A sequence has ceil(length / n) rows or fewer.
                                    Dense: checkpoints is [B, rows, HV, V, K].
                                    Packed: checkpoints is [rows of all sequences, HV, V, K] */
    const DLTensor *checkpoint_cu_starts; /* int32 or int64 [N + 1], required with cu_seqlens and
                                             checkpoint_every: sequence n has the rows checkpoint_cu_starts[n]
                                             .. checkpoint_cu_starts[n + 1] - 1 */
    const DLTensor *checkpoint_indices;   /* int32 or int64 [rows of all sequences], with checkpoint_cu_starts:
                                             row r is written to checkpoints[checkpoint_indices[r]]; -1: not at
                                             all */
    const DLTensor *checkpoint_offsets; /* int32 or int64 [N] or [N, C]: tokens of its sequence after which the
                                             state is kept, 0 to its length; -1: none. checkpoints is
                                             [N, HV, V, K] or [N, C, HV, V, K] */

    /* -- How to compute -- */
    flash_kda_backend backend;
    int32_t num_threads; /* CPU backend: 1 to 1024; 0: flash_kda_cpu_threads() */
    void *stream;        /* CUDA backend: a cudaStream_t of q's device; NULL is the default stream */

    /* -- How an engine marks its sequences -- */
    const DLTensor *has_initial_state; /* bool, int8 or int32 [N], with initial_state. A sequence with 0 starts
                                          from zero, and its slot of initial_state is not read, whatever it
                                          holds. NULL: all have a state */
    int64_t padding_slot; /* with FLASH_KDA_PADDING_SLOT and state_indices, else 0: what is padding there as -1
                             is. It may stand there more than once */

    /* -- Before and after, all that a KDA layer does between its projections: as for decode, but a convolution's
     * states may be left out. The states before a sequence are read where it starts from an initial state, and else
     * count as 0; those after it are written in any case. They lie in slots as initial_state and final_state do, which
     * have as many. On CUDA q, k and v are rounded to their dtypes between the two steps, and out to its own, fp16
     * excepted. Rows of out of no sequence are left as they are -- */
    const DLTensor *q_conv_weight; /* float [H K, 4] */
    const DLTensor *q_conv_bias;   /* float [H K]; NULL: 0 */
    const DLTensor *q_conv_state;  /* float [slots, H K, 3], any strides, read and written; NULL: 0, not kept */
    const DLTensor *k_conv_weight, *k_conv_bias, *k_conv_state; /* likewise */
    const DLTensor *v_conv_weight, *v_conv_bias, *v_conv_state; /* likewise, HV V channels */
    const DLTensor *norm_weight;                                /* float [V], V <= 1024 */
    const DLTensor *norm_gate;                 /* float [B, T, HV, V], with norm_weight; NULL: no gate */
    flash_kda_norm_activation norm_activation; /* of norm_gate */
    double norm_eps;                           /* above 0 with norm_weight */
    /* -- Sequences that begin or go on in other calls: BEGIN, then FINISH with the same arguments. Between the two nothing
     * may touch the workspace, out, final_state or checkpoints. A row is a sequence of this call, 0 to N - 1. BEGIN runs
     * all rows that do not come in. FINISH runs those that do, whose initial_state is never read, whatever
     * has_initial_state says, and whose rows of out, final_state and checkpoints mean nothing until then. A row's
     * final_state is its state after its last token here. Convolutions and norm are left to the caller: their weights
     * must be NULL -- */
    flash_kda_phase phase;
    const DLTensor
        *incoming_rows; /* int32 [C]: rows whose state before their first token comes from elsewhere, no row
                                      twice; -1: none */
    const DLTensor
        *outgoing_rows; /* int32 [S]: rows that go on elsewhere, no row twice; -1: none, its summary is 0 */
    const DLTensor *summaries; /* fp32 [S, HV, V + K, K], with outgoing_rows, written by BEGIN: B [V, K], then M
                                      [K, K]. A state X [V, K] before the row is X M + B after it. For a row that does
                                      not come in, B is its final state and M is 0. With FLASH_KDA_STATE_K_FIRST
                                      [S, HV, K, V + K] */
    const DLTensor *incoming;  /* fp32 [C, HV, V, K], with incoming_rows, read by FINISH */
} flash_kda_prefill_args;

#ifdef __cplusplus
static inline flash_kda_prefill_args flash_kda_prefill_args_init() {
    flash_kda_prefill_args args = flash_kda_prefill_args();
    args.struct_size = sizeof args;
    return args;
}
#define FLASH_KDA_PREFILL_ARGS_INIT flash_kda_prefill_args_init()
#else
#define FLASH_KDA_PREFILL_ARGS_INIT \
    { .struct_size = sizeof(flash_kda_prefill_args) }
#endif

/* Writes to *bytes how much scratch memory, on the device of q, flash_kda_prefill() needs for these arguments.
 * The size depends on shapes, dtypes, num_threads and, for packed sequences, on N. It does not depend on the
 * data. On the CPU it does not grow with T. On CUDA it is 0, or at most 0.8 times what q, k, v, g and out take
 * in bf16. Errors: as flash_kda_prefill(), except that an index used twice passes here. To find it takes
 * scratch memory, which only flash_kda_prefill() has. */
FLASH_KDA_API flash_kda_status flash_kda_prefill_workspace_size(const flash_kda_prefill_args *args,
                                                                size_t *bytes);

/* Runs KDA over whole sequences: writes out and, where asked for, final_state and checkpoints.
 *
 * workspace: at least flash_kda_prefill_workspace_size() bytes, at any alignment. The caller owns it, and no
 * other call may use it meanwhile. It may be NULL if that size is 0. What it holds before and after means
 * nothing.
 *
 * The same arguments on the same machine give the same bits in every run. Between BEGIN and FINISH what the workspace
 * holds does mean something: no other call may use it.
 *
 * Errors: FLASH_KDA_ERROR_INVALID_ARGUMENT, FLASH_KDA_ERROR_UNSUPPORTED and
 * FLASH_KDA_ERROR_WORKSPACE_TOO_SMALL. Everything is checked before anything is written. On CUDA there is also
 * FLASH_KDA_ERROR_CUDA, whose sentence has CUDA's own name for the error. CUDA may report there an error of an
 * earlier call. */
FLASH_KDA_API flash_kda_status flash_kda_prefill(const flash_kda_prefill_args *args, void *workspace,
                                                 size_t workspace_bytes);

/* Describes in one line how flash_kda_prefill() would run these arguments: backend, level, arithmetic, threads,
 * and how they share the value heads of all sequences. Writes at most size bytes to text, always ended by 0.
 * Errors: as flash_kda_prefill(). */
FLASH_KDA_API flash_kda_status flash_kda_prefill_describe(const flash_kda_prefill_args *args, char *text,
                                                          size_t size);

/* ---- Decode ------------------------------------------------------------------------------------ */

/* Tokens of a sequence in one call of decode, at most. */
#define FLASH_KDA_MAX_DECODE_TOKENS 16

/*
 * Arguments of decode: 0 to 16 tokens of every sequence. The states lie in a pool and are updated in place. The
 * pool may be the one that prefill reads and writes as initial_state and final_state. dtypes, strides, devices
 * and the rules for CUDA are those of prefill; arithmetic is fp32 everywhere.
 *
 * Three ways to call it:
 *
 *  Decode: state_indices [N]. A sequence's state is read from its slot and written back after its last token.
 *
 *  Verify, for speculative decoding with a slot for each of C tokens: state_indices [N, C] and
 *  num_accepted_tokens [N]. The state is read from slot state_indices[n, num_accepted_tokens[n] - 1], where the
 *  call before left it after the token that was accepted last. After token t it is written to slot
 *  state_indices[n, t]. When drafts are rejected nothing has to be copied or undone.
 *
 *  Verify and commit, with one slot a sequence: a call with FLASH_KDA_KEEP_STATE writes out alone. Once it is
 *  known how many tokens are accepted, the caller repeats the call without that flag, with `accepted` and with
 *  out NULL. That call takes the states through the accepted tokens.
 *
 * A call can also be fused: convolutions, recurrence and gated norm, all that a KDA layer does between its
 * projections.
 *
 * Memory: out, state and the states of the convolutions may overlap neither each other nor another argument.
 * They may interleave: as parts of one page for each slot, or as ranges of the channels of one tensor.
 */
typedef struct flash_kda_decode_args {
    size_t struct_size; /* sizeof(flash_kda_decode_args), set by FLASH_KDA_DECODE_ARGS_INIT; as for prefill */

    /* -- Inputs and output -- */
    const DLTensor *q;       /* required, float [B, T, H, K], 1 <= K <= 256; packed, or T <= 16 */
    const DLTensor *k;       /* required, float [B, T, H, K] */
    const DLTensor *v;       /* required, float [B, T, HV, V], V >= 1 */
    const DLTensor *g;       /* required, float [B, T, HV, K]: raw gate, or the log decay in nats a token */
    const DLTensor *beta;    /* required, float [B, T, HV] */
    const DLTensor *A_log;   /* float [HV]; NULL: exp(A_log) is 1. Not with FLASH_KDA_GATE_NONE */
    const DLTensor *dt_bias; /* float [HV, K]; NULL: 0. Not with FLASH_KDA_GATE_NONE */
    const DLTensor *out;     /* float [B, T, HV, V], written; NULL: only the state goes on */

    /* -- What to compute -- */
    flash_kda_gate gate;
    double lower_bound; /* sigmoid gate only: in [-5, 0), nats a token */
    flash_kda_beta beta_mode;
    double scale;   /* 0: 1 / sqrt(K); within the range of fp32 */
    uint32_t flags; /* flash_kda_flags. A sequence's bits never depend on its batch here */

    /* -- Packed sequences: B = 1 and any T, sequence n is tokens cu_seqlens[n] .. cu_seqlens[n + 1] - 1 -- */
    const DLTensor *cu_seqlens; /* int32 or int64 [N + 1], from 0 to T, never falling; NULL: N = B dense
                                   sequences of T tokens. A sequence without tokens is left alone */
    int64_t max_tokens; /* with cu_seqlens: the most tokens that any sequence has, 1 to 16; 0: 16. On CUDA the
                           host does not see lengths: a smaller number is faster, and tokens after
                           so many are left out */
    const DLTensor *accepted; /* int32 or int64 [N]: only so many tokens of each sequence are processed, 0 to
                                 its length; rows of out after them are not written. NULL: all */

    /* -- States -- */
    flash_kda_state_layout state_layout;
    const DLTensor *state;         /* required, fp32, fp16 or bf16 [N, HV, V, K] or, with state_indices,
                                      [slots, HV, V, K], read and written */
    const DLTensor *state_indices; /* int32 or int64 [N]: the slot of each sequence; or [N, C]: see Verify, no
                                      sequence has more than C tokens. No slot twice, except with
                                      FLASH_KDA_KEEP_STATE. A -1 where the state would be read makes the
                                      sequence padding: it is ignored, and neither its states nor its rows of
                                      out are written. A -1 in another column: the state after that token is
                                      not written */
    const DLTensor *num_accepted_tokens; /* int32 or int64 [N], with state_indices [N, C]: the column of the
                                            slot that the state is read from, counted from 1; NULL: 1 */

    /* -- Before: a short causal convolution and SiLU, for each of q, k and v that has a weight. q and k have
     * H K channels, v has HV V. With x for the argument, token t of channel c becomes
     *     silu(bias[c] + weight[c, 0] x[t - 3, c] + .. + weight[c, 3] x[t, c]),
     * where the three x before the first token are the state's. The states lie in slots as `state` does, and
     * are read, written or kept where it is. q and k are normalised after it -- */
    const DLTensor *q_conv_weight; /* float [H K, 4] */
    const DLTensor *q_conv_bias;   /* float [H K]; NULL: 0 */
    const DLTensor *q_conv_state;  /* with a weight: float [slots, H K, 3], any strides, read and written */
    const DLTensor *k_conv_weight, *k_conv_bias, *k_conv_state; /* likewise */
    const DLTensor *v_conv_weight, *v_conv_bias, *v_conv_state; /* likewise, HV V channels */

    /* -- After: with norm_weight a row o of out becomes o / sqrt(mean(o^2) + norm_eps) * norm_weight, times the
     * activation of norm_gate if that is given -- */
    const DLTensor *norm_weight;               /* float [V], V <= 1024 */
    const DLTensor *norm_gate;                 /* float [B, T, HV, V], with norm_weight; NULL: no gate */
    flash_kda_norm_activation norm_activation; /* of norm_gate */
    double norm_eps;                           /* above 0 with norm_weight */

    /* -- How to compute -- */
    flash_kda_backend backend;
    int32_t num_threads; /* CPU backend: 1 to 1024; 0: flash_kda_cpu_threads() */
    void *stream;        /* CUDA backend: a cudaStream_t of q's device; NULL is the default stream */

    /* -- How an engine marks its sequences, as for prefill -- */
    const DLTensor *has_initial_state; /* bool, int8 or int32 [N]. A sequence with 0 starts from zero, and its
                                          slot of state and of the convolutions' states is not read, whatever
                                          it holds. NULL: all have a state */
    int64_t padding_slot; /* with FLASH_KDA_PADDING_SLOT and state_indices, else 0: what is as -1 there, in
                             every column. It may stand there more than once */
} flash_kda_decode_args;

#ifdef __cplusplus
static inline flash_kda_decode_args flash_kda_decode_args_init() {
    flash_kda_decode_args args = flash_kda_decode_args();
    args.struct_size = sizeof args;
    return args;
}
#define FLASH_KDA_DECODE_ARGS_INIT flash_kda_decode_args_init()
#else
#define FLASH_KDA_DECODE_ARGS_INIT \
    { .struct_size = sizeof(flash_kda_decode_args) }
#endif

/* Takes every sequence's state through its tokens: writes out, where given, and the states. Needs no workspace.
 *
 * The same arguments on the same machine give the same bits in every run.
 *
 * Errors: FLASH_KDA_ERROR_INVALID_ARGUMENT and FLASH_KDA_ERROR_UNSUPPORTED, in host memory also
 * FLASH_KDA_ERROR_OUT_OF_MEMORY. Everything is checked before anything is written. On CUDA there is also
 * FLASH_KDA_ERROR_CUDA, as for flash_kda_prefill(). */
FLASH_KDA_API flash_kda_status flash_kda_decode(const flash_kda_decode_args *args);

/* Describes in one line how flash_kda_decode() would run these arguments. Writes at most size bytes to text,
 * always ended by 0. Errors: as flash_kda_decode(). */
FLASH_KDA_API flash_kda_status flash_kda_decode_describe(const flash_kda_decode_args *args, char *text,
                                                         size_t size);

/* ---- Backward ---------------------------------------------------------------------------------- */

/*
 * Arguments of the backward pass: from the gradients of a prefill's results it makes those of its inputs. All are
 * derivatives of one number, the loss: dX is that of the loss by X.
 *
 * Inputs and options are those of the prefill, whose out is not needed. Every gradient that is written may be NULL: it
 * is not computed and costs nothing. One that is given is overwritten, not added to. dtypes, strides, devices and what
 * holds on CUDA are as for prefill; each gradient may have a dtype of its own.
 *
 * Sequences without tokens: their d_initial_state is their d_final_state.
 *
 * Memory: no written gradient may overlap another argument or the workspace, with one exception: d_initial_state may
 * be d_final_state itself (same address, dtype and strides: in place).
 */
typedef struct flash_kda_backward_args {
    size_t struct_size; /* sizeof(flash_kda_backward_args), set by FLASH_KDA_BACKWARD_ARGS_INIT; as for
                           prefill */

    /* -- The prefill -- */
    const DLTensor *q;       /* required, float [B, T, H, K], 1 <= K <= 256 */
    const DLTensor *k;       /* required, float [B, T, H, K] */
    const DLTensor *v;       /* required, float [B, T, HV, V], V >= 1 */
    const DLTensor *g;       /* required, float [B, T, HV, K]: raw gate, or the log decay in nats a token */
    const DLTensor *beta;    /* required, float [B, T, HV] */
    const DLTensor *A_log;   /* float [HV]; NULL: exp(A_log) is 1. Not with FLASH_KDA_GATE_NONE */
    const DLTensor *dt_bias; /* float [HV, K]; NULL: 0. Not with FLASH_KDA_GATE_NONE */
    flash_kda_gate gate;
    double lower_bound; /* sigmoid gate only: in [-5, 0), nats a token */
    flash_kda_beta beta_mode;
    double scale;   /* 0: 1 / sqrt(K); within the range of fp32 */
    uint32_t flags; /* FLASH_KDA_QK_NORM and FLASH_KDA_BATCH_INVARIANT, which does not hold for dA_log and
                       d_dt_bias: they are sums over the batch */
    const DLTensor *cu_seqlens;          /* int32 or int64 [N + 1], from 0 to T, never falling; NULL: N = B
                                            dense sequences of T tokens */
    flash_kda_state_layout state_layout; /* of every state */
    const DLTensor *initial_state;       /* fp32 or bf16 [N, HV, V, K]; NULL: 0 */

    /* -- States that prefill kept; NULL: they are found again, in the workspace -- */
    const DLTensor *checkpoints;          /* fp32 or bf16, as prefill wrote them with checkpoint_every. The last
                                             row of a sequence, its final state, is not read and may be left out */
    int64_t checkpoint_every;             /* with checkpoints: a multiple of 32, else 0; 128 is best on CUDA */
    const DLTensor *checkpoint_cu_starts; /* int32 or int64 [N + 1], with checkpoints and cu_seqlens */

    /* -- Gradients of its results: at least one of them -- */
    const DLTensor *d_out;         /* float [B, T, HV, V]; NULL: 0 */
    const DLTensor *d_final_state; /* fp32 or bf16 [N, HV, V, K]; NULL: 0 */

    /* -- Gradients of its inputs, written -- */
    const DLTensor *dq;              /* float [B, T, H, K]: sums over the value heads of a q/k head */
    const DLTensor *dk;              /* float [B, T, H, K]; likewise */
    const DLTensor *dv;              /* float [B, T, HV, V] */
    const DLTensor *dg;              /* float [B, T, HV, K] */
    const DLTensor *dbeta;           /* float [B, T, HV] */
    const DLTensor *dA_log;          /* float [HV], with A_log: sums over all tokens of all sequences */
    const DLTensor *d_dt_bias;       /* float [HV, K], with dt_bias; likewise, of dg before it is rounded */
    const DLTensor *d_initial_state; /* fp32 or bf16 [N, HV, V, K]; also where initial_state is NULL */

    /* -- How to compute -- */
    flash_kda_backend backend;
    int32_t num_threads; /* CPU backend: 1 to 1024; 0: flash_kda_cpu_threads() */
    void *stream;        /* CUDA backend: a cudaStream_t of q's device; NULL is the default stream */

    /* -- Sequences that begin or go on in other calls, as for prefill, whose roles are exchanged: BEGIN runs all rows
     * that do not go on, FINISH those that do, whose d_final_state is never read. initial_state of a row that comes in
     * is the `incoming` of its prefill. Sums over tokens are written by FINISH, for both halves -- */
    flash_kda_phase phase;
    const DLTensor *incoming_rows; /* int32 [C] */
    const DLTensor *outgoing_rows; /* int32 [S] */
    const DLTensor
        *summaries; /* fp32 [C, HV, V, K], with incoming_rows, written by BEGIN. A gradient R [V, K] of
                                      the state after the row is R M^T + summary before it, with the row's M of
                                      prefill. For a row that does not go on it is its d_initial_state; of -1 it is 0 */
    const DLTensor *incoming; /* fp32 [S, HV, V, K], with outgoing_rows, read by FINISH: R after each row */
} flash_kda_backward_args;

#ifdef __cplusplus
static inline flash_kda_backward_args flash_kda_backward_args_init() {
    flash_kda_backward_args args = flash_kda_backward_args();
    args.struct_size = sizeof args;
    return args;
}
#define FLASH_KDA_BACKWARD_ARGS_INIT flash_kda_backward_args_init()
#else
#define FLASH_KDA_BACKWARD_ARGS_INIT \
    { .struct_size = sizeof(flash_kda_backward_args) }
#endif

/* Writes to *bytes how much scratch memory, on the device of q, flash_kda_backward() needs for these arguments. The
 * size depends on shapes, dtypes, num_threads, which tensors are given and, for packed sequences, on N. It does not
 * depend on the data. On the CPU each thread needs room for a state every 128 tokens of T, but for none where prefill
 * kept them every 32, 64 or 128. On CUDA the portable kernels need such room for all heads, in bf16, but none where
 * prefill kept states at most 512 tokens apart; the rest does not grow with T. Hopper's own kernels (docs/hopper.md)
 * need 2.0 KB for each token of a value head, or 3.0 KB where HV is above H. Errors: as flash_kda_backward(). */
FLASH_KDA_API flash_kda_status flash_kda_backward_workspace_size(const flash_kda_backward_args *args,
                                                                 size_t *bytes);

/* Writes the gradients that are asked for.
 *
 * workspace: at least flash_kda_backward_workspace_size() bytes, at any alignment, as for flash_kda_prefill().
 *
 * The same arguments on the same machine give the same bits in every run.
 *
 * Errors: FLASH_KDA_ERROR_INVALID_ARGUMENT, FLASH_KDA_ERROR_UNSUPPORTED and
 * FLASH_KDA_ERROR_WORKSPACE_TOO_SMALL. Everything is checked before anything is written. */
FLASH_KDA_API flash_kda_status flash_kda_backward(const flash_kda_backward_args *args, void *workspace,
                                                  size_t workspace_bytes);

/* Describes in one line how flash_kda_backward() would run these arguments. Writes at most size bytes to text, always
 * ended by 0. Errors: as flash_kda_backward(). */
FLASH_KDA_API flash_kda_status flash_kda_backward_describe(const flash_kda_backward_args *args, char *text,
                                                           size_t size);

/* ---- Fold -------------------------------------------------------------------------------------- */

typedef enum flash_kda_fold_flags {
    FLASH_KDA_FOLD_ADJOINT = 1 << 0, /* X <- X M_j^T + B_j, for gradients of states */
} flash_kda_fold_flags;

/*
 * Arguments of fold, which takes states through summaries: X <- X M_j + B_j for one j after the other. Together with the
 * two halves of prefill and backward it shares a sequence among ranks: each rank's BEGIN leaves summaries, the caller
 * brings them where they are needed, fold makes the state before each rank's tokens of them, and FINISH reads it.
 *
 * Arithmetic is fp32. A state's bits depend on its chain, on initial_state and on the values of the summaries alone: not
 * on the other rows and heads of the call, nor on num_threads. So ranks that fold the same chain find the same bits.
 *
 * Memory: states and prefixes may overlap neither each other nor an input, but states may be initial_state itself (same
 * address, dtype and strides). Devices, index tensors and what holds on CUDA are as for prefill.
 */
typedef struct flash_kda_fold_args {
    size_t struct_size; /* sizeof(flash_kda_fold_args), set by FLASH_KDA_FOLD_ARGS_INIT; as for prefill */

    const DLTensor *bias; /* required, fp32 [J, HV, V, K], any strides: B of each summary, 1 <= K <= 256 */
    const DLTensor *transitions; /* required, fp32 [J, HV, K, K], any strides: M of each */
    const DLTensor
        *chains; /* required, int32 [R, L]: the summaries that each row goes through, in order; -1: skip */
    const DLTensor
        *initial_state; /* fp32 or bf16 [R, HV, V, K] or, with state_indices, [slots, HV, V, K]; NULL: 0 */
    const DLTensor
        *state_indices;     /* int32 [R]: the slot of each row in initial_state and states, no slot twice; -1:
                                      padding, the row is neither read nor written */
    const DLTensor *states; /* fp32 or bf16, shape of initial_state, written: after each row's chain. NULL: not,
                                      then prefixes is required */
    const DLTensor *prefixes; /* fp32 [R, L, HV, V, K], written: the state before each link of each chain */
    uint32_t flags;           /* flash_kda_fold_flags */
    flash_kda_state_layout
        state_layout;          /* of states and summaries: with FLASH_KDA_STATE_K_FIRST every [V, K] above is
                                            [K, V], and M is transposed, as prefill writes it */
    flash_kda_backend backend; /* AUTO: by the device of bias */
    int32_t num_threads;       /* CPU backend: 1 to 1024; 0: flash_kda_cpu_threads() */
    void *stream;              /* CUDA backend: a cudaStream_t of bias's device; NULL is the default stream */
} flash_kda_fold_args;

#ifdef __cplusplus
static inline flash_kda_fold_args flash_kda_fold_args_init() {
    flash_kda_fold_args args = flash_kda_fold_args();
    args.struct_size = sizeof args;
    return args;
}
#define FLASH_KDA_FOLD_ARGS_INIT flash_kda_fold_args_init()
#else
#define FLASH_KDA_FOLD_ARGS_INIT \
    { .struct_size = sizeof(flash_kda_fold_args) }
#endif

/* Takes the state of every row through its chain. Needs no workspace.
 *
 * Errors: FLASH_KDA_ERROR_INVALID_ARGUMENT and FLASH_KDA_ERROR_UNSUPPORTED, in host memory also
 * FLASH_KDA_ERROR_OUT_OF_MEMORY. Everything is checked before anything is written. On CUDA there is also
 * FLASH_KDA_ERROR_CUDA, as for flash_kda_prefill(). */
FLASH_KDA_API flash_kda_status flash_kda_fold(const flash_kda_fold_args *args);

/* Describes in one line how flash_kda_fold() would run these arguments. Writes at most size bytes to text, always ended
 * by 0. Errors: as flash_kda_fold(). */
FLASH_KDA_API flash_kda_status flash_kda_fold_describe(const flash_kda_fold_args *args, char *text,
                                                       size_t size);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_KDA_H */
