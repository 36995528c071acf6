"""The four models of the original at their true size: how many parameters, and the same function at full width."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

import codiemb_jax
from codiemb_jax.checkpoints.families import family_of
from codiemb_jax.config import MeshSettings, ModelSettings
from codiemb_jax.models.build import abstract_model
from codiemb_jax.sharding import make_mesh
from scripts.make_random_checkpoint import make
from tests.models.parity import assert_same_hidden_states, open_folder, random_tokens

SHAPES = Path(codiemb_jax.__file__).parent / "shapes"
PARAMETERS = {
    "youtu_embedding": 2_410_289_152,
    "minicpm_embedding": 2_724_880_896,
    "bge_large_zh": 325_522_432,
    "multilingual_e5_large_instruct": 559_890_432,
}


def test_there_is_no_other_shape():
    assert {path.stem for path in SHAPES.iterdir()} == set(PARAMETERS)


@pytest.mark.parametrize("shape", PARAMETERS)
def test_parameters_are_those_of_the_published_model(shape):
    hf = json.loads((SHAPES / f"{shape}.json").read_text())
    family = family_of(hf)
    config = family.read_config(hf)
    _, abstract = abstract_model(family.model, config, ModelSettings(path=shape), make_mesh(MeshSettings()))
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    if family.model_type in ("bert", "xlm-roberta"):
        count += config.hidden_size**2 + config.hidden_size  # the pooler, which is passed through
    assert count == PARAMETERS[shape]
    by_transformers = AutoConfig.for_model(**family.stock(hf) | {"torch_dtype": "float32"})
    with torch.device("meta"):
        model = AutoModel.from_config(by_transformers)
    assert count == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("shape", ["youtu_embedding", "minicpm_embedding"])
def test_two_layers_of_full_width_are_those_of_transformers(shape, tmp_path):
    folder = tmp_path / "model"
    make(shape, folder, num_hidden_layers=2)
    ours = open_folder(folder)
    stock = ours.family.stock(ours.blueprint.config)
    theirs = AutoModel.from_pretrained(
        folder, config=AutoConfig.for_model(**stock), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    theirs.config.is_causal = False
    tokens, mask = random_tokens(1500)
    assert mask.sum(axis=1).max() == 500
    keep = np.array([0, 2])
    assert_same_hidden_states(ours, theirs, tokens[keep], mask[keep])
