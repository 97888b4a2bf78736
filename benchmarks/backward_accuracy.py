# SPDX-License-Identifier: MIT
"""Compares gradients of the CUDA backend and of others on the same GPU with those of the recurrence in fp64, on inputs
of the accuracy table (docs/maths.md): captured ones, random ones in both gate regimes, nearly equal keys.

usage: backward_accuracy.py [--build DIR] [--commit NAME] [-o FILE] [INPUT.safetensors ...]

Gradients of outputs and of final states are random. dA_log is a sum of terms of both signs: its error is the largest
|error| / sqrt(sum of squared terms) of a head; with equal keys the sum itself is 0. The errors of a token or a channel
are relative to the whole gradient. Writes benchmarks/results/DEVICE/backward-accuracy.json, or FILE, as it goes. Exit
status 1 if a gradient of ours is further off than it may be. Needs torch, safetensors and the installed package. fla
and the Hopper kernels of nvidia-cudnn-frontend are compared where they are installed. The latter take normalised q and
k, log decays and steps, and are compared with gradients of these: "da" is that of the log decay.
"""

import argparse
import importlib.metadata
import json
import pathlib
import sys

import cuda_accuracy
import device
import libflashkda
import peers
import torch
from cuda_accuracy import MARGIN, PORTABLE, ROOT

NAMES = ["dq", "dk", "dv", "dg", "dbeta", "dA_log", "d_dt_bias", "d_initial_state"]
BY_TOKEN = [*NAMES[:5], "da"]  # [1, T, ..]
# Of an emulation that rounds every operand to bf16, and keeps states and their gradients so every 128 tokens.
AT_MOST = {
    "strong random gates": (2.4e-3, 2.4e-3, 2.5e-3, 4.0e-3, 3.7e-3, 5e-2, 3.8e-3, 2.3e-3),
    "slow random gates": (4.5e-3, 5.4e-3, 4.6e-3, 5.4e-3, 5.8e-3, 5e-2, 5.4e-3, 3.0e-3),
    "sigmoid": (3.0e-3, 3.6e-3, 3.2e-3, 4.1e-3, 4.4e-3, 5e-2, 4.4e-3, 2.4e-3),
    "softplus": (3.7e-3, 4.6e-3, 4.1e-3, 5.3e-3, 5.7e-3, 5e-2, 4.0e-3, 2.4e-3),
    "near-collinear keys": (1.8e-2, 5.0e-3, 1.8e-2, 1.5e-2, 1.9e-2, None, 3.7e-2, 3.0e-3),
}


# ---- Gradients ----------------------------------------------------------------------------------

def leaves(x, dtype=None):
    """What gradients are asked of, in the order of NAMES; None where there is no initial state."""
    tensors = (x.q, x.k, x.v, x.g, x.beta, x.A_log, x.dt_bias, x.state)
    return [t if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]


def recurrence(q, k, v, decay, beta, state):
    """Outputs [1, T, H, V] and final state [1, H, V, K]; decay as a logarithm."""
    S, outputs = state[0], []
    for q_t, k_t, v_t, decay_t, beta_t in zip(q[0] * q.shape[-1] ** -0.5, k[0], v[0], decay[0].exp(), beta[0]):
        S = S * decay_t[:, None]
        e = torch.baddbmm(v_t[..., None], S, k_t[..., None], alpha=-1)
        S = torch.baddbmm(S, e, (beta_t[:, None] * k_t)[:, None])
        outputs.append(torch.bmm(S, q_t[..., None])[..., 0])
    return torch.stack(outputs)[None], S[None]


def derive(x, q, k, g, beta, A_log, dt_bias):
    """Normalised q and k, log decays, steps."""
    q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
    rate, z = A_log.exp()[:, None], g + dt_bias
    decay = (-rate * torch.nn.functional.softplus(z, threshold=700) if x.lower_bound is None
             else x.lower_bound * torch.sigmoid(rate * z))
    return q, k, decay, beta.sigmoid()


