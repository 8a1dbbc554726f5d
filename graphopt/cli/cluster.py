"""``graphopt cluster``: clusters of texts by the neurons that they activate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.arguments import Dtype, Json, Model, Text, load_with_text, writable
from graphopt.cli.output import print_json, print_table
from graphopt.cli.progress import progress_bar
from graphopt.errors import ConfigError

if TYPE_CHECKING:
    import torch


def cluster(
    model: Model,
    text: Text = None,
    clusters: Annotated[int, typer.Option("-k", min=1, help="Clusters.")] = 8,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", min=8, help="Tokens of a passage.")
    ] = 256,
    passages: Annotated[
        int, typer.Option(min=1, help="Passages, at equal distances in the text.")
    ] = 128,
    token_ratio: Annotated[
        float, typer.Option(min=0.0001, max=1, help="As the pass's option.")
    ] = 0.2,
    criterion: Annotated[
        str, typer.Option(help="As the pass's option: abs or signed.")
    ] = "abs",
    out: Annotated[
        str, typer.Option(help="NAME.toml to write, with NAME.safetensors beside it.")
    ] = "clusters.toml",
    seed: Annotated[int, typer.Option(help="Draws the first centres.")] = 42,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Group passages of a text by the neurons that they activate, in every layer.

    The pass neuron-mask reads the file with mode = "similarity": a prompt then decodes
    on the neurons that the nearest cluster activates most. Counts are those of the pass
    itself.

    Example: graphopt cluster smollm2 --text prose.txt -k 8 --out smollm2.toml
    """
    from graphopt.runtime.neurons.clusters import Clusters, cluster_texts
    from graphopt.search.texts import read_text

    if criterion not in ("abs", "signed"):
        raise ConfigError(f"--criterion {criterion}: use abs or signed")
    source, path = read_text(text), writable(out)
    loaded = load_with_text(model, dtype)
    cut = _cut(source.ids(loaded.tokenizer), tokens, passages)
    if len(cut) < clusters:
        raise ConfigError(
            f"{source.origin}: {len(cut)} passages of {tokens} tokens make no "
            f"{clusters} clusters; give a longer text, fewer -k or shorter --tokens"
        )
    config = f"structured-mask,neuron-mask{{{_options(token_ratio, criterion)}}}"
    with progress_bar() as say:
        counts = count_passages(loaded.model, config, cut, say)
    shares = {i: cluster_texts(c, clusters, seed) for i, c in counts.items()}
    about = {
        "model": model,
        "text": source.origin,
        "digest": source.digest,
        "passages": len(cut),
        "tokens": tokens,
        "clusters": clusters,
        "token_ratio": token_ratio,
        "criterion": criterion,
        "seed": seed,
        "dtype": dtype,
    }
    Clusters(shares, about).write(path)
    _print(path, about, as_json)


def _options(token_ratio: float, criterion: str) -> str:
    """Return the pass's options: every layer is counted, whatever its length."""
    return f"token_ratio={token_ratio},criterion={criterion},keep=0.001,min_tokens=0"


def _cut(ids: list[int], tokens: int, passages: int) -> list[torch.Tensor]:
    """Return passages [1, tokens], at equal distances."""
    import torch

    whole = torch.tensor(ids[: len(ids) // tokens * tokens]).view(-1, 1, tokens)
    step = max(1, len(whole) // passages)
    return list(whole[::step][:passages])


def count_passages(
    model: Any, config: str, passages: list[torch.Tensor], say: Any
) -> dict[int, torch.Tensor]:
    """Return what each layer counts in each passage [1, S], int32 [N, F] by layer."""
    import torch

    from graphopt.runtime.cache import Cache
    from graphopt.runtime.neurons import find_ffn_shapes
    from graphopt.search.runner import GraphRunner, configured

    layers = [i for i, x in enumerate(find_ffn_shapes(model)) if x is not None]
    config = config.replace("}", f",layers={layers}}}")
    cache = Cache.from_config(config, model)
    if cache.neurons is None:
        raise ConfigError("cluster: the model has no neurons to choose among")
    runner = GraphRunner(model)
    runner.add("count", configured(config))
    found: dict[int, list[torch.Tensor]] = {i: [] for i in cache.neurons.layers}
    for number, ids in enumerate(passages):
        say("passages", number, len(passages))
        cache.reset()
        asked = {"use_cache": True, "logits_to_keep": 1, "past_key_values": cache}
        runner.call("count", input_ids=ids, **asked)
        for index, buffers in cache.neurons.layers.items():
            assert buffers.counts is not None
            found[index].append(buffers.counts[0].clone())
    return {index: torch.stack(counts) for index, counts in found.items()}


def _print(path: Path, about: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"written": str(path), **about})
    else:
        print_table(f"written: {path}", ("figure", "value"), about.items())
