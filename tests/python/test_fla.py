# SPDX-License-Identifier: MIT
"""flash-linear-attention on this package: by its own FlashKDA backend, and after register()."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import types

import libflashkda
import pytest
import torch
from kimi_linear_plain import Plain
from recurrence import BF16_ANY, BF16_MARGIN, FP32, Problem, assert_close, error_ratio, in_layout, make, recurrence, solve

pytestmark = [pytest.mark.library("fla"), pytest.mark.usefixtures("no_grad"),
              pytest.mark.filterwarnings("ignore:Triton is not supported on current platform")]

ROUNDING_BF16 = 1.65e-3


@pytest.fixture
def registry():
    """fla's backends of chunk_kda; those and all others that register() adds to are put back afterwards."""
    import fla.backends
    import fla.layers
    import fla.ops.kda

    registry = fla.backends._function_registries[inspect.unwrap(fla.ops.kda.chunk_kda)]
    registries = [*fla.backends._function_registries.values(), fla.backends._operation_registries["kda"]]
    backends = [dict(registry._backends) for registry in registries]
    yield registry
    for registry, before in zip(registries, backends, strict=True):
        registry._backends = before


def count(monkeypatch, module, name):
    calls = []
    function = getattr(module, name)

    def counted(*arguments, **keywords):
        calls.append(name)
        return function(*arguments, **keywords)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.fixture
def registered(registry, monkeypatch):
    """register() is in force. Gives the list of calls that came to this package."""
    libflashkda.fla.register()
    return count(monkeypatch, libflashkda.fla, "chunk_kda")


def arguments(problem, device):
    """A problem as chunk_kda() takes it."""
    here = problem.to(device)
    o = here.options
    gate = {} if o["gate"] == "none" else {"A_log": o["A_log"], "dt_bias": o["dt_bias"].flatten()}
    return {**dict(zip(("q", "k", "v", "g", "beta"), here.inputs)), **gate, "scale": o.get("scale"),
            "initial_state": o.get("initial_state"), "cu_seqlens": o.get("cu_seqlens"), "output_final_state": True,
            "use_qk_l2norm_in_kernel": o["qk_norm"], "use_gate_in_kernel": o["gate"] != "none",
            "use_beta_sigmoid_in_kernel": o["beta_mode"] != "given",
            "allow_neg_eigval": o["beta_mode"] == "twice_sigmoid", "lower_bound": o.get("lower_bound"),
            "safe_gate": o["gate"] == "sigmoid", "state_v_first": o["state_layout"] == "v_first"}


def assert_right(problem, device, results):
    expected, states, _ = solve(problem)
    here = problem.to(device)
    description = libflashkda.prefill_describe(*here.inputs, **here.options)
    assert_close(results[0], expected, description)
    assert_close(results[1], in_layout(states, problem.options["state_layout"]), description)


@pytest.mark.parametrize("lengths", [None, [30, 0, 50]])
@pytest.mark.parametrize("initial_state", [None, torch.float32])
def test_flas_own_backend(registry, monkeypatch, lengths, initial_state, device):
    """The backend that fla has for FlashKDA imports flash_kda by name."""
    import fla.ops.kda
    import flash_kda

    calls = count(monkeypatch, flash_kda, "fwd")
    problem = make(gate="sigmoid", lower_bound=-5.0, K=128, V=128, lengths=lengths, initial_state=initial_state)
    assert_right(problem, device, fla.ops.kda.chunk_kda(**arguments(problem, device)))
    assert len(calls) == 1


WIDER = [
    {"gate": "softplus"},
    {"gate": "sigmoid", "lower_bound": -3.0},
    {"gate": "none", "beta_mode": "given", "qk_norm": False},
    {"beta_mode": "twice_sigmoid"},
    {"v_first": False, "initial_state": torch.float32},
    {"H": 2, "HV": 4, "K": 64, "V": 128},
    {"K": 256, "V": 64},
    {"dtype": torch.float16},
    {"lengths": [30, 0, 50], "v_first": False},
]


