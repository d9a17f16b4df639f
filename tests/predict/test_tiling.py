"""Tiled equals whole, exactly, for a detector that sees in a tile what is there."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from cellseg_mm.core import rle
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet, concatenate
from cellseg_mm.core.windows import crop_to
from cellseg_mm.predict import tiling
from cellseg_mm.predict.tiling import (
    StitchParams,
    StitchReport,
    Tile,
    _union,
    move_to_image,
    plan_tiles,
    stitch,
)


def label_set(label_map: np.ndarray, seed: int = 0, n_classes: int = 3) -> InstanceSet:
    """Instances of a label map with any ids, random classes, and scores of which some are equal."""
    rng = np.random.default_rng(seed)
    _, compact = np.unique(label_map, return_inverse=True)
    compact = compact.reshape(label_map.shape) + (0 if (label_map == 0).any() else 1)
    n = int(compact.max())
    found = InstanceSet.from_label_layers(
        'whole',
        5,
        compact[None].astype(np.int32),
        np.zeros(n, dtype=np.int64),
        rng.integers(0, n_classes, n),
    )
    return replace(found, scores=(rng.integers(1, 8, n) / 8).astype(np.float32))


def paint_cells(
    image_hw: tuple[int, int], n: int, size_px: tuple[int, int], seed: int
) -> np.ndarray:
    """Ellipses of ``size_px`` (least, most) sides, in one piece; they touch but do not overlap."""
    rng = np.random.default_rng(seed)
    label_map = np.zeros(image_hw, dtype=np.int32)
    for k in range(1, n + 1):
        h, w = rng.integers(size_px[0], size_px[1] + 1, 2)
        y0, x0 = rng.integers(-h // 2, image_hw[0]), rng.integers(-w // 2, image_hw[1])
        y, x = np.mgrid[0:h, 0:w]
        disc = ((y - (h - 1) / 2) / (h / 2)) ** 2 + ((x - (w - 1) / 2) / (w / 2)) ** 2 <= 1
        y, x = y[disc] + y0, x[disc] + x0
        ok = (y >= 0) & (x >= 0) & (y < image_hw[0]) & (x < image_hw[1])
        y, x = y[ok], x[ok]
        new = np.zeros(image_hw, dtype=bool)
        new[y, x] = label_map[y, x] == 0
        parts, n_parts = ndimage.label(new, structure=np.ones((3, 3)))
        if n_parts:
            label_map[parts == np.bincount(parts[new]).argmax()] = k
    return label_map


def split(whole: InstanceSet, tiles: list[Tile]) -> list[tuple[InstanceSet, Tile]]:
    """The fake detector: each tile's share of the truth, cut at its borders."""
    return [(crop_to(whole, tile.window_yxyx), tile) for tile in tiles]


def content(instances: InstanceSet) -> list[tuple]:
    fields = (
        instances.rles,
        instances.class_ids,
        instances.scores,
        map(tuple, instances.boxes_xyxy),
    )
    return sorted(zip(*fields, strict=True))


def assert_consistent(report: StitchReport) -> None:
    lost = report.n_duplicates + report.n_parts - report.n_joined + report.n_unconfirmed
    assert report.n_in == report.n_out + lost + report.n_empty


# ------------------------------------------------------------------------------------ plan


@pytest.mark.parametrize('overlap', [0, 1, 7, 16])
@pytest.mark.parametrize('image_hw', [(1, 1), (32, 32), (33, 90), (100, 31), (257, 129)])
def test_tiles_cover_and_cores_share_out(image_hw: tuple[int, int], overlap: int) -> None:
    tiles = plan_tiles(image_hw, 32, overlap)
    owned = np.zeros(image_hw, dtype=int)
    for tile in tiles:
        y0, x0, y1, x1 = tile.window_yxyx
        top, left, bottom, right = tile.core_yxyx
        assert 0 <= y0 <= top < bottom <= y1 <= image_hw[0]
        assert 0 <= x0 <= left < right <= x1 <= image_hw[1]
        assert tile.hw == (min(32, image_hw[0]), min(32, image_hw[1]))
        owned[top:bottom, left:right] += 1
        # an inner border is at least half an overlap away from the core
        assert y0 == 0 or top - y0 >= overlap // 2
        assert y1 == image_hw[0] or y1 - bottom >= overlap // 2
    assert (owned == 1).all()
    columns = sorted({(t.window_yxyx[1], t.window_yxyx[3]) for t in tiles})
    for (_, end), (start, _) in itertools.pairwise(columns):
        assert end - start >= overlap


