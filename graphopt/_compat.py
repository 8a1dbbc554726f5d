"""Every private torch import and version gate, each with its reason."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import fx

# The studies and tests behind graphopt cover these; outside, `doctor` warns.
TESTED_TORCH = ("2.11", "2.13")


def compile_fx(
    gm: fx.GraphModule, example_inputs: list[Any], patches: dict[str, Any]
) -> Callable[..., Any]:
    """Inductor on a graph; ``torch.compile(gm)`` inside a backend would run eagerly."""
    from torch._inductor.compile_fx import compile_fx as inductor

    if torch_version() < (2, 12):
        # Its C++ prints these checks with a name that it never declares
        # (pytorch#178148, mended in 2.12).
        patches = {"assert_indirect_indexing": False, **patches}
    if "TORCHINDUCTOR_SIZE_ASSERTS" not in os.environ:
        # Dynamo guards the sizes already; to check those of every weight again takes a
        # tenth of a decoding step.
        patches = {"size_asserts": False, **patches}
    compiled: Any = inductor(gm, example_inputs, config_patches=patches or None)
    return cast("Callable[..., Any]", compiled)


def keep_outputs(op: Any) -> None:
    """Let Inductor never write into what ``op`` returns, which outlives the call.

    Else it takes a result that is not read any more as room for another one.
    """
    from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
    from torch._inductor.virtualized import V

    if op in lowerings:
        return
    fall_back = fallback_handler(op)

    def lower(*args: Any) -> Any:
        found = fall_back(*args)
        V.graph.never_reuse_buffers.update(result.get_name() for result in found)
        return found

    register_lowering(op, type_promotion_kind=None)(lower)


def any_number_of_threads() -> AbstractContextManager[Any]:
    """Return a context in which Inductor's C++ asks how many threads it may take.

    Else it takes as many as torch had when it was compiled, whichever thread runs it.
    """
    from torch._inductor import config

    return cast(
        "AbstractContextManager[Any]", config.patch({"cpp.dynamic_threads": True})
    )


def inductor_mode(mode: str, dynamic: bool | None) -> dict[str, Any]:
    """Return Inductor's options of ``mode``; raises RuntimeError on an unknown one."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode, dynamic))


def inductor_option_names() -> list[str]:
    """Return the options that ``torch.compile(options=...)`` knows for Inductor."""
    from torch._inductor import list_options

    return list(list_options())


@contextmanager
def isolated_tracing(mode: Any = None) -> Iterator[None]:
    """Give one of several AOTAutograd calls on one Dynamo graph a context of its own.

    ``mode``: the fake mode of its inputs, where it is not that of the graph.

    AOTAutograd stores the metadata of *the* forward graph on the tracing context, and
    the lazily compiled backward reads it there; with several pieces the last would win.
    The guards that a piece asks for are handed to the outer context.
    """
    from torch._guards import TracingContext, tracing

    outer = TracingContext.try_get()
    if outer is None:
        yield
        return
    inner = TracingContext(mode or outer.fake_mode)
    inner.global_context = outer.global_context
    with tracing(inner):
        yield
    outer.guards_context.aotautograd_guards.extend(
        inner.guards_context.aotautograd_guards
    )


def specialize_float(value: Any) -> float:
    """Return the number of a float attribute's SymFloat, guarded, for good.

    AOTAutograd restarts Dynamo for every float symbol that turned out to be a number,
    to take it out of the graph's inputs. As an input that nothing reads it does no
    harm, and a second tracing costs as much as the first.
    """
    from torch._dynamo.symbolic_convert import TensorifyState

    if isinstance(value, torch.SymFloat):
        for symbol in value.node._expr.free_symbols:
            TensorifyState.specialize(str(symbol))
    return float(value)  # installs the guard


def fake_mode_of(gm: fx.GraphModule) -> Any:
    """Return the fake mode under which Dynamo traced ``gm``, or None."""
    from torch._subclasses.fake_tensor import FakeTensor

    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def new_fake_mode(symbolic: bool = False) -> Any:
    """Return a fake mode apart from the one that Dynamo traced under."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv()) if symbolic else FakeTensorMode()


def symbol_hint(environment: Any, symbol: Any) -> int | None:
    """Return the value that ``symbol`` had when it was traced; None: it had none."""
    known = getattr(environment, "backed_var_to_val", None)
    known = environment.var_to_val if known is None else known  # before torch 2.12
    return None if symbol not in known else int(known[symbol])


def new_symbol(mode: Any, hint: int, bounds: Any) -> Any:
    """Return a size of a fake mode with a symbol of its own, within ``bounds``."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    environment = mode.shape_env
    source = ConstantSource(f"size{len(environment.var_to_range)}")
    symbol = environment.create_symbol(
        hint,
        source,
        DimDynamic.DYNAMIC,
        positive=True if bounds.lower >= 0 else None,
        do_not_specialize_zero_one=True,
    )
    environment.constrain_symbol_range(symbol, bounds.lower, bounds.upper)
    return environment.create_symintnode(symbol, hint=hint)


def fake_like(
    mode: Any, like: torch.Tensor, sizes: list[Any], strides: list[Any]
) -> torch.Tensor:
    """Return a tensor of the fake ``mode``; a parameter for a parameter."""
    with mode:
        made = torch.empty_strided(sizes, strides, dtype=like.dtype, device=like.device)
    if isinstance(like, torch.nn.Parameter):
        return torch.nn.Parameter(made, requires_grad=like.requires_grad)
    return made.requires_grad_(like.requires_grad)


