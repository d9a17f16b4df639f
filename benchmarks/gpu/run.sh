#!/usr/bin/env bash
# What one call on a lent GPU machine runs, unattended: bash benchmarks/gpu/run.sh STEP
# STEP: tests | bench | train | finish. docs/gpu.md has the calls, with what each must carry.
#
# State lives in $STATE (outside the working tree), which outlasts a call while the machine is held;
# results go to $OUT, and come back also when a call is stopped at its limit. Every step first takes
# in what was carried, and says which call is missing when something is not there.
set -euo pipefail
cd "$(dirname "$0")/../.."
STEP=${1:?STEP is tests, bench, train or finish}
STATE=${STATE:-/tmp/cellseg_gpu}
OUT=${OUT:-$STATE/out}
PYTHON=${PYTHON:-python3}
FOLDS=${FOLDS:-configs/gpu/fold*.py}
ITERS=${ITERS:-1500}
# Seconds for training in this call; the rest of ten minutes is for unpacking and copying back.
TRAIN_SECONDS=${TRAIN_SECONDS:-510}
DEVICES=${DEVICES:-0,0,0,0,0}                 # five folds at once on one card
# bf16 has the range of fp32 and needs no loss scale; docs/gpu.md says why not fp16
AMP=${AMP-optim_wrapper.type=AmpOptimWrapper optim_wrapper.dtype=bfloat16 optim_wrapper.loss_scale=1.0}
export CELLSEG_DATA=$STATE/data PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
mkdir -p "$STATE" "$OUT"

say() { echo "== $(date +%T) $*"; }

take_in() {
  if compgen -G '.whl/*.whl' > /dev/null; then
    say 'installing the carried wheels'
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --target "$STATE/site" .whl/*.whl
  fi
  export PYTHONPATH=$PWD:$STATE/site${PYTHONPATH:+:$PYTHONPATH}
  if compgen -G '.gpu_pack*/data.zip' > /dev/null; then
    say 'unpacking the carried images'
    "$PYTHON" benchmarks/gpu/pack_data.py unpack "$CELLSEG_DATA" .gpu_pack*
  fi
}

need() {  # need NUMBER GLOB CALL: stop unless so many files are there
  local n
  n=$(compgen -G "$2" | wc -l || true)
  if [ "$n" -lt "$1" ]; then
    echo "error: $2: $n files, $1 are needed; the machine is new: repeat the calls from $3 on" >&2
    exit 2
  fi
}

cv() {
  # a schedule of another length must also end elsewhere
  # shellcheck disable=SC2086
  "$PYTHON" tools/cross_validate.py $FOLDS --work-root "$STATE/work_dirs" --gpus "$DEVICES" \
    --cfg-options train_cfg.max_iters="$ITERS" param_scheduler.1.end="$ITERS" \
    param_scheduler.1.T_max="$ITERS" $AMP ${EXTRA:-}
}

bring_back() {
  say 'collecting results'
  find "$STATE/work_dirs" \( -name '*.log' -o -name 'scalars.json' -o -name '*.scores.json' \
    -o -name 'finished.json' -o -name '*.md' -o -name '*.csv' -o -name '*.html' \) -print0 \
    2> /dev/null | tar czf "$OUT/logs.tgz" --null -T - || true
  find "$STATE/work_dirs" -name 'val.predictions.npz' -print0 2> /dev/null |
    tar cf "$OUT/oof.tar" --null -T - || true
  find "$STATE/work_dirs" -path '*ensemble*' -name '*.zip' -exec cp {} "$OUT/" \; || true
  find "$OUT" -size +16M -exec sh -c 'echo "too large to come back: $1" && ls -l "$1"' _ {} \;
  ls -l "$OUT"
}

bench() {  # bench NAME SCRIPT WORDS...: 150 s at most, and go on when one fails
  local name=$1 script=$2
  shift 2
  say "$name"
  # through a file: a killed benchmark's workers would hold a pipe open, and the call would hang
  timeout 150 "$PYTHON" "benchmarks/$script.py" --data "$CELLSEG_DATA" "$@" \
    > "$OUT/$name.log" 2>&1 || say "$name failed or was stopped, see $name.log"
  grep -v -e 'OneDL' -e 'annotations into' -e 'Done (t' -e '^creating' -e '^index created' \
    "$OUT/$name.log" | tee "$OUT/$name.md" || true
}

take_in
case $STEP in
  tests)
    "$PYTHON" -c 'import torch, torchvision; print(torch.__version__, torchvision.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA")' || true
    CELLSEG_REQUIRE_GPU=1 timeout 280 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu \
      tests/whole/test_cuda.py 2>&1 | tee "$OUT/test_cuda.log"
    ;;
  bench)
    need 1 "$CELLSEG_DATA/train/*/image.tif" 'call 1'
    BIG=(--configs configs/fold0.py --size "${SIZE:-1024}" --scale 2 --batch 4 --images 12
      --workers 6 --repeats "${REPEATS:-10}" --warm-up 3)
    bench train_fp32 train_step "${BIG[@]}"
    bench train_fp16 train_step "${BIG[@]}" --amp fp16
    bench train_bf16_channels_last train_step "${BIG[@]}" --amp bf16 --channels-last --no-peak
    TEST=(--configs configs/fold0.py --size 0 --images "${IMAGES:-8}" --workers 4 --repeats 2)
    bench test_fp32 test_step "${TEST[@]}"
    ;;
  train)
    need "${N_TRAIN:-155}" "$CELLSEG_DATA/train/*/image.tif" 'call 2'
    code=0
    # SIGINT: the tools stop as with Ctrl-C, and the next call goes on from the newest checkpoint
    timeout -k 20 -s INT "$TRAIN_SECONDS" bash -c "$(declare -f cv say); $(declare -p \
      PYTHON FOLDS STATE DEVICES ITERS AMP); EXTRA='${EXTRA:-}'; cv" || code=$?
    say "training ended with status $code (124 or 137: stopped at its time, go on with 'train')"
    bring_back
    ;;
  finish)
    need "${N_TRAIN:-155}" "$CELLSEG_DATA/train/*/image.tif" 'call 2'
    need "${N_TEST:-93}" "$CELLSEG_DATA/test_release/*.tif" 'call 2'
    timeout -k 20 -s INT 540 bash -c "$(declare -f cv say); $(declare -p \
      PYTHON FOLDS STATE DEVICES ITERS AMP); EXTRA='${EXTRA:-}'; cv" || say "stopped: $?"
    bring_back
    ;;
  *)
    echo "error: STEP is $STEP; expected tests, bench, train or finish" >&2
    exit 2
    ;;
esac
