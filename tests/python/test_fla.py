# SPDX-License-Identifier: MIT
"""flash-linear-attention on this package: by its own FlashKDA backend, and after register()."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import libflashkda
import pytest
import torch
from recurrence import BF16_ANY, BF16_MARGIN, Problem, assert_close, error_ratio, in_layout, make, recurrence, solve

pytestmark = [pytest.mark.library("fla"), pytest.mark.usefixtures("no_grad"),
              pytest.mark.filterwarnings("ignore:Triton is not supported on current platform")]

ROUNDING_BF16 = 1.65e-3


@pytest.fixture
def registry():
    """fla's backends of chunk_kda; those and the ones of all of KDA are put back afterwards."""
    import fla.backends
    import fla.ops.kda

    registry = fla.backends._function_registries[inspect.unwrap(fla.ops.kda.chunk_kda)]
    registries = registry, fla.backends._operation_registries["kda"]
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
    """Gives the list of calls that came to decode()."""
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
    (make(T=17), {}),
    (make(lengths=[30, 2]), {}),
    (make(T=2), {"beta": torch.ones(1, 2, 2, 64)}),
    (make(T=2), {"A_log": None}),
    (make(T=2, K=300), {}),
], ids=["T=17", "packed", "beta a channel", "no A_log", "K=300"])
def test_recurrent_goes_elsewhere(registered, problem, more):
    import fla.backends

    backend = fla.backends._operation_registries["kda"]._backends["flash_kda"]
    call = {**recurrent_arguments(problem, "cpu"), "inplace_final_state": False}
    accepted, reason = backend.verify("fused_recurrent_kda_fwd", **{**call, **more})
    assert not accepted and "libflashkda" in reason


# ---- What is not taken ---------------------------------------------------------------------------


@pytest.mark.parametrize("more", [
    {"cp_context": object()},
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
