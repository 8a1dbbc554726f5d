"""torch.compile(backend="graphopt") end to end, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers as tf

import graphopt
from graphopt.backend import last_reports
from graphopt.errors import ConfigError
from tests.models import TINY, padding_mask, token_ids
from tests.rewriting import rewritten, traced

A_SHAPE = "sparse-attention{sink=4,window=8,force=true}"


def compiled(model, config=None, **options):
    given = {"config": config, **options}
    return torch.compile(model, backend="graphopt", dynamic=True, options=given)


@torch.no_grad()
def test_the_backend_is_found_by_name_and_gives_the_same():
    model = TINY["llama"]()
    ids = token_ids(2, 40)
    expected = model(ids, use_cache=False).logits
    fast = compiled(model)
    actual = fast(ids, use_cache=False).logits
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    assert last_reports()[-1].kind == "prefill"
    # Float attributes do not make Dynamo trace twice, and are guarded nevertheless.
    metrics = torch._dynamo.utils.get_compilation_metrics()[-1]
    assert not metrics.restart_reasons
    model.model.norm.variance_epsilon = 0.5
    other = fast(ids, use_cache=False).logits
    torch.testing.assert_close(other, model(ids, use_cache=False).logits)
    assert not torch.allclose(other, actual)


@torch.no_grad()
def test_an_empty_pipeline_is_inductor_bit_for_bit():
    """GPT-2's floats are literals in both; a norm's epsilon that Inductor gets as an
    input and graphopt as a literal may differ in the last bit."""
    model = TINY["gpt2"]()
    ids = token_ids(1, 40)
    expected = torch.compile(model, dynamic=True)(ids, use_cache=False).logits
    torch._dynamo.reset()
    actual = compiled(model, "")(ids, use_cache=False).logits
    assert torch.equal(actual, expected)


@torch.no_grad()
def test_sparse_attention_computes_its_mask():
    """The oracle: the unmodified model under an explicit a-shape mask."""
    model = TINY["llama"]()
    ids = token_ids(1, 60)
    q, k = torch.arange(60)[:, None], torch.arange(60)[None]
    mask = (k <= q) & ((k < 4) | (q - k < 8))
    expected = model(ids, attention_mask=mask[None, None], use_cache=False).logits
    fast = compiled(model, A_SHAPE)
    actual = fast(ids, use_cache=False).logits
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    dense = model(ids, use_cache=False).logits
    assert (actual - dense).abs().max() > 1e-3
    # The same compiled graph serves another length; short prompts are dense.
    short = token_ids(1, 8, seed=1)
    before = len(last_reports())
    torch.testing.assert_close(
        fast(short, use_cache=False).logits,
        model(short, use_cache=False).logits,
        atol=2e-5,
        rtol=1e-4,
    )
    assert len(last_reports()) == before


@torch.no_grad()
def test_generate_through_a_compiled_model(recwarn):
    model = TINY["qwen2"]()
    ids, mask = token_ids(2, 20), padding_mask([20, 12], 20)
    wanted = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **wanted, pad_token_id=0)
    fast = graphopt.compile(model)
    assert fast is model
    assert torch.equal(fast.generate(ids, **wanted, pad_token_id=0), expected)
    assert {r.kind for r in last_reports()} >= {"prefill"}
    # Only the wrapper that `torch.compile` gives has something to warn of.
    torch.compile(TINY["llama"](), backend="eager").generate(
        ids, max_new_tokens=1, pad_token_id=0
    )
    assert not [w for w in recwarn if "graphopt" in str(w.message)]


def test_training_through_an_exact_pipeline():
    model = TINY["llama"]()
    ids = token_ids(2, 24)
    mask = padding_mask([24, 15], 24, "right")

    def gradients(model):
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logits[mask.bool()].square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    expected, reports = gradients(model), []
    twin = rewritten(model, "structured-mask", host=traced, reports=reports)
    actual = gradients(twin)
    assert any(r.code == "rewritten" for r in reports[-1].all_remarks())
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-6, rtol=1e-3)


@torch.no_grad()
def test_the_report(tmp_path):
    compiled(TINY["llama"](), A_SHAPE, report=str(tmp_path))(token_ids(1, 30))
    report = last_reports()[-1]
    text = json.loads((report.directory / "report.json").read_text())
    assert report.directory.parent == tmp_path
    assert text["config"] == A_SHAPE.replace("{sink", "{force=true,sink").replace(
        ",force=true}", "}"
    )
    assert [r["code"] for r in text["remarks"] if r["pass_name"]] == ["rewritten"] * 2
    assert (
        "graphopt.attention"
        in (report.directory / "00-sparse-attention.diff").read_text()
    )


@torch.no_grad()
def test_numeric_verification():
    model = TINY["llama"]()
    compiled(model, "structured-mask", verify="numeric")(
        token_ids(2, 20), attention_mask=padding_mask([20, 9], 20), use_cache=False
    )
    found = [r for r in last_reports()[-1].all_remarks() if r.code == "numeric"]
    assert [r.kind for r in found] == ["analysis"]
    assert found[0].figures["worst"] < 1e-4


def test_a_function_without_attention_runs():
    function = torch.compile(lambda x: x.sin() + 1, backend="graphopt")
    x = torch.randn(5)
    torch.testing.assert_close(function(x), x.sin() + 1)
    assert last_reports()[-1].kind == "unknown"


def test_bad_options_say_so_at_once():
    with pytest.raises(ConfigError, match="did you mean 'config'"):
        graphopt.compile(TINY["llama"](), confg="x")


@torch.no_grad()
def outputs_and_hits():
    """The sum of the logits, the number of remarks, and if a cache had it all."""
    before = sum(map(hits, ("inductor", "aot_autograd")))
    fast = compiled(TINY["llama"](), A_SHAPE)
    logits = fast(token_ids(1, 40), use_cache=False).logits
    found = sum(map(hits, ("inductor", "aot_autograd"))) > before
    return [logits.double().sum().item(), len(last_reports()[-1].all_remarks()), found]


def hits(cache):
    names = ("fxgraph_cache_hit", "autograd_cache_hit")
    return sum(torch._dynamo.utils.counters[cache][name] for name in names)


def test_warm_start_in_a_second_process(tmp_path, monkeypatch):
    """Both are new processes: Dynamo's recompilations mark other inputs as static than
    a first compilation does, so what ran before in this one is part of the key."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    program = f"""import json; from {__name__} import outputs_and_hits
