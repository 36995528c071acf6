"""BERT (bge-large-zh-v1.5, all-MiniLM): BertModel in transformers."""

from functools import partial

from codiemb_jax.checkpoints.families.encoders import EXTRAS, encoder_weights, read_encoder_config
from codiemb_jax.checkpoints.families.family import Family
from codiemb_jax.models.encoder import Encoder

FAMILY = Family(
    model_type="bert",
    model=Encoder,
    read_config=partial(read_encoder_config, first_position=0),
    prefix="bert.",
    weights=encoder_weights(),
    passthrough=(*EXTRAS, "cls.*"),
    stock=lambda hf: hf,
)
