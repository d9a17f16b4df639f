"""scores.table: the numbers of the record, with what was left out beside them."""

from __future__ import annotations

import dataclasses
import re

import pytest

from cellseg_mm.scores.score import score
from cellseg_mm.scores.table import score_table
from tests.support.scored_sets import NAMES, PARAMS, random_sets


def rows_of(table: str, title: str) -> dict[str, list[str]]:
    """Name and cells of each row of the block that begins with ``title``."""
    block = next(block for block in table.split('\n\n') if block.startswith(title))
    lines = [re.split(r'  +', line) for line in block.splitlines()]
    assert lines[0][2:] == list(NAMES)
    return {name: cells for name, *cells in lines}


@pytest.mark.parametrize('seed', range(5))
def test_rows_hold_the_scores(seed: int) -> None:
    _, gts, preds = random_sets(seed)
    scores = score(gts, preds, NAMES, dataclasses.replace(PARAMS, n_bootstrap=10))
    table = score_table(scores)
    counted = rows_of(table, 'pooled')
    low, high = scores.intervals['mPQ']
    values = [scores.mpq, *scores.counted[0].pq]
    assert counted['PQ (mean: mPQ+)'] == [*(f'{v:.4f}' for v in values), f'[{low:.3f}, {high:.3f}]']
    assert counted['AJI mean of images'] == [f'{scores.aji_image_mean:.4f}']
    ap = rows_of(table, 'AP at cap')
    segm = [scores.segm.mean('ap')[0], *scores.segm.ap[:, 0]]
    assert ap[f'segm AP @{scores.cap}'][: len(segm)] == [f'{value:.4f}' for value in segm]
    errors = rows_of(table, 'errors')
    for name, of_classes in zip(scores.error_names, scores.errors.sum(axis=2), strict=True):
        assert errors[name] == [str(int(n)) for n in (of_classes.sum(), *of_classes)]


def test_columns_of_a_block_end_at_one_place() -> None:
    _, gts, preds = random_sets(1)
    for block in score_table(score(gts, preds, NAMES, PARAMS)).split('\n\n')[1:]:
        head, *rows = block.splitlines()
        ends = [match.end() for match in re.finditer(r'\S+(?: \S+)*', head)][1:]
        for row in rows:
            cells = [m.end() for m in re.finditer(r'(?<=  )[^\s\[]\S*', row)]
            assert cells == ends[: len(cells)]
