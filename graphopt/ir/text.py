"""Normalised graph text: the same for every run, process and supported torch version.

One line an operator: ``%name = op(arguments) : f32[s0, s1, 64]``. Parameters go by
their path in the model, size symbols by order of appearance, operators by one name for
all spellings. A value's name is its operator and its number among those of its layer,
so that an edit in one layer does not rename the values of the next.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch import fx

from graphopt.ir.dce import eliminate_dead_code  # noqa: F401  (re-exported for users)
from graphopt.ir.loops import loop_of
from graphopt.ir.match import op_name, value_of
from graphopt.ir.sites.parameters import READ_BEFORE

_DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16",
    torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "b8",
}  # fmt: skip
_LAYER = re.compile(r"(?:layers?|h|blocks?)\.(\d+)\.")


def graph_text(gm: fx.GraphModule, layer: int | None = None) -> str:
    """Return the normalised text of ``gm``, or of one layer of it."""
    printer = _Printer()
    lines = [line for node in gm.graph.nodes for line in printer.lines(node)]
    wanted = [text for place, text in lines if layer is None or place == layer]
    return "\n".join(wanted) + "\n"


class _Printer:
    def __init__(self) -> None:
        self._names: dict[fx.Node, str] = {}
        self._counts: dict[tuple[int, str], int] = defaultdict(int)
        self._symbols: dict[str, str] = {}
        self._layer = -1

    def lines(self, node: fx.Node) -> list[tuple[int, str]]:
        """Return (layer, text) of one node; size inputs have no line of their own."""
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "output":
            return [(-1, f"return {self._argument(node.args[0])}")]
        self._layer = self._layer_of(node)
        loop = loop_of(node)
        name = op_name(node) if loop is None else str(node.target)
        number = self._counts[self._layer, name]
        self._counts[self._layer, name] += 1
        prefix = f"L{self._layer}." if self._layer >= 0 else ""
        self._names[node] = f"%{prefix}{name}{number or ''}"
        arguments = [self._argument(a) for a in node.args]
        arguments += [
            f"{k}={self._argument(v)}" for k, v in sorted(node.kwargs.items())
        ]
        text = f"{self._names[node]} = {name}({', '.join(arguments)})"
        kind = self._type(value_of(node))
        lines = [(self._layer, text + (f" : {kind}" if kind else ""))]
        if loop is not None:
            body = _Printer()
            inner = [line for n in loop.body.graph.nodes for line in body.lines(n)]
            lines += [(place, "  " + line) for place, line in inner]
        return lines

    def _placeholder(self, node: fx.Node) -> list[tuple[int, str]]:
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            self._names[node] = self._symbol_text(value)
            return []
        path = parameter_path(node.name)
        self._names[node] = f"%{path}"
        if not node.users:
            return []
        found = _LAYER.search(path)
        layer = int(found.group(1)) if found else -1
        return [(layer, f"input %{path} : {self._type(value)}")]

    def _layer_of(self, node: fx.Node) -> int:
        """A layer begins with the first use of one of its parameters."""
        sources = (n.name for n in node.all_input_nodes if n.op == "placeholder")
        for name in (*node.meta.get(READ_BEFORE, ()), *sources):
            if found := _LAYER.search(parameter_path(name)):
                return int(found.group(1))
        return self._layer

    def _argument(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._names.get(value, "%?")
        if isinstance(value, (tuple, list)):
            inner = ", ".join(self._argument(v) for v in value)
            return f"[{inner}]"
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            ends = ["" if p is None else self._argument(p) for p in parts]
            return ":".join(ends if ends[2] else ends[:2])
        if isinstance(value, float):
            return f"{value:.6g}"
        if isinstance(value, torch.dtype):
            return _DTYPES.get(value, str(value).removeprefix("torch."))
        if isinstance(value, torch.device):
            return value.type
        if value is Ellipsis:
            return "..."
        return repr(value) if isinstance(value, str) else str(value)

    def _type(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            sizes = ", ".join(self._symbol_text(s) for s in value.shape)
            return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{sizes}]"
        return self._symbol_text(value) if isinstance(value, torch.SymInt) else ""

    def _symbol_text(self, size: Any) -> str:
        def rename(found: re.Match[str]) -> str:
            return self._symbols.setdefault(found.group(0), f"s{len(self._symbols)}")

        return re.sub(r"\b[su]\d+\b", rename, str(size))


def parameter_path(name: str) -> str:
    """Return ``layers.0.q_proj.weight`` for Dynamo's mangled name of a parameter.

    Wrappers at the front (``model.``) are dropped: they differ between base models and
    models with a head.
    """
    if not name.startswith("l_self_") and "_modules_" not in name:
        return re.sub(r"^l_(args|kwargs)_|_$", "", name)
    path = re.sub(r"^l_self_", "", name)
    path = re.sub(r"(^|_)(modules|parameters|buffers)_", ".", path).strip("._")
    path = re.sub(r"\.+", ".", path)
    return re.sub(r"^(model|transformer)\.", "", path)
