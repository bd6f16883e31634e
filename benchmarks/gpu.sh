#!/usr/bin/env bash
# The GPU kernels and the DualDE pipeline on one CUDA GPU, under 9 minutes; writes benchmarks/results/gpu.json.
# PYTHON=… chooses the interpreter; arguments go to benchmarks/gpu.py (--only checks, --interpret, --help …).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Public data sets that lie in or beside the checkout need no download.
for folder in shared/data ../shared/data; do
    if [[ -z "${DISTKGD_DATA:-}" && -d "$folder" ]]; then
        DISTKGD_DATA="$(cd "$folder" && pwd)"
        export DISTKGD_DATA
    fi
done

PYTHON="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
rm -rf runs/gpu
PYTHONUNBUFFERED=1 exec timeout --signal=INT --kill-after=10 535 "$PYTHON" benchmarks/gpu.py "$@"
