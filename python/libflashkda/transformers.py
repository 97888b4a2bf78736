# SPDX-License-Identifier: MIT
"""Hugging Face's transformers (5.19 and later) running on this package, with fla installed or without.

Its models with Kimi Delta Attention, kimi_linear and those built like it, run it in fla where that is installed, which
needs a GPU, and else in a loop of torch's operations. After register() they run it here, on CPUs and on CUDA.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

from ._chunk_kda import chunk_kda
from ._fused_recurrent import fused_recurrent_kda_fwd
from .fla import CHUNK, RECURRENT, verdict

MODELS = ("kimi_linear", "glm5_next", "bailing_hybrid")
_PREFILL, _DECODE = "chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"

_logger = logging.getLogger(__name__)

_OURS = {_PREFILL: chunk_kda, _DECODE: fused_recurrent_kda_fwd}
_SIGNATURES = {_PREFILL: CHUNK, _DECODE: RECURRENT}
_ALWAYS: dict[str, dict[str, Any]] = {_PREFILL: {}, _DECODE: {"inplace_final_state": False}}


@functools.cache
def _log_once(sentence: str) -> None:
    _logger.info(sentence)


def _replacement(name: str, theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the same arguments, which are fla's: what this package cannot do goes on to theirs."""
    ours, signature = _OURS[name], _SIGNATURES[name]
    known = signature.parameters

    @functools.wraps(theirs)
    def function(query: Any, key: Any, value: Any, **keywords: Any) -> Any:
        # Models pass on whatever their caller gave them.
        call = {keyword: value for keyword, value in keywords.items() if keyword in known} | _ALWAYS[name]
        taken, reason = verdict(signature, (query, key, value), call)
        if not taken:
            _log_once(f"{name}: {reason}; transformers runs it")
            return theirs(query, key, value, **keywords)
        return ours(query, key, value, **call)

    function.theirs = theirs
    return function


def present() -> list[str]:
    """Those of MODELS that this version of transformers has."""
    return [model for model in MODELS if importlib.util.find_spec(f"transformers.models.{model}")]


def register() -> None:
    """Has every model of transformers that has Kimi Delta Attention run it here, those that are made already, too.

    Raises:
        ImportError: this version of transformers has no such model, or transformers is not installed.
    """
    import transformers

    models = present()
    if not models:
        raise ImportError(f"transformers is of version {transformers.__version__}, which has no Kimi Delta Attention; "
                          "expected 5.19 or later")
    for model in models:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        for name in (_PREFILL, _DECODE):
            function = getattr(module, name)
            setattr(module, name, _replacement(name, getattr(function, "theirs", function)))