print(json.dumps(outputs_and_hits()))"""
    command = [sys.executable, "-c", program]
    first, second = (
        json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        for _ in range(2)
    )
    assert not first.pop()
    assert second == [*first, True]


@torch.no_grad()
def test_generate_of_the_wrapper_warns():
    model, ids = TINY["llama"](), token_ids(1, 8)
    fast = torch.compile(model, backend="graphopt")
    with pytest.warns(UserWarning, match="runs the uncompiled model"):
        fast.generate(ids, max_new_tokens=1, pad_token_id=0)


@torch.no_grad()
def test_transformers_compile_config():
    """A static cache makes ``generate`` compile its decode step by itself."""
    model, ids = TINY["llama"](), token_ids(1, 12)
    wanted = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **wanted)
    before = len(last_reports())
    config = tf.CompileConfig(backend="graphopt", mode=None, fullgraph=False)
    config._compile_all_devices = True
    actual = model.generate(
        ids, **wanted, cache_implementation="static", compile_config=config
    )
    assert torch.equal(actual, expected)
    assert len(last_reports()) > before


@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_modes(mode):
    function = torch.compile(lambda x: x @ x + 1, backend="graphopt", mode=mode)
    x = torch.randn(8, 8)
    torch.testing.assert_close(function(x), x @ x + 1)
