"""The peers' side of benchmark/throughput.py: TRL's PPO, RewardTrainer and DPOTrainer on the workload that it wrote.

It runs in an environment of its own, since the last release of TRL with PPO is 1.9.0:

    python -m venv peer && peer/bin/pip install torch==2.13.0 trl==1.9.0
    peer/bin/python benchmark/trl_peers.py ppo FOLDER --steps 12

FOLDER: what `throughput.py` made: policy/, reward/, prompts.parquet, pairs.parquet. The last line it prints is a JSON
object: the seconds of every step and of the whole of `train()`.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Clock(TrainerCallback):
    """The time at which each optimizer step (PPO: each iteration) ended."""

    def __init__(self):
        self.times = []

    def on_step_end(self, *_, **__):
        self.times.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=["ppo", "reward", "dpo"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=64, help="texts of one forward and backward pass")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--weights", choices=["float32", "bfloat16"], default="float32", help="type the weights have")
    parser.add_argument("--tuned", action="store_true", help="reward, dpo: without their default of recomputing")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.folder / "policy", padding_side="left")
    settings = dict(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.batch_size // args.micro_batch_size,
        learning_rate=1e-5,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )
    if args.tuned:
        settings["gradient_checkpointing"] = False
    dtype = getattr(torch, args.weights)
    language_model = [AutoModelForCausalLM.from_pretrained(args.folder / "policy", dtype=dtype) for _ in range(2)]
    scores = [AutoModelForSequenceClassification.from_pretrained(args.folder / "reward", dtype=dtype) for _ in range(2)]
    clock = Clock()
    if args.trainer == "ppo":
        texts = Dataset.from_parquet(str(args.folder / "prompts.parquet"))["prompt"][:]
        prompts = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})
        config = PPOConfig(
            num_mini_batches=1,
            num_ppo_epochs=1,
            total_episodes=args.batch_size * args.steps,
            response_length=args.new_tokens,
            local_rollout_forward_batch_size=args.micro_batch_size,
            num_sample_generations=0,
            bf16=False,
            gradient_checkpointing=False,
            **settings,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=language_model[0],
            ref_model=language_model[1],
            reward_model=scores[0],
            value_model=scores[1],
            train_dataset=prompts,
            eval_dataset=prompts.select(range(args.batch_size)),
            callbacks=[clock],
        )
    else:
        rows = Dataset.from_parquet(str(args.folder / "pairs.parquet"))
        better = rows["better_response_id"][:]
        pairs = {
            "prompt": rows["prompt"][:],
            "chosen": [" " + row[f"response_{best}"] for row, best in zip(rows, better, strict=True)],
            "rejected": [" " + row[f"response_{1 - best}"] for row, best in zip(rows, better, strict=True)],
        }
        pairs = Dataset.from_dict(pairs)
        config, trainer = {"reward": (RewardConfig, RewardTrainer), "dpo": (DPOConfig, DPOTrainer)}[args.trainer]
        models = {"model": scores[0]} if args.trainer == "reward" else {"model": language_model[0]}
        if args.trainer == "dpo":
            models["ref_model"] = language_model[1]
        trainer = trainer(
            args=config(max_steps=args.steps, max_length=512, **settings),
            processing_class=tokenizer,
            train_dataset=pairs,
            callbacks=[clock],
            **models,
        )
    start = time.perf_counter()
    trainer.train()
    ends = [start, *clock.times]
    steps = [after - before for before, after in itertools.pairwise(ends)]
    print(json.dumps({"steps": steps, "total": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
