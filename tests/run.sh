#!/usr/bin/env bash
# The test command: lint, types, tests. `bash tests/run.sh [pytest arguments]`; `-m slow` runs what is left out here.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
. deploy/environment.sh
penstock_environment "$root" dev
export PATH="$root/.venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

echo "== lint"
ruff check .
ruff format --check .
echo "== types"
# mypy does not see setuptools' editable mapping: a link farm shows it the package as users import it
mkdir -p .types/penstock
for room in kernels workers router cluster; do ln -sfn "../../$room" ".types/penstock/$room"; done
MYPYPATH=.types mypy -p penstock.kernels -p penstock.workers -p penstock.router -p penstock.cluster
echo "== tests"
# threads that wait for each other in a matrix product sleep, and leave the cores to the other half of the tests
export OMP_WAIT_POLICY=PASSIVE
# hundreds of processes are started; without it each of them would compile Penstock anew
unset PYTHONDONTWRITEBYTECODE
# two at a time, whole files together: most tests wait for processes, and one core is left idle by them
exec pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" "${@:-tests}"
