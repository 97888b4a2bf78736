# SPDX-License-Identifier: MIT
"""Kimi Delta Attention (KDA) on CPU and CUDA for torch, numpy, cupy and jax arrays.

prefill       the library's own interface, complete; differentiable with torch
backward      its gradients, for array libraries without autograd
decode        goes on from the states it left, one token or a few at a time
fwd           FlashKDA's interface: same name, order and in-place outputs
chunk_kda     flash-linear-attention's interface; differentiable
ContextParallel  sequences that lie on several ranks of a torch.distributed group
fla           puts flash-linear-attention on this package
transformers  puts Hugging Face's transformers on this package
plot          draws inputs and benchmarks: python -m libflashkda.plot

docs/python.md introduces them; docs/maths.md says what is computed.
"""

import sys

from . import fla, transformers
from ._backward import backward, backward_describe
from ._C import VERSION as __version__
from ._chunk_kda import chunk_kda
from ._decode import decode, decode_describe
from ._fwd import fwd, get_workspace_size
from ._prefill import prefill, prefill_describe, prefill_workspace_size

__all__ = ["__version__", "backward", "backward_describe", "chunk_kda", "decode", "decode_describe", "fla", "fwd",
           "get_workspace_size", "prefill", "prefill_describe", "prefill_workspace_size", "transformers"]


def __getattr__(name: str) -> object:
    if name != "ContextParallel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ._parallel import ContextParallel  # it needs torch

    return ContextParallel


# Programs that torch.export saved need the custom ops. torch.compiler: not while torch is still importing itself; at the
# end of that it calls libflashkda_torch.register().
if hasattr(sys.modules.get("torch"), "compiler"):
    from . import _torch  # noqa: F401
