"""UTU (Youtu-Embedding): equivalent to Qwen3, under a name for which transformers needs remote code."""

from functools import partial
from typing import Any

from codiemb_jax.checkpoints.families.decoders import LM_EXTRAS, as_stock, decoder_weights, read_decoder_config
from codiemb_jax.checkpoints.families.family import Family
from codiemb_jax.models.decoder import Decoder


def as_qwen3(hf: dict[str, Any]) -> dict[str, Any]:
    """Returns the config.json of the equivalent Qwen3."""
    layers = hf["num_hidden_layers"]
    return as_stock(hf, "qwen3", "Qwen3Model") | {
        "layer_types": ["full_attention"] * layers,
        "use_sliding_window": False,
    }


FAMILY = Family(
    model_type="utu",
    model=Decoder,
    read_config=partial(read_decoder_config, qk_norm=True),
    prefix="model.",
    weights=decoder_weights(qk_norm=True),
    passthrough=LM_EXTRAS,
    stock=as_qwen3,
)
