#!/usr/bin/env bash
# Trains the paper's 302M Block Transformer on a Slurm cluster, from the repository's root:
#
#     slurm/pretrain_block_300m.sh [section.field=value ...]                   submits it with the values of slurm/site.conf
#     sbatch [OPTIONS] slurm/pretrain_block_300m.sh [section.field=value ...]  submits it with these options
#
# The job saves a checkpoint before its time limit and puts itself back into the queue until the run is complete; after a
# crash it does so too, unless three restarts in a row made no new checkpoint. RUN_CONFIG names another
# configuration, RUN_NAME another run.
#SBATCH --job-name=block_300m
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/%x-%j.log
body="${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/_run.sh"
[[ -f "$body" ]] || {
  echo "error: ${SLURM_SUBMIT_DIR:-} is not the repository; submit from its root" >&2
  exit 2
}
# shellcheck source=slurm/_run.sh
source "$body"
pretrain configs/paper/block_main_b4_300.yaml "$@"
