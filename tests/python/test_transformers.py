# SPDX-License-Identifier: MIT
"""transformers on this package after register(): its Kimi Linear beside its own loop of torch's operations."""

from __future__ import annotations

import importlib.util
import inspect
import os
import pathlib
import subprocess
import sys

import libflashkda
import libflashkda.transformers as ours
import pytest
import torch
from recurrence import FP32, assert_close, error_ratio, in_layout, make, solve

pytestmark = [pytest.mark.library("transformers"),
              pytest.mark.filterwarnings("ignore:Triton is not supported on current platform")]

PREFILL, DECODE = ours._PREFILL, ours._DECODE


def modeling(model: str):
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


@pytest.fixture
def registered():
    """register() is in force, until the end of the test."""
    modules = [modeling(model) for model in ours.present()]
    before = [(module, name, getattr(module, name)) for module in modules for name in (PREFILL, DECODE)]
    ours.register()
    yield
    for module, name, function in before:
        setattr(module, name, function)


@pytest.fixture
def calls(registered, monkeypatch):
    """Names of the functions that came to this package."""
    calls = []

    def counted(name, function):
        def call(*arguments, **keywords):
            calls.append(name)
            return function(*arguments, **keywords)
        return call

    monkeypatch.setattr(ours, "_OURS", {name: counted(name, function) for name, function in ours._OURS.items()})
    ours.register()
    return calls


class Loop:
    """While it lasts, transformers runs its own loop of torch's operations."""

    def __enter__(self):
        module = modeling("kimi_linear")
        self.before = {name: getattr(module, name) for name in (PREFILL, DECODE)}
        for name, function in self.before.items():
            loop = inspect.unwrap(function)
            assert "last_recurrent_state" in loop.__code__.co_varnames
            setattr(module, name, loop)

    def __exit__(self, *_):
        for name, function in self.before.items():
            setattr(modeling("kimi_linear"), name, function)


@pytest.fixture(scope="module")
def model():
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    config = KimiLinearConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=4,
        num_local_experts=4, num_experts_per_tok=2, n_shared_experts=1, num_attention_heads=2, num_key_value_heads=2,
        kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, linear_head_dim=32, linear_num_heads=2,
        layer_types=["linear_attention"] * 3 + ["full_attention"], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name and "A_log" not in name:
                parameter.normal_(0, 0.4 if "conv" in name else 0.15)
    return model


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(3, 256, (2, 100), generator=torch.Generator().manual_seed(1))


def assert_alike(logits, expected):
    """Each has its own rounding of fp32."""
    ratio = error_ratio(logits, expected.double().cpu().numpy())
    assert ratio <= 2 * FP32, f"error ratio {ratio:.3g}"


@pytest.mark.parametrize("length", [1, 17, 64, 100])
def test_prefill(model, prompts, calls, device, length):
    here, tokens = model.to(device), prompts[:, :length].to(device)
    with torch.inference_mode():
        logits = here(tokens).logits
        assert calls == [PREFILL] * 3
        with Loop():
            expected = here(tokens).logits
    assert len(calls) == 3
    assert_alike(logits, expected)


def in_parts(model, prompts, parts):
    outputs, cache = [], None
    for part in prompts.split(parts, 1):
        result = model(part, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        outputs.append(result.logits)
    return torch.cat(outputs, 1)


@pytest.mark.filterwarnings("ignore:`past_key_values`")
@pytest.mark.parametrize("parts", [[12] + [1] * 4, [70, 1, 1, 28], [1] * 5], ids=str)
def test_decode_with_a_cache(model, prompts, calls, device, parts):
    here, tokens = model.to(device), prompts[:, :sum(parts)].to(device)
    with torch.inference_mode():
        logits = in_parts(here, tokens, parts)
        assert calls == [DECODE if n and part == 1 else PREFILL for n, part in enumerate(parts) for _ in range(3)]
        with Loop():
            expected = here(tokens).logits
    assert_alike(logits, expected)


def test_generate(model, prompts, calls, device):
    """Two prompts of different lengths, padded on the left."""
    here, tokens = model.to(device), prompts[:, :40].to(device)
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0

    def generate():
        return here.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)

    out = generate()
    assert calls == [PREFILL] * 3 + [DECODE] * 21
    with Loop():
        assert torch.equal(generate(), out)


def test_gradients(model, prompts, calls):
    def gradients():
        model.zero_grad()
        model(prompts, labels=prompts).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    model.cpu()
    found = gradients()
    assert calls == [PREFILL] * 3
    with Loop():
        for name, expected in gradients().items():
            if expected.norm():
                ratio = error_ratio(found[name], expected.double().numpy())
                assert ratio <= 1e-4, f"error ratio {ratio:.3g} of {name}"


