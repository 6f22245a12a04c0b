#!/usr/bin/env bash
# The experiment of RePO (Peng et al., NeurIPS 2025, arXiv 2410.19933) with Llama-3.2-3B, on 8 GPUs of 80 GB. The base
# model has neither supervised fine-tuning nor score models of its tokenizer, so more stages come first: `sft`, by TRL's
# command line, and `reward` and `cost`, by preference_models.py. The rest is alpaca_7b.sh with its settings and variables,
# --dry-run, and continuing after a crash.
#
#     pip install -r requirements.txt trl      # written for TRL 1.16
#     hf auth login                            # the base model's licence is accepted on its page of the Hub
#     benchmark/llama_3b.sh
#     MODEL=YOUR_SFT_MODEL PROMPT_TEMPLATE=chat benchmark/llama_3b.sh                       # without the stage `sft`
#
# With several nodes, run STAGES=sft on one of them before.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

export STAGES=${STAGES-sft reward cost repo ppo_lagrange sacpo evaluate}
export SEED=${SEED:-1} SIZE=${SIZE:-3B}
export OUT=${OUT:-runs/llama_3b-$SEED}
export GPUS=${GPUS:-8} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} RDZV_ENDPOINT=${RDZV_ENDPOINT:-}
export MODEL=${MODEL:-$OUT/sft} # anything else is taken as fine-tuned already

# Supervised fine-tuning
BASE_MODEL=${BASE_MODEL:-meta-llama/Llama-3.2-3B}
SFT_DATASET=${SFT_DATASET:-tatsu-lab/alpaca}
SFT_EPOCHS=${SFT_EPOCHS:-3}
SFT_BATCH_SIZE=${SFT_BATCH_SIZE:-128}
SFT_MICRO_BATCH_SIZE=${SFT_MICRO_BATCH_SIZE:-16}
SFT_LENGTH=${SFT_LENGTH:-512}
SFT_LAUNCH=${SFT_LAUNCH---accelerate_config fsdp2} # TRL's own configuration; sharded, since 3B with AdamW takes 51 GB
SFT_EXTRA=${SFT_EXTRA:-}

# The template must be the one of the fine-tuning. TRL takes the column `text` of tatsu-lab/alpaca as it is: instruction
# and answer in Alpaca's own words, to which it adds EOS; the loss is on the whole text, and the template in it is soon
# learnt. Safe RLHF's "BEGINNING OF CONVERSATION: ..." is a text that this model has never seen. Of Alpaca's two forms
# this is the one without an input, as PKU-SafeRLHF's prompts have none. The response begins on a line of its own, and
# the tokens before it are the same with and without it.
ALPACA=$'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n'
ALPACA+=$'### Instruction:\n{prompt}\n\n### Response:\n'
export PROMPT_TEMPLATE=${PROMPT_TEMPLATE:-$ALPACA}

# The policy learns from score models of its own tokenizer: they read the very tokens that it sampled, and the critics,
# which have to read those, can start from them. With Beaver's 7B score models instead (REWARD_MODEL, COST_MODEL,
# SCORE_TEMPLATE, and STAGES without reward and cost) responses are decoded and tokenised again, and the critics start
# from the policy, with heads that know nothing yet.
export REWARD_MODEL=${REWARD_MODEL:-$OUT/reward/model}
export COST_MODEL=${COST_MODEL:-$OUT/cost/model}
export SCORE_TEMPLATE=${SCORE_TEMPLATE:-$PROMPT_TEMPLATE}

# The evaluation asks Beaver: the same scale as in alpaca_7b.sh, by models that no policy here was trained against.
export EVAL_REWARD_MODEL=${EVAL_REWARD_MODEL:-PKU-Alignment/beaver-7b-v1.0-reward}
export EVAL_COST_MODEL=${EVAL_COST_MODEL:-PKU-Alignment/beaver-7b-v1.0-cost}
export EVAL_SCORE_TEMPLATE=${EVAL_SCORE_TEMPLATE:-'BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:'}

KNOWN="sft $KNOWN"
begin "$@"

# ======================================================================================================================
# Supervised fine-tuning, written to sft.part and renamed when it is finished
# ======================================================================================================================
if wanted sft && [[ $MODEL == "$OUT/sft" && ! -e $MODEL ]]; then
    ((NNODES == 1)) || error "the stage sft is for one node: run STAGES=sft with NNODES=1 on one of them before"
    [[ $dry_run ]] || command -v trl >/dev/null ||
        error "the stage sft calls trl: pip install trl, or set MODEL to a model that is fine-tuned already"
    resume=()
    newest=$(compgen -G "$OUT/sft.part/checkpoint-*/trainer_state.json" | sort -V | tail -n 1 || true)
    [[ -z $newest ]] || resume=(--resume_from_checkpoint "${newest%/*}")
    read -ra launcher <<<"$SFT_LAUNCH"
    read -ra more <<<"$SFT_EXTRA"
    share=$((GPUS * SFT_MICRO_BATCH_SIZE))
    run trl sft "${launcher[@]}" --num_processes "$GPUS" \
        --model_name_or_path "$BASE_MODEL" --dataset_name "$SFT_DATASET" --dataset_text_field text \
        --max_length "$SFT_LENGTH" --num_train_epochs "$SFT_EPOCHS" \
        --per_device_train_batch_size "$SFT_MICRO_BATCH_SIZE" \
        --gradient_accumulation_steps $(((SFT_BATCH_SIZE + share - 1) / share)) \
        --learning_rate 2e-5 --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0 \
        --seed "$SEED" --report_to none --save_strategy epoch --save_total_limit 1 \
        --output_dir "$OUT/sft.part" "${resume[@]}" "${more[@]}" # --warmup_steps below 1 is a share of all
    run mv "$OUT/sft.part" "$OUT/sft"
fi

STAGES=${STAGES//sft/}
[[ ! ${STAGES// /} ]] || exec "$ROOT/benchmark/alpaca_7b.sh" "$@"
