"""Multi-class cell instance segmentation on MMDetection.

TIFF folders -> label maps -> folds -> dataset -> transforms (label maps stay label maps)
-> Mask R-CNN -> instances as RLE (never N full-size masks) -> scores / out-of-fold pool
-> fold fusion -> submission, exports, report

Importing this package costs nothing and pulls in nothing heavy. It only arranges that a later
``import mmcv._ext`` finds NMS and RoIAlign when mmcv was installed without compiled ops
(see :mod:`cellseg_mm.runtime`). ``cellseg_mm.components`` registers everything that configs name.
"""

from __future__ import annotations

from cellseg_mm import runtime

__version__ = '0.1.0'

runtime.provide_mmcv_ops()
