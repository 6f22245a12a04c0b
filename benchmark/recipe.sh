# shellcheck shell=bash
# What the recipes share; they read it with `source`. It has --dry-run, and stages that can be stopped and continued.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
KNOWN="reward cost repo ppo_lagrange sacpo evaluate"
dry_run="" child="" stopped="" early=""

error() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

wanted() { # whether a stage is among STAGES
    [[ " $STAGES " == *" $1 "* ]]
}

# Print a command as the shell would read it, in lines that break before a flag.
show() {
    local word line=""
    for word in "$@"; do
        if [[ $word == --* ]] && ((${#line} > 80)); then
            printf '%s \\\n' "$line"
            line="   "
        fi
        [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
        line+=${line:+ }$word
    done
    printf '%s\n' "$line"
}

# Run a command, or only print it. A stage gets a session of its own, out of reach of the terminal's Ctrl-C, and hears
# only the one SIGTERM that `stop` sends it: that makes it save.
run() {
    if [[ $dry_run ]]; then
        show "$@"
        return
    fi
    show "$@" >&2
    local status=0
    child=starting
    setsid "$@" &
    child=$!
    [[ ! $early ]] || kill -TERM "$child" 2>/dev/null || true
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` at once, the stage when it has saved
        status=0
        wait "$child" || status=$?
    done
    child=""
    [[ ! $stopped ]] || exit "$stopped"
    if ((status)); then
        printf 'stopped: %s ended with status %s; start the recipe again to continue\n' "$1" "$status" >&2
        exit "$status"
    fi
}

# End this script with a status (143 for SIGTERM, 130 for Ctrl-C, as the stages themselves do) when the stage has saved.
stop() {
    [[ ! $stopped ]] || return 0 # a second signal would cut off the saving
    stopped=$1
    [[ $child ]] || exit "$stopped"
    echo "stopping: the stage saves what it has, for up to SHUTDOWN_TIMEOUT seconds" >&2
    if [[ $child == starting ]]; then # its number is not known yet; `run` passes the signal on
        early=1
    else
        kill -TERM "$child" 2>/dev/null || true
    fi
}

# Start one of the scripts, or the package evaluation, on all GPUs: launch STAGE SCRIPT ARGUMENTS
launch() {
    local stage=$1 program=("$ROOT/$2") nodes=(--standalone) more
    [[ $2 == *.py ]] || program=(-m "$2")
    export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} # so that `-m evaluation` works from any folder
    shift 2
    if ((NNODES > 1)); then # the rendezvous has the stage's name: a node that is a stage behind joins no other run
        nodes=(--nnodes "$NNODES" --node_rank "$NODE_RANK")
        nodes+=(--rdzv_backend c10d --rdzv_endpoint "$RDZV_ENDPOINT" --rdzv_id "$stage")
    fi
    read -ra more <<<"$TORCHRUN_EXTRA"
    run torchrun "${nodes[@]}" --nproc_per_node "$GPUS" --shutdown-timeout "$SHUTDOWN_TIMEOUT" \
        "${more[@]}" "${program[@]}" "$@"
}

# Read the command line and look at what the environment says: begin "$@"
begin() {
    local word
    for word in "$@"; do
        [[ $word == --dry-run ]] || error "there is no flag $word, only --dry-run; settings are environment variables"
        dry_run=1
    done
    [[ ${STAGES// /} ]] || error "STAGES is empty; the stages are $KNOWN"
    for word in $STAGES; do
        [[ " $KNOWN " == *" $word "* ]] || error "STAGES: there is no stage $word; the stages are $KNOWN"
    done
    for word in GPUS NNODES NODE_RANK; do
        [[ ${!word} =~ ^[0-9]+$ ]] || error "$word is '${!word}'; it must be a number"
    done
    ((NNODES == 1)) || [[ $RDZV_ENDPOINT ]] ||
        error "NNODES is $NNODES: give RDZV_ENDPOINT=HOST:PORT, the same on each node"
    [[ ! $dry_run ]] || return 0
    trap 'stop 143' TERM HUP
    trap 'stop 130' INT
    mkdir -p "$OUT"
    # This script and torchrun hold the lock: nothing starts beside a stage that has outlived a killed script.
    exec 9>"$OUT/.lock-${HOSTNAME:-host}"
    flock -n 9 || error "a recipe is already at work in $OUT; wait for it, stop it, or set another OUT"
}
