"""Tiny random models of many architectures, and capture of the graphs Dynamo makes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import fx, nn

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2}
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = 8  # of every sliding-window model below, in tokens
_ALTERNATING = ["sliding_attention", "full_attention"]


def _gemma3() -> nn.Module:
    sizes = {**_GROUPED, "head_dim": 16, "sliding_window": WINDOW}
    config = tf.Gemma3TextConfig(**sizes, layer_types=_ALTERNATING)
    return tf.Gemma3ForCausalLM(config)


def _gemma2() -> nn.Module:
    sizes = {**_GROUPED, "head_dim": 16, "sliding_window": WINDOW}
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**sizes))


def _gpt2() -> nn.Module:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, vocab_size=100, **_TOKENS))


def _opt() -> nn.Module:
    sizes = {k: v for k, v in _SIZES.items() if k != "intermediate_size"}
    config = tf.OPTConfig(
        **sizes, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=256
    )
    return tf.OPTForCausalLM(config)


def _gpt_oss() -> nn.Module:
    sizes = {**_GROUPED, "head_dim": 16, "sliding_window": WINDOW}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return tf.GptOssForCausalLM(tf.GptOssConfig(**sizes, **experts))


def _bloom() -> nn.Module:
    config = tf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=100)
    return tf.BloomForCausalLM(config)


def _vision_sizes() -> dict[str, Any]:
    sizes = {k: v for k, v in _SIZES.items() if k != "vocab_size"}
    return {**sizes, "image_size": 32, "patch_size": 8}


def _llava() -> nn.Module:
    vision = tf.CLIPVisionConfig(**_vision_sizes(), projection_dim=64)
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**_GROUPED),
        image_token_index=LLAVA_IMAGE_TOKEN,
    )
    return tf.LlavaForConditionalGeneration(config)


LLAVA_IMAGE_TOKEN = 99  # stands for one of the 16 patches of a 32 x 32 image

_FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GROUPED, head_dim=16)),
    "mistral": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(**_GROUPED, sliding_window=WINDOW)
    ),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_GROUPED, **_TOKENS)),
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SIZES)),
    "falcon": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(**{k: v for k, v in _SIZES.items() if k[0] != "i"}, **_TOKENS)
    ),
    "bloom": _bloom,
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**_GROUPED, num_local_experts=4)
    ),
    "gpt_oss": _gpt_oss,
    "bert": lambda: tf.BertModel(tf.BertConfig(**_SIZES)),
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**_vision_sizes())),
    "llava": _llava,
}


def _seeded(factory: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = factory()
            for parameter in model.parameters():
                # Biases and sinks start at zero, which would hide a lost addition.
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.1)
        model.__dict__["tiny"] = factory  # what `capture` knows it by
        return model.eval()

    return build


# Each call gives a new model in eval mode with the same random weights.
TINY: dict[str, Callable[[], nn.Module]] = {
    name: _seeded(factory) for name, factory in _FACTORIES.items()
}
CAUSAL = tuple(n for n in TINY if n not in ("bert", "vit", "llava"))


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return random token ids [batch, length] from 3 to 98."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 99, (batch, length), generator=generator)


def padding_mask(lengths: list[int], total: int, side: str = "left") -> torch.Tensor:
    """Return an attention_mask [B, total] of 0 and 1 for prompts of ``lengths``."""
    place = torch.arange(total)
    rows = [
        place >= total - n if side == "left" else place < n for n in lengths
    ]  # fmt: skip
    return torch.stack(rows).long()


def prefilled(model: nn.Module, ids: torch.Tensor, **inputs: Any) -> Any:
    """Return the key-value cache after an eager prefill of ``ids``."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, **inputs).past_key_values


def capture(
    model: nn.Module, *, dynamic: bool | None = True, **inputs: Any
) -> list[fx.GraphModule]:
    """Run ``model(**inputs)`` once under torch.compile; return copies of its graphs.

    ``gm.meta["arguments"]`` holds the real arguments of the first call of each graph,
    copied before the call, so that ``gm(*arguments)`` repeats it. Floats of modules are
    as Dynamo leaves them (inputs with ``.item()`` under dynamic shapes). The same call
    of the same `TINY` model is traced once in a process.
    """
    key = _key(model, dynamic, inputs)
    if key is None:
        return _traced(model, dynamic, inputs)
    if key not in _captured:
        _captured[key] = _traced(model, dynamic, inputs)
    graphs = [copy_graph(gm) for gm in _captured[key]]
    for gm in graphs:
        gm.meta["arguments"] = [_copied(a) for a in gm.meta["arguments"]]
    return graphs


_captured: dict[Any, list[fx.GraphModule]] = {}


def _key(model: nn.Module, dynamic: bool | None, inputs: dict[str, Any]) -> Any:
    """Return what a call is known by; None for one with caches or other objects."""
    factory = model.__dict__.get("tiny")
    if factory is None:
        return None
    found: list[Any] = [factory, dynamic, *_state(model)]
    for name, value in sorted(inputs.items()):
        if isinstance(value, torch.Tensor):
            value = (tuple(value.shape), str(value.dtype), value.numpy().tobytes())
        elif not isinstance(value, (int, float, str, type(None))):
            return None
        found.append((name, value))
    return tuple(found)


def _state(model: nn.Module) -> list[Any]:
    """Return what a test may have changed in a model that it was given."""
    config: Any = model.config
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(float(t.double().sum()) for t in tensors)
    attention = getattr(config, "_attn_implementation", None)
    kinds = sorted({str(t.dtype) for t in tensors})
    return [config.to_json_string(), attention, model.training, weights, *kinds]


def _traced(
    model: nn.Module, dynamic: bool | None, inputs: dict[str, Any]
) -> list[fx.GraphModule]:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        kept = copy_graph(gm)
        graphs.append(kept)

        def run(*arguments: Any) -> Any:
            if "arguments" not in kept.meta:
                kept.meta["arguments"] = [_copied(a) for a in arguments]
            return gm.forward(*arguments)

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(**inputs)
    torch._dynamo.reset()
    return graphs


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy with nodes of its own that shares fake values and attributes."""
    new = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    new.meta = dict(gm.meta)
    return new


def _copied(argument: Any) -> Any:
    return argument.clone() if isinstance(argument, torch.Tensor) else argument
