"""Tiny configurations of any architecture: the fields of its default one, shrunk."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
import transformers as tf

VOCABULARY = 128
# The first rule whose pattern is a field's whole name gives the field's new value.
_RULES: tuple[tuple[str, int], ...] = (
    (r"vocab_size(_per_layer_input)?|\w+_vocab_size|encoder_hash_\w+_vocab",
     VOCABULARY),
    (r"(max|n|original_max)_(position_embeddings|positions|ctx|seq_len)", 256),
    (r"(max_seq_len|max_sequence_length|max_(source|target)_positions)", 256),
    (r"(attention_window_size|sliding_window(_size)?|window_size|attention_chunk_size)",
     8),
    (r"(hidden_size|d_model|n_embd|dim|embedding_size|word_embed_proj_dim)", 64),
    (r"(emb_dim|dim_model|embed_dim|embedding_dim|lru_width|encoder_hidden_dim)", 64),
    (r"(input_embedding_size|cross_attention_hidden_size|(pronunciation|shape)\w+_dim)",
     64),
    (r"(shared_)?(expert_|moe_|block_)?(intermediate|ffn_hidden|mlp_hidden)_size(_mlp)?",
     128),
    (r"(encoder_|decoder_)?(ffn_dim|d_ff|ff_dim|dim_ff|n_inner|inner_dim)", 128),
    (r"(\w+_)?(intermediate_size|ffn_hidden_size)(\w+)?", 128),
    (r"(qk_|v_)?(nope_|rope_)?head_dim|d_head|d_kv|(attention|attn)_head_dim|rotary_dim",
     16),
    (r"(global|swa|qk|v|kv|linear|index|indexer)_?(\w+)?_head_dim", 16),
    (r"(q|kv|o)_lora_rank|(\w+)_rank|(\w+)_lora_dim", 16),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"(num_|n_)?(local_|routed_|moe_|ffn_)?experts|moe_num_experts", 4),
    (r"num_(local|routed)?_?experts|num_zero_experts|zero_expert_num", 4),
    (r"(moe_)?(num_experts_per_tok(en)?|top_?k\w*|moe_k|\w*top_k)", 2),
)  # fmt: skip
_LAYERS = (
    r"(num_(hidden_)?layers|n_layers?|(en|de)coder_layers|num_(de|en)coder_layers)"
)
_HEADS = r"(\w+_)?(num_)?(attention_heads|heads)|n_heads?|num_attn_heads"
_KV_HEADS = r"(\w+_)?(num_key_value_heads|n_head_kv|num_kv_heads|kv_n_heads)(\w+)?"


def tiny_config(model_type: str, **given: Any) -> Any:
    """Return a config of ``model_type`` with at least two layers of width 64.

    Kinds of layers that the default configuration mixes are all kept. ``given`` fields
    win. Raises what the configuration class raises for values that do not fit together.
    """
    kind = tf.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    return kind(**{**shrunk(kind), **given})


def text_config(config: Any, model_class: Any) -> Any:
    """Return the part of ``config`` that ``model_class`` takes."""
    wanted = model_class.config_class
    parts = [config, *(v for v in vars(config).values())]
    return next((p for p in parts if isinstance(p, wanted)), config)


def shrunk(kind: type) -> dict[str, Any]:
    """Return the fields of the default configuration ``kind()`` that change, shrunk."""
    config = kind()
    names = [f.name for f in dataclasses.fields(kind) if f.init]
    kept_as = getattr(kind, "attribute_map", {})
    values = {n: vars(config).get(kept_as.get(n, n)) for n in names}
    kept = _kept_layers(values)
    result: dict[str, Any] = {}
    for name, value in values.items():
        new = _shrink(config, name, value, values, kept)
        if new is not _SAME:
            result[name] = new
    return {**result, **_GIVEN.get(kind.model_type, {})}


_SAME = object()
_ROPE = {"full_attention": {"rope_theta": 10000.0, "rope_type": "default"}}
# What no rule about names can know, mostly because the default itself is incomplete.
_GIVEN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": _ROPE},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"qk_head_dim": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
        "indexer_budget": 8, "indexer_compress_ratio": 1,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def _shrink(
    config: Any, name: str, value: Any, values: dict[str, Any], kept: list[int]
) -> Any:
    if isinstance(value, tf.PreTrainedConfig):
        return type(value)(**shrunk(type(value)))
    if value is None and name == "head_dim":
        return 16
    if isinstance(value, list):
        return _shrunk_list(name, value, values, kept)
    if not isinstance(value, int) or isinstance(value, bool):
        return _SAME
    if re.fullmatch(_LAYERS, name):
        return len(kept)
    if re.fullmatch(_KV_HEADS, name):
        return _kv_heads(value, values)
    if re.fullmatch(_HEADS, name):
        return 4
    if re.fullmatch(r"\w+_token_(id|index)", name):
        return value if value < VOCABULARY else 100 + value % 25
    found = (new for pattern, new in _RULES if re.fullmatch(pattern, name))
    return next(found, _SAME)


def _kv_heads(value: int, values: dict[str, Any]) -> int:
    heads = [v for n, v in values.items() if re.fullmatch(_HEADS, n)]
    return 4 if value in heads else min(value, 2)


def _count(values: dict[str, Any]) -> int:
    return next((v for n, v in values.items() if re.fullmatch(_LAYERS, n) and v), 2)


def _kept_layers(values: dict[str, Any]) -> list[int]:
    """Return the first layer of each kind, and as many more as make two."""
    count = _count(values)
    tables = [v for v in values.values() if isinstance(v, list) and len(v) == count]
    kinds: dict[str, int] = {}
    for layer in range(count):
        kinds.setdefault(str([table[layer] for table in tables]), layer)
    chosen = sorted(kinds.values())[:6]
    more = [layer for layer in range(count) if layer not in chosen]
    return sorted(chosen + more[: max(0, 2 - len(chosen))])


def _shrunk_list(
    name: str, value: list[Any], values: dict[str, Any], kept: list[int]
) -> Any:
    if len(value) == _count(values):
        return [value[layer] for layer in kept]
    if "layer" in name and value and all(isinstance(v, int) for v in value):
        return [1]
    return _SAME


def tiny_model(model_type: str, model_class: Any, **given: Any) -> Any:
    """Return a random model in eval mode, without parameters that are all zero."""
    torch.manual_seed(0)
    config = text_config(tiny_config(model_type, **given), model_class)
    if re.search("CausalLM|LMHead|Decoder", model_class.__name__):
        config.is_decoder = True  # a BERT with this head still defaults to an encoder
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()
