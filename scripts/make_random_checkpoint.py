"""Writes a Hugging Face folder with the full shape of a model and random weights, one weight at a time.

    python scripts/make_random_checkpoint.py --shape youtu_embedding --output models/random_youtu

--shape names a file in codiemb_jax/shapes. The tokenizer is that of the quickstart, with the special tokens and padding
id of the model, so that the model's recipe runs.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import codiemb_jax
from codiemb_jax.checkpoints.families import get_family
from codiemb_jax.checkpoints.safetensors import NUMPY_DTYPES, LazyArray, weight_names, write_weights
from codiemb_jax.config import MeshSettings, ModelSettings
from codiemb_jax.files import write_json
from codiemb_jax.models.build import abstract_model
from codiemb_jax.sharding import make_mesh

PACKAGE = Path(codiemb_jax.__file__).parent
SHAPES = {path.stem: path for path in sorted((PACKAGE / "shapes").glob("*.json"))}
SAFETENSORS_DTYPES = {dtype.name: name for name, dtype in NUMPY_DTYPES.items()}


def random_weight(path: str, shape: tuple[int, ...], std: float, dtype: np.dtype) -> np.ndarray:
    """Returns normally distributed values, different for each weight; those of norm scales have mean 1."""
    random = np.random.default_rng(list(path.encode()))
    value = random.standard_normal(shape, np.float32)
    value *= std
    if "norm" in path and not path.endswith("bias"):
        value += 1
    return value.astype(dtype)


SPECIAL_TOKENS = {
    "bert": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    "xlm-roberta": {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"},
}
"""Special tokens of a family, with ids from 0. Other families keep those of the quickstart."""


def write_tokenizer(folder: Path, model_type: str) -> None:
    """Writes the quickstart tokenizer with the special tokens of a family."""
    source = PACKAGE / "quickstart" / "model"
    tokenizer, config = (
        json.loads((source / name).read_text(encoding="utf-8")) for name in ("tokenizer.json", "tokenizer_config.json")
    )
    # The first three tokens of the quickstart are its special tokens.
    if special := SPECIAL_TOKENS.get(model_type):
        names = list(special.values())
        others = {token: number for token, number in tokenizer["model"]["vocab"].items() if number >= len(names)}
        tokenizer["model"]["vocab"] = {name: number for number, name in enumerate(names)} | others
        for added, name in zip(tokenizer["added_tokens"], names, strict=True):
            added["content"] = name
        config = {name: value for name, value in config.items() if not name.endswith("_token")} | special
    for name, content in {"tokenizer.json": tokenizer, "tokenizer_config.json": config}.items():
        write_json(folder / name, content)


def write_random_checkpoint(shape: str, output: Path, **overrides: Any) -> None:
    """Writes the folder; `overrides` replace keys of config.json."""
    config = json.loads(SHAPES[shape].read_text(encoding="utf-8")) | overrides
    family = get_family(config)
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    _, abstract = abstract_model(family.model, family.read_config(config), ModelSettings(path=shape), mesh)
    dtype = NUMPY_DTYPES[SAFETENSORS_DTYPES[config["torch_dtype"]]]

    def lazy(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> LazyArray:
        name = ".".join(key.key for key in path)
        read = partial(random_weight, name, leaf.shape, config["initializer_range"], dtype)
        return LazyArray(leaf.shape, dtype, read)

    params = jax.tree_util.tree_map_with_path(lazy, abstract)
    names = [name for weight in family.weights for name in weight_names(weight, "", config["num_hidden_layers"])]
    output.mkdir(parents=True)
    write_tokenizer(output, config["model_type"])
    write_weights(output, params, {}, family.weights, "", dict.fromkeys(names, SAFETENSORS_DTYPES[dtype.name]))
    write_json(output / "config.json", config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=SHAPES)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--layers", type=int, help="default: that of the model")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"--output {options.output}: already exists; give a new folder")
    overrides = {"num_hidden_layers": options.layers} if options.layers else {}
    write_random_checkpoint(options.shape, options.output, **overrides)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
