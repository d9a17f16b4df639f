"""ROIs arrive as ImageJ fills them; a damaged one costs no other."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import roifile

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.importing.imagej import find_imagej
from cellseg_mm.results import export
from tests.support.import_sources import cells_of_set, read_cells, run, stored, write_image
from tests.support.odd_masks import COLOURS, NAMES, SETS

BOX = np.array([[2, 2], [8, 2], [8, 6], [2, 6]])


def source(folder: Path, rois: dict[str, object], name: str = 'a_RoiSet.zip') -> Path:
    write_image(folder / 'a.png')
    with zipfile.ZipFile(folder / name, 'w') as archive:
        for key, roi in rois.items():
            archive.writestr(key, roi.tobytes() if isinstance(roi, roifile.ImagejRoi) else roi)
    return folder


def roi(kind: int = roifile.ROI_TYPE.POLYGON, **values: object) -> roifile.ImagejRoi:
    made = roifile.ImagejRoi.frompoints(BOX)
    made.roitype = kind
    for key, value in values.items():
        setattr(made, key, value)
    return made


@pytest.mark.parametrize('instances', SETS[:8])
def test_our_own_export_comes_back_pixel_by_pixel(tmp_path: Path, instances: InstanceSet) -> None:
    """Also where a class's name is changed to fit a file's."""
    write_image(tmp_path / 'a.png', instances.image_hw)
    path = tmp_path / 'a.rois.zip'
    export.write_imagej_rois(path, instances, NAMES, class_colours=COLOURS)
    cells, tally = read_cells(find_imagej, tmp_path, class_names=NAMES)
    assert cells == cells_of_set(instances)
    assert not tally.counts()


def test_polygons_of_the_library_lie_between_pixels(tmp_path: Path) -> None:
    points = np.array([[2.25, 2.25], [8.75, 2.25], [8.75, 6.75], [2.25, 6.75]])
    rois = {
        '0001.roi': roifile.ImagejRoi.frompoints(points),  # of the subpixel kind
        '0002.roi': roifile.ImagejRoi.frompoints(BOX + np.array([10, 4])),
    }
    run('imagej', source(tmp_path / 'in', rois), tmp_path / 'out')
    first, second = stored(tmp_path / 'out', 'a')[1]
    assert first.tolist() == np.pad(np.ones((5, 7), bool), ((2, 10), (2, 14))).tolist()
    assert second[6:10, 12:18].all()
    assert second.sum() == 24


@pytest.mark.parametrize(
    ('kind', 'n_pixels'),
    [
        (roifile.ROI_TYPE.RECT, 24),
        (roifile.ROI_TYPE.OVAL, 20),  # its corners are cut
        (roifile.ROI_TYPE.FREEHAND, 24),
        (roifile.ROI_TYPE.TRACED, 24),
    ],
)
def test_kinds_with_an_area(tmp_path: Path, kind: int, n_pixels: int) -> None:
    made = roi(kind, left=2, top=2, right=8, bottom=6)
    if kind in (roifile.ROI_TYPE.RECT, roifile.ROI_TYPE.OVAL):
        made.integer_coordinates, made.n_coordinates = None, 0
    run('imagej', source(tmp_path / 'in', {'x.roi': made}), tmp_path / 'out')
    assert stored(tmp_path / 'out', 'a')[1][0].sum() == n_pixels


def test_curves_of_a_composite_are_followed(tmp_path: Path) -> None:
    made = roifile.ImagejRoi()
    made.roitype = roifile.ROI_TYPE.RECT
    path = [0, 2, 8, 1, 18, 8, 2, 10, -4, 2, 8, 4]  # a line, and a parabola above it
    made.multi_coordinates = np.array(path, dtype=np.float32)
    made.shape_roi_size = len(path)
    run('imagej', source(tmp_path / 'in', {'x.roi': made}), tmp_path / 'out')
    n_pixels = stored(tmp_path / 'out', 'a')[1][0].sum()
    assert abs(n_pixels - 2 / 3 * 16 * 6) < 5


def test_classes_come_from_our_names_or_from_groups(tmp_path: Path) -> None:
    rois = {
        '0001_tumor_0.912.roi': roi(),
        '0002_tumor_0.912-1.roi': roi(left=12, right=18),
        'renamed.roi': roi(name='0003_T-cell_0.500', top=9, bottom=13),
        'grouped.roi': roi(group=3, top=9, bottom=13, left=12, right=18),
    }
    folder = source(tmp_path / 'in', rois)
    report = run('imagej', folder, tmp_path / 'out')
    assert report.class_names == ('T-cell', 'group 3', 'tumor')
    assert [len(masks) for masks in stored(tmp_path / 'out', 'a').values()] == [1, 1, 2]
    report = run('imagej', folder, tmp_path / 'mapped', class_map={'group 3': 'tumor'})
    assert report.class_names == ('T-cell', 'tumor')


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    good = roi().tobytes()
    rois = {
        'good.roi': good,
        'twice.roi': good,
        'line.roi': roi(roifile.ROI_TYPE.FREELINE),
        'torn.roi': good[:70],
        'text.roi': b'no ROI at all',
        'empty.roi': b'',
        'plane.roi': roi(position=4),
        'outside.roi': roi(left=300, right=306),
        'notes.txt': b'hello',
    }
    report = run('imagej', source(tmp_path / 'in', rois), tmp_path / 'out')
    assert len(stored(tmp_path / 'out', 'a')[1]) == 1
    assert report.left_out == {
        'ROIs that are no areas (lines, points, text, curves)': 1,
        'ROIs that cannot be read': 3,
        'ROIs that occur twice': 1,
        'ROIs on another plane than the first': 1,
        'outlines without a pixel in the image': 1,
        'files in the zip that are no ROIs': 1,
    }
    assert any('torn' in note and 'empty' in note for note in report.notes)


def test_a_damaged_zip_costs_its_image_only(tmp_path: Path) -> None:
    folder = source(tmp_path / 'in', {'x.roi': roi()})
    for name, content in (('b', (folder / 'a_RoiSet.zip').read_bytes()[:60]), ('c', b'text')):
        write_image(folder / f'{name}.png')
        (folder / f'{name}.zip').write_bytes(content)
    write_image(folder / 'd.png')
    (folder / 'd.roi').write_bytes(roi().tobytes())
    report = run('imagej', folder, tmp_path / 'out')
    assert [row['uuid'] for row in report.rows] == ['a', 'd']
    assert len(report.problems) == 2
    assert all("expected a zip of ImageJ's ROI Manager" in text for text in report.problems)