def test_plan_of_a_known_size() -> None:
    # 100 px in tiles of 40 with 10 overlap: stride 30, 3 tiles, at 0, 30, 60
    tiles = plan_tiles((40, 100), 40, 10)
    assert [t.window_yxyx[1] for t in tiles] == [0, 30, 60]
    assert [t.core_yxyx[1::2] for t in tiles] == [(0, 35), (35, 65), (65, 100)]


@pytest.mark.parametrize(('tile', 'overlap'), [(0, 0), (64, 33), (64, -1)])
def test_impossible_plans(tile: int, overlap: int) -> None:
    with pytest.raises(ConfigError, match=r'^tiles: .*expected'):
        plan_tiles((100, 100), tile, overlap)


# ----------------------------------------------------------------------------- coordinates


@pytest.mark.parametrize('seed', range(10))
def test_crop_and_move_back_equal_slicing(seed: int) -> None:
    whole = label_set(paint_cells((40, 53), 25, (3, 20), seed), seed)
    tile = Tile((5, 9, 31, 44), (5, 9, 31, 44))
    cropped = crop_to(whole, tile.window_yxyx)
    masks = whole.masks()
    kept = [i for i in range(len(whole)) if masks[i, 5:31, 9:44].any()]
    assert np.array_equal(cropped.masks(), masks[kept][:, 5:31, 9:44])
    assert cropped.scores.tolist() == whole.scores[kept].tolist()
    back = move_to_image(cropped, tile, (40, 53))
    expected = np.zeros_like(masks[kept])
    expected[:, 5:31, 9:44] = masks[kept][:, 5:31, 9:44]
    assert np.array_equal(back.masks(), expected)
    tight = rle.boxes_of(rle.decode_runs(back.rles, (40, 53)))
    assert np.array_equal(back.boxes_xyxy, tight)


def test_instances_of_another_tile_are_refused() -> None:
    with pytest.raises(ValueError, match='instances of'):
        move_to_image(InstanceSet.empty('a', 1, (3, 4)), Tile((0, 0, 4, 3), (0, 0, 4, 3)), (9, 9))


