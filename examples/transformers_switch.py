# SPDX-License-Identifier: MIT
"""One line puts transformers' Kimi Linear on libflashkda, with fla installed or without.

usage: python examples/transformers_switch.py [--device cpu|cuda] [--checkpoint FOLDER]     (pip install transformers)

The model is tiny and random, or the checkpoint's. Its logits are compared with those of the loop of torch's operations
that transformers has for machines without fla.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import time
from typing import Any

import libflashkda
import torch

os.environ["USE_HUB_KERNELS"] = "NO"  # with it, where `kernels` is installed, transformers hides its loop

try:
    from transformers import KimiLinearConfig, KimiLinearForCausalLM
    from transformers.models.kimi_linear import modeling_kimi_linear as modeling
except ImportError as error:
    sys.exit(f"this example needs transformers 5.19 or later: {error}")

NAMES = "chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"
THEIRS = {name: getattr(modeling, name) for name in NAMES}

libflashkda.transformers.register()  # the line

OURS = {name: getattr(modeling, name) for name in NAMES}

# Both round fp32 on their own.
TOLERANCE = 1e-4


def tiny() -> KimiLinearForCausalLM:
    """Three layers of KDA to one of latent attention, with experts, as Kimi Linear has them."""
    config = KimiLinearConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=8,
        num_local_experts=8, num_experts_per_tok=2, n_shared_experts=1, num_attention_heads=4, num_key_value_heads=4,
        kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, linear_head_dim=128, linear_num_heads=4,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(config)
    with torch.no_grad():  # weights so large that every token is another
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name and "A_log" not in name:
                parameter.normal_(0, 0.4 if "conv" in name else 0.08)
    return model


def run(model: KimiLinearForCausalLM, tokens: torch.Tensor,
        functions: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Logits of the tokens, sixteen tokens that follow a part of them, and seconds for the logits."""
    for name, function in functions.items():
        setattr(modeling, name, function)
    with torch.inference_mode():
        start = time.perf_counter()
        logits = model(tokens).logits
        seconds = time.perf_counter() - start
        prompt = tokens[:, :100]
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False,
                             eos_token_id=None)
    return logits.double(), out[:, 100:], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint", metavar="FOLDER")
    given = parser.parse_args()
    model = tiny() if given.checkpoint is None else KimiLinearForCausalLM.from_pretrained(given.checkpoint)
    model = model.eval().to(given.device)
    tokens = torch.randint(3, model.config.vocab_size, (2, 200), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(given.device)
    library = inspect.getclosurevars(THEIRS[NAMES[0]]).nonlocals["implementation"].__module__
    print(f"without the line transformers would run {library}")
    ours, our_tokens, our_seconds = run(model, tokens, OURS)
    loop = {name: inspect.unwrap(function) for name, function in THEIRS.items()}
    theirs, their_tokens, their_seconds = run(model, tokens, loop)
    error = ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()
    print(f"{tokens.numel()} tokens in {our_seconds:.2f} s, {their_seconds:.2f} s by the loop; error ratio {error:.1e}, "
          f"at most {TOLERANCE:.0e}")
    same = torch.equal(our_tokens, their_tokens)
    print(f"on {given.device}: {'the same tokens as' if same else 'other tokens than'} transformers' own loop")
    sys.exit(error > TOLERANCE or not same)


if __name__ == "__main__":
    main()
