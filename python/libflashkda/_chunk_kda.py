# SPDX-License-Identifier: MIT
"""flash-linear-attention's interface (fla.ops.kda.chunk_kda, release 0.6)."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

from ._libraries import library_of
from ._prefill import Array, prefill


def chunk_kda(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    scale: float | None = None,
    initial_state: Array | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Array | None = None,
    cu_seqlens_cpu: Array | None = None,
    cp_context: Any = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    *,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    chunk_size: int = 64,
    transpose_state_layout: bool | None = None,
) -> tuple[Array, Array | None] | tuple[Array, Array | None, Array]:
    """Kimi Delta Attention over whole sequences, as fla's chunk_kda. Differentiable, with respect to all that is float.

    Args:
        q, k: torch tensors [B, T, H, K] of fp32, fp16 or bf16, K at most 256.
        v: [B, T, HV, V], HV a multiple of H.
        g: [B, T, HV, K]: the log decay in nats a token, or with use_gate_in_kernel the raw gate. A log decay above 0 is
            not clamped, as in prefill().
        beta: [B, T, HV]: the step, or with use_beta_sigmoid_in_kernel its logits.
        scale: None: 1 / sqrt(K).
        initial_state: fp32, here also bf16, [N, HV, K, V]; None: 0.
        output_final_state: return the final states, fp32 [N, HV, K, V].
        use_qk_l2norm_in_kernel: normalise q and k.
        use_gate_in_kernel: the decay is -exp(A_log) softplus(g + dt_bias), or with lower_bound
            lower_bound sigmoid(exp(A_log) (g + dt_bias)).
        use_beta_sigmoid_in_kernel: the step is sigmoid(beta), or with allow_neg_eigval 2 sigmoid(beta).
        safe_gate: with use_gate_in_kernel lower_bound must be given; changes nothing else here.
        lower_bound: in [-5, 0), nats a token; only with use_gate_in_kernel.
        disable_recompute: changes nothing here.
        return_intermediate_states: also return h, the states before each chunk of chunk_size tokens, of k's dtype:
            [B, ceil(T / chunk_size), HV, K, V], or with cu_seqlens [1, chunks of all sequences, HV, K, V]. Not where a
            gradient is asked for.
        state_v_first: every state is [.., V, K] instead of [.., K, V].
        cu_seqlens: int64, here also int32, [N + 1]: packed sequences, B is 1.
        cu_seqlens_cpu: the same on the CPU: h is sized from it, without waiting for the GPU.
        cp_context: what fla's build_cp_context() makes, "contiguous" or "zigzag": the sequences lie on several ranks of its
            group, this call has the rank's own tokens, and all ranks make it. Its boundaries take the place of cu_seqlens.
            Unlike fla's, this takes initial_state, not read where a sequence comes from another rank, and gives final
            states, those at the border where it goes on. Gradients of A_log and dt_bias are sums over the rank's tokens.
        use_graph: h is sized from T and N alone, for capture in a CUDA graph; rows that no sequence reaches are
            undefined. Every call can be captured otherwise.
        max_num_seqs: with use_graph: N.
        A_log: [HV], any shape of HV elements; needed with use_gate_in_kernel unless lower_bound is given.
        dt_bias: [HV * K] or [HV, K]; None: 0.
        chunk_size: 32 or 64, of h.
        transpose_state_layout: the former name of state_v_first.

    Returns:
        (o, final_state), or (o, final_state, h): o is [B, T, HV, V] of q's dtype, final_state None if not asked for.

    Raises:
        NotImplementedError: a tensor has a tangent, or requires grad where there is no backward pass (as prefill());
            cp_context is given with return_intermediate_states.
        ValueError, TypeError and others: as prefill().
    """
    import torch

    check_tensors(_TENSORS, (q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, cu_seqlens_cpu))
    if transpose_state_layout is not None:
        state_v_first = _renamed(state_v_first, transpose_state_layout)
    if chunk_size not in (32, 64):
        raise ValueError(f"chunk_size is {chunk_size}; expected 32 or 64")
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval is given without use_beta_sigmoid_in_kernel, which it needs")
    _check_graph(use_graph, cu_seqlens, max_num_seqs)
    gate = _gate(g, use_gate_in_kernel, safe_gate, lower_bound, A_log, dt_bias)
    q, k, v, g = rows(q, "q"), rows(k, "k"), rows(v, "v"), rows(g, "g")
    initial_state = None if initial_state is None else rows(initial_state, "initial_state")
    call = {**gate, "qk_norm": use_qk_l2norm_in_kernel, "scale": scale, "cu_seqlens": cu_seqlens,
            "beta_mode": _beta_mode(use_beta_sigmoid_in_kernel, allow_neg_eigval), "initial_state": initial_state,
            "output_final_state": output_final_state, "state_layout": "v_first" if state_v_first else "k_first"}
    if cp_context is not None:
        return _in_parallel(q, k, v, g, beta, call, cp_context, return_intermediate_states)
    if return_intermediate_states or v.dtype != q.dtype or (
            output_final_state and initial_state is not None and initial_state.dtype != torch.float32):
        if library_of(q).differentiated(q, k, v, g, beta, A_log, dt_bias, initial_state):
            if return_intermediate_states:
                raise NotImplementedError("return_intermediate_states is given where a gradient is asked for, but none "
                                          "passes through h; call it under torch.no_grad() or torch.inference_mode()")
            return _from_new_tensors(q, k, v, g, beta, call)
        if v.dtype != q.dtype:
            call["out"] = torch.empty(v.shape, dtype=q.dtype, device=q.device)
        if output_final_state and initial_state is not None and initial_state.dtype != torch.float32:
            call["final_state"] = torch.empty(initial_state.shape, dtype=torch.float32, device=q.device)
    h = None
    if not return_intermediate_states or q.ndim != 4 or v.ndim != 4:
        result = prefill(q, k, v, g, beta, **call)
    elif cu_seqlens is None:
        h, checkpoints = _dense_states(q, k, v, chunk_size, state_v_first)
        result = prefill(q, k, v, g, beta, **call, **checkpoints)
    else:
        chunks = _Chunks(q, cu_seqlens, cu_seqlens_cpu, use_graph, chunk_size)
        states, checkpoints = chunks.states(k, _head_shape(q, v, state_v_first))
        result = prefill(q, k, v, g, beta, **call, **checkpoints)
        h = chunks.with_initial(states, initial_state)
    pair = result if output_final_state else (result, None)
    return pair if h is None else (*pair, h.to(k.dtype))


def _in_parallel(q: Array, k: Array, v: Array, g: Array, beta: Array, call: dict[str, Any], context: Any,
                 return_intermediate_states: bool) -> tuple[Array, Array | None]:
    """With fla's context of a sequence on several ranks, whose boundaries take the place of cu_seqlens. fla refuses states
    there; here a row of initial_state that comes from another rank is not read."""
    from ._parallel import ContextParallel

    if return_intermediate_states:
        raise NotImplementedError("return_intermediate_states is given with cp_context; expected one of them")
    kept = getattr(context, "_libflashkda", None)  # fla gives the same object for the same arguments
    tokens = q.shape[1] if q.ndim > 1 else 0
    if kept is None or kept.tokens != tokens:
        try:
            kept = ContextParallel.of_fla(context, tokens)
        except AttributeError:
            raise TypeError(f"cp_context is of type {type(context)}; expected what fla's build_cp_context() makes") from None
        context._libflashkda = kept
    if call["initial_state"] is not None:
        call["initial_state"] = call["initial_state"].float()
    call = {**call, "cu_seqlens": None, "parallel": kept}
    result = prefill(q, k, v, g, beta, **call)
    out, final_state = result if call["output_final_state"] else (result, None)
    return out.to(q.dtype), final_state


def _from_new_tensors(q: Array, k: Array, v: Array, g: Array, beta: Array,
                      call: dict[str, Any]) -> tuple[Array, Array | None]:
    """Gives results the dtypes that fla's have without prefill() writing to given tensors, which has no gradient."""
    if call["initial_state"] is not None:
        call["initial_state"] = call["initial_state"].float()
    result = prefill(q, k, v.float() if v.dtype != q.dtype else v, g, beta, **call)
    out, final_state = result if call["output_final_state"] else (result, None)
    return out.to(q.dtype), final_state


