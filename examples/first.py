# SPDX-License-Identifier: MIT
"""A prompt of 1,023 tokens, then the next one, on the CPU: numpy is enough."""

import numpy as np
import libflashkda

random = np.random.default_rng(0)
q, k, v = (random.standard_normal((1, 1024, 8, 128), dtype=np.float32) for _ in range(3))
g = random.standard_normal((1, 1024, 8, 128), dtype=np.float32)  # raw gates, which softplus makes log decays
beta = random.standard_normal((1, 1024, 8), dtype=np.float32)  # raw steps, which the sigmoid makes 0 to 1

how = dict(gate="softplus", beta_mode="sigmoid", qk_norm=True)
out, state = libflashkda.prefill(q[:, :1023], k[:, :1023], v[:, :1023], g[:, :1023], beta[:, :1023],
                                 output_final_state=True, **how)
last = libflashkda.decode(q[:, 1023:], k[:, 1023:], v[:, 1023:], g[:, 1023:], beta[:, 1023:], state, **how)
print("the last token's first output is", last[0, 0, 0, 0])  # state went on in place
