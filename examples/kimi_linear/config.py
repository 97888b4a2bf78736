# SPDX-License-Identifier: MIT
"""The shapes of a Kimi Linear model, under the names of its published config.json."""

from __future__ import annotations

import dataclasses
import json
import pathlib


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    full_attn_layers: tuple[int, ...]  # those with MLA, counted from 1; the others have KDA
    # MLA
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int  # without a rotation: the model has no position embeddings
    v_head_dim: int
    # KDA
    linear_num_heads: int
    linear_head_dim: int
    # Feed-forward: dense in the first layers, then experts
    intermediate_size: int
    first_k_dense_replace: int
    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    rms_norm_eps: float

    def with_mla_alone(self) -> Config:
        """The same model with MLA in every layer."""
        return dataclasses.replace(self, full_attn_layers=tuple(range(1, self.num_hidden_layers + 1)))


# moonshotai/Kimi-Linear-48B-A3B-Base and -Instruct
KIMI_LINEAR_48B = Config(
    vocab_size=163840, hidden_size=2304, num_hidden_layers=27, full_attn_layers=(4, 8, 12, 16, 20, 24, 27),
    num_attention_heads=32, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    linear_num_heads=32, linear_head_dim=128, intermediate_size=9216, first_k_dense_replace=1, num_experts=256,
    num_experts_per_token=8, num_shared_experts=1, moe_intermediate_size=1024, routed_scaling_factor=2.446,
    rms_norm_eps=1e-5)

# Everything that the published one has, in a few hundred thousand weights.
TINY = Config(
    vocab_size=256, hidden_size=64, num_hidden_layers=5, full_attn_layers=(4, 5), num_attention_heads=2,
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, linear_num_heads=2, linear_head_dim=32,
    intermediate_size=128, first_k_dense_replace=1, num_experts=8, num_experts_per_token=2, num_shared_experts=1,
    moe_intermediate_size=32, routed_scaling_factor=2.446, rms_norm_eps=1e-5)

# What a config.json may say that this model does not do otherwise.
_FIXED = {"architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "hidden_act": "silu", "q_lora_rank": None, "mla_use_nope": True,
          "moe_layer_freq": 1, "moe_renormalize": True, "moe_router_activation_func": "sigmoid", "num_expert_group": 1,
          "tie_word_embeddings": False}
_FIXED_LINEAR = {"short_conv_kernel_size": 4, "gate_lower_bound": None}


def read(path: pathlib.Path) -> Config:
    """The configuration in a config.json as it is published."""
    given = json.loads(path.read_text())
    linear = given["linear_attn_config"]
    for section, fixed in ((given, _FIXED), (linear, _FIXED_LINEAR)):
        for name, value in fixed.items():
            if section.get(name, value) != value:
                raise ValueError(f"{path}: {name} is {section[name]!r}; expected {value!r}")
    layers = sorted(linear["kda_layers"] + linear["full_attn_layers"])
    if layers != list(range(1, given["num_hidden_layers"] + 1)):
        raise ValueError(f"{path}: kda_layers and full_attn_layers together are {layers}; "
                         f"expected every layer from 1 to {given['num_hidden_layers']} once")
    own = {"full_attn_layers": tuple(linear["full_attn_layers"]), "linear_num_heads": linear["num_heads"],
           "linear_head_dim": linear["head_dim"]}
    return Config(**own, **{field.name: given[field.name] for field in dataclasses.fields(Config)
                            if field.name not in own})


def write(config: Config, path: pathlib.Path) -> None:
    """A config.json that read() and other programs read."""
    given = dataclasses.asdict(config)
    full = given.pop("full_attn_layers")
    kda = [layer for layer in range(1, config.num_hidden_layers + 1) if layer not in full]
    linear = {"kda_layers": kda, "full_attn_layers": list(full), "num_heads": given.pop("linear_num_heads"),
              "head_dim": given.pop("linear_head_dim"), **_FIXED_LINEAR}
    given |= {**_FIXED, "num_key_value_heads": config.num_attention_heads, "linear_attn_config": linear}
    path.write_text(json.dumps(given, indent=2) + "\n")
