"""The backend of torch.compile: a Dynamo graph in, a compiled callable out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphopt import _compat
from graphopt.codegen.cache import cache_dir
from graphopt.distributed.local import LocalGraph, localise
from graphopt.errors import KernelError, PassError
from graphopt.ir.constants import fold_float_attributes, is_float_input
from graphopt.ir.copying import copy_module
from graphopt.ir.dce import eliminate_dead_code
from graphopt.ir.loops import find_loop, innermost
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sites.structure import ends_text, structure_rows
from graphopt.ir.sizes.inputs import tie_sizes
from graphopt.ir.text import graph_text
from graphopt.options import BackendOptions, parse_options
from graphopt.outline import Outlined, compile_loop, compile_outlined
from graphopt.passes.base import PassContext
from graphopt.pipeline import PassRecord, PipelineOptions, run_passes
from graphopt.remarks import Remark, analysis, applied, failure, missed
from graphopt.report import CompileReport, report_key
from graphopt.verify import compare_first_call

Compiled = Callable[..., Any]

_reports: list[CompileReport] = []


def graphopt(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **unknown: Any,
) -> Compiled:
    """Compile ``gm``; the entry point that ``torch.compile(backend="graphopt")`` finds.

    Flow: raise, rewrite by the configured passes, lower and hand over to Inductor,
    layer by layer where layers repeat. Raises ConfigError for options that cannot be
    used; a pass that fails is undone unless ``strict``.
    """
    parsed = parse_options({**(options or {}), **unknown}, mode)
    local = localise(gm, example_inputs)
    report, original = rewrite(gm, parsed)
    report.remarks += [] if local.remark is None else [local.remark]
    compiled = compile_rewritten(gm, local.inputs, parsed, report, original)
    return _on_parts(compiled, local)


def compile_rewritten(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    options: BackendOptions,
    report: CompileReport,
    original: fx.GraphModule | None = None,
) -> Compiled:
    """Compile what `rewrite` has rewritten and publish its report.

    With ``original``, the graph of before, the first call compares both.
    """
    start = time.perf_counter()
    tell = partial(_tell, report, options)
    compiled, outlining = _compile(gm, example_inputs, options, tell)
    report.seconds["compile"] = time.perf_counter() - start
    report.remarks.append(outlining)
    if options.verify == "numeric" and original is not None:
        compiled = _verify_numbers(original, compiled, report, options)
    _publish(report, options)
    return compiled


def _on_parts(compiled: Compiled, local: LocalGraph) -> Compiled:
    """Give ``compiled`` this rank's parts of sharded arguments."""
    if not local.sharded:
        return compiled
    return lambda *given: compiled(*local.arguments(given))


def rewrite(
    gm: fx.GraphModule, options: BackendOptions
) -> tuple[CompileReport, fx.GraphModule | None]:
    """Run raise and the passes on ``gm``, in place.

    Returns the report, and the graph as it was when numbers are to be compared and
    something changed.
    """
    seconds: dict[str, float] = {}
    with _timed(seconds, "raise"):
        fold_float_attributes(gm)
        eliminate_dead_code(gm)
        tie_sizes(gm)
        model = ModelGraph(gm)
        structure, kind = structure_rows(model), model.kind
        ends = ends_text(model)
        # Before the passes: what they write was never there to recognise.
        unrecognised = [missed(*row) for row in model.missed()]
        before = graph_text(gm)
    original = copy_module(gm) if _wants_numbers(options) else None
    with _timed(seconds, "passes"):
        records = run_passes(
            gm, options.config.pipeline, _pipeline_options(gm, options)
        )
    gm.recompile()
    innermost(gm).recompile()
    config = options.config.text()
    report = CompileReport(kind, config, structure, records, seconds=seconds)
    report.ends = ends
    report.remarks += unrecognised
    report.key = report_key([before, config, torch.__version__])
    changed = any(record.changed for record in records)
    return report, original if changed else None


def _wants_numbers(options: BackendOptions) -> bool:
    return options.verify == "numeric"


def _pipeline_options(gm: fx.GraphModule, options: BackendOptions) -> PipelineOptions:
    folder = _report_folder(options)
    return PipelineOptions(
        verify=options.verify,
        strict=options.strict,
        reproducers=folder / "reproducers" if folder else None,
        context=PassContext(device=_device(gm)),
    )


def _report_folder(options: BackendOptions) -> Path | None:
    """Return where reports go, or None where no cache directory can be had."""
    try:
        return options.report or cache_dir() / "reports"
    except KernelError:
        return None


def _device(gm: fx.GraphModule) -> str:
    """Return the type of the device that holds most inputs."""
    kinds = [
        value.device.type
        for node in gm.graph.nodes
        if isinstance(value := node.meta.get("example_value"), torch.Tensor)
        and node.op == "placeholder"
    ]
    return max(set(kinds), key=kinds.count) if kinds else "cpu"


