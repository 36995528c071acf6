"""Model families: how each one's Hugging Face config and weight names map to ours.

The family is what `model_type` in config.json says, never guessed from a path.
"""

from typing import Any

from codiemb_jax.checkpoints.families import bert, granite, llama, minicpm, qwen3, utu, xlm_roberta
from codiemb_jax.checkpoints.families.family import Family
from codiemb_jax.errors import UserError

FAMILIES = {
    module.FAMILY.model_type: module.FAMILY for module in (llama, qwen3, utu, minicpm, granite, bert, xlm_roberta)
}


def family_of(hf: dict[str, Any]) -> Family:
    """The family of a config.json.  UserError if there is none for it."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"config.json: model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
