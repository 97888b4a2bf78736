# SPDX-License-Identifier: MIT
from collections.abc import Callable
from typing import Any

# Tensors by name, numbers by name, stream (None: the current one of q's library) and workspace. What is not given is as in
# FLASH_KDA_.._ARGS_INIT; a name that the library does not have is an error.
Function = Callable[[dict[str, Any], dict[str, Any], Any, Any], Any]

VERSION: str
QK_NORM: int
BATCH_INVARIANT: int
KEEP_STATE: int
FOLD_ADJOINT: int
PADDING_SLOT: int
MAX_DECODE_TOKENS: int
TENSORS: tuple[str, ...]
WRITTEN: tuple[str, ...]
DECODE_TENSORS: tuple[str, ...]
DECODE_WRITTEN: tuple[str, ...]
BACKWARD_TENSORS: tuple[str, ...]
BACKWARD_WRITTEN: tuple[str, ...]
BACKENDS: dict[str, int]
GATES: dict[str, int]
BETA_MODES: dict[str, int]
STATE_LAYOUTS: dict[str, int]
PHASES: dict[str, int]
NORM_ACTIVATIONS: dict[str, int]

# prefill, decode and backward return those of the arrays that were written.
prefill: Function
prefill_workspace_size: Function
prefill_describe: Function
decode: Function  # uses no workspace
decode_describe: Function
backward: Function
backward_describe: Function
prefill_half: Function  # and phase, incoming_rows, outgoing_rows, summaries, incoming
prefill_half_workspace_size: Function
backward_half: Function  # likewise
backward_half_workspace_size: Function
fold: Function  # uses no workspace
def fwd_workspace_size(T_total: int, H: int, N: int, /) -> int: ...
def as_bfloat16(capsule: Any, /) -> Any: ...
def has_exchange(type: type, /) -> bool: ...
def any_true(question: Callable[[Any], bool], arrays: dict[str, Any], /) -> bool: ...
def backend_available(backend: int, /) -> bool: ...
def backward_available(backend: int, /) -> bool: ...  # of cpu or cuda
def cpu_levels() -> list[str]: ...
def cpu_level() -> str: ...
