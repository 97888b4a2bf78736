# SPDX-License-Identifier: MIT
"""What torch keeps of tensors beside their memory, and of calls beside their results: versions, tangents, lazy signs,
subclasses, traces, modes."""

from __future__ import annotations

import io
import warnings

import libflashkda
import pytest
import torch
from libflashkda._fused_recurrent import fused_recurrent_kda_fwd
from recurrence import make
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

T, H, K = 8, 2, 32


@pytest.fixture
def call(device):
    """q, k, v, g, beta and what belongs to them: small enough for decode, and as every entry takes it."""
    problem = make(T=T, H=H, K=K, V=K, dtype=torch.float32, gate="softplus", seed=3).to(device)
    return {**dict(zip(("q", "k", "v", "g", "beta"), problem.inputs)), "A_log": problem.options["A_log"],
            "dt_bias": problem.options["dt_bias"], "state": torch.ones(1, H, K, K, device=device),
            "out": torch.zeros(1, T, H, K, device=device)}


MODES = {"gate": "softplus", "beta_mode": "sigmoid", "qk_norm": True}
IN_KERNEL = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


def prefill(q, k, v, g, beta, A_log, dt_bias, state, out):
    return libflashkda.prefill(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, **MODES, initial_state=state)


def prefill_into(q, k, v, g, beta, A_log, dt_bias, state, out):
    libflashkda.prefill(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, **MODES, initial_state=state, final_state=state,
                        out=out)
    return out


def decode(q, k, v, g, beta, A_log, dt_bias, state, out):
    return libflashkda.decode(q, k, v, g, beta, state, A_log=A_log, dt_bias=dt_bias, **MODES)


def decode_into(q, k, v, g, beta, A_log, dt_bias, state, out):
    libflashkda.decode(q, k, v, g, beta, state, A_log=A_log, dt_bias=dt_bias, **MODES, out=out)
    return out


def fwd(q, k, v, g, beta, A_log, dt_bias, state, out):
    libflashkda.fwd(q, k, v, g, beta, K**-0.5, out, A_log, dt_bias, None, state, state)
    return out


def chunk_kda(q, k, v, g, beta, A_log, dt_bias, state, out):
    return libflashkda.chunk_kda(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, initial_state=state, state_v_first=True,
                                 **IN_KERNEL)[0]


def fused_recurrent(q, k, v, g, beta, A_log, dt_bias, state, out):
    return fused_recurrent_kda_fwd(q, k, v, g, beta, A_log, dt_bias, state, state_v_first=True, **IN_KERNEL, out=out)[0]


#: The entries, and what each writes to.
ENTRIES = {prefill: (), prefill_into: ("state", "out"), decode: ("state",), decode_into: ("state", "out"),
           fwd: ("state", "out"), chunk_kda: (), fused_recurrent: ("state", "out")}
entries = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
names = pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "A_log", "dt_bias", "state", "out"])


def fresh(call):
    return {name: x.clone() for name, x in call.items()}


def results(entry, call):
    """What it returns, and every argument afterwards."""
    with torch.no_grad():
        out = entry(**call)
    return {"result": out, **call}


def assert_same(entry, call, expected):
    for name, x in results(entry, call).items():
        assert torch.equal(x.as_subclass(torch.Tensor), expected[name]), name


# ---- Versions ------------------------------------------------------------------------------------


@entries
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_versions_of_what_is_written_are_raised(entry, backend, call):
    before = {name: x._version for name, x in call.items()}
    with torch.no_grad():
        (entry if backend is None else torch.compile(entry, backend=backend))(**call)
    raised = {name for name, x in call.items() if x._version != before[name]}
    assert raised == set(ENTRIES[entry])
    torch.compiler.reset()


def test_versions_of_checkpoints_and_convolutions(call):
    call.pop("out")
    state = call.pop("state")
    checkpoints = torch.zeros(1, 2, H, K, K, device=state.device)
    libflashkda.prefill(**call, **MODES, checkpoints=checkpoints, checkpoint_every=4)
    assert checkpoints._version > 0
    past, weight = (torch.zeros(1, H * K, n, device=state.device) for n in (3, 4))
    convolution = (weight[0], None, past)
    libflashkda.decode(**call, state=state, **MODES, k_conv=convolution, keep_state=True)
    assert past._version == state._version == weight._version == 0
    libflashkda.decode(**call, state=state, **MODES, k_conv=convolution)
    assert past._version > 0 and state._version > 0 and weight._version == 0


