# SPDX-License-Identifier: MIT
"""flash-linear-attention (fla 0.6) running on this package.

fla finds a package named flash_kda by itself and sends it what FlashKDA can do. After register() its chunk_kda, and so
its KDA layer, sends everything that this package can do: gradients, head dims up to 256, grouped value heads, the softplus
gate, flags off, K-first states, intermediate states, the CPU. Its fused_recurrent_kda sends calls of up to 16 tokens to decode.
"""

from __future__ import annotations

import inspect
from typing import Any

from . import _C
from ._chunk_kda import chunk_kda
from ._fused_recurrent import TENSORS, fused_recurrent_kda_fwd
from ._fused_recurrent import refusal as recurrent_refusal

_CHUNK = inspect.signature(chunk_kda)
_RECURRENT = inspect.signature(fused_recurrent_kda_fwd)


def _needs_grad(call: dict[str, Any]) -> bool:
    import torch

    return torch.is_grad_enabled() and any(getattr(value, "requires_grad", False) for value in call.values())


def _refusal(call: dict[str, Any]) -> str | None:
    """Why this package cannot take a call of either function, or None."""
    q = call["q"]
    backend = _C.BACKENDS.get(q.device.type, -1)
    if not _C.backend_available(backend):
        return f"this build of libflashkda does not run on {q.device.type} here"
    if _needs_grad(call) and not _C.backward_available(backend):
        return f"this build of libflashkda has no backward pass on {q.device.type} here"
    if q.shape[-1] > 256:
        return f"libflashkda takes head dims of keys up to 256, not {q.shape[-1]}"
    bound = call["lower_bound"]
    if call["use_gate_in_kernel"] and bound is not None and not -5 <= bound < 0:
        return f"libflashkda takes a lower_bound in [-5, 0), not {bound}"
    return None


def _verdict(signature: inspect.Signature, arguments: Any, keywords: Any) -> tuple[bool, str | None]:
    import torch

    call = signature.bind(*arguments, **keywords)
    call.apply_defaults()
    if not all(isinstance(call.arguments.get(name), (torch.Tensor, type(None))) for name in TENSORS):
        return True, None  # and then refused by a sentence, which fla's kernels do not have
    reason = _refusal(call.arguments)
    if not reason and signature is _RECURRENT:
        names = inspect.signature(recurrent_refusal).parameters
        reason = recurrent_refusal(**{name: call.arguments[name] for name in names})
        if _needs_grad(call.arguments):
            reason = "libflashkda's decode has no backward pass"
    elif not reason and call.arguments["cp_context"] is not None and call.arguments["return_intermediate_states"]:
        reason = "libflashkda has no intermediate states of a sequence on several ranks"
    return reason is None, reason


def register() -> None:
    """Replaces fla's FlashKDA backend by this package's, and has decode take its token recurrence. FLA_FLASH_KDA=0 in the
    environment turns either off."""
    import fla.backends
    from fla.ops.kda import chunk_kda as entry_point

    class Backend(fla.backends.BaseBackend):
        backend_type = "flash_kda"  # FlashKDA's, which it replaces
        package_name = "libflashkda"
        env_var = "FLA_FLASH_KDA"
        priority = 3

        def chunk_kda_verifier(self, *arguments: Any, **keywords: Any) -> tuple[bool, str | None]:
            return _verdict(_CHUNK, arguments, keywords)

        def chunk_kda(self, *arguments: Any, **keywords: Any) -> Any:
            return chunk_kda(*arguments, **keywords)

        def fused_recurrent_kda_fwd_verifier(self, *arguments: Any, **keywords: Any) -> tuple[bool, str | None]:
            return _verdict(_RECURRENT, arguments, keywords)

        def fused_recurrent_kda_fwd(self, *arguments: Any, **keywords: Any) -> Any:
            return fused_recurrent_kda_fwd(*arguments, **keywords)

    if fla.backends._DISPATCH_DISABLED:
        raise RuntimeError("FLA_DISABLE_BACKEND_DISPATCH=1 is in the environment, so fla takes no backend")
    fla.backends.register(entry_point)(Backend)
    fla.backends.register("kda")(Backend)  # fused_recurrent_kda
