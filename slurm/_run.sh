# The body that all job scripts of this folder share; each sources it and calls pretrain or uptrain.
# shellcheck shell=bash
#
# Outside Slurm it submits the script with the site's options. Inside a job it plans, checks the allocation, runs one
# process per task, says in the job's log what went wrong, and puts the job back into the queue while the run gets on.
# Values come from the environment, else from slurm/site.conf; slurm/site.conf.example describes them.
set -euo pipefail

SITE_VARIABLES=(SITE_ACCOUNT SITE_PARTITION SITE_QOS SITE_NODES SITE_GPUS_PER_NODE SITE_TASKS_PER_NODE
  SITE_CPUS_PER_TASK SITE_TIME SITE_VENV SITE_CONTAINER SITE_CONTAINER_MOUNTS SITE_SETUP SITE_PREFLIGHT
  SITE_MIN_ALLREDUCE_GBPS RUN_NAME RUN_CONFIG)
USER_ERROR_STATUS=2
PREFLIGHT_STATUS=3
CONFLICT_STATUS=99
LAST_SECONDS=30
LOCK_SECONDS=300 # a network file system may keep a dead node's lock for minutes

fail() {
  echo "error: $1" >&2
  exit "$USER_ERROR_STATUS"
}

# pretrain CONFIG [section.field=value ...]
pretrain() {
  enter_repository
  config="${RUN_CONFIG:-$1}"
  command=(tools/pretrain.py "$config")
  start "${@:2}"
}

# uptrain CONFIG [option or section.field=value ...]
uptrain() {
  enter_repository
  config="${RUN_CONFIG:-$1}"
  [[ -n "${VANILLA:-}" ]] || fail "VANILLA is not set; give the folder of the vanilla weights: VANILLA=DIR slurm/uptrain.sh"
  command=(tools/uptrain_from_vanilla.py --vanilla "$VANILLA" --config "$config")
  start "${@:2}"
}

# Slurm runs a copy of the script, so the repository is where it was submitted from.
enter_repository() {
  cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
  read_site_file
  if [[ -n "${SITE_SETUP:-}" ]]; then
    [[ -f "$SITE_SETUP" ]] || fail "SITE_SETUP=$SITE_SETUP is not a file"
    # shellcheck source=/dev/null
    source "$SITE_SETUP"
  fi
}

# Exports each NAME=VALUE of slurm/site.conf that the environment does not set. Nothing in it is expanded.
read_site_file() {
  local line name value
  [[ -f slurm/site.conf ]] || return 0
  while IFS= read -r line || [[ -n "$line" ]]; do
    read -r line <<<"${line%%#*}"
    [[ -n "$line" ]] || continue
    name="${line%%=*}" value="${line#*=}"
    [[ "$line" == *=* && " ${SITE_VARIABLES[*]} " == *" $name "* ]] ||
      fail "slurm/site.conf: '$line' is not NAME=VALUE with a name of slurm/site.conf.example"
    [[ -n "${!name:-}" ]] || export "$name=${value//[\"\']/}"
  done <slurm/site.conf
}

start() {
  python="${SITE_VENV:-.venv}/bin/python"
  container=()
  if [[ -n "${SITE_CONTAINER:-}" ]]; then
    container=("--container-image=$SITE_CONTAINER" "--container-workdir=$PWD"
      "--container-mounts=$PWD:$PWD${SITE_CONTAINER_MOUNTS:+,$SITE_CONTAINER_MOUNTS}")
  elif [[ ! -x "$python" ]]; then
    fail "no Python environment in ${SITE_VENV:-.venv}; create it with: make install (or set SITE_VENV)"
  fi
  [[ -z "${RUN_NAME:-}" ]] || set -- "run.name=$RUN_NAME" "$@"
  if [[ -n "${SLURM_JOB_ID:-}" ]]; then
    run_job "$@"
  else
    submit "$@"
  fi
}

