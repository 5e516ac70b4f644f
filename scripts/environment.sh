#!/usr/bin/env bash
# Makes .venv and installs the project into it; does nothing when it is up to date. Needs Python >= 3.10 and a package index.
# PYTHON=python3.12 scripts/environment.sh picks the interpreter; `scripts/environment.sh docs,browser` adds extras of settings.ini.
set -euo pipefail
cd "$(dirname "$0")/.."

# The commands in .venv/bin name their interpreter by its path: in a folder that was moved or copied, that of the other place.
script=$(sed -n '1s/^#!//p' .venv/bin/modern-llm 2>/dev/null || true)
if [[ $script == */.venv/bin/python* ]] && ! [ "${script%/*}" -ef .venv/bin ] &&
   compgen -G ".venv/.installed*" >/dev/null; then   # made by this script, nothing else is deleted
  echo "This folder was moved or copied from ${script%/.venv/bin/*}, and .venv belongs there: making it anew ..."
  rm -rf .venv
fi

stamp=.venv/.installed${1:+-$1}
wanted=$(cat settings.ini setup.py constraints.txt | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "$python not found: install Python 3.10 or newer, or say PYTHON=/path/to/python" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  { echo "$($python --version) is too old: Python 3.10 or newer is needed (PYTHON=/path/to/python)" >&2; exit 1; }

if [ ! -x .venv/bin/python ]; then
  echo "Making .venv with $($python --version) ..."
  "$python" -m venv .venv || { rm -rf .venv; echo "venv failed: on Debian and Ubuntu, install python3-venv" >&2; exit 1; }
fi
# stopped half-way, `venv` leaves an environment without pip
.venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null ||
  { echo ".venv has no pip: delete it (rm -rf .venv) and run again; on Debian and Ubuntu, install python3-venv first" >&2; exit 1; }
pins=(-c constraints.txt)
.venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || pins=()   # the pins need 3.11; 3.10 takes the ranges
size=$([ -f .venv/.installed ] || echo " (about 90 seconds, 1.6 GB; once)")
echo "Installing the packages${1:+ and the extra $1} into .venv$size ..."
.venv/bin/python -m pip install --quiet --disable-pip-version-check "${pins[@]}" --editable ".[dev${1:+,$1}]" ||
  { echo "pip failed (see above). Behind a mirror, set PIP_INDEX_URL; what was installed is kept, run again." >&2; exit 1; }
echo "$wanted" > "$stamp"
echo "The environment is ready: .venv"
