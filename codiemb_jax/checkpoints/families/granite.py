"""Granite: equivalent to MiniCPM and supported by transformers, so MiniCPM is exported as Granite."""

import math
from collections.abc import Mapping
from typing import Any

from codiemb_jax.checkpoints.families.decoders import LM_EXTRAS, HFDecoder, decoder_weights, read_decoder_config
from codiemb_jax.checkpoints.families.family import Family, check_config
from codiemb_jax.config import PositiveFloat
from codiemb_jax.errors import UserError
from codiemb_jax.models.decoder import Decoder, DecoderConfig


class HFGranite(HFDecoder):
    embedding_multiplier: PositiveFloat = 1.0
    residual_multiplier: PositiveFloat = 1.0
    attention_multiplier: PositiveFloat = 1.0


def _read_config(hf: Mapping[str, Any]) -> DecoderConfig:
    checked = check_config(HFGranite, hf)
    assert checked.head_dim  # set by the validator
    expected = checked.head_dim**-0.5
    if not math.isclose(checked.attention_multiplier, expected, rel_tol=1e-6):
        raise UserError(
            f"config.json: attention_multiplier {checked.attention_multiplier} is not supported; expected "
            f"head_dim ** -0.5 = {expected}"
        )
    return read_decoder_config(
        hf, embedding_scale=checked.embedding_multiplier, residual_scale=checked.residual_multiplier
    )


FAMILY = Family(
    model_type="granite",
    model=Decoder,
    read_config=_read_config,
    prefix="model.",
    weights=decoder_weights(qk_norm=False),
    passthrough=LM_EXTRAS,
    stock=lambda hf: hf,
    causal=True,
)
