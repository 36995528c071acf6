"""Tests the configs of the four published models: number of parameters, and hidden states at full width."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

import codiemb_jax
from codiemb_jax.checkpoints.families import get_family
from codiemb_jax.config import MeshSettings, ModelSettings
from codiemb_jax.models.build import abstract_model
from codiemb_jax.sharding import make_mesh
from scripts.make_random_checkpoint import write_random_checkpoint
from tests.models.parity import assert_same_hidden_states, open_folder, random_tokens

SHAPES = Path(codiemb_jax.__file__).parent / "shapes"
PARAMETERS = {
    "youtu_embedding": 2_410_289_152,
    "minicpm_embedding": 2_724_880_896,
    "bge_large_zh": 325_522_432,
    "multilingual_e5_large_instruct": 559_890_432,
}


def test_all_shapes_are_tested():
    assert {path.stem for path in SHAPES.iterdir()} == set(PARAMETERS)


@pytest.mark.parametrize("shape", PARAMETERS)
def test_number_of_parameters_matches_the_published_model(shape):
    hf = json.loads((SHAPES / f"{shape}.json").read_text())
    family = get_family(hf)
    config = family.read_config(hf)
    _, abstract = abstract_model(family.model, config, ModelSettings(path=shape), make_mesh(MeshSettings()))
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    if family.model_type in ("bert", "xlm-roberta"):
        count += config.hidden_size**2 + config.hidden_size  # the pooler is passed through
    assert count == PARAMETERS[shape]
    reference_config = AutoConfig.for_model(**family.stock(hf) | {"torch_dtype": "float32"})
    with torch.device("meta"):
        model = AutoModel.from_config(reference_config)
    assert count == sum(weight.numel() for weight in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["youtu_embedding", "minicpm_embedding"])
def test_two_layers_of_full_width_match_transformers(shape, tmp_path):
    folder = tmp_path / "model"
    write_random_checkpoint(shape, folder, num_hidden_layers=2)
    model = open_folder(folder)
    stock = model.family.stock(model.blueprint.config)
    reference = AutoModel.from_pretrained(
        folder, config=AutoConfig.for_model(**stock), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    reference.config.is_causal = False
    tokens, mask = random_tokens(1500)
    assert mask.sum(axis=1).max() == 500
    keep = np.array([0, 2])
    assert_same_hidden_states(model, reference, tokens[keep], mask[keep])
