# SPDX-License-Identifier: MIT
"""A plug-in of vLLM (entry point vllm.general_plugins): its Kimi Linear runs Kimi Delta Attention in libflashkda.

layer    the layer, on CPU and CUDA
cpu      what vLLM's CPU path lacks for the rest of the model, one function for each thing
"""

from __future__ import annotations

import logging

# Series of releases whose layer and CPU path this package was written for.
KNOWN = ("0.32", "0.33")

_logger = logging.getLogger("vllm.plugins.libflashkda")


def register() -> None:
    """What vLLM calls in each of its processes, before it makes a model."""
    import vllm
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.platforms import current_platform

    if ".".join(vllm.__version__.split(".")[:2]) not in KNOWN:
        _logger.warning("libflashkda's plug-in is written for vLLM %s, and this is %s, so it changes nothing; a newer "
                        "plug-in may know it", " and ".join(KNOWN), vllm.__version__)
        return
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        _logger.warning("libflashkda runs on CPUs and CUDA, and vLLM runs on %s here, so the plug-in changes nothing",
                        current_platform.device_name)
        return
    from .layer import NAME, install

    if NAME in op_registry_oot:
        theirs = op_registry_oot[NAME]
        if not theirs.__module__.startswith(__name__):
            _logger.warning("%s.%s has replaced vLLM's %s already, so libflashkda's plug-in changes nothing",
                            theirs.__module__, theirs.__name__, NAME)
        return
    install()
    if current_platform.is_cpu():
        from . import cpu

        cpu.install()
