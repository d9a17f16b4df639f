"""The data set that configs name: one fold's part of a data folder, or its test images.

In: a data folder (see docs/formats.md) and its ``folds.json``. Out: mmdet data infos for the
loading transforms. Invariant: what a worker makes of a sample depends only on the seed and on how
many samples were drawn before it, so a resumed run continues exactly where it was cut.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from mmdet.datasets.base_det_dataset import BaseDetDataset
from mmdet.registry import DATASETS
from mmengine.logging import print_log

from cellseg_mm.core import layout, worker_watch
from cellseg_mm.core.errors import CellSegError, ConfigError, FoldError
from cellseg_mm.core.files import text_hash
from cellseg_mm.data.config import DataSettings, classes_and_colours
from cellseg_mm.data.folds import excluded_by, load_folds
from cellseg_mm.data.intensity import ValueRange, recorded_range
from cellseg_mm.data.labels import Case, find_cases


def data_fingerprint(cases: Sequence[Case], value_range: ValueRange | None = None) -> str:
    """Return 16 hex digits over the cases' names, files and file sizes; no pixel is read.

    The range of values counts where there is one: it decides about the pixels.
    """
    lines = [] if value_range is None else [f'range {value_range.to_json()}']
    for case in sorted(cases, key=lambda case: case.name):
        sizes = [str(case.image_path.stat().st_size)]
        sizes += [f'{k}:{path.stat().st_size}' for k, path in sorted(case.label_paths.items())]
        lines.append(' '.join([case.name, *sizes]))
    return text_hash('\n'.join(lines))


def _prepare_command(data_root: str | Path, folds_file: Path) -> str:
    out = '' if folds_file.parent == Path(data_root) else f' --out {folds_file.parent}'
    return f'python tools/prepare_data.py {data_root}{out}'


@DATASETS.register_module()
class CellDataset(BaseDetDataset):
    """Cases of one split of one fold.

    Each data info has ``img_path``, ``label_paths`` (0-based class id -> path), ``img_id``,
    ``name``, ``height``, ``width`` and an empty ``instances`` list (label maps are read by
    ``LoadLabelMaps``, not kept here); and ``value_range`` where one is recorded.

    Args:
        data_root: Data folder in the layout of docs/formats.md.
        split: ``train`` or ``val`` part of the fold, ``all`` training cases, or ``test``.
        fold: Which fold is held out; unused by ``all`` and ``test``.
        folds_file: Where the folds are; ``auto`` means ``<data_root>/folds.json``. Cases that it
            lists as excluded are left out of every split.
        exclude_folds: Further folds that the training split leaves out, so that several members
            are clean on them and fusion can be measured there; see docs/fusion.md.

    Raises:
        FoldError: The folds file is missing, wrong, or has no such fold, or nothing is left.
        ConfigError: ``metainfo`` names no classes, or ``split`` is unknown.
    """

    def __init__(
        self,
        *args: object,
        data_root: str,
        split: Literal['train', 'val', 'all', 'test'] = 'train',
        fold: int | None = 0,
        folds_file: str | None = 'auto',
        exclude_folds: Sequence[int] = (),
        **kwargs: object,
    ) -> None:
        if split not in ('train', 'val', 'all', 'test'):
            raise ConfigError(f'dataset.split: found {split!r}; expected train, val, all or test')
        self.split = split
        self.fold = fold
        self.exclude_folds = tuple(sorted(set(exclude_folds)))
        self.folds_file = layout.folds_file(data_root, folds_file)
        self.fold_hash = ''
        self.fold_lineage: tuple[str, ...] = ()  # hashes of the folds that these extend
        self.data_hash = ''
        self.value_range: ValueRange | None = None
        worker_watch.prepare()
        super().__init__(*args, data_root=data_root, **kwargs)

    @property
    def settings(self) -> DataSettings:
        """What :meth:`DataSettings.from_config` says of this data set."""
        class_names, palette = classes_and_colours(self.metainfo)
        steps = self.pipeline.transforms
        return DataSettings(
            data_root=Path(self.data_root),
            folds_path=self.folds_file,
            class_names=class_names,
            palette=palette,
            red_blue_swapped=any(getattr(step, 'red_blue_swapped', False) for step in steps),
            split=self.split,
            fold=self.fold,
        )

    def load_data_list(self) -> list[dict]:
        """Find the cases of this split, in the order of their names."""
        classes = self.metainfo.get('classes')
        if not classes:
            raise ConfigError(
                'dataset.metainfo: no classes found; expected metainfo=dict(classes=(...)) with '
                'one name per class file; add it to the config'
            )
        where = 'test' if self.split == 'test' else 'train'
        excluded = excluded_by(self.folds_file)
        cases = find_cases(self.data_root, where, len(classes), exclude_names=excluded)
        self.value_range = recorded_range(self.data_root, self.folds_file)
        self.data_hash = data_fingerprint(cases, self.value_range)
        if self.split in ('train', 'val'):
            cases = self._of_fold(cases)
        return [self._data_info(case) for case in cases]

    def _of_fold(self, cases: list[Case]) -> list[Case]:
        if not self.folds_file.is_file():
            raise FoldError(
                f'{self.folds_file}: no such file; expected the folds of {self.data_root}; '
                f'make them with: {_prepare_command(self.data_root, self.folds_file)}'
            )
        folds = load_folds(self.folds_file, [case.name for case in cases])
        for fold in (self.fold, *self.exclude_folds):
            if fold is None or not 0 <= fold < folds.n_folds:
                raise FoldError(
                    f'{self.folds_file}: has folds 0 to {folds.n_folds - 1}, the config asks for '
                    f'fold {fold}; make more folds or choose one of these'
                )
        self.fold_hash, self.fold_lineage = folds.hash, folds.lineage
        wanted = set(folds.val_names(self.fold))
        if self.split == 'train':
            left_out = {self.fold, *self.exclude_folds}
            wanted = {name for name, fold in folds.fold_of().items() if fold not in left_out}
        if not wanted:
            raise FoldError(
                f'{self.folds_file}: fold {self.fold} and exclude_folds {self.exclude_folds} leave '
                f'nothing of {folds.n_folds} folds to train on; exclude fewer'
            )
        return [case for case in cases if case.name in wanted]

    def _data_info(self, case: Case) -> dict:
        known = {} if self.value_range is None else {'value_range': self.value_range}
        return {
            **known,
            'img_path': str(case.image_path),
            'label_paths': {k: str(path) for k, path in case.label_paths.items()},
            'img_id': case.image_id,
            'name': case.name,
            'height': case.image_hw[0],
            'width': case.image_hw[1],
            'instances': [],
        }

    def prepare_data(self, idx: int) -> dict | None:
        """Run the pipeline on a case; whatever goes wrong names its image.

        Raises:
            CellSegError: The case cannot be used, or memory is too small for it.
            RuntimeError: A transform failed.
        """
        info = self.get_data_info(idx)
        worker_watch.note(info['img_path'])
        try:
            return self.pipeline(info)
        except CellSegError:
            raise
        except MemoryError as problem:
            raise CellSegError(
                f'{info["img_path"]}: memory ran out while it was loaded ({problem}); lower '
                'num_workers or batch_size of the data loader, or cut the image'
            ) from problem
        except Exception as problem:
            raise RuntimeError(
                f'{info["img_path"]}: loading or augmenting it failed: '
                f'{type(problem).__name__}: {problem}'
            ) from problem

    def get_cat_ids(self, idx: int) -> list[int]:
        """Return the classes that have a label map, for ``ClassBalancedDataset``."""
        return sorted(self.get_data_info(idx)['label_paths'])


def base_dataset(dataset: object) -> CellDataset | None:
    """Return the CellDataset inside any wrappers, or None when there is none."""
    while dataset is not None and not isinstance(dataset, CellDataset):
        dataset = getattr(dataset, 'dataset', None)
    return dataset


def log_parts(dataset: CellDataset) -> None:
    """Log once what a split consists of."""
    without = ''
    if dataset.split == 'train' and dataset.exclude_folds:
        without = f' without folds {", ".join(map(str, dataset.exclude_folds))} too'
    print_log(
        f'{dataset.split}: {len(dataset)} images of {os.fspath(dataset.data_root)}, fold '
        f'{dataset.fold}{without}, fold hash {dataset.fold_hash or "-"}, '
        f'data hash {dataset.data_hash}',
        logger='current',
    )


def case_of(info: Mapping) -> Case:
    """Return the case that a CellDataset's data info, or what a pipeline made of it, describes.

    Args:
        info: With ``img_path``, ``label_paths`` and ``ori_shape``, else ``height`` and ``width``;
            without a ``name`` the image's folder gives it.
    """
    image_path = Path(info['img_path'])
    height, width = (info.get('ori_shape') or (info['height'], info['width']))[:2]
    return Case(
        name=info.get('name', image_path.parent.name),
        image_path=image_path,
        label_paths={int(k): Path(path) for k, path in info['label_paths'].items()},
        image_id=int(info.get('img_id', 0)),
        image_hw=(int(height), int(width)),
    )
