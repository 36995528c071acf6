"""Creates the quickstart model: a tiny Qwen3 with random weights and a tokenizer trained on the quickstart data.

python scripts/make_quickstart_model.py
"""

import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from codiemb_jax.checkpoints.families import get_family
from codiemb_jax.checkpoints.safetensors import named_weights, write_weights
from codiemb_jax.config import ModelSettings
from codiemb_jax.data.find import find_files
from codiemb_jax.models.decoder import Decoder

QUICKSTART = Path(__file__).parent.parent / "codiemb_jax" / "quickstart"
CONFIG = {
    "architectures": ["Qwen3Model"],
    "model_type": "qwen3",
    "vocab_size": 1500,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]


def training_texts() -> list[str]:
    """Returns all distinct texts of the training data, including instructions."""
    texts = []
    for path in find_files([QUICKSTART / "data" / "train"], "data"):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            texts += [
                part for triple in [record["query"], *record["positives"], *record["negatives"]] for part in triple
            ]
    return sorted(set(texts))


def train_tokenizer() -> Tokenizer:
    """Trains a byte-level BPE within words. Spaces separate words and are not tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    return tokenizer


def main() -> None:
    folder = QUICKSTART / "model"
    folder.mkdir(exist_ok=True)
    tokenizer = train_tokenizer()
    CONFIG["vocab_size"] = tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", "model_max_length": 1024}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | names, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    family = get_family(CONFIG)
    table = family.weights
    settings = ModelSettings(path=str(folder), compute_dtype="float32")
    model = Decoder(family.read_config(CONFIG), settings, "xla", nnx.Rngs(49))
    params = nnx.to_pure_dict(nnx.state(model))
    # Embeddings outweigh the layers, so even untrained outputs depend on the words of a text.
    params["embedding"] *= 4
    dtypes = {name: "F32" for name, _ in named_weights(params, table, "")}
    write_weights(folder, params, {}, table, "", dtypes)
    print(f"wrote {folder}: {sum(np.size(leaf) for leaf in jax.tree.leaves(params)):,} parameters")


if __name__ == "__main__":
    main()
