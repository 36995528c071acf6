"""Reads and writes the sentence-transformers files of a model folder: prompts, limits and modules.

The modules in modules.json are the transformer, pooling, optionally a linear layer, and optionally normalization.
"""

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from codiemb_jax.checkpoints.families.family import Weight
from codiemb_jax.checkpoints.safetensors import write_weights
from codiemb_jax.errors import UserError, shorten
from codiemb_jax.files import is_bare_name, read_json, write_json
from codiemb_jax.models.build import Params
from codiemb_jax.text.sentence import SentencePrompts

POOLINGS = {
    "cls": "cls_token", "mean": "mean_tokens", "weighted_mean": "weightedmean_tokens", "last_token": "lasttoken",
}  # fmt: skip
"""Suffix of the `pooling_mode_…` key of each pooling."""
NEWER_POOLINGS = {"cls": "cls", "mean": "mean", "weighted_mean": "weightedmean", "last_token": "lasttoken"}
"""Value of each pooling in the single key `pooling_mode`, which sentence-transformers 5.4 and newer write."""
SUPPORTED_MODULES = [
    ["Transformer", "Pooling", *dense, *normalize] for dense in ([], ["Dense"]) for normalize in ([], ["Normalize"])
]
KINDS = {
    name: kind
    for kind in ("Transformer", "Pooling", "Dense", "Normalize")
    for package in ("models", "base.modules", "sentence_transformer.modules")
    for name in (f"sentence_transformers.{package}.{kind}", f"sentence_transformers.{package}.{kind.lower()}.{kind}")
} | {f"sentence_transformers.models.{kind}.{kind}": kind for kind in ("Transformer", "Pooling", "Dense", "Normalize")}
"""Modules by all class names that versions of sentence-transformers have written."""
LIMIT_PREFIXES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
"""`X` in the file names sentence_X_config.json, in the order in which sentence-transformers looks for them."""
UNSUPPORTED_LIMITS = (
    "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs", "query_length", "document_length",
    "processing_kwargs", "query_expansion",
)  # fmt: skip
"""Keys of that file that change the embeddings but are not implemented here."""
IDENTITY = "torch.nn.modules.linear.Identity"
DENSE = (Weight("kernel", "linear.weight", True), Weight("bias", "linear.bias", False))


class Modules(NamedTuple):
    """The modules after the transformer."""

    encoding: dict[str, Any]
    """The fields of `ModelSettings` that the modules determine: pooling (possibly one that is not supported here),
    normalize and projection_dim."""
    dense: Path | None
    """Folder of the linear layer, if there is one."""
    include_prompt: bool
    """Whether pooling includes the prompt."""


def read_modules(folder: Path) -> Modules | None:
    """Reads modules.json and the configs of its modules. Returns None if there is no modules.json.

    Raises:
      UserError: If a module is not supported or a file cannot be read.
    """
    path = folder / "modules.json"
    if not path.exists():
        return None
    modules = read_json(path, list)
    if not all(isinstance(module, dict) for module in modules):
        raise UserError(f"{path}: expected a list of objects with `type` and `path`")
    paths: dict[str, str] = {}
    for module in modules:
        kind, name = module.get("type"), module.get("path")
        if not isinstance(kind, str) or not isinstance(name, str):
            raise UserError(f"{path}: expected a list of objects with `type` and `path`")
        name = name.rstrip("/")
        if name and not is_bare_name(name):
            raise UserError(f"{path}: {shorten(repr(name))} is not the name of a folder in this folder")
        paths[KINDS.get(kind, shorten(repr(kind)))] = name
    if list(paths) not in SUPPORTED_MODULES or len(paths) != len(modules):
        raise UserError(
            f"{path}: {' -> '.join(paths)} is not supported; expected one of "
            f"{', '.join(' -> '.join(order) for order in SUPPORTED_MODULES)}. "
            "To train only the transformer, remove modules.json"
        )
    if paths["Transformer"]:
        raise UserError(
            f"{path}: a transformer in a subfolder ({paths['Transformer']!r}) is not supported; move its files up "
            f'and set its `path` to "", or give {folder / paths["Transformer"]} as the model'
        )
    pooling, include_prompt = _read_pooling(folder / paths["Pooling"] / "config.json")
    dense = folder / paths["Dense"] if "Dense" in paths else None
    projection_dim = None if dense is None else _read_dense_dim(dense)
    encoding = {"pooling": pooling, "normalize": "Normalize" in paths, "projection_dim": projection_dim}
    return Modules(encoding, dense, include_prompt)


