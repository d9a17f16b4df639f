"""Pictures of the data: as it is, as the model gets it, and what each augmentation does.

In: a config. Out: contact sheets. Invariant: samples come from the very data set, sampler, seed and
transforms that training builds from the config; nothing is loaded or drawn at random beside them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import cv2
import numpy as np
import torch
from mmdet.registry import DATA_SAMPLERS, DATASETS
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.structures import InstanceData
from numpy.typing import NDArray

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.progress import track
from cellseg_mm.data.config import classes_and_colours
from cellseg_mm.data.labels import read_gt
from cellseg_mm.pipeline.dataset import CellDataset, base_dataset, case_of
from cellseg_mm.pipeline.label_map_masks import LabelMapMasks
from cellseg_mm.results.overlay import (
    Picture,
    SheetParams,
    draw_contact_sheet,
    draw_legend,
    draw_overlay,
    read_rgb,
)

Colours = Sequence[tuple[int, int, int]]
DIAMETER_BINS_PX = tuple(range(0, 84, 4))  # of a circle of a cell's area; larger ones in the last

SMALL_PX = 400  # thin lines up to this side
TITLE_PX = 300  # room for a title


@dataclass(frozen=True, slots=True)
class ClassStatistics:
    """One class of a data set.

    Attributes:
        name: Of the class.
        n_cells: Cells in all images.
        n_images: Images with at least one.
        diameters_px: (N,) float64, of a circle of the cell's area.
    """

    name: str
    n_cells: int
    n_images: int
    diameters_px: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Browsed:
    """A contact sheet and what it shows.

    Attributes:
        picture: (H, W, 3) uint8 RGB.
        text: Facts for the terminal.
    """

    picture: Picture
    text: str


def browse_samples(cfg: Config, *, split: str = 'train', n: int = 16) -> Browsed:
    """Draw samples exactly as they leave the data loader, before normalisation and padding.

    For ``train`` these are the first ``n`` draws of the first rank. Outlines are the masks, thin
    rectangles the boxes.

    Args:
        cfg: A config of this project.
        split: ``train`` or ``val``; a validation pipeline without labels shows the image alone.
        n: Number of samples.

    Raises:
        ConfigError: The config has no such loader, or ``n`` is below 1.
    """
    loader = _loader(cfg, split)
    if n < 1:
        raise ConfigError(f'browse: {n} samples; expected at least 1; give --n 16')
    dataset = DATASETS.build(loader.dataset)
    names, colours = classes_and_colours(dataset.metainfo)
    pictures, titles = [], []
    indices = list(islice(_indices(cfg, loader, dataset), n))
    for index in track(indices, description='samples'):
        sample = dataset[index]
        image = sample['inputs'].permute(1, 2, 0).numpy()[..., ::-1]
        metas = sample['data_samples']
        name = str(metas.metainfo.get('name', '?'))
        found = getattr(metas, 'gt_instances', None)
        picture, n_cells = _drawn(image, found, name, colours)
        pictures.append(_at_least_wide(picture))
        cells = f'{n_cells} cells' if n_cells is not None else 'no labels in this pipeline'
        titles.append(f'{name[:13]} {image.shape[1]}x{image.shape[0]}: {cells}')
    text = f'{len(pictures)} samples of {len(dataset)} {split} images, as the model gets them'
    return Browsed(_with_legend(draw_contact_sheet(pictures, titles), names, colours), text)


def _loader(cfg: Config, split: str) -> ConfigDict:
    loader = cfg.get(f'{split}_dataloader')
    if split not in ('train', 'val') or not loader:
        raise ConfigError(
            f'browse: the config has no {split}_dataloader; expected train or val; choose another '
            '--split'
        )
    return loader


def _indices(cfg: Config, loader: ConfigDict, dataset: object) -> Iterator[int]:
    """Yield what the loader's sampler draws, with training's seed."""
    seed = cfg.get('randomness', {}).get('seed')
    settings = {'dataset': dataset, 'seed': 0 if seed is None else int(seed)}
    yield from DATA_SAMPLERS.build(loader.sampler, default_args=settings)


def _drawn(
    image: NDArray, found: InstanceData | None, name: str, colours: Colours
) -> tuple[Picture, int | None]:
    rgb = np.ascontiguousarray(np.clip(np.rint(image), 0, 255).astype(np.uint8))
    if found is None or 'masks' not in found:
        return rgb, None
    masks, class_ids = found['masks'], found['labels']
    return _draw_instances(rgb, masks, class_ids, _plain_boxes(found['bboxes']), name, colours)


def _draw_instances(
    rgb: Picture,
    masks: object,
    class_ids: NDArray | torch.Tensor,
    boxes: NDArray,
    name: str,
    colours: Colours,
) -> tuple[Picture, int]:
    instances = instances_of_masks(masks, np.asarray(class_ids, dtype=np.int64), name)
    line_px = 1 if max(rgb.shape[:2]) <= SMALL_PX else 2
    picture = draw_overlay(rgb, instances, colours, line_px=line_px)
    for box, class_id in zip(boxes, np.asarray(class_ids).tolist(), strict=True):
        x1, y1, x2, y2 = (round(float(v)) for v in box)
        cv2.rectangle(picture, (x1, y1), (max(x1, x2 - 1), max(y1, y2 - 1)), colours[class_id], 1)
    return picture, len(instances)


def _plain_boxes(boxes: object) -> NDArray:
    tensor = boxes.tensor if hasattr(boxes, 'tensor') else boxes
    return np.asarray(tensor, dtype=np.float64).reshape(-1, 4)


def instances_of_masks(
    masks: object, class_ids: NDArray[np.int64], name: str = 'sample'
) -> InstanceSet:
    """Return training masks as an InstanceSet; masks without a pixel are left out."""
    if not isinstance(masks, LabelMapMasks):
        masks = LabelMapMasks.from_bitmaps(masks)
    layers, boxes = masks.layers, masks.boxes_xyxy.tolist()
    crops, offsets, kept = [], [], []
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        if x2 <= x1 or y2 <= y1:
            continue
        crops.append(layers[masks.layer_of[i], y1:y2, x1:x2] == masks.ids[i])
        offsets.append((y1, x1))
        kept.append(i)
    return InstanceSet.from_crops(
        name,
        0,
        (masks.height, masks.width),
        crops=crops,
        offsets_yx=np.array(offsets, dtype=np.int64).reshape(-1, 2),
        class_ids=class_ids[kept],
        scores=np.ones(len(kept), dtype=np.float32),
    )


def _at_least_wide(picture: Picture) -> Picture:
    missing = TITLE_PX - picture.shape[1]
    if missing <= 0:
        return picture
    return np.pad(picture, ((0, 0), (0, missing), (0, 0)), constant_values=255)


def _with_legend(
    sheet: Picture, names: Sequence[str], colours: Colours, counts: Sequence[int] = ()
) -> Picture:
    return np.concatenate([sheet, draw_legend(sheet.shape[1], colours, names, counts=counts)])


# ---- the data set as it is ----


def browse_dataset(cfg: Config, *, split: str = 'train', n: int = 16) -> Browsed:
    """Draw images with their labels as they are in the files, and count the whole split.

    Args:
        cfg: A config of this project.
        split: ``train`` or ``val`` part of the config's fold.
        n: Images that are drawn, spread evenly over the sorted names.

    Raises:
        CellSegError: See :func:`browse_samples`, and faults of the files.
    """
    base, names, colours = _base_of(cfg, split)
    infos = [base.get_data_info(i) for i in range(len(base))]
    swapped = base.settings.red_blue_swapped
    chosen = set(np.linspace(0, len(infos) - 1, min(max(n, 1), len(infos))).round().astype(int))
    sets, pictures, titles = [], [], []
    for i, info in enumerate(track(infos, description='reading labels')):
        gt = read_gt(case_of(info))
        sets.append(gt)
        if i in chosen:
            image = read_rgb(
                info['img_path'],
                red_blue_swapped=swapped,
                value_range=info.get('value_range'),
            )
            pictures.append(_at_least_wide(draw_overlay(image, gt, colours)))
            height, width = gt.image_hw
            titles.append(f'{gt.name[:13]} {width}x{height}: {len(gt)} cells')
    statistics = statistics_of(sets, names)
    sheet = draw_contact_sheet(pictures, titles)
    histogram = draw_histograms(statistics, colours, width_px=sheet.shape[1])
    counts = [s.n_cells for s in statistics]
    picture = np.concatenate([_with_legend(sheet, names, colours, counts), histogram])
    return Browsed(picture, statistics_text(statistics, sets, split))


def _base_of(cfg: Config, split: str) -> tuple[CellDataset, tuple[str, ...], Colours]:
    dataset = DATASETS.build(_loader(cfg, split).dataset)
    names, colours = classes_and_colours(dataset.metainfo)
    return _cells(dataset, split), names, colours


def _cells(dataset: BaseDataset, split: str) -> CellDataset:
    base = base_dataset(dataset)
    if base is None:
        raise ConfigError(
            f'browse: {split}_dataloader holds no CellDataset; expected one inside the wrappers; '
            'browse samples instead'
        )
    return base


def statistics_of(sets: Sequence[InstanceSet], names: Sequence[str]) -> list[ClassStatistics]:
    """Count cells and sizes of each class."""
    areas = [s.areas for s in sets]
    result = []
    for k, name in enumerate(names):
        own = [a[s.class_ids == k] for s, a in zip(sets, areas, strict=True)]
        pixels = np.concatenate([np.empty(0), *own])
        diameters = 2 * np.sqrt(pixels / np.pi)
        n_images = sum(len(a) > 0 for a in own)
        result.append(ClassStatistics(name, len(pixels), n_images, diameters))
    return result


def statistics_text(
    statistics: Sequence[ClassStatistics], sets: Sequence[InstanceSet], split: str
) -> str:
    """Return the statistics as a table."""
    sides = np.array([s.image_hw for s in sets])
    lines = [
        f'{len(sets)} {split} images, {sides.min()} to {sides.max()} px a side, '
        f'{sum(s.n_cells for s in statistics)} cells',
        'class             cells  images  diameter in px: 5 %   50 %   95 %',
    ]
    for s in statistics:
        low, middle, high = (
            np.percentile(s.diameters_px, [5, 50, 95]) if s.n_cells else [float('nan')] * 3
        )
        lines.append(
            f'{s.name[:15]:15}  {s.n_cells:6}  {s.n_images:6}  {low:19.1f}  {middle:5.1f}  '
            f'{high:5.1f}'
        )
    return '\n'.join(lines)


def draw_histograms(
    statistics: Sequence[ClassStatistics], colours: Colours, *, width_px: int
) -> Picture:
    """Draw one histogram of cell diameters per class, all with the same axis."""
    height, gap = 150, 8
    width = max(width_px // max(len(statistics), 1), 160)
    canvas = np.full((height, max(width_px, width * len(statistics)), 3), 255, dtype=np.uint8)
    edges = np.array([*DIAMETER_BINS_PX, np.inf])
    for k, s in enumerate(statistics):
        counts, _ = np.histogram(s.diameters_px, edges)
        left, bar = k * width + gap, (width - 2 * gap) / len(counts)
        title = f'{s.name[:18]}: diameter in px'
        _write(canvas, title, (left, 14))
        for b, count in enumerate(counts.tolist()):
            top = 125 - round(100 * count / max(counts.max(), 1))
            x1, x2 = round(left + b * bar), round(left + (b + 1) * bar) - 1
            cv2.rectangle(canvas, (x1, top), (max(x1, x2), 125), colours[k], cv2.FILLED)
            if b % 5 == 0:
                _write(canvas, f'{DIAMETER_BINS_PX[b]}', (x1, 140))
    return canvas[:, :width_px]


def _write(canvas: Picture, text: str, at_xy: tuple[int, int]) -> None:
    cv2.putText(canvas, text, at_xy, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)


# ---- before and after each augmentation ----


def browse_augmentations(cfg: Config, *, n: int = 3) -> Browsed:
    """Draw a sample before and after each transform of the training pipeline.

    Args:
        cfg: A config of this project.
        n: Draws, each with another seed and image; transforms that act by chance may do nothing.
    """
    dataset = DATASETS.build(_loader(cfg, 'train').dataset)
    names, colours = classes_and_colours(dataset.metainfo)
    changed: dict[tuple[int, str], int] = {}
    pictures, titles = [], []
    n_columns = 1
    for draw in track(range(n), description='draws'):
        # Transforms work in place: each state is drawn before the next one is asked for.
        steps = _steps(dataset, draw * max(1, len(dataset) // n), seed=draw)
        for column, (name, results, is_changed) in enumerate(steps, start=1):
            n_columns = max(n_columns, column)
            picture, n_cells = _drawn_results(results, colours)
            height, width = picture.shape[:2]
            state = '' if is_changed else ', unchanged'
            pictures.append(_at_least_wide(picture))
            titles.append(f'{name} {width}x{height}: {n_cells} cells{state}')
            changed[column, name] = changed.get((column, name), 0) + is_changed
    text = '\n'.join(
        [f'{n} draws; transforms and how often they changed the sample:']
        + [f'  {name}: {count} of {n}' for (_, name), count in changed.items()]
    )
    sheet = draw_contact_sheet(pictures, titles, SheetParams(n_columns=n_columns, cell_px=380))
    return Browsed(_with_legend(sheet, names, colours), text)


def _steps(dataset: BaseDataset, index: int, *, seed: int) -> Iterator[tuple[str, dict, bool]]:
    """Yield each transform's name, the sample after it, and whether it changed anything."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - mmdet's transforms draw from it
    torch.manual_seed(seed)
    base = _cells(dataset, 'train')
    results = base.get_data_info(index % len(base))
    before = None
    for transform, source in _transforms(dataset):
        if hasattr(transform, 'get_indexes'):
            chosen = transform.get_indexes(source)
            chosen = chosen if isinstance(chosen, Sequence) else [chosen]
            results['mix_results'] = [copy.deepcopy(source[i]) for i in chosen]
        results = transform(results)
        if results is None or 'inputs' in results:
            return
        if 'gt_masks' not in results:
            continue  # image and labels are one picture: the sample as loaded
        state = _fingerprint(results)
        name = type(transform).__name__ if before is not None else 'as loaded'
        yield name, results, state != before
        before = state


def _transforms(dataset: BaseDataset) -> Iterator[tuple[Callable, BaseDataset]]:
    """Yield (transform, data set it may draw from), the innermost data set's first."""
    chain = []
    while dataset is not None:
        chain.append(dataset)
        dataset = getattr(dataset, 'dataset', None)
    for one in reversed(chain):
        pipeline = getattr(one, 'pipeline', ())
        for transform in getattr(pipeline, 'transforms', pipeline):
            yield transform, getattr(one, 'dataset', one)


def _fingerprint(results: dict) -> tuple:
    masks = results['gt_masks']
    image = np.ascontiguousarray(results['img'])
    boxes = _plain_boxes(results['gt_bboxes'])
    return image.shape, hash(image.tobytes()), len(masks), hash(boxes.tobytes())


def _drawn_results(results: dict, colours: Colours) -> tuple[Picture, int]:
    rgb = np.clip(np.rint(results['img']), 0, 255).astype(np.uint8)[..., ::-1]
    return _draw_instances(
        np.ascontiguousarray(rgb),
        results['gt_masks'],
        results['gt_bboxes_labels'],
        _plain_boxes(results['gt_bboxes']),
        str(results.get('name', '?')),
        colours,
    )