def _compile(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    options: BackendOptions,
    tell: Callable[[Remark], None],
) -> tuple[Compiled, Remark]:
    def compile_one(piece: fx.GraphModule, inputs: list[Any]) -> Compiled:
        return _compat.compile_fx(piece, inputs, options.inductor)

    if find_loop(gm) is not None:
        graphs = bool(options.inductor.get("triton.cudagraphs"))
        outlined = compile_loop(gm, compile_one, options.outline, tell, graphs)
        assert outlined.run is not None
        return outlined.run, _outline_remark(outlined)
    if options.outline:
        outlined = compile_outlined(gm, compile_one, options.outline)
        if outlined.run is not None:
            return outlined.run, _outline_remark(outlined)
        remark = missed("layers", "not-outlined", outlined.reason)
    else:
        remark = missed("layers", "not-outlined", "switched off by outline = False")
    return _compile_whole(gm, example_inputs, compile_one), remark


def _compile_whole(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    compile_one: Callable[[fx.GraphModule, list[Any]], Compiled],
) -> Compiled:
    """Compile ``gm`` without the inputs of folded floats: CUDA graphs take no scalars
    of the processor. Meshes of ranks go with them, once no node reads them."""
    inputs = gm.graph.find_nodes(op="placeholder")
    kept = [i for i, n in enumerate(inputs) if n.users or not _is_idle(n)]
    if len(kept) == len(inputs):
        return compile_one(gm, example_inputs)
    lean = copy_module(gm)  # Dynamo calls by the placeholders of its own graph
    for index, node in enumerate(lean.graph.find_nodes(op="placeholder")):
        if index not in kept:
            lean.graph.erase_node(node)
    lean.recompile()
    compiled = compile_one(lean, [example_inputs[i] for i in kept])
    return lambda *args: compiled(*(args[i] for i in kept))


def _is_idle(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return is_float_input(node) or not isinstance(value, (torch.Tensor, torch.SymInt))


def _outline_remark(outlined: Outlined) -> Remark:
    if outlined.reason:
        return missed("layers", "not-outlined", outlined.reason)
    text = f"{outlined.layers} layers, {outlined.kinds} kind(s) of pieces compiled once"
    return applied("layers", text, layers=outlined.layers, kinds=outlined.kinds)


def _verify_numbers(
    original: fx.GraphModule,
    compiled: Compiled,
    report: CompileReport,
    options: BackendOptions,
) -> Compiled:
    exact = all(p.exact for p in options.config.pipeline)

    def check(worst: float, scale: float) -> None:
        text = f"largest difference {worst:.3g}, largest value {scale:.3g}"
        report.remarks.append(
            analysis("outputs", "numeric", text, worst=worst, scale=scale)
        )
        if exact and worst > 1e-3 * max(scale, 1e-6):
            report.remarks.append(failure("numeric", f"exact passes gave a {text}"))
            if options.strict:
                raise PassError(f"exact passes changed the outputs: {text}")
        _publish(report, options)

    return compare_first_call(original, compiled, check)


def _tell(report: CompileReport, options: BackendOptions, remark: Remark) -> None:
    """Add what only running the compiled code finds out."""
    report.remarks.append(remark)
    _publish(report, options)


def _publish(report: CompileReport, options: BackendOptions) -> None:
    """Keep the report for this process and write it beside the emitted kernels."""
    if report not in _reports:
        _reports.append(report)
    report.kernels = sorted(_kernel_paths())
    try:
        report.write(options.report or cache_dir() / "reports")
    except (OSError, KernelError) as error:
        report.remarks.append(failure("report", f"not written: {error}"))
    for remark in report.all_remarks():
        if remark.kind == "failure":
            warnings.warn(str(remark), stacklevel=2)


def _kernel_paths() -> list[str]:
    from graphopt.codegen.cache import loaded_sources

    return [str(path) for path in loaded_sources()]


def last_reports() -> list[CompileReport]:
    """Return the reports of the graphs compiled in this process, oldest first."""
    return list(_reports)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Any:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def compile(
    model: torch.nn.Module,
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    dynamic: bool | None = True,
    fullgraph: bool = False,
    mode: str | None = None,
    **options: Any,
) -> torch.nn.Module:
    """Compile ``model`` in place and return it; ``generate`` uses the compiled code.

    ``torch.compile(model).generate`` would run the original forward uncompiled, which
    is why this compiles the module's call and hands back the module itself. Options are
    checked now, and raise ConfigError, instead of at the first call.
    """
    given = {"config": config, **options}
    parse_options(given, mode)
    backend = _with_mode(mode)
    model.compile(backend=backend, dynamic=dynamic, fullgraph=fullgraph, options=given)
    return model


def _with_mode(mode: str | None) -> Any:
    """torch.compile refuses mode and options together; bind the mode to the backend."""
    if mode is None:
        return "graphopt"

    def with_mode(gm: fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Compiled:
        return graphopt(gm, inputs, mode=mode, **kwargs)

    return with_mode


__all__ = [
    "PassRecord",
    "compile",
    "compile_rewritten",
    "graphopt",
    "last_reports",
    "rewrite",
]

_compat.warn_about_generate(graphopt)