# Runs Python once: here, or in a container on this node.
python_once() {
  if ((${#container[@]})); then
    srun --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "${container[@]}" "$python" "$@"
  else
    "$python" "$@"
  fi
}

# Whatever the tool would refuse is refused here, before many processes start.
make_plan() {
  local data
  plan="$(python_once "${command[@]}" parallel.data=1 "$@" --dry-run)"
  run="$(planned run root)/$(planned run name)"
  data="$(planned data path)"
  [[ -d "$data" ]] || fail "no training data in $data; make it with: $python tools/prepare_data.py \
--input TRAINING_FILES --validation-input VALIDATION_FILES --tokenizer tokenizer.json --output $data"
}

# The value of a field in the plan; of several runs, the last one's: planned SECTION FIELD.
planned() {
  sed -n "/^$1:/,/^[^ ]/s/^  $2: //p" <<<"$plan" | tail -n 1
}

# --- Submitting ---

submit() {
  command -v sbatch >/dev/null ||
    fail "sbatch is not on PATH, so there is no Slurm to submit to; on one machine run: $python ${command[*]}"
  ((${#container[@]})) || make_plan "$@"
  local options=() variable name tasks answer
  for name in account partition qos nodes gpus_per_node cpus_per_task time; do
    variable="SITE_${name^^}"
    [[ -z "${!variable:-}" ]] || options+=("--${name//_/-}=${!variable}")
  done
  tasks="${SITE_TASKS_PER_NODE:-${SITE_GPUS_PER_NODE:-0}}"
  [[ "$tasks" == 0 ]] || options+=("--ntasks-per-node=$tasks")
  name="${RUN_NAME:-${RUN_CONFIG:-}}"
  [[ -z "$name" ]] || options+=("--job-name=$(basename "$name" .yaml)")
  set -- sbatch "${options[@]}" "slurm/$(basename "$0")" "$@"
  printf '%q ' "$@"
  echo
  answer="$("$@" 2>&1)" || refused "$answer"
  echo "$answer"
}

refused() {
  local reasons="${1//sbatch: error: /}"
  fail "Slurm refused the job: ${reasons//$'\n'/; }"
}

# --- Inside the job ---

run_job() {
  unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE # of a job that this one was submitted from
  warn_of_site_values
  make_plan "$@"
  local replica
  replica=$(($(planned parallel tensor) * $(planned parallel pipeline)))
  tasks="${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))}"
  ((tasks % replica == 0)) ||
    fail "$tasks processes cannot hold replicas of $replica (parallel.tensor x parallel.pipeline); change --nodes"
  make_log_folder
  check_writer
  choose_meeting_point
  export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # since Slurm 22.05 srun does not take it from the job
  preflight
  train "parallel.data=$((tasks / replica))" "$@"
}

# sbatch reads its options before this script runs, so what the site asks for may not be what the job has.
warn_of_site_values() {
  local missed=() pair wanted has
  for pair in ACCOUNT:SLURM_JOB_ACCOUNT PARTITION:SLURM_JOB_PARTITION QOS:SLURM_JOB_QOS NODES:SLURM_JOB_NUM_NODES; do
    wanted="SITE_${pair%%:*}" has="${pair##*:}"
    [[ -z "${!wanted:-}" || "${!wanted}" == "${!has:-}" ]] || missed+=("$wanted=${!wanted} (it has ${!has:-none})")
  done
  ((${#missed[@]} == 0)) || echo "warning: this job was submitted without ${missed[*]}: sbatch does not read" \
    "slurm/site.conf; run the script itself, which submits with these values" >&2
}

make_log_folder() {
  local reason
  attempt="${SLURM_RESTART_COUNT:-0}"
  logs="$run/slurm/$SLURM_JOB_ID-$attempt" # and -NODE.log
  reason="$(mkdir -p "$run/slurm" 2>&1 && touch "$run/slurm" 2>&1)" ||
    fail "run folder $run cannot be written: ${reason##*: }; change run.root or free space"
  echo "attempt $attempt of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST; logs: $logs-NODE.log"
}

# Never two writers: rank 0 locks the run. Asked here too, before processes start; a restart waits for those before it.
check_writer() {
  local seconds status=0
  [[ -f "$run/.lock" ]] || return 0
  seconds=$((attempt > 0 ? LOCK_SECONDS : 0))
  flock --shared --timeout "$seconds" --conflict-exit-code "$CONFLICT_STATUS" "$run/.lock" true || status=$?
  ((status == CONFLICT_STATUS)) || return 0
  ((attempt == 0)) || give_up_for_now "the run's lock was not free after $seconds s"
  fail "run $(planned run name) is being written by another job ($(<"$run/.lock")); cancel that job, or choose another \
RUN_NAME"
}

give_up_for_now() {
  echo "$1" >&2
  requeue 1
  exit 1
}

choose_meeting_point() {
  hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
  export MASTER_ADDR="${hosts%%$'\n'*}"
  MASTER_PORT="$(python_once -m slurm.rendezvous_port)"
  export MASTER_PORT
}

# A bad node stops the job with its name; one that vanished is like any failure, because Slurm may replace it.
preflight() {
  local seconds="${SITE_PREFLIGHT:-60}" per_node=1 status=0
  [[ "$seconds" =~ ^(0|[2-9][0-9]|[1-9][0-9]{2,})$ ]] ||
    fail "SITE_PREFLIGHT=$seconds is not a number of seconds from 20 on, or 0 for none"
  ((seconds)) || return 0
  ((${SLURM_GPUS_ON_NODE:-0} == 0)) || per_node="$((tasks / SLURM_JOB_NUM_NODES))"
  timeout --kill-after=5 "$seconds" srun --kill-on-bad-exit=1 --ntasks-per-node="$per_node" \
    --ntasks="$((per_node * SLURM_JOB_NUM_NODES))" "${container[@]}" "$python" -m slurm.preflight "$run" \
    --nodes "${hosts//$'\n'/,}" --seconds "$seconds" --gpus "${SLURM_GPUS_ON_NODE:-0}" \
    --parameters "$(sed -n 's/^parameters: //p' <<<"$plan" | tail -n 1)" \
    --minimum-gbps "${SITE_MIN_ALLREDUCE_GBPS:-0}" || status=$?
  ((status != 0)) || return 0
  ((status != 124 && status != 137)) ||
    echo "error: preflight: node $MASTER_ADDR did not end within $seconds s" >&2
  ((status == PREFLIGHT_STATUS)) || requeue "$status"
  exit "$status"
}

train() {
  local status=0 errors
  timeout --kill-after=10 "$(seconds_left)" srun --kill-on-bad-exit=1 --label --open-mode=append \
    --output="$logs-%N.log" "${container[@]}" "$python" "${command[@]}" "$@" --launcher inline || status=$?
  if ((status == 0)); then
    said_by_first_rank 1
    exit 0
  fi
  # srun gives the highest status of all ranks: that of the killed ones, not that of the one that found the mistake.
  errors="$(errors_of_ranks)"
  if [[ -n "$errors" ]]; then
    echo "$errors" >&2
    status="$USER_ERROR_STATUS"
  else
    said_by_first_rank 20
  fi
  # Slurm puts a job back by itself after a preemption or a node's failure, but not after a status other than 0.
  requeue "$status"
  exit "$status"
}

# What the ranks call errors, each once, whichever rank said it first.
errors_of_ranks() {
  sed -n 's/^ *[0-9]*: error: /error: /p' "$logs"-*.log |
    awk '{ text = $0; sub(/^error: rank [0-9]+: /, "", text) } !said[text]++' | head -n 20
}

# Until shortly before the time limit: ranks that hang then are ended, because Slurm does not put a job back that reached
# its limit. 0: no limit.
seconds_left() {
  local end left
  end="$(date --date="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)" +%s 2>/dev/null)" || { echo 0 && return; }
  left=$((end - LAST_SECONDS - $(date +%s)))
  echo "$((left > 0 ? left : 1))"
}

# The last lines of rank 0, in the job's own log.
said_by_first_rank() {
  grep -h '^ *0: ' "$logs-${MASTER_ADDR%%.*}.log" | tail -n "$1" || true
}

requeue() {
  local requeue_python="$python"
  ((${#container[@]} == 0)) || requeue_python=python3 # Slurm's commands are not in the container
  "$requeue_python" -m slurm.requeue "$(run_under_way)" "$1"
}

# Of several runs, one after the other, the last that has begun.
run_under_way() {
  local name folder="$run"
  while IFS= read -r name; do
    [[ ! -d "${run%/*}/$name/checkpoints" ]] || folder="${run%/*}/$name"
  done < <(sed -n '/^run:/,/^[^ ]/s/^  name: //p' <<<"$plan")
  echo "$folder"
}
