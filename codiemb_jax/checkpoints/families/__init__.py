"""Model families: mappings from Hugging Face configs and weight names to those of this project.

`model_type` in config.json determines the family.
"""

from typing import Any

from codiemb_jax.checkpoints.families import bert, granite, llama, minicpm, qwen3, utu, xlm_roberta
from codiemb_jax.checkpoints.families.family import Family
from codiemb_jax.errors import UserError

FAMILIES = {
    module.FAMILY.model_type: module.FAMILY for module in (llama, qwen3, utu, minicpm, granite, bert, xlm_roberta)
}


def get_family(hf: dict[str, Any]) -> Family:
    """Returns the family of a config.json.

    Raises:
      UserError: If its `model_type` is not supported.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"config.json: model_type {model_type!r} is not supported; expected one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
