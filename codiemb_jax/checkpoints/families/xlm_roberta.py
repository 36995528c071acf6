"""XLM-RoBERTa (multilingual-e5): XLMRobertaModel in transformers, a BERT with positions after the padding id."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from codiemb_jax.checkpoints.families.encoders import EXTRAS, HFEncoder, encoder_weights, read_encoder_config
from codiemb_jax.checkpoints.families.family import Family, check_config
from codiemb_jax.errors import UserError
from codiemb_jax.models.encoder import Encoder, EncoderConfig


class HFXLMRoberta(HFEncoder):
    pad_token_id: Annotated[int, Field(strict=True, ge=0)] = 1


def _read_config(hf: Mapping[str, Any]) -> EncoderConfig:
    config = read_encoder_config(hf, first_position=check_config(HFXLMRoberta, hf).pad_token_id + 1)
    if config.first_position > config.vocab_size:
        raise UserError(
            f"config.json: pad_token_id {config.first_position - 1} is outside the vocabulary of "
            f"{config.vocab_size} tokens (vocab_size)"
        )
    if config.max_positions < 1:
        raise UserError(
            f"config.json: max_position_embeddings {config.num_position_embeddings} leaves no position "
            f"after pad_token_id {config.first_position - 1}"
        )
    return config


FAMILY = Family(
    model_type="xlm-roberta",
    model=Encoder,
    read_config=_read_config,
    prefix="roberta.",
    weights=encoder_weights(),
    passthrough=(*EXTRAS, "lm_head.*"),
    stock=lambda hf: hf,
)
