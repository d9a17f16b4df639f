#!/usr/bin/env bash
# What one call on a lent GPU machine runs, unattended: bash benchmarks/gpu/run.sh first|second
# docs/gpu.md has the two calls, with what each must carry.
#
# `first` tests and times; `second` trains five folds side by side, for as many iterations as `first`
# found to fit, and tests them. State lives in $STATE (outside the working tree), which outlasts a
# call while the machine is held; results go to $OUT, and come back also when a call is stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
STEP=${1:?STEP is first or second}
STATE=${STATE:-/tmp/cellseg_gpu}
OUT=${OUT:-$STATE/out}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}                        # cpu: to try the script where there is no GPU
CONFIGS=${CONFIGS:-configs/gpu}               # five folds, side by side on one card
N_FOLDS=${N_FOLDS:-5}
TRY_ITERS=${TRY_ITERS:-40}                    # to learn how long a step takes beside the others
FORMAT=${FORMAT:-channels_last}               # of `second`: the faster of `first`
ITERS=${ITERS:-}                              # default: what fits until SECONDS_TRAINED
SECONDS_BENCH=${SECONDS_BENCH:-200}           # of `first`: no benchmark begins after this
SECONDS_TRAINED=${SECONDS_TRAINED:-360}       # of `second`
SECONDS_END=${SECONDS_END:-460}
BENCH_LIMIT=${BENCH_LIMIT:-90}
EXTRA=${EXTRA:-}                              # key=value settings of every training
export CELLSEG_DATA=$STATE/data PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$STATE" "$OUT"
SECONDS=0

say() { echo "== ${SECONDS} s: $*"; }

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
  rm -f "$CELLSEG_DATA/folds.json"  # of fewer images, after the first call
  "$PYTHON" tools/prepare_data.py "$CELLSEG_DATA" --groups-csv "$CELLSEG_DATA/manifest.csv" \
    --group-column patient | tail -n 3
  "$PYTHON" -c 'import numpy, torch; print("torch", torch.__version__, "numpy", numpy.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA")'
}

show() {  # the end of a log, without what every run prints
  grep -v -e 'OneDL' -e 'annotations into' -e 'Done (t' -e '^creating' -e '^index created' \
    "$1" | tail -n "${2:-25}" || true
}

try() {  # try SECONDS NAME COMMAND...: go on when it fails
  local limit=$1 name=$2
  shift 2
  say "$name"
  # through a file: a killed benchmark's workers would hold a pipe open, and the call would hang
  timeout -k 5 "$limit" "$@" > "$OUT/$name.log" 2>&1 || say "$name failed or was stopped, see its log"
  show "$OUT/$name.log"
}

bench() {  # bench NAME SCRIPT WORDS...
  local name=$1 script=$2
  shift 2
  if [ "$SECONDS" -ge "$SECONDS_BENCH" ]; then
    say "$name: left out, no time"
    return
  fi
  try "$BENCH_LIMIT" "$name" "$PYTHON" "benchmarks/$script.py" --data "$CELLSEG_DATA" \
    --device "$DEVICE" "$@"
}

each_fold() {  # each_fold NAME SECONDS COMMAND...: side by side; FOLD in the words is the number
  local name=$1 limit=$2 fold pids=() status=0
  shift 2
  for fold in $(seq 0 $((N_FOLDS - 1))); do
    timeout -k 5 "$limit" "${@//FOLD/$fold}" > "$OUT/$name.$fold.log" 2>&1 &
    pids+=($!)
  done
  for fold in "${!pids[@]}"; do
    wait "${pids[$fold]}" || { status=1; say "$name, fold $fold: failed"; show "$OUT/$name.$fold.log"; }
  done
  return $status
}

train() {  # train NAME SECONDS ITERATIONS WORDS...
  local name=$1 limit=$2 iters=$3
  shift 3
  # a schedule of another length must also end elsewhere; the scores come from the tests below
  # shellcheck disable=SC2086
  each_fold "$name" "$limit" "$PYTHON" tools/train.py "$CONFIGS/foldFOLD.py" \
    --work-dir "$STATE/$name/foldFOLD" --cfg-options train_cfg.max_iters="$iters" \
    train_cfg.val_begin=1000000 param_scheduler.1.end="$iters" param_scheduler.1.T_max="$iters" \
    $EXTRA "$@"
}

