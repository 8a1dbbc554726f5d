"""Pipeline parallelism: stages cut from a model's graph for torch.distributed.

The graph of the whole model is captured and rewritten once on every rank, then cut
between layers along the residual stream; a rank compiles and keeps its own stages.
`RaggedPipeline` runs SARATHI's micro-batches (prompt chunks with piggybacked decodes),
`PipelineEngine` plans them, and `RequestPipeline` runs requests that have caches of
their own, for passes that need these. Sending, receiving and the order of micro-batches
are those of ``torch.distributed.pipelining``.
"""

from graphopt.integrations.pipelining.engine import PipelineEngine
from graphopt.integrations.pipelining.mesh import pipeline_mesh, shard
from graphopt.integrations.pipelining.ragged import RaggedPipeline
from graphopt.integrations.pipelining.requests import RequestPipeline
from graphopt.integrations.pipelining.run import Generated, generate
from graphopt.integrations.pipelining.schedule import Pipeline, StageModule
from graphopt.integrations.pipelining.staged import StagedModel

__all__ = [
    "Generated",
    "Pipeline",
    "PipelineEngine",
    "RaggedPipeline",
    "RequestPipeline",
    "StageModule",
    "StagedModel",
    "generate",
    "pipeline_mesh",
    "shard",
]
