"""Attention within texts, with a choice of backends."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
from jax.sharding import PartitionSpec

from codiemb_jax.errors import UserError
from codiemb_jax.models.attention import cudnn, xla, xla_cpu
from codiemb_jax.sharding import ROW_AXES

Backend = Literal["xla", "xla_cpu", "splash", "cudnn"]


def _on_each_device(attend: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Calls `attend` for the rows and heads of each device, for kernels that cannot be partitioned automatically."""
    if jax.sharding.get_abstract_mesh().empty:
        return attend(*arrays)
    heads = PartitionSpec(ROW_AXES, "tensor")
    in_specs = (heads, heads, heads, PartitionSpec(ROW_AXES))
    return jax.shard_map(attend, in_specs=in_specs, out_specs=heads, check_vma=False)(*arrays)


def _attend_on_cpu(*arrays: jax.Array, causal: bool) -> jax.Array:
    if arrays[0].shape[2] <= xla_cpu.BLOCK_TOKENS:  # not much slower in one piece, and compiled much faster
        return xla.attend(*arrays, causal=causal)
    return _on_each_device(partial(xla_cpu.attend, causal=causal), *arrays)


def _attend_with_splash(*arrays: jax.Array, causal: bool) -> jax.Array:
    from codiemb_jax.models.attention import splash  # imports Pallas, which is slow, and only TPUs need it

    return _on_each_device(partial(splash.attend, causal=causal), *arrays)


ATTEND: dict[Backend, Callable[..., jax.Array]] = {
    "xla": lambda *arrays, causal: xla.attend(*arrays, causal=causal),
    "xla_cpu": _attend_on_cpu,
    "splash": _attend_with_splash,
    "cudnn": lambda *arrays, causal: cudnn.attend(*arrays, causal=causal),
}
PLATFORMS = {"splash": "tpu", "cudnn": "gpu", "xla_cpu": "cpu"}
"""The platform that a backend needs; xla runs on all."""
ROW_MULTIPLES = {"splash": 128, "cudnn": 8}
"""Row lengths must be multiples of this. Other rows are computed by xla."""


@dataclass(frozen=True)
class Attention:
    """Softmax attention in which each token attends only to tokens of its own segment."""

    causal: bool
    """Whether a token attends only to itself and earlier tokens."""
    dropout_rate: float = 0.0
    backend: Backend = "xla"

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Computes attention. Scores and softmax are float32.

        Kernels have no dropout and take only some row lengths; otherwise xla is used.

        Args:
          query: [rows, heads, tokens, head_dim].
          key: [rows, kv_heads, tokens, head_dim], where kv_heads divides heads (grouped-query attention).
          value: [rows, kv_heads, tokens, head_dim].
          segment_ids: int [rows, tokens].
          positions: int [rows, tokens], the position of each token in its text.
          dropout_keys: One random key per token, [rows, tokens]; None disables dropout.

        Returns:
          [rows, heads, tokens, head_dim] in the dtype of `value`.
        """
        if dropout_keys is not None and self.dropout_rate > 0:
            return xla.attend_with_dropout(
                query, key, value, segment_ids, positions, dropout_keys, causal=self.causal, rate=self.dropout_rate
            )
        fits = query.shape[2] % ROW_MULTIPLES.get(self.backend, 1) == 0
        attend = ATTEND[self.backend if fits else "xla"]
        return attend(query, key, value, segment_ids, causal=self.causal)


def choose_backend(
    setting: str,
    mesh: jax.sharding.Mesh,
    compute_dtype: str,
    kv_heads: int,
    head_dim: int,
) -> Backend:
    """Returns the attention backend of a model: the one in the settings, or with `auto` the best that can run it.

    xla on a CPU is xla_cpu if possible.

    Args:
      setting: The setting `model.attention_backend`.
      mesh: The device mesh.
      compute_dtype: The dtype of queries, keys and values.
      kv_heads: Number of key heads.
      head_dim: Size of a head.

    Raises:
      UserError: If the backend in the settings cannot run the model on these devices.
    """
    device, tensor = mesh.devices.flat[0], mesh.shape["tensor"]
    platform = device.platform
    problems: dict[str, list[str]] = {"xla": []}
    for backend, needed in PLATFORMS.items():
        problems[backend] = [
            problem
            for problem, applies in {
                f"it needs a {needed.upper()}, and the devices are {platform.upper()}s": platform != needed,
                "it computes in bfloat16: set model.compute_dtype to bfloat16": backend != "xla_cpu"
                and compute_dtype != "bfloat16",
                f"mesh.tensor {tensor} must divide the number of key heads, {kv_heads}": kv_heads % tensor,
                f"head sizes must be multiples of 8 up to 128, this one is {head_dim}": backend == "cudnn"
                and (head_dim % 8 or head_dim > 128),
                "it needs an NVIDIA GPU of compute capability 8.0 or higher": backend == "cudnn"
                and platform == "gpu"
                and not _is_ampere_or_later(device),
            }.items()
            if applies
        ]
    candidates: dict[str, tuple[Backend, ...]] = {
        "auto": ("splash", "cudnn", "xla_cpu", "xla"),
        "xla": ("xla_cpu", "xla"),
        "splash": ("splash",),
        "cudnn": ("cudnn",),
    }
    for backend in candidates[setting]:
        if not problems[backend]:
            return backend
    raise UserError(
        f"model.attention_backend: {setting} cannot be used: {'; '.join(problems[setting])}; auto or xla would work"
    )


def _is_ampere_or_later(device: jax.Device) -> bool:
    major = str(device.compute_capability).partition(".")[0]  # "8.0"; a name such as "gfx942" on AMD GPUs
    return major.isdecimal() and int(major) >= 8
