#!/usr/bin/env bash
# Trains the paper's 1.2B Block Transformer on a Slurm cluster, from the repository's root:
#
#     sbatch slurm/pretrain_block_1b.sh [section.field=value ...]
#
# Before its time limit the job saves a checkpoint and puts itself back into the queue, until the run is complete; after a
# crash it does so too, unless three restarts in a row made no new checkpoint.
# Options before the script replace those below: sbatch --nodes=4 --partition=P --account=A slurm/pretrain_block_1b.sh
# Environment: RUN_CONFIG (another configuration), VENV (another environment), SITE_SETUP (a file to source first, for
# modules and network settings).
#SBATCH --job-name=block_1b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/%x-%j.log
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

# The value of a field in the output of --dry-run: planned SECTION FIELD.
planned() {
  sed -n "/^$1:/,/^[^ ]/s/^  $2: //p" <<<"$plan"
}

[[ -n "${SLURM_JOB_ID:-}" ]] || fail "this is a Slurm job; submit it: sbatch slurm/pretrain_block_1b.sh"
# Slurm runs a copy of this file, so the repository is where it was submitted from.
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f tools/pretrain.py && -d configs ]] ||
  fail "$PWD is not the repository; submit from its root: cd REPOSITORY && sbatch slurm/pretrain_block_1b.sh"
if [[ -n "${SITE_SETUP:-}" ]]; then
  source "$SITE_SETUP"
fi
config="${RUN_CONFIG:-configs/paper/block_main_b4_1.2b.yaml}"
python="${VENV:-.venv}/bin/python"
[[ -x "$python" ]] || fail "no Python environment in ${VENV:-.venv}; create it with: make install"

plan="$("$python" tools/pretrain.py "$config" parallel.data=1 "$@" --dry-run)"
replica=$(($(planned parallel tensor) * $(planned parallel pipeline)))
tasks="${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))}"
((tasks % replica == 0)) ||
  fail "$tasks processes cannot hold replicas of $replica (parallel.tensor x parallel.pipeline); change --nodes"
data="$(planned data path)"
[[ -d "$data" ]] || fail "no training data in $data; make it with: $python tools/prepare_data.py \
--input TRAINING_FILES --validation-input VALIDATION_FILES --tokenizer tokenizer.json --output $data"

hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export MASTER_ADDR="${hosts%%$'\n'*}"
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # since Slurm 22.05 srun does not take it from the job

status=0
srun --kill-on-bad-exit=1 "$python" tools/pretrain.py "$config" "parallel.data=$((tasks / replica))" \
  --launcher inline "$@" || status=$?

# Slurm puts a job back by itself after a preemption or a node's failure, but not after a status other than 0.
if ((status != 0)); then
  "$python" -m slurm.requeue "$(planned run root)/$(planned run name)" "$status"
fi
exit "$status"
