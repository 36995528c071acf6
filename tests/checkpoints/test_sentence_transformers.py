"""sentence-transformers' modules in a model folder: what is read of them, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.errors import UserError
from codiemb_jax.sharding import make_mesh
from codiemb_jax.checkpoints.model import open_model
from convert.hf_to_orbax import main as hf_to_orbax
from convert.orbax_to_hf import main as orbax_to_hf
from convert.orbax_to_hf import open_checkpoint
from scripts.make_random_checkpoint import make


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "model"
    tiny = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    make("bge_large_zh", folder, **tiny, vocab_size=2000)
    return folder


def sentence_folder(folder: Path, model: Path, modules: list, **configs: dict) -> Path:
    """A model folder with modules.json and the configs of the modules."""
    shutil.copytree(model, folder)
    (folder / "modules.json").write_text(json.dumps(modules))
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def module(kind: str, path: str) -> dict:
    return {"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{kind}"}


TRANSFORMER, POOLING = module("Transformer", ""), module("Pooling", "pooling")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 48}, "last_token"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode": ["cls", "max"]}, "cls+max"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, "max_tokens+mean"),
    ],
)
def test_pooling_is_read_in_both_spellings(config, expected, bert, tmp_path):
    folder = sentence_folder(tmp_path / "model", bert, [TRANSFORMER, POOLING], pooling=config)
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    model = open_model(ModelSettings(path=str(folder)), PromptSettings(), mesh)
    assert model.stored == {"pooling": expected, "normalize": False, "projection_dim": None}
    arguments = ["--model", str(folder), "--output", str(tmp_path / "orbax")]
    if "+" in expected:
        with pytest.raises(UserError, match=re.escape(f"found '{expected}'")):
            hf_to_orbax(arguments)
    else:
        hf_to_orbax(arguments)
        assert open_checkpoint(tmp_path / "orbax").blueprint.encoding["pooling"] == expected


IDENTITY = {"activation_function": "torch.nn.modules.linear.Identity", "bias": True, "in_features": 48}


@pytest.mark.parametrize(
    ("modules", "dense", "message"),
    [
        ([TRANSFORMER], {}, "modules.json: Transformer is not supported; supported are Transformer -> Pooling,"),
        ([TRANSFORMER, POOLING, module("LayerNorm", "dense")], {}, "Pooling -> LayerNorm is not supported"),
        ([TRANSFORMER, POOLING, module("Normalize", "dense"), module("Dense", "dense")], {}, "is not supported"),
        ([TRANSFORMER, module("Pooling", "../pooling")], {}, "'../pooling' is not the name of a folder"),
        ([TRANSFORMER, POOLING, module("Dense", "..")], {}, "'..' is not the name of a folder"),
        ({"modules": []}, {}, "expected a JSON list"),
        ([1], {}, "expected a list of objects with `type` and `path`"),
        (
            [TRANSFORMER, POOLING, module("Dense", "dense")],
            IDENTITY | {"out_features": 20, "activation_function": "torch.nn.modules.activation.Tanh"},
            "activation_function 'torch.nn.modules.activation.Tanh' is not supported",
        ),
        ([TRANSFORMER, POOLING, module("Dense", "dense")], IDENTITY | {"bias": False}, "bias False is not supported"),
        ([TRANSFORMER, POOLING, module("Dense", "dense")], IDENTITY, "out_features None, expected a whole number"),
        (
            [TRANSFORMER, POOLING, module("Dense", "dense")],
            IDENTITY | {"out_features": 48, "use_residual": True},
            "use_residual True is not supported, supported is False",
        ),
        (
            [TRANSFORMER, POOLING, module("Dense", "dense")],
            IDENTITY | {"out_features": 48, "module_input_name": "token_embeddings"},
            "module_input_name 'token_embeddings' is not supported",
        ),
        ([module("Transformer", "0_Transformer"), POOLING], {}, "transformer in '0_Transformer' is not read"),
        (
            [TRANSFORMER, POOLING, module("Dense", "dense")],
            IDENTITY | {"out_features": 20},
            "model.projection_dim None: .* was trained with a projection to 20; set it to 20",
        ),
        ([TRANSFORMER, POOLING, module("Dense", "absent")], {}, "absent/config.json: cannot be read"),
    ],
)
def test_modules_that_are_not_computed_are_told(modules, dense, message, bert, tmp_path):
    configs = {"pooling": {"pooling_mode": "mean"}, "dense": dense}
    folder = sentence_folder(tmp_path / "model", bert, modules, **configs)
    with pytest.raises(UserError, match=message):
        open_model(ModelSettings(path=str(folder)), PromptSettings(), make_mesh(MeshSettings()))


def test_a_linear_layer_of_another_shape_is_told(bert, tmp_path):
    modules = [TRANSFORMER, POOLING, module("Dense", "dense")]
    configs = {"pooling": {"pooling_mode": "mean"}, "dense": IDENTITY | {"out_features": 20}}
    folder = sentence_folder(tmp_path / "model", bert, modules, **configs)
    weights = {"linear.weight": np.zeros((20, 47), np.float32), "linear.bias": np.zeros(20, np.float32)}
    save_file(weights, folder / "dense" / "model.safetensors")
    settings = ModelSettings(path=str(folder), projection_dim=20)
    with pytest.raises(UserError, match=r"dense: weights do not fit[^$]*linear.weight is \[20, 47\]"):
        open_model(settings, PromptSettings(), make_mesh(MeshSettings()))


@pytest.mark.parametrize("config", [{}, {"pooling_mode": [["cls"]]}, {"pooling_mode": {"a": 1}}, {"pooling_mode": 3}])
def test_a_pooling_that_is_none_is_told(config, bert, tmp_path):
    folder = sentence_folder(tmp_path / "model", bert, [TRANSFORMER, POOLING], pooling=config)
    with pytest.raises(UserError, match=r"pooling/config\.json: names no pooling"):
        open_model(ModelSettings(path=str(folder)), PromptSettings(), make_mesh(MeshSettings()))


def test_a_weighted_mean_is_converted_without_a_prompt(bert, tmp_path):
    """With one it could not be exported again."""
    config = {"pooling_mode": "weightedmean"}
    folder = sentence_folder(tmp_path / "model", bert, [TRANSFORMER, POOLING], pooling=config)
    hf_to_orbax(["--model", str(folder), "--output", str(tmp_path / "orbax")])
    orbax_to_hf(["--checkpoint", str(tmp_path / "orbax"), "--output", str(tmp_path / "export")])
    prompts = json.loads((tmp_path / "export" / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts == {"query": "", "document": ""}
