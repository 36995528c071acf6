"""MiniCPM (MiniCPM-Embedding): a Llama with scaled embeddings and residual branches; Granite in transformers."""

import math
from collections.abc import Mapping
from typing import Any

from codiemb_jax.checkpoints.families.decoders import (
    LM_EXTRAS,
    HFDecoder,
    as_stock,
    decoder_weights,
    read_decoder_config,
)
from codiemb_jax.checkpoints.families.family import Family, check_config
from codiemb_jax.config import PositiveFloat
from codiemb_jax.models.decoder import Decoder, DecoderConfig


class HFMiniCPM(HFDecoder):
    scale_emb: PositiveFloat = 1.0
    scale_depth: PositiveFloat = 1.0


def _scales(hf: Mapping[str, Any]) -> tuple[float, float]:
    """Returns the scales of the embeddings and of the residual branches."""
    checked = check_config(HFMiniCPM, hf)
    return checked.scale_emb, checked.scale_depth / math.sqrt(checked.num_hidden_layers)


def _read_config(hf: Mapping[str, Any]) -> DecoderConfig:
    embedding, residual = _scales(hf)
    return read_decoder_config(hf, embedding_scale=embedding, residual_scale=residual)


def as_granite(hf: dict[str, Any]) -> dict[str, Any]:
    """Returns the config.json of the equivalent Granite."""
    replaced = ("scale_emb", "scale_depth", "dim_model_base")
    stock = as_stock({name: value for name, value in hf.items() if name not in replaced}, "granite", "GraniteModel")
    embedding, residual = _scales(hf)
    return stock | {
        "embedding_multiplier": embedding,
        "residual_multiplier": residual,
        "attention_multiplier": stock["head_dim"] ** -0.5,
        "logits_scaling": 1.0,
    }


FAMILY = Family(
    model_type="minicpm",
    model=Decoder,
    read_config=_read_config,
    prefix="model.",
    weights=decoder_weights(qk_norm=False),
    passthrough=LM_EXTRAS,
    stock=as_granite,
)
