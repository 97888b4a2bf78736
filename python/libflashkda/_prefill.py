# SPDX-License-Identifier: MIT
"""The library's own interface: every member of flash_kda_prefill_args."""

from __future__ import annotations

import inspect
from typing import Any

from . import _C
from ._libraries import Library, library_of
from ._shapes import shape_of, state_shape

Array = Any  #: a torch.Tensor, numpy.ndarray, cupy.ndarray or jax.Array
Convolution = tuple[Array, Array | None, Array | None]  #: weight, bias, states

# The C interface reads a scale of 0 as the default. This one is 0 in fp32, where the arithmetic is.
_SCALE_ZERO = 1e-60


def number_or(value: float, instead: float, name: str) -> float:
    """The value, or what stands for 0."""
    try:
        return value or instead
    except (ValueError, RuntimeError):  # an array of several numbers is neither true nor false
        raise TypeError(f"{name} is of type {type(value)}; expected a number") from None


def scale_value(scale: float | None) -> float:
    return 0.0 if scale is None else number_or(scale, _SCALE_ZERO, "scale")


def _value(table: dict[str, int], word: str, name: str) -> int:
    try:
        return table[word]
    except (KeyError, TypeError):
        raise ValueError(f"{name} is {word!r}; expected {' or '.join(map(repr, table))}") from None


def shared_options(gate: str, lower_bound: float | None, beta_mode: str, flags: int, scale: float | None,
                   state_layout: str, backend: str, num_threads: int) -> dict[str, Any]:
    """Those that prefill and decode both have."""
    try:
        options = {
            "gate": _GATES[gate],
            "lower_bound": 0.0 if lower_bound is None else lower_bound,
            "beta_mode": _BETA_MODES[beta_mode],
            "scale": scale_value(scale),
            "flags": flags,
            "state_layout": _STATE_LAYOUTS[state_layout],
            "backend": _BACKENDS[backend],
            "num_threads": num_threads,
        }
    except (KeyError, TypeError):
        for table, word, name in ((_GATES, gate, "gate"), (_BETA_MODES, beta_mode, "beta_mode"),
                                  (_STATE_LAYOUTS, state_layout, "state_layout"), (_BACKENDS, backend, "backend")):
            _value(table, word, name)
        raise
    if lower_bound is None and gate == "sigmoid":
        raise ValueError("lower_bound is None with gate 'sigmoid'; expected a number in [-5, 0)")
    return options


def _options(gate: str, lower_bound: float | None, beta_mode: str, qk_norm: bool, scale: float | None, state_layout: str,
             backend: str, num_threads: int, batch_invariant: bool, checkpoint_every: int) -> dict[str, Any]:
    flags = (_C.QK_NORM if qk_norm else 0) | (_C.BATCH_INVARIANT if batch_invariant else 0)
    options = shared_options(gate, lower_bound, beta_mode, flags, scale, state_layout, backend, num_threads)
    options["checkpoint_every"] = checkpoint_every
    return options


def mark_padding(options: dict[str, Any], padding_slot: int | None) -> None:
    if padding_slot is not None:
        options["flags"] |= _C.PADDING_SLOT
        options["padding_slot"] = padding_slot


def convolution_tensors(q_conv: Convolution | None, k_conv: Convolution | None, v_conv: Convolution | None,
                        ) -> dict[str, Array | None]:
    """Those that are given, by the names of their arguments."""
    tensors = {}
    for name, given in (("q_conv", q_conv), ("k_conv", k_conv), ("v_conv", v_conv)):
        if given is None:
            continue
        if not isinstance(given, (tuple, list)) or len(given) != 3:
            raise TypeError(f"{name} is of type {type(given)}; expected weight, bias or None, and states")
        tensors[f"{name}_weight"], tensors[f"{name}_bias"], tensors[f"{name}_state"] = given
    return tensors


def norm_options(norm_activation: str, norm_eps: float) -> dict[str, Any]:
    return {"norm_activation": _value(_C.NORM_ACTIVATIONS, norm_activation, "norm_activation"), "norm_eps": norm_eps}


_GATES, _BETA_MODES, _STATE_LAYOUTS, _BACKENDS = _C.GATES, _C.BETA_MODES, _C.STATE_LAYOUTS, _C.BACKENDS


def refuse_written(**destinations: Array | None) -> None:
    """Refuses arrays to write to, for a library that is not writable."""
    for name, array in destinations.items():
        if array is not None:
            raise ValueError(f"{name} is given with jax arrays, which cannot be written; expected None")


