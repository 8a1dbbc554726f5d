"""Layer outlining: repeated layers are found, proven alike and compiled once.

``segments`` cuts the graph, ``pieces`` turns segments into graphs of their own and
decides which are alike, ``program`` compiles each kind once and runs them in order.
"""

from graphopt.outline.loop import compile_loop
from graphopt.outline.program import Outlined, compile_outlined

__all__ = ["Outlined", "compile_loop", "compile_outlined"]
