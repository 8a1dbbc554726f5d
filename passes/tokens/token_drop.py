"""`token-drop`: tokens of a prompt that matter little skip the later layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator
from torch import SymInt

from graphopt.errors import PassError
from graphopt.ir.copying import copy_graph
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.tokens.cached import (
    cache_refusal,
    count_by_keys,
    keep_final,
    keep_reached,
)
from graphopt.ir.tokens.drop import Drop, drop_tokens, returns_tokens
from graphopt.ir.tokens.returning import (
    Returning,
    holding,
    note_tokens,
    positions_of,
    write_at_places,
)
from graphopt.ir.vision.span import LanguageGraph
from graphopt.passes.base import PassContext, PassResult, option
from graphopt.passes.tokens.decode import decode_kept, decode_revived
from graphopt.passes.tokens.schedule import DropPoint, Step, steps
from graphopt.passes.tokens.vision import NO_VISION, drop_vision_tokens, must_points
from graphopt.passes.tokens.vision_options import VisionOptions
from graphopt.remarks import Remark, applied, failure, missed

# What LazyLLM draws in its figure 4: a third of what is alive goes three times.
_LAZY = tuple(
    DropPoint(depth=depth, keep=keep)
    for depth, keep in ((0.3, 0.7), (0.6, 0.5), (0.9, 0.3))
)
_FASTV = (DropPoint(layer=1, keep=0.5),)  # K = 2, R = 50 % in FastV's paper


@dataclass(frozen=True, kw_only=True)
class TokenDrop(VisionOptions):
    """Let tokens of a prompt drop out between layers; the rest runs on fewer.

    Behind the layers of a schedule each prompt's tokens are ranked by the attention
    that its last token pays them there, the mean over heads, and only the best go on
    (``lazy``). They stay in order and keep their positions; the last token always
    stays, padding goes first. While decoding, each layer attends to what reached it, or
    to what lives to the end (``cache``); with ``revive`` every step chooses afresh
    among all tokens, and those that were dropped go on from the hidden states they had.
    Scores are a side operator that reads the keys once, so attention keeps its fast
    kernel. ``fastv`` ranks once, at the first point; ``random`` and ``uniform`` (equal
    distances) look at no token, ``pool`` averages neighbours into as many: what a
    method has to beat. Approximate; a schedule that keeps everything leaves the graph
    as it is. Pays where a prompt is long and only its last tokens' predictions are
    asked for.

    ``must`` (MustDrop) and ``tokens = "vision"`` drop vision tokens alone, those in
    whose places image features are written among the embeddings; shares are of them.
    ``must`` ranks by the text behind the images: the worst are those whose sum and
    whose maximum of its attention are lowest, each in units of its threshold. By
    default it drops behind the 3rd, 7th, 11th and 15th of 32 layers, or as deep in
    another model. With ``mode = "threshold"`` what is under both goes, a point's share
    means nothing, and the number is known as the model runs: the row of a batch that
    keeps most sets it. By count every row loses as many; one that has no such number of
    vision tokens and padding is a RuntimeError, as text never goes. Where the encoder
    of the images is in the graph and has a class token, the patches that it attends to
    most never go, and windows of patches that are alike become one; a remark says where
    that is off.

    Before::

        %h1 = add(%h0, %mlp) : f32[B, S, H]
        %q = linear(rms_norm(%h1), ...)

    After::

        %s = graphopt.token_scores(%q0, %k0, %padding, 0.125)
        %kept = graphopt.keep_tokens(%s, ceil(0.7 S), %padding)
        %h1' = graphopt.take_tokens(%h1, %kept, 1) : f32[B, ceil(0.7 S), H]
        %q = linear(rms_norm(%h1'), ...)

    Refuses when

    - ``not-prefill``: the graph decodes, or encodes without a causal mask;
    - ``keeps-all``: the schedule keeps every token;
    - ``schedule``: it names layers that the model does not have;
    - ``cache``: keys are kept for decoding in a cache that counts tokens once for all
      layers (`graphopt.Cache.from_config` makes one that does not), that holds some
      already, or that has no hidden states for tokens to come back from;
    - ``no-vision``: vision tokens are asked for and the graph has none;
    - ``outputs``: the graph returns something of every token (ask for the last logits
      only: ``logits_to_keep=1``);
    - ``fixed-length``: the schedule has several points and the graph was traced for one
      length (compile with ``dynamic=True``);
    - ``model-window``: later layers see a window, and distances would shrink;
    - ``cannot-follow``: a later operator cannot run on fewer tokens; ranks share out
      the heads of the images' encoder.
    """

    name: ClassVar[str] = "token-drop"
    source: ClassVar[str] = (
        "LazyLLM (Fu et al. 2024, equation 1 and section 3.3); FastV (Chen et al. "
        "2024); MustDrop (Liu et al. 2024)"
    )
    never_after: ClassVar[Mapping[str, str]] = {
        "packed-prefill": "packed rows hold several prompts, each with a last token",
        "chunked-prefill": "a chunk's last token is not the prompt's",
    }

    schedule: list[DropPoint] = option(
        [], "points where tokens are dropped; the method's own when left out"
    )

    cache: Literal["layer", "final"] | None = option(
        None,
        "what each layer of a graphopt.Cache keeps: the tokens that reached it, or "
        "only those that live to the end; must: final, others: layer",
    )
    revive: bool = option(
        False,
        "lazy: choose afresh among all tokens at every decoding step; the cache keeps "
        "the hidden states of those that were dropped",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        """Points that contradict each other in every model are an error of a config."""
        if all(point.layer is not None for point in self.schedule):
            steps(self.schedule, 1 << 30)
        if self.revive and (self.method != "lazy" or self.cache is not None):
            raise ValueError(
                "revive = true needs method = 'lazy', whose choice is made at every "
                "step, and no cache option: all tokens keep their places"
            )
        return self

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Insert the drops, the deepest first; decoding reads what layers kept."""
        if model.kind == "decode" and model.caches:
            return self._decode(model)
        language = LanguageGraph(model.gm)
        if self._on_vision and language.span is None:
            return PassResult(False, (missed("graph", "no-vision", NO_VISION),))
        model = language if language.span is not None else model
        if refusal := _refusal(model) or self._cannot_revive(model):
            return PassResult(False, (missed("graph", *refusal),))
        plan = self._plan(model)
        if isinstance(plan, Remark):
            return PassResult(False, (plan,))
        if reason := _windowed(model, plan[0].layer):
            return PassResult(False, (missed("graph", "model-window", reason),))
        if len(plan) > 1 and not isinstance(model.tokens, SymInt):
            reason = "several drops need a prompt length that varies: dynamic=True"
            return PassResult(False, (missed("graph", "fixed-length", reason),))
        return self._whole(model, lambda: self._prefill(model, plan))

    def _plan(self, model: ModelGraph) -> list[Step] | Remark:
        """Return the steps that drop something, or why there is none."""
        layers = len(model.layers)
        try:
            plan = steps(self._points(layers), layers)
        except ValueError as error:
            return failure("schedule", str(error))
        plan = [step for step in plan if step.keep < 1]
        return plan or missed("graph", "keeps-all", "the schedule keeps every token")

    def _whole(
        self, model: ModelGraph, edit: Callable[[], tuple[Remark, ...]]
    ) -> PassResult:
        """Make all of an edit or nothing."""
        before = copy_graph(model.gm.graph)
        try:
            remarks = edit()
        except PassError as error:
            model.gm.graph = before
            return PassResult(False, (missed("graph", "cannot-follow", str(error)),))
        return PassResult(True, remarks, {"sites": len(remarks)})

    def _prefill(self, model: ModelGraph, plan: list[Step]) -> tuple[Remark, ...]:
        if holding(model.gm) is not None:
            position = positions_of(model, plan[0].layer + 1)
            returning = note_tokens(model, position)
            write_at_places(model, model.attention[plan[0].layer + 1 :], returning)
            return self._drop(type(model)(model.gm), plan, returning)
        if model.caches:
            count_by_keys(model)
        remarks = self._drop(model, plan)
        self._keep_in_cache(type(model)(model.gm), plan)
        return remarks

    def _decode(self, model: ModelGraph) -> PassResult:
        """Let tokens come back where the cache has their hidden states."""
        if holding(model.gm) is None:
            return decode_kept(model)
        plan = self._plan(model)
        if isinstance(plan, Remark):
            return PassResult(False, (plan,))
        if refusal := self._cannot_revive(model):
            return PassResult(False, (missed("graph", *refusal),))
        return self._whole(model, lambda: decode_revived(model, plan, self.ranking))

    def _cannot_revive(self, model: ModelGraph) -> tuple[str, str] | None:
        held = holding(model.gm) is not None
        if held and (self.method != "lazy" or self.revive is False):
            why = "this cache keeps hidden states, and no token is to come back"
            return "cache", f"{why}: Cache.from_config(config) makes one without"
        if model.caches and self.revive and not held:
            why = "this cache keeps no hidden states of dropped tokens"
            return "cache", f"{why}: Cache.from_config(config, model)"
        return None

    def cache_options(self) -> dict[str, Any]:
        """Return the arguments of the `graphopt.Cache` for this pass."""
        return {"reviving": True} if self.revive else {"dropping": True}

    def _keep_in_cache(self, model: ModelGraph, plan: list[Step]) -> None:
        if not model.caches:
            return
        kept = self.cache or ("final" if self.method == "must" else "layer")
        if kept == "final":
            keep_final(model)
        else:
            keep_reached(model, plan[0].layer + 1)

    @property
    def _on_vision(self) -> bool:
        return self.method == "must" or self.tokens == "vision"

    def _points(self, layers: int) -> list[DropPoint]:
        if self.method == "must":
            return self.schedule or must_points(layers)
        default = _FASTV if self.method == "fastv" else _LAZY
        return self.schedule or list(default)

    def _drop(
        self, model: ModelGraph, plan: list[Step], returning: Returning | None = None
    ) -> tuple[Remark, ...]:
        if self._on_vision:
            return drop_vision_tokens(model.gm, self, plan)
        scores = self.scores(model, {s.layer: model.layers[s.layer] for s in plan})
        for number, step in reversed(list(enumerate(plan))):
            pool = self.method == "pool"
            left = None if returning is None else (returning, number)
            drop = Drop(step.layer, step.keep, scores[step.layer], pool, left)
            drop_tokens(model, drop, is_first=number == 0)
        return tuple(
            applied(
                f"layer[{step.layer}]",
                f"{float(step.alive):.3g} of the prompt's tokens live behind it",
                alive=float(step.alive),
            )
            for step in plan
        )


def _refusal(model: ModelGraph) -> tuple[str, str] | None:
    if model.kind != "prefill":
        return "not-prefill", f"the graph is of kind '{model.kind}'"
    if model.caches and (reason := cache_refusal(model)):
        return "cache", reason
    if name := returns_tokens(model):
        return "outputs", f"{name} is returned for every token"
    return None


def _windowed(model: ModelGraph, first: int) -> str:
    """Explicit masks are gathered; a window that the kernel knows counts places.

    A cache has the places of kept tokens only, so that decoding could not count either.
    """
    for site in model.attention[first + 1 :]:
        if site.window and (site.form == "op" or model.caches):
            return f"attention[{site.index}] sees a window of {site.window}"
    return ""
