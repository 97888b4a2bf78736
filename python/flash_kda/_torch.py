# SPDX-License-Identifier: MIT
"""torch: tensors are lent by DLPack's C exchange where torch has it, and calls that torch records become custom ops."""

from __future__ import annotations

from typing import Any

import torch

from . import _C
from ._libraries import Library, tensor_names
from ._shapes import state_shape

_INPUTS = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "cu_seqlens", "initial_state", "state_indices")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Torch(Library):
    float32 = torch.float32

    def __init__(self) -> None:
        super().__init__(torch.Tensor)
        self.exchange = _C.has_exchange(torch.Tensor)

    def traced(self, q: Any) -> bool:
        return torch.compiler.is_compiling() or type(q) not in _PLAIN or q.is_meta

    def empty(self, like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        return torch.empty(shape, dtype=dtype, device=like.device)

    def lend(self, array: Any, **how: Any) -> Any:
        return torch.utils.dlpack.to_dlpack(array)

    def run(self, function: _C.Function, tensors: tuple[Any, ...], options: tuple[Any, ...], workspace: Any) -> Any:
        if torch.is_grad_enabled():
            refuse_grad(tensors, tensor_names(function))
        if self.traced(tensors[0]):
            if function is _C.decode:
                return torch.ops.flash_kda.decode(*tensors, *options)
            return torch.ops.flash_kda.prefill_into(*tensors, *options, workspace)
        if self.exchange:
            return function(*tensors, *options, None, workspace)
        return self._run_by_capsules(function, tensors, options, workspace)

    def prefill_op(self, inputs: tuple[Any, ...], output_final_state: bool, options: tuple[Any, ...]) -> Any:
        if torch.is_grad_enabled():
            refuse_grad(inputs, _INPUTS)
        out, final_state = torch.ops.flash_kda.prefill(*inputs, output_final_state, *options)
        return (out, final_state) if output_final_state else out

    def _run_by_capsules(self, function: _C.Function, tensors: tuple[Any, ...], options: tuple[Any, ...],
                         workspace: Any) -> Any:
        q = tensors[0]
        capsules = self.capsules(function, tensors)
        stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None

        def allocate(size: int) -> Any:
            return self.lend(torch.empty(size, dtype=torch.uint8, device=q.device))

        memory = allocate if workspace is None else self.capsule(workspace, "workspace")
        return function(*capsules, *options, stream, memory)


LIBRARY = Torch()


def refuse_grad(tensors: tuple[Any, ...], names: tuple[str, ...]) -> None:
    for tensor, name in zip(tensors, names):
        if tensor is not None and getattr(tensor, "requires_grad", False):
            raise NotImplementedError(f"{name} requires grad, but flash_kda has no backward pass yet; call it under "
                                      f"torch.no_grad() or torch.inference_mode(), or with {name}.detach()")


# ---- Custom ops: what torch.compile and torch.export record ---------------------------------------

_REQUIRED = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias"
_WHAT = "int gate, float lower_bound, int beta_mode, float scale, int flags, int state_layout"
_HOW = "int backend, int num_threads"
_OPTIONS = f"{_WHAT}, int checkpoint_every, {_HOW}"


@torch.library.custom_op("flash_kda::prefill", mutates_args=(), schema=(
    f"({_REQUIRED}, Tensor? cu_seqlens, Tensor? initial_state, Tensor? state_indices, bool output_final_state, "
    f"{_OPTIONS}) -> (Tensor out, Tensor final_state)"))
def _prefill(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state, state_indices, output_final_state, *options):
    """Outputs are new. Without output_final_state, final_state has no elements."""
    out, final_state = _prefill_outputs(q, v, cu_seqlens, initial_state, output_final_state, options)
    written = final_state if output_final_state else None
    with torch.no_grad():
        LIBRARY.run(_C.prefill, (q, k, v, g, beta, A_log, dt_bias, out, cu_seqlens, initial_state, written,
                                 state_indices, None, None, None, None), options, None)
    return out, final_state


@_prefill.register_fake
def _(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state, state_indices, output_final_state, *options):
    return _prefill_outputs(q, v, cu_seqlens, initial_state, output_final_state, options)


def _prefill_outputs(q, v, cu_seqlens, initial_state, output_final_state, options):
    shape = state_shape(q, v, cu_seqlens, options[5]) if output_final_state else (0,)
    dtype = torch.float32 if initial_state is None else initial_state.dtype
    return torch.empty(v.shape, dtype=v.dtype, device=q.device), torch.empty(shape, dtype=dtype, device=q.device)


@torch.library.custom_op("flash_kda::prefill_into", mutates_args=("out", "final_state", "checkpoints", "workspace"),
                         schema=(
    f"({_REQUIRED}, Tensor(a!) out, Tensor? cu_seqlens, Tensor? initial_state, Tensor(b!)? final_state, "
    "Tensor? state_indices, Tensor(c!)? checkpoints, Tensor? checkpoint_cu_starts, Tensor? checkpoint_indices, "
    f"Tensor? checkpoint_offsets, {_OPTIONS}, Tensor(d!)? workspace) -> ()"))
def _prefill_into(*arguments):
    tensors, options, workspace = arguments[:16], arguments[16:-1], arguments[-1]
    with torch.no_grad():
        LIBRARY.run(_C.prefill, tensors, options, workspace)


@_prefill_into.register_fake
def _(*arguments):
    return None


@torch.library.custom_op(
    "flash_kda::decode", mutates_args=("out", "state", "q_conv_state", "k_conv_state", "v_conv_state"), schema=(
    f"({_REQUIRED}, Tensor(a!)? out, Tensor? cu_seqlens, Tensor? accepted, Tensor(b!) state, Tensor? state_indices, "
    "Tensor? num_accepted_tokens, Tensor? q_conv_weight, Tensor? q_conv_bias, Tensor(c!)? q_conv_state, "
    "Tensor? k_conv_weight, Tensor? k_conv_bias, Tensor(d!)? k_conv_state, Tensor? v_conv_weight, Tensor? v_conv_bias, "
    f"Tensor(e!)? v_conv_state, Tensor? norm_weight, Tensor? norm_gate, {_WHAT}, int max_tokens, {_HOW}, "
    "int norm_activation, float norm_eps) -> ()"))
def _decode(*arguments):
    tensors, options = arguments[:len(_C.DECODE_TENSORS)], arguments[len(_C.DECODE_TENSORS):]
    with torch.no_grad():
        LIBRARY.run(_C.decode, tensors, options, None)


@_decode.register_fake
def _(*arguments):
    return None
