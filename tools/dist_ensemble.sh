#!/usr/bin/env bash
# Ensemble on several GPUs: tools/dist_ensemble.sh GPUS CONFIG... [options of tools/ensemble.py]
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
set -euo pipefail
USAGE="usage: tools/dist_ensemble.sh GPUS CONFIG... [options of tools/ensemble.py]"
GPUS=${1:?"$USAGE"}
: "${2:?"$USAGE"}"
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    --nproc_per_node="$GPUS" \
    "$(dirname "$0")/ensemble.py" "${@:2}" --launcher pytorch
