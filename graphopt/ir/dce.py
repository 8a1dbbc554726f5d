"""Dead code elimination that keeps what acts by side effect.

``graph.eliminate_dead_code()`` drops in-place methods without users from a Dynamo
graph, and with them tensor-parallel all-reduces (`copy_` of a waited collective).
"""

from __future__ import annotations

from torch import fx

from graphopt.ir.match import argument, float_of, is_mutating, op_name

# Calls whose only result is their effect: on global or random state, or a check.
_EFFECTS = {"item", "tolist", "nonzero", "bernoulli", "normal", "multinomial", "print"}
_EFFECT_PARTS = (
    "set_grad_enabled", "autocast", "inference_mode", "assert", "_check", "manual_seed",
    "dropout", "rand_", "randn", "randint", "saved_tensors", "record_stream",
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "wait_tensor",
    "barrier",
)  # fmt: skip
# Calls that have no effect on the result and read as noise.
_NOISE = ("_log_api_usage_once", "lazy_load_decompositions")


def has_effect(node: fx.Node) -> bool:
    """Tell whether ``node`` must stay though nothing uses its value."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    name = op_name(node)
    if name == "dropout" and not drops(node):
        return is_mutating(node)
    known = name in _EFFECTS or any(part in name for part in _EFFECT_PARTS)
    return known or is_mutating(node) or _gives_nothing(node)


def _gives_nothing(node: fx.Node) -> bool:
    """A call without a value, such as entering a vmap, is there for its effect."""
    return node.op == "call_function" and node.meta.get("example_value") is None


def drops(dropout: fx.Node) -> bool:
    """Tell whether a dropout node acts: in training, with a probability over 0."""
    probability = float_of(argument(dropout, 1, "p", 0.5))
    return bool(argument(dropout, 2, "training", True)) and probability != 0.0


def eliminate_dead_code(gm: fx.GraphModule) -> int:
    """Erase unused pure nodes; return how many. Placeholders stay: they are the ABI."""
    erased = 0
    for node in reversed(list(gm.graph.nodes)):
        noise = op_name(node) in _NOISE
        if not node.users and (noise or not has_effect(node)):
            gm.graph.erase_node(node)
            erased += 1
    return erased