@pytest.mark.parametrize('seed', range(10))
def test_union_equals_or(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.random((9, 11, 13)) < 0.4
    group_of = np.sort(rng.integers(0, 3, 9))
    group_of = np.unique(group_of, return_inverse=True)[1]
    crops, zeros = list(masks), np.zeros((9, 2), dtype=np.int64)
    runs = rle.runs_from_crops(crops, zeros, (11, 13))
    n = int(group_of.max()) + 1
    expected = np.array([masks[group_of == k].any(axis=0) for k in range(n)])
    expected_rles = rle.encode_crops(list(expected), np.zeros((n, 2), dtype=np.int64), (11, 13))
    assert rle.encode_runs(_union(runs, group_of, n)) == expected_rles


# --------------------------------------------------------------------- tiled equals whole


@pytest.mark.parametrize('overlap', [8, 13, 24])
@pytest.mark.parametrize('image_hw', [(61, 150), (130, 97)])
@pytest.mark.parametrize('seed', range(5))
def test_small_cells(seed: int, image_hw: tuple[int, int], overlap: int) -> None:
    """Sides up to the overlap minus 1: some tile sees each cell whole."""
    whole = label_set(paint_cells(image_hw, 150, (1, overlap - 1), seed), seed)
    tiles = plan_tiles(image_hw, 48, overlap)
    params = StitchParams(margin_px=0)
    found, report = stitch(split(whole, tiles), image_hw, params=params)
    assert content(found) == content(whole)
    assert report.n_joined == report.n_left_cut == 0
    assert report.n_duplicates > 0
    assert_consistent(report)


@pytest.mark.parametrize('margin', [0, 1, 3])
@pytest.mark.parametrize('seed', range(8))
def test_cells_of_every_size(seed: int, margin: int) -> None:
    """Up to several tiles long; parts are joined."""
    image_hw = (140, 171)
    whole = label_set(paint_cells(image_hw, 60, (1, 120), seed), seed)
    tiles = plan_tiles(image_hw, 40, 12)
    found, report = stitch(split(whole, tiles), image_hw, params=StitchParams(margin_px=margin))
    assert content(found) == content(whole)
    assert report.n_joined > 0
    assert report.n_parts >= 2 * report.n_joined
    assert_consistent(report)


@pytest.mark.parametrize('seed', range(4))
def test_seams_are_compared_in_strips_of_any_size(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = label_set(paint_cells((130, 97), 60, (3, 50), seed), seed)
    parts = split(whole, plan_tiles((130, 97), 48, 20))
    expected, report = stitch(parts, (130, 97))
    monkeypatch.setattr(tiling, 'STRIP', 3)
    found, same_report = stitch(parts, (130, 97))
    assert (content(found), same_report) == (content(expected), report)


@pytest.mark.parametrize('seed', range(4))
def test_windows_that_a_box_meets_are_counted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tiles = plan_tiles((130, 97), 32, 12)
    tiles = [tile for tile in tiles if rng.random() < 0.6]  # the others were not looked at
    low = rng.integers(0, (130, 97), (200, 2))
    boxes = np.concatenate([low, low + rng.integers(1, 40, (200, 2))], axis=1)
    for unit, sides in ((1, 'window_yxyx'), (2, 'core_yxyx')):
        windows = np.array([getattr(tile, sides) for tile in tiles])
        y0, x0, y1, x1 = (windows * unit).T
        meets = (boxes[:, :1] < y1) & (boxes[:, 2:3] > y0) & (boxes[:, 1:2] < x1)
        meets &= boxes[:, 3:] > x0
        assert np.array_equal(tiling._Grid(windows).count(boxes, unit), meets.sum(axis=1))
        points = low[:, [0, 1, 0, 1]]
        inside = (low[:, :1] >= y0) & (low[:, :1] < y1) & (low[:, 1:] >= x0) & (low[:, 1:] < x1)
        assert np.array_equal(tiling._Grid(windows).count(points, unit), inside.sum(axis=1))


def test_a_cell_in_the_core_of_a_tile_that_was_not_looked_at_is_kept_once() -> None:
    tiles = plan_tiles((40, 100), 40, 20)  # at 0, 20, 40, 60; cores end at 30, 50, 70
    assert [t.core_yxyx[1::2] for t in tiles] == [(0, 30), (30, 50), (50, 70), (70, 100)]
    label_map = np.zeros((40, 100), dtype=np.int32)
    label_map[5:15, 31:38] = 1  # seen whole by the first two tiles, and of the second's core
    label_map[20:30, 51:58] = 2  # of the third's core; the second and the third see it
    whole = label_set(label_map)
    for looked_at in ([0, 2, 3], [0, 1, 3], [0, 1, 2, 3], [0, 3, 1]):
        found, report = stitch(split(whole, [tiles[k] for k in looked_at]), (40, 100))
        assert content(found) == content(whole)
        assert report.n_unconfirmed == 0


def test_a_cell_in_the_corner_of_four_tiles() -> None:
    tiles = plan_tiles((56, 56), 32, 8)
    assert len(tiles) == 4
    for y in range(12, 40):
        for x in range(12, 40):
            label_map = np.zeros((56, 56), dtype=np.int32)
            label_map[y : y + 7, x : x + 4] = 1
            label_map[y : y + 2, x : x + 6] = 1  # no symmetric shape
            whole = label_set(label_map)
            found, report = stitch(split(whole, tiles), (56, 56))
            assert content(found) == content(whole), (y, x)
            assert_consistent(report)


def test_touching_cells_of_one_class_stay_apart() -> None:
    """Columns of 3 px that touch, all across the seams: nothing may be glued together."""
    label_map = np.repeat(np.arange(1, 41), 3)[None, :].repeat(90, axis=0)
    whole = label_set(label_map, n_classes=1)
    tiles = plan_tiles(label_map.shape, 40, 10)
    found, report = stitch(split(whole, tiles), label_map.shape)
    assert content(found) == content(whole)
    assert report.n_joined == 40  # each is 90 px high, two tiles and more


def test_a_ring_around_tiles_is_joined() -> None:
    """Parts that meet only by way of other tiles; the middle tile sees nothing of it."""
    label_map = np.ones((100, 100), dtype=np.int32)
    label_map[3:97, 3:97] = 0
    label_map[50, 50] = 2
    whole = label_set(label_map)
    tiles = plan_tiles((100, 100), 40, 10)
    found, report = stitch(split(whole, tiles), (100, 100))
    assert content(found) == content(whole)
    assert report.n_joined == 1
    assert report.n_parts == 8


@pytest.mark.parametrize('seed', range(3))
def test_order_of_tiles_changes_nothing(seed: int) -> None:
    image_hw = (100, 120)
    whole = label_set(paint_cells(image_hw, 60, (2, 40), seed), seed)
    tiles = split(whole, plan_tiles(image_hw, 40, 12))
    found, report = stitch(tiles, image_hw, name='a', image_id=3)
    mixed = [tiles[i] for i in np.random.default_rng(seed).permutation(len(tiles))]
    again, report_again = stitch(mixed, image_hw, name='a', image_id=3)
    assert (found.rles, found.scores.tolist()) == (again.rles, again.scores.tolist())
    assert report == report_again
    assert (found.name, found.image_id) == ('a', 3)
    assert (np.diff(found.scores) <= 0).all()


def test_overlapping_cells_and_two_classes_for_one_cell() -> None:
    """What the detector itself leaves overlapping stays: one mask twice, in two classes."""
    label_map = paint_cells((80, 80), 40, (3, 11), 1)
    first = label_set(label_map, 1, n_classes=1)
    second = replace(first, class_ids=first.class_ids + 1, scores=first.scores / 2)
    whole = concatenate([first, second])
    found, _ = stitch(split(whole, plan_tiles((80, 80), 40, 14)), (80, 80))
    assert content(found) == content(whole)


def test_one_tile_is_the_whole() -> None:
    whole = label_set(paint_cells((30, 37), 12, (3, 9), 0))
    found, report = stitch(split(whole, plan_tiles((30, 37), 64, 16)), (30, 37))
    assert content(found) == content(whole)
    assert (report.n_tiles, report.n_duplicates, report.n_left_cut) == (1, 0, 0)


def test_nothing_in_nothing_out() -> None:
    for tiles in ([], split(InstanceSet.empty('a', 1, (90, 90)), plan_tiles((90, 90), 40, 10))):
        found, report = stitch(tiles, (90, 90), name='a', image_id=1)
        assert len(found) == report.n_in == report.n_out == 0
        assert found.image_hw == (90, 90)


def test_extras_follow_their_cells_and_probabilities_are_dropped() -> None:
    whole = label_set(paint_cells((80, 80), 40, (3, 11), 2), 2)
    n = len(whole)
    extra = {'n_votes': np.arange(n), 'mask_probs': np.zeros((n, 2, 2), np.float16)}
    whole = replace(whole, extra=extra)
    found, _ = stitch(split(whole, plan_tiles((80, 80), 40, 14)), (80, 80))
    assert list(found.extra) == ['n_votes']
    by_votes = dict(zip(found.extra['n_votes'].tolist(), found.rles, strict=True))
    assert by_votes == dict(enumerate(whole.rles))


# ------------------------------------------------------ detectors that differ between tiles

SEAM = plan_tiles((40, 70), 40, 10)  # windows 0..40 and 30..70, cores meet at 35


def square(x0: int, x1: int, tile: Tile, score: float, class_id: int = 0) -> InstanceSet:
    """A cell of rows 10 to 20 and the given columns of the image, as a tile sees it."""
    left = tile.window_yxyx[1]
    return InstanceSet.from_crops(
        'a',
        1,
        tile.hw,
        crops=[np.ones((10, x1 - x0), dtype=bool)],
        offsets_yx=np.array([[10, x0 - left]]),
        class_ids=np.array([class_id]),
        scores=np.array([score]),
    )


def seam(left: list[InstanceSet], right: list[InstanceSet]) -> tuple[InstanceSet, StitchReport]:
    none = InstanceSet.empty('a', 1, (40, 40))
    sets = [concatenate([none, *left]), concatenate([none, *right])]
    found, report = stitch(zip(sets, SEAM, strict=True), (40, 70))
    assert_consistent(report)
    return found, report


def columns(found: InstanceSet) -> list[list[int]]:
    return sorted(found.boxes_xyxy[:, [0, 2]].astype(int).tolist())


def test_the_tile_whose_core_it_is_decides() -> None:
    found, report = seam([square(32, 37, SEAM[0], 0.5)], [square(32, 36, SEAM[1], 0.9)])
    assert columns(found) == [[32, 37]]  # centre 34.5 is left of 35, and the other's 34 too
    assert report.n_duplicates == 1


def test_a_cell_that_each_tile_gives_to_the_other_is_kept_once() -> None:
    # the left tile sees 33..39 (centre 36, the right one's), the right tile 32..37 (centre 34.5)
    found, report = seam([square(33, 39, SEAM[0], 0.5)], [square(32, 37, SEAM[1], 0.6)])
    assert columns(found) == [[32, 37]]
    assert report.n_duplicates == 1


def test_a_cell_that_both_claim_is_kept_once() -> None:
    found, _ = seam([square(31, 37, SEAM[0], 0.5)], [square(32, 39, SEAM[1], 0.6)])
    assert columns(found) == [[32, 39]]  # centres 34 and 35.5; the better score stays


def test_a_cell_outside_the_core_needs_the_owner_to_see_it() -> None:
    found, report = seam([square(34, 38, SEAM[0], 0.9)], [])
    assert len(found) == 0
    assert report.n_unconfirmed == 1


def test_a_cut_fragment_yields_to_the_whole_cell() -> None:
    # the left tile's border is at 40
    found, report = seam([square(36, 40, SEAM[0], 0.9)], [square(36, 44, SEAM[1], 0.3)])
    assert columns(found) == [[36, 44]]
    assert found.scores.tolist() == [np.float32(0.3)]
    assert report.n_duplicates == 1


def test_a_cut_cell_that_nobody_else_saw_is_kept_if_it_is_owned() -> None:
    found, report = seam([square(20, 40, SEAM[0], 0.9)], [])
    assert columns(found) == [[20, 40]]
    assert report.n_left_cut == 1
    found, report = seam([square(37, 40, SEAM[0], 0.9)], [])
    assert len(found) == 0
    assert report.n_unconfirmed == 1


def test_parts_of_a_long_cell_are_joined_and_the_best_part_names_it() -> None:
    found, report = seam([square(10, 40, SEAM[0], 0.4)], [square(30, 60, SEAM[1], 0.8)])
    assert columns(found) == [[10, 60]]
    assert found.areas.tolist() == [500]
    assert found.scores.tolist() == [np.float32(0.8)]
    assert (report.n_joined, report.n_parts) == (1, 2)


def test_parts_of_different_classes_are_not_joined() -> None:
    found, _ = seam([square(10, 40, SEAM[0], 0.4, 0)], [square(30, 60, SEAM[1], 0.8, 1)])
    assert columns(found) == [[10, 40], [30, 60]]


def test_masks_without_pixels_are_counted() -> None:
    hollow = replace(
        square(3, 5, SEAM[0], 0.4),
        rles=tuple(rle.encode_crops([np.zeros((0, 0), bool)], np.zeros((1, 2)), (40, 40))),
    )
    found, report = seam([hollow], [])
    assert (len(found), report.n_empty) == (0, 1)


@pytest.mark.parametrize('bad', [{'iou_thr': 0.0}, {'inside_thr': 1.5}, {'margin_px': -1}])
def test_impossible_thresholds(bad: dict) -> None:
    with pytest.raises(ConfigError, match=r'stitching: .*expected'):
        StitchParams(**bad)