@entries
def test_autograd_notices_that_memory_it_kept_was_written(entry, call):
    for name in ENTRIES[entry]:
        here = fresh(call)
        weight = torch.ones_like(here[name], requires_grad=True)
        loss = (weight * here[name]).sum()
        with torch.no_grad():
            entry(**here)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@entries
def test_tensors_without_versions(entry, call):
    expected = results(entry, fresh(call))
    with torch.inference_mode():
        assert_same(entry, fresh(call), expected)


# ---- Tangents ------------------------------------------------------------------------------------


@entries
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["q", "beta", "A_log", "state"])
def test_tangents_are_refused(entry, name, grad, call):
    told = name if name != "state" or entry in (decode, decode_into, fused_recurrent) else "initial_state"
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        call[name] = forward_ad.make_dual(call[name], torch.ones_like(call[name]))
        with pytest.raises(NotImplementedError, match=f"^{told} has a tangent"):
            entry(**call)
    assert (call["out"] == 0).all()


def test_tangents_are_refused_by_the_ops(call):
    options = {"gate": 1, "lower_bound": 0.0, "beta_mode": 1, "scale": 0.0, "flags": 1}
    inputs = [call[name] for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias")]
    with forward_ad.dual_level(), torch.no_grad():
        inputs[2] = forward_ad.make_dual(inputs[2], torch.ones_like(inputs[2]))
        with pytest.raises(NotImplementedError, match="^v has a tangent"):
            torch.ops.libflashkda.prefill(*inputs, None, None, None, None, False, **options)


def test_a_dual_level_alone_changes_nothing(call):
    expected = results(prefill, fresh(call))
    with forward_ad.dual_level():
        assert_same(prefill, call, expected)


# ---- Lazy signs ----------------------------------------------------------------------------------


def lazily(x):
    """The same values, with the sign in a flag."""
    return torch._neg_view(-x)


@entries
@names
def test_lazy_signs(entry, name, call):
    here = {**fresh(call), name: lazily(call[name])}
    assert here[name].is_neg() and torch.equal(here[name], call[name])
    if name not in ENTRIES[entry]:
        assert_same(entry, here, results(entry, fresh(call)))
        return
    told = name if name == "out" or entry not in (prefill_into, fwd) else "final_state"
    with torch.no_grad(), pytest.raises(ValueError, match=f"^{told} is a view with torch's lazy negative bit"):
        entry(**here)
    assert all(torch.equal(here[other], call[other]) for other in call)


def test_imaginary_part_of_a_conjugate(call):
    """As such a view comes about, where any stride is taken."""
    expected = results(prefill, fresh(call))
    imaginary = torch.complex(torch.zeros_like(call["beta"]), -call["beta"]).conj().imag
    assert imaginary.is_neg() and imaginary.stride(-1) == 2
    assert_same(prefill, {**call, "beta": imaginary}, expected)


def test_lazy_signs_of_other_arguments(call):
    state, out = call.pop("state"), call.pop("out")
    weight = torch.randn(H * K, 4, device=out.device)
    past = torch.randn(1, H * K, 3, device=out.device)
    norm = torch.randn(K, device=out.device)
    more = {**MODES, "norm_weight": norm, "q_conv": (weight, weight[:, 0].contiguous(), past)}
    expected = libflashkda.decode(**call, state=state, **more, keep_state=True)
    lazy = {**MODES, "norm_weight": lazily(norm), "q_conv": (lazily(weight), lazily(weight[:, 0]), lazily(past))}
    assert torch.equal(libflashkda.decode(**call, state=lazily(state), **lazy, keep_state=True), expected)
    with pytest.raises(ValueError, match="^q_conv_state is a view"):
        libflashkda.decode(**call, state=state, **lazy)
    checkpoints = lazily(torch.zeros(1, 2, H, K, K, device=out.device))
    with pytest.raises(ValueError, match="^checkpoints is a view"):
        libflashkda.prefill(**call, **MODES, checkpoints=checkpoints, checkpoint_every=4)


def test_conjugates_are_complex(call):
    call["v"] = torch.complex(call["v"], call["v"]).conj()
    with pytest.raises(ValueError, match="^v has dtype complex64|^v cannot be read"):
        prefill(**call)


# ---- Subclasses ----------------------------------------------------------------------------------


class Named(torch.Tensor):
    """As wrappers that only add attributes are."""


class Weight(torch.nn.Parameter):
    pass


@entries
@names
@pytest.mark.parametrize("kind", [Named, Weight])
def test_plain_subclasses(entry, name, kind, call):
    expected = results(entry, fresh(call))
    x = call[name].clone()
    here = {**call, name: x.as_subclass(Named) if kind is Named else Weight(x, requires_grad=False)}
    assert type(here[name]) is kind
    assert_same(entry, here, expected)


def test_descriptions_of_subclasses(call):
    state, _ = call.pop("state"), call.pop("out")
    named = {name: x.as_subclass(Named) for name, x in call.items()}
    assert libflashkda.prefill_describe(**named, **MODES) == libflashkda.prefill_describe(**call, **MODES)
    assert libflashkda.prefill_workspace_size(**named, **MODES) == libflashkda.prefill_workspace_size(**call, **MODES)
    assert (libflashkda.decode_describe(**named, state=state, **MODES)
            == libflashkda.decode_describe(**call, state=state, **MODES))


class Watched(torch.Tensor):
    """Holds a tensor, and notes the ops that it goes through."""

    seen: list[str] = []

    @staticmethod
    def __new__(cls, held):
        watched = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device,
                                                      strides=held.stride())
        watched.held = held
        return watched

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        cls.seen.append(str(function))
        return function(*tree_map_only(cls, lambda x: x.held, arguments),
                        **tree_map_only(cls, lambda x: x.held, keywords or {}))


