"""UTU (Youtu-Embedding): the function of Qwen3 under its own name, which needs remote code elsewhere."""

from functools import partial
from typing import Any

from codiemb_jax.models.families.family import LM_EXTRAS, Family, check_config, decoder_weights, read_decoder_config


def as_qwen3(hf: dict[str, Any]) -> dict[str, Any]:
    """The same model as transformers' stock Qwen3, free of remote code."""
    checked = check_config(hf)
    # Named in full, for where config.json is silent Qwen3 has other defaults than ours.
    named = ("head_dim", "num_key_value_heads", "max_position_embeddings")
    return {
        **{name: value for name, value in hf.items() if name != "auto_map"},
        **{name: getattr(checked, name) for name in named},
        "model_type": "qwen3",
        "architectures": ["Qwen3Model"],
        "layer_types": ["full_attention"] * hf["num_hidden_layers"],
        "use_sliding_window": False,
    }


FAMILY = Family(
    model_type="utu",
    read_config=partial(read_decoder_config, qk_norm=True),
    weights=decoder_weights(qk_norm=True),
    untrained=LM_EXTRAS,
    stock=as_qwen3,
)
