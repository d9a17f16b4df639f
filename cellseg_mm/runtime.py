"""What makes the stock OpenMMLab stack run anywhere (being written)."""

from __future__ import annotations


def provide_mmcv_ops() -> None:
    """Placeholder until the runtime lands."""
