#!/usr/bin/env bash
# Every check and benchmark that needs an NVIDIA GPU, in one call under ten minutes, without network and TensorFlow.
#
#   WHEELS=.whl OUT=benchmarks/results benchmarks/gpu_all.sh          (--dry: tiny shapes, runs on a CPU)
#
# The machine has Python 3.12 with jax, flax, optax, orbax-checkpoint, numpy, sentencepiece, tqdm and pyarrow. What it
# lacks is carried in $WHEELS, made where a package index is at hand by
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#     --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 -d .whl -c constraints.txt \
#     gin-config grain array_record tensorboardX ml_collections zstandard cloudpickle portpicker dm-tree
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=.
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  $PYTHON -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 1
  PYTHONPATH=.:$site
fi
status=0
part() {  # name, seconds, command: a part that fails or hangs does not take the others with it
  local name=$1 seconds=$2; shift 2
  echo "== $name"
  timeout "$seconds" "$@" || { echo "== $name failed with status $?"; status=1; }
}
part device 60 "$PYTHON" -c "import jax; print(jax.__version__, jax.devices())"
part train 330 "$PYTHON" benchmarks/gpu_train.py --output="$OUT" "$@"
part encoders 200 "$PYTHON" benchmarks/gpu_encoders.py --output="$OUT" "$@"
exit $status
