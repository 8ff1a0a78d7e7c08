#!/usr/bin/env bash
# Set up the environment and run the checks and tests: everything but the tests that need a GPU.
# Arguments go to pytest: `bash scripts/test.sh -m "not slow and not gpu"` is the fast part.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source .venv/bin/activate
ruff check .
ruff format --check .
mypy vhabl
if [[ $# -eq 0 ]]; then
    set -- -m "not gpu"
fi
exec python -m pytest -n 2 --dist loadfile "$@"
