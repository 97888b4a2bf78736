# SPDX-License-Identifier: MIT
"""A plug-in of SGLang (entry point sglang.srt.plugins): its default kernels of Kimi Delta Attention, "triton", become
libflashkda's for prefill and decode. What else they do, drafts and snapshots inside of prompts, stays Triton's."""

from __future__ import annotations

import logging

# Series of releases whose kernels this package was written for.
KNOWN = ("0.5",)

TARGET = "sglang.srt.layers.attention.linear.kernels.kda_triton.TritonKDAKernel"

_logger = logging.getLogger(__name__)


def register() -> None:
    """What SGLang calls in each of its processes, before it applies what was registered."""
    import sglang.version
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    version = sglang.version.__version__
    if ".".join(version.split(".")[:2]) not in KNOWN:
        _logger.warning("libflashkda's plug-in is written for SGLang %s, and this is %s, so it changes nothing; a newer "
                        "plug-in may know it", " and ".join(KNOWN), version)
        return
    from .kernel import FlashKDAKernel

    HookRegistry.register(TARGET, FlashKDAKernel, HookType.REPLACE)