@pytest.mark.parametrize("more", WIDER, ids=str)
def test_wider_backend(registered, more, device):
    import fla.ops.kda

    problem = make(**{"K": 128, "V": 128, **more})
    assert_right(problem, device, fla.ops.kda.chunk_kda(**arguments(problem, device)))
    assert len(registered) == 1


@pytest.mark.parametrize("lengths", [None, [70, 0, 130]])
def test_intermediate_states(registered, lengths, device):
    import fla.ops.kda

    problem = make(T=200, lengths=lengths, v_first=False, initial_state=torch.float32)
    with torch.inference_mode():
        results = fla.ops.kda.chunk_kda(**arguments(problem, device), return_intermediate_states=True)
    assert_right(problem, device, results)
    assert len(registered) == 1
    states = torch.tensor([state.tolist() for sequence in solve(problem, every=64)[2] for state in sequence])
    assert_close(results[2].flatten(0, 1), states.double().numpy(),
                 libflashkda.prefill_describe(*problem.to(device).inputs, **problem.to(device).options))


# ---- Training ------------------------------------------------------------------------------------

trains = pytest.mark.parametrize("device", ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)]
                                                     if libflashkda._C.backward_available(3) else [])])


@trains
@pytest.mark.parametrize("more", [{"initial_state": torch.float32}, {"lengths": [30, 0, 50]}], ids=str)
def test_gradients(registered, more, device):
    import fla.ops.kda

    problem = make(**{"dtype": torch.float32, "K": 32, "V": 32, **more})
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
    d_out = torch.randn(problem.v.shape, generator=torch.Generator().manual_seed(1))
    with torch.enable_grad():
        call = {name: x.requires_grad_() if name in names and x is not None else x
                for name, x in arguments(problem, device).items()}
        out, state = fla.ops.kda.chunk_kda(**call)
        torch.autograd.backward((out, state), (d_out.to(device), torch.ones_like(state)))
        assert len(registered) == 1
        given = {**dict(zip(names, problem.inputs)), **problem.options}
        exact = {name: x.detach().double().requires_grad_() if name in names else x for name, x in given.items()}
        expected = recurrence(Problem(*(exact.pop(name) for name in names[:5]), exact))[:2]
        torch.autograd.backward(expected, (d_out.double(), torch.ones_like(expected[1])))
    for name in names[6:]:
        if call[name] is not None:
            assert_close(call[name].grad.reshape(exact[name].shape), exact[name].grad.numpy(), name)


class PlainNorm(torch.nn.Module):
    """fla's gated norm, which needs Triton."""

    def __init__(self, theirs):
        super().__init__()
        self.weight, self.eps = theirs.weight, theirs.eps

    def forward(self, x, gate):
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps) * gate.sigmoid()


