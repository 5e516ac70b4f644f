# What every job file shares: the environment, the log, and what happens when the scheduler wants the machine back.
set +u; source slurm/environment.sh; set -u  # modules use variables that are not set
command -v modern-llm >/dev/null ||
  { echo "no modern-llm in ${MODERN_LLM_VENV:-$PWD/.venv}/bin: run bash scripts/environment.sh on the login node" >&2; exit 2; }

# Compute nodes often have no network, and waiting for one takes minutes: `modern-llm prefetch` on the login node instead.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

# As SLURM names this job: a task of an array is 990_3, since the number of its last task is that of the whole array.
job="${SLURM_JOB_ID:?submit this file with sbatch}"
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi

# The scheduler's word comes to this shell: USR1 before the time limit (--signal above), TERM on preemption or requeue.
# `modern-llm run` is asked to stop: it finishes its step, writes a checkpoint and ends with code 75.
child=""; warned=""
warn() {
  warned=yes
  echo "== $(date '+%F %T') $1 from the scheduler"
  if [ -n "$child" ]; then kill -USR1 "$child" 2>/dev/null || true; fi
}
trap 'warn USR1' USR1
trap 'warn TERM' TERM

# preset_name PRESET: what a preset, given as a name or a JSON file, calls itself; a run without a name is called so.
preset_name() { modern-llm presets "$1" | sed -nE 's/^  "name": "(.*)",?$/\1/p'; }

# open_log RUN: from here on everything goes to runs/RUN/logs/JOBNAME-JOBID.out, also after a requeue.
open_log() {
  local folder="$MODERN_LLM_RUNS/$1/logs"
  mkdir -p "$folder"
  echo "log: $folder/$SLURM_JOB_NAME-$job.out"
  exec >>"$folder/$SLURM_JOB_NAME-$job.out" 2>&1
  echo "== $(date '+%F %T') job $job on ${SLURM_JOB_NODELIST:-?}, start number $((${SLURM_RESTART_COUNT:-0} + 1))"
}

# run_or_requeue WORDS…: `modern-llm run WORDS…`; stopped by the scheduler, it goes back into the queue and, the next time,
# on from its checkpoint. Several tasks (nodes × tasks per node, one for each GPU) train together: srun starts one rank a task,
# or, with MODERN_LLM_LAUNCHER=torchrun, one command per node, which becomes torchrun for the ranks of its node.
run_or_requeue() {
  local code ranks="${SLURM_NTASKS:-1}" tasks=()
  if [ "${MODERN_LLM_LAUNCHER:-srun}" = torchrun ]; then
    tasks=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE")
  fi
  if [ "$ranks" -gt 1 ]; then
    srun ${tasks[@]+"${tasks[@]}"} --kill-on-bad-exit=1 modern-llm run "$@" -p "hardware.ranks=$ranks" &
  else
    modern-llm run "$@" &
  fi
  child=$!
  if [ -n "$warned" ]; then kill -USR1 "$child"; fi  # the word came between two stages
  while :; do  # a signal ends `wait` early
    warned=""; code=0
    wait "$child" || code=$?
    [ -n "$warned" ] || break
  done
  child=""
  echo "== $(date '+%F %T') ended with code $code"
  # 138: USR1 came before it could listen. No longer RUNNING: cancelled or requeued from outside, which settles it.
  if [ "$code" = 75 ] || [ "$code" = 138 ]; then
    case "$(timeout 60 squeue -h -j "$job" -o "modern_llm|%A|%T")" in  # a cluster may print greetings, too
      *"modern_llm|$SLURM_JOB_ID|RUNNING"*) scontrol requeue "$job" ||
        echo "not requeued (this cluster may forbid it): submit the same line again, it goes on from the checkpoint" ;;
    esac
  fi
  return "$code"
}