# ---- The two functions ---------------------------------------------------------------------------

functions = pytest.mark.parametrize("name, lengths", [(PREFILL, {"T": 70, "B": 2}), (PREFILL, {"lengths": [30, 0, 50]}),
                                                      (DECODE, {"T": 1, "B": 3})], ids=str)


def arguments(problem, device):
    """As models call them: log decays in fp32, K-first states."""
    here = problem.to(device)
    keywords = {"g": here.g.float(), "beta": here.beta, "initial_state": here.options["initial_state"],
                "output_final_state": True, "use_qk_l2norm_in_kernel": True, "return_dict": True}
    if "cu_seqlens" in here.options:
        keywords["cu_seqlens"] = here.options["cu_seqlens"]
    return (here.q, here.k, here.v), keywords


def problem(lengths, dtype):
    return make(K=32, V=32, dtype=dtype, gate="none", beta_mode="given", initial_state=torch.float32, v_first=False,
                **lengths)


@functions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name_of_model", ours.present() if importlib.util.find_spec("transformers") else [])
def test_functions(registered, device, name, lengths, dtype, name_of_model):
    given = problem(lengths, dtype)
    expected, states, _ = solve(given)
    positional, keywords = arguments(given, device)
    with torch.no_grad():
        out, state = getattr(modeling(name_of_model), name)(*positional, **keywords)
    description = "fp32" if name == DECODE else libflashkda.prefill_describe(
        *given.to(device).inputs, **given.to(device).options)
    assert_close(out, expected, description)
    assert_close(state, in_layout(states, "k_first"), description)
    assert out.dtype == dtype and state.dtype == torch.float32
    assert torch.equal(keywords["initial_state"].cpu(), given.options["initial_state"])  # is as it was


@functions
def test_functions_compiled(registered, name, lengths):
    positional, keywords = arguments(problem(lengths, torch.float32), "cpu")
    function = getattr(modeling("kimi_linear"), name)
    with torch.no_grad():
        for x, y in zip(torch.compile(function, fullgraph=True)(*positional, **keywords),
                        function(*positional, **keywords), strict=True):
            assert torch.equal(x, y)


def test_what_goes_to_transformers(registered, monkeypatch, caplog):
    """Head dims above 256: said once, and run by what was there before."""
    module = modeling("kimi_linear")
    given = make(T=5, K=260, V=8, gate="none", beta_mode="given", dtype=torch.float32)
    called = []

    def theirs(query, key, value, **keywords):
        called.append(keywords)
        return "theirs"

    monkeypatch.setattr(module, PREFILL, theirs)
    ours.register()
    ours._log_once.cache_clear()
    with caplog.at_level("INFO", "libflashkda.transformers"):
        for _ in range(2):
            assert getattr(module, PREFILL)(given.q, given.k, given.v, g=given.g, beta=given.beta, more=1) == "theirs"
    assert len(called) == 2 and called[0]["more"] == 1
    assert caplog.messages == [f"{PREFILL}: libflashkda takes head dims of keys up to 256, not 260; transformers runs it"]


def test_registering_again_changes_nothing(registered):
    function = getattr(modeling("kimi_linear"), PREFILL)
    ours.register()
    again = getattr(modeling("kimi_linear"), PREFILL)
    assert again.theirs is function.theirs and not hasattr(again.theirs, "theirs")


def test_an_old_version(monkeypatch):
    monkeypatch.setattr(ours, "MODELS", ("before_kda",))
    with pytest.raises(ImportError, match="transformers is of version .*, which has no Kimi Delta Attention; expected 5.19"):
        ours.register()


# ---- With fla and without it ---------------------------------------------------------------------


@pytest.mark.parametrize("fla", [pytest.param(True, marks=pytest.mark.library("fla")), False], ids=["fla", "no fla"])
def test_example(fla, device):
    path = pathlib.Path(__file__).parents[2] / "examples" / "transformers_switch.py"
    hide = "" if fla else "sys.modules['fla'] = None; "
    script = f"import runpy, sys; {hide}sys.argv = ['', '--device', '{device}']; runpy.run_path('{path}', run_name='__main__')"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].endswith("fla.ops.kda.chunk" if fla else "transformers.models.kimi_linear.modeling_kimi_linear")
    assert lines[-1].endswith("the same tokens as transformers' own loop")