def test_model_is_trained_on_a_cpu(registered, monkeypatch):
    """fla's KDA model, without what needs Triton beside attention: the loss of every step is that of the recurrence."""
    import fla.layers.kda
    import fla.modules.mlp
    from fla.models.kda import KDAConfig, KDAForCausalLM

    monkeypatch.setattr(fla.modules.mlp, "swiglu", lambda gate, y: torch.nn.functional.silu(gate) * y)
    tokens = torch.randint(256, (2, 140), generator=torch.Generator().manual_seed(1))

    def exact(q, k, v, g, beta, A_log, dt_bias, **_):
        options = {"gate": "softplus", "beta_mode": "sigmoid", "qk_norm": True, "A_log": A_log,
                   "dt_bias": dt_bias.view(g.shape[2:])}
        return recurrence(Problem(q, k, v, g, beta, options))[0].to(q.dtype), None

    def losses():
        torch.manual_seed(0)
        model = KDAForCausalLM(KDAConfig(
            hidden_size=64, head_dim=32, num_heads=2, num_hidden_layers=2, vocab_size=256, use_short_conv=False,
            fuse_norm=False, fuse_swiglu=False, fuse_cross_entropy=False)).train()
        for layer in model.model.layers:
            layer.attn.o_norm = PlainNorm(layer.attn.o_norm)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        found = []
        for _ in range(4):
            loss = model(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    with torch.enable_grad():
        ours = losses()
        assert len(registered) == 8
        monkeypatch.setattr(fla.layers.kda, "chunk_kda", exact)
        theirs = losses()
    assert len(registered) == 8
    assert theirs[3] < theirs[0] - 0.1 and ours == pytest.approx(theirs, abs=1e-5)


# ---- The token recurrence ------------------------------------------------------------------------


@pytest.fixture
def recurrent(registered, monkeypatch):
    """Gives the list of calls that came to this package."""
    return count(monkeypatch, libflashkda.fla, "fused_recurrent_kda_fwd")


def recurrent_arguments(problem, device):
    names = ("safe_gate",)
    return {name: value for name, value in arguments(problem, device).items() if name not in names}


@pytest.mark.parametrize("more", [*WIDER[:-1], {"B": 3, "T": 1}, {"lengths": [3, 0, 5]}, {"initial_state": torch.bfloat16}],
                         ids=str)
def test_recurrent(recurrent, more, device):
    import fla.ops.kda

    problem = make(**{"T": 7, "K": 64, "V": 64, **more})
    expected, states, _ = solve(problem)
    out, final_state = fla.ops.kda.fused_recurrent_kda(**recurrent_arguments(problem, device))
    assert_close(out, expected, "fp32")
    assert_close(final_state, in_layout(states, problem.options["state_layout"]), "fp32")
    assert final_state.dtype == torch.float32 and len(recurrent) == 1
    initial = problem.options.get("initial_state")
    if initial is not None:  # is as it was
        call = recurrent_arguments(problem, device)
        assert fla.ops.kda.fused_recurrent_kda(**{**call, "output_final_state": False})[1] is None
        assert torch.equal(call["initial_state"].cpu(), initial)


@pytest.mark.parametrize("more", [
    {"T": 17},
    {"T": 64, "B": 2, "initial_state": torch.float32},
    {"T": 130, "initial_state": torch.float16, "v_first": False},
    {"lengths": [5, 20, 0, 7], "initial_state": torch.float32},
    {"lengths": [1] * 20, "initial_state": torch.float32},
    {"T": 40, "dtype": torch.float32, "gate": "sigmoid", "lower_bound": -5.0, "initial_state": torch.bfloat16},
], ids=str)
def test_recurrent_of_any_length(recurrent, monkeypatch, more, device):
    import fla.ops.kda
    import libflashkda._fused_recurrent as module

    prefilled, decoded = count(monkeypatch, module, "prefill"), count(monkeypatch, module, "decode")
    problem = make(**more)
    expected, states, _ = solve(problem)
    call = recurrent_arguments(problem, device)
    out, final_state = fla.ops.kda.fused_recurrent_kda(**call)
    description = libflashkda.prefill_describe(*problem.to(device).inputs, gate="none")
    assert_close(out, expected, description)
    assert_close(final_state, in_layout(states, problem.options["state_layout"]), description)
    # The host does not see lengths that are on a GPU.
    few = "lengths" in more and max(more["lengths"]) == 1 and device == "cpu"
    assert len(recurrent) == 1 and final_state.dtype == torch.float32
    assert (len(prefilled), len(decoded)) == ((0, 1) if few else (1, 0))
    initial = problem.options.get("initial_state")
    assert initial is None or torch.equal(call["initial_state"].cpu(), initial)  # is as it was


def test_recurrent_in_place(recurrent):
    from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

    problem = make(T=40, initial_state=torch.float32)
    expected, states, _ = solve(problem)
    call = recurrent_arguments(problem, "cpu")
    given = torch.empty_like(call["v"])
    out, state = fused_recurrent_kda_fwd(**call, out=given)
    assert state is call["initial_state"] and out is given and len(recurrent) == 1
    description = libflashkda.prefill_describe(*problem.inputs)
    assert_close(out, expected, description)
    assert_close(state, in_layout(states, "v_first"), description)


def test_recurrent_on_a_pool(recurrent, device):
    """As a serving engine calls it: two drafted tokens, of which one was accepted last."""
    from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

    problem = make(B=2, T=2, initial_state=torch.float32)
    expected, _, inner = solve(problem, every=1)
    call = recurrent_arguments(problem, device)
    pool = torch.full((6, 2, 64, 64), torch.nan, device=device)
    slots = torch.tensor([[4, 0], [1, 5]], device=device)
    pool[[4, 1]] = call["initial_state"]
    out, state = fused_recurrent_kda_fwd(**{**call, "initial_state": pool}, inplace_final_state=True,
                                         ssm_state_indices=slots, num_accepted_tokens=torch.tensor([1, 1], device=device))
    assert state is pool and len(recurrent) == 1
    assert_close(out, expected, "fp32")
    assert_close(pool[slots[:, 0]], in_layout(torch.tensor([x[1].tolist() for x in inner]).double().numpy(), "v_first"), "fp32")
    assert pool[[2, 3]].isnan().all()


@pytest.mark.parametrize("problem, more", [
    (make(T=2), {"beta": torch.ones(1, 2, 2, 64)}),
    (make(T=2), {"A_log": None}),
    (make(T=2, K=300), {}),
    (make(T=2, initial_state=torch.float32), {"ssm_state_indices": torch.zeros(1, 2, dtype=torch.int64)}),
    (make(T=17, initial_state=torch.float32),
     {"inplace_final_state": True, "ssm_state_indices": torch.arange(17)[None]}),
    (make(lengths=[30, 2], initial_state=torch.float32),
     {"inplace_final_state": True, "ssm_state_indices": torch.arange(34).view(2, 17)}),
    (make(T=17, initial_state=torch.float16), {"inplace_final_state": True}),
], ids=["beta a channel", "no A_log", "K=300", "a pool, not in place", "17 slots a sequence", "17 slots, packed", "fp16"])
def test_recurrent_goes_elsewhere(registered, problem, more):
    import fla.backends

    backend = fla.backends._operation_registries["kda"]._backends["flash_kda"]
    call = {**recurrent_arguments(problem, "cpu"), "inplace_final_state": False}
    accepted, reason = backend.verify("fused_recurrent_kda_fwd", **{**call, **more})
    assert not accepted and "libflashkda" in reason


# ---- The rest of fla's layer and model, on a CPU ---------------------------------------------------


def assert_rounded(x, expected):
    """x is fp64's result, up to fp32's arithmetic and the rounding to x's dtype."""
    allowed = FP32 + error_ratio(expected.to(x.dtype), expected.numpy())
    ratio = error_ratio(x, expected.numpy())
    assert ratio <= allowed, f"error ratio {ratio:.3g}, at most {allowed:.3g} is allowed"


def convolved(x, weight, past):
    """One sequence x [T, D] after past [W, D]: token by token in fp64. Outputs, and the last W inputs."""
    inputs = torch.cat([past, x]).double()
    W = weight.shape[1]
    return (torch.stack([(inputs[t + 1:t + 1 + W] * weight.double().T).sum(0) for t in range(len(x))])
            if len(x) else x.double()), inputs[-W:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [None, [3, 0, 1, 9]], ids=str)
@pytest.mark.parametrize("more", [False, True], ids=["least", "everything"])
def test_causal_conv1d(registered, dtype, lengths, more):
    from fla.modules.causal_conv1d.ops import causal_conv1d_fwd

    N, T, D, W = (3, 11, 6, 4) if lengths is None else (len(lengths), sum(lengths), 6, 4)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(N if lengths is None else 1, T, D, generator=draw).to(dtype)
    weight, bias = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((D, W), (D,)))
    past, residual = torch.randn(N, D, W, generator=draw).to(dtype), torch.randn(x.shape, generator=draw).to(dtype)
    ends = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    y, state = causal_conv1d_fwd(x, weight, bias if more else None, residual if more else None,
                                 past if more else None, more, "silu" if more else None, ends)
    sequences = list(x) if lengths is None else x[0].split(lengths)
    pairs = [convolved(sequence, weight, past[n].T if more else torch.zeros(W, D)) for n, sequence in enumerate(sequences)]
    expected = torch.cat([y for y, _ in pairs]).view(x.shape)
    if more:
        expected = torch.nn.functional.silu(expected + bias.double()) + residual.double()
        assert torch.equal(state, torch.stack([last.T for _, last in pairs]).to(dtype))
    else:
        assert state is None
    assert_rounded(y, expected)
    assert y.dtype == dtype


