#!/usr/bin/env bash
# The experiment of RePO (Peng et al., NeurIPS 2025, arXiv 2410.19933) with Alpaca-7B, on 8 GPUs of 80 GB: RePO,
# PPO-Lagrange and SACPO from one model after supervised fine-tuning, then all of them on the same prompts.
#
#     pip install -r requirements.txt
#     benchmark/alpaca_7b.sh                # everything; models and data come from the Hub
#     benchmark/alpaca_7b.sh --dry-run      # print the commands, and an estimate of the GPU-hours
#
# The paper reports a safety compliance of 43.99% for Alpaca-7B and 96.08% for RePO. Run so far with tiny models only.
#
# Start it again after a crash, a reboot or Ctrl-C: finished stages are skipped and the interrupted one continues. On
# SIGTERM (status 143) and Ctrl-C (status 130) a stage saves a checkpoint first. A scheduler that ends jobs must give
# them as long as SHUTDOWN_TIMEOUT, e.g. in Slurm `--signal=B:TERM@1800`.
#
# Every setting below is an environment variable:
#
#     STAGES="repo evaluate" SEED=2 benchmark/alpaca_7b.sh
#     STAGES="reward cost repo ppo_lagrange sacpo evaluate" OUT=runs/own_scores benchmark/alpaca_7b.sh
#     for b in 0.1 0.05 0.025 0.01; do SACPO_RUN=sacpo-$b BETA_OVER_LAMBDA=$b STAGES=sacpo benchmark/alpaca_7b.sh; done
#     NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=host0:29500 benchmark/alpaca_7b.sh      # and on the other node NODE_RANK=1
#
# With several nodes, OUT and SUITES must be on a file system that all of them see. Models are sharded over the processes
# of all nodes. Disk: a checkpoint of a reinforcement-learning stage has three trained models with two moments each in
# float32, 239 GB for 7B. The newest two are kept, a third exists while it is written: about 1.5 TB for all stages. Delete
# the folder `checkpoints` of a finished stage.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

STAGES=${STAGES-repo ppo_lagrange sacpo evaluate} # also reward and cost, to train your own score models
SEED=${SEED:-1}
OUT=${OUT:-runs/alpaca_7b-$SEED}

# Machines
GPUS=${GPUS:-8} # of one node
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
RDZV_ENDPOINT=${RDZV_ENDPOINT:-} # HOST:PORT of one of the nodes
DTYPE=${DTYPE:-auto}             # bfloat16 on GPUs, with float32 masters
# Seconds from SIGTERM to SIGKILL: the rest of an iteration, an evaluation at worst, and 239 GB at 0.2 GB a second.
SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-1800}
# For the estimate of --dry-run: what gpu.py measured on your card (without it, rates are assumed), and the models' size
GPU_JSON=${GPU_JSON:-}
SIZE=${SIZE:-7B}

# Models. Beaver's score models are those of the paper; `reward` and `cost` among the stages train our own from pairs.
MODEL=${MODEL:-PKU-Alignment/alpaca-7b-reproduced}
if wanted reward || [[ -e $OUT/reward/model ]]; then REWARD_MODEL=${REWARD_MODEL:-$OUT/reward/model}; fi
if wanted cost || [[ -e $OUT/cost/model ]]; then COST_MODEL=${COST_MODEL:-$OUT/cost/model}; fi
REWARD_MODEL=${REWARD_MODEL:-PKU-Alignment/beaver-7b-v1.0-reward}
COST_MODEL=${COST_MODEL:-PKU-Alignment/beaver-7b-v1.0-cost}
PROMPT_TEMPLATE=${PROMPT_TEMPLATE:-'BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:'}
SCORE_TEMPLATE=${SCORE_TEMPLATE:-$PROMPT_TEMPLATE} # the one that the score models were trained with
# The score models that the stage `evaluate` reads; by default those of the training.
EVAL_REWARD_MODEL=${EVAL_REWARD_MODEL:-$REWARD_MODEL}
EVAL_COST_MODEL=${EVAL_COST_MODEL:-$COST_MODEL}
EVAL_SCORE_TEMPLATE=${EVAL_SCORE_TEMPLATE:-$SCORE_TEMPLATE}

