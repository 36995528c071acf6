"""BERT (bge-large-zh-v1.5, all-MiniLM): transformers' BertModel."""

from functools import partial

from codiemb_jax.models.encoder import Encoder
from codiemb_jax.models.families.encoders import EXTRAS, encoder_weights, read_encoder_config
from codiemb_jax.models.families.family import Family

FAMILY = Family(
    model_type="bert",
    model=Encoder,
    read_config=partial(read_encoder_config, first_position=0),
    prefix="bert.",
    weights=encoder_weights(),
    untrained=(*EXTRAS, "cls.*"),
    stock=lambda hf: hf,
)
