"""Llama (and SmolLM2): LlamaModel in transformers."""

from codiemb_jax.checkpoints.families.decoders import LM_EXTRAS, decoder_weights, read_decoder_config
from codiemb_jax.checkpoints.families.family import Family
from codiemb_jax.models.decoder import Decoder

FAMILY = Family(
    model_type="llama",
    model=Decoder,
    read_config=read_decoder_config,
    prefix="model.",
    weights=decoder_weights(qk_norm=False),
    passthrough=LM_EXTRAS,
    stock=lambda hf: hf,
    causal=True,
)
