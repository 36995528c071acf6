"""Counts the floating-point operations of a traced JAX function, and those of loops as often as they run."""

import math
from typing import Any

from jax.extend import core


def count_flops(closed: core.ClosedJaxpr) -> int:
    """Returns the operations of all matrix products, 2 m n k each, in a traced function and in all that it calls.

    A kernel counts as its grid times its body. A conditional counts as its most expensive branch, and a loop whose
    number of iterations is not known counts once.
    """
    return _count(closed.jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)
    inner = [_count(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "shard_map":
        return params["mesh"].size * sum(inner)
    return sum(inner)


def _jaxprs(value: Any) -> list[core.Jaxpr]:
    """Returns the jaxprs in a parameter of an equation."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    if isinstance(value, list | tuple):
        return [jaxpr for item in value for jaxpr in _jaxprs(item)]
    return []
