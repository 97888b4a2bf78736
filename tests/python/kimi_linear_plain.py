# SPDX-License-Identifier: MIT
"""Kimi Linear as it is defined, in fp64 and token by token, on tensors under their published names."""

from __future__ import annotations

import torch
from torch.nn import functional


@torch.inference_mode()
def randomise(model, spread: float = 0.15) -> None:
    """Weights so large that every part of a layer moves the logits, norms that are not 1, a router that has a bias."""
    model.randomise(spread=spread)
    for name, tensor in model.public():
        if "norm" in name:
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("e_score_correction_bias"):
            tensor.normal_(0, 0.1)


class Plain:
    def __init__(self, config, tensors: dict[str, torch.Tensor]):
        self.config, self.tensors = config, {name: tensor.double().cpu() for name, tensor in tensors.items()}

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[T, vocabulary]"""
        x, config = self.tensors["model.embed_tokens.weight"][tokens], self.config
        for n in range(config.num_hidden_layers):
            layer = f"model.layers.{n}."
            mixer = self.mla if n + 1 in config.full_attn_layers else self.kda
            x = x + mixer(self.norm(x, layer + "input_layernorm"), layer + "self_attn.")
            after = self.norm(x, layer + "post_attention_layernorm")
            x = x + (self.mlp(after, layer + "mlp.{}_proj") if n < config.first_k_dense_replace
                     else self.experts(after, layer + "block_sparse_moe."))
        return self.linear(self.norm(x, "model.norm"), "lm_head")

    def generate(self, tokens: list[int], count: int) -> list[int]:
        tokens = list(tokens)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[-count:]

    def linear(self, x, name):
        return x @ self.tensors[name + ".weight"].T + self.tensors.get(name + ".bias", 0)

    def norm(self, x, name, eps=None):
        return functional.rms_norm(x, x.shape[-1:], self.tensors[name + ".weight"],
                                   self.config.rms_norm_eps if eps is None else eps)

    def mlp(self, x, names):
        gate, up = self.linear(x, names.format("gate")), self.linear(x, names.format("up"))
        return self.linear(functional.silu(gate) * up, names.format("down"))

    def experts(self, x, name):
        out = []
        for token in x:
            scores = self.linear(token, name + "gate").sigmoid()
            chosen = (scores + self.tensors[name + "gate.e_score_correction_bias"]).topk(
                self.config.num_experts_per_token).indices.tolist()
            sum_of_chosen = scores[chosen].sum()
            y = self.mlp(token, name + "shared_experts.{}_proj")
            for e in chosen:
                expert = f"{name}experts.{e}."
                inner = functional.silu(self.linear(token, expert + "w1")) * self.linear(token, expert + "w3")
                share = self.config.routed_scaling_factor * scores[e] / sum_of_chosen
                y = y + share * self.linear(inner, expert + "w2")
            out.append(y)
        return torch.stack(out)

    def convolved(self, x, name):
        """The last four inputs of every channel, weighted."""
        x = functional.pad(self.linear(x, name + "_proj"), (0, 0, 3, 0))
        taps = self.tensors[name + "_conv1d.weight"][:, 0]
        return functional.silu(sum(taps[:, i] * x[i:len(x) - 3 + i] for i in range(4)))

    def kda(self, x, name):
        heads, dim = self.config.linear_num_heads, self.config.linear_head_dim
        q, k, v = (self.convolved(x, name + letter).view(-1, heads, dim) for letter in "qkv")
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        raw = self.linear(self.linear(x, name + "f_a_proj"), name + "f_b_proj") + self.tensors[name + "dt_bias"]
        rate = self.tensors[name + "A_log"].view(heads, 1).exp()
        decay = (-rate * functional.softplus(raw.view(-1, heads, dim))).exp()
        beta = self.linear(x, name + "b_proj").sigmoid()
        S, out = x.new_zeros(heads, dim, dim), torch.empty_like(v)
        for t in range(len(x)):
            S = decay[t, :, :, None] * S
            u = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", S, k[t]))
            S = S + k[t, :, :, None] * u[:, None]
            out[t] = torch.einsum("hkv,hk->hv", S, q[t]) * dim ** -0.5
        gate = self.linear(self.linear(x, name + "g_a_proj"), name + "g_b_proj").view_as(out)
        return self.linear((self.norm(out, name + "o_norm") * gate.sigmoid()).flatten(1), name + "o_proj")

    def mla(self, x, name):
        config = self.config
        heads, nope, rest = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        q = self.linear(x, name + "q_proj").view(-1, heads, nope + rest)
        latent, shared = self.linear(x, name + "kv_a_proj_with_mqa").split([config.kv_lora_rank, rest], 1)
        latent = self.norm(latent, name + "kv_a_layernorm", 1e-6)
        k, v = self.linear(latent, name + "kv_b_proj").view(-1, heads, nope + config.v_head_dim).split(
            [nope, config.v_head_dim], 2)
        k = torch.cat([k, shared[:, None].expand(-1, heads, -1)], 2)
        scores = torch.einsum("thd,shd->hts", q, k) * (nope + rest) ** -0.5
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return self.linear(torch.einsum("hts,shd->thd", weights, v).flatten(1), name + "o_proj")
