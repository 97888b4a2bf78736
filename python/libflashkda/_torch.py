# SPDX-License-Identifier: MIT
"""torch: tensors are lent by DLPack's C exchange where torch has it, and calls that torch records become custom ops."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from . import _C
from ._libraries import Library, Options, Tensors, written_names
from ._shapes import state_shape

_REQUIRED = ("q", "k", "v", "g", "beta")
_INPUTS = (*_REQUIRED, "A_log", "dt_bias", "cu_seqlens", "initial_state", "state_indices")
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

    def run(self, function: _C.Function, tensors: Tensors, options: Options, workspace: Any) -> Any:
        if _is_grad_enabled():
            _refuse_grad(tensors)
        if forward_ad._current_level >= 0:
            _refuse_tangents(tensors)
        if _any_true(_is_negated, tensors):
            tensors = _resolved(tensors, function, options)
        if self.exchange:
            result = function(tensors, options, None, workspace)
        else:
            result = self._run_by_capsules(function, tensors, options, workspace)
        if type(result) is tuple:
            _increment_version(result)
        return result

    def record(self, function: _C.Function, tensors: Tensors, options: Options, workspace: Any) -> Any:
        if _is_grad_enabled():
            _refuse_grad(tensors)
        if function is _C.decode:
            return torch.ops.libflashkda.decode(*map(tensors.get, _C.DECODE_TENSORS), **options)
        return torch.ops.libflashkda.prefill_into(*map(tensors.get, _C.TENSORS), workspace, **options)

    def record_prefill(self, inputs: Tensors, output_final_state: bool, options: Options) -> Any:
        if _is_grad_enabled():
            _refuse_grad(inputs)
        results = torch.ops.libflashkda.prefill(*map(inputs.get, _INPUTS), output_final_state, **options)
        return (results[0], results[1]) if output_final_state else results[0]

    def _run_by_capsules(self, function: _C.Function, tensors: Tensors, options: Options, workspace: Any) -> Any:
        q = tensors["q"]
        capsules = self.capsules(tensors)
        stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None

        def allocate(size: int) -> Any:
            return self.lend(torch.empty(size, dtype=torch.uint8, device=q.device))

        memory = allocate if workspace is None else self.capsule(workspace, "workspace")
        arrays = {id(capsules[name]): tensor for name, tensor in tensors.items()}
        result = function(capsules, options, stream, memory)
        return tuple(arrays[id(capsule)] for capsule in result) if isinstance(result, tuple) else result


LIBRARY = Torch()


def _refuse_grad(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and getattr(tensor, "requires_grad", False):
            raise NotImplementedError(f"{name} requires grad, but libflashkda has no backward pass yet; call it under "
                                      f"torch.no_grad() or torch.inference_mode(), or with {name}.detach()")


def _refuse_tangents(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name} has a tangent, but libflashkda has no forward-mode derivative; call it with "
                                      f"torch.autograd.forward_ad.unpack_dual({name}).primal")


def _resolved(tensors: Tensors, function: _C.Function, options: Options) -> Tensors:
    """Without torch's lazy negative bit, which DLPack does not hand on."""
    written, resolved = written_names(function, options), {}
    for name, tensor in tensors.items():
        lazy = isinstance(tensor, torch.Tensor) and tensor.is_neg()
        if lazy and name in written:
            raise ValueError(f"{name} is a view with torch's lazy negative bit, as of the imaginary part of a conjugate; "
                             "expected memory that holds what is written")
        resolved[name] = tensor.resolve_neg() if lazy else tensor
    return resolved


# ---- Custom ops: what torch.compile and torch.export record ---------------------------------------

_OPTIONS = ("int gate, float lower_bound, int beta_mode, float scale, int flags, int state_layout=0, int backend=0, "
            "int num_threads=0")
_PREFILL_OPTIONS = f"{_OPTIONS}, int checkpoint_every=0"


def _tensors(names: tuple[str, ...], written: tuple[str, ...], required: tuple[str, ...]) -> str:
    """The tensors of a schema. Each one that is written may alias nothing but itself."""
    letters = iter("abcdefgh")
    return ", ".join(f"Tensor{f'({next(letters)}!)' if name in written else ''}{'' if name in required else '?'} {name}"
                     for name in names)


@torch.library.custom_op("libflashkda::prefill", mutates_args=(), schema=(
    f"({_tensors(_INPUTS, (), _REQUIRED)}, bool output_final_state, *, {_PREFILL_OPTIONS}) "
    "-> (Tensor out, Tensor final_state)"))
def _prefill(*arguments, **options):
    """Outputs are new. Without output_final_state, final_state has no elements."""
    tensors, output_final_state = dict(zip(_INPUTS, arguments)), arguments[len(_INPUTS)]
    out, final_state = _prefill_outputs(tensors, output_final_state, options)
    tensors |= {"out": out, "final_state": final_state if output_final_state else None}
    with torch.no_grad():
        LIBRARY.run(_C.prefill, tensors, options, None)
    return out, final_state


@_prefill.register_fake
def _(*arguments, **options):
    return _prefill_outputs(dict(zip(_INPUTS, arguments)), arguments[len(_INPUTS)], options)


def _prefill_outputs(inputs, output_final_state, options):
    q, v, initial_state = inputs["q"], inputs["v"], inputs["initial_state"]
    layout = options.get("state_layout", 0)
    shape = state_shape(q, v, inputs["cu_seqlens"], layout) if output_final_state else (0,)
    dtype = torch.float32 if initial_state is None else initial_state.dtype
    return torch.empty(v.shape, dtype=v.dtype, device=q.device), torch.empty(shape, dtype=dtype, device=q.device)


@torch.library.custom_op("libflashkda::prefill_into", mutates_args=(*_C.WRITTEN, "workspace"), schema=(
    f"({_tensors((*_C.TENSORS, 'workspace'), (*_C.WRITTEN, 'workspace'), (*_REQUIRED, 'out'))}, *, {_PREFILL_OPTIONS}) "
    "-> ()"))
def _prefill_into(*arguments, **options):
    with torch.no_grad():
        LIBRARY.run(_C.prefill, dict(zip(_C.TENSORS, arguments)), options, arguments[len(_C.TENSORS)])


@_prefill_into.register_fake
def _(*arguments, **options):
    return None


@torch.library.custom_op("libflashkda::decode", mutates_args=_C.DECODE_WRITTEN, schema=(
    f"({_tensors(_C.DECODE_TENSORS, _C.DECODE_WRITTEN, (*_REQUIRED, 'state'))}, *, {_OPTIONS}, int max_tokens, "
    "int norm_activation, float norm_eps) -> ()"))
def _decode(*arguments, **options):
    with torch.no_grad():
        LIBRARY.run(_C.decode, dict(zip(_C.DECODE_TENSORS, arguments)), options, None)


@_decode.register_fake
def _(*arguments, **options):
    return None
