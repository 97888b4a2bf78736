# SPDX-License-Identifier: MIT
"""Other implementations of prefill on CUDA, timed and compared as `flashkda bench --backend cuda` does with ours: by
replay of a CUDA graph over as many copies of the tensors as overflow the L2 cache, and against fp64. Needs torch."""

import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import statistics
import sys
import types

os.environ["FLA_FLASH_KDA"] = "0"  # fla's own kernels, not those of a FlashKDA it finds

import torch  # noqa: E402

REPEATS = 9
WARM_UP, MEASUREMENT = 0.1, 0.02  # seconds
MAX_COPIES = 64
CHECKED_TOKENS, CHECKED_HEADS = 8192, 4  # of the first sequence
WRONG = 0.02  # error ratio; bf16 operands cost about 0.005


# ---- Inputs and the exact answer ----------------------------------------------------------------

def make_inputs(case, seed=0):
    """Tensors of a case of the benchmark's JSON, of the distribution that `flashkda bench` takes."""
    torch.manual_seed(seed)
    B, T, H, HV, K, V = (case[n] for n in ("batch", "tokens", "heads", "value_heads", "key_dim", "value_dim"))
    slow = case["regime"] == "slow"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case["dtype"]]

    def normal(*shape, mean=0.0):
        return (torch.randn(shape, device="cuda") + mean).to(dtype)

    lengths = [int(n) for n in case["lengths"].split(",")] if case["lengths"] else None
    boundaries = [0]
    for length in lengths or []:
        boundaries.append(boundaries[-1] + length)
    sequences = len(lengths) if lengths else B
    state_dtype = torch.bfloat16 if case["state_dtype"] == "bf16" else torch.float32
    return types.SimpleNamespace(
        q=normal(B, T, H, K), k=normal(B, T, H, K), v=normal(B, T, HV, V),
        g=normal(B, T, HV, K, mean=-7.0 if slow else 0.0), beta=normal(B, T, HV),
        A_log=torch.rand(HV, device="cuda"),
        dt_bias=torch.zeros(HV, K, device="cuda") if slow else torch.rand(HV, K, device="cuda"),
        state=torch.randn(sequences, HV, V, K, device="cuda").to(state_dtype) if case["initial_state"] else None,
        sequences=sequences,
        cu_seqlens=torch.tensor(boundaries, device="cuda") if lengths else None,
        first_length=lengths[0] if lengths else T,
        lower_bound=case["lower_bound"])  # None: softplus gate


def log_decay(x, g):
    rate, biased = x.A_log.double().exp()[:, None], g.double() + x.dt_bias.double()
    if x.lower_bound is None:
        return -rate * torch.nn.functional.softplus(biased)
    return x.lower_bound * torch.sigmoid(rate * biased)


def exact(x, heads=CHECKED_HEADS):
    """Output [tokens, heads, V] and state [heads, V, K] of the recurrence in fp64, for the first tokens and heads of
    the first sequence."""
    tokens, group = min(x.first_length, CHECKED_TOKENS), x.v.shape[2] // x.q.shape[2]
    heads = min(x.v.shape[2], heads)
    q, k = (t[0, :tokens].double().repeat_interleave(group, dim=1)[:, :heads] for t in (x.q, x.k))
    q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
    v, beta = x.v[0, :tokens, :heads].double(), x.beta[0, :tokens, :heads].double().sigmoid()
    decay = log_decay(x, x.g[0, :tokens])[:, :heads].exp()
    S = x.state[0, :heads].double().clone() if x.state is not None else v.new_zeros(heads, v.shape[-1], q.shape[-1])
    out = torch.empty_like(v)
    column, row = (lambda t: t[..., None]), (lambda t: t[..., None, :])  # of every token and head
    steps = (row(decay), column(k), row(beta[..., None] * k), column(v), column(q * q.shape[-1] ** -0.5), column(out))
    for decay_t, k_t, beta_k_t, v_t, q_t, out_t in zip(*steps):  # few kernels a step: of those there are thousands
        S *= decay_t
        S.baddbmm_(torch.baddbmm(v_t, S, k_t, alpha=-1), beta_k_t)  # S += (v - S k) beta k^T
        torch.bmm(S, q_t, out=out_t)
    return out, S


