#!/usr/bin/env bash
# What one call on a lent GPU machine runs, unattended: bash benchmarks/gpu/run.sh first|second
# docs/gpu.md has the two calls, with what each must carry.
#
# State lives in $STATE (outside the working tree), which outlasts a call while the machine is held;
# results go to $OUT, and come back also when a call is stopped at its limit. `first` answers the most
# important questions alone; `second` trains, and needs what `first` carried.
set -euo pipefail
cd "$(dirname "$0")/../.."
STEP=${1:?STEP is first or second}
STATE=${STATE:-/tmp/cellseg_gpu}
OUT=${OUT:-$STATE/out}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}                        # cpu: to try the script where there is no GPU
FOLDS=${FOLDS:-configs/gpu/fold*.py}
ITERS=${ITERS:-600}                           # choose it from the first call's seconds a step
SECONDS_FIRST=${SECONDS_FIRST:-210}           # no benchmark begins after this
SECONDS_TRAIN=${SECONDS_TRAIN:-330}
SECONDS_TEST=${SECONDS_TEST:-110}
DEVICES=${DEVICES-0,0,0,0,0}                  # five folds at once on one card
# bf16 has the range of fp32 and needs no loss scale; docs/gpu.md says why not fp16
AMP=${AMP-optim_wrapper.type=AmpOptimWrapper optim_wrapper.dtype=bfloat16 optim_wrapper.loss_scale=1.0}
export CELLSEG_DATA=$STATE/data PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
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
}

need() {  # need NUMBER GLOB: stop unless so many files are there
  local n
  n=$(compgen -G "$2" | wc -l || true)
  if [ "$n" -lt "$1" ]; then
    echo "error: $2: $n files, $1 are needed; the machine is new: repeat from the first call on" >&2
    exit 2
  fi
}

try() {  # try SECONDS NAME COMMAND...: go on when it fails; begin nothing after SECONDS_FIRST
  local limit=$1 name=$2
  shift 2
  if [ "$SECONDS" -ge "$SECONDS_FIRST" ]; then
    say "$name: left out, no time"
    return
  fi
  say "$name"
  # through a file: a killed benchmark's workers would hold a pipe open, and the call would hang
  timeout -k 5 "$limit" "$@" > "$OUT/$name.log" 2>&1 || say "$name failed or was stopped, see its log"
  grep -v -e 'OneDL' -e 'annotations into' -e 'Done (t' -e '^creating' -e '^index created' \
    "$OUT/$name.log" | tail -n 25 || true
}

bench() {  # bench NAME SCRIPT WORDS...
  local name=$1 script=$2
  shift 2
  try "${BENCH_LIMIT:-45}" "$name" "$PYTHON" "benchmarks/$script.py" --data "$CELLSEG_DATA" \
    --device "$DEVICE" "$@"
}

cv() {  # a schedule of another length must also end elsewhere
  # shellcheck disable=SC2086
  "$PYTHON" tools/cross_validate.py $FOLDS --work-root "$STATE/work_dirs" ${DEVICES:+--gpus "$DEVICES"} \
    --cfg-options train_cfg.max_iters="$ITERS" param_scheduler.1.end="$ITERS" \
    param_scheduler.1.T_max="$ITERS" $AMP ${EXTRA:-}
}

cv_for() {  # cv_for SECONDS: SIGINT stops the tools as Ctrl-C does, and the same command goes on
  timeout -k 20 -s INT "$1" bash -c "$(declare -f cv); $(declare -p PYTHON FOLDS STATE DEVICES ITERS AMP)
    EXTRA='${EXTRA:-}'; cv" || say "stopped with status $? (124 or 137: at its time)"
}

bring_back() {
  say 'collecting results'
  find "$STATE/work_dirs" \( -name '*.log' -o -name 'scalars.json' -o -name '*.scores.json' \
    -o -name 'finished.json' -o -name 'inference.json' -o -name '*.html' \) -print0 \
    2> /dev/null | tar czf "$OUT/logs.tgz" --null -T - || true
  find "$STATE/work_dirs" -name 'val.predictions.npz' -print0 2> /dev/null |
    tar cf "$OUT/oof.tar" --null -T - || true
  find "$STATE/work_dirs" -path '*ensemble*' -name '*.zip' -exec cp {} "$OUT/" \; || true
  find "$OUT" -size +16M -exec sh -c 'echo "too large to come back: $1" && ls -l "$1"' _ {} \;
  ls -l "$OUT"
}

take_in
"$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA")'
case $STEP in
  first)
    need 1 "$CELLSEG_DATA/train/*/image.tif"
    if [ "$DEVICE" = cuda ]; then
      export CELLSEG_REQUIRE_GPU=1
    else
      export CELLSEG_TEST_DEVICE=$DEVICE
    fi
    try "${TESTS_LIMIT:-75}" test_cuda "$PYTHON" -m pytest -q -x -p no:cacheprovider -m gpu \
      tests/whole/test_cuda.py
    if [ -f "$CELLSEG_DATA/trained.pth" ]; then
      TRAINED=${TRAINED:-configs/laptop-quick/fold0.py}
      try "${BENCH_LIMIT:-45}" same_cells "$PYTHON" benchmarks/gpu/same_cells.py "$TRAINED" \
        "$CELLSEG_DATA/trained.pth" "$CELLSEG_DATA" --device "$DEVICE"
    fi
    GPU=(--configs "${GPU_CONFIG:-configs/gpu/fold0.py}" --size "${SIZE:-512}" --scale 2 --batch "${BATCH:-8}"
      --images 12 --workers "${WORKERS:-6}" --repeats "${REPEATS:-10}" --warm-up 3 --no-peak)
    bench train_bf16_channels_last train_step "${GPU[@]}" --amp bf16 --channels-last
    bench train_fp32 train_step "${GPU[@]}"
    bench test_fp32 test_step --configs "${GPU_CONFIG:-configs/gpu/fold0.py}" --size 0 \
      --images "${IMAGES:-8}" --workers 4 --repeats 2
    bench train_bf16 train_step "${GPU[@]}" --amp bf16
    R50=(--configs configs/fold0.py --size "${SIZE_R50:-1024}" --scale 2 --batch "${BATCH_R50:-4}" --images 12
      --workers "${WORKERS:-6}" --repeats "${REPEATS:-10}" --warm-up 3)
    bench train_r50_bf16_channels_last train_step "${R50[@]}" --amp bf16 --channels-last --no-peak
    bench train_r50_fp32 train_step "${R50[@]}"
    ;;
  second)
    need "${N_TRAIN:-155}" "$CELLSEG_DATA/train/*/image.tif"
    need "${N_TEST:-93}" "$CELLSEG_DATA/test_release/*.tif"
    "$PYTHON" tools/prepare_data.py "$CELLSEG_DATA" --groups-csv "$CELLSEG_DATA/manifest.csv" \
      --group-column patient | tail -n 3
    say 'training'
    cv_for "$SECONDS_TRAIN"
    say 'what is left: testing, scores, ensemble, report'
    cv_for "$SECONDS_TEST"
    bring_back
    ;;
  *)
    echo "error: STEP is $STEP; expected first or second" >&2
    exit 2
    ;;
esac
say 'done'
