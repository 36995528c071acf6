"""sentence-transformers' files in a model folder, read and written: prompts, and what follows the transformer.

modules.json lists them: pooling, then perhaps a linear layer, then perhaps normalization.
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
"""Our poolings by what stands in `pooling_mode_…`."""
NEWER_POOLINGS = {"cls": "cls", "mean": "mean", "weighted_mean": "weightedmean", "last_token": "lasttoken"}
"""Likewise in the single `pooling_mode` that sentence-transformers 5.4 and newer write."""
ORDERS = [
    ["Transformer", "Pooling", *dense, *normalize] for dense in ([], ["Dense"]) for normalize in ([], ["Normalize"])
]
KINDS = {
    name: kind
    for kind in ("Transformer", "Pooling", "Dense", "Normalize")
    for package in ("models", "base.modules", "sentence_transformer.modules")
    for name in (f"sentence_transformers.{package}.{kind}", f"sentence_transformers.{package}.{kind.lower()}.{kind}")
} | {f"sentence_transformers.models.{kind}.{kind}": kind for kind in ("Transformer", "Pooling", "Dense", "Normalize")}
"""Modules by the names that sentence-transformers' versions have written."""
LIMITS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
"""In sentence_KIND_config.json, in the order in which sentence-transformers looks for one."""
UNREAD = (
    "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs", "query_length", "document_length",
    "processing_kwargs",
)  # fmt: skip
"""Keys of that file that change what sentence-transformers computes."""
IDENTITY = "torch.nn.modules.linear.Identity"
DENSE = (Weight("kernel", "linear.weight", True), Weight("bias", "linear.bias", False))


class Modules(NamedTuple):
    """What follows the transformer."""

    encoding: dict[str, Any]
    """The fields of `ModelSettings` that are fixed by it: pooling (a name that is none of ours where
    sentence-transformers knows others), normalize, projection_dim."""
    dense: Path | None
    """Folder of the linear layer."""
    include_prompt: bool
    """Whether pooling covers the prompt."""


def read_modules(folder: Path) -> Modules | None:
    """What modules.json of a model folder says; None if there is none.

    UserError if it names modules that are not computed here, or a file cannot be read.
    """
    path = folder / "modules.json"
    if not path.is_file():
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
    pooling, include_prompt = _pooling(folder / paths["Pooling"] / "config.json")
    dense = folder / paths["Dense"] if "Dense" in paths else None
    projected = None if dense is None else _projected(dense)
    encoding = {"pooling": pooling, "normalize": "Normalize" in paths, "projection_dim": projected}
    return Modules(encoding, dense, include_prompt)


def read_prompts(folder: Path, include_prompt: bool) -> tuple[SentencePrompts, int | None]:
    """What config_sentence_transformers.json and the file of limits say of texts: prompts and longest text.

    Raises:
      UserError: a file cannot be read, or holds values that sentence-transformers would not take either.
    """
    nothing: dict[str, Any] = {}
    described, limits = (
        next((read_json(folder / name, dict) for name in names if (folder / name).exists()), nothing)
        for names in (["config_sentence_transformers.json"], [f"sentence_{kind}_config.json" for kind in LIMITS])
    )
    if others := [key for key in UNREAD if limits.get(key)]:
        raise UserError(
            f"{folder}: {others[0]} in the file of limits is not supported; supported are max_seq_length "
            "and do_lower_case"
        )
    prompts = described.get("prompts")
    if isinstance(prompts, dict):
        prompts = {name: "" if prompt is None else prompt for name, prompt in prompts.items()}
    try:
        text = SentencePrompts(
            prompts={} if prompts is None else prompts,
            default_prompt_name=described.get("default_prompt_name"),
            include_prompt=include_prompt,
            do_lower_case=limits.get("do_lower_case", False),
        )
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise UserError(f"{folder}: {field} of its sentence-transformers files: {problem['msg']}") from error
    name = text.default_prompt_name
    if name is not None and name not in {"query", "document", *text.prompts}:
        raise UserError(f"{folder}: default_prompt_name {name!r} is none of its prompts")
    where, longest = f"{folder}: max_seq_length", limits.get("max_seq_length")
    tokenizer = folder / "tokenizer_config.json"
    if longest is None and tokenizer.exists():
        where, longest = f"{tokenizer}: model_max_length", read_json(tokenizer, dict).get("model_max_length")
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1):
        raise UserError(f"{where}: expected a number of at least 1, found {shorten(repr(longest))}")
    return text, None if longest is None else int(min(longest, 2**31 - 1))


def write_modules(
    folder: Path, dim: int, pooling: str, normalize: bool, projection: Params | None, include_prompt: bool
) -> int:
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
    config |= {"word_embedding_dimension": dim, "include_prompt": include_prompt}
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


def _pooling(path: Path) -> tuple[str, bool]:
    """Our name of the pooling that 1_Pooling/config.json describes (several, or others: theirs), and whether it covers
    the prompt."""
    config = read_json(path, dict)
    include_prompt = config.get("include_prompt", True)
    if not isinstance(include_prompt, bool):
        raise UserError(f"{path}: include_prompt: expected true or false, found {shorten(repr(include_prompt))}")
    start, known = "pooling_mode_", POOLINGS
    modes: list[Any] = [key.removeprefix(start) for key, value in config.items() if key.startswith(start) and value]
    if mode := config.get("pooling_mode"):
        modes, known = mode if isinstance(mode, list) else [mode], NEWER_POOLINGS
    if not modes or not all(isinstance(mode, str) for mode in modes):
        raise UserError(f"{path}: names no pooling; expected pooling_mode_mean_tokens: true, or another of its kind")
    ours = {theirs: name for name, theirs in known.items()}
    return "+".join(ours.get(mode, mode) for mode in modes), include_prompt


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
        found = config.get(key)
        if not any(type(found) is type(value) and found == value for value in values):  # 1 is not True
            raise UserError(
                f"{path}: {key} {shorten(repr(found))} is not supported, supported is {values[-1]!r}.  "
                "To train without this layer, take it out of modules.json"
            )
    size = config.get("out_features")
    if type(size) is not int or size < 1:
        raise UserError(f"{path}: out_features {shorten(repr(size))}, expected a whole number of at least 1")
    return size
