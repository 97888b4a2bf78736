# SPDX-License-Identifier: MIT
"""Gradients: against torch's autograd through the recurrence in fp64, and all that torch does around them."""

from __future__ import annotations

import libflashkda
import numpy
import pytest
import torch
from libflashkda import _C
from recurrence import Problem, assert_close, in_layout, make, recurrence
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

ON_CUDA = _C.backward_available(_C.BACKENDS["cuda"])


@pytest.fixture(params=["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if ON_CUDA else [])])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


INPUTS = ("q", "k", "v", "g", "beta")
OPTIONAL = ("A_log", "dt_bias", "initial_state")


def leaves(problem: Problem, names=(*INPUTS, *OPTIONAL), dtype=None) -> Problem:
    """A copy whose tensors of these names require grad."""

    def leaf(name, x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.detach().to(dtype or x.dtype, copy=True).requires_grad_(name in names)

    return Problem(*(leaf(name, x) for name, x in zip(INPUTS, problem.inputs)),
                   {name: leaf(name, x) for name, x in problem.options.items()})


def tensors(problem: Problem) -> dict[str, torch.Tensor]:
    named = {**dict(zip(INPUTS, problem.inputs)), **problem.options}
    return {name: named[name] for name in (*INPUTS, *OPTIONAL) if isinstance(named.get(name), torch.Tensor)}


def weights(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """What the results are weighted with in a loss: their gradients, as bf16 holds them."""
    generator = torch.Generator().manual_seed(7)
    cu_seqlens = problem.options.get("cu_seqlens")
    sequences = problem.q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    states = (sequences, problem.v.shape[2], problem.q.shape[3], problem.v.shape[3])
    d_out, d_state = (torch.randn(shape, generator=generator).bfloat16().float() for shape in (problem.v.shape, states))
    return d_out, d_state.mT.contiguous() if problem.options["state_layout"] == "v_first" else d_state


def prefill(problem: Problem, **more):
    return libflashkda.prefill(*problem.inputs, **problem.options, output_final_state=True, **more)


def weighted(problem: Problem, out: torch.Tensor, state: torch.Tensor) -> None:
    d_out, d_state = weights(problem)
    torch.autograd.backward((out, state), (d_out.to(out), d_state.to(state)))


def gradients(problem: Problem, run=prefill, differentiate=weighted) -> dict[str, torch.Tensor]:
    """Of every tensor that requires grad, by its name."""
    differentiate(problem, *run(problem))
    return {name: x.grad for name, x in tensors(problem).items() if x.requires_grad}


def exact(problem: Problem, differentiate=weighted) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """The same in fp64; and for each head the size of the terms whose sum A_log's gradient is, which cancel."""
    here = leaves(problem, dtype=torch.float64)
    A_log = here.options.get("A_log")
    if A_log is not None:
        here.options["A_log"] = A_log.detach()[:, None].expand(here.g.shape).clone().requires_grad_()
    out, state, _ = recurrence(here)
    differentiate(here, out, state.mT if problem.options["state_layout"] == "v_first" else state)
    found = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in tensors(here).items()}
    if A_log is None:
        return found, None
    terms = found["A_log"]
    return {**found, "A_log": terms.sum((0, 1, 3))}, terms.square().sum((0, 1, 3)).sqrt()


def assert_right(found: dict[str, torch.Tensor], problem: Problem, description: str, differentiate=weighted) -> None:
    expected, size = exact(problem, differentiate)
    given = tensors(problem)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.shape == given[name].shape and gradient.dtype == given[name].dtype, name
        if name == "A_log":  # the error is measured beside the terms
            gradient, expected[name] = gradient.cpu() - expected[name] + size, size
        assert_close(gradient, expected[name].numpy(), f"{name}, {description}")


#: T reaches beyond the first state that is kept, after 128 tokens.
CASES = [
    {"initial_state": torch.float32},
    {"gate": "sigmoid", "lower_bound": -4.0, "beta_mode": "twice_sigmoid", "v_first": False, "scale": 0.3},
    {"gate": "none", "beta_mode": "given", "qk_norm": False, "initial_state": torch.float32, "v_first": False},
    {"H": 1, "HV": 3, "B": 2, "V": 40},
    {"lengths": [130, 0, 1, 128, 300], "initial_state": torch.float32, "H": 1},
    {"T": 5},
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16, "initial_state": torch.bfloat16},
]


@pytest.mark.parametrize("more", CASES, ids=str)
def test_gradients(more, device):
    problem = make(**{"T": 150, "K": 32, "V": 32, "dtype": torch.float32, **more})
    here = leaves(problem.to(device))
    description = libflashkda.prefill_describe(*here.inputs, **here.options)
    assert_right(gradients(here), problem, description)


@pytest.mark.parametrize("library", ["numpy", pytest.param("jax", marks=pytest.mark.library("jax")), "torch"])
def test_backward(library):
    """For libraries without autograd: the same bits."""
    problem = make(T=50, K=32, V=32, dtype=torch.float32, initial_state=torch.float32, H=1, HV=2)
    expected = gradients(leaves(problem))
    d_out, d_final_state = weights(problem)
    if library == "jax":
        import jax.numpy

        convert = jax.numpy.asarray
    else:
        convert = {"numpy": numpy.asarray, "torch": lambda x: x}[library]
    inputs = [convert(x.numpy() if library != "torch" else x) for x in problem.inputs]
    options = {name: convert(x.numpy() if library != "torch" else x) if isinstance(x, torch.Tensor) else x
               for name, x in problem.options.items()}
    given = {name: convert(x.numpy() if library != "torch" else x)
             for name, x in (("d_out", d_out), ("d_final_state", d_final_state))}
    found = libflashkda.backward(*inputs, **options, **given)
    assert list(found) == list(_C.BACKWARD_WRITTEN)
    for gradient, right in zip(found.values(), expected.values(), strict=True):
        assert type(gradient) is type(inputs[0]) and numpy.array_equal(numpy.asarray(gradient), right.numpy())
    some = libflashkda.backward(*inputs, **options, **given, wanted=("d_dt_bias", "dk"))
    assert list(some) == ["dk", "d_dt_bias"]
    assert all(numpy.array_equal(numpy.asarray(some[name]), numpy.asarray(found[name])) for name in some)


def test_backward_from_states_that_were_kept():
    problem = make(T=100, K=32, V=32, dtype=torch.float32)
    kept = torch.empty(1, 4, 2, 32, 32)
    libflashkda.prefill(*problem.inputs, **problem.options, checkpoints=kept, checkpoint_every=32)
    d_out, _ = weights(problem)
    found = libflashkda.backward(*problem.inputs, **problem.options, d_out=d_out)
    assert "d_initial_state" not in found
    for name, x in libflashkda.backward(*problem.inputs, **problem.options, d_out=d_out, checkpoints=kept,
                                        checkpoint_every=32).items():
        assert_close(x, found[name].double().numpy(), "fp32")
    kept.zero_()  # they are read
    other = libflashkda.backward(*problem.inputs, **problem.options, d_out=d_out, checkpoints=kept, checkpoint_every=32)
    assert not torch.equal(other["dq"], found["dq"])


@pytest.mark.parametrize("lengths", [None, [50, 0, 30, 100]])
def test_backward_is_compiled(lengths, device):
    """With states that lie where the caller says, the last one's of each sequence among them."""
    torch.compiler.reset()
    problem = make(T=70, K=32, V=32, lengths=lengths, dtype=torch.float32).to(device)
    d_out = weights(problem)[0].to(device)
    if lengths:
        starts = torch.tensor([0, 2, 2, 3, 7], device=device)
        kept = {"checkpoints": torch.empty(7, 2, 32, 32, device=device), "checkpoint_cu_starts": starts}
    else:
        kept = {"checkpoints": torch.empty(1, 3, 2, 32, 32, device=device)}
    kept["checkpoint_every"] = 32
    libflashkda.prefill(*problem.inputs, **problem.options, **kept)

    def run(d_out):
        return libflashkda.backward(*problem.inputs, **problem.options, **kept, d_out=d_out, wanted=("dk", "dg"))

    expected = run(d_out)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(d_out)
    assert list(found) == ["dk", "dg"] and all(torch.equal(found[name], expected[name]) for name in found)


# ---- What is asked for, and what is kept ---------------------------------------------------------


class Watched(TorchDispatchMode):
    """Notes which gradients the op is given, and which it computes."""

    def __init__(self):
        super().__init__()
        self.given: list[list[bool]] = []
        self.wanted: list[list[bool]] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.libflashkda.backward.default:
            self.given.append([x is not None for x in arguments[-3:-1]])
            self.wanted.append(arguments[-1])
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("names", [*((name,) for name in (*INPUTS, *OPTIONAL)), ("k", "beta", "dt_bias")], ids=str)
def test_only_what_is_asked_for(names, device):
    problem = make(T=140, K=32, V=32, dtype=torch.float32, initial_state=torch.float32).to(device)
    everything = gradients(leaves(problem))
    found = gradients(leaves(problem, names))
    assert found.keys() == set(names)
    with Watched() as watched:
        gradients(leaves(problem, names))
    assert watched.wanted == [[name in names for name in (*INPUTS, *OPTIONAL)]]
    assert all(torch.equal(found[name], everything[name]) for name in names)


def out_alone(problem, out, state):
    out.backward(weights(problem)[0].to(out))


def state_alone(problem, out, state):
    state.backward(weights(problem)[1].to(state))


def sums(problem, out, state):
    """Whose gradients have no strides."""
    (out.sum() + state.sum()).backward()


def products(problem, out, state):
    """Whose gradients lie in columns."""
    d_out, d_state = weights(problem)
    ((out.mT @ d_out.to(out)).sum() + (state.mT @ d_state.to(state)).sum()).backward()


@pytest.mark.parametrize("differentiate", [out_alone, state_alone, sums, products])
def test_other_gradients_of_the_results(differentiate, device):
    problem = make(T=40, K=32, V=32, dtype=torch.float32, initial_state=torch.float32)
    here = leaves(problem.to(device))
    found = gradients(here, differentiate=differentiate)
    assert_right(found, problem, libflashkda.prefill_describe(*here.inputs, **here.options), differentiate)
    with Watched() as watched:
        gradients(leaves(problem.to(device)), differentiate=differentiate)
    assert watched.given == [[differentiate is not state_alone, differentiate is not out_alone]]


def kept(call) -> list[torch.Tensor]:
    """What autograd keeps of a call."""
    found: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
        call()
    return found


@pytest.mark.parametrize("lengths", [None, [130, 0, 1, 20, 361]])
def test_what_is_kept(lengths, device):
    """Inputs, and a state every 128 tokens; without a gradient nothing."""
    problem = make(B=1 if lengths else 2, T=300, K=32, V=16, lengths=lengths).to(device)
    here = leaves(problem, ("k",))
    found = kept(lambda: prefill(here))
    given = (x for x in (*here.inputs, *here.options.values()) if isinstance(x, torch.Tensor))
    memory = {x.untyped_storage().data_ptr() for x in given}
    (states,) = [x for x in found if x.untyped_storage().data_ptr() not in memory]
    assert states.shape == ((4, 2, 16, 32) if lengths else (2, 2, 2, 16, 32))
    assert states.dtype == (torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.no_grad():
        assert kept(lambda: prefill(here)) == []
    assert kept(lambda: prefill(problem)) == []
    assert prefill(problem)[0].grad_fn is None


@pytest.mark.parametrize("more", [{}, {"lengths": [130, 0, 1, 20, 300]}], ids=str)
def test_results_are_those_of_inference(more, device):
    problem = make(**{"T": 300, "K": 32, "V": 32, **more}).to(device)
    for x, y in zip(prefill(leaves(problem)), prefill(problem), strict=True):
        assert x.requires_grad and torch.equal(x, y)


# ---- fla's interface -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [{}, {"v": torch.bfloat16}, {"q": torch.bfloat16, "initial_state": torch.bfloat16}],
                         ids=str)
def test_chunk_kda(dtypes, device):
    problem = make(T=40, K=32, V=32, dtype=torch.float32, initial_state=torch.float32, v_first=False)
    named = {name: x.to(dtypes.get(name, torch.float32)) for name, x in tensors(problem).items()}
    problem = Problem(*(named[name] for name in INPUTS), {**problem.options, **{name: named[name] for name in OPTIONAL}})

    def run(problem):
        o = problem.options
        return libflashkda.chunk_kda(*problem.inputs, A_log=o["A_log"].view(1, 1, -1, 1), dt_bias=o["dt_bias"].flatten(),
                                     initial_state=o["initial_state"], output_final_state=True, use_gate_in_kernel=True,
                                     use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True)

    here = leaves(problem.to(device))
    out, state = run(here)
    assert out.dtype == here.q.dtype and state.dtype == torch.float32
    with torch.no_grad():
        assert all(torch.equal(x, y) for x, y in zip((out, state), run(here), strict=True))
    assert_right(gradients(here, run), problem, libflashkda.prefill_describe(*here.inputs, **here.options))


# ---- What torch does with a function -------------------------------------------------------------


def test_gradcheck(device):
    """Of the oracle, whose results are fp64 until they are rounded to fp32."""
    problem = leaves(make(T=3, H=1, K=4, V=3, dtype=torch.float32, initial_state=torch.float32, seed=5))
    names = (*INPUTS, *OPTIONAL)

    def run(*leaves):
        named = dict(zip(names, leaves))
        return libflashkda.prefill(**named, gate="softplus", beta_mode="sigmoid", qk_norm=True, backend="reference",
                                   output_final_state=True)

    inputs = tuple(tensors(problem)[name] for name in names)
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(run, inputs, eps=1 / 64, atol=2e-3, rtol=1e-3, nondet_tol=0)


def test_called_twice(device):
    """By one graph twice, and by two graphs: gradients add up."""
    problem = make(T=140, K=32, V=32, dtype=torch.float32).to(device)
    once = gradients(leaves(problem))
    here = leaves(problem)
    loss = sum((x * y.to(x)).sum() for x, y in zip(prefill(here), weights(here)))
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(torch.equal(x.grad, 2 * once[name]) for name, x in tensors(here).items())
    gradients(here)
    assert all(torch.equal(x.grad, 2 * once[name] + once[name]) for name, x in tensors(here).items())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, device):
    problem = make(T=140, K=32, V=32, dtype=torch.float32, initial_state=torch.float32).to(device)
    names = (*INPUTS, *OPTIONAL)
    rest = {name: value for name, value in problem.options.items() if name not in OPTIONAL}

    def layer(*inputs):
        named = dict(zip(names, inputs))
        return libflashkda.prefill(**{**named, "q": named["q"] * 2}, **rest, output_final_state=True)

    plain = gradients(leaves(problem), lambda p: layer(*(tensors(p)[name] for name in names)))
    again = gradients(leaves(problem), lambda p: checkpoint(layer, *(tensors(p)[name] for name in names),
                                                            use_reentrant=reentrant))
    assert all(torch.equal(again[name], plain[name]) for name in names)


def test_autocast(device):
    """The layer around it computes in bf16; parameters and their gradients stay fp32."""
    problem = make(T=40, H=2, K=32, V=32, dtype=torch.float32).to(device)
    weight = torch.nn.Linear(32, 32, bias=False, device=device)

    def run(p):
        q = weight(p.q)
        assert q.dtype == torch.bfloat16
        return libflashkda.prefill(q, *p.inputs[1:], **p.options, output_final_state=True)

    with torch.autocast(device, torch.bfloat16):
        found = gradients(leaves(problem), run)
    assert all(x.dtype == torch.float32 and x.isfinite().all() and x.any() for x in found.values())
    assert weight.weight.grad.dtype == torch.float32
    rounded = problem.q.bfloat16() @ weight.weight.bfloat16().mT
    expected = gradients(leaves(Problem(rounded, *problem.inputs[1:], problem.options)))
    assert all(torch.equal(found[name], expected[name]) for name in found if name != "q")


class Layer(torch.nn.Module):
    def forward(self, q, k, v, g, beta, A_log, dt_bias, state, cu_seqlens):
        out, state = libflashkda.prefill(q * 2, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, gate="softplus",
                                         beta_mode="sigmoid", qk_norm=True, initial_state=state, cu_seqlens=cu_seqlens,
                                         output_final_state=True)
        return out * 2, state


def compiled_gradients(problem, layer):
    return gradients(problem, lambda p: layer(*(tensors(p)[name] for name in (*INPUTS, *OPTIONAL)),
                                              p.options.get("cu_seqlens")))


@pytest.mark.parametrize("lengths", [None, [130, 0, 20]])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compile(backend, lengths, device):
    torch.compiler.reset()
    problem = make(T=150, K=32, V=32, lengths=lengths, dtype=torch.float32, initial_state=torch.float32).to(device)
    expected = compiled_gradients(leaves(problem), Layer())
    found = compiled_gradients(leaves(problem), torch.compile(Layer(), fullgraph=True, backend=backend))
    assert all(torch.equal(found[name], expected[name]) for name in (*INPUTS, *OPTIONAL))


def test_compile_with_dynamic_shapes(device):
    torch.compiler.reset()
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (150, 20, 300):
        problem = make(T=T, K=32, V=32, dtype=torch.float32, initial_state=torch.float32).to(device)
        expected = compiled_gradients(leaves(problem), Layer())
        found = compiled_gradients(leaves(problem), compiled)
        assert all(torch.equal(found[name], expected[name]) for name in (*INPUTS, *OPTIONAL))


def test_export(device):
    """An exported program keeps nothing for gradients, but has them."""
    problem = make(T=150, K=32, V=32, dtype=torch.float32, initial_state=torch.float32).to(device)
    names, here = (*INPUTS, *OPTIONAL), leaves(problem)
    program = torch.export.export(Layer(), (*(tensors(here)[name] for name in names), None))
    (node,) = (node for node in program.graph.nodes if node.target is torch.ops.libflashkda.prefill.default)
    assert not node.kwargs.get("checkpoint_every")
    found, expected = compiled_gradients(here, program.module()), compiled_gradients(leaves(problem), Layer())
    for name in names:
        assert_close(found[name], expected[name].double().cpu().numpy(), name)


OPTIONS = {"gate": 1, "lower_bound": 0.0, "beta_mode": 1, "scale": 0.0, "flags": 1}


def test_ops_are_well_formed(device):
    problem = make(T=150, K=16, V=16, dtype=torch.float32, initial_state=torch.float32).to(device)
    named = tensors(leaves(problem))
    inputs = [named[name] for name in (*INPUTS, "A_log", "dt_bias")]
    options = {**OPTIONS, "checkpoint_every": 128}
    torch.library.opcheck(torch.ops.libflashkda.prefill.default,
                          (*inputs, None, named["initial_state"], None, None, True), options)
    with torch.no_grad():
        out, state, kept = torch.ops.libflashkda.prefill(*inputs, None, named["initial_state"], None, None, True,
                                                         **options)
    torch.library.opcheck(torch.ops.libflashkda.backward.default,
                          (*(x.detach() for x in inputs), None, named["initial_state"].detach(), kept, None, out, state,
                           [True, False, True, True, True, True, True, True]), options)


# ---- What is refused -----------------------------------------------------------------------------


def test_second_derivatives_are_refused(device):
    here = leaves(make(T=5, dtype=torch.float32).to(device))
    out, _ = prefill(here)
    (dv,) = torch.autograd.grad(out.sum(), here.v, create_graph=True)  # which alone is no harm
    with pytest.raises(NotImplementedError, match="^a gradient of a gradient is asked for"):
        dv.sum().backward()


def test_tangents_are_refused(device):
    here = leaves(make(T=5, dtype=torch.float32).to(device), ("v",))
    with forward_ad.dual_level():
        q = forward_ad.make_dual(here.q, torch.ones_like(here.q))
        with pytest.raises(NotImplementedError, match="^q has a tangent"):
            libflashkda.prefill(q, *here.inputs[1:], **here.options)


def test_changed_inputs_are_noticed(device):
    here = leaves(make(T=5, dtype=torch.float32).to(device))
    k = here.k * 1
    out = libflashkda.prefill(here.q, k, *here.inputs[2:], **here.options)
    k.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("more", [
    {"out": torch.zeros(1, 5, 2, 64)},
    {"final_state": torch.zeros(1, 2, 64, 64)},
    {"checkpoints": torch.zeros(1, 1, 2, 64, 64), "checkpoint_every": 5},
    {"workspace": torch.zeros(1 << 20)},
], ids=lambda more: next(iter(more)))
def test_given_memory_is_refused(more):
    here = leaves(make(T=5, dtype=torch.float32), ("beta",))
    with pytest.raises(NotImplementedError, match="^beta requires grad, but no gradient passes through a call that"):
        libflashkda.prefill(*here.inputs, **here.options, **more)
    assert all(not x.any() for x in more.values() if isinstance(x, torch.Tensor))


def test_what_has_no_gradient(device):
    here = leaves(make(T=5, dtype=torch.float32, initial_state=torch.float32).to(device))
    o = {name: value for name, value in here.options.items() if name != "initial_state"}
    with pytest.raises(NotImplementedError, match="^state_indices is given where a gradient is asked for"):
        libflashkda.prefill(*here.inputs, **here.options, state_indices=torch.zeros(1, dtype=torch.int32, device=device))
    with pytest.raises(NotImplementedError, match="^return_intermediate_states is given where a gradient is asked for"):
        libflashkda.chunk_kda(*here.inputs, return_intermediate_states=True)
    with pytest.raises(NotImplementedError, match="^q requires grad, but libflashkda has no second derivative"):
        libflashkda.backward(*here.inputs, **o, d_out=here.v.detach())


@pytest.mark.parametrize("change, exception, sentence", [
    ({"g": [0.0]}, TypeError, "^g is of type"),
    ({"k": None}, TypeError, "^k is of type"),
    ({"beta": torch.zeros(1, 300)}, ValueError, "^beta has 2 dimensions"),
    ({"checkpoint_every": 32}, ValueError, "^checkpoints is None"),
    ({"cu_seqlens": torch.tensor([0, 500])}, ValueError, r"^cu_seqlens\[1\] is 500"),
    ({"cu_seqlens": torch.tensor([0, 140, 0, 300])}, ValueError, r"^cu_seqlens\[2\] is 0"),
    ({"cu_seqlens": torch.tensor(300)}, ValueError, r"^cu_seqlens has 0 dimensions"),
    ({"cu_seqlens": torch.tensor([0.0, 300.0])}, ValueError, r"^cu_seqlens has dtype float32"),
], ids=str)
def test_bad_input(change, exception, sentence):
    here = leaves(make(T=300, K=8, V=8, dtype=torch.float32))
    with pytest.raises(exception, match=sentence):
        libflashkda.prefill(**{**dict(zip(INPUTS, here.inputs)), **here.options, **change})


@pytest.mark.parametrize("change, exception, sentence", [
    ({"wanted": ("dx",)}, ValueError, "^wanted holds 'dx'; expected 'dq' or"),
    ({"wanted": ("d_dt_bias",), "dt_bias": None}, ValueError, "^wanted holds 'd_dt_bias' without dt_bias"),
    ({"d_out": None}, ValueError, "^d_out is NULL without d_final_state"),
    ({"d_out": torch.zeros(1, 5, 2, 32)}, ValueError, "^d_out has shape"),
    ({"k": [1.0]}, TypeError, "^k is of type"),
], ids=str)
def test_bad_input_of_backward(change, exception, sentence):
    problem = make(T=5, dtype=torch.float32)
    call = {**dict(zip(INPUTS, problem.inputs)), **problem.options, "d_out": problem.v, **change}
    with pytest.raises(exception, match=sentence):
        libflashkda.backward(**call)


def test_a_build_without_a_backward_pass(monkeypatch):
    here = leaves(make(T=5), ("v",))
    monkeypatch.setattr(_C, "backward_available", lambda backend: False)
    with pytest.raises(NotImplementedError, match="^a gradient is asked for, but this build of libflashkda has no backward"):
        prefill(here)


if not ON_CUDA:

    @pytest.mark.cuda
    def test_cuda_says_that_it_has_no_backward():
        here = leaves(make(T=5).to("cuda"), ("v",))
        with pytest.raises(NotImplementedError, match="^a gradient is asked for, but this build of libflashkda"):
            prefill(here)
