"""Named architectures in every kind of call: what is found, and that nothing changes.

Pairs of (dtype, shapes, cache, padding) are spread over the architectures, so that each
pair is met somewhere; `test_attention` has every architecture in float32.
"""

from __future__ import annotations

import pytest
import sympy
import torch
import transformers as tf

from graphopt.config import load_config
from graphopt.ir.constants import fold_float_attributes
from graphopt.ir.copying import copy_module
from graphopt.ir.match import size_expr
from graphopt.ir.model_graph import ModelGraph
from graphopt.pipeline import PipelineOptions, run_passes
from tests.ir.test_attention import assert_causal
from tests.models import (
    LLAVA_IMAGE_TOKEN,
    TINY,
    WINDOW,
    capture,
    padding_mask,
    prefilled,
    token_ids,
)
from tests.tiny_configs import tiny_model

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of the largest output. Half precisions differ in the order of rounding only.
TOLERANCE = {FP32: 2e-5, FP16: 4e-3, BF16: 3e-2}
TOKENS = 20


def views(model, dynamic=True, **inputs):
    graphs = capture(model, dynamic=dynamic, **inputs)
    for gm in graphs:
        fold_float_attributes(gm)
    return [ModelGraph(gm) for gm in graphs]


def outputs(gm):
    arguments = [
        a.clone() if isinstance(a, torch.Tensor) else a for a in gm.meta["arguments"]
    ]
    with torch.no_grad():
        return [x for x in gm(*arguments) if isinstance(x, torch.Tensor)]


def assert_unchanged(view, dtype=FP32):
    """The default pipeline on a copy; returns how many attentions it rewrote."""
    copy = copy_module(view.gm)
    copy.meta["arguments"] = view.gm.meta["arguments"]
    options = PipelineOptions(strict=True)
    records = run_passes(copy, load_config(None).pipeline, options)
    copy.recompile()
    for before, after in zip(outputs(view.gm), outputs(copy), strict=True):
        worst = (before.float() - after.float()).abs().max()
        assert worst <= TOLERANCE[dtype] * before.float().abs().max()
    remarks = [r for record in records for r in record.remarks if r.code == "rewritten"]
    return sum(r.site.startswith("attention[") for r in remarks)


def prompt(side=None, batch=2):
    inputs = {"input_ids": token_ids(batch, TOKENS)}
    if side is not None:
        inputs["attention_mask"] = padding_mask([TOKENS, 11][:batch], TOKENS, side)
    return inputs


# dtype, dynamic shapes, use_cache, side of the padding
CALLS = {
    "llama": (BF16, False, True, "left"),
    "qwen2": (FP16, True, False, "right"),
    "qwen3": (BF16, True, True, None),
    "mistral": (FP16, False, False, "left"),
    "gemma2": (BF16, False, False, None),
    "gemma3": (FP16, True, True, "left"),
    "phi3": (FP32, False, True, "right"),
    "gpt2": (FP16, False, True, None),
    "opt": (BF16, True, False, "left"),
    "gpt_neox": (BF16, False, True, "right"),
    "falcon": (FP32, False, False, None),
    "mixtral": (BF16, True, False, "right"),
}


@pytest.mark.parametrize("name", CALLS)
def test_prefill(name):
    dtype, dynamic, cached, side = CALLS[name]
    inputs = prompt(side) | {"use_cache": cached}
    (view,) = views(TINY[name]().to(dtype), dynamic, **inputs)
    assert_causal(view, name, masked=side is not None)
    assert [s.itemsize for s in view.attention] == [dtype.itemsize] * 2
    assert isinstance(view.tokens, int) is not dynamic
    explicit = side is not None or not cached
    windowed = any(s.pattern == "sliding-window" for s in view.attention)
    assert (assert_unchanged(view, dtype) > 0) == (explicit or windowed)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gpt_oss", "attention sinks"), ("bloom", "reshape of baddbmm")],
)
def test_left_as_it_was(name, reason):
    (view,) = views(TINY[name](), **prompt("left"))
    rows = [text for _, code, text in view.missed() if code != "no-attention"]
    assert [reason in text for text in rows] == [True, True]
    assert assert_unchanged(view) == 0


# dtype, dynamic shapes, side of the padding
STEPS = {
    "llama": (BF16, True, "left"),
    "mistral": (FP32, True, None),
    "gemma2": (FP32, False, "left"),
    "gemma3": (FP16, True, None),
    "gpt2": (FP32, True, "right"),
    "gpt_neox": (FP16, False, None),
}


def continued(name, dtype, side, tokens):
    """A model and the inputs that follow a prompt of TOKENS."""
    model, inputs = TINY[name]().to(dtype), prompt(side)
    cache = prefilled(model, **{"ids": inputs.pop("input_ids"), **inputs})
    step = {"input_ids": token_ids(2, tokens, seed=1), "past_key_values": cache}
    if side is not None:
        more = torch.ones(2, tokens, dtype=torch.long)
        step["attention_mask"] = torch.cat([inputs["attention_mask"], more], 1)
    return model, step


def at_call(view, expr):
    """The value of a size in the captured call."""
    nodes = view.gm.graph.find_nodes(op="placeholder")
    pairs = zip(map(size_expr, nodes), view.gm.meta["arguments"], strict=True)
    return int(sympy.sympify(expr).subs({k: v for k, v in pairs if k is not None}))