@pytest.mark.parametrize("shape", [(3, 1, 6), (1, 3, 6), (3, 6), (3, 1, 2, 3)], ids=str)
def test_causal_conv1d_update(registered, shape):
    from fla.modules.causal_conv1d.ops import causal_conv1d_update

    draw = torch.Generator().manual_seed(0)
    x, residual, cache = (torch.randn(*s, generator=draw) for s in (shape, shape, (3, 6, 4)))
    weight, bias = torch.randn(6, 4, generator=draw), torch.randn(6, generator=draw)
    before = cache.clone()
    y, same = causal_conv1d_update(x, cache, residual, weight, bias, "swish")
    pairs = [convolved(row[None], weight, past.T) for row, past in zip(x.view(3, 6), before, strict=True)]
    expected = torch.nn.functional.silu(torch.cat([y for y, _ in pairs]) + bias.double()) + residual.view(3, 6).double()
    assert_rounded(y, expected.view(shape))
    assert same is cache and torch.equal(cache, torch.stack([last.T for _, last in pairs]).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("activation", [None, "swish", "sigmoid"])
@pytest.mark.parametrize("more", [False, True], ids=["least", "everything"])
def test_norms(registered, dtype, rms, activation, more):
    """activation: of the gated norm; None: the other one, which has groups."""
    from fla.modules.norm.fused_norm_gate import layer_norm_gated_fwd
    from fla.modules.norm.layernorm import layer_norm_fwd

    T, D, groups = 12, 16, 3 if more and activation is None else 1
    draw = torch.Generator().manual_seed(0)
    x, g, residual = (torch.randn(T, D, generator=draw).to(dtype) + 1 for _ in range(3))
    weight, bias = (torch.randn(groups * D, generator=draw) for _ in range(2))
    options = {"weight": weight, "bias": bias, "residual": residual} if more else {"weight": None, "bias": None}
    if activation is None:
        y, mean, rstd, kept = layer_norm_fwd(x, **options, eps=1e-3, is_rms_norm=rms, num_groups=groups)
    else:
        y, mean, rstd, kept = layer_norm_gated_fwd(x, g, **options, activation=activation, eps=1e-3, is_rms_norm=rms)
    rows = x.double() + (residual.double() if more else 0)
    centred = rows if rms else rows - rows.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    assert_rounded(rstd[:, None] * centred, expected)
    assert (mean is None) == rms and (rms or torch.allclose(mean.double(), rows.mean(-1)))
    assert (kept is x) if not more else (kept.dtype == dtype and torch.equal(kept, (x.float() + residual.float()).to(dtype)))
    if more:
        expected = expected.view(-1, groups * D) * weight.double() + bias.double()
    expected = expected.view(T, D)
    if activation is not None:
        gate = g.double()
        expected = expected * (gate.sigmoid() if activation == "sigmoid" else gate * gate.sigmoid())
    assert_rounded(y, expected)
    assert y.dtype == dtype


def test_norm_of_a_residual_in_fp32(registered):
    from fla.modules.norm.layernorm import layer_norm_fwd

    x = torch.randn(3, 8, dtype=torch.bfloat16)
    y, _, _, kept = layer_norm_fwd(x, None, None, residual_dtype=torch.float32, out_dtype=torch.float32, is_rms_norm=True)
    assert y.dtype == kept.dtype == torch.float32 and torch.equal(kept, x.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu(registered, dtype):
    from fla.modules.activations.ops import swiglu_fwd

    x, y = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_rounded(swiglu_fwd(x, y), x.double() * x.double().sigmoid() * y.double())


def test_stand_ins_are_for_a_cpu(registered):
    import fla.backends
    from fla.modules.activations.ops import swiglu_fwd

    backend = fla.backends._function_registries[inspect.unwrap(swiglu_fwd)]._backends["torch"]
    x = torch.empty(2, 4, device="meta")
    assert backend.verify("swiglu_fwd", x, x) == (
        False, "torch's own operations stand in for fla's kernels on a CPU alone")
    assert backend.verify("swiglu_fwd", x=torch.empty(2, 4), y=torch.empty(2, 4))[0]


@pytest.fixture(scope="module")
def model():
    from fla.models.kda import KDAConfig, KDAForCausalLM

    torch.manual_seed(0)
    model = KDAForCausalLM(KDAConfig(hidden_size=64, head_dim=32, num_heads=2, num_hidden_layers=3, vocab_size=256,
                                     fuse_cross_entropy=False)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim > 1:
                parameter.normal_(0, 0.3 if "conv" in name else 0.15)
    return model


@pytest.fixture(scope="module")
def plain(model):
    """The same in fp64 and token by token, under the names of Kimi Linear's tensors."""
    names = {".attn.": ".self_attn.", "f_proj.0": "f_a_proj", "f_proj.1": "f_b_proj", "g_proj.0": "g_a_proj",
             "g_proj.1": "g_b_proj", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
             "embeddings": "embed_tokens"}
    tensors = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        tensors[name] = tensor
    config = model.config
    return Plain(types.SimpleNamespace(num_hidden_layers=config.num_hidden_layers, full_attn_layers=(),
                                       first_k_dense_replace=config.num_hidden_layers, linear_num_heads=config.num_heads,
                                       linear_head_dim=config.head_dim, rms_norm_eps=config.norm_eps), tensors)


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(3, 256, (2, 90), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def logits(plain, prompts):
    return torch.stack([plain.logits(prompt.tolist()) for prompt in prompts])


def assert_logits(x, expected):
    ratio = error_ratio(x, expected.numpy())
    assert ratio <= FP32, f"error ratio {ratio:.3g}"


@pytest.mark.parametrize("length", [1, 16, 17, 64, 65, 90])
def test_model(recurrent, registered, model, prompts, logits, length):
    """Prompts of up to 64 tokens go to fused_recurrent_kda, longer ones to chunk_kda."""
    assert_logits(model(prompts[:, :length]).logits, logits[:, :length])
    assert (len(recurrent), len(registered)) == ((3, 0) if length <= 64 else (0, 3))


@pytest.mark.parametrize("parts", [[12, 1, 1, 1], [40, 30, 1, 1], [70, 1, 1, 17]], ids=str)
def test_model_with_a_cache(registered, model, prompts, logits, parts):
    outputs, cache = [], None
    for part in prompts.split([*parts, 90 - sum(parts)], 1)[:-1]:
        result = model(part, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        outputs.append(result.logits)
    assert_logits(torch.cat(outputs, 1), logits[:, :sum(parts)])


@pytest.mark.parametrize("length", [12, 40, 90])
def test_model_with_left_padding(registered, model, prompts, plain, length):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :7] = 0
    padded = model(prompts[:, :length], attention_mask=mask).logits
    assert_logits(padded[0, 7:], plain.logits(prompts[0, 7:length].tolist()))
    assert_logits(padded[1], plain.logits(prompts[1, :length].tolist()))


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("length", [10, 30, 80])
def test_model_generates(registered, model, prompts, plain, length):
    """Two prompts of different lengths, padded on the left, and their own greedy tokens."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :5] = 0
    tokens = model.generate(prompts[:, :length], attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None,
                            pad_token_id=0)[:, length:]
    expected = [plain.generate(prompts[0, 5:length].tolist(), 6), plain.generate(prompts[1, :length].tolist(), 6)]
    assert tokens.tolist() == expected


def test_the_cache_is_handed_on_once(registered):
    from fla.models.generation_utils import FLAGenerationMixin

    function = FLAGenerationMixin.prepare_inputs_for_generation
    libflashkda.fla.register()
    assert FLAGenerationMixin.prepare_inputs_for_generation is function


@pytest.mark.parametrize("more", [{"safe_gate": True, "lower_bound": -5.0}, {"allow_neg_eigval": True}, {"num_v_heads": 4}],
                         ids=str)
def test_layer_on_a_cpu(registered, recurrent, more):
    """Of the flags that the model above does not have: all at once is prompt and decode."""
    from fla.layers.kda import KimiDeltaAttention
    from fla.models.cache_utils import Cache

    torch.manual_seed(0)
    layer = KimiDeltaAttention(hidden_size=64, head_dim=32, num_heads=2, layer_idx=0, **more).eval()
    x = torch.randn(2, 90, 64)
    whole = layer(x)[0]
    cache, parts = Cache(), []
    for part in x.split([30, 1, 1, 58], 1):
        out, _, cache = layer(part, past_key_values=cache, use_cache=True)
        parts.append(out)
    ratio = error_ratio(torch.cat(parts, 1), whole.double().numpy())
    assert ratio <= 2 * FP32 and (len(registered), len(recurrent)) == (1, 4)


# ---- What is not taken ---------------------------------------------------------------------------


@pytest.mark.parametrize("more", [
    {"cp_context": object(), "return_intermediate_states": True},
    {"use_gate_in_kernel": True, "lower_bound": -7.0},
    {"unheard_of": 1},
], ids=str)
def test_what_goes_elsewhere(registered, registry, more):
    """What this package cannot do is rejected before the call, so that fla asks its next backend."""
    (backend,) = (backend for backend in registry._get_sorted_backends() if backend.backend_type == "flash_kda")
    accepted, reason = backend.verify("chunk_kda", **{**arguments(make(), "cpu"), **more})
    assert not accepted and reason
    assert backend.verify("chunk_kda", **arguments(make(), "cpu")) == (True, None)


@pytest.mark.parametrize("name", ["v", "g", "beta", "A_log", "dt_bias", "cu_seqlens"])
def test_arguments_that_are_no_tensors_are_named(recurrent, name):
    """Not sent on to kernels that would fail at something else."""
    import fla.ops.kda

    call = arguments(make(lengths=[3, 5], K=128, V=128), "cpu")
    few = {n: x for n, x in call.items() if n != "safe_gate"}
    for function, given in (fla.ops.kda.chunk_kda, call), (fla.ops.kda.fused_recurrent_kda, few):
        function(**given)
        with pytest.raises(TypeError, match=f"^{name} is of type"):
            function(**{**given, name: [0.0]})


def test_gradients_of_the_token_recurrence_go_elsewhere(registered):
    import fla.backends

    backend = fla.backends._operation_registries["kda"]._backends["flash_kda"]
    call = {**recurrent_arguments(make(T=2), "cpu"), "inplace_final_state": False}
    call["A_log"].requires_grad_()
    assert backend.verify("fused_recurrent_kda_fwd", **call) == (True, None)
    with torch.enable_grad():
        accepted, reason = backend.verify("fused_recurrent_kda_fwd", **call)
    assert not accepted and "backward" in reason


def test_gradients_go_elsewhere_where_there_is_no_backward(registered, registry, monkeypatch):
    (backend,) = (backend for backend in registry._get_sorted_backends() if backend.backend_type == "flash_kda")
    call = arguments(make(), "cpu")
    call["A_log"].requires_grad_()
    monkeypatch.setattr(libflashkda._C, "backward_available", lambda backend: False)
    assert backend.verify("chunk_kda", **call) == (True, None)
    with torch.enable_grad():
        accepted, reason = backend.verify("chunk_kda", **call)
    assert not accepted and reason == "this build of libflashkda has no backward pass on cpu here"


def test_dispatch_that_is_off():
    script = "import libflashkda; libflashkda.fla.register()"
    environment = {**os.environ, "FLA_DISABLE_BACKEND_DISPATCH": "1"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode and "RuntimeError: FLA_DISABLE_BACKEND_DISPATCH=1" in result.stderr


# ---- Beside fla's own kernels --------------------------------------------------------------------


def beside(monkeypatch, registered, call, calls=1):
    """What fla computes by itself, and what it computes here."""
    monkeypatch.setenv("FLA_FLASH_KDA", "0")
    theirs = call()
    assert not registered
    monkeypatch.delenv("FLA_FLASH_KDA")
    ours = call()
    assert len(registered) == calls
    return theirs, ours


def assert_alike(x, y, roundings):
    """Both may be off by what bf16 products cost, and by as many roundings to bf16."""
    ratio, allowed = error_ratio(x, y.double().cpu().numpy()), 2 * (BF16_MARGIN * BF16_ANY + roundings * ROUNDING_BF16)
    assert x.dtype == y.dtype and ratio <= allowed, f"error ratio {ratio:.3g}, at most {allowed:.3g} is allowed"


@pytest.mark.cuda
@pytest.mark.parametrize("more, intermediate", [
    ({"gate": "softplus"}, False),
    ({"gate": "sigmoid", "lower_bound": -5.0}, True),
    ({"gate": "none", "beta_mode": "given", "qk_norm": False}, False),
    ({"beta_mode": "twice_sigmoid"}, False),
    ({"v_first": False, "initial_state": torch.float32}, True),
    ({"lengths": [70, 0, 430], "v_first": False}, True),
    ({"H": 1, "HV": 2}, False),
], ids=str)
def test_same_as_flas_kernels(registered, monkeypatch, more, intermediate):
    """fla tunes its kernels anew for other head dims, which takes minutes; test_wider_backend has those."""
    import fla.ops.kda

    problem = make(**{"K": 128, "V": 128, "T": 500, **more})
    call = arguments(problem, "cuda")
    with torch.inference_mode():
        theirs, ours = beside(monkeypatch, registered, lambda: fla.ops.kda.chunk_kda(
            **call, return_intermediate_states=intermediate))
    assert len(theirs) == len(ours)
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape
        assert_alike(x, y, roundings=1)
    assert_right(problem, "cuda", ours)


@pytest.mark.cuda
@pytest.mark.parametrize("gate", [{}, {"safe_gate": True, "lower_bound": -5.0}, {"allow_neg_eigval": True},
                                  {"num_v_heads": 4}], ids=str)
def test_kda_layer(registered, monkeypatch, gate):
    from fla.layers.kda import KimiDeltaAttention
    from fla.models.cache_utils import Cache

    torch.manual_seed(0)
    layer = KimiDeltaAttention(**{"hidden_size": 256, "head_dim": 128, "num_heads": 2, "layer_idx": 0, **gate})
    layer = layer.to("cuda", torch.bfloat16).eval()
    x = torch.randn(2, 400, 256, dtype=torch.bfloat16, device="cuda")

    def call():
        cache = Cache()
        first, _, cache = layer(x[:, :250], past_key_values=cache, use_cache=True)
        second, _, cache = layer(x[:, 250:], past_key_values=cache, use_cache=True)
        return torch.cat([first, second], 1)

    theirs, ours = beside(monkeypatch, registered, call, calls=2)
    assert_alike(ours, theirs, roundings=2)
