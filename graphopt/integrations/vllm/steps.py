"""What vLLM tells of a step: which tokens are whose, and where keys lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from graphopt.errors import ConfigError
from graphopt.integrations.vllm.bounds import Parts
from graphopt.integrations.vllm.paged import Which
from graphopt.ops.pages import pages_of


@dataclass
class Rows:
    """The step's requests: decodes first. Tensors are int32.

    ``starts`` [R + 1] and ``past`` [R] as in `graphopt.ops.pages.ragged`, ``table``
    [R, M]; the first ``decodes`` rows have one token each, behind their prompts.
    """

    starts: Tensor
    past: Tensor
    table: Tensor
    decodes: int
    tokens: int

    @cached_property
    def parts(self) -> Parts:
        """Return the parts of pages that the step writes to, once for all layers."""
        return Parts.of(self.starts, self.past, self.table)

    @property
    def decoding(self) -> Which:
        """Return the rows of one token behind a prompt."""
        return self._rows(0, self.decodes)

    @property
    def reading(self) -> Which:
        """Return the rows that read prompts."""
        return self._rows(self.decodes, len(self.past))

    def _rows(self, first: int, last: int) -> Which:
        starts = self.starts[first : last + 1]
        return starts, self.past[first:last], self.table[first:last]


class RowsBuilder(AttentionMetadataBuilder[Rows]):
    """Makes `Rows` of what vLLM knows of a step."""

    reorder_batch_threshold = 1  # vLLM then puts decodes first

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        """Arguments are vLLM's."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Rows:
        """Return the step's rows; ConfigError for attention that is not causal."""
        common = common_attn_metadata
        if common.causal is not True:
            raise ConfigError(
                "vLLM: graphopt's attention: the model's attention sees ahead"
            )
        # The last token of a prompt may come by itself, and is still of the prompt.
        known = common.is_prefilling is not None
        decodes, *_ = split_decodes_and_prefills(
            common, decode_threshold=1, treat_short_extends_as_decodes=not known
        )
        starts = common.query_start_loc.int()
        past = common.seq_lens.int() - (starts[1:] - starts[:-1])
        table = common.block_table_tensor.int()[:, : pages_of(common.max_seq_len)]
        return Rows(starts, past, table, decodes, common.num_actual_tokens)