def exact(x, d_out, d_state):
    """Gradients of the recurrence in fp64, found by torch."""
    inputs = q, k, v, g, beta, A_log, dt_bias, state = leaves(x, torch.float64)
    q, k, decay, beta = derive(x, q, k, g, beta, A_log, dt_bias)
    return torch.autograd.grad(recurrence(q, k, v, decay, beta, state), inputs, [d_out.double(), d_state.double()])


class Cudnn:
    """cuDNN's frontend: the backward kernels for Hopper, launched without their host layer."""

    NAMES = ["dq", "dk", "dv", "da", "dbeta", "d_initial_state"]

    def __init__(self):
        from cudnn.linear_attention.hopper import cuda_bwd_host
        self.host = cuda_bwd_host
        self.version = importlib.metadata.version("nvidia-cudnn-frontend")

    def errors(self, x, d_out, d_state):
        """As errors_of() has them; None where it does not take the input."""
        if x.lower_bound is None:
            return None
        with torch.no_grad():
            q, k, decay, beta = derive(x, *(t.float() for t in (x.q, x.k, x.g, x.beta, x.A_log, x.dt_bias)))
        given = [q.bfloat16(), k.bfloat16(), x.v, decay.contiguous(), beta.contiguous(), x.state]
        found, state = [torch.empty_like(t) for t in given], d_state.float().contiguous()
        tokens, heads = q.shape[1:3]
        workspace = torch.empty(self.host.workspace_bytes(tokens, heads, 1), dtype=torch.uint8, device=q.device)
        boundaries = torch.tensor([0, tokens], dtype=torch.int32, device=q.device)
        pointers = [t.data_ptr() for t in (workspace, d_out, *given[:5], boundaries, given[5], state, *found)]
        self.host.launch(torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream, *pointers,
                         total_tokens=tokens, n_heads=heads, n_seqs=1)
        inputs = [t.double().requires_grad_() for t in given]
        reference = torch.autograd.grad(recurrence(*inputs), inputs, [d_out.double(), d_state.double()])
        return {name: error_of(name, value, exact_value)
                for name, value, exact_value in zip(self.NAMES, found, reference, strict=True)}


def ours(x, inputs):
    q, k, v, g, beta, A_log, dt_bias, state = inputs
    return libflashkda.prefill(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, initial_state=state,
                               output_final_state=True, **cuda_accuracy.options_of(x))


def fla(x, inputs):
    from fla.ops.kda import chunk_kda

    q, k, v, g, beta, A_log, dt_bias, state = inputs
    return chunk_kda(q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True,
                     use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, safe_gate=x.lower_bound is not None,
                     lower_bound=x.lower_bound, state_v_first=True, A_log=A_log, dt_bias=dt_bias.flatten())[:2]


def gradients(x, d_out, d_state, forward, level):
    inputs = leaves(x)
    with cuda_accuracy.on_level(level):
        out, state = forward(x, inputs)
        return torch.autograd.grad([out, state], inputs, [d_out.to(out.dtype), d_state.to(state.dtype)])


# ---- Errors -------------------------------------------------------------------------------------

def terms_of_A_log(x, dg):
    """What each element of g adds to dA_log: exact dg times z, or times softplus(z) / sigmoid(z)."""
    z = x.g.double() + x.dt_bias.double()
    if x.lower_bound is not None:
        return z * dg
    return torch.nn.functional.softplus(z, threshold=700) * (1 + torch.exp(-z)) * dg


def error_of(name, value, reference):
    """The error ratio, and for tensors of tokens the largest of a token and of a channel (of dbeta, a head), against
    the RMS of the whole."""
    value = value.reshape(reference.shape)
    error = {"error": peers.error_ratio(value, reference)}
    if name in BY_TOKEN:
        squares, whole = (value.double() - reference).square()[0].flatten(1), reference.square().mean()
        error |= {"of_token": (squares.mean(1).max() / whole).sqrt().item(),
                  "of_channel": (squares.mean(0).max() / whole).sqrt().item()}
    return error