def new_out(library: Library, q: Array, v: Array) -> Array:
    try:
        return library.empty(q, shape_of(v, "v"), v.dtype)
    except (AttributeError, TypeError):
        library.check(v, "v")
        raise


def _outputs(library: Library, q: Array, v: Array, cu_seqlens: Array | None, state_layout: int,
             initial_state: Array | None, final_state: Array | None, output_final_state: bool,
             out: Array | None) -> tuple[Array, Array | None]:
    """out and final_state: those that are given, or new ones."""
    if out is None:
        out = new_out(library, q, v)
    if output_final_state and final_state is None:
        if initial_state is not None:
            library.check(initial_state, "initial_state")
        dtype = library.float32 if initial_state is None else initial_state.dtype
        final_state = library.empty(q, state_shape(q, v, cu_seqlens, state_layout), dtype)
    return out, final_state


def prefill(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    *,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    gate: str = "none",
    lower_bound: float | None = None,
    beta_mode: str = "given",
    qk_norm: bool = False,
    scale: float | None = None,
    cu_seqlens: Array | None = None,
    state_layout: str = "v_first",
    initial_state: Array | None = None,
    final_state: Array | None = None,
    output_final_state: bool = False,
    state_indices: Array | None = None,
    has_initial_state: Array | None = None,
    padding_slot: int | None = None,
    checkpoints: Array | None = None,
    checkpoint_every: int = 0,
    checkpoint_cu_starts: Array | None = None,
    checkpoint_indices: Array | None = None,
    checkpoint_offsets: Array | None = None,
    q_conv: Convolution | None = None,
    k_conv: Convolution | None = None,
    v_conv: Convolution | None = None,
    norm_weight: Array | None = None,
    norm_gate: Array | None = None,
    norm_activation: str = "sigmoid",
    norm_eps: float = 1e-5,
    out: Array | None = None,
    batch_invariant: bool = False,
    backend: str = "auto",
    num_threads: int = 0,
    workspace: Array | None = None,
    parallel: Any = None,
    exchange: str = "auto",
    final: str = "local",
) -> Array | tuple[Array, Array]:
    """Runs Kimi Delta Attention over whole sequences.

    Token by token, for each value head, with a state S [K, V] (Kimi Linear, arXiv:2510.26692, section 3)::

        S <- diag(exp(a_t)) S                   decay; a_t <= 0 is the log decay of each channel
        S <- S + beta_t k_t (v_t - S^T k_t)^T   delta rule; beta_t is the step
        o_t = scale * S^T q_t                   read-out

    Letters: B batch, T tokens, N sequences, H query/key heads, HV value heads (a multiple of H; value head h reads
    query/key head h // (HV // H)), K and V head dims. "float" is fp32, fp16 or bf16, for each array by itself;
    "state" is fp32 or bf16. All arrays are of one library (torch, numpy, cupy or jax) and on one device.

    Strides are free and not negative, but the last dimension must be contiguous, save for beta and A_log.

    Args:
        q, k: float [B, T, H, K], 1 <= K <= 256.
        v: float [B, T, HV, V].
        g: float [B, T, HV, K]: the raw gate, or with gate "none" the log decay itself, in nats a token.
        beta: float [B, T, HV].
        A_log: float [HV]; None: exp(A_log) is 1. Not with gate "none".
        dt_bias: float [HV, K]; None: 0. Not with gate "none".
        gate: how the log decay comes from g: "none": g; "softplus": -exp(A_log) softplus(g + dt_bias);
            "sigmoid": lower_bound sigmoid(exp(A_log) (g + dt_bias)). With "none" a g above 0 is not clamped: the
            channel grows by exp(g), within what fp32 holds (include/flash_kda.h, flash_kda_gate).
        lower_bound: needed with gate "sigmoid", in [-5, 0), nats a token.
        beta_mode: how the step comes from beta: "given", "sigmoid" or "twice_sigmoid", which allows negative
            eigenvalues.
        qk_norm: divide q and k by sqrt(sum of squares + 1e-6), per token and head.
        scale: None: 1 / sqrt(K).
        cu_seqlens: int32 or int64 [N + 1], from 0 to T, never falling: B is 1, and sequence n is tokens
            cu_seqlens[n] to cu_seqlens[n + 1] - 1. None: N = B sequences of T tokens.
        state_layout: order of the last two dimensions of every state: "v_first", [.., V, K], or "k_first", [.., K, V].
        initial_state: state [N, HV, V, K], or with state_indices [slots, HV, V, K]; None: 0.
        final_state: of the same shape, written; may be initial_state itself.
        output_final_state: return the final states. Where final_state is None they are new: of initial_state's
            dtype, or fp32.
        state_indices: int32 or int64 [N]: the slot of each sequence in initial_state and final_state, no slot twice.
            -1: padding, nothing of that sequence is read or written, its rows of out included.
        has_initial_state: bool, int8 or int32 [N], with initial_state: a sequence with 0 starts from zero, and its slot of
            initial_state is not read, whatever it holds. None: all have a state.
        padding_slot: with state_indices: a slot that is padding as -1 is, and may stand there more than once. None: none.
        checkpoints: state, written: states inside of sequences, with either of the next two.
        checkpoint_every: n > 0: row j of a sequence is its state after min((j + 1) n, length) tokens. checkpoints is
            [B, rows, HV, V, K], or with cu_seqlens [rows of all sequences, HV, V, K].
        checkpoint_offsets: int32 or int64 [N] or [N, C]: tokens after which the state is kept, 0 to the sequence's
            length; -1: none. checkpoints is [N, HV, V, K] or [N, C, HV, V, K].
        checkpoint_cu_starts: int32 or int64 [N + 1], with cu_seqlens and checkpoint_every: sequence n has the rows
            checkpoint_cu_starts[n] to checkpoint_cu_starts[n + 1] - 1.
        checkpoint_indices: int32 or int64 [rows], with checkpoint_cu_starts: row r is written to
            checkpoints[checkpoint_indices[r]]; -1: not at all.
        q_conv, k_conv, v_conv: weight, bias or None, and states or None of a short causal convolution with SiLU that q, k or
            v goes through first: float [channels, 4], [channels] and [slots, channels, 3], channels being H K or HV V. The
            states are the last inputs, the oldest first, in any strides, in slots as initial_state. They are read where a
            sequence has an initial state, and else count as 0, as None does; they are written in any case.
        norm_weight: float [V], V <= 1024: RMS norm of every row of out, with norm_eps.
        norm_gate: float [B, T, HV, V], with norm_weight: times "sigmoid" or "silu", norm_activation, of this.
        out: float [B, T, HV, V], written; None: a new array of v's dtype. Rows of no sequence keep what they hold. An fp32 out keeps the arithmetic in fp32 on
            CPUs that would otherwise multiply in bf16.
        batch_invariant: a sequence's bits do not depend on what it is batched with, nor on num_threads.
        backend: "auto", by the device of q; "reference", the fp64 oracle; "cpu"; "cuda".
        num_threads: of the CPU backend; 0: as many as may be used, docs/threads.md.
        workspace: contiguous array on q's device of at least prefill_workspace_size() bytes, contents undefined; None:
            memory from the library that q is from (on torch its caching allocator).
        parallel: a ContextParallel: the tokens are this rank's part of sequences that lie on several ranks of a
            torch.distributed group, every rank of which makes this call (docs/parallel.md). Of the arguments above,
            initial_state has a row for each of parallel.sequences, not read where the sequence comes from another
            rank. cu_seqlens is parallel's; what names places to write to, slots or checkpoints is not taken.
        exchange: with parallel: how summaries travel: "allgather"; "transposed", twice as few bytes and less from 8 ranks
            on; "chain", the fewest, in turn; "exact": each rank runs after the one before it, with the bits of one process
            if ranges begin at multiples of 32 tokens; "auto": what is fastest for so many ranks.
        final: with parallel: final states of this rank's rows, "local", where those that go on elsewhere are the states at
            the border; or of all sequences, on every rank, "everywhere".

    Returns:
        out; or (out, final_state) if output_final_state is true or final_state is given.

    Raises:
        ValueError: a shape, dtype, device, stride, range or overlap is wrong; the sentence names the argument.
        TypeError: an argument is no array of q's library, or no number.
        NotImplementedError: a tensor requires grad and arrays to write to are given, or there is no backward pass on its
            device; a tensor has a tangent; this build or machine does not have the backend.
        MemoryError: the workspace could not be allocated.
        RuntimeError: the CUDA runtime reports an error.
        Nothing has been written then, save after a RuntimeError.

    With torch the results are differentiable with respect to all inputs that are float, where they are new tensors
    (docs/training.md).

    On CUDA the call is enqueued on the library's current stream (with jax it also waits) and reads no device memory on
    the host: it can be captured in a graph and replayed with other contents of every array, cu_seqlens included. Index
    values in device memory are not checked but kept within bounds.

    Source: include/flash_kda.h, flash_kda_prefill_args.
    """
    library = library_of(q)
    options = _options(gate, lower_bound, beta_mode, qk_norm, scale, state_layout, backend, num_threads,
                       batch_invariant, checkpoint_every)
    if parallel is not None:
        for name, given in (("cu_seqlens", cu_seqlens), ("final_state", final_state), ("state_indices", state_indices),
                            ("checkpoints", checkpoints), ("out", out), ("workspace", workspace),
                            ("has_initial_state", has_initial_state), ("q_conv", q_conv),
                            ("k_conv", k_conv), ("v_conv", v_conv), ("norm_gate", norm_gate),
                            ("norm_weight", norm_weight), ("padding_slot", padding_slot)):
            if given is not None:
                raise ValueError(f"{name} is given with parallel; expected None")
        del options["checkpoint_every"]
        return parallel.prefill({"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias,
                                 "initial_state": initial_state}, output_final_state, options, exchange, final)
    mark_padding(options, padding_slot)
    if output_final_state and final_state is None and state_indices is not None:
        raise ValueError("final_state is None with state_indices; expected the states that the indices refer to")
    traced = library.traced(q)
    around = convolution_tensors(q_conv, k_conv, v_conv)
    if norm_weight is not None or norm_gate is not None:
        around.update(norm_weight=norm_weight, norm_gate=norm_gate)
        options.update(norm_options(norm_activation, norm_eps))
    if not around and out is None and final_state is None and checkpoints is None and workspace is None and (
            traced or library.differentiated(q, k, v, g, beta, A_log, dt_bias, initial_state)):
        return library.record_prefill(
            {"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias, "cu_seqlens": cu_seqlens,
             "initial_state": initial_state, "state_indices": state_indices, "has_initial_state": has_initial_state}, output_final_state, options)
    if not library.writable:
        refuse_written(out=out, final_state=final_state, checkpoints=checkpoints,
                       **{name: array for name, array in around.items() if name.endswith("_state")})
    out, final_state = _outputs(library, q, v, cu_seqlens, options["state_layout"], initial_state, final_state,
                                output_final_state, out)
    run = library.record if traced else library.run
    run(_C.prefill,
        {"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias, "out": out,
         "cu_seqlens": cu_seqlens, "initial_state": initial_state, "final_state": final_state,
         "state_indices": state_indices, "checkpoints": checkpoints, "checkpoint_cu_starts": checkpoint_cu_starts,
         "checkpoint_indices": checkpoint_indices, "checkpoint_offsets": checkpoint_offsets,
         "has_initial_state": has_initial_state, **around}, options, workspace)
    return out if final_state is None else (out, final_state)


