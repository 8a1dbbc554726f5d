"""Print sympy bounds as C++ and as Python that a Triton kernel can run."""

from __future__ import annotations

from typing import Any

import sympy
from sympy.printing.printer import Printer


class _IntegerPrinter(Printer):
    """Integer expressions of +, *, min, max, comparisons and floored divisions."""

    minimum, maximum, floor_div = "min", "max", "({} // {})"
    conjunction, disjunction, truth = " & ", " | ", "True"

    def _print_Symbol(self, expr: Any) -> str:
        return str(expr.name)

    def _print_Integer(self, expr: Any) -> str:
        return str(int(expr))

    def _print_Add(self, expr: Any) -> str:
        terms = sorted(expr.args, key=lambda t: (t.could_extract_minus_sign(), str(t)))
        text = self._print(terms[0])
        for term in terms[1:]:
            negative = term.could_extract_minus_sign()
            text += (" - " if negative else " + ") + self._print(
                -term if negative else term
            )
        return text

    def _print_Mul(self, expr: Any) -> str:
        return " * ".join(self._wrapped(a) for a in expr.args)

    def _wrapped(self, expr: Any) -> str:
        text = self._print(expr)
        return f"({text})" if expr.is_Add else text

    def _print_floor(self, expr: Any) -> str:
        numerator, denominator = expr.args[0].as_numer_denom()
        return self.floor_div.format(self._wrapped(numerator), int(denominator))

    def _print_Rational(self, expr: Any) -> str:
        raise ValueError(f"a fraction outside of floor: {expr}")

    def _nested(self, name: str, args: Any) -> str:
        parts = sorted((self._print(a) for a in args), key=lambda t: (len(t), t))
        text = parts[-1]
        for part in reversed(parts[:-1]):
            text = f"{name}({part}, {text})"
        return text

    def _print_Min(self, expr: Any) -> str:
        return self._nested(self.minimum, expr.args)

    def _print_Max(self, expr: Any) -> str:
        return self._nested(self.maximum, expr.args)

    def _print_Relational(self, expr: Any) -> str:
        return f"({self._print(expr.lhs)} {expr.rel_op} {self._print(expr.rhs)})"

    def _print_And(self, expr: Any) -> str:
        return "(" + self.conjunction.join(sorted(map(self._print, expr.args))) + ")"

    def _print_Or(self, expr: Any) -> str:
        return "(" + self.disjunction.join(sorted(map(self._print, expr.args))) + ")"

    def _print_BooleanTrue(self, expr: Any) -> str:
        return self.truth


class _CppPrinter(_IntegerPrinter):
    minimum, maximum = "std::min<int64_t>", "std::max<int64_t>"
    floor_div = "floor_div({}, {})"
    conjunction, disjunction, truth = " && ", " || ", "true"


class _TritonPrinter(_IntegerPrinter):
    minimum, maximum = "tl.minimum", "tl.maximum"


def to_cpp(expr: Any) -> str:
    """Return ``expr`` in C++ over int64_t variables; needs ``floor_div(a, b)``."""
    return str(_CppPrinter().doprint(_integral(expr)))


def to_triton(expr: Any) -> str:
    """Return ``expr`` for a Triton kernel; positions must not be negative in ``//``."""
    return str(_TritonPrinter().doprint(_integral(expr)))


def _integral(expr: Any) -> Any:
    """Turn ``q/64 - window/64`` style fractions of whole blocks into floors."""
    return sympy.sympify(expr).replace(
        lambda e: e.is_Mul and e.args[0].is_Rational and not e.args[0].is_Integer,
        lambda e: sympy.floor(e, evaluate=False),
    )
