"""Writes a Hugging Face folder of a model's true shape with random weights, one weight in memory at a time.

    python scripts/make_random_checkpoint.py --shape youtu_embedding --output models/random_youtu

Shapes are the files in codiemb_jax/shapes.  The tokenizer is that of the quickstart, its special tokens under the names
that the model's own has (and the padding id of its config), so that the model's recipe runs.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import codiemb_jax
from codiemb_jax.checkpoints.families import family_of
from codiemb_jax.checkpoints.safetensors import NUMPY_TYPES, LazyArray, weight_names, write_weights
from codiemb_jax.config import MeshSettings, ModelSettings
from codiemb_jax.files import write_json
from codiemb_jax.models.build import abstract_model
from codiemb_jax.sharding import make_mesh

PACKAGE = Path(codiemb_jax.__file__).parent
SHAPES = {path.stem: path for path in sorted((PACKAGE / "shapes").glob("*.json"))}
TYPES = {numpy.name: name for name, numpy in NUMPY_TYPES.items()}


def random_weight(path: str, shape: tuple[int, ...], std: float, dtype: np.dtype) -> np.ndarray:
    """Normal values, different for each weight; a norm's scale lies around 1."""
    random = np.random.default_rng(list(path.encode()))
    value = random.standard_normal(shape, np.float32)
    value *= std
    if "norm" in path and not path.endswith("bias"):
        value += 1
    return value.astype(dtype)


SPECIAL = {
    "bert": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    "xlm-roberta": {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"},
}
"""A family's special tokens, from id 0; others keep those of the quickstart."""


def write_tokenizer(folder: Path, model_type: str) -> None:
    """The quickstart's tokenizer; its first three tokens are the special ones."""
    source = PACKAGE / "quickstart" / "model"
    tokenizer, config = (
        json.loads((source / name).read_text(encoding="utf-8")) for name in ("tokenizer.json", "tokenizer_config.json")
    )
    if special := SPECIAL.get(model_type):
        names = list(special.values())
        others = {token: number for token, number in tokenizer["model"]["vocab"].items() if number >= len(names)}
        tokenizer["model"]["vocab"] = {name: number for number, name in enumerate(names)} | others
        for added, name in zip(tokenizer["added_tokens"], names, strict=True):
            added["content"] = name
        config = {name: value for name, value in config.items() if not name.endswith("_token")} | special
    for name, content in {"tokenizer.json": tokenizer, "tokenizer_config.json": config}.items():
        write_json(folder / name, content)


def make(shape: str, output: Path, **changes: Any) -> None:
    """Writes the folder; `changes` are keys of config.json that differ from the shape's own."""
    config = json.loads(SHAPES[shape].read_text(encoding="utf-8")) | changes
    family = family_of(config)
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    _, abstract = abstract_model(family.model, family.read_config(config), ModelSettings(path=shape), mesh)
    dtype = NUMPY_TYPES[TYPES[config["torch_dtype"]]]

    def lazy(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> LazyArray:
        name = ".".join(key.key for key in path)
        read = partial(random_weight, name, leaf.shape, config["initializer_range"], dtype)
        return LazyArray(leaf.shape, dtype, read)

    params = jax.tree_util.tree_map_with_path(lazy, abstract)
    names = [name for w in family.weights for name in weight_names(w, "", config["num_hidden_layers"])]
    output.mkdir(parents=True)
    write_tokenizer(output, config["model_type"])
    write_weights(output, params, {}, family.weights, "", dict.fromkeys(names, TYPES[dtype.name]))
    write_json(output / "config.json", config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=SHAPES)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--layers", type=int, help="default: as many as the model has")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"--output {options.output}: already exists; give a folder that does not")
    make(options.shape, options.output, **{"num_hidden_layers": options.layers} if options.layers else {})
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
