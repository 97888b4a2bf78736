# SPDX-License-Identifier: MIT
"""torch: tensors are lent by DLPack's C exchange where torch has it, and calls that torch records become custom ops."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from . import _C
from ._libraries import Library, tensor_names, written_names
from ._shapes import state_shape

_INPUTS = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "cu_seqlens", "initial_state", "state_indices")
_TENSOR = torch.Tensor
_NO_DISPATCH = torch.Tensor.__torch_dispatch__

# Asked at every call: looked up once.
_any_true = _C.any_true
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_negated = torch.Tensor.is_neg
_is_traced = torch._C._is_tracing
_modes = torch._C._len_torch_dispatch_stack

try:
    torch._C._increment_version(())
    _increment_version = torch._C._increment_version
except (RuntimeError, TypeError):  # older versions take one tensor

    def _increment_version(tensors: tuple[Any, ...]) -> None:
        for tensor in tensors:
            if not tensor.is_inference():
                torch._C._increment_version(tensor)


class Torch(Library):
    float32 = torch.float32

    def __init__(self) -> None:
        super().__init__(torch.Tensor)
        self.exchange = _C.has_exchange(torch.Tensor)

    def traced(self, q: Any) -> bool:
        return (_is_compiling() or _modes() > 0 or _is_traced()
                or _python_dispatch._is_in_torch_dispatch_mode  # with make_fx(pre_dispatch=True) alone
                or (type(q) is not _TENSOR and getattr(type(q), "__torch_dispatch__", None) is not _NO_DISPATCH)
                or q.is_meta)

    def empty(self, like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        return torch.empty(shape, dtype=dtype, device=like.device)

    def lend(self, array: Any, **how: Any) -> Any:
        return torch.utils.dlpack.to_dlpack(array)

    def run(self, function: _C.Function, tensors: tuple[Any, ...], options: tuple[Any, ...], workspace: Any) -> Any:
        if _is_grad_enabled():
            _refuse_grad(tensors, tensor_names(function))
        if forward_ad._current_level >= 0:
            _refuse_tangents(tensors, tensor_names(function))
        if _any_true(_is_negated, tensors):
            tensors = _resolved(tensors, function, options)
        if self.exchange:
            result = function(*tensors, *options, None, workspace)
        else:
            result = self._run_by_capsules(function, tensors, options, workspace)
        if type(result) is tuple:
            _increment_version(result)
        return result

    def record(self, function: _C.Function, tensors: tuple[Any, ...], options: tuple[Any, ...], workspace: Any) -> Any:
        if _is_grad_enabled():
            _refuse_grad(tensors, tensor_names(function))
        if function is _C.decode:
            return torch.ops.libflashkda.decode(*tensors, *options)
        return torch.ops.libflashkda.prefill_into(*tensors, *options, workspace)

    def record_prefill(self, inputs: tuple[Any, ...], output_final_state: bool, options: tuple[Any, ...]) -> Any:
        if _is_grad_enabled():
            _refuse_grad(inputs, _INPUTS)
        results = torch.ops.libflashkda.prefill(*inputs, output_final_state, *options)
        return (results[0], results[1]) if output_final_state else results[0]

    def _run_by_capsules(self, function: _C.Function, tensors: tuple[Any, ...], options: tuple[Any, ...],
                         workspace: Any) -> Any:
        q = tensors[0]
        capsules = self.capsules(function, tensors)
        stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None

        def allocate(size: int) -> Any:
            return self.lend(torch.empty(size, dtype=torch.uint8, device=q.device))

        memory = allocate if workspace is None else self.capsule(workspace, "workspace")
        arrays = dict(zip(map(id, capsules), tensors))
        result = function(*capsules, *options, stream, memory)
        return tuple(arrays[id(capsule)] for capsule in result) if isinstance(result, tuple) else result


LIBRARY = Torch()


def _refuse_grad(tensors: tuple[Any, ...], names: tuple[str, ...]) -> None:
    for tensor, name in zip(tensors, names):
        if tensor is not None and getattr(tensor, "requires_grad", False):
            raise NotImplementedError(f"{name} requires grad, but libflashkda has no backward pass yet; call it under "
                                      f"torch.no_grad() or torch.inference_mode(), or with {name}.detach()")


def _refuse_tangents(tensors: tuple[Any, ...], names: tuple[str, ...]) -> None:
    for tensor, name in zip(tensors, names):
        if isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name} has a tangent, but libflashkda has no forward-mode derivative; call it with "
                                      f"torch.autograd.forward_ad.unpack_dual({name}).primal")


def _resolved(tensors: tuple[Any, ...], function: _C.Function, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without torch's lazy negative bit, which DLPack does not hand on."""
    written, resolved = written_names(function, options), []
    for tensor, name in zip(tensors, tensor_names(function)):
        lazy = isinstance(tensor, torch.Tensor) and tensor.is_neg()
        if lazy and name in written:
            raise ValueError(f"{name} is a view with torch's lazy negative bit, as of the imaginary part of a conjugate; "
                             "expected memory that holds what is written")
        resolved.append(tensor.resolve_neg() if lazy else tensor)
    return tuple(resolved)


# ---- Custom ops: what torch.compile and torch.export record ---------------------------------------

_REQUIRED = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias"
_WHAT = "int gate, float lower_bound, int beta_mode, float scale, int flags, int state_layout"
_HOW = "int backend, int num_threads"
_OPTIONS = f"{_WHAT}, int checkpoint_every, {_HOW}"


@torch.library.custom_op("libflashkda::prefill", mutates_args=(), schema=(
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


@torch.library.custom_op("libflashkda::prefill_into", mutates_args=("out", "final_state", "checkpoints", "workspace"),
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
    "libflashkda::decode", mutates_args=("out", "state", "q_conv_state", "k_conv_state", "v_conv_state"), schema=(
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
