# SPDX-License-Identifier: MIT
"""Kimi Linear: layers of Kimi Delta Attention on libflashkda and of MLA, each followed by experts.

A prompt goes in sequence by sequence, in chunks, into a slot of a cache (prefill). Then all slots go on together, a
token each (decode). Row n of a decode is slot n.
"""

from __future__ import annotations

import contextlib
import math
from typing import Iterator

import libflashkda
import torch
from torch import nn
from torch.nn import functional

import attention
from config import Config

PAST = 3  # inputs that a short convolution of width 4 remembers
LATENT_EPS = 1e-6  # of MLA's inner norm, whatever the other norms have

Named = Iterator[tuple[str, torch.Tensor]]


def weight(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def rows(matrix: torch.Tensor, names: list[str], sizes: list[int]) -> Named:
    """Names of the parts of a matrix that stands for several, one below another."""
    return ((f"{name}.weight", part) for name, part in zip(names, matrix.split(sizes)))


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


class Norm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = weight(size), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


# ---- Kimi Delta Attention ------------------------------------------------------------------------


class KDACache:
    """What a KDA layer remembers of the sequences in its slots; the size does not depend on their lengths."""

    def __init__(self, slots: int, heads: int, dim: int):
        self.state = torch.zeros(slots, heads, dim, dim, dtype=torch.float32)  # V first
        self.inputs = torch.zeros(slots, PAST, 3 * heads * dim)  # of the convolutions of q, k and v

    def clear(self, slot: int) -> None:
        self.state[slot] = 0
        self.inputs[slot] = 0

    def tensors(self) -> list[torch.Tensor]:
        return [self.state, self.inputs]


class KDA(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.dim, self.eps = config.linear_num_heads, config.linear_head_dim, config.rms_norm_eps
        self.inner = self.heads * self.dim
        # q, k and v; what the decay and the output's gate come from; beta. One product reads the input once.
        self.sizes = [self.inner] * 3 + [self.dim, self.dim, self.heads]
        self.in_proj = weight(sum(self.sizes), config.hidden_size)
        self.conv = weight(3 * self.inner, PAST + 1)
        self.f_b_proj = weight(self.inner, self.dim)
        self.g_b_proj = weight(self.inner, self.dim)
        self.A_log = weight(self.heads, dtype=torch.float32)
        self.dt_bias = weight(self.heads, self.dim, dtype=torch.float32)
        self.norm = weight(self.dim)
        self.o_proj = weight(config.hidden_size, self.inner)

    def public(self) -> Named:
        """Parameters under the names of the published checkpoint."""
        yield from rows(self.in_proj, ["q_proj", "k_proj", "v_proj", "f_a_proj", "g_a_proj", "b_proj"], self.sizes)
        yield from rows(self.conv[:, None], ["q_conv1d", "k_conv1d", "v_conv1d"], self.sizes[:3])
        yield "f_b_proj.weight", self.f_b_proj
        yield "g_b_proj.weight", self.g_b_proj
        yield "A_log", self.A_log[None, None, :, None]
        yield "dt_bias", self.dt_bias.view(-1)
        yield "o_norm.weight", self.norm
        yield "o_proj.weight", self.o_proj

    def randomise(self) -> None:
        self.conv.uniform_(-0.5, 0.5)
        self.A_log.uniform_(1, 16).log_()
        step = torch.empty_like(self.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias.copy_(step.expm1().log())  # the softplus of it is the step
        self.norm.fill_(1)

    def cache(self, slots: int, tokens: int) -> KDACache:
        return KDACache(slots, self.heads, self.dim)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v before their convolutions [.., 3 H D]; raw decay and output's gate [.., H, D]; raw beta [.., H]"""
        qkv, f, g, beta = functional.linear(x, self.in_proj).split([3 * self.inner, *self.sizes[3:]], -1)
        decay, gate = functional.linear(f, self.f_b_proj), functional.linear(g, self.g_b_proj)
        return qkv, self.by_head(decay), self.by_head(gate), beta

    def by_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.dim))

    def options(self) -> dict:
        return {"A_log": self.A_log, "dt_bias": self.dt_bias, "gate": "softplus", "beta_mode": "sigmoid",
                "qk_norm": True}

    def prefill(self, x: torch.Tensor, cache: KDACache, slot: int, first: int) -> torch.Tensor:
        """x [T, hidden], the tokens from `first` on."""
        qkv, decay, gate, beta = self.project(x)
        qkv = torch.cat([cache.inputs[slot], qkv])
        cache.inputs[slot] = qkv[-PAST:]
        qkv = functional.silu(functional.conv1d(qkv.T[None], self.conv[:, None], groups=len(self.conv)))
        q, k, v = self.by_head(qkv.mT.contiguous()).split(self.heads, 2)
        state = cache.state[slot:slot + 1]
        out, _ = libflashkda.prefill(q, k, v, decay[None], beta[None], initial_state=state, final_state=state,
                                     **self.options())
        out = functional.rms_norm(out[0].float(), self.norm.shape, self.norm.float(), self.eps) * gate.float().sigmoid()
        return functional.linear(out.to(x.dtype).flatten(1), self.o_proj)

    def decode(self, x: torch.Tensor, cache: KDACache, batch: Batch) -> torch.Tensor:
        """x [B, hidden]: a token of each slot. Convolutions, recurrence and gated norm are one call."""
        qkv, decay, gate, beta = self.project(x[:, None])
        q, k, v = self.by_head(qkv).split(self.heads, 2)
        q_conv, k_conv, v_conv = ((taps, None, inputs.mT) for taps, inputs in zip(
            self.conv.split(self.inner), cache.inputs.split(self.inner, 2)))
        out = libflashkda.decode(q, k, v, decay, beta, cache.state, state_indices=batch.slots, q_conv=q_conv,
                                 k_conv=k_conv, v_conv=v_conv, norm_weight=self.norm, norm_gate=gate,
                                 norm_eps=self.eps, **self.options())
        return functional.linear(out.flatten(1), self.o_proj)


# ---- Multi-head latent attention -----------------------------------------------------------------


class MLACache:
    """A latent and a part of the keys, for every token."""

    def __init__(self, slots: int, tokens: int, width: int):
        self.latent = torch.zeros(slots, -(-tokens // attention.PIECE) * attention.PIECE, width)

    def clear(self, slot: int) -> None:
        pass  # nothing is read that was not written since

    def tensors(self) -> list[torch.Tensor]:
        return [self.latent]


class MLA(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.rank = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rest, self.values = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.scale = (self.nope + self.rest) ** -0.5
        # q, then the latent and the part of the keys that all heads share.
        self.sizes = [self.heads * (self.nope + self.rest), self.rank + self.rest]
        self.in_proj = weight(sum(self.sizes), config.hidden_size)
        self.norm = Norm(self.rank, LATENT_EPS)
        self.kv_b_proj = weight(self.heads * (self.nope + self.values), self.rank)
        self.o_proj = weight(config.hidden_size, self.heads * self.values)

    def public(self) -> Named:
        yield from rows(self.in_proj, ["q_proj", "kv_a_proj_with_mqa"], self.sizes)
        yield "kv_a_layernorm.weight", self.norm.weight
        yield "kv_b_proj.weight", self.kv_b_proj
        yield "o_proj.weight", self.o_proj

    def randomise(self) -> None:
        self.norm.weight.fill_(1)

    def cache(self, slots: int, tokens: int) -> MLACache:
        return MLACache(slots, tokens, self.rank + self.rest)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q [T, H, nope + rest], and what the cache keeps of each token [T, rank + rest]."""
        q, latent = functional.linear(x, self.in_proj).split(self.sizes, -1)
        return (q.unflatten(-1, (self.heads, -1)),
                torch.cat([self.norm(latent[..., :self.rank]), latent[..., self.rank:]], -1))

    def prefill(self, x: torch.Tensor, cache: MLACache, slot: int, first: int) -> torch.Tensor:
        """x [T, hidden], the tokens from `first` on. Keys and values of all tokens so far are made of their latents."""
        q, latent = self.project(x)
        cache.latent[slot, first:first + len(x)] = latent
        latent = cache.latent[slot, :first + len(x)]
        keys, values = functional.linear(latent[:, :self.rank], self.kv_b_proj).unflatten(
            1, (self.heads, -1)).split([self.nope, self.values], -1)
        keys = torch.cat([keys, latent[:, None, self.rank:].expand(-1, self.heads, -1)], -1)
        out = attention.prefill(*(y.transpose(0, 1)[None] for y in (q, keys, values)), self.scale)
        return functional.linear(out[0].transpose(0, 1).flatten(1), self.o_proj)

    def decode(self, x: torch.Tensor, cache: MLACache, batch: Batch) -> torch.Tensor:
        """x [B, hidden]. kv_b_proj goes to the queries and to the outputs instead of to the keys and values."""
        q, latent = self.project(x)
        cache.latent[batch.row, batch.position] = latent
        to_keys, to_values = self.kv_b_proj.unflatten(0, (self.heads, -1)).split([self.nope, self.values], 1)
        absorbed = torch.bmm(q[..., :self.nope].transpose(0, 1), to_keys).transpose(0, 1)
        out = batch.attend(torch.cat([absorbed, q[..., self.nope:]], -1), cache.latent, batch.lengths, self.rank,
                           self.scale)
        out = torch.bmm(out.transpose(0, 1), to_values.mT).transpose(0, 1)
        return functional.linear(out.flatten(1), self.o_proj)


# ---- Feed-forward --------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_up, self.down = weight(2 * inner, hidden), weight(hidden, inner)

    def public(self) -> Named:
        yield from rows(self.gate_up, ["gate_proj", "up_proj"], [len(self.gate_up) // 2] * 2)
        yield "down_proj.weight", self.down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(swiglu(functional.linear(x, self.gate_up)), self.down)


class Experts(nn.Module):
    """Each token goes to the few experts that its router scores highest, and to the shared ones."""

    def __init__(self, config: Config):
        super().__init__()
        count, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.chosen, self.factor = config.num_experts_per_token, config.routed_scaling_factor
        self.gate = weight(count, hidden, dtype=torch.float32)  # scores are fp32
        self.bias = weight(count, dtype=torch.float32)  # counts for the choice alone
        self.gate_up, self.down = weight(count, 2 * inner, hidden), weight(count, hidden, inner)
        self.shared = MLP(hidden, config.num_shared_experts * inner)

    def public(self) -> Named:
        yield "gate.weight", self.gate
        yield "gate.e_score_correction_bias", self.bias
        for e, (gate_up, down) in enumerate(zip(self.gate_up, self.down)):
            yield from rows(gate_up, [f"experts.{e}.w1", f"experts.{e}.w3"], [len(gate_up) // 2] * 2)
            yield f"experts.{e}.w2.weight", down
        yield from ((f"shared_experts.{name}", tensor) for name, tensor in self.shared.public())

    def randomise(self) -> None:
        self.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden]. Rows are sorted by expert, so that each expert's are one matrix product of a group."""
        scores = functional.linear(x.float(), self.gate).sigmoid()
        chosen = (scores + self.bias).topk(self.chosen).indices
        shares = scores.gather(1, chosen)
        shares = shares / (shares.sum(1, keepdim=True) + 1e-20) * self.factor
        by_expert, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(by_expert, torch.arange(len(self.gate), device=x.device), right=True, out_int32=True)
        y = swiglu(functional.grouped_mm(x[order // self.chosen], self.gate_up.mT, offs=ends))
        y = functional.grouped_mm(y, self.down.mT, offs=ends)
        routed = torch.empty_like(y)
        routed[order] = y
        routed = torch.bmm(shares[:, None], routed.unflatten(0, (-1, self.chosen)).float())[:, 0]
        return routed.to(x.dtype) + self.shared(x)


# ---- The model -----------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, config: Config, number: int):
        """number: from 1."""
        super().__init__()
        self.before_mixer = Norm(config.hidden_size, config.rms_norm_eps)
        self.mixer = MLA(config) if number in config.full_attn_layers else KDA(config)
        self.before_feed_forward = Norm(config.hidden_size, config.rms_norm_eps)
        dense = number <= config.first_k_dense_replace
        self.feed_forward = MLP(config.hidden_size, config.intermediate_size) if dense else Experts(config)

    def public(self) -> Named:
        feed_forward = "mlp" if isinstance(self.feed_forward, MLP) else "block_sparse_moe"
        yield "input_layernorm.weight", self.before_mixer.weight
        yield "post_attention_layernorm.weight", self.before_feed_forward.weight
        yield from ((f"self_attn.{name}", tensor) for name, tensor in self.mixer.public())
        yield from ((f"{feed_forward}.{name}", tensor) for name, tensor in self.feed_forward.public())


class Batch:
    """The rows of a decode and what all layers ask of them. Its tensors stay where they are, for a CUDA graph."""

    def __init__(self, slots: int, attend: attention.Decode):
        self.attend = attend
        self.row = torch.arange(slots)
        self.slots = torch.full((slots,), -1, dtype=torch.int32)  # -1: nobody is there, the row is padding
        self.position = torch.zeros(slots, dtype=torch.int64)  # of the token that goes in
        self.lengths = torch.ones(slots, dtype=torch.int32)  # with it


class Cache:
    """Room for so many sequences of so many tokens."""

    def __init__(self, model: Model, slots: int, tokens: int, attend: attention.Decode = attention.matmul):
        """attend: how MLA decodes, one of attention.ways()."""
        self.tokens = tokens
        self.filled: list[int | None] = [None] * slots  # tokens of each sequence; None: nobody is there
        with model.memory():
            self.layers = [layer.mixer.cache(slots, tokens) for layer in model.layers]
            self.batch = Batch(slots, attend)

    def nbytes(self) -> int:
        """Of what layers remember."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors())

    def begin(self, slot: int) -> None:
        """A new sequence in a slot."""
        for layer in self.layers:
            layer.clear(slot)
        self.batch.slots[slot] = slot
        self.place(slot, 0)

    def leave(self, slot: int) -> None:
        """Nobody is in the slot any more. Its row of a decode is padding."""
        self.place(slot, 0)
        self.filled[slot] = None
        self.batch.slots[slot] = -1

    def place(self, slot: int, filled: int) -> None:
        """The sequence in a slot has so many tokens."""
        self.filled[slot] = filled
        self.batch.position[slot] = filled
        self.batch.lengths[slot] = filled + 1

    def there(self) -> list[int]:
        """The slots where somebody is."""
        return [slot for slot, filled in enumerate(self.filled) if filled is not None]

    def check_room(self, slot: int, more: int) -> None:
        filled = self.filled[slot]
        if filled is None:
            raise ValueError(f"nobody is in slot {slot}; expected begin({slot}) first")
        if filled + more > self.tokens:
            raise ValueError(f"slot {slot} has {filled} tokens and gets {more} more; "
                             f"the cache has room for {self.tokens}")


class Model(nn.Module):
    def __init__(self, config: Config, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16):
        """Weights are undefined: checkpoint.load() or randomise() sets them."""
        super().__init__()
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        with self.memory():
            self.embedding = weight(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(Layer(config, number + 1) for number in range(config.num_hidden_layers))
            self.norm = Norm(config.hidden_size, config.rms_norm_eps)
            self.head = weight(config.vocab_size, config.hidden_size)

    @contextlib.contextmanager
    def memory(self) -> Iterator[None]:
        """New tensors are on the model's device, and of its dtype where none is named."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                yield
        finally:
            torch.set_default_dtype(before)

    def public(self) -> Named:
        """All parameters, or their parts, under the names and with the shapes of the published checkpoint."""
        yield "model.embed_tokens.weight", self.embedding
        for number, layer in enumerate(self.layers):
            yield from ((f"model.layers.{number}.{name}", tensor) for name, tensor in layer.public())
        yield "model.norm.weight", self.norm.weight
        yield "lm_head.weight", self.head

    @torch.inference_mode()
    def randomise(self, seed: int = 0, spread: float = 0.02) -> None:
        torch.manual_seed(seed)
        for parameter in self.parameters():
            parameter.normal_(0, spread)
        for module in self.modules():
            if isinstance(module, Norm):
                module.weight.fill_(1)
            elif hasattr(module, "randomise") and module is not self:
                module.randomise()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.norm(hidden), self.head)

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, cache: Cache, slot: int) -> torch.Tensor:
        """Hidden states [T, hidden] of the next tokens [T] of a slot's sequence, in one chunk."""
        cache.check_room(slot, len(tokens))
        first = cache.filled[slot]
        x = self.embedding[tokens]
        for layer, memory in zip(self.layers, cache.layers):
            x = x + layer.mixer.prefill(layer.before_mixer(x), memory, slot, first)
            x = x + layer.feed_forward(layer.before_feed_forward(x))
        cache.place(slot, first + len(tokens))
        return x

    @torch.inference_mode()
    def prefill(self, tokens: torch.Tensor, cache: Cache, slot: int, chunk: int = 8192) -> torch.Tensor:
        """Logits [vocabulary] after the last of the tokens [T], which go in by chunks."""
        for part in tokens.split(chunk):
            hidden = self(part, cache, slot)
        return self.logits(hidden[-1])

    def step(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Logits [B, vocabulary] after a token [B] of every slot. What a CUDA graph holds: no tensor that goes in or
        comes out lies elsewhere next time, and the host neither reads nor decides anything."""
        x = self.embedding[tokens]
        for layer, memory in zip(self.layers, cache.layers):
            x = x + layer.mixer.decode(layer.before_mixer(x), memory, cache.batch)
            x = x + layer.feed_forward(layer.before_feed_forward(x))
        return self.logits(x)
