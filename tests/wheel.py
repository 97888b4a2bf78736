# SPDX-License-Identifier: MIT
"""Does an installed package work, where there is Python and numpy and nothing else? Compares a call with the oracle inside it,
on the CPU level chosen and on the portable one; asks for CUDA, which has no driver here."""

import importlib.metadata
import os
import subprocess
import sys

import flash_kda
import libflashkda
import numpy

LEVELS = ("", "generic")
TOLERANCE = 1e-5


def problem():
    random = numpy.random.default_rng(1)
    q, k, v, g = (random.standard_normal((2, 70, 2, 32), "float32") for _ in range(4))
    beta = random.standard_normal((2, 70, 2), "float32")
    return (q, k, v, g, beta), {"gate": "softplus", "beta_mode": "sigmoid", "qk_norm": True}


def check_level():
    inputs, options = problem()
    expected, state = libflashkda.prefill(*inputs, **options, output_final_state=True, backend="reference")
    out, final = libflashkda.prefill(*inputs, **options, output_final_state=True)
    tokens, pool = [], numpy.zeros_like(state)
    for t in range(70):
        tokens.append(libflashkda.decode(*(x[:, t:t + 1] for x in inputs), pool, **options))
    for name, result, right in (("out", out, expected), ("state", final, state), ("state of decode", pool, state),
                                ("out of decode", numpy.concatenate(tokens, 1), expected)):
        error = numpy.sqrt(((result - right) ** 2).mean() / (right**2).mean())
        assert error < TOLERANCE, f"{name}: error ratio {error:.1e}, at most {TOLERANCE:.0e}"


def check_cuda():
    """A wheel with CUDA must load, and say something else than one without."""
    inputs, options = problem()
    with_cuda = "\nBuild: 1cu" in importlib.metadata.distribution("libflashkda").read_text("WHEEL")
    try:
        libflashkda.prefill(*inputs, **options, backend="cuda")
    except NotImplementedError as error:
        print(f"backend cuda: {error}")
        assert ("this build does not have" in str(error)) != with_cuda
    else:
        raise AssertionError("a call ran on CUDA without a driver")


if sys.argv[1:] == ["level"]:
    check_level()
else:
    assert flash_kda.fwd is libflashkda.fwd
    for level in LEVELS:
        environment = {**os.environ, "FLASH_KDA_CPU": level} if level else dict(os.environ)
        subprocess.run([sys.executable, __file__, "level"], env=environment, check=True)
    check_cuda()
    subprocess.run([sys.executable, "-m", "libflashkda"], check=True)