def error_ratio(value, reference):
    """RMS(value - reference) / RMS(reference); None where that is no number."""
    ratio = ((value.double() - reference).square().mean() / reference.square().mean()).sqrt().item()
    return ratio if ratio == ratio and ratio != float("inf") else None


# ---- The peers ----------------------------------------------------------------------------------

class Fla:
    """fla's chunk_kda, all in the kernel, inference."""

    def __init__(self):
        from fla.ops.kda import chunk_kda
        self.chunk_kda = chunk_kda
        self.version = importlib.metadata.version("flash-linear-attention")

    def takes(self, case):
        return case["state_dtype"] == "fp32"

    def prepare(self, x, case):
        every = case["checkpoint_every"] > 0
        bounded = x.lower_bound is not None

        def call():
            result = self.chunk_kda(
                x.q, x.k, x.v, x.g, x.beta, initial_state=x.state, output_final_state=True,
                use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
                safe_gate=bounded, lower_bound=x.lower_bound, state_v_first=True, return_intermediate_states=every,
                cu_seqlens=x.cu_seqlens, A_log=x.A_log, dt_bias=x.dt_bias.flatten())
            return result[0], result[1]
        return call


class FlashKDA:
    """FlashKDA's fwd, from a folder with its built package. Its name is that of our own: it is loaded under another."""

    def __init__(self, folder):
        folder = pathlib.Path(folder).resolve()
        spec = importlib.util.spec_from_file_location("moonshot_flash_kda", folder / "flash_kda" / "__init__.py")
        package = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(folder))  # of its extension, which lies beside it
        try:
            spec.loader.exec_module(package)
        finally:
            sys.path.remove(str(folder))
        self.fwd = package.fwd
        found = list(importlib.metadata.distributions(name="flash_kda", path=[str(folder)]))
        self.version = found[0].version if found else "unknown"

    def takes(self, case):
        return (case["gate"] == "sigmoid" and case["key_dim"] == case["value_dim"] == 128 and case["dtype"] == "bf16"
                and case["value_heads"] == case["heads"] and not case["checkpoint_every"])

    def prepare(self, x, case):
        out, state_dtype = torch.empty_like(x.v), torch.bfloat16 if case["state_dtype"] == "bf16" else torch.float32
        state = torch.empty(x.sequences, *x.v.shape[2:], x.q.shape[-1], dtype=state_dtype, device="cuda")

        def call():
            self.fwd(x.q, x.k, x.v, x.g, x.beta, x.q.shape[-1] ** -0.5, out, x.A_log, x.dt_bias, x.lower_bound,
                     initial_state=x.state, final_state=state, cu_seqlens=x.cu_seqlens)
            return out, state
        return call


class Cudnn:
    """The fused Hopper kernel of cuDNN's frontend, launched without its host layer, whose work no replay would show.
    The kernel takes g and beta in fp32: they are converted beforehand, and are not part of the time."""

    def __init__(self):
        from cudnn.linear_attention.hopper import cuda_host
        if torch.cuda.get_device_capability() != cuda_host.HOPPER_CC:
            raise ImportError("its kernel runs on compute capability 9.0 alone")
        self.host = cuda_host
        self.flags = cuda_host.FLAG_L2NORM | cuda_host.FLAG_SAFE_GATE | cuda_host.FLAG_BETA_SIGMOID
        self.version = importlib.metadata.version("nvidia-cudnn-frontend")

    def takes(self, case):
        return (case["gate"] == "sigmoid" and case["key_dim"] == case["value_dim"] == 128 and case["dtype"] == "bf16"
                and case["state_dtype"] == "fp32" and not case["checkpoint_every"])

    def prepare(self, x, case):
        (B, T, H, K), HV = x.q.shape, x.v.shape[2]
        boundaries = x.cu_seqlens if x.cu_seqlens is not None else torch.arange(0, B * T + 1, T, device="cuda")
        out, state = torch.empty_like(x.v), torch.empty(x.sequences, HV, x.v.shape[-1], K, device="cuda")
        tensors = (x.q, x.k, x.v, x.g.float(), x.beta.float(), boundaries.int(),
                   x.state if x.state is not None else torch.zeros_like(state), out, state)

        def call():
            self.host.launch(
                torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream, *(t.data_ptr() for t in tensors),
                total_tokens=B * T, n_seqs=x.sequences, n_heads=HV, n_qk_heads=H, a_log=x.A_log.data_ptr(),
                dt_bias=x.dt_bias.data_ptr(), gate_lower_bound=x.lower_bound, flags=self.flags, q_scale=K ** -0.5)
            return out, state
        return call