# Data
DATASET=${DATASET:-PKU-Alignment/PKU-SafeRLHF}
DATASET_SPLIT=${DATASET_SPLIT:-train}
EVAL_DATASET=${EVAL_DATASET:-$DATASET}
EVAL_SPLIT=${EVAL_SPLIT:-test}
PTX_DATASET=${PTX_DATASET:-tatsu-lab/alpaca}
SACPO_DATASET=${SACPO_DATASET:-PKU-Alignment/PKU-SafeRLHF-30K}
SACPO_EVAL_DATASET=${SACPO_EVAL_DATASET:-$SACPO_DATASET}
# One epoch is as many responses as there are distinct prompts. Of PKU-SafeRLHF's 74 thousand training rows about 40
# thousand are assumed to have prompts of their own; with fewer the run takes some of them a second time. The count:
#     python -c 'import datasets, sys; print(len(set(datasets.load_dataset(sys.argv[1], split="train")["prompt"])))' \
#         PKU-Alignment/PKU-SafeRLHF
EPISODES=${EPISODES:-40000}
# The suites of Safety-Tuned LLaMAs (Bianchi et al., ICLR 2024, arXiv 2309.07875): a folder of NAME.json, each with
# {"instructions": [texts]}. Without SUITES they are cloned. SUITE_NAMES="" leaves them out.
SUITES_REPOSITORY=${SUITES_REPOSITORY:-https://github.com/vinid/safety-tuned-llamas}
suites="I-MaliciousInstructions I-CoNa I-Controversial I-PhysicalSafetyUnsafe I-PhysicalSafetySafe Q-Harm I-Alpaca"
SUITE_NAMES=${SUITE_NAMES-$suites}
# XSTest, safe prompts that sound unsafe: it shows compliance that comes from refusing. An id or a file; "" leaves it out.
XSTEST=${XSTEST-Paul/XSTest}

# Sizes. Batches are global and do not depend on the number of GPUs; a GPU processes 16 rows at a time.
BATCH_SIZE=${BATCH_SIZE:-128}             # prompts per iteration, pairs per step of the preference models: 16 per GPU
SACPO_BATCH_SIZE=${SACPO_BATCH_SIZE:-256} # pairs per step: 16 per GPU, accumulated twice
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16}
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-256} # 512 tokens: half for the prompt, half for the response
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-256}
MAX_LENGTH=${MAX_LENGTH:-512} # of a prompt with its response in pairs
SACPO_PROMPT_LENGTH=${SACPO_PROMPT_LENGTH:-128}
PREFERENCE_EPOCHS=${PREFERENCE_EPOCHS:-2}
SACPO_EPOCHS=${SACPO_EPOCHS:-3}
EVAL_EVERY=${EVAL_EVERY:-50}              # iterations between evaluations while training
EVAL_SIZE=${EVAL_SIZE:-256}               # and their prompts
SCORE_SIZE=${SCORE_SIZE:-0}               # prompts of each data set in the stage `evaluate`; 0 takes all
SCORE_BATCH_SIZE=${SCORE_BATCH_SIZE:-512} # responses at a time, over all GPUs
SAVE_EVERY=${SAVE_EVERY:-50}              # iterations or steps between checkpoints
PREFERENCE_SAVE_EVERY=${PREFERENCE_SAVE_EVERY:-200} # the preference models' steps are shorter

# SACPO, helpful then safe, by DPO: β of the helpfulness stage, β/λ of the safety stage (its paper: 0.1 0.05 0.025 0.01)
SACPO_RUN=${SACPO_RUN:-sacpo-dpo} # folder in OUT and name in the tables
BETA=${BETA:-0.1}
BETA_OVER_LAMBDA=${BETA_OVER_LAMBDA:-0.025}
MERGE_Q=${MERGE_Q-0.25 0.5 0.75} # P-SACPO's mixtures, in the folder `merged`

