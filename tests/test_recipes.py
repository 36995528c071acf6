"""Tests of the configurations of the four models: original hyperparameters, and training from model to export."""

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerFast

import codiemb_jax
from codiemb_jax.checkpoints.families import get_family
from codiemb_jax.config_file import load_settings
from codiemb_jax.train import main
from codiemb_jax.training.run import check_batch_sizes
from scripts.make_random_checkpoint import write_random_checkpoint

REPOSITORY = Path(__file__).parent.parent
PACKAGE = Path(codiemb_jax.__file__).parent
TRAIN = PACKAGE / "quickstart" / "data" / "train"
DECODERS = {
    "learning_rate": 4e-5, "epochs": 4, "ir": 8 * 28, "sts": 8 * 32, "tokens": 1024, "compute_dtype": "bfloat16",
    "pooling": "mean", "passage": "",
}  # fmt: skip
ENCODERS = {
    "learning_rate": 5e-5, "epochs": 5, "ir": 8 * 64, "sts": 8 * 32, "tokens": 512, "compute_dtype": "float32",
}  # fmt: skip
ORIGINAL = {
    "youtu_embedding": DECODERS | {"begin": "", "end": ""},
    "minicpm_embedding": DECODERS | {"begin": "<s>", "end": "</s>"},
    "bge_large_zh": ENCODERS | {"begin": "[CLS]", "end": "[SEP]", "passage": "Passage: ", "pooling": "cls"},
    "multilingual_e5_large_instruct": ENCODERS | {"begin": "<s>", "end": "</s>", "passage": "", "pooling": "mean"},
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_settings_match_original(name):
    settings = load_settings(REPOSITORY / "configs" / f"{name}.yaml")
    model, data, optimizer, objective = settings.model, settings.data, settings.optimizer, settings.objective
    assert ORIGINAL[name] == {
        "learning_rate": optimizer.learning_rate, "epochs": optimizer.epochs, "ir": data.ir_global_batch_size,
        "sts": data.sts_global_batch_size, "tokens": data.query_max_tokens, "compute_dtype": model.compute_dtype,
        "pooling": model.pooling, "passage": settings.prompt.passage, "begin": settings.prompt.begin,
        "end": settings.prompt.end,
    }  # fmt: skip
    assert data.passage_max_tokens == data.query_max_tokens
    assert settings.prompt.query == "Instruction: {instruction} Query: "
    assert (optimizer.schedule, optimizer.warmup_ratio, optimizer.weight_decay) == ("linear", 0.03, 0.0)
    assert (optimizer.betas, optimizer.eps, optimizer.clip_norm) == ((0.9, 0.999), 1e-8, None)
    assert (data.positives_per_query, data.negatives_per_query, data.sampler) == (2, 4, "dynamic")
    assert (objective.temperature, objective.mid_info_nce_weight, objective.mid_info_nce_threshold) == (0.02, 1.0, 1.0)
    assert (objective.ir_pool_size, objective.sts_list_size) == (None, 32)  # all devices; one device
    assert (settings.seed, model.attention, model.normalize, model.remat) == (49, "bidirectional", True, "dots")
    for devices in (1, 2, 4, 8):
        check_batch_sizes(settings, devices)
    hf = json.loads((PACKAGE / "shapes" / f"{name}.json").read_text())
    assert get_family(hf).read_config(hf).max_positions >= data.query_max_tokens


TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.1,
}  # fmt: skip
TINY_BY_MODEL = {
    "youtu_embedding": {"num_key_value_heads": 4, "head_dim": 16},
    "minicpm_embedding": {"num_key_value_heads": 4},
    "bge_large_zh": {},
    "multilingual_e5_large_instruct": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ORIGINAL)
def test_training_and_export_of_tiny_model(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "cache"))
    folder, output = tmp_path / "model", tmp_path / "run"
    write_random_checkpoint(name, folder, **TINY | TINY_BY_MODEL[name], vocab_size=2000)
    flags = {
        "output_dir": output, "model.path": folder, "data.ir": TRAIN / "ir", "data.sts": TRAIN / "sts",
        "data.ir_global_batch_size": 8, "data.sts_global_batch_size": 32, "encode_chunks": 1, "optimizer.max_steps": 4,
        "data.query_max_tokens": 96, "data.passage_max_tokens": 96, "optimizer.warmup_ratio": 0,
    }  # fmt: skip
    arguments = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    main(["--config", str(REPOSITORY / "configs" / f"{name}.yaml"), *arguments])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    model = SentenceTransformer(str(output / "export"), device="cpu", model_kwargs={"dtype": "float32"})
    expected = ORIGINAL[name]
    assert model.prompts["document"] == expected["begin"] + expected["passage"]
    queries, documents = model.encode_query(["how do plants make sugar"]), model.encode_document(["a red bicycle"])
    assert queries.shape == documents.shape == (1, 64)
    assert model.max_seq_length == 96
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "export")
    ids = tokenizer(model.prompts["query"] + "how do plants make sugar")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens([ids[0], ids[-1]])
    assert [tokens[0] == expected["begin"], tokens[1] == expected["end"]] == [bool(expected["begin"])] * 2
