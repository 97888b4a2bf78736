# SPDX-License-Identifier: MIT
"""A tiny Kimi Linear with random weights, as a checkpoint under the published names, which engines load."""

from __future__ import annotations

import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples" / "kimi_linear"), str(ROOT / "tests" / "python")]

import checkpoint  # noqa: E402
import config  # noqa: E402
import torch  # noqa: E402
from kimi_linear_plain import randomise  # noqa: E402
from model import Model  # noqa: E402

# Latents of 512 + 64 numbers, which vLLM's latent attention on a CPU needs.
SHAPES = config.Config(
    vocab_size=512, hidden_size=128, num_hidden_layers=5, full_attn_layers=(4, 5), num_attention_heads=2,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, linear_num_heads=2, linear_head_dim=128,
    intermediate_size=256, first_k_dense_replace=1, num_experts=8, num_experts_per_token=2, num_shared_experts=1,
    moe_intermediate_size=64, routed_scaling_factor=2.446, rms_norm_eps=1e-5)


def write(folder: str | pathlib.Path) -> None:
    model = Model(SHAPES, "cpu", torch.float32)
    randomise(model, spread=0.1)
    checkpoint.save(model, folder)


if __name__ == "__main__":
    write(sys.argv[1])
