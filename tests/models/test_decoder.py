"""Tests the decoder against transformers with weights written by transformers."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import GraniteConfig, GraniteModel, LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

import codiemb_jax
from codiemb_jax.batch import TokenRows
from codiemb_jax.checkpoints.model import open_model
from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.models.embed import embed, embed_with_middle
from codiemb_jax.models.pooling import l2_normalize
from codiemb_jax.sharding import make_mesh
from tests.models.parity import as_rows, assert_same_hidden_states, load_reference, open_folder, random_tokens

TINY = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
QUICKSTART = Path(codiemb_jax.__file__).parent / "quickstart"


def qwen3() -> Qwen3Model:
    return Qwen3Model(Qwen3Config(**TINY, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1.6e6}))


def llama(rope: dict) -> LlamaModel:
    return LlamaModel(LlamaConfig(**TINY, rope_parameters=rope))


def granite() -> GraniteModel:
    """Scales embeddings and residuals as MiniCPM does."""
    scales = {"embedding_multiplier": 12.0, "residual_multiplier": 1.4 / 3**0.5, "attention_multiplier": 12**-0.5}
    tiny = TINY | {"num_key_value_heads": 4, "initializer_range": 0.05}
    return GraniteModel(
        GraniteConfig(**tiny, **scales, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    )


MODELS = {
    "qwen3": qwen3,
    "llama": lambda: llama({"rope_type": "default", "rope_theta": 10000.0}),
    "llama-llama3": lambda: llama(LLAMA3),
    "granite": granite,
    "llama-linear": lambda: llama({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
}


def assert_same(folder: Path, attention: str, *, relative: bool = False, text: str | None = None) -> None:
    """Compares hidden states for prefixes of `text`, or for random tokens if it is None."""
    reference = load_reference(folder)
    reference.config.is_causal = attention == "causal"
    model = open_folder(folder, attention)
    tokens, mask = random_tokens(model.config.vocab_size)
    if text is not None:
        ids = model.blueprint.tokenizer()(text, add_special_tokens=False)["input_ids"]
        tokens = np.where(mask, np.array(ids[: mask.shape[1]]), 0)
        tokens, mask = tokens[:2], mask[:2]
    assert_same_hidden_states(model, reference, tokens, mask, relative=relative)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_match_transformers(name, attention, tmp_path, tokenizer_files):
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(tmp_path)
    tokenizer_files(tmp_path)
    assert_same(tmp_path, attention)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_minicpm_matches_granite_of_transformers(attention, tmp_path, tokenizer_files):
    torch.manual_seed(0)
    granite().save_pretrained(tmp_path / "granite")
    stock = json.loads((tmp_path / "granite" / "config.json").read_text())
    granite_keys = (
        "embedding_multiplier",
        "residual_multiplier",
        "attention_multiplier",
        "logits_scaling",
        "rope_parameters",
    )
    minicpm = {name: value for name, value in stock.items() if name not in granite_keys} | {
        "model_type": "minicpm", "architectures": ["MiniCPMModel"], "scale_emb": 12, "scale_depth": 1.4,
        "dim_model_base": 256, "rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float32",
    }  # fmt: skip
    shutil.copytree(tmp_path / "granite", tmp_path / "minicpm")
    (tmp_path / "minicpm" / "config.json").write_text(json.dumps(minicpm))
    tokenizer_files(tmp_path / "minicpm")
    reference = load_reference(tmp_path / "granite")
    reference.config.is_causal = attention == "causal"
    model = open_folder(tmp_path / "minicpm", attention)
    assert_same_hidden_states(model, reference, *random_tokens(300))
    exported = model.family.stock(minicpm)
    assert exported["model_type"] == "granite"
    for name in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"):
        assert exported[name] == pytest.approx(stock[name], rel=1e-15)
    assert not {"scale_emb", "scale_depth", "dim_model_base"} & set(exported)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_smollm2_hidden_states_match_transformers(attention, smollm2):
    # Some states of SmolLM2 are about 900, where adjacent float32 numbers differ by 6e-5. There, a single layer in
    # float32 deviates from float64 by 1.9e-4 in transformers and by 3.4e-4 here. The text is real because random tokens
    # amplify rounding errors about 60 times.
    text = (QUICKSTART / "data" / "train" / "ir" / "encyclopedia.jsonl").read_text(encoding="utf-8")
    assert_same(smollm2, attention, relative=True, text=text)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_packed_and_padded_texts_have_equal_embeddings(attention, tmp_path, tokenizer_files):
    torch.manual_seed(1)
    qwen3().save_pretrained(tmp_path)
    tokenizer_files(tmp_path)
    pretrained = open_folder(tmp_path, attention)
    random = np.random.default_rng(1)
    lengths = [5, 9, 3, 11]
    texts = [random.integers(3, 300, length) for length in lengths]
    padded, packed = (
        TokenRows(*(np.zeros(shape, np.int32) for _ in TokenRows._fields)) for shape in ((4, 12), (2, 16))
    )

    def put(rows: TokenRows, row: int, start: int, segment: int, text: np.ndarray) -> None:
        index = (row, slice(start, start + text.size))
        rows.tokens[index], rows.positions[index], rows.segment_ids[index] = text, np.arange(text.size), segment
        rows.pooling_mask[row, start + 1 : start + text.size] = 1  # the first token is the prompt

    for i, text in enumerate(texts):
        put(padded, i, 0, 1, text)
    put(packed, 0, 0, 1, texts[0])
    put(packed, 0, 5, 2, texts[1])
    put(packed, 1, 0, 1, texts[2])
    put(packed, 1, 3, 2, texts[3])
    model = nnx.merge(pretrained.graph, pretrained.load())
    for actual, expected in zip(
        embed_with_middle(model, packed, slots=2), embed_with_middle(model, padded), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=2e-6)
    np.testing.assert_array_equal(embed(model, padded), embed_with_middle(model, padded)[0])


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_remat_does_not_change_gradients(remat, tmp_path, tokenizer_files):
    torch.manual_seed(2)
    qwen3().save_pretrained(tmp_path)
    tokenizer_files(tmp_path)
    tokens, mask = random_tokens(300)
    rows = as_rows(tokens[1:3, :140], mask[1:3, :140])

    def gradient(remat: str):
        settings = ModelSettings(path=str(tmp_path), compute_dtype="float32", remat=remat)
        pretrained = open_model(settings, PromptSettings(), make_mesh(MeshSettings()))

        def loss(params):
            return jnp.sum(embed(nnx.merge(pretrained.graph, params), rows)[:, :5])

        return jax.grad(loss)(pretrained.load())

    for actual, expected in zip(jax.tree.leaves(gradient(remat)), jax.tree.leaves(gradient("none")), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_bfloat16_embeddings_are_close_to_float32(tmp_path, tokenizer_files):
    torch.manual_seed(3)
    qwen3().save_pretrained(tmp_path)
    tokenizer_files(tmp_path)
    tokens, mask = random_tokens(300)
    embeddings = {}
    for dtype in ("float32", "bfloat16"):
        settings = ModelSettings(path=str(tmp_path), compute_dtype=dtype)
        pretrained = open_model(settings, PromptSettings(), make_mesh(MeshSettings()))
        model = nnx.merge(pretrained.graph, pretrained.load())
        embeddings[dtype] = np.asarray(l2_normalize(embed(model, as_rows(tokens, mask))))
        assert embeddings[dtype].dtype == np.float32
    cosine = np.sum(embeddings["float32"] * embeddings["bfloat16"], axis=1)
    assert cosine.min() > 0.995
    assert cosine.min() < 1 - 1e-7  # the model did compute in bfloat16


def test_embedding_gradients_accumulate_in_float32(tmp_path, tokenizer_files):
    torch.manual_seed(4)
    qwen3().save_pretrained(tmp_path)
    tokenizer_files(tmp_path)
    tokens = np.full((4, 400), 7)
    gradients = {}
    for dtype in ("float32", "bfloat16"):
        settings = ModelSettings(path=str(tmp_path), compute_dtype=dtype)
        pretrained = open_model(settings, PromptSettings(), make_mesh(MeshSettings()))
        rows = as_rows(tokens, np.ones_like(tokens))

        def loss(params, pretrained=pretrained, rows=rows):
            hidden, _ = nnx.merge(pretrained.graph, params)(rows, 0, lambda _: ())
            return jnp.sum(hidden[..., :5].astype(jnp.float32))

        gradients[dtype] = np.asarray(jax.jit(jax.grad(loss))(pretrained.load())["embedding"][7])
    # In bfloat16, a sum of equal terms stops growing after about 256 of the 1600 terms.
    np.testing.assert_allclose(
        gradients["bfloat16"], gradients["float32"], rtol=0.1, atol=0.03 * np.abs(gradients["float32"]).max()
    )
