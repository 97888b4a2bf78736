# SPDX-License-Identifier: MIT
"""What vLLM's CPU path lacks for Kimi Linear outside of Kimi Delta Attention: latent attention and experts come from
vllm.models.kimi_k3.nvidia, which was written for CUDA.

Each function mends one thing, says what, and does nothing where vLLM has the thing. They change vLLM for Kimi Linear
alone: those that can tell a model do so, and the others run once such a model is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def _is_kimi_linear(vllm_config: Any) -> bool:
    model = vllm_config.model_config
    return model is not None and getattr(model.hf_text_config, "model_type", None) == "kimi_linear"


# ---- Before a model is loaded --------------------------------------------------------------------


def _no_all_reduce_in_cutlass() -> None:
    """The model imports a kernel in CUTLASS's Python package, which is not there, unless this variable says no."""
    import vllm.envs

    if "VLLM_KIMI_K3_GEMM_AR" in vllm.envs.environment_variables:
        os.environ.setdefault("VLLM_KIMI_K3_GEMM_AR", "0")


def _reference_attention(vllm_config: Any) -> None:
    """On CPUs with AMX vLLM chooses AMX_MLA, whose prefill is its own. The model asks for a prefill backend, which of
    those on a CPU the reference, CPU_MLA, alone has."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if vllm_config.attention_config.backend is None and hasattr(AttentionBackendEnum, "AMX_MLA"):
        vllm_config.attention_config.backend = AttentionBackendEnum.CPU_MLA


def _blocks_of_any_multiple() -> None:
    """A block of the cache must be as large as a state, which vLLM arranges. The kernel then takes parts of 16 tokens
    of it, but CPU_MLA says of blocks above 16 that it does not take them."""
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

    (part,) = CPUMLABackend.get_supported_kernel_block_sizes()
    if not CPUMLABackend.supports_block_size(2 * part):
        CPUMLABackend.supports_block_size = classmethod(lambda cls, size: size is None or size % part == 0)


def _states_without_prefix_caching(vllm_config: Any) -> None:
    """With latent attention vLLM turns prefix caching off on a CPU, but only after it has chosen how states are cached
    with it, which it then refuses."""
    cache = vllm_config.cache_config
    if not cache.enable_prefix_caching and cache.mamba_cache_mode == "align":
        cache.mamba_cache_mode = "none"
        cache.mamba_block_size = vllm_config.model_config.max_model_len


# ---- While a model is loaded ---------------------------------------------------------------------


@contextlib.contextmanager
def _streams_that_do_nothing() -> Iterator[None]:
    """The model makes a CUDA stream, which torch's builds without CUDA refuse, and runs nothing on it on a CPU."""
    if torch.version.cuda is not None:
        yield
        return
    theirs = torch.cuda.Stream
    torch.cuda.Stream = type("Stream", (), {"__init__": lambda self, *arguments, **keywords: None})
    try:
        yield
    finally:
        torch.cuda.Stream = theirs


def _keep_kv_b_proj() -> None:
    """On a CPU a linear layer packs its weight and drops it. Latent attention reads that of kv_b_proj afterwards, and
    does not say so, as vLLM's other one does."""
    from vllm.models.kimi_k3.nvidia import mla

    layer = mla.MultiHeadLatentAttention
    theirs = layer.__init__
    if getattr(theirs, "__module__", None) == __name__:
        return

    @functools.wraps(theirs, assigned=())
    def __init__(self: Any, *arguments: Any, **keywords: Any) -> None:
        theirs(self, *arguments, **keywords)
        self.kv_b_proj._cpu_skip_gemm_dispatch = True

    layer.__init__ = __init__


def _insert(cache: Tensor, slots: Tensor, kv_c_normed: Tensor, k_pe: Tensor) -> None:
    """Latents of tokens into their slots of the cache; those below 0 are padding."""
    there = slots >= 0
    latents = torch.cat([kv_c_normed, k_pe.reshape(len(k_pe), -1)], 1)[there].to(cache.dtype)
    size = cache.shape[1]
    cache[slots[there] // size, slots[there] % size] = latents


def _key_concat(q: Tensor, k_nope: Tensor, k_pe: Tensor, kv_c_normed: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
                positions: Tensor | None = None, cos_sin_cache: Tensor | None = None) -> Tensor:
    if cos_sin_cache is not None:
        raise NotImplementedError("rotary embeddings are given to latent attention on a CPU; Kimi Linear has none")
    _insert(kv_cache, slot_mapping, kv_c_normed, k_pe)
    shared = k_pe.reshape(len(k_pe), 1, -1).expand(-1, k_nope.shape[1], -1)
    return torch.cat([k_nope, shared], -1)


def _q_concat(ql_nope: Tensor, q_pe: Tensor, kv_c_normed: Tensor, k_pe: Tensor, kv_cache: Tensor,
              slot_mapping: Tensor, *, positions: Tensor | None = None, cos_sin_cache: Tensor | None = None,
              **more: Any) -> Tensor:
    if cos_sin_cache is not None or any(value is not None and value is not False for value in more.values()):
        raise NotImplementedError("rotary embeddings or a quantised cache are asked for in latent attention on a CPU; "
                                  "expected neither")
    _insert(kv_cache, slot_mapping, kv_c_normed, k_pe)
    return torch.cat([ql_nope, q_pe], -1)


def _latents_by_torch() -> None:
    """Two operations of latent attention, which put latents into the cache, are kernels in CUDA."""
    from vllm.models.kimi_k3.nvidia import mla

    for name, ours in {"fused_mla_key_concat_kv_cache_insert": _key_concat,
                       "fused_mla_decode_q_concat_kv_cache_insert": _q_concat}.items():
        if hasattr(mla, name) and not hasattr(torch.ops._C, name.replace("fused_mla", "fused_kimi_k3_mla")):
            setattr(mla, name, ours)


def _zero_the_right_blocks(runner: Any) -> None:
    """vLLM zeroes new blocks of the cache by their numbers, which count blocks as large as a state. On a CPU it looks
    them up in a tensor of the kernel's blocks of 16 tokens, and so zeroes other sequences' latents."""

    def zero(block_ids: list[int]) -> None:
        for group in runner.kv_cache_config.kv_cache_groups:
            for name in group.layer_names:
                cache = runner.compilation_config.static_forward_context[name].kv_cache
                if isinstance(cache, Tensor):  # latents; states are a pair
                    parts = group.kv_cache_spec.block_size // cache.shape[1]
                    for block in block_ids:
                        cache[block * parts:(block + 1) * parts].zero_()

    runner._zero_block_ids = zero


# ---- When they run -------------------------------------------------------------------------------


def install() -> None:
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    _no_all_reduce_in_cutlass()
    check, load = CpuPlatform.check_and_update_config.__func__, CPUModelRunner.load_model

    @functools.wraps(check)
    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        if not _is_kimi_linear(vllm_config):
            return check(cls, vllm_config)
        _reference_attention(vllm_config)
        _blocks_of_any_multiple()
        check(cls, vllm_config)
        _states_without_prefix_caching(vllm_config)

    @functools.wraps(load)
    def load_model(self: Any, *arguments: Any, **keywords: Any) -> None:
        if not _is_kimi_linear(self.vllm_config):
            return load(self, *arguments, **keywords)
        _blocks_of_any_multiple()
        _keep_kv_b_proj()
        _latents_by_torch()
        _zero_the_right_blocks(self)
        with _streams_that_do_nothing():
            load(self, *arguments, **keywords)

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    CPUModelRunner.load_model = load_model
