"""Decoding over a cache whose layers kept different tokens."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.ir.attention.pages import may_drop, read_of, replace_by_pages
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.tokens.drop import Drop, Ranking
from graphopt.ir.tokens.revive import revive_tokens
from graphopt.passes.base import PassResult
from graphopt.passes.tokens.schedule import Step
from graphopt.remarks import Remark, applied, missed

# More pages than any cache has: every token that a layer kept is read.
_ALL = 1 << 24


def decode_kept(model: ModelGraph) -> PassResult:
    """Let each attention of a decoding step read what its own layer kept."""
    remarks = [_visit(model, site) for site in model.attention]
    changed = any(r.kind == "applied" for r in remarks)
    return PassResult(changed, tuple(remarks), {"sites": len(remarks)})


def decode_revived(
    model: ModelGraph, plan: Sequence[Step], ranking: Ranking
) -> tuple[Remark, ...]:
    """Let dropped tokens come back; PassError where the graph cannot follow."""
    drops = [Drop(step.layer, step.keep, None) for step in plan]
    revive_tokens(model, drops, ranking)
    return tuple(
        applied(
            f"layer[{step.layer}]",
            f"chooses {float(step.alive):.3g} of all tokens afresh; those that were "
            "dropped come back",
            alive=float(step.alive),
        )
        for step in plan
    )


def _visit(model: ModelGraph, site: AttentionSite) -> Remark:
    place, read = f"attention[{site.index}]", read_of(site)
    if read is None or not may_drop(read):
        why = "its keys are not read from a cache whose layers count for themselves"
        return missed(place, "not-prefill", why)
    if site.unsupported or site.window:
        why = site.unsupported or f"it sees a window of {site.window}"
        return missed(place, "model-window", why)
    replace_by_pages(model.gm, site, read, _ALL, 1)
    return applied(place, "attends to the tokens that its layer kept")