REQUIRED = ("q", "k", "v", "g", "beta")
_TENSORS = (*REQUIRED, "A_log", "dt_bias", "initial_state", "cu_seqlens", "cu_seqlens_cpu")


def check_tensors(names: tuple[str, ...], tensors: tuple[Array | None, ...]) -> None:
    """Only what is not REQUIRED may be None."""
    import torch

    Tensor = torch.Tensor

    for name, tensor in zip(names, tensors):
        if type(tensor) is Tensor or (tensor is None and name not in REQUIRED):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is of type {type(tensor)}; expected a torch.Tensor (prefill() takes arrays of other "
                            "libraries)")


def _renamed(state_v_first: bool, transpose_state_layout: bool) -> bool:
    if state_v_first:
        raise ValueError("state_v_first and transpose_state_layout, its former name, are both given")
    warnings.warn("transpose_state_layout is now named state_v_first", DeprecationWarning, stacklevel=3)
    return transpose_state_layout


def rows(tensor: Array, name: str) -> Array:
    """As fla does, copies what does not lie in rows."""
    try:
        if tensor.ndim == 0 or tensor.stride(-1) == 1:
            return tensor
    except RuntimeError as error:  # torch's nested tensors have no strides
        raise ValueError(f"{name} cannot be read as an array: {error}") from error
    import torch

    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} cannot be read as an array: its layout is {tensor.layout}")
    return tensor.contiguous()


