# SPDX-License-Identifier: MIT
"""One line puts flash-linear-attention's chunk_kda, and with it fla's KDA layer, on libflashkda.

usage: python examples/fla_switch.py [--device cpu|cuda]      (pip install flash-linear-attention)

On a GPU the result is compared with that of fla's own kernels. On a CPU fla has none.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

import libflashkda
import torch

try:
    from fla.ops.kda import chunk_kda
except ImportError as error:
    sys.exit(f"this example needs flash-linear-attention: {error}")

libflashkda.fla.register()  # the line

# Both round to bf16 on their own.
TOLERANCE = 1e-2


def run(device: str) -> torch.Tensor:
    """fla's function with raw gates: softplus, which FlashKDA itself does not have."""
    generator = torch.Generator().manual_seed(0)
    B, T, H, K = 2, 500, 4, 128
    q, k, v, g = (torch.randn(B, T, H, K, generator=generator).to(device, torch.bfloat16) for _ in range(4))
    beta = torch.randn(B, T, H, generator=generator).to(device, torch.bfloat16)
    A_log, dt_bias = torch.zeros(H, device=device), torch.full((H * K,), -4.0, device=device)
    with torch.inference_mode():
        o, _ = chunk_kda(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, use_gate_in_kernel=True,
                         use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True)
    return o.double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fla.backends").setLevel(logging.INFO)  # fla says, once, where a call goes
    ours = run(device)
    if device == "cpu":
        return
    os.environ["FLA_FLASH_KDA"] = "0"  # off again: fla's own kernels
    theirs = run(device)
    error = ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()
    print(f"error ratio to fla's own kernels {error:.1e}, at most {TOLERANCE:.0e}")
    sys.exit(error > TOLERANCE)


if __name__ == "__main__":
    main()
