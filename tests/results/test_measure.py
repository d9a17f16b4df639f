"""results.measure: features equal to scikit-image's, in blocks and far from the origin."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.measure import regionprops

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.results import measure
from tests.support.odd_masks import (
    SETS,
    SHAPES,
    crop_of,
    make_set,
    random_set,
)


def as_ids(instances: InstanceSet) -> np.ndarray:
    """Each mask of a set without overlaps as its own label map, for regionprops."""
    return instances.masks().astype(np.int32)


@pytest.mark.parametrize('instances', SETS)
def test_features_equal_scikit_image(instances: InstanceSet) -> None:
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (*instances.image_hw, 3)).astype(np.uint8)
    found = measure.measure(instances, image)
    for i, label_map in enumerate(as_ids(instances)):
        if not label_map.any():
            assert found.areas[i] == 0
            assert np.isnan(found.centroids_yx[i]).all()
            assert np.isnan([found.perimeters[i], found.eccentricities[i]]).all()
            assert np.isnan(found.mean_intensities[i]).all()
            continue
        (props,) = regionprops(label_map, intensity_image=image)
        top, left, bottom, right = props.bbox
        assert found.areas[i] == props.area
        assert found.boxes_xyxy[i].tolist() == [left, top, right, bottom]
        np.testing.assert_allclose(found.centroids_yx[i], props.centroid, rtol=1e-12)
        np.testing.assert_allclose(found.perimeters[i], props.perimeter, rtol=1e-12)
        # sqrt(1 - small / large) turns an error of 1e-15 into one of 3e-8 near a disc
        np.testing.assert_allclose(found.eccentricities[i], props.eccentricity, atol=1e-7)
        np.testing.assert_allclose(found.mean_intensities[i], props.intensity_mean, rtol=1e-12)


def test_features_do_not_lose_digits_far_from_the_origin() -> None:
    crop = crop_of(SHAPES['F'])
    near = make_set([crop], [(0, 0)], image_hw=(20_000, 20_000))
    far = make_set([crop], [(19_990, 19_990)], image_hw=(20_000, 20_000))
    a, b = measure.measure(near), measure.measure(far)
    assert a.eccentricities == b.eccentricities
    assert a.perimeters == b.perimeters
    assert (b.centroids_yx - a.centroids_yx == 19_990).all()


def test_regions_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, 'BLOCK_PX', 16)
    instances = random_set(1, n=40)
    image = np.random.default_rng(0).integers(0, 256, (60, 71, 3)).astype(np.uint8)
    largest = []

    def read(y0: int, x0: int, y1: int, x1: int) -> np.ndarray:
        largest.append((y1 - y0) * (x1 - x0))
        return image[y0:y1, x0:x1]

    by_blocks = measure.measure(instances, read).mean_intensities
    np.testing.assert_array_equal(by_blocks, measure.measure(instances, image).mean_intensities)
    assert max(largest) <= (16 + 13 * 2) ** 2  # a block and the cells that reach out of it


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    instances = random_set(2, n=40)
    image = np.random.default_rng(0).integers(0, 256, (60, 71, 3)).astype(np.uint8)
    whole = measure.measure(instances, image)
    monkeypatch.setattr(measure, 'CHUNK', 7)
    monkeypatch.setattr(measure, 'BLOCK_PX', 16)
    pieces = measure.measure(instances, image)
    for name in measure.CellFeatures.__slots__:
        np.testing.assert_array_equal(getattr(whole, name), getattr(pieces, name), err_msg=name)


def test_features_of_an_image_of_another_size() -> None:
    with pytest.raises(ValueError, match='image has shape'):
        measure.measure(random_set(0), np.zeros((3, 3, 3), np.uint8))