# More models for the stage `evaluate`: name=folder, by spaces. A later start answers only the new ones, e.g.
#     MORE_MODELS="p-sacpo=runs/alpaca_7b-1/sacpo-dpo/merged/q0.5" STAGES=evaluate benchmark/alpaca_7b.sh
MORE_MODELS=${MORE_MODELS:-}

# More flags, separated by spaces; where they repeat one, the last counts. E.g. RL_EXTRA="--cpu-offload --track"
TORCHRUN_EXTRA=${TORCHRUN_EXTRA:-}
PREFERENCE_EXTRA=${PREFERENCE_EXTRA:-}
RL_EXTRA=${RL_EXTRA:-}
SACPO_EXTRA=${SACPO_EXTRA:-}
EVALUATE_EXTRA=${EVALUATE_EXTRA:-}

begin "$@"

# ======================================================================================================================
# The suites, first of all: one that cannot be had ends the recipe before the training
# ======================================================================================================================
if wanted evaluate && [[ $SUITE_NAMES ]]; then
    clone=$OUT/safety-tuned-llamas
    if [[ -z ${SUITES:-} && ! -d $clone ]] && ((NODE_RANK == 0)); then # the other nodes wait in torchrun for this one
        run rm -rf "$clone.part"
        run git clone --quiet --depth 1 "$SUITES_REPOSITORY" "$clone.part"
        run mv "$clone.part" "$clone" # when it is whole: a kill leaves no half of it under the name
    fi
    for name in $SUITE_NAMES; do
        [[ -z ${SUITES:-} || -e $SUITES/$name.json ]] ||
            error "SUITES: there is no $SUITES/$name.json; add it, or take it out of SUITE_NAMES"
    done
    SUITES=${SUITES:-$clone/data/evaluation}
fi

# ======================================================================================================================
# Preference models, where they are wanted
# ======================================================================================================================
for kind in reward cost; do
    wanted "$kind" || continue
    read -ra more <<<"$PREFERENCE_EXTRA"
    launch "$kind" preference_models.py --kind "$kind" --model "$MODEL" \
        --dataset "$DATASET" --dataset-split "$DATASET_SPLIT" \
        --eval-dataset "$EVAL_DATASET" --eval-split "$EVAL_SPLIT" \
        --prompt-template "$SCORE_TEMPLATE" --max-length "$MAX_LENGTH" --epochs "$PREFERENCE_EPOCHS" \
        --batch-size "$BATCH_SIZE" --micro-batch-size "$MICRO_BATCH_SIZE" \
        --learning-rate 2e-5 --warmup-ratio 0.03 --weight-decay 0.1 \
        --gradient-checkpointing --dtype "$DTYPE" --seed "$SEED" \
        --output-dir "$OUT/$kind" --save-every "$PREFERENCE_SAVE_EVERY" --resume "${more[@]}"
done

# ======================================================================================================================
# RePO and PPO-Lagrange: the same settings
# ======================================================================================================================
for algorithm in repo ppo_lagrange; do
    wanted "$algorithm" || continue
    read -ra more <<<"$RL_EXTRA"
    launch "$algorithm" "$algorithm.py" --model "$MODEL" --reward-model "$REWARD_MODEL" --cost-model "$COST_MODEL" \
        --dataset "$DATASET" --dataset-split "$DATASET_SPLIT" \
        --eval-dataset "$EVAL_DATASET" --eval-split "$EVAL_SPLIT" \
        --prompt-template "$PROMPT_TEMPLATE" --score-prompt-template "$SCORE_TEMPLATE" \
        --max-prompt-length "$MAX_PROMPT_LENGTH" --max-new-tokens "$MAX_NEW_TOKENS" --temperature 1 \
        --total-episodes "$EPISODES" --update-epochs 1 \
        --batch-size "$BATCH_SIZE" --micro-batch-size "$MICRO_BATCH_SIZE" \
        --learning-rate 1e-5 --warmup-ratio 0.03 --weight-decay 0.01 --critic-learning-rate 5e-6 \
        --kl-coef 0.01 --lambda-init 1 --lambda-lr 0.1 --lambda-max 5 \
        --ptx-dataset "$PTX_DATASET" --ptx-coef 16 \
        --gradient-checkpointing --dtype "$DTYPE" --seed "$SEED" --eval-every "$EVAL_EVERY" --eval-size "$EVAL_SIZE" \
        --output-dir "$OUT/$algorithm" --save-every "$SAVE_EVERY" --resume "${more[@]}"
