# SPDX-License-Identifier: MIT
"""Serves requests with vLLM on a CPU and says what came out.

usage: vllm_run.py CHECKPOINT REQUESTS ANSWERS

REQUESTS is JSON: engine (arguments of vllm.LLM), prompts (lists of tokens), lengths (tokens wanted of each). ANSWERS is
written: for each prompt its tokens, and their log probabilities; how often libflashkda was called and sequences were
preempted.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that calls can be counted here
               "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

import libflashkda  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

calls: collections.Counter[str] = collections.Counter()


def count(name: str) -> None:
    function = getattr(libflashkda, name)

    def counted(*arguments, **keywords):
        calls[name] += 1
        return function(*arguments, **keywords)

    setattr(libflashkda, name, counted)


def main(checkpoint: str, requests: str, answers: str) -> None:
    given = json.loads(pathlib.Path(requests).read_text())
    count("prefill")
    count("decode")
    llm = LLM(model=checkpoint, skip_tokenizer_init=True, max_model_len=1024, disable_log_stats=False, **given["engine"])
    wanted = [SamplingParams(max_tokens=length, temperature=0, detokenize=False, ignore_eos=True, logprobs=1)
              for length in given["lengths"]]
    calls.clear()  # of what it did to warm up
    results = [result.outputs[0] for result in llm.generate([{"prompt_token_ids": p} for p in given["prompts"]], wanted)]
    preempted = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    pathlib.Path(answers).write_text(json.dumps({
        "tokens": [list(result.token_ids) for result in results],
        "logprobs": [[at[token].logprob for at, token in zip(result.logprobs, result.token_ids, strict=True)]
                     for result in results],
        "calls": calls, "preempted": preempted}))


if __name__ == "__main__":
    main(*sys.argv[1:])
