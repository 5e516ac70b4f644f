# Where things are on a cluster: modules, the project's environment, and everything big on $SCRATCH.
# Source it from the checkout, on the login node too, so that `modern-llm status` looks where the jobs write:
#   source slurm/environment.sh

# Modules are named in the cluster's file: yours in clusters/ or $MODERN_LLM_CLUSTERS, else the project's. TACC sets TACC_SYSTEM;
# elsewhere MODERN_LLM_CLUSTER=NAME says which. torch's wheels bring their own CUDA; Python must be the one that made .venv, 3.10
# or newer (`module spider python3` lists what there is; scripts/environment.sh makes .venv).
cluster=${MODERN_LLM_CLUSTER:-${TACC_SYSTEM:-none}}
for file in "${MODERN_LLM_CLUSTERS:-clusters}/$cluster.toml" "modern_llm/config/clusters/$cluster.toml"; do
  if [ -f "$file" ]; then
    modules=$(sed -nE "s/^[[:space:]]*modules[[:space:]]*=[[:space:]]*(\"([^\"]*)\"|'([^']*)').*/\2\3/p" "$file")
    if [ -n "$modules" ]; then module load $modules; fi
    break
  fi
done
export PATH="${MODERN_LLM_VENV:-$PWD/.venv}/bin:$PATH"

# Home folders of clusters are small. Without $SCRATCH, runs stay in the checkout and caches under ~/.cache.
if [ -n "${SCRATCH:-}" ]; then
  export MODERN_LLM_RUNS="${MODERN_LLM_RUNS:-$SCRATCH/modern_llm/runs}"     # $SCRATCH is purged: copy what you keep
  export MODERN_LLM_CACHE="${MODERN_LLM_CACHE:-$SCRATCH/modern_llm/cache}"  # tokenised corpora, trained tokenizers
  export HF_HOME="${HF_HOME:-$SCRATCH/modern_llm/huggingface}"              # what `modern-llm prefetch` fetches
fi
export MODERN_LLM_RUNS="${MODERN_LLM_RUNS:-$PWD/runs}"
