# Where things are on a cluster: modules, the project's environment, and everything big on $SCRATCH.
# Source it from the checkout, on the login node too, so that `modern-llm status` looks where the jobs write:
#   source slurm/environment.sh

# TACC sets TACC_SYSTEM. torch's wheels bring their own CUDA; Python must be the one that made .venv, 3.10 or newer
# (`module spider python3` lists what there is; scripts/environment.sh makes .venv).
case "${TACC_SYSTEM:-}" in
  ls6) module load gcc cuda python3 ;;     # Lonestar6: partitions gpu-a100 (3 A100 per node), gpu-h100 (2 H100 per node)
  vista) module load gcc cuda python3 ;;   # Vista: partition gh (one GH200 per node)
esac
export PATH="${MODERN_LLM_VENV:-$PWD/.venv}/bin:$PATH"

# Home folders of clusters are small. Without $SCRATCH, runs stay in the checkout and caches under ~/.cache.
if [ -n "${SCRATCH:-}" ]; then
  export MODERN_LLM_RUNS="${MODERN_LLM_RUNS:-$SCRATCH/modern_llm/runs}"     # $SCRATCH is purged: copy what you keep
  export MODERN_LLM_CACHE="${MODERN_LLM_CACHE:-$SCRATCH/modern_llm/cache}"  # tokenised corpora, trained tokenizers
  export HF_HOME="${HF_HOME:-$SCRATCH/modern_llm/huggingface}"              # what `modern-llm prefetch` fetches
fi
export MODERN_LLM_RUNS="${MODERN_LLM_RUNS:-$PWD/runs}"
