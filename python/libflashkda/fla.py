# SPDX-License-Identifier: MIT
"""flash-linear-attention (fla 0.6) running on this package.

fla finds a package named flash_kda by itself and sends it what FlashKDA can do. After register() its chunk_kda, and so
its KDA layer, sends everything that this package can do: gradients, head dims up to 256, grouped value heads, the softplus
gate, flags off, K-first states, intermediate states, the CPU. Its fused_recurrent_kda goes to decode and, where a sequence
has more than 16 tokens, to prefill. On a CPU what else its KDA layer and model run goes to torch's own operations.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from ._chunk_kda import chunk_kda
from ._fused_recurrent import TENSORS, fused_recurrent_kda_fwd
from ._fused_recurrent import refusal as recurrent_refusal

CHUNK = inspect.signature(chunk_kda)
RECURRENT = inspect.signature(fused_recurrent_kda_fwd)


def _needs_grad(call: dict[str, Any]) -> bool:
    import torch

    return torch.is_grad_enabled() and any(getattr(value, "requires_grad", False) for value in call.values())


def _refusal(call: dict[str, Any]) -> str | None:
    """Why this package cannot take a call of either function, or None."""
    from ._torch import runs_on

    q = call["q"]
    forward, backward = runs_on(q.device.type)
    if not forward:
        return f"this build of libflashkda does not run on {q.device.type} here"
    if _needs_grad(call) and not backward:
        return f"this build of libflashkda has no backward pass on {q.device.type} here"
    if q.shape[-1] > 256:
        return f"libflashkda takes head dims of keys up to 256, not {q.shape[-1]}"
    bound = call["lower_bound"]
    if call["use_gate_in_kernel"] and bound is not None and not -5 <= bound < 0:
        return f"libflashkda takes a lower_bound in [-5, 0), not {bound}"
    return None


def verdict(signature: inspect.Signature, arguments: Any, keywords: Any) -> tuple[bool, str | None]:
    """Whether this package takes a call of CHUNK or RECURRENT, and if not, why."""
    import torch

    call = signature.bind(*arguments, **keywords)
    call.apply_defaults()
    if not all(isinstance(call.arguments.get(name), (torch.Tensor, type(None))) for name in TENSORS):
        return True, None  # and then refused by a sentence, which fla's kernels do not have
    reason = _refusal(call.arguments)
    if not reason and signature is RECURRENT:
        names = inspect.signature(recurrent_refusal).parameters
        reason = recurrent_refusal(**{name: call.arguments[name] for name in names})
        if _needs_grad(call.arguments):
            reason = "libflashkda has no backward pass of fused_recurrent_kda"
    elif not reason and call.arguments["cp_context"] is not None and call.arguments["return_intermediate_states"]:
        reason = "libflashkda has no intermediate states of a sequence on several ranks"
    return reason is None, reason


def _on_a_cpu(x: Any, *_: Any, **__: Any) -> tuple[bool, str | None]:
    return x.is_cpu, "torch's own operations stand in for fla's kernels on a CPU alone"


def _register_modules(backend: type) -> None:
    """Convolutions, norms and SwiGLU, for which fla has no kernels on a CPU."""
    import fla.backends
    from fla.modules.activations import ops as activations
    from fla.modules.causal_conv1d import ops as convolutions
    from fla.modules.norm import fused_norm_gate, layernorm

    from . import _fla_modules

    for entry_point in (convolutions.causal_conv1d_fwd, convolutions.causal_conv1d_update, layernorm.layer_norm_fwd,
                        fused_norm_gate.layer_norm_gated_fwd, activations.swiglu_fwd):
        fla.backends.register(entry_point, backend=backend, verifier=_on_a_cpu)(
            getattr(_fla_modules, entry_point.__name__))


def _hand_the_cache_on() -> None:
    """transformers 5.24 renamed past_key_values to cache. fla 0.6's models drop the new name, so that generate() would
    forget the prompt after each token, without a word. Does nothing with an older transformers or a newer fla."""
    try:
        from fla.models.generation_utils import FLAGenerationMixin as mixin
        from transformers import GenerationMixin
    except ImportError:  # fla-core alone, which has no models
        return
    theirs = mixin.prepare_inputs_for_generation
    signature = inspect.signature(theirs)
    if ("cache" in signature.parameters
            or "cache" not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters):
        return

    @functools.wraps(theirs)
    def prepare_inputs_for_generation(self: Any, *arguments: Any, cache: Any = None, **keywords: Any) -> dict[str, Any]:
        inputs = theirs(self, *arguments, **keywords, **({} if cache is None else {"past_key_values": cache}))
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    # generate() looks up which arguments there are.
    *named, keywords = signature.parameters.values()
    cache = inspect.Parameter("cache", inspect.Parameter.KEYWORD_ONLY, default=None)
    prepare_inputs_for_generation.__signature__ = signature.replace(parameters=[*named, cache, keywords])
    mixin.prepare_inputs_for_generation = prepare_inputs_for_generation


def register() -> None:
    """Replaces fla's FlashKDA backend by this package's, has decode and prefill take its token recurrence, and on a CPU
    has torch take the rest of its KDA layer and model. FLA_FLASH_KDA=0 in the environment turns all of it off."""
    import fla.backends
    from fla.ops.kda import chunk_kda as entry_point

    class Shared(fla.backends.BaseBackend):
        package_name = "libflashkda"
        env_var = "FLA_FLASH_KDA"
        priority = 3

    class Backend(Shared):
        backend_type = "flash_kda"  # FlashKDA's, which it replaces

        def chunk_kda_verifier(self, *arguments: Any, **keywords: Any) -> tuple[bool, str | None]:
            return verdict(CHUNK, arguments, keywords)

        def chunk_kda(self, *arguments: Any, **keywords: Any) -> Any:
            return chunk_kda(*arguments, **keywords)

        def fused_recurrent_kda_fwd_verifier(self, *arguments: Any, **keywords: Any) -> tuple[bool, str | None]:
            return verdict(RECURRENT, arguments, keywords)

        def fused_recurrent_kda_fwd(self, *arguments: Any, **keywords: Any) -> Any:
            return fused_recurrent_kda_fwd(*arguments, **keywords)

    class Modules(Shared):
        backend_type = "torch"

    if fla.backends._DISPATCH_DISABLED:
        raise RuntimeError("FLA_DISABLE_BACKEND_DISPATCH=1 is in the environment, so fla takes no backend")
    fla.backends.register(entry_point)(Backend)
    fla.backends.register("kda")(Backend)  # fused_recurrent_kda
    _register_modules(Modules)
    _hand_the_cache_on()
