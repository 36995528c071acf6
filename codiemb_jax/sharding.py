"""The device mesh and the sharding of batches and weights."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from codiemb_jax.config import MeshSettings
from codiemb_jax.errors import UserError, shorten

ROW_AXES = ("data", "fsdp")
"""Mesh axes over which the leading axis of batch arrays is split."""

WEIGHT_RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor"}
"""Mesh axis for each axis name of a weight. Other axes are replicated."""


def find_devices() -> list[jax.Device]:
    """Returns all devices.

    Raises:
      UserError: If JAX cannot use those that it should.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter without a message, if there is no GPU
        reason = shorten(" ".join(str(error).split()), 300) or f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS')}"
        raise UserError(
            f"JAX cannot use the devices ({reason}); check JAX_PLATFORMS, and that JAX is installed for them"
        ) from error


def make_mesh(settings: MeshSettings, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Creates the mesh (data, fsdp, tensor) over `devices`, by default all devices.

    Raises:
      UserError: If the sizes of the axes do not multiply to the number of devices.
    """
    devices = find_devices() if devices is None else devices
    count = len(devices)
    fixed = settings.fsdp * settings.tensor
    data = count // fixed if settings.data == -1 else settings.data
    if data * fixed != count:
        raise UserError(
            f"mesh: data {settings.data} x fsdp {settings.fsdp} x tensor {settings.tensor} does not match the number "
            f"of devices, {count}; set mesh.data to -1, and mesh.fsdp x mesh.tensor to a divisor of {count}"
        )
    shape = (data, settings.fsdp, settings.tensor)
    return jax.make_mesh(shape, (*ROW_AXES, "tensor"), (AxisType.Auto,) * 3, devices=devices)


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Returns the compiler options of programs that run a model on a mesh.

    On CPUs, they leave out YNNPACK. With two cores, its batched products, those of attention, take up to twice as long
    as Eigen's, and whole steps of the models measured are no slower without it. With jax 0.12, it also sums bfloat16
    products in bfloat16. JAX takes such options only for an outermost `jax.jit`.
    """
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if mesh.devices.flat[0].platform == "cpu" else {}


def cpu_mesh() -> Mesh:
    """Creates a mesh of one CPU device, for conversions.

    Raises:
      UserError: If JAX_PLATFORMS excludes the CPU.
    """
    try:
        return make_mesh(MeshSettings(), jax.devices("cpu")[:1])
    except RuntimeError as error:
        raise UserError(f"JAX has no CPU device, which conversion needs; add cpu to JAX_PLATFORMS ({error})") from error


def row_shards(mesh: Mesh) -> int:
    """Returns the number of parts into which a batch is split, one per group of devices with the same rows."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batch arrays: the leading axis is split over `ROW_AXES`."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def constrain_rows(x: jax.Array) -> jax.Array:
    """Constrains activations to the sharding of the rows if a mesh is set, regardless of the weights' sharding."""
    axes = tuple(axis for axis in ROW_AXES if axis in jax.sharding.get_abstract_mesh().axis_names)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place(shape: tuple[int, ...], sharding: Sharding, block: Callable[[Any], np.ndarray]) -> jax.Array:
    """Like `jax.make_array_from_callback`, but allowed under a transfer guard, for which its transfers are implicit."""
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(shape, sharding, block)


def replicate(value: np.ndarray | np.generic, mesh: Mesh) -> jax.Array:
    """Places a value on every device. As an argument of a jitted function, it would be transferred implicitly."""
    return place(value.shape, replicated(mesh), lambda _: np.asarray(value))


def split_rows(value: np.ndarray, mesh: Mesh) -> jax.Array:
    """Places an array that all processes have, with its leading axis split over `ROW_AXES`."""
    return place(value.shape, row_sharding(mesh), lambda index: value[index])


def weight_shardings(mesh: Mesh, variables: Any) -> dict[str, Any]:
    """Returns the sharding of each parameter of an NNX state by `WEIGHT_RULES`, as a nested dict.

    Raises:
      UserError: If the size of a mesh axis does not divide the axis of a weight.
    """

    def sharding(variable: nnx.Variable) -> NamedSharding:
        names = [WEIGHT_RULES.get(axis) for axis in variable.axes]
        for axis, name, size in zip(variable.axes, names, variable.shape, strict=True):
            if name and size % mesh.shape[name]:
                raise UserError(
                    f"mesh.{name} {mesh.shape[name]} does not divide the size of the model's axis {axis!r}, {size}; "
                    f"set mesh.{name} to a divisor of {size}"
                )
        return NamedSharding(mesh, PartitionSpec(*names))

    shardings = jax.tree.map(sharding, variables, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.to_pure_dict(shardings)