def _check_graph(use_graph: bool, cu_seqlens: Array | None, max_num_seqs: int | None) -> None:
    if use_graph and cu_seqlens is not None and max_num_seqs is not None and len(cu_seqlens) - 1 != max_num_seqs:
        raise ValueError(f"cu_seqlens has {len(cu_seqlens)} values with use_graph; expected max_num_seqs + 1 = "
                         f"{max_num_seqs + 1}, padded with empty sequences at the end")


def _gate(g: Array, in_kernel: bool, safe: bool, lower_bound: float | None, A_log: Array | None,
          dt_bias: Array | None) -> dict[str, Any]:
    if not in_kernel:
        return {"gate": "none"}
    if A_log is None and lower_bound is None:
        raise ValueError("A_log is None with use_gate_in_kernel; expected [HV], or a lower_bound")
    if safe and lower_bound is None:
        raise ValueError("lower_bound is None with safe_gate and use_gate_in_kernel; expected a number in [-5, 0)")
    arguments: dict[str, Any] = {"gate": "softplus"} if lower_bound is None else {"gate": "sigmoid",
                                                                                 "lower_bound": lower_bound}
    if A_log is not None:
        try:
            arguments["A_log"] = A_log.reshape(-1)
        except RuntimeError as error:  # sparse or nested
            raise ValueError(f"A_log cannot be read as an array: {error}") from error
    if dt_bias is not None:
        flat = dt_bias.ndim == 1 and g.ndim == 4 and dt_bias.numel() == g.shape[2] * g.shape[3]
        arguments["dt_bias"] = rows(dt_bias.view(g.shape[2:]) if flat else dt_bias, "dt_bias")
    return arguments


def _beta_mode(sigmoid: bool, twice: bool) -> str:
    if not sigmoid:
        return "given"
    return "twice_sigmoid" if twice else "sigmoid"


def _head_shape(q: Array, v: Array, v_first: bool) -> tuple[int, ...]:
    return (v.shape[2], v.shape[3], q.shape[3]) if v_first else (v.shape[2], q.shape[3], v.shape[3])


def _checkpoint_dtype(k: Array) -> Any:
    """Checkpoints are fp32 or bf16, which fp16 is rounded from."""
    import torch

    return torch.float32 if k.dtype == torch.float16 else k.dtype