def errors_of(x, found, reference):
    """Name to error_of()."""
    errors, terms = {}, terms_of_A_log(x, reference[3])
    for name, value, exact_value in zip(NAMES, found, reference, strict=True):
        if name == "dA_log":
            difference = (value.double() - exact_value).abs()
            errors[name] = {"error": (difference / terms.square().sum((0, 1, 3)).sqrt()).max().item()}
        else:
            errors[name] = error_of(name, value, exact_value)
    return errors


def within(errors, columns):
    """NaN is not."""
    found = [errors[name]["error"] for name in NAMES]
    return all(column is None or (error is not None and error <= MARGIN * column)
               for error, column in zip(found, columns, strict=True))


# ---- All of it ----------------------------------------------------------------------------------

def inputs(paths):
    """Names, problems and what ours may be off by."""
    for path in [*sorted((ROOT / "data").glob("*.safetensors")), *paths]:
        x, _ = cuda_accuracy.captured(path)
        yield f"captured, {path.stem}", x, AT_MOST["softplus" if x.lower_bound is None else "sigmoid"]
    for name, x, _ in cuda_accuracy.made(tokens=2048):
        if name == "near-collinear keys":  # of a q along k the gradient is 0 behind the norm
            x.q = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(1)).to(x.q)
        if name in AT_MOST:
            yield name, x, AT_MOST[name]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="*", type=pathlib.Path, help="more captured inputs")
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build", help="where flashkda is (build)")
    parser.add_argument("--commit", help="what was built, where git cannot tell")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="the results")
    options = parser.parse_args()
    gpu, peer = device.describe(options.build.resolve()), peers.load_one("fla", peers.Fla)
    cudnn = peers.load_one("cudnn", Cudnn) if gpu["compute_capability"] == "9.0" else None
    ways = {"ours": (ours, None)}
    ways |= {"portable": (ours, PORTABLE)} if gpu["compute_capability"].startswith("9.") else {}
    ways |= {"fla": (fla, None)} if peer else {}
    path = options.output or device.results(gpu) / "backward-accuracy.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {"fla": peer and peer.version, "cudnn": cudnn and cudnn.version}
    about = {"version": libflashkda.__version__, "commit": device.commit(options.commit), "device": gpu,
             "torch": torch.__version__, "peers": versions, "complete": False}
    rows, good = [], True
    print(f"{'input':28} {'':9}" + "".join(f"{name:>16}" for name in NAMES))
    for name, x, columns in inputs(options.inputs):
        generator = torch.Generator("cuda").manual_seed(0)
        tokens, heads, V, K = *x.v.shape[1:], x.q.shape[3]
        x.state = torch.zeros(1, heads, V, K, device="cuda")
        d_out = torch.randn(1, tokens, heads, V, device="cuda", generator=generator).to(x.v.dtype)
        d_state = torch.randn(1, heads, V, K, device="cuda", generator=generator) / K
        reference = exact(x, d_out, d_state)
        found = {way: errors_of(x, gradients(x, d_out, d_state, *how), reference) for way, how in ways.items()}
        fits = {way: within(found[way], columns) for way in found if ways[way][0] is ours}
        if cudnn:
            found["cudnn"] = cudnn.errors(x, d_out, d_state)
        good = good and all(fits.values())
        rows.append({"input": name, "tokens": tokens, "heads": heads, "within": fits,
                     "at_most": {n: column and MARGIN * column for n, column in zip(NAMES, columns, strict=True)},
                     "errors": found})
        for way, errors in found.items():
            cells = [errors and (errors.get(n) or (errors.get("da") if n == "dg" else None)) for n in NAMES]
            print(f"{name:28} {way:9}" + "".join(f"{show(cell['error']) if cell else '-':>16}" for cell in cells)
                  + ("" if fits.get(way, True) else "  TOO FAR"), flush=True)
        path.write_text(json.dumps({**about, "errors": rows}, indent=2) + "\n")
    path.write_text(json.dumps({**about, "complete": True, "errors": rows}, indent=2) + "\n")
    print(f"wrote {path}")
    sys.exit(not good)


def show(error):
    return "wrong" if error is None else f"{error:.1e}"


if __name__ == "__main__":
    main()
