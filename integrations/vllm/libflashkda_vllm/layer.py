# SPDX-License-Identifier: MIT
"""vLLM's KimiGatedDeltaNetAttention between its projections: convolutions, recurrence and gated norm.

Projections, weights, states and metadata are vLLM's. States are [slots, H, V, K], and those of the convolutions of q, k
and v lie side by side in [slots, 3 H D, 3] or its transpose. Slot 0 is vLLM's padding.
"""

from __future__ import annotations

from typing import Any

import libflashkda
import torch
from libflashkda._C import MAX_DECODE_TOKENS
from torch import Tensor
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context
from vllm.model_executor.custom_op import PluggableLayer
from vllm.model_executor.layers.mamba.gdn import kimi_gdn_linear_attn as theirs
from vllm.platforms import current_platform

NAME = "KimiGatedDeltaNetAttention"
PADDING = 0


class FlashKDAAttention(theirs.KimiGatedDeltaNetAttention):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        if self.num_spec and current_platform.is_cpu():
            raise NotImplementedError("speculative decoding is asked for on a CPU, where vLLM's convolution does not "
                                      "know which drafts were accepted; expected num_speculative_tokens 0")
        if self.num_spec >= MAX_DECODE_TOKENS:
            raise ValueError(f"num_speculative_tokens is {self.num_spec}; expected at most {MAX_DECODE_TOKENS - 1}")

    @eager_break_during_capture
    def _forward(self, mixed_qkv: Tensor, g1: Tensor, g2: Tensor, beta: Tensor, core_attn_out: Tensor) -> None:
        """mixed_qkv [T, 3 H D], g1 (raw gate) [1, T, H, D], g2 (the norm's) [T, H, D], beta (raw) [1, T, H];
        core_attn_out [1, T, H, D] is written."""
        metadata = get_forward_context().attn_metadata
        m = metadata.get(self.prefix) if isinstance(metadata, dict) else None
        if m is None:  # a run that measures memory
            return
        rows = m.num_actual_tokens
        inputs = (mixed_qkv[:rows], g1[0, :rows], g2[:rows], beta[0, :rows])
        out = core_attn_out[0, :rows]
        if m.spec_sequence_masks is None:
            self._prefill_or_decode(m, inputs, out)
        elif m.num_prefills == 0:
            self._verify(m, inputs, out)
        else:
            for run, index in (self._verify, m.spec_token_indx), (self._prefill_or_decode, m.non_spec_token_indx):
                part = torch.empty_like(out[:len(index)])
                run(m, tuple(x.index_select(0, index) for x in inputs), part)
                out.index_copy_(0, index.long(), part)

    def _prefill_or_decode(self, m: Any, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        mixed_qkv, g, norm_gate, beta = inputs
        state = self.kv_cache[1]
        slots = m.non_spec_state_indices_tensor
        q, k, v = self._heads(mixed_qkv)
        if m.num_prefills == 0:
            rows = len(out)
            libflashkda.decode(
                q[:, None], k[:, None], v[:, None], g[:, None], beta[:, None], state, **self._gates(),
                **self._convolutions(), **self._norm(norm_gate[:, None]), state_indices=slots[:rows], padding_slot=PADDING, out=out[:, None])
            return
        libflashkda.prefill(
            q[None], k[None], v[None], g[None], beta[None], **self._gates(), **self._convolutions(),
            **self._norm(norm_gate[None]), cu_seqlens=m.non_spec_query_start_loc, initial_state=state,
            final_state=state, state_indices=slots, has_initial_state=m.has_initial_state, padding_slot=PADDING, out=out[None])

    def _heads(self, mixed_qkv: Tensor) -> list[Tensor]:
        """q, k and v [T, H, D], rows of which are as far apart as those of mixed_qkv."""
        return [x.unflatten(1, (self.local_num_heads, self.head_dim))
                for x in mixed_qkv.split(self.local_projection_size, 1)]

    def _gates(self) -> dict[str, Any]:
        bound = self.gate_lower_bound
        gate = {"gate": "softplus"} if bound is None else {"gate": "sigmoid", "lower_bound": bound}
        return {**gate, "A_log": self.A_log, "dt_bias": self.dt_bias.view(self.local_num_heads, self.head_dim),
                "beta_mode": "sigmoid", "qk_norm": True}

    def _convolution_states(self) -> Tensor:
        """[slots, 3 H D, 3 and as many more as there are drafts]"""
        states = self.kv_cache[0]
        return states if theirs.is_conv_state_dim_first() else states.transpose(-1, -2)

    def _convolutions(self) -> dict[str, Any]:
        weights = self.conv1d.weight.squeeze(1)
        states = self._convolution_states()[..., :self.conv_size - 1]
        size = self.local_projection_size
        parts = zip(("q_conv", "k_conv", "v_conv"), weights.split(size), states.split(size, 1), strict=True)
        return {name: (weight, None, state) for name, weight, state in parts}

    def _norm(self, gate: Tensor) -> dict[str, Any]:
        return {"norm_weight": self.o_norm.weight, "norm_gate": gate, "norm_activation": "sigmoid",
                "norm_eps": self.o_norm.eps}

    def _verify(self, m: Any, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        """Drafts: a state after each token in a slot of its own. The convolutions' states are longer instead, which
        vLLM knows how to shift."""
        mixed_qkv, g, norm_gate, beta = inputs
        slots, sequences = m.spec_state_indices_tensor, m.num_spec_decodes
        mixed_qkv = theirs.causal_conv1d_update(
            mixed_qkv, self._convolution_states(), self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu",
            conv_state_indices=slots[:sequences, 0], num_accepted_tokens=m.num_accepted_tokens,
            query_start_loc=m.spec_query_start_loc, max_query_len=slots.shape[1], validate_data=False,
            out=torch.empty_like(mixed_qkv, memory_format=torch.contiguous_format))
        q, k, v = self._heads(mixed_qkv)
        libflashkda.decode(
            q[None], k[None], v[None], g[None], beta[None], self.kv_cache[1], **self._gates(),
            **self._norm(norm_gate[None]), cu_seqlens=m.spec_query_start_loc[:sequences + 1], max_tokens=slots.shape[1],
            state_indices=slots[:sequences], num_accepted_tokens=m.num_accepted_tokens[:sequences],
            padding_slot=PADDING, out=out[None])


def install() -> None:
    PluggableLayer.register_oot(name=NAME)(FlashKDAAttention)
