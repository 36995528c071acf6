"""Numerical conventions of the objectives."""

import jax
import jax.numpy as jnp

# TPUs round float32 inputs of a product to bfloat16 by default. Dividing by a temperature of 0.02 amplifies that error.
EXACT = jax.lax.Precision.HIGHEST


def mask_value(dtype: jnp.dtype) -> float:
    """Returns a finite replacement for -inf, because the gradient of a logsumexp over only -inf is NaN."""
    return float(jnp.finfo(dtype).min) / 4