@pytest.mark.parametrize("name", STEPS)
def test_decode(name):
    """The one query sees every key: as no mask, or as the last row of a causal one."""
    dtype, dynamic, side = STEPS[name]
    model, step = continued(name, dtype, side, 1)
    (view,) = views(model, dynamic, **step)
    assert view.kind == "decode"
    for site in view.attention:
        assert site.unsupported is None
        assert (site.key_mask is not None) == (side is not None)
        last = at_call(view, size_expr(site.kv_len)) - 1
        assert site.pattern == "full" or at_call(view, site.offset) == last
    assert len(view.attention) == 2
    assert assert_unchanged(view, dtype) == 0


@pytest.mark.parametrize(
    ("name", "dynamic", "side"),
    [("llama", True, "left"), ("mistral", True, None), ("gemma3", False, "left")],
)
def test_a_prompt_that_goes_on(name, dynamic, side):
    """Of a window, the cache keeps at most its width: an offset with a maximum."""
    model, step = continued(name, FP32, side, 12)
    (view,) = views(model, dynamic, **step)
    assert view.kind == "prefill"
    assert_causal(view, name, masked=side is not None)
    for site in view.attention:
        past = at_call(view, size_expr(site.kv_len)) - 12
        assert at_call(view, site.offset) == past
    assert assert_unchanged(view) == 2


@pytest.mark.parametrize(("tokens", "kind"), [(TOKENS, "prefill"), (1, "decode")])
def test_static_cache(tokens, kind):
    """A fresh prompt sees itself; later, where tokens go is a tensor of the cache."""
    model = TINY["llama"]()
    cache = tf.StaticCache(config=model.config, max_cache_len=40)
    if tokens == 1:
        prefilled(model, token_ids(1, TOKENS), past_key_values=cache)
    inputs = {"input_ids": token_ids(1, tokens), "past_key_values": cache}
    (view,) = views(model, **inputs)
    assert view.kind == kind
    known = [s.pattern == "causal" and not s.unsupported for s in view.attention]
    assert known == [tokens > 1] * 2
    assert tokens > 1 or ["data" in s.unsupported for s in view.attention] == [True] * 2
    assert assert_unchanged(view) == 0


def test_a_padded_encoder():
    (view,) = views(TINY["bert"]().to(BF16), **prompt("right"))
    sites = view.attention
    assert [(s.pattern, s.key_mask is not None) for s in sites] == [("full", True)] * 2
    assert view.kind == "encoder"
    assert assert_unchanged(view, BF16) == 0


def test_deit():
    dtype, dynamic = FP16, False
    model = tiny_model("deit", tf.DeiTModel, image_size=32, patch_size=8).to(dtype)
    pixels = torch.randn(2, 3, 32, 32).to(dtype)
    (view,) = views(model, dynamic, pixel_values=pixels)
    assert [s.pattern for s in view.attention] == ["full", "full"]
    assert [s.query_len for s in view.attention] == [18, 18]  # patches, class, teacher
    assert assert_unchanged(view, dtype) == 0


@pytest.mark.parametrize("image", [True, False])
def test_llava(image):
    inputs = prompt("left")
    if image:
        inputs["input_ids"][:, -17:-1] = LLAVA_IMAGE_TOKEN
        inputs["pixel_values"] = torch.randn(2, 3, 32, 32)
    found = views(TINY["llava"](), **inputs, use_cache=False)
    sites = [s for view in found for s in view.attention]
    tower = [("full", False)] * 2 if image else []
    text = [("causal", True)] * 2
    assert [(s.pattern, s.key_mask is not None) for s in sites] == tower + text
    assert sum(assert_unchanged(view) for view in found) == 2


# Further architectures: class, pattern of every layer, sites that the default pipeline
# rewrites (rows of padding must not average all values, as eager attention has it).
CAUSAL = ["causal", "causal"]
OTHERS = {
    "cohere2": ("Cohere2ForCausalLM", ["sliding-window", "causal"], 2),
    "granite": ("GraniteForCausalLM", CAUSAL, 2),
    "starcoder2": ("Starcoder2ForCausalLM", CAUSAL, 2),
    "stablelm": ("StableLmForCausalLM", CAUSAL, 2),
    "olmo2": ("Olmo2ForCausalLM", CAUSAL, 2),
    "codegen": ("CodeGenForCausalLM", CAUSAL, 0),
    "gptj": ("GPTJForCausalLM", CAUSAL, 0),
    "persimmon": ("PersimmonForCausalLM", CAUSAL, 2),
    "nemotron": ("NemotronForCausalLM", CAUSAL, 2),
    "glm": ("GlmForCausalLM", CAUSAL, 2),
    "deepseek_v3": ("DeepseekV3ForCausalLM", CAUSAL, 2),
    "biogpt": ("BioGptForCausalLM", CAUSAL, 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name):
    model_class, expected, rewritten = OTHERS[name]
    model = tiny_model(name, getattr(tf, model_class))
    (view,) = views(model, **prompt("left"), use_cache=False)
    assert [s.pattern for s in view.attention] == expected
    assert {s.unsupported for s in view.attention} == {None}
    assert all(s.window == WINDOW for s in view.attention if s.pattern != "causal")
    assert all(s.key_mask is not None for s in view.attention)
    assert assert_unchanged(view) == rewritten


@pytest.mark.parametrize(
    ("name", "model_class", "reason"),
    [("mpt", "MptForCausalLM", "masked_fill"), ("xglm", "XGLMForCausalLM", "of 3")],
)
def test_others_left_as_they_were(name, model_class, reason):
    model = tiny_model(name, getattr(tf, model_class))
    (view,) = views(model, **prompt("left"), use_cache=False)
    rows = [text for _, code, text in view.missed() if code != "no-attention"]
    assert [reason in text for text in rows] == [True, True]
    assert assert_unchanged(view) == 0
