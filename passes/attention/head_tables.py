"""Heads tables of others, read as they are published, and graphopt's own.

- MInference: JSON, a list over layers of ``{"head": [pattern, size, size, score]}``.
- DuoAttention: TSV of gates in [0, 1], a row a layer and a column a KV head; heads
  under a quantile of all gates become streaming heads (Xiao et al. 2024, section 2.3).
- graphopt: TOML, ``[[heads]]`` rows with the keys of the option ``heads``.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from graphopt.errors import ConfigError, did_you_mean
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.shards import RankShare, share_of_heads
from graphopt.passes.attention.heads import HeadPattern, HeadRule
from graphopt.remarks import Remark, failure

# The deployed sizes of DuoAttention's streaming heads, in tokens.
_DUO_SINK, _DUO_WINDOW = 64, 256


@dataclass(frozen=True)
class HeadTable:
    """Patterns by layer and head; empty ``layers`` and some ``rules`` for TOML.

    Heads are query heads, or KV heads where ``per_kv_head``.
    """

    origin: str
    layers: tuple[tuple[HeadPattern, ...], ...] = ()
    rules: tuple[HeadRule, ...] = ()
    per_kv_head: bool = False

    def mismatch(self, layers: int, heads: int, kv_heads: int) -> str | None:
        """Return what is wrong with the table for such a model, or None."""
        if not self.layers:
            return None
        if len(self.layers) != layers:
            return f"{self.origin} holds {len(self.layers)} layers, the model {layers}"
        kind, wanted = ("KV heads", kv_heads) if self.per_kv_head else ("heads", heads)
        for index, row in enumerate(self.layers):
            if len(row) != wanted:
                return (
                    f"{self.origin} holds {len(row)} {kind} in layer {index}, the "
                    f"model {wanted}"
                )
        return None

    def refusal(self, model: ModelGraph, ranks: int = 1) -> Remark | None:
        """Return the remark that the table is for another model, or None.

        ``model`` has the heads of one rank of ``ranks``.
        """
        if not model.attention:
            return None
        site = model.attention[0]
        heads, kv_heads = site.num_heads * ranks, site.num_kv_heads * ranks
        text = self.mismatch(len(model.attention), heads, kv_heads)
        return failure("table-size", text) if text else None

    def pattern(self, layer: int, head: int, group: int, base: HeadPattern) -> Any:
        """Return the pattern of a query head; ``group`` query heads share a KV head."""
        if self.layers:
            return self.layers[layer][head // group if self.per_kv_head else head]
        for rule in self.rules:
            if rule.covers(layer, head):
                base = base.overridden(rule)
        return base


def share_of_table(model: ModelGraph, table: HeadTable | None) -> RankShare:
    """Return which of a table's heads are this rank's; PassError where none can tell.

    Without a table a pass names no heads, and any rank's are all.
    """
    if table is None or not model.attention:
        return RankShare()
    return share_of_heads(model, model.attention[0])


@cache
def read_table(path: str, sparsity: float) -> HeadTable:
    """Read a table; ``sparsity`` is the share of streaming heads of a TSV.

    Raises ConfigError with file, place, cause and remedy.
    """
    readers: dict[str, Callable[[str, str, float], HeadTable]] = {
        ".json": _minference,
        ".tsv": _duo_attention,
        ".toml": _own,
    }
    suffix = Path(path).suffix
    if suffix not in readers:
        raise ConfigError(f"{path}: a heads table is .json, .tsv or .toml")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{path}: cannot read the heads table: {reason}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: a heads table is UTF-8 text; this is not") from None
    return readers[suffix](path, text, sparsity)


def _minference(path: str, text: str, sparsity: float) -> HeadTable:
    try:
        layers = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(layers, list) or not all(isinstance(x, dict) for x in layers):
        raise ConfigError(f"{path}: expected a list of layers, each a table of heads")
    rows = tuple(_minference_layer(path, i, layer) for i, layer in enumerate(layers))
    return HeadTable(path, rows)


def _minference_layer(path: str, index: int, layer: Any) -> tuple[HeadPattern, ...]:
    wanted = [str(head) for head in range(len(layer))]
    if sorted(layer) != sorted(wanted):
        raise ConfigError(f"{path}: layer {index}: heads are not 0 to {len(layer) - 1}")
    return tuple(_minference_head(path, index, h, layer[h]) for h in wanted)


def _minference_head(path: str, layer: int, head: str, entry: Any) -> HeadPattern:
    where = f"{path}: layer {layer}, head {head}"
    valid = isinstance(entry, list) and len(entry) >= 3
    if not valid or not all(isinstance(size, int) for size in entry[1:3]):
        raise ConfigError(f"{where}: expected [pattern, size, size, score]")
    name, first, second = entry[:3]
    if name == "vertical_and_slash":
        # Their sizes count the 30 sinks and the 100 nearest diagonals in.
        sink, window = 30, 100
        chosen = (max(first - sink, 0), max(second - window, 0))
        return HeadPattern("vertical-slash", sink, window, *chosen)
    if name == "stream_llm":
        return HeadPattern("a-shape", first, second)
    if name == "block_sparse":
        return HeadPattern("block-sparse", blocks=max(first, 1))
    known = ("vertical_and_slash", "stream_llm", "block_sparse")
    raise ConfigError(f"{where}: unknown pattern '{name}'{did_you_mean(name, known)}")


def _duo_attention(path: str, text: str, sparsity: float) -> HeadTable:
    gates = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            gates.append([min(max(float(cell), 0.0), 1.0) for cell in line.split("\t")])
        except ValueError:
            raise ConfigError(f"{path}:{number}: a gate is no number") from None
    streaming = _lowest(gates, sparsity)
    rows = (
        tuple(
            HeadPattern("streaming", _DUO_SINK, _DUO_WINDOW)
            if (layer, head) in streaming
            else HeadPattern("dense")
            for head in range(len(row))
        )
        for layer, row in enumerate(gates)
    )
    return HeadTable(path, tuple(rows), per_kv_head=True)


def _lowest(gates: Sequence[Sequence[float]], share: float) -> set[tuple[int, int]]:
    """Return the places of the lowest gates; equal ones go in the order of the file."""
    places = [(gate, i, j) for i, row in enumerate(gates) for j, gate in enumerate(row)]
    return {(i, j) for _, i, j in sorted(places)[: round(share * len(places))]}


def _own(path: str, text: str, sparsity: float) -> HeadTable:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    try:
        rules = TypeAdapter(list[HeadRule]).validate_json(
            json.dumps(data.get("heads", []), default=str)
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: heads.{key}: {first['msg']}") from None
    return HeadTable(path, rules=tuple(rules))
