# SPDX-License-Identifier: MIT
"""vLLM's engine on a CPU with integrations/vllm: every token and log probability beside transformers' own loop."""

from __future__ import annotations

import json
import pathlib
import random
import subprocess
import sys

import pytest
import torch
from tiny import SHAPES

HERE = pathlib.Path(__file__).parent

# vLLM and transformers round fp32 in their own ways, through five layers.
LOGPROB = 1e-4


def requests(lengths: list[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, SHAPES.vocab_size) for _ in range(length)] for length in lengths]


def serve(checkpoint, tmp_path, prompts, lengths, **engine):
    given, answers = tmp_path / "requests.json", tmp_path / "answers.json"
    engine = {"dtype": "float32", "enforce_eager": True, **engine}
    given.write_text(json.dumps({"engine": engine, "prompts": prompts, "lengths": lengths}))
    result = subprocess.run([sys.executable, HERE / "vllm_run.py", checkpoint, given, answers], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    return json.loads(answers.read_text())


@pytest.fixture(scope="session")
def theirs(checkpoint):
    """transformers' model on its own loop of torch's operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fla", None)
        from transformers import KimiLinearConfig, KimiLinearForCausalLM
        from transformers.models.kimi_linear import modeling_kimi_linear as modeling

        wrapped = modeling.chunk_kimi_delta_attention
        assert not hasattr(wrapped, "theirs"), "libflashkda.transformers.register() is in force"
        config = KimiLinearConfig.from_pretrained(checkpoint, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        return KimiLinearForCausalLM.from_pretrained(checkpoint, config=config, dtype=torch.float32).eval()


def assert_same(theirs, prompts, lengths, answers):
    worst = 0.0
    for prompt, length, tokens, logprobs in zip(prompts, lengths, answers["tokens"], answers["logprobs"], strict=True):
        assert len(tokens) == length
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1:].double()
        assert tokens == logits.argmax(-1).tolist()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(worst, (expected - torch.tensor(logprobs, dtype=torch.float64)).abs().max().item())
    print(f"{sum(lengths)} tokens are transformers'; log probabilities differ by at most {worst:.1e}")
    assert worst <= LOGPROB


def test_continuous_batching(checkpoint, theirs, tmp_path):
    """More requests than rows, so that prefills join running decodes."""
    prompts, lengths = requests([70, 3, 130, 1, 64, 17, 200, 33, 5, 90]), [5, 30, 9, 14, 22, 3, 17, 25, 8, 11]
    answers = serve(checkpoint, tmp_path, prompts, lengths, max_num_seqs=3)
    assert_same(theirs, prompts, lengths, answers)
    assert answers["calls"]["prefill"] >= 3 * 4 and answers["calls"]["decode"] >= 3 * 10, answers["calls"]


def test_preemption(checkpoint, theirs, tmp_path):
    """A cache that is too small for all: sequences are preempted and start again."""
    prompts, lengths = requests([120, 125, 118, 127], seed=1), [40, 45, 50, 35]
    answers = serve(checkpoint, tmp_path, prompts, lengths, max_num_seqs=4, num_gpu_blocks_override=12)
    assert answers["preempted"] > 0
    assert_same(theirs, prompts, lengths, answers)
