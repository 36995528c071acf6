"""The device mesh, and how arrays are split over it."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from codiemb_jax.config import MeshSettings
from codiemb_jax.errors import UserError

ROW_AXES = ("data", "fsdp")
"""Mesh axes over which the leading axis of every array of a batch is split."""

WEIGHT_RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor"}
"""Which mesh axis splits which axis of a weight; all other axes are replicated."""


def make_mesh(settings: MeshSettings, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over `devices`, all there are by default."""
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    fixed = settings.fsdp * settings.tensor
    data = count // fixed if settings.data == -1 else settings.data
    if data * fixed != count:
        raise UserError(
            f"mesh: data {settings.data} x fsdp {settings.fsdp} x tensor {settings.tensor} does not make the "
            f"{count} devices there are; set mesh.data to -1 and the others so that their product divides {count}"
        )
    shape = (data, settings.fsdp, settings.tensor)
    return jax.make_mesh(shape, (*ROW_AXES, "tensor"), (AxisType.Auto,) * 3, devices=devices)


def cpu_mesh() -> Mesh:
    """A mesh of one CPU device, for conversions.

    Raises:
      UserError: JAX is told to use none.
    """
    try:
        return make_mesh(MeshSettings(), jax.devices("cpu")[:1])
    except RuntimeError as error:
        raise UserError(f"JAX has no CPU device, which conversion needs; add cpu to JAX_PLATFORMS ({error})") from error


def row_shards(mesh: Mesh) -> int:
    """Number of devices that hold different rows; a batch is split into this many parts."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis split over the devices that hold different rows."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def constrain_rows(x: jax.Array) -> jax.Array:
    """Keeps activations split by rows when a mesh is set, whatever the weights' sharding suggests."""
    axes = tuple(axis for axis in ROW_AXES if axis in jax.sharding.get_abstract_mesh().axis_names)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def weight_shardings(mesh: Mesh, variables: Any) -> dict[str, Any]:
    """The sharding of each parameter of an NNX state, as a nested dict of its paths.

    A weight is split along the axes that `WEIGHT_RULES` names.  UserError if a mesh axis does not divide one.
    """

    def sharding(variable: nnx.Variable) -> NamedSharding:
        names = [WEIGHT_RULES.get(axis) for axis in variable.axes]
        for axis, name, size in zip(variable.axes, names, variable.shape, strict=True):
            if name and size % mesh.shape[name]:
                raise UserError(
                    f"mesh.{name} {mesh.shape[name]} does not divide the model's axis {axis!r} of {size}; "
                    f"set mesh.{name} to a divisor of {size}"
                )
        return NamedSharding(mesh, PartitionSpec(*names))

    shardings = jax.tree.map(sharding, variables, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.to_pure_dict(shardings)
