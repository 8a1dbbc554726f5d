"""A file that repeats what a failing pass was given: the graph, and how to run it.

The graph before the pass is printed as the ``forward`` of a plain module, with random
tensors of the same shapes, strides and types for its inputs, and compiled through the
backend in strict mode. It needs neither the model nor its weights.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphopt.ir.match import size_expr, value_of


def write_reproducer(
    folder: Path, name: str, graph: fx.Graph, config: str, error: str
) -> Path:
    """Write the reproducer of ``graph`` to ``folder``/<name>.py and return the path.

    ``config`` is the one-line pipeline that fails. Raises OSError when the file cannot
    be written and ValueError for a graph that cannot be printed.
    """
    text = reproducer_text(graph, config, error)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    return path


def reproducer_text(graph: fx.Graph, config: str, error: str) -> str:
    """Return the program; ValueError for a graph with nested modules."""
    if any(n.op == "call_module" or _is_module(graph, n) for n in graph.nodes):
        raise ValueError("a graph that holds modules cannot be printed")
    code = graph.python_code("self")
    body = code.src.partition("def forward(")[2].partition("\n")[2]
    sizes = _sizes(graph)
    parts = [
        f'"""graphopt: a pass failed.\n\n{_quoted(error)}\n"""',
        _imports(code.globals),
        _module(graph, body, sizes),
        _main(graph, config, sizes),
    ]
    return "\n\n\n".join(parts) + "\n"


def _is_module(graph: fx.Graph, node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    value: Any = graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return not isinstance(value, torch.Tensor)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"""', "'''")


def _imports(names: dict[str, Any]) -> str:
    lines = ["import torch", "from torch import device", "from math import inf, nan"]
    for name, value in sorted(names.items()):
        if name in ("torch", "device", "inf", "nan"):
            continue
        module = getattr(value, "__module__", None)
        label = getattr(value, "__name__", "")
        if isinstance(value, type(sys)):
            lines.append(f"import {value.__name__} as {name}")
        elif module and getattr(sys.modules.get(module), label, None) is value:
            lines.append(f"from {module} import {label} as {name}")
    return "\n".join([*lines, "", "import graphopt"])


def _sizes(graph: fx.Graph) -> dict[str, str]:
    """Return, for each size input, the expression that reads it off a tensor.

    As an independent integer it would be traced as a symbol of its own.
    """
    shown: dict[Any, str] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if isinstance(value, torch.Tensor):
            for axis, size in enumerate(value.shape):
                shown.setdefault(size_expr(size), f"{node.target}.size({axis})")
    return {
        str(node.target): shown[size_expr(node)]
        for node in graph.find_nodes(op="placeholder")
        if isinstance(value_of(node), torch.SymInt) and size_expr(node) in shown
    }


def _module(graph: fx.Graph, body: str, sizes: dict[str, str]) -> str:
    inputs = [str(n.target) for n in graph.find_nodes(op="placeholder")]
    names = ", ".join(["self", *(n for n in inputs if n not in sizes)])
    lines = ["class Graph(torch.nn.Module):", "    def __init__(self):"]
    lines.append("        super().__init__()")
    lines += [f"        {line}" for line in _attributes(graph)]
    lines += ["", f"    def forward({names}):"]
    lines += [f"        {name} = {text}" for name, text in sizes.items()]
    lines += [f"    {line}" if line.strip() else "" for line in body.splitlines()]
    return "\n".join(lines).rstrip()


def _attributes(graph: fx.Graph) -> list[str]:
    nodes = graph.find_nodes(op="get_attr")
    found = {str(n.target): getattr(graph.owning_module, str(n.target)) for n in nodes}
    return [
        f"self.register_buffer({name!r}, {_example(value)})"
        for name, value in found.items()
    ]


def _main(graph: fx.Graph, config: str, sizes: dict[str, str]) -> str:
    nodes = [n for n in graph.find_nodes(op="placeholder") if n.target not in sizes]
    dynamic = any(_is_symbolic(value_of(n)) for n in nodes)
    lines = [
        'if __name__ == "__main__":',
        "    torch._dynamo.config.capture_scalar_outputs = True",
        "    torch.manual_seed(0)",
        "    inputs = [",
    ]
    lines += [f"        {_example(value_of(n))},  # {n.name}" for n in nodes]
    lines += [
        "    ]",
        f"    options = {{'config': {config!r}, 'strict': True}}",
        "    with torch.no_grad():",
        f"        torch.compile(Graph(), backend='graphopt', dynamic={dynamic}, "
        "options=options)(*inputs)",
    ]
    return "\n".join(lines)


def _is_symbolic(value: Any) -> bool:
    sizes = value.shape if isinstance(value, torch.Tensor) else [value]
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _example(value: Any) -> str:
    """Return code that makes a random value like ``value``; sizes take their hints."""
    if not isinstance(value, torch.Tensor):
        return repr(_hint(value))
    shape = tuple(_hint(s) for s in value.shape)
    stride = tuple(_hint(s) for s in value.stride())
    kind = f"dtype={value.dtype}, device={value.device.type!r}"
    if value.dtype.is_floating_point or value.dtype.is_complex:
        filled = f"torch.rand({shape}, {kind})"
    else:  # token ids, positions and masks: 0 and 1 are valid for each of them
        filled = f"torch.randint(0, 2, {shape}).to({kind})"
    if stride == torch.empty(shape, device="meta").stride():
        return filled
    return f"torch.empty_strided({shape}, {stride}, {kind}).copy_({filled})"


def _hint(value: Any) -> Any:
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        known = value.node.hint
        return known if known is not None else 2
    return value