seconds_a_step() {  # seconds_a_step NAME: of the slowest fold, from its 10th to its 30th step
  awk '/Iter\(train\)/ {
    split($2, t, ":"); now = t[1] * 3600 + t[2] * 60 + t[3]
    match($0, /\[ *[0-9]+\//); n = substr($0, RSTART + 1, RLENGTH - 2) + 0
    if (n == 10) begun = now
    if (n == 30) print (now - begun) / 20
  }' "$STATE/$1".*.log | sort -n | tail -n 1
}

case $STEP in
  first)
    take_in
    if [ "$DEVICE" = cuda ]; then
      export CELLSEG_REQUIRE_GPU=1
    else
      export CELLSEG_TEST_DEVICE=$DEVICE
    fi
    try 150 test_cuda "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/whole/test_cuda.py \
      -k "${TESTS:-test}"
    for format in channels_last contiguous; do
      say "a few steps of every fold, $format"
      # nothing is worth the machine's time where training does not even begin
      train "$format" "${TRY_LIMIT:-100}" "$TRY_ITERS" default_hooks.logger.interval=10 \
        model.memory_format=$format || exit 3
      cp "$OUT/$format".*.log "$STATE"
      say "$(seconds_a_step $format) s a step, the slowest of $N_FOLDS side by side"
    done
    GPU=(--configs "$CONFIGS/fold0.py" --size "${SIZE:-512}" --scale 2 --batch "${BATCH:-8}"
      --images 12 --workers "${WORKERS:-6}" --repeats "${REPEATS:-4}" --warm-up 2 --no-peak)
    R50=(--configs configs/fold0.py --size "${SIZE_R50:-1024}" --scale 2 --batch "${BATCH_R50:-4}"
      --images 12 --workers "${WORKERS:-6}" --repeats "${REPEATS:-4}" --warm-up 2 --no-peak)
    bench train_fp32 train_step "${GPU[@]}"
    bench test_fp32 test_step --configs "$CONFIGS/fold0.py" --size 0 --images "${IMAGES:-4}" \
      --workers 4 --repeats 1
    bench train_bf16_channels_last train_step "${GPU[@]}" --amp bf16 --channels-last
    bench train_r50_fp32 train_step "${R50[@]}"
    bench train_r50_bf16_channels_last train_step "${R50[@]}" --amp bf16 --channels-last
    ;;
  second)
    take_in
    if [ -z "$ITERS" ]; then  # 20 s to begin; 0.93: a step may take longer once boxes are found
      ITERS=$(awk -v t="$SECONDS_TRAINED" -v now="$SECONDS" -v s="$(seconds_a_step "$FORMAT")" \
        'BEGIN {print int(0.93 * (t - now - 20) / s / 50) * 50}')
    fi
    say "training, $ITERS iterations"
    train folds $((SECONDS_TRAINED - SECONDS + 20)) "$ITERS" default_hooks.logger.interval=100 \
      model.memory_format="$FORMAT" || true
    say 'testing'
    limit=$((SECONDS_END - SECONDS))
    timeout -k 5 $limit "$PYTHON" benchmarks/gpu/same_cells.py "$CONFIGS/fold0.py" \
      "$STATE/folds/fold0/iter_$ITERS.pth" "$CELLSEG_DATA" --device "$DEVICE" \
      > "$OUT/same_cells.log" 2>&1 &
    cells=$!
    test=("$PYTHON" tools/test.py "$CONFIGS/foldFOLD.py" "$STATE/folds/foldFOLD/iter_$ITERS.pth"
      --work-dir "$STATE/folds/foldFOLD")
    each_fold plain $limit "${test[@]}" &
    plain=$!
    each_fold flips $limit "${test[@]}" --tta flips || true
    "$PYTHON" benchmarks/gpu/pack_data.py weights "$OUT" "$STATE"/folds/fold*/iter_"$ITERS".pth || true
    wait $plain || true
    wait $cells || say 'cells differ'
    show "$OUT/same_cells.log"
    say 'collecting results'
    (cd "$STATE" && find folds -name 'val.*' -o -name '*.log' -o -name 'fold?.py' -o -name '*.json') |
      tar czf "$OUT/results.tgz" -C "$STATE" -T -
    ;;
  *)
    echo "error: STEP is $STEP; expected first or second" >&2
    exit 2
    ;;
esac
(cd "$OUT" && tar czf logs.tgz ./*.log && rm ./*.log)
ls -l "$OUT"
say 'done'
