"""Emulated fine-tuning in vLLM equals `graphopt.ensemble` of transformers' models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import graphopt
from graphopt.models import load
from tests.vllm import reference
from tests.vllm.running import generate
from tests.vllm.tiny import save

PROMPTS = [list(range(3, 40)), [5, 9, 33, 21], [70, 2, 41, 8, 90, 13, 66, 7, 1, 30]]
TOKENS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a large model and two small ones."""
    root = tmp_path_factory.mktemp("models")
    small = {"layers": 1, "hidden": 64}
    return [
        save(root / "base"),
        save(root / "tuned", 1, **small),
        save(root / "reference", 2, **small),
    ]


def ensemble(folders, beta, **more):
    base, tuned, other = (load(str(f)).model for f in folders)
    return graphopt.ensemble(base, tuned, other, beta, **more)


def expected(folders, beta, **more):
    model = ensemble(folders, beta, **more)
    how = {"use_cache": False}
    return [
        reference.continued(lambda ids: model(ids, **how).logits, p, TOKENS)
        for p in PROMPTS
    ]


def settings(folders, **more):
    tuned, other = ({"model": str(f)} for f in folders[1:])
    return {"ensemble": {"pair": [{"tuned": tuned, "reference": other}], **more}}


def test_offline_in_chunks_and_with_a_beta_of_the_requests_own(folders):
    """Prompts come in chunks of 16 tokens; the small models read each token once."""
    one, two = expected(folders, 1.0), expected(folders, 2.5)
    assert one != two
    found = generate(
        folders[0],
        settings(folders, beta=1.0),
        PROMPTS,
        TOKENS,
        extra_args={"graphopt_beta": 2.5},
        max_num_batched_tokens=16,
        max_num_seqs=2,
    )
    assert found == two


def test_two_ranks(folders):
    found = generate(
        folders[0], settings(folders), PROMPTS, TOKENS, tensor_parallel_size=2
    )
    assert found == expected(folders, 1.0)


class Held:
    """What runner 2 keeps of its requests, by slot."""

    def __init__(self, rows):
        self.device = "cpu"
        width = max(map(len, rows))
        padded = [r + [0] * (width - len(r)) for r in rows]
        self.all_token_ids = SimpleNamespace(gpu=torch.tensor(padded))


def test_the_second_runners_interface(folders, monkeypatch):
    """Needs a GPU inside vLLM; here its calls are made by hand."""
    from graphopt.integrations.vllm import eft

    stage = SimpleNamespace(is_last_rank=True)
    monkeypatch.setattr(eft, "get_pp_group", lambda: stage)
    config = SimpleNamespace(
        additional_config={"graphopt": settings(folders, top_p=0.9, top_p_of="base")},
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        speculative_config=None,
        compilation_config=SimpleNamespace(mode=0, backend=""),
        model_config=SimpleNamespace(model=str(folders[0]), dtype=torch.float32),
    )
    held = Held([[1], PROMPTS[1], PROMPTS[2]])
    made = eft.LogitArithmeticProcessor(config, held)
    params = SimpleNamespace(extra_args=None)
    assert made.add_request(1, params)
    assert made.add_request(2, params)
    model = ensemble(folders, 1.0, top_p=0.9)
    base = load(str(folders[0])).model
    with torch.no_grad():
        rows = [torch.tensor([p]) for p in (PROMPTS[2], PROMPTS[1])]
        logits = torch.cat([base(ids).logits[:, -1] for ids in rows])
        wanted = torch.cat([model(ids, use_cache=False).logits[:, -1] for ids in rows])
    context = SimpleNamespace(
        expanded_idx_mapping=torch.tensor([2, 1]),
        pos=torch.tensor([len(PROMPTS[2]) - 1, len(PROMPTS[1]) - 1]),
    )
    found = made.apply(logits.clone(), context)
    torch.testing.assert_close(found[:, : wanted.shape[-1]], wanted)
    assert (found != logits).any()


def test_without_an_ensemble_nothing_changes(monkeypatch):
    from graphopt.integrations.vllm import eft

    config = SimpleNamespace(
        additional_config={},
        speculative_config=None,
        compilation_config=SimpleNamespace(mode=0, backend=""),
    )
    made = eft.LogitArithmeticProcessor(config, torch.device("cpu"), False)
    logits = torch.randn(2, 5)
    assert made.apply(logits) is logits
    assert made.is_argmax_invariant()
    with pytest.raises(ValueError, match="is a number"):
        made.validate_params(SimpleNamespace(extra_args={"graphopt_beta": "much"}))