def _dense_states(q: Array, k: Array, v: Array, chunk_size: int, v_first: bool) -> tuple[Array, dict[str, Array]]:
    """h, still to be written, and the arguments of prefill() that have it written."""
    import torch

    B, T = q.shape[:2]
    chunks = -(-T // chunk_size)
    h = torch.empty((B, chunks, *_head_shape(q, v, v_first)), dtype=_checkpoint_dtype(k), device=q.device)
    starts = torch.arange(chunks, device=q.device) * chunk_size
    return h, {"checkpoints": h, "checkpoint_offsets": starts.repeat(B, 1)}


def _values(ends: Array, name: str) -> list[int]:
    import torch

    if ends.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} has dtype {str(ends.dtype).removeprefix('torch.')}; expected int32 or int64")
    if ends.ndim != 1:
        raise ValueError(f"{name} has {ends.ndim} dimensions; expected 1, [N + 1]")
    try:
        return ends.tolist()
    except (NotImplementedError, RuntimeError) as error:  # sparse or without memory
        raise ValueError(f"{name} cannot be read as an array: {error}") from error


def _ends(cu_seqlens: Array, cu_seqlens_cpu: Array | None, T: int) -> list[int]:
    """What cu_seqlens holds, from the CPU where it is there too, once it is known to be right."""
    name, given = ("cu_seqlens", cu_seqlens) if cu_seqlens_cpu is None else ("cu_seqlens_cpu", cu_seqlens_cpu)
    ends = _values(given, name)
    if ends[:1] != [0] or ends[-1] != T or any(end < start for start, end in itertools.pairwise(ends)):
        shown = ", ".join(map(str, ends[:8])) + (", .." if len(ends) > 8 else "")
        raise ValueError(f"{name} is [{shown}]; expected values from 0 to T = {T}, never falling")
    if given is not cu_seqlens and (_values(cu_seqlens, "cu_seqlens") != ends if cu_seqlens.is_cpu
                                    else cu_seqlens.shape != given.shape):
        raise ValueError("cu_seqlens_cpu differs from cu_seqlens; expected the same values")
    return ends


class _Chunks:
    """Chunks of packed sequences, numbered through: sequence n has those from starts[n] to starts[n + 1] - 1."""

    def __init__(self, q: Array, cu_seqlens: Array, cu_seqlens_cpu: Array | None, use_graph: bool, chunk_size: int):
        import torch

        self.chunk_size = chunk_size
        if use_graph and q.is_cuda:
            self.rows = -(-q.shape[1] // chunk_size) + max(len(cu_seqlens) - 2, 0)
        else:
            ends = _ends(cu_seqlens, cu_seqlens_cpu, q.shape[1])
            self.rows = sum(-(-(end - start) // chunk_size) for start, end in itertools.pairwise(ends))
        self.counts = (cu_seqlens.diff() + chunk_size - 1) // chunk_size
        self.starts = torch.nn.functional.pad(self.counts.cumsum(0), (1, 0))

    def states(self, k: Array, head: tuple[int, ...]) -> tuple[Array, dict[str, Any]]:
        """Room for the states before each chunk, and prefill()'s arguments for them.

        prefill() keeps the states after each chunk: those before the next one, so they go one row further. The state
        after a sequence comes to lie on the next one's first row, which with_initial() then writes, or after the last.
        """
        import torch

        states = torch.empty((self.rows + 1, *head), dtype=_checkpoint_dtype(k), device=k.device)
        return states, {"checkpoints": states[1:], "checkpoint_every": self.chunk_size,
                        "checkpoint_cu_starts": self.starts}

    def with_initial(self, states: Array, initial_state: Array | None) -> Array:
        """The state before a sequence's first chunk is its initial state. Without a chunk it goes after the last row."""
        import torch

        first = torch.where(self.counts > 0, self.starts[:-1], self.rows)
        states[first] = torch.zeros_like(states[:1]) if initial_state is None else initial_state.to(states.dtype)
        return states[None, :self.rows]
