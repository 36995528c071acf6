"""Rotary position embeddings with default, linear and llama3 scaling."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codiemb_jax.errors import UserError

KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Rope:
    """Settings of rotary position embeddings, named as in `rope_scaling` of Hugging Face configs."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Rope":
        """Reads `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

        Raises:
          UserError: If a value is invalid or not supported.
        """
        parts = {name: hf.get(name) or {} for name in ("rope_scaling", "rope_parameters")}
        if wrong := [name for name, part in parts.items() if not isinstance(part, dict)]:
            raise UserError(f"config.json: {wrong[0]}: expected an object or null, found {hf[wrong[0]]!r}")
        if nested := [name for name, value in parts["rope_parameters"].items() if isinstance(value, dict)]:
            raise UserError(f"config.json: separate rope_parameters for {nested[0]} layers are not supported")
        scaling = {**parts["rope_scaling"], **parts["rope_parameters"]}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in KINDS:
            raise UserError(f"config.json: rope_type {kind!r} is not supported; expected one of {', '.join(KINDS)}")
        if (partial := scaling.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))) != 1.0:
            raise UserError(f"config.json: partial_rotary_factor {partial} is not supported; expected 1.0")
        names = {
            "default": (),
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }[kind]
        numbers = {"rope_theta": scaling.get("rope_theta", hf.get("rope_theta", 10000.0))}
        numbers |= {name: scaling.get(name) for name in names}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
                shown = repr(value)[:40]
                raise UserError(f"config.json: rope_type {kind}: {name}: expected a positive number, found {shown}")
        return cls(theta=float(numbers.pop("rope_theta")), kind=kind, **numbers)

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Returns the rotation angle per position of each pair of dimensions, float32 [head_dim / 2]."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        # Round where PyTorch rounds: at position 500, a difference of one ulp rotates a pair by 3e-5.
        inverse = np.float32(1.0) / (self.theta ** exponents.astype(np.float64)).astype(np.float32)
        if self.kind == "linear":
            return inverse / np.float32(self.factor)
        if self.kind == "llama3":
            # Long wavelengths are stretched by `factor`, short ones are kept, and those in between are interpolated.
            wavelength = 2 * np.pi / inverse
            turns = self.original_max_position_embeddings / wavelength
            blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            blend = np.clip(blend, 0.0, 1.0).astype(np.float32)
            return (1 - blend) * inverse / np.float32(self.factor) + blend * inverse
        return inverse


def rotation(inverse_frequencies: np.ndarray, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines, float32 [rows, 1, tokens, head_dim / 2], for int positions [rows, tokens]."""
    angles = positions[:, None, :, None].astype(jnp.float32) * inverse_frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x, [rows, heads, tokens, head_dim]; the first half of the dimensions is paired with the second half."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
