"""Pictures during training: ground truth beside prediction, every N validations.

In: the data samples of a validation. Out: PNG files in ``<work_dir>/val_pictures`` and images in
every visualisation backend of the config (TensorBoard, MLflow, Weights & Biases).
Invariant: the same images each time, so that one sees a model learn; nothing the model computes
changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from mmdet.registry import HOOKS, VISBACKENDS
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.visualization.vis_backend import MLflowVisBackend

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.layout import VAL_PICTURES
from cellseg_mm.data.labels import read_gt
from cellseg_mm.model.detections import to_instance_set
from cellseg_mm.pipeline.dataset import CellDataset, base_dataset, case_of
from cellseg_mm.results.overlay import draw_pair, read_rgb, write_png


@HOOKS.register_module()
class ValidationPictureHook(Hook):
    """Draw a few validation images, labels left and predictions right.

    Add it to any config with one line::

        custom_hooks = [dict(type='ValidationPictureHook', every_n=1, n_images=4)]

    Only the first rank draws; its share of the validation images is used.

    Args:
        every_n: Draw at every ``every_n``-th validation of a run.
        n_images: Images, spread evenly over the sorted names of the validation split.
        score_thr: Predictions below are not drawn.
        out_dir: Folder for PNG files below the work folder; '' writes none.

    Raises:
        ConfigError: A number is below 1, or the validation data set is not ours.
    """

    priority = 'LOW'

    def __init__(
        self,
        *,
        every_n: int = 1,
        n_images: int = 4,
        score_thr: float = 0.5,
        out_dir: str = VAL_PICTURES,
    ) -> None:
        for name, value in (('every_n', every_n), ('n_images', n_images)):
            if value < 1:
                raise ConfigError(
                    f'ValidationPictureHook.{name}: {value}; expected at least 1; to draw nothing '
                    'remove the hook'
                )
        self.every_n = every_n
        self.n_images = n_images
        self.score_thr = score_thr
        self.out_dir = out_dir
        self._n_validations = 0
        self._infos: dict[str, dict] = {}

    def before_val_epoch(self, runner: Runner) -> None:
        """Choose the images, when this validation is one to draw."""
        self._n_validations += 1
        self._infos = {}
        if self._n_validations % self.every_n or runner.rank != 0:
            return
        dataset = self._dataset(runner)
        # Ranks take turns, so rank 0 of R sees every R-th image; every image is drawn at most once.
        mine = range(0, len(dataset), runner.world_size)
        n = min(self.n_images, len(mine))
        chosen = [mine[i * len(mine) // n] for i in range(n)]
        infos = [dataset.get_data_info(i) for i in chosen]
        self._infos = {info['name']: info for info in infos}

    @staticmethod
    def _dataset(runner: Runner) -> CellDataset:
        dataset = base_dataset(runner.val_dataloader.dataset)
        if dataset is None:
            raise ConfigError(
                'ValidationPictureHook: val_dataloader holds no CellDataset; the labels of other '
                'data sets are unknown; remove the hook'
            )
        return dataset

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: Sequence | None = None,
    ) -> None:
        """Draw the chosen images of this batch."""
        for sample in outputs or ():
            info = self._infos.pop(str(sample.metainfo.get('name', '')), None)
            if info is not None:
                self._draw(runner, info, to_instance_set(sample))

    def _draw(self, runner: Runner, info: Mapping, pred: InstanceSet) -> None:
        dataset = self._dataset(runner)
        data = dataset.settings
        picture = draw_pair(
            read_rgb(
                info['img_path'],
                red_blue_swapped=data.red_blue_swapped,
                value_range=info.get('value_range'),
            ),
            read_gt(case_of(info)),
            pred,
            data.palette,
            class_names=data.class_names,
            score_thr=self.score_thr,
        )
        runner.visualizer.add_image(f'val_{info["name"]}', picture, step=runner.iter)
        if self.out_dir:
            folder = Path(runner.work_dir) / self.out_dir
            write_png(folder / f'{info["name"]}_iter_{runner.iter}.png', picture)


@VISBACKENDS.register_module()
class MLflowPictureBackend(MLflowVisBackend):
    """mmengine's MLflow backend, with pictures that MLflow accepts.

    mmengine 0.11 hands a picture's name to MLflow as its file name. MLflow chooses the format by
    the extension, so a name without one ends the training, and a name without the step replaces the
    picture of the last validation. Arguments are those of ``MLflowVisBackend``; give
    ``tracking_uri='sqlite:///work_dirs/mlflow.db'``, since MLflow 3 refuses plain folders.
    """

    def add_image(self, name: str, image: np.ndarray, step: int = 0, **kwargs: object) -> None:
        """Record a (H, W, 3) uint8 RGB picture as ``<name>_<step>.png``."""
        super().add_image(f'{name}_{step}.png', image, step, **kwargs)
