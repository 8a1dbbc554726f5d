"""`graphopt.Cache` in transformers' generate: the tokens that DynamicCache gives."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import graphopt
from graphopt.errors import ConfigError
from tests.models import TINY, padding_mask, token_ids
from tests.rewriting import inductor, rewritten, traced

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 2.0}
BEAMS = {"do_sample": False, "num_beams": 3}
WAYS = {"greedy": GREEDY, "sample": SAMPLED, "beam": BEAMS}


def generated(model, cache, ids, mask=None, steps=40, **how):
    torch.manual_seed(1)
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=steps,
        pad_token_id=0,
        eos_token_id=None,
        **(how or GREEDY),
    )


@pytest.mark.parametrize(
    "how", [GREEDY, SAMPLED, BEAMS], ids=["greedy", "sample", "beam"]
)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mistral"])
def test_same_tokens_as_dynamic_cache(name, how):
    model, ids = TINY[name](), token_ids(3, 100)
    mask = padding_mask([50, 97, 100], 100)
    expected = generated(model, DynamicCache(), ids, mask, **how)
    cache = graphopt.Cache()
    assert torch.equal(generated(model, cache, ids, mask, **how), expected)
    assert cache.get_seq_length() == 139


@pytest.mark.parametrize(
    ("config", "how"),
    [("", GREEDY), ("", BEAMS), ("page-selection", GREEDY)],
    ids=["greedy", "beam", "page-selection"],
)
def test_compiled(config, how):
    """By Inductor once; writes to pages are functionalised in all."""
    model, ids, mask = TINY["llama"](), token_ids(2, 70), padding_mask([31, 70], 70)
    expected = generated(model, DynamicCache(), ids, mask, **how)
    is_plain = not config or how is BEAMS
    host = traced if is_plain else inductor
    fast = rewritten(model, config, host=host)
    assert torch.equal(generated(fast, graphopt.Cache(), ids, mask, **how), expected)


def test_it_grows_while_it_is_written():
    model, ids = TINY["llama"](), token_ids(2, 20)
    cache = graphopt.Cache()
    tokens = generated(model, cache, ids, steps=8)
    room = cache.rows.capacity
    more = token_ids(2, room, seed=1)
    longer = torch.cat((tokens, more), 1)
    result = generated(model, cache, longer, steps=5)
    assert cache.rows.capacity > room
    assert torch.equal(result, generated(model, DynamicCache(), longer, steps=5))


def test_a_fixed_room_never_moves():
    model, ids = TINY["llama"](), token_ids(1, 20)
    cache = graphopt.Cache(max_tokens=128)
    generated(model, cache, ids, steps=4)
    before = [t.data_ptr() for t in cache.layers[0].tensors()]
    generated(model, cache, token_ids(1, 64, seed=1), steps=4)
    assert [t.data_ptr() for t in cache.layers[0].tensors()] == before
    with pytest.raises(ConfigError, match="do not fit in max_tokens = 128"):
        generated(model, cache, token_ids(1, 200, seed=1), steps=4)


def test_reset_starts_afresh():
    model, cache = TINY["llama"](), graphopt.Cache()
    generated(model, cache, token_ids(2, 90), **BEAMS)
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = token_ids(6, 33, seed=2)
    expected = generated(model, DynamicCache(), ids)
    assert torch.equal(generated(model, cache, ids), expected)


def test_two_generations_do_not_disturb_each_other():
    model = TINY["llama"]()
    prompts = [token_ids(1, 70), token_ids(1, 45, seed=1)]
    caches = [graphopt.Cache(), graphopt.Cache()]
    together = [[], []]
    with torch.no_grad():
        inputs = list(prompts)
        for _ in range(20):
            for i in range(2):
                logits = model(inputs[i], past_key_values=caches[i]).logits
                inputs[i] = logits[:, -1:].argmax(-1)
                together[i].append(inputs[i].item())
    for prompt, tokens in zip(prompts, together, strict=True):
        alone = generated(model, graphopt.Cache(), prompt, steps=20)
        assert alone[0, prompt.shape[1] :].tolist() == tokens


@pytest.mark.parametrize("removed", [1, 30, 64, 75])
def test_crop_forgets_the_last_tokens(removed):
    model, ids, cache = TINY["llama"](), token_ids(2, 90), graphopt.Cache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(-removed)
        assert cache.get_seq_length() == 90 - removed
        again = model(ids[:, 90 - removed :], past_key_values=cache).logits
        whole = model(ids).logits[:, 90 - removed :]
    torch.testing.assert_close(again, whole, atol=2e-5, rtol=1e-4)


def test_rows_cropped_to_different_lengths_go_on_by_themselves():
    model, ids, cache = TINY["llama"](), token_ids(2, 90), graphopt.Cache()
    token = torch.tensor([[5], [7]])
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop([-70, 0])
        lengths = torch.tensor([20, 90])
        for _ in range(3):
            logits = model(
                token,
                attention_mask=cache.attention_mask(1),
                position_ids=lengths[:, None],
                past_key_values=cache,
            ).logits
            lengths = lengths + 1
        for row, held in enumerate((20, 90)):
            alone = torch.cat((ids[row, :held], token[row].repeat(3)))[None]
            expected = model(alone).logits[0, -1]
            torch.testing.assert_close(logits[row, -1], expected, atol=2e-5, rtol=1e-4)


def test_beams_share_full_pages():
    model, cache = TINY["llama"](), graphopt.Cache()
    with torch.no_grad():
        ids = token_ids(3, 150)
        model(ids, past_key_values=cache)
        beams = torch.tensor([2, 2, 0])
        cache.reorder_cache(beams)
        assert torch.equal(cache.rows.table[0, :2], cache.rows.table[1, :2])
        assert cache.rows.table[:, 2].unique().numel() == 3
        token = torch.tensor([[5], [6], [7]])
        logits = model(token, past_key_values=cache).logits[:, -1]
        whole = model(torch.cat((ids[beams], token), 1)).logits[:, -1]
    torch.testing.assert_close(logits, whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("after_beams", [False, True])
def test_rows_can_be_repeated_and_selected(after_beams):
    model, cache, ids = TINY["llama"](), graphopt.Cache(), token_ids(3, 100)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        if after_beams:
            order = torch.tensor([1, 1, 0])
            cache.reorder_cache(order)
            ids = ids[order]
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        rows = torch.tensor([2, 2, 0, 0])
        assert cache.batch_size == 4
        token = torch.tensor([[5], [6], [7], [8]])
        logits = model(token, past_key_values=cache).logits[:, -1]
        whole = model(torch.cat((ids[rows], token), 1)).logits[:, -1]
    torch.testing.assert_close(logits, whole, atol=2e-5, rtol=1e-4)


def test_assisted_generation_crops():
    model, ids = TINY["llama"](), token_ids(1, 40)
    expected = generated(model, DynamicCache(), ids)
    drafted = generated(
        model, graphopt.Cache(), ids, do_sample=False, prompt_lookup_num_tokens=4
    )
    assert torch.equal(drafted, expected)


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.02), ("int4", 0.35)])
def test_quantised_pages_are_close_and_small(kind, limit):
    model, ids = TINY["llama"](), token_ids(2, 200)
    plain, coded = graphopt.Cache(), graphopt.Cache(kv_dtype=kind)
    token = torch.tensor([[5], [6]])
    with torch.no_grad():
        for cache in (plain, coded):
            model(ids, past_key_values=cache)
        first = model(token, past_key_values=plain).logits
        second = model(token, past_key_values=coded).logits
    error = (first - second).norm() / first.norm()
    assert 0 < error < limit
    assert coded.nbytes < (0.8 if kind == "int8" else 0.7) * plain.nbytes


@pytest.mark.parametrize("kind", [None, "int4"])
@pytest.mark.parametrize("streaming", [None, [[0], [1]]])
def test_save_and_load(tmp_path, kind, streaming):
    model, ids = TINY["llama"](), token_ids(2, 100)
    cache = graphopt.Cache(kv_dtype=kind, streaming=streaming)
    token = torch.tensor([[5], [6]])
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "a.safetensors")
        loaded = graphopt.Cache.load(tmp_path / "a.safetensors")
        assert loaded.get_seq_length() == 100
        first = model(token, past_key_values=cache).logits
        second = model(token, past_key_values=loaded).logits
    assert torch.equal(first, second)


def test_files_that_are_no_cache(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ConfigError, match="cannot read the cache"):
        graphopt.Cache.load(path)
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(ConfigError, match=r"a\.safetensors: cannot read the cache"):
        graphopt.Cache.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ConfigError, match="not a graphopt cache"):
        graphopt.Cache.load(path)
    with pytest.raises(ConfigError, match="holds no tokens"):
        graphopt.Cache().save(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_dtype": "int2"}, "kv_dtype = 'int2' is unknown"),
        ({"statistics": "max"}, "statistics = 'max' is unknown"),
        ({"sink": 100}, "sink = 100 must be a multiple"),
        ({"local": 0}, "local = 0 must be a multiple"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        graphopt.Cache(**options)


def test_streaming_heads_need_a_pass_once_they_drop():
    model, ids = TINY["llama"](), token_ids(1, 300)
    options = {"streaming": [[0], [1]], "sink": 64, "local": 64}
    short = generated(model, graphopt.Cache(**options), ids[:, :100], steps=5)
    assert torch.equal(short, generated(model, DynamicCache(), ids[:, :100], steps=5))
    with pytest.raises(RuntimeError, match="streaming heads keep 192 tokens"):
        generated(model, graphopt.Cache(**options), ids, steps=5)


def test_streaming_for_too_few_layers():
    with pytest.raises(ConfigError, match="names the heads of 1 layers"):
        generated(TINY["llama"](), graphopt.Cache(streaming=[[0]]), token_ids(1, 9))


def test_a_config_says_what_the_cache_holds(tmp_path):
    (tmp_path / "gates.tsv").write_text("0.1\t0.9\n0.2\t0.8\n")
    (tmp_path / "c.toml").write_text(
        '[[pass]]\nname = "page-selection"\nkv_dtype = "int8"\ntable = "gates.tsv"\n'
    )
    cache = graphopt.Cache.from_config(tmp_path / "c.toml", max_tokens=640)
    assert (cache.kv_dtype, cache.max_tokens) == ("int8", 640)
    assert cache.streaming == [[0], [0]]
    plain = graphopt.Cache.from_config("sparse-attention")
    assert (plain.kv_dtype, plain.streaming) == (None, None)


def test_a_table_of_another_model(tmp_path):
    (tmp_path / "gates.tsv").write_text("0.1\t0.9\t0.5\n" * 3)
    text = f'page-selection{{table="{tmp_path}/gates.tsv",sparsity=1.0}}'
    cache = graphopt.Cache.from_config(text)
    with pytest.raises(ConfigError, match="names KV head 2 of a layer that has 2"):
        generated(TINY["llama"](), cache, token_ids(1, 9))