@contextmanager
def trying_fakes(mode: Any) -> Iterator[None]:
    """Enter a fake mode in which an operator may refuse; calls are not remembered.

    torch logs a traceback before it raises, which is noise to a caller that tries
    sizes. And the mode's memory of calls, which runs a new call a second time to check
    what it notes, costs more than it saves where calls hardly ever come again.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    remembers, mode.cache_enabled = mode.cache_enabled, False
    try:
        with mode, torch.no_grad():
            yield
    finally:
        logger.disabled, mode.cache_enabled = before, remembers


def size_hint(value: Any) -> Any:
    """Return the number that a symbolic int or float had when it was traced.

    A number is its own; None is for sizes that depend on data. Asking the value itself
    (``int(size)``) would add a guard that fixes it.
    """
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    return value.node.hint if value.node.has_hint() else None


def process_group(name: str) -> Any:
    """Return the group of ranks that a collective in a graph names."""
    from torch.distributed import distributed_c10d

    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return resolve(name)


def shard_offset(spec: Any) -> int:
    """Return where this rank's part of a tensor begins, along the axis it is cut by."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements = spec.placements
    _, start = compute_local_shape_and_global_offset(spec.shape, spec.mesh, placements)
    return int(start[placements[0].dim])


def is_fake(value: object) -> bool:
    """Tell whether ``value`` is a tensor without data."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def placeholder_source(node: fx.Node) -> str:
    """Return Dynamo's name of what a graph input is, such as ``L['self'].scale``."""
    argument = node.meta.get("grapharg")  # until Dynamo has compiled
    source = getattr(argument, "source", None) or getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def real_value(node: fx.Node) -> torch.Tensor | None:
    """Return the tensor that a graph input holds while Dynamo compiles, or None."""
    argument = node.meta.get("grapharg")
    value = getattr(argument, "example", None)
    if node.op == "get_attr" and node.graph.owning_module is not None:
        value = getattr(node.graph.owning_module, str(node.target), None)
    real = isinstance(value, torch.Tensor) and not is_fake(value) and not value.is_meta
    return value if real else None


def local_part(value: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor: of a DTensor its part, else all."""
    part: torch.Tensor = getattr(value, "_local_tensor", value)
    return part


def copy_source(old: fx.Node, new: fx.Node) -> None:
    """Tell of ``new`` what Dynamo hung on ``old``: AOTAutograd asks every input."""
    if hasattr(old, "_dynamo_source"):
        new._dynamo_source = old._dynamo_source


def torch_version() -> tuple[int, int]:
    """Return torch's major and minor version."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def warn_about_generate(backend: Callable[..., Any]) -> None:
    """Warn when ``generate`` is taken from ``torch.compile(model, backend=backend)``.

    The wrapper hands out the original module's method, which runs the uncompiled
    forward without a word; nothing of the backend is called, so its class is the only
    place to notice.
    """
    from torch._dynamo.eval_frame import OptimizedModule

    original = OptimizedModule.__getattr__

    def watched(self: Any, name: str) -> Any:
        if name == "generate" and _compiles_with(self.dynamo_ctx, backend):
            warnings.warn(_GENERATE, stacklevel=2)
        return original(self, name)

    OptimizedModule.__getattr__ = watched  # type: ignore[method-assign]


_GENERATE = (
    "graphopt: torch.compile(model).generate runs the uncompiled model. Use "
    "graphopt.compile(model, ...) or model.compile(backend='graphopt'), then "
    "model.generate(...)"
)


def _compiles_with(context: Any, backend: Callable[..., Any]) -> bool:
    """Unwrap Dynamo's callbacks down to the backend that torch.compile was given."""
    found = getattr(context, "callback", None)
    while inner := getattr(found, "_torchdynamo_orig_backend", None):
        found = inner
    return getattr(found, "compiler_fn", found) is backend


def new_size(like: torch.Tensor, most: Any) -> Any:
    """Return a size from 2 to ``most`` that depends on data, for a fake result.

    Dynamo allows such sizes only where its config says so; a pass that put the operator
    in knows that the rest of the graph runs on any size. Without symbols, as when
    sizes are tried, it is a number of that range. Nothing is said of ``most`` then: the
    check would be printed into every outlined piece, and not each knows that size.
    """
    environment = getattr(getattr(like, "fake_mode", None), "shape_env", None)
    if environment is None:
        return max(2, int(most) // 2)
    size = environment.create_unbacked_symint()
    torch._check(size >= 2)  # as of every symbolic size: one would broadcast
    return size


def new_count(mode: Any, least: int) -> Any:
    """Return a symbolic number, at least ``least``, that only running tells."""
    with discarding_sizes(mode):
        count = mode.shape_env.create_unbacked_symint()
    torch._check(count >= least)
    return count


def discarding_sizes(mode: Any) -> Any:
    """Return a context for inferring values: sizes that depend on data are expected.

    Each run on fake tensors makes a new one, and only a tracer must account for them.
    """
    environment = getattr(mode, "shape_env", None)
    if environment is None:
        return contextlib.nullcontext()
    return environment.ignore_fresh_unbacked_symbols()


def is_data_symbol(symbol: Any) -> bool:
    """Tell whether a symbol stands for a size that depends on data."""
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    return symbol_is_type(symbol, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT))