@entries
def test_a_subclass_that_takes_part_sees_the_op(entry, call):
    expected = results(entry, fresh(call))
    Watched.seen.clear()
    q = call["q"]
    here = results(entry, {**call, "q": Watched(q)})
    assert any(name.startswith("libflashkda.") for name in Watched.seen)
    assert all(torch.equal(here[name], expected[name]) for name in here if name != "q")


# ---- Traces and modes ----------------------------------------------------------------------------


def other(call):
    return {name: x.flip(1) if x.ndim > 1 else x for name, x in fresh(call).items()}


@entries
def test_jit_trace(entry, call):
    expected = results(entry, other(call))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(entry, tuple(fresh(call).values()), check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    for recorded in traced, loaded:
        assert_same(lambda **here: recorded(*here.values()), other(call), expected)


@entries
@pytest.mark.parametrize("how", [{}, {"tracing_mode": "fake"}, {"tracing_mode": "symbolic"}, {"pre_dispatch": True}],
                         ids=str)
def test_make_fx(entry, how, call):
    expected = results(entry, other(call))
    with torch.no_grad():
        graph = make_fx(lambda *x: entry(*x), **how)(*fresh(call).values())
    assert any("libflashkda" in str(node.target) for node in graph.graph.nodes)
    assert_same(lambda **here: graph(*here.values()), other(call), expected)


class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


@entries
def test_a_dispatch_mode_sees_the_op(entry, call):
    expected = results(entry, fresh(call))
    with Log() as log:
        here = results(entry, call)
    assert sum(name.startswith("libflashkda.") for name in log.names) == 1
    assert all(torch.equal(here[name], expected[name]) for name in here)


def test_without_the_exchange(call, monkeypatch):
    """torch before it had DLPack's C exchange: capsules, and the same bookkeeping."""
    expected = results(decode_into, fresh(call))
    monkeypatch.setattr(libflashkda._torch.LIBRARY, "exchange", False)
    before = {name: x._version for name, x in call.items()}
    assert_same(decode_into, call, expected)
    assert {name for name, x in call.items() if x._version != before[name]} == {"state", "out"}
