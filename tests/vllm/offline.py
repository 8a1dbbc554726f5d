"""A process of its own: generate greedily with vLLM and print the tokens as JSON.

Reads a job from standard input: the arguments of `vllm.LLM`, prompts and the number of
tokens. vLLM starts workers that import this file, hence the guard.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    job = json.load(sys.stdin)
    llm = LLM(**job["llm"])
    extra = job.get("extra_args")
    how = SamplingParams(
        temperature=0, max_tokens=job["tokens"], ignore_eos=True, extra_args=extra
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    found = llm.generate(prompts, how, use_tqdm=False)
    print("TOKENS " + json.dumps([list(f.outputs[0].token_ids) for f in found]))


if __name__ == "__main__":
    main()
