#!/usr/bin/env bash
# Score a fold on several GPUs: tools/dist_test.sh CONFIG CHECKPOINT|best GPUS [options of tools/test.py]
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
set -euo pipefail
USAGE="usage: tools/dist_test.sh CONFIG CHECKPOINT|best GPUS [options of tools/test.py]"
CONFIG=${1:?"$USAGE"}
CHECKPOINT=${2:?"$USAGE"}
GPUS=${3:?"$USAGE"}
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    --nproc_per_node="$GPUS" \
    "$(dirname "$0")/test.py" "$CONFIG" "$CHECKPOINT" --launcher pytorch "${@:4}"
