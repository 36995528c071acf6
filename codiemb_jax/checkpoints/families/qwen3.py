"""Qwen3: Qwen3Model in transformers, a Llama with RMSNorm on the queries and keys of each head."""

from functools import partial

from codiemb_jax.checkpoints.families.decoders import LM_EXTRAS, decoder_weights, read_decoder_config
from codiemb_jax.checkpoints.families.family import Family
from codiemb_jax.models.decoder import Decoder

DEFAULTS = {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768}
"""Defaults of transformers for keys missing in config.json."""

FAMILY = Family(
    model_type="qwen3",
    model=Decoder,
    read_config=partial(read_decoder_config, qk_norm=True, defaults=DEFAULTS),
    prefix="model.",
    weights=decoder_weights(qk_norm=True),
    passthrough=LM_EXTRAS,
    stock=lambda hf: hf,
    causal=True,
)
