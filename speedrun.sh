#!/usr/bin/env bash
# From a fresh clone to a written report: makes the environment if needed, then runs every stage of a preset.
#   bash speedrun.sh local-smoke        built-in data, 2 CPU cores, no network to a model hub
#   bash speedrun.sh local-cpu -p max_minutes=6
# Further words go to `modern-llm run` (see its --help). Run again to go on where it stopped.
set -euo pipefail
cd "$(dirname "$0")"
bash scripts/environment.sh
preset=local-smoke
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then preset=$1; shift; fi
exec .venv/bin/modern-llm run --preset "$preset" --stage all "$@"