def read_prompts(folder: Path, include_prompt: bool) -> tuple[SentencePrompts, int | None]:
    """Reads config_sentence_transformers.json and sentence_X_config.json.

    Returns:
      The prompts, and the maximum number of tokens per text if a file specifies it.

    Raises:
      UserError: If a file cannot be read or has invalid values.
    """
    empty: dict[str, Any] = {}
    config, limits = (
        next((read_json(folder / name, dict) for name in names if (folder / name).exists()), empty)
        for names in (
            ["config_sentence_transformers.json"],
            [f"sentence_{prefix}_config.json" for prefix in LIMIT_PREFIXES],
        )
    )
    if unsupported := [key for key in UNSUPPORTED_LIMITS if limits.get(key)]:
        raise UserError(
            f"{folder}: {unsupported[0]} in sentence_*_config.json is not supported; only max_seq_length "
            "and do_lower_case are"
        )
    modalities = limits.get("modality_config")
    if isinstance(modalities, dict) and "message" in modalities:
        raise UserError(
            f"{folder}: its texts are formatted with a chat template, which is not supported; remove `message` from "
            "modality_config in sentence_*_config.json to embed the texts alone"
        )
    prompts = config.get("prompts")
    if isinstance(prompts, dict):
        prompts = {name: "" if prompt is None else prompt for name, prompt in prompts.items()}
    try:
        text = SentencePrompts(
            prompts={} if prompts is None else prompts,
            default_prompt_name=config.get("default_prompt_name"),
            include_prompt=include_prompt,
            do_lower_case=limits.get("do_lower_case", False),
            query_template=config.get("query_template"),
            begin=config.get("begin", ""),
        )
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise UserError(f"{folder}: {field} in the sentence-transformers files: {problem['msg']}") from error
    name = text.default_prompt_name
    if name is not None and name not in {"query", "document", *text.prompts}:
        raise UserError(f"{folder}: default_prompt_name {name!r} is not one of the prompts")
    where, max_tokens = f"{folder}: max_seq_length", limits.get("max_seq_length")
    tokenizer = folder / "tokenizer_config.json"
    if max_tokens is None and tokenizer.exists():
        where, max_tokens = f"{tokenizer}: model_max_length", read_json(tokenizer, dict).get("model_max_length")
    if max_tokens is None:
        return text, None
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int | float) or not max_tokens >= 1:
        raise UserError(f"{where}: expected a number of at least 1, found {shorten(repr(max_tokens))}")
    return text, int(min(max_tokens, 2**31 - 1))


def write_modules(
    folder: Path, dim: int, pooling: str, normalize: bool, projection: Params | None, include_prompt: bool
) -> int:
    """Writes modules.json and the folders of the modules. Returns the dimension of the embeddings.

    Args:
      dim: Dimension of the hidden states.
    """
    kinds = ["Transformer", "Pooling", *["Dense"] * (projection is not None), *["Normalize"] * normalize]
    paths = {kind: f"{number}_{kind}" if number else "" for number, kind in enumerate(kinds)}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(paths.items())
    ]
    write_json(folder / "modules.json", modules)
    for path in list(paths.values())[1:]:
        (folder / path).mkdir()
    # These are the keys of sentence-transformers before 5.4, which text-embeddings-inference reads.
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    config: dict[str, Any] = {f"pooling_mode_{mode}": mode == POOLINGS[pooling] for mode in modes}
    config |= {"word_embedding_dimension": dim, "include_prompt": include_prompt}
    write_json(folder / paths["Pooling"] / "config.json", config)
    if projection is not None:
        size, dim = projection["kernel"].shape
        dtypes = dict.fromkeys((weight.name for weight in DENSE), "F32")
        write_weights(folder / paths["Dense"], projection, {}, DENSE, "", dtypes)
        config = {"in_features": size, "out_features": dim, "bias": True, "activation_function": IDENTITY}
        write_json(folder / paths["Dense"] / "config.json", config)
    if normalize:
        write_json(folder / paths["Normalize"] / "config.json", {})
    return dim


def _read_pooling(path: Path) -> tuple[str, bool]:
    """Reads 1_Pooling/config.json. Returns the name of the pooling and whether it includes the prompt.

    Poolings that are not supported here keep their names in sentence-transformers; several are joined by +.
    """
    config = read_json(path, dict)
    include_prompt = config.get("include_prompt", True)
    if not isinstance(include_prompt, bool):
        raise UserError(f"{path}: include_prompt: expected true or false, found {shorten(repr(include_prompt))}")
    prefix, known = "pooling_mode_", POOLINGS
    modes: list[Any] = [key.removeprefix(prefix) for key, value in config.items() if key.startswith(prefix) and value]
    if mode := config.get("pooling_mode"):
        modes, known = mode if isinstance(mode, list) else [mode], NEWER_POOLINGS
    if not modes or not all(isinstance(mode, str) for mode in modes):
        raise UserError(f"{path}: no valid pooling mode; expected for example pooling_mode_mean_tokens: true")
    names = {mode: name for name, mode in known.items()}
    return "+".join(names.get(mode, mode) for mode in modes), include_prompt


def _read_dense_dim(folder: Path) -> int:
    """Returns the output dimension of a linear layer.

    Raises:
      UserError: If it computes anything but W x + b.
    """
    path = folder / "config.json"
    config = read_json(path, dict)
    embedding = (None, "sentence_embedding")
    supported: dict[str, tuple[Any, ...]] = {
        "activation_function": (IDENTITY,), "bias": (True,), "use_residual": (None, False),
        "module_input_name": embedding, "module_output_name": embedding,
    }  # fmt: skip
    for key, values in supported.items():
        found = config.get(key)
        # Compares types because 1 == True.
        if not any(type(found) is type(value) and found == value for value in values):
            raise UserError(
                f"{path}: {key} {shorten(repr(found))} is not supported; expected {values[-1]!r}. "
                "To train without this layer, remove it from modules.json"
            )
    size = config.get("out_features")
    if type(size) is not int or size < 1:
        raise UserError(f"{path}: out_features: expected a positive integer, found {shorten(repr(size))}")
    return size
