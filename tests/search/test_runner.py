"""The runner's numbers are those of the compiled pass."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import ConfigError, PassError
from graphopt.search.density import visited_share
from graphopt.search.runner import GraphRunner, configured
from graphopt.search.sites import causal_sites, watch_ops
from tests.models import TINY, capture, token_ids
from tests.rewriting import inductor, rewritten, traced

VERTICAL_SLASH = (
    "sparse-attention{pattern=vertical-slash,sink=4,window=8,vertical=10,slash=5,"
    "force=true}"
)
A_SHAPE = "sparse-attention{pattern=a-shape,sink=4,window=16,force=true}"


@pytest.fixture(scope="module")
def runner():
    return GraphRunner(TINY["llama"](), keep=20)


@pytest.mark.parametrize("config", ["", A_SHAPE, VERTICAL_SLASH])
def test_same_numbers_as_the_compiled_model(config):
    ids = token_ids(1, 200)
    host = inductor if config == VERTICAL_SLASH else traced
    compiled = rewritten(TINY["llama"](), config, host=host)
    with torch.no_grad():
        expected = compiled(ids, use_cache=True, logits_to_keep=20).logits[0]
    runner = GraphRunner(TINY["llama"](), keep=20)
    runner.add("it", configured(config))
    logits, cache = runner.prefill("it", ids)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert cache.get_seq_length() == 200


def test_configurations_do_not_leak_into_each_other(runner):
    ids = token_ids(1, 150)
    runner.add("dense", configured(""))
    runner.add("sparse", configured(A_SHAPE))
    first, _ = runner.prefill("dense", ids)
    sparse, _ = runner.prefill("sparse", ids)
    again, _ = runner.prefill("dense", ids)
    assert torch.equal(first, again)
    assert not torch.allclose(first, sparse, atol=1e-4)


def test_a_name_that_is_given_anew_runs_the_new_edit(runner):
    ids = token_ids(1, 150)
    runner.add("it", configured(A_SHAPE))
    first, _ = runner.prefill("it", ids)
    runner.add("it", configured(""))
    second, _ = runner.prefill("it", ids)
    assert not torch.allclose(first, second, atol=1e-4)


def test_what_operators_got_can_be_watched(runner):
    shares = []

    def edit(gm):
        configured(VERTICAL_SLASH)(gm)
        watch_ops(gm, lambda name, a: shares.append(visited_share(name, a)))

    runner.add("watched", edit)
    runner.prefill("watched", token_ids(1, 150))
    assert len(shares) == 2
    assert all(0.3 < share < 1.0 for share in shares)


def test_a_config_that_cannot_be_used_is_an_error():
    with pytest.raises(ConfigError, match="unknown pass"):
        configured("sparse{window=2}")
    with pytest.raises(PassError, match="no site was rewritten"):
        configured("sparse-attention{window=4000}")(_captured_bert())


def _captured_bert():
    return capture(TINY["bert"](), input_ids=token_ids(1, 20))[0]


def test_a_model_that_is_not_causal_has_no_patterns():
    with pytest.raises(PassError, match="not plain causal: its mask is 'full'"):
        causal_sites(_captured_bert())
