"""data.preparing.case_checks: every warning; parts and doubles equal slow loops."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_mm.data.labels import find_cases
from cellseg_mm.data.preparing import prepare
from cellseg_mm.data.preparing.case_checks import check_case
from cellseg_mm.data.preparing.likeness import near_duplicates
from cellseg_mm.data.preparing.text import (
    full_text,
)
from tests.support.prepared_cases import HW, PARAMS, cell_map, facts_of, kinds, picture, write_case


def slow_n_in_parts(label_map: np.ndarray) -> int:
    """Flood fill with eight neighbours, pixel by pixel."""
    n = 0
    for value in set(label_map[label_map > 0].tolist()):
        todo = {(int(y), int(x)) for y, x in np.argwhere(label_map == value)}
        queue = deque([todo.pop()])
        while queue:
            y, x = queue.popleft()
            near = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            for spot in near:
                if spot in todo:
                    todo.remove(spot)
                    queue.append(spot)
        n += bool(todo)
    return n


@pytest.mark.parametrize('seed', range(8))
def test_parts_and_small_cells_equal_a_flood_fill(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sparse = rng.integers(1, 60, HW) * (rng.random(HW) < 0.02)
    blocks = np.kron(rng.integers(0, 30, (8, 13)), np.ones((5, 5), int))[: HW[0], : HW[1]]
    maps = [sparse, np.where(rng.random(HW) < 0.9, blocks + 100 * (blocks > 0), 0)]
    write_case(tmp_path, 'a', class1=maps[0], class2=maps[1])
    (case,) = find_cases(tmp_path, 'train', 2)
    facts = check_case(case, 2)
    by_kind: dict[str, int] = {}
    for warning in facts.warnings:
        by_kind[warning.kind] = by_kind.get(warning.kind, 0) + warning.count
    sizes = [np.unique(m[m > 0], return_counts=True)[1] for m in maps]
    assert facts.counts == tuple(len(s) for s in sizes)
    assert facts.area_sums == tuple(int((m > 0).sum()) for m in maps)
    assert by_kind.get('disconnected instance', 0) == sum(map(slow_n_in_parts, maps))
    assert by_kind.get('1-px instance', 0) == sum(int((s == 1).sum()) for s in sizes)
    assert by_kind.get('px in two classes', 0) == int(((maps[0] > 0) & (maps[1] > 0)).sum())


def test_every_warning(data: Path) -> None:
    write_case(data, 'w parts', class1=cell_map((5, 0, 3, 0, 3), (5, 8, 9, 8, 9)))
    diagonal = cell_map((5, 0, 3, 0, 3), (5, 3, 4, 3, 4))
    write_case(data, 'w corner', class1=diagonal)  # touches at a corner: one part
    write_case(data, 'w 1 px', class1=cell_map((1, 0, 1, 0, 1), (2, 5, 9, 5, 9)))
    write_case(data, 'w shared', class1=cell_map((1, 0, 4, 0, 4)), class2=cell_map((1, 3, 6, 2, 6)))
    write_case(data, 'w no cell', class1=np.zeros(HW), class2=np.zeros(HW))
    write_case(data, 'w half', class1=np.zeros(HW), class2=cell_map((1, 0, 4, 0, 4)))
    folder = write_case(data, 'w blank')
    tifffile.imwrite(folder / 'image.tif', np.full((*HW, 3), 9, np.uint8), photometric='rgb')
    folder = write_case(data, 'w dim')
    tifffile.imwrite(folder / 'image.tif', picture(900).astype(np.uint16), photometric='rgb')
    folder = write_case(data, 'w wide')
    wide = picture(901).astype(np.uint16) * 16  # 12 bits; w dim uses a sixteenth of them
    tifffile.imwrite(folder / 'image.tif', wide, photometric='rgb')
    write_case(data, 'w twin', seed=3)
    write_case(data, 'w leak', seed=100)
    folder = write_case(data, 'w mirrored')
    image = np.clip(picture(5)[::-1].astype(int) + 3, 0, 255).astype(np.uint8)
    tifffile.imwrite(folder / 'image.tif', image, photometric='rgb')
    (folder / 'notes.doc').write_text('x')
    (data / 'train/stray.txt').write_text('x')
    (data / 'exclude.txt').write_text('w typo\n')
    report = prepare.prepare(data, PARAMS)
    assert report.errors == ()
    assert kinds(report) == {
        'disconnected instance': 1,
        '1-px instance': 1,
        'id shared by classes': 1,
        'px in two classes': 2,  # row 3, columns 2 and 3
        'no cell': 1,
        'empty class file': 1,
        'blank image': 1,
        'dim image': 1,
        'duplicate image': 2,
        'test image among the training images': 2,
        'near-duplicate image': 2,
        'unknown name in exclude.txt': 1,
        'note': 2,
        prepare.NO_GROUPS: len(report.train),
    }
    text = full_text(report)
    for name in ('parts', '1 px', 'shared', 'no cell', 'half/class1.tif', 'blank', 'twin', 'leak'):
        assert f'w {name}' in text
    assert 'w corner' not in text
    fold_of = report.folds.fold_of()
    assert fold_of['w twin'] == fold_of['p1-3']
    assert fold_of['w mirrored'] == fold_of['p2-5']


@pytest.mark.parametrize('seed', range(3))
def test_near_duplicates_equal_a_loop_over_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pictures = [rng.integers(0, 256, (16, 16)) for _ in range(12)]
    for i in range(0, 12, 2):  # noise that makes some pairs just match and others not
        turned = np.rot90(pictures[i], i)[:, :: (-1) ** (i // 2)]
        noise = rng.normal(0, 12 * (i + 1) / 2, (16, 16))
        pictures[i + 1] = np.clip(turned + noise, 0, 255).astype(int)
    facts = [facts_of(str(i), p, str(i)) for i, p in enumerate(pictures)]
    expected = []
    for i in range(12):
        for j in range(i + 1, 12):
            best = max(
                np.corrcoef(moved.ravel(), pictures[j].ravel())[0, 1]
                for n in range(4)
                for moved in (np.rot90(pictures[i], n), np.rot90(pictures[i], n)[:, ::-1])
            )
            expected += [(i, j)] if best >= 0.95 else []
    assert 0 < len(expected) < 6
    assert near_duplicates(facts) == expected


@pytest.mark.parametrize('where', ['everywhere', 'diagonals', 'elsewhere'])
def test_near_duplicates_that_look_the_same_from_all_sides(where: str) -> None:
    """Where averaging over turns changes nothing, pairs are as far apart as they may be."""
    rng = np.random.default_rng(3)
    symmetric = []
    for _ in range(2):
        quarter = rng.normal(0, 1, (8, 8))
        half = np.concatenate([quarter + quarter.T, (quarter + quarter.T)[::-1]])
        symmetric.append(np.concatenate([half, half[:, ::-1]], axis=1))
    row, column = np.indices((16, 16))
    on_diagonal = (row == column) | (row + column == 15)
    chosen = {'everywhere': True, 'diagonals': on_diagonal, 'elsewhere': ~on_diagonal}[where]
    base, noise = symmetric[0], np.where(chosen, symmetric[1], 0)
    noise *= np.linalg.norm(base) / np.linalg.norm(noise)
    pictures = {}
    for strength in np.linspace(0.2, 0.5, 301):
        first, second = 128 + 14 * base, 128 + 14 * (base + strength * noise)
        pair = np.rint(np.clip([first, second], 0, 255))
        pictures[float(np.corrcoef(pair[0].ravel(), pair[1].ravel())[0, 1])] = pair
    just_above = min(r for r in pictures if r >= 0.9501)
    just_below = max(r for r in pictures if r < 0.9499)
    assert just_above < 0.953
    for likeness, expected in ((just_above, [(0, 1)]), (just_below, [])):
        facts = [facts_of(str(i), picture, str(i)) for i, picture in enumerate(pictures[likeness])]
        assert near_duplicates(facts) == expected
