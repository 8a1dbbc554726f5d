"""Trial token counts, and sizes as polynomials in the token count."""

from __future__ import annotations

from functools import cache
from typing import Any

import sympy
from sympy.ntheory import isprime

from graphopt.ir.sizes.slots import TOKENS


def trial_counts(
    tokens: int, taken: set[int], count: int = 3, above: bool = True
) -> tuple[int, ...]:
    """Return ``count`` token counts near ``tokens`` that are mixed up with no size.

    Primes that divide no number of ``taken``, at least 11 so that none is an axis. With
    ``above`` they lie on both sides, so that a slice to ``tokens`` shows; without, all
    lie below, where a table of positions does not end, or () when there are too few.
    """
    low = [n for n in range(tokens - 2, 10, -1) if _usable(n, taken)][:count]
    if not above:
        return tuple(low) if len(low) == count else ()
    found = low[: count - 1]
    number = max(tokens + 2, 11)
    while len(found) < count:
        found += [number] if _usable(number, taken) else []
        number += 1
    return tuple(found)


def _usable(number: int, taken: set[int]) -> bool:
    return isprime(number) and all(size % number for size in taken if size)


@cache
def polynomial(counts: tuple[int, ...], sizes: tuple[int, ...]) -> Any:
    """Return the polynomial in T of degree 2 at most through the points, or None.

    Its coefficients are integers; more than three points must all lie on it.
    """
    if len(set(sizes)) == 1:
        return sympy.Integer(sizes[0])
    points = list(zip(counts, sizes, strict=True))
    expr = sympy.expand(sympy.interpolate(points[:3], TOKENS))
    poly = sympy.Poly(expr, TOKENS)
    whole = all(c.is_Integer for c in poly.all_coeffs())
    return expr if whole and all(poly.eval(t) == n for t, n in points) else None