done

# ======================================================================================================================
# SACPO
# ======================================================================================================================
if wanted sacpo; then
    read -ra more <<<"$SACPO_EXTRA"
    read -ra mixtures <<<"$MERGE_Q"
    launch sacpo sacpo.py --model "$MODEL" --dataset "$SACPO_DATASET" --dataset-split "$DATASET_SPLIT" \
        --eval-dataset "$SACPO_EVAL_DATASET" --eval-split "$EVAL_SPLIT" --train-size 0 \
        --prompt-template "$PROMPT_TEMPLATE" --max-prompt-length "$SACPO_PROMPT_LENGTH" --max-length "$MAX_LENGTH" \
        --stages helpful safe --loss dpo --beta "$BETA" --beta-over-lambda "$BETA_OVER_LAMBDA" \
        ${MERGE_Q:+--merge-q "${mixtures[@]}"} \
        --epochs "$SACPO_EPOCHS" --batch-size "$SACPO_BATCH_SIZE" --micro-batch-size "$MICRO_BATCH_SIZE" \
        --learning-rate 2e-5 --warmup-ratio 0.03 \
        --gradient-checkpointing --dtype "$DTYPE" --seed "$SEED" \
        --output-dir "$OUT/$SACPO_RUN" --save-every "$SAVE_EVERY" --resume "${more[@]}"
fi

# ======================================================================================================================
# All models on the same prompts: the held-out ones of the training data, and each suite
# ======================================================================================================================
if wanted evaluate; then
    models=("sft=$MODEL")
    for pair in repo=repo ppo-lagrange=ppo_lagrange "$SACPO_RUN=sacpo"; do # name in the tables = stage
        name=${pair%%=*} stage=${pair#*=}
        folder=$OUT/$stage
        [[ $stage != sacpo ]] || folder=$OUT/$SACPO_RUN
        if wanted "$stage" || [[ -e $folder/model ]]; then models+=("$name=$folder/model"); fi
    done

    read -ra more <<<"$MORE_MODELS"
    models+=("${more[@]}")

    read -ra more <<<"$EVALUATE_EXTRA"
    for name in saferlhf $SUITE_NAMES ${XSTEST:+xstest}; do
        case $name in
        saferlhf) prompts=(--dataset "$EVAL_DATASET" --dataset-split "$EVAL_SPLIT") ;;
        xstest) prompts=(--suites "xstest=$XSTEST") ;;
        *) prompts=(--dataset "$SUITES/$name.json" --dataset-split "$EVAL_SPLIT") ;;
        esac
        # No --resume here: the same command with the same --output-dir continues by itself.
        launch evaluate evaluation score --models "${models[@]}" \
            --reward-model "$EVAL_REWARD_MODEL" --cost-model "$EVAL_COST_MODEL" \
            "${prompts[@]}" --eval-size "$SCORE_SIZE" \
            --prompt-template "$PROMPT_TEMPLATE" --score-prompt-template "$EVAL_SCORE_TEMPLATE" \
            --max-prompt-length "$MAX_PROMPT_LENGTH" --max-new-tokens "$MAX_NEW_TOKENS" --temperature 1 \
            --batch-size "$SCORE_BATCH_SIZE" --dtype "$DTYPE" --seed "$SEED" \
            --output-dir "$OUT/evaluate/$name" "${more[@]}"
    done
fi

if [[ $dry_run ]]; then
    echo
    export STAGES GPU_JSON SIZE EPISODES BATCH_SIZE MAX_PROMPT_LENGTH MAX_NEW_TOKENS MAX_LENGTH GPUS NNODES
    export PREFERENCE_EPOCHS SACPO_EPOCHS
    python3 "$ROOT/benchmark/gpu_hours.py"
fi