def tune_quickly():
    """Triton's tuner gives a configuration 125 ms, and fla has a hundred for each number of heads; 25 tell them apart."""
    import triton.testing
    from triton.runtime.autotuner import Autotuner

    Autotuner.do_bench = staticmethod(functools.partial(triton.testing.do_bench, warmup=5, rep=20))


def load_flashkda(folder):
    if not folder:
        raise ImportError("no folder given, see --flashkda")
    return FlashKDA(folder)


def load_one(name, make):
    """A peer; None if it is not here, with a printed line that says why."""
    try:
        peer = make()
        if name == "fla":
            tune_quickly()
        print(f"{name} {peer.version}")
        return peer
    except (ImportError, OSError) as error:
        print(f"{name} is NOT measured: {error}")
        return None


def load(flashkda_folder=None):
    """The peers by name, as load_one() has each."""
    makers = {"fla": Fla, "flashkda": functools.partial(load_flashkda, flashkda_folder), "cudnn": Cudnn}
    return {name: load_one(name, make) for name, make in makers.items()}


# ---- Measuring ----------------------------------------------------------------------------------

def copies_of(x, seed_inputs):
    """So many independent copies of the inputs, the first being x, that none is in the cache when its turn comes."""
    bytes_each = sum(t.numel() * t.element_size() for t in vars(x).values() if torch.is_tensor(t))
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(MAX_COPIES, 1 + 2 * l2 // bytes_each)
    return [x] + [seed_inputs(n) for n in range(1, count)]


def replay(calls):
    """Seconds of one call: replays of a graph that runs all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, tunes and fills caches outside of the graph
        for call in calls * 2:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure(replays):
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    replays, spent = 1, 0.0
    while spent < WARM_UP:
        took = measure(replays)
        spent += took
        replays = int(min(10000, 1 + MEASUREMENT * replays / max(took, 1e-6)))
    seconds = sorted(measure(replays) / replays / len(calls) for _ in range(REPEATS))
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"min": seconds[0], "q1": quartiles[0], "median": quartiles[1], "q3": quartiles[2], "max": seconds[-1],
            "repeats": REPEATS}


def check(call, x, answer):
    """Error ratios of the output and, where the answer covers the whole first sequence, of its final state."""
    out, state = call()
    tokens, heads = answer[0].shape[:2]
    whole = tokens == x.first_length
    return {"tokens": tokens, "value_heads": heads,
            "output_error": error_ratio(out[0, :tokens, :heads], answer[0]),
            "state_error": error_ratio(state[0, :heads], answer[1]) if whole else None,
            "finite": bool(out.isfinite().all() and state.isfinite().all())}


def measure(peers, case):
    """What each peer does with a case: errors, and times where the result is right; None where it is not here or
    does not take the case."""
    wanted = {name: peer for name, peer in peers.items() if peer and peer.takes(case)}
    measured = dict.fromkeys(peers)
    if not wanted:
        return measured
    with torch.inference_mode():
        x = make_inputs(case)
        answer, copies = exact(x), copies_of(x, lambda seed: make_inputs(case, seed))
        for copy in copies[1:]:
            copy.cu_seqlens = x.cu_seqlens  # fla keeps what it derives from it
        for name, peer in wanted.items():
            calls = [peer.prepare(copy, case) for copy in copies]
            result = measured[name] = {"check": check(calls[0], x, answer)}
            errors = [e for e in (result["check"]["output_error"], result["check"]["state_error"]) if e is not None]
            right = result["check"]["finite"] and result["check"]["output_error"] is not None and max(errors) < WRONG
            result["seconds"] = replay(calls) if right else None
    torch.cuda.empty_cache()
    return measured
