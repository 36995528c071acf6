"""Llama (and SmolLM2): transformers' LlamaModel."""

from functools import partial

from codiemb_jax.models.families.family import LM_EXTRAS, Family, decoder_weights, read_decoder_config

FAMILY = Family(
    model_type="llama",
    read_config=partial(read_decoder_config, qk_norm=False),
    weights=decoder_weights(qk_norm=False),
    untrained=LM_EXTRAS,
    stock=lambda hf: hf,
)
