# SPDX-License-Identifier: MIT
"""torch: tensors are lent by DLPack's C exchange where torch has it. Calls that torch records or differentiates become
custom ops."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from . import _C
from ._backward import INPUT_OF, new_gradients
from ._libraries import Library, Options, Tensors, written_names
from ._shapes import state_shape

_REQUIRED = ("q", "k", "v", "g", "beta")
_INPUTS = (*_REQUIRED, "A_log", "dt_bias", "cu_seqlens", "initial_state", "state_indices", "has_initial_state")
_TENSOR = torch.Tensor
_NO_DISPATCH = torch.Tensor.__torch_dispatch__

# Asked at every call: looked up once.
_any_true = _C.any_true
_is_compiling = torch.compiler.is_compiling
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
_is_grad_enabled = torch.is_grad_enabled
_is_negated = torch.Tensor.is_neg
_requires_grad = torch.Tensor.requires_grad.__get__
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

    def differentiated(self, *inputs: Any) -> bool:
        if _is_grad_enabled():
            for x in inputs:
                if x is not None and getattr(x, "requires_grad", False):
                    return True
        return False

    def empty(self, like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        return torch.empty(shape, dtype=dtype, device=like.device)

    def lend(self, array: Any, **how: Any) -> Any:
        return torch.utils.dlpack.to_dlpack(array)

    def run(self, function: _C.Function, tensors: Tensors, options: Options, workspace: Any) -> Any:
        if _is_grad_enabled() and _any_true(_requires_grad, tensors):
            _refuse_grad(function, tensors)
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
            _refuse_grad(function, tensors)
        if function is _C.decode:
            return torch.ops.libflashkda.decode(*map(tensors.get, _C.DECODE_TENSORS), **options)
        return torch.ops.libflashkda.prefill_into(*map(tensors.get, _C.TENSORS), workspace, **options)

    def record_prefill(self, inputs: Tensors, output_final_state: bool, options: Options) -> Any:
        for name, tensor in inputs.items():
            if tensor is not None or name in _REQUIRED:
                self.check(tensor, name)
        if options["checkpoint_every"]:
            raise ValueError("checkpoints is None; expected a tensor with checkpoint_every")
        if not _is_compiling() and forward_ad._current_level >= 0:
            _refuse_tangents(inputs)
        # An exported program is run for its outputs most of the time. Its gradients find the states again.
        if self.differentiated(*inputs.values()) and not _is_exporting():
            options["checkpoint_every"] = _KEEP_EVERY
        out, final_state, _ = torch.ops.libflashkda.prefill(*map(inputs.get, _INPUTS), output_final_state, **options)
        return (out, final_state) if output_final_state else out

    def record_backward(self, inputs: Tensors, names: tuple[str, ...], options: Options) -> Tensors:
        wanted = [name in names for name in _C.BACKWARD_WRITTEN]
        return dict(zip(names, torch.ops.libflashkda.backward(*map(inputs.get, _GIVEN), wanted, **options)))

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


@torch.compiler.assume_constant_result
def runs_on(device_type: str) -> tuple[bool, bool]:
    """Whether there is a backend for tensors there, and whether it has a backward pass."""
    backend = _C.BACKENDS.get(device_type, -1)
    return _C.backend_available(backend), _C.backward_available(backend)


def _refuse_grad(function: _C.Function, tensors: Tensors) -> None:
    if function in (_C.prefill_describe, _C.prefill_workspace_size, _C.decode_describe, _C.backward_describe):
        return
    for name, tensor in tensors.items():
        if tensor is not None and getattr(tensor, "requires_grad", False):
            why = ("libflashkda has no second derivative" if function is _C.backward else
                   "no gradient passes through a call that writes to given tensors, as prefill() and chunk_kda() do not")
            raise NotImplementedError(f"{name} requires grad, but {why}; call it under torch.no_grad() or "
                                      f"torch.inference_mode(), or with {name}.detach()")


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
_BACKWARD_OPTIONS = f"{_OPTIONS}, int checkpoint_every=0"
_PREFILL_OPTIONS = f"{_BACKWARD_OPTIONS}, int padding_slot=0"
_INTO_OPTIONS = f"{_PREFILL_OPTIONS}, int norm_activation=0, float norm_eps=0.0"


def _tensors(names: tuple[str, ...], written: tuple[str, ...], required: tuple[str, ...]) -> str:
    """The tensors of a schema. Each one that is written may alias nothing but itself."""
    letters = iter("abcdefgh")
    return ", ".join(f"Tensor{f'({next(letters)}!)' if name in written else ''}{'' if name in required else '?'} {name}"
                     for name in names)


@torch.library.custom_op("libflashkda::prefill", mutates_args=(), schema=(
    f"({_tensors(_INPUTS, (), _REQUIRED)}, bool output_final_state, *, {_PREFILL_OPTIONS}) "
    "-> (Tensor out, Tensor final_state, Tensor checkpoints)"))
def _prefill(*arguments, **options):
    """Outputs are new. Without output_final_state, final_state has no elements. With checkpoint_every, checkpoints are all
    that backward reads of the states inside of sequences, else they have no elements."""
    inputs, output_final_state = dict(zip(_INPUTS, arguments)), arguments[len(_INPUTS)]
    out, final_state, checkpoints = _prefill_outputs(inputs, output_final_state, options)
    _run_kept(_C.prefill, {**inputs, "out": out, "final_state": final_state if output_final_state else None,
                           "checkpoints": checkpoints}, options)
    return out, final_state, checkpoints


@_prefill.register_fake
def _(*arguments, **options):
    return _prefill_outputs(dict(zip(_INPUTS, arguments)), arguments[len(_INPUTS)], options)


def _prefill_outputs(inputs, output_final_state, options):
    q, v, initial_state, cu_seqlens = (inputs[name] for name in ("q", "v", "initial_state", "cu_seqlens"))
    every, states = options.get("checkpoint_every", 0), (0,)
    if output_final_state or every:
        states = state_shape(q, v, cu_seqlens, options.get("state_layout", 0))
    dtype = torch.float32 if initial_state is None else initial_state.dtype
    kept = (0,)
    if every and len(states) == 4:  # the state after a sequence is read by nobody, but may have a row
        kept = (*(q.shape[:1] if cu_seqlens is None else ()), q.shape[1] // every, *states[1:])
    # On CUDA products have bf16 operands anyway.
    kept_dtype = torch.bfloat16 if q.device.type == "cuda" else torch.float32
    return (torch.empty(v.shape, dtype=v.dtype, device=q.device),
            torch.empty(states if output_final_state else (0,), dtype=dtype, device=q.device),
            torch.empty(kept, dtype=kept_dtype, device=q.device))


def _run_kept(function, tensors, options):
    """With states that prefill kept or is to keep. Of packed sequences each has a row for every full checkpoint_every
    tokens, unless the caller says where its rows begin."""
    kept, ends = tensors["checkpoints"], tensors["cu_seqlens"]
    if kept is not None and kept.numel() == 0:
        tensors, options = {**tensors, "checkpoints": None}, {**options, "checkpoint_every": 0}
    elif kept is not None and tensors.get("checkpoint_cu_starts") is None and ends is not None and ends.ndim == 1 and (
            ends.dtype in (torch.int32, torch.int64)):  # else the library says what is wrong
        starts = torch.nn.functional.pad((ends.diff() // options["checkpoint_every"]).cumsum(0), (1, 0))
        tensors = {**tensors, "checkpoints": kept[:starts[-1]] if kept.is_cpu else kept, "checkpoint_cu_starts": starts}
    with torch.no_grad():
        LIBRARY.run(function, tensors, options, None)


@torch.library.custom_op("libflashkda::prefill_into", mutates_args=(*_C.WRITTEN, "workspace"), schema=(
    f"({_tensors((*_C.TENSORS, 'workspace'), (*_C.WRITTEN, 'workspace'), (*_REQUIRED, 'out'))}, *, {_INTO_OPTIONS}) "
    "-> ()"))
def _prefill_into(*arguments, **options):
    with torch.no_grad():
        LIBRARY.run(_C.prefill, dict(zip(_C.TENSORS, arguments)), options, arguments[len(_C.TENSORS)])


@_prefill_into.register_fake
def _(*arguments, **options):
    return None


@torch.library.custom_op("libflashkda::decode", mutates_args=_C.DECODE_WRITTEN, schema=(
    f"({_tensors(_C.DECODE_TENSORS, _C.DECODE_WRITTEN, (*_REQUIRED, 'state'))}, *, {_OPTIONS}, int max_tokens, "
    "int norm_activation, float norm_eps, int padding_slot=0) -> ()"))
def _decode(*arguments, **options):
    with torch.no_grad():
        LIBRARY.run(_C.decode, dict(zip(_C.DECODE_TENSORS, arguments)), options, None)


@_decode.register_fake
def _(*arguments, **options):
    return None


# ---- Gradients -----------------------------------------------------------------------------------

_KEEP_EVERY = 128  #: tokens from one state to the next that prefill keeps for backward

_READ = (*_REQUIRED, "A_log", "dt_bias", "cu_seqlens", "initial_state")
_GIVEN = (*_READ, "checkpoints", "checkpoint_cu_starts", "d_out", "d_final_state")


@torch.library.custom_op("libflashkda::backward", mutates_args=(), schema=(
    f"({_tensors(_GIVEN, (), _REQUIRED)}, bool[] wanted, *, {_BACKWARD_OPTIONS}) -> Tensor[]"))
def _backward(*arguments, **options):
    """wanted says of each of _C.BACKWARD_WRITTEN whether it is among the results."""
    inputs, made = dict(zip(_GIVEN, arguments)), _gradients(arguments, options)
    d_out = inputs["d_out"]
    if d_out is not None and d_out.stride(-1) != 1:  # as of a sum, whose gradient is one number everywhere
        inputs["d_out"] = d_out.contiguous()
    d_final_state = inputs["d_final_state"]
    if d_final_state is not None and d_final_state.stride(-1) != 1:
        inputs["d_final_state"] = d_final_state.contiguous()
    _run_kept(_C.backward, {**inputs, **made}, options)
    return list(made.values())


@_backward.register_fake
def _(*arguments, **options):
    return list(_gradients(arguments, options).values())


def _gradients(arguments, options):
    names = [name for name, wanted in zip(_C.BACKWARD_WRITTEN, arguments[len(_GIVEN)]) if wanted]
    return new_gradients(LIBRARY, dict(zip(_GIVEN, arguments)), names, options.get("state_layout", 0))


def _keep_for_backward(ctx, inputs, keyword_only_inputs, output):
    tensors = dict(zip(_INPUTS, inputs))
    if tensors["state_indices"] is not None:
        raise NotImplementedError("state_indices is given where a gradient is asked for, but training has no pool of "
                                  "states; expected None")
    if tensors["has_initial_state"] is not None:
        raise NotImplementedError("has_initial_state is given where a gradient is asked for, but every sequence of training "
                                  "has its initial state; expected None, with zeros in initial_state")
    backend = tensors["q"].device.type
    if not _C.backward_available(_C.BACKENDS.get(backend, -1)):
        raise NotImplementedError(f"a gradient is asked for, but this build of libflashkda has no backward pass on {backend} "
                                  "here; call it under torch.no_grad() or torch.inference_mode()")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*map(tensors.get, _READ), output[2])
    ctx.options = {name: value for name, value in keyword_only_inputs.items() if name != "padding_slot"}


def _backward_of_prefill(ctx, d_out, d_final_state, d_checkpoints):
    wanted = {of: ctx.needs_input_grad[_INPUTS.index(of)] for of in INPUT_OF.values()}
    found = iter(())
    if d_out is not None or d_final_state is not None:
        found = iter(torch.ops.libflashkda.backward(*ctx.saved_tensors, None, d_out, d_final_state,
                                                    list(wanted.values()), **ctx.options))
    gradients = {of: next(found, None) for of, needed in wanted.items() if needed}
    return (*map(gradients.get, _INPUTS), None)


def _refuse_second_derivative(ctx, *gradients):
    raise NotImplementedError("a gradient of a gradient is asked for, but libflashkda has no second derivative")


_prefill.register_autograd(_backward_of_prefill, setup_context=_keep_for_backward)
_backward.register_autograd(_refuse_second_derivative)