def prefill_workspace_size(*arguments: Any, **keywords: Any) -> int:
    """Bytes of scratch memory that prefill() needs for these arguments, which are prefill()'s.

    They depend on shapes, dtypes, num_threads and the number of sequences, not on the data.
    """
    return _ask(_C.prefill_workspace_size, arguments, keywords)


def prefill_describe(*arguments: Any, **keywords: Any) -> str:
    """One line on how prefill() would run these arguments, which are prefill()'s: backend, level, arithmetic, split."""
    return _ask(_C.prefill_describe, arguments, keywords)


_SIGNATURE = inspect.signature(prefill)
_OPTIONS = tuple(inspect.signature(_options).parameters)


def _ask(function: _C.Function, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    bound = _SIGNATURE.bind(*arguments, **keywords)
    bound.apply_defaults()
    a = bound.arguments
    library = library_of(a["q"])
    options = _options(**{name: a[name] for name in _OPTIONS})
    mark_padding(options, a["padding_slot"])
    a["out"], a["final_state"] = _outputs(library, a["q"], a["v"], a["cu_seqlens"], options["state_layout"],
                                          a["initial_state"], a["final_state"], a["output_final_state"], a["out"])
    around = convolution_tensors(a["q_conv"], a["k_conv"], a["v_conv"])
    options.update(norm_options(a["norm_activation"], a["norm_eps"]))
    return library.run(function, {name: a.get(name, around.get(name)) for name in _C.TENSORS}, options, None)
