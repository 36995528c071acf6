"""Tests of reading the sentence-transformers files of a model folder."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer

from codiemb_jax.checkpoints.model import open_checkpoint, open_folder, open_model
from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.errors import UserError
from codiemb_jax.sharding import make_mesh
from codiemb_jax.text.sentence import SentencePrompts
from convert.hf_to_orbax import main as hf_to_orbax
from convert.orbax_to_hf import main as orbax_to_hf
from scripts.make_random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "model"
    tiny = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    write_random_checkpoint("bge_large_zh", folder, **tiny, vocab_size=2000)
    return folder


def sentence_folder(folder: Path, model: Path, modules: list, **configs: dict) -> Path:
    """Copies a model folder and adds modules.json and the configs of the modules."""
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
def test_pooling_is_read_from_old_and_new_keys(config, expected, bert, tmp_path):
    folder = sentence_folder(tmp_path / "model", bert, [TRANSFORMER, POOLING], pooling=config)
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    model = open_model(ModelSettings(path=str(folder)), PromptSettings(), mesh)
    encoding = {"attention": "bidirectional", "pooling": expected, "normalize": False, "projection_dim": None}
    assert model.folder.stored_settings == encoding
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
        ([TRANSFORMER], {}, "modules.json: Transformer is not supported; expected one of Transformer -> Pooling,"),
        (
            [TRANSFORMER, POOLING, module("LayerNorm", "dense")],
            {},
            r"Pooling -> 'sentence_transformers\.models\.LayerNorm' is not supported",
        ),
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
        (
            [TRANSFORMER, POOLING, module("Dense", "dense")],
            IDENTITY,
            "out_features: expected a positive integer, found None",
        ),
        (
            [TRANSFORMER, POOLING, module("Dense", "dense")],
            IDENTITY | {"out_features": 48, "use_residual": True},
            "use_residual True is not supported; expected False",
        ),
        (
            [TRANSFORMER, POOLING, module("Dense", "dense")],
            IDENTITY | {"out_features": 48, "module_input_name": "token_embeddings"},
            "module_input_name 'token_embeddings' is not supported",
        ),
        (
            [module("Transformer", "0_Transformer"), POOLING],
            {},
            r"transformer in a subfolder \('0_Transformer'\) is not supported",
        ),
        (
            [TRANSFORMER, POOLING, module("Dense", "dense")],
            IDENTITY | {"out_features": 20},
            "model.projection_dim None: .* was trained with a projection to 20; set it to 20",
        ),
        ([TRANSFORMER, POOLING, module("Dense", "absent")], {}, "absent/config.json: cannot be read"),
    ],
)
def test_unsupported_modules_raise_user_error(modules, dense, message, bert, tmp_path):
    configs = {"pooling": {"pooling_mode": "mean"}, "dense": dense}
    folder = sentence_folder(tmp_path / "model", bert, modules, **configs)
    weights = {"linear.weight": np.zeros((20, 48), np.float32), "linear.bias": np.zeros(20, np.float32)}
    save_file(weights, folder / "dense" / "model.safetensors")
    with pytest.raises(UserError, match=message):
        open_model(ModelSettings(path=str(folder)), PromptSettings(), make_mesh(MeshSettings()))


def test_linear_layer_with_another_shape_raises_user_error(bert, tmp_path):
    modules = [TRANSFORMER, POOLING, module("Dense", "dense")]
    configs = {"pooling": {"pooling_mode": "mean"}, "dense": IDENTITY | {"out_features": 20}}
    folder = sentence_folder(tmp_path / "model", bert, modules, **configs)
    weights = {"linear.weight": np.zeros((20, 47), np.float32), "linear.bias": np.zeros(20, np.float32)}
    save_file(weights, folder / "dense" / "model.safetensors")
    settings = ModelSettings(path=str(folder), projection_dim=20)
    with pytest.raises(UserError, match=r"dense: weights do not match[^$]*linear.weight is \[20, 47\]"):
        open_model(settings, PromptSettings(), make_mesh(MeshSettings()))


@pytest.mark.parametrize("config", [{}, {"pooling_mode": [["cls"]]}, {"pooling_mode": {"a": 1}}, {"pooling_mode": 3}])
def test_invalid_pooling_raises_user_error(config, bert, tmp_path):
    folder = sentence_folder(tmp_path / "model", bert, [TRANSFORMER, POOLING], pooling=config)
    with pytest.raises(UserError, match=r"pooling/config\.json: no valid pooling mode"):
        open_model(ModelSettings(path=str(folder)), PromptSettings(), make_mesh(MeshSettings()))


def write_prompts(folder: Path, config: dict, limits: dict) -> None:
    """Writes the sentence-transformers files with prompts and limits."""
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    (folder / "sentence_bert_config.json").write_text(json.dumps(limits))


@pytest.mark.parametrize("prompts", [{}, {"query": "query: ", "document": "passage: "}])
def test_weighted_mean_keeps_the_prompts_of_the_folder(prompts, bert, tmp_path):
    """Its pooling includes the prompts, so it can be exported."""
    config = {"pooling_mode": "weightedmean"}
    folder = sentence_folder(tmp_path / "model", bert, [TRANSFORMER, POOLING], pooling=config)
    if prompts:
        write_prompts(folder, {"prompts": prompts}, {})
    hf_to_orbax(["--model", str(folder), "--output", str(tmp_path / "orbax")])
    orbax_to_hf(["--checkpoint", str(tmp_path / "orbax"), "--output", str(tmp_path / "export"), "--verify"])
    written = json.loads((tmp_path / "export" / "config_sentence_transformers.json").read_text())
    assert written["prompts"] == prompts
    assert json.loads((tmp_path / "export" / "1_Pooling" / "config.json").read_text())["include_prompt"] is True


@pytest.mark.parametrize("include_prompt", [False, True])
def test_conversion_keeps_prompts_and_limits(include_prompt, bert, tmp_path):
    config = {"embedding_dimension": 48, "pooling_mode": "mean", "include_prompt": include_prompt}
    modules = [TRANSFORMER, POOLING | {"idx": 1, "name": "1"}]
    folder = sentence_folder(tmp_path / "model", bert, modules, pooling=config)
    prompt_config = {"prompts": {"query": "Find: ", "document": "Text: "}, "default_prompt_name": "document"}
    limits = {"max_seq_length": 40, "do_lower_case": True}
    write_prompts(folder, prompt_config, limits)
    hf_to_orbax(["--model", str(folder), "--output", str(tmp_path / "orbax")])
    blueprint = open_checkpoint(tmp_path / "orbax").blueprint
    assert blueprint.prompt is None
    assert blueprint.sentence == SentencePrompts(**prompt_config, include_prompt=include_prompt, do_lower_case=True)
    assert blueprint.max_tokens == 40
    orbax_to_hf(["--checkpoint", str(tmp_path / "orbax"), "--output", str(tmp_path / "export"), "--verify"])
    written = json.loads((tmp_path / "export" / "config_sentence_transformers.json").read_text())
    assert {name: written[name] for name in prompt_config} == prompt_config
    assert json.loads((tmp_path / "export" / "sentence_bert_config.json").read_text()) == limits
    pooling = json.loads((tmp_path / "export" / "1_Pooling" / "config.json").read_text())
    assert pooling["include_prompt"] is include_prompt
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "export" / name).read_bytes() == (folder / name).read_bytes()
    original, exported = (SentenceTransformer(str(path), device="cpu") for path in (folder, tmp_path / "export"))
    texts = ["What is the capital of FRANCE?", "The Seine flows through Paris. " * 20]
    for encode in ("encode_query", "encode_document", "encode"):
        np.testing.assert_array_equal(getattr(exported, encode)(texts), getattr(original, encode)(texts))


@pytest.mark.parametrize(
    ("config", "limits", "message"),
    [
        ({"prompts": ["query: "]}, {}, "prompts in the sentence-transformers files"),
        ({"prompts": {"query": 3}}, {}, r"prompts\.query in the sentence-transformers files"),
        ({"default_prompt_name": "sts"}, {}, "default_prompt_name 'sts' is not one of the prompts"),
        ({}, {"do_lower_case": "yes"}, "do_lower_case in the sentence-transformers files"),
        ({}, {"max_seq_length": 0}, "max_seq_length: expected a number of at least 1, found 0"),
        ({}, {"max_seq_length": "512"}, "max_seq_length: expected a number of at least 1, found '512'"),
        ({}, {"max_seq_length": True}, "max_seq_length: expected a number of at least 1, found True"),
    ],
)
def test_invalid_prompts_and_limits_raise_user_error(config, limits, message, bert, tmp_path):
    folder = sentence_folder(tmp_path / "model", bert, [TRANSFORMER, POOLING], pooling={"pooling_mode": "mean"})
    write_prompts(folder, config, limits)
    with pytest.raises(UserError, match=message):
        hf_to_orbax(["--model", str(folder), "--output", str(tmp_path / "orbax")])
    assert not (tmp_path / "orbax").exists()


@pytest.mark.parametrize(("is_causal", "expected"), [(None, "causal"), (True, "causal"), (False, "bidirectional")])
def test_decoder_attention_defaults_to_that_of_transformers(is_causal, expected, tmp_path):
    """Folders without modules.json have no default."""
    tiny = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    attention = {} if is_causal is None else {"is_causal": is_causal}
    write_random_checkpoint(
        "youtu_embedding", tmp_path / "plain", **tiny, num_key_value_heads=4, model_type="qwen3", **attention
    )
    config = {"pooling_mode": "lasttoken"}
    folder = sentence_folder(tmp_path / "model", tmp_path / "plain", [TRANSFORMER, POOLING], pooling=config)
    assert open_folder(folder).stored_settings["attention"] == expected
    assert open_folder(tmp_path / "plain").stored_settings == ({} if is_causal is None else {"attention": expected})
