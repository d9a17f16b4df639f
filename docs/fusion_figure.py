"""Draws docs/fusion.svg: five members' outlines, who is grouped with whom, and the fused masks.

    python docs/fusion_figure.py [OUT.svg]

The masks are ellipses set down here; everything else is computed by ``cellseg_mm.fusion.fuse``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import files, rle
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.fusion import fuse as fusion
from cellseg_mm.fusion.clusters import mask_pairs, one_per_member
from cellseg_mm.fusion.pool import pool_members

HW = (150, 220)
GAP = 24
MEMBER_COLOURS = ('#1b6ca8', '#d1495b', '#3a7d44', '#8e5ea2', '#c77d0a')
CLUSTER_COLOURS = ('#1b6ca8', '#c77d0a', '#3a7d44', '#8a8a8a')

# Per member: centre x, centre y, radius x, radius y, score. Two cells touch, one is seen by two
# members only, one by a single member.
MEMBERS = (
    ((60, 60, 34, 26, 0.95), (124, 64, 30, 28, 0.90), (180, 120, 16, 14, 0.60)),
    ((63, 57, 30, 28, 0.90), (121, 67, 33, 26, 0.92)),
    ((57, 63, 36, 24, 0.85), (126, 60, 28, 30, 0.80), (178, 122, 18, 13, 0.50)),
    ((61, 62, 31, 29, 0.88), (122, 66, 30, 27, 0.85), (52, 128, 14, 10, 0.40)),
    ((64, 58, 35, 27, 0.70),),
)


def make_members() -> list[InstanceSet]:
    """Return the members' ellipses as instance sets."""
    ys, xs = np.mgrid[: HW[0], : HW[1]] + 0.5
    sets = []
    for cells in MEMBERS:
        masks = [((xs - x) / a) ** 2 + ((ys - y) / b) ** 2 <= 1 for x, y, a, b, _ in cells]
        sets.append(
            InstanceSet.from_crops(
                'figure',
                1,
                HW,
                crops=masks,
                offsets_yx=np.zeros((len(cells), 2), dtype=np.int64),
                class_ids=np.zeros(len(cells), dtype=np.int64),
                scores=np.array([cell[4] for cell in cells], dtype=np.float32),
            )
        )
    return sets


def outline(mask: NDArray[np.bool_]) -> str:
    """Return the outer contour as an SVG path."""
    contours, _ = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    parts = []
    for contour in contours:
        points = ' L'.join(f'{x} {y}' for x, y in contour[:, 0].tolist())
        parts.append(f'M{points}Z')
    return ' '.join(parts)


def path(mask: NDArray[np.bool_], colour: str, *, fill: float = 0.0) -> str:
    """Return a mask's outline, perhaps filled."""
    return (
        f'<path d="{outline(mask)}" fill="{colour}" fill-opacity="{fill}" '
        f'stroke="{colour}" stroke-width="1.2"/>'
    )


def text(x: float, y: float, words: str, *, size: int = 9, anchor: str = 'start') -> str:
    """Return words at a place."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">{words}</text>'


def members_panel(members: list[InstanceSet]) -> list[str]:
    """Draw every member in its colour."""
    lines = []
    for member, colour in zip(members, MEMBER_COLOURS, strict=True):
        lines += [path(mask, colour) for mask in member.masks()]
    for i, colour in enumerate(MEMBER_COLOURS):
        lines.append(f'<rect x="{6 + 42 * i}" y="4" width="7" height="7" fill="{colour}"/>')
        lines.append(text(16 + 42 * i, 11, f'fold {i}', size=8))
    return lines


def clusters_panel(members: list[InstanceSet]) -> list[str]:
    """Draw every instance in the colour of its cluster."""
    pool = pool_members(members)
    rule = fusion.from_spec('soft_mask')
    runs = rle.decode_runs(pool.instances.rles, HW)
    pairs = mask_pairs(runs, pool.instances.class_ids).above(rule.iou_thr)
    clusters = one_per_member(pairs, pool.member_of)
    masks = pool.instances.masks()
    return [
        path(mask, CLUSTER_COLOURS[cluster], fill=0.08)
        for mask, cluster in zip(masks, clusters.owner.tolist(), strict=True)
    ]


def fused_panel(members: list[InstanceSet]) -> list[str]:
    """Draw the fused masks, overlaps resolved, with what is known about each."""
    post = fusion.PostProcess(disjoint=True)
    fused = fusion.fuse(members, fusion.from_spec('soft_mask'), post)
    lines = []
    for i, mask in enumerate(fused.masks()):
        x1, y1, x2, y2 = fused.boxes_xyxy[i].tolist()
        votes, uncertainty = fused.extra['n_votes'][i], fused.extra['mask_uncertainty'][i]
        lines.append(path(mask, CLUSTER_COLOURS[i], fill=0.25))
        middle = (x1 + x2) / 2
        for line, words in enumerate(
            (f'score {fused.scores[i]:.2f}', f'{votes} of {len(members)}', f'u {uncertainty:.2f}')
        ):
            y = (y1 + y2) / 2 + 9 * line - 6 if x2 - x1 > 40 else y1 - 22 + 9 * line
            lines.append(text(middle, y, words, size=8, anchor='middle'))
    return lines


def draw() -> str:
    """Return the whole picture."""
    members = make_members()
    panels = (
        ('five members', members_panel(members)),
        ('clusters: mask IoU above 0.5, one per member', clusters_panel(members)),
        ('fused: score, votes, uncertainty u', fused_panel(members)),
    )
    width, height = 3 * HW[1] + 4 * GAP, HW[0] + 2 * GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, (title, drawing) in enumerate(panels):
        lines.append(f'<g transform="translate({GAP + i * (HW[1] + GAP)} {GAP + 4})">')
        lines.append(text(0, -8, title, size=10))
        lines.append(f'<rect width="{HW[1]}" height="{HW[0]}" fill="none" stroke="#bbb"/>')
        lines += drawing
        lines.append('</g>')
    return '\n'.join([*lines, '</svg>', ''])


if __name__ == '__main__':
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name('fusion.svg')
    files.write_text(out, draw())
    print(out)
