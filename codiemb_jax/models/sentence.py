"""sentence-transformers' modules in a model folder: what follows the transformer, read and written.

modules.json lists them: pooling, then perhaps a linear layer, then perhaps normalisation.
"""

from pathlib import Path
from typing import Any, NamedTuple

from codiemb_jax.errors import UserError
from codiemb_jax.files import read_json, write_json
from codiemb_jax.models.families.family import Weight
from codiemb_jax.models.weights import Params, write_weights

POOLINGS = {
    "cls": "cls_token", "mean": "mean_tokens", "weighted_mean": "weightedmean_tokens", "last_token": "lasttoken",
}  # fmt: skip
"""Our poolings by what stands in `pooling_mode_…`."""
NEWER_POOLINGS = {"cls": "cls", "mean": "mean", "weighted_mean": "weightedmean", "last_token": "lasttoken"}
"""Likewise in the single `pooling_mode` that sentence-transformers 5.4 and newer write."""
ORDERS = [
    ["Transformer", "Pooling", *dense, *normalize] for dense in ([], ["Dense"]) for normalize in ([], ["Normalize"])
]
IDENTITY = "torch.nn.modules.linear.Identity"
DENSE = (Weight("kernel", "linear.weight", True), Weight("bias", "linear.bias", False))


class Modules(NamedTuple):
    """What follows the transformer."""

    encoding: dict[str, Any]
    """The fields of `ModelSettings` that are fixed by it: pooling (a name that is none of ours where
    sentence-transformers knows others), normalize, projection_dim."""
    dense: Path | None
    """Folder of the linear layer."""


def read_modules(folder: Path) -> Modules | None:
    """What modules.json of a model folder says; None if there is none.

    UserError if it names modules that are not computed here, or a file cannot be read.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    modules = read_json(path, list)
    try:
        paths = {module["type"].rsplit(".")[-1]: module["path"].rstrip("/") for module in modules}
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: expected a list of objects with `type` and `path`") from error
    for name in paths.values():
        if name == ".." or Path(name).name != name:
            raise UserError(f"{path}: {name!r} is not the name of a folder in this folder")
    if list(paths) not in ORDERS or len(paths) != len(modules):
        raise UserError(
            f"{path}: {' -> '.join(paths)} is not supported; supported are "
            f"{', '.join(' -> '.join(order) for order in ORDERS)}.  To train the transformer alone, remove modules.json"
        )
    if paths["Transformer"]:
        raise UserError(
            f"{path}: the transformer in {paths['Transformer']!r} is not read, only one in the folder itself (`path` "
            f'""): move its files up, or give {folder / paths["Transformer"]} as the model'
        )
    pooling = _pooling(folder / paths["Pooling"] / "config.json")
    dense = folder / paths["Dense"] if "Dense" in paths else None
    projected = None if dense is None else _projected(dense)
    return Modules({"pooling": pooling, "normalize": "Normalize" in paths, "projection_dim": projected}, dense)


def write_modules(folder: Path, dim: int, pooling: str, normalize: bool, projection: Params | None) -> int:
    """Writes modules.json and what it names; returns the vectors' dimension.  `dim` is that of the hidden states."""
    kinds = ["Transformer", "Pooling", *["Dense"] * (projection is not None), *["Normalize"] * normalize]
    paths = {kind: f"{number}_{kind}" if number else "" for number, kind in enumerate(kinds)}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(paths.items())
    ]
    write_json(folder / "modules.json", modules)
    for path in list(paths.values())[1:]:
        (folder / path).mkdir()
    # The keys of sentence-transformers before 5.4, which text-embeddings-inference reads.
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    config: dict[str, Any] = {f"pooling_mode_{mode}": mode == POOLINGS[pooling] for mode in modes}
    # cls takes the first token of all, which is the prompt's.
    config |= {"word_embedding_dimension": dim, "include_prompt": pooling in ("cls", "last_token")}
    write_json(folder / paths["Pooling"] / "config.json", config)
    if projection is not None:
        size, dim = projection["kernel"].shape
        types = dict.fromkeys((weight.theirs for weight in DENSE), "F32")
        write_weights(folder / paths["Dense"], projection, {}, DENSE, "", types)
        config = {"in_features": size, "out_features": dim, "bias": True, "activation_function": IDENTITY}
        write_json(folder / paths["Dense"] / "config.json", config)
    if normalize:
        write_json(folder / paths["Normalize"] / "config.json", {})
    return dim


def _pooling(path: Path) -> str:
    """Our name of the pooling that 1_Pooling/config.json describes; several of them, or others, as they are called."""
    config = read_json(path, dict)
    start, known = "pooling_mode_", POOLINGS
    modes: list[Any] = [key.removeprefix(start) for key, value in config.items() if key.startswith(start) and value]
    if mode := config.get("pooling_mode"):
        modes, known = mode if isinstance(mode, list) else [mode], NEWER_POOLINGS
    if not modes or not all(isinstance(mode, str) for mode in modes):
        raise UserError(f"{path}: names no pooling; expected pooling_mode_mean_tokens: true, or another of its kind")
    ours = {theirs: name for name, theirs in known.items()}
    return "+".join(ours.get(mode, mode) for mode in modes)


def _projected(folder: Path) -> int:
    """Dimension of a linear layer's output.  UserError if it computes anything beside W x + b."""
    path = folder / "config.json"
    config = read_json(path, dict)
    vector = (None, "sentence_embedding")
    supported: dict[str, tuple[Any, ...]] = {
        "activation_function": (IDENTITY,), "bias": (True,), "use_residual": (None, False),
        "module_input_name": vector, "module_output_name": vector,
    }  # fmt: skip
    for key, values in supported.items():
        if config.get(key) not in values:
            raise UserError(
                f"{path}: {key} {config.get(key)!r} is not supported, supported is {values[-1]!r}.  To train without "
                "this layer, take it out of modules.json"
            )
    size = config.get("out_features")
    if type(size) is not int or size < 1:
        raise UserError(f"{path}: out_features {size!r}, expected a whole number of at least 1")
    return size
