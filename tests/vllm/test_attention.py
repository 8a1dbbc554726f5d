"""graphopt's kernel behind vLLM's attention interface."""

from __future__ import annotations

import pytest

from tests.vllm import reference
from tests.vllm.running import generate
from tests.vllm.tiny import save

PROMPTS = [list(range(1, 91)) * 2, [5, 9, 33, 21], list(range(90, 3, -1))]
TOKENS = 6


@pytest.mark.parametrize("parallel", [1, 2], ids=["one", "tensor"])
def test_prompts_see_the_first_and_the_last_tokens(tmp_path, parallel):
    """Chunks of 48 tokens: what is seen lies in chunks of before."""
    model = save(tmp_path)

    def edit(module):
        reference.see_window(module, 4, 24)

    expected = reference.greedy(model, PROMPTS, TOKENS, edit)
    assert expected != reference.greedy(model, PROMPTS, TOKENS)
    settings = {"config": "sparse-attention{pattern=a-shape,sink=4,window=24}"}
    found = generate(
        model,
        settings,
        PROMPTS,
        TOKENS,
        max_num_batched_tokens=48,
        tensor_parallel_size=parallel,
    )
    assert found == expected
