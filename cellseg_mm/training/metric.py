"""Scores a data loader's predictions inside mmengine's validation and test loops.

In: data samples after ``predict``. Out: a flat dict of floats for the log and for ``save_best``,
the text table in the log, and on request the predictions and the scores as files.
Invariant: every number comes from ``scoring.score``; an image counts once, however many ranks or
padded batches delivered it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmdet.registry import METRICS
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log

from cellseg_mm.core.errors import ConfigError, PredictionError
from cellseg_mm.core.files import write_json
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.layout import PREDICTIONS_SUFFIX, SCORES_SUFFIX
from cellseg_mm.core.provenance import code_commit, versions
from cellseg_mm.data.labels import read_gt
from cellseg_mm.model.caps import count_truncation
from cellseg_mm.model.detections import to_instance_set
from cellseg_mm.pipeline.dataset import case_of
from cellseg_mm.results.predictions import Predictions, save_predictions
from cellseg_mm.scores.records import COCO_NAMES, ScoreParams, Scores
from cellseg_mm.scores.score import score
from cellseg_mm.scores.table import score_table


@METRICS.register_module()
class CellMetric(BaseMetric):
    """All scores of ``docs/scores.md``.

    Ground truth is read from the label maps that the data samples name (``label_paths``), once per
    process. Scores that are not defined are NaN: ``CheckpointHook(save_best=...)`` never takes a
    NaN for better, so it waits until the score is defined.

    Args:
        n_bootstrap: Resamples for 95 % intervals; 0 during training, where nobody reads them.
        score_params: Further fields of ``scoring.ScoreParams``.
        max_per_img: ``model.test_cfg.rcnn.max_per_img``; when given, images with that many
            detections are counted and named in the log.
        score_thr: ``model.test_cfg.rcnn.score_thr``, for that report.
        outfile_prefix: When given, ``<prefix>.predictions.npz`` and ``<prefix>.scores.json`` are
            written.
        provenance: JSON values that the predictions file records beside class names, code commit
            and versions: config, checkpoint, fold, hashes. May be set later, as an attribute.
        collect_device: See ``BaseMetric``.
        prefix: See ``BaseMetric``.
        collect_dir: See ``BaseMetric``.

    Raises:
        ConfigError: ``score_params`` has an unknown or wrong field.
    """

    default_prefix = 'cell'

    def __init__(
        self,
        *,
        n_bootstrap: int = 1000,
        score_params: Mapping | None = None,
        max_per_img: int | None = None,
        score_thr: float = 0.0,
        outfile_prefix: str | None = None,
        provenance: Mapping | None = None,
        collect_device: str = 'cpu',
        prefix: str | None = None,
        collect_dir: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix, collect_dir=collect_dir)
        self.params = _params(n_bootstrap, score_params or {})
        self.max_per_img = max_per_img
        self.score_thr = score_thr
        self.outfile_prefix = outfile_prefix
        self.provenance = dict(provenance or {})
        self.groups: Mapping[str, str] = {}  # by image name; ProvenanceHook knows the folds
        self._gt_by_name: dict[str, InstanceSet] = {}
        self._n_images = 0

    def process(self, data_batch: object, data_samples: Sequence[Mapping]) -> None:
        """Keep (prediction, ground truth) of each image.

        Args:
            data_batch: Not used.
            data_samples: Dicts with ``pred_instances``, ``img_id``, ``name``, ``img_path``,
                ``ori_shape`` and ``label_paths``.
        """
        for sample in data_samples:
            pred = to_instance_set(sample)
            if not self.outfile_prefix:
                pred = dataclasses.replace(pred, extra={})
            self.results.append((pred, self._gt(pred, sample)))

    def _gt(self, pred: InstanceSet, sample: Mapping) -> InstanceSet:
        if pred.name not in self._gt_by_name:
            if 'label_paths' not in sample:
                raise ConfigError(
                    f"{pred.name}: the data sample has no 'label_paths'; scores need the ground "
                    "truth; add 'label_paths' to meta_keys of the pipeline's PackDetInputs"
                )
            self._gt_by_name[pred.name] = read_gt(case_of({**sample, 'name': pred.name}))
        return self._gt_by_name[pred.name]

    def evaluate(self, size: int) -> dict:
        """Collect all ranks' images and score them; see ``BaseMetric.evaluate``."""
        self._n_images = size
        return super().evaluate(size)

    def compute_metrics(self, results: list[tuple[InstanceSet, InstanceSet]]) -> dict[str, float]:
        """Score, log and write; runs on the main process only.

        Raises:
            PredictionError: An image of the data set was not delivered.
        """
        by_id = {pred.image_id: (pred, gt) for pred, gt in results}
        if len(by_id) != self._n_images:
            raise PredictionError(
                f'validation: {len(by_id)} different images arrived, the data set has '
                f'{self._n_images}; each must arrive; use DefaultSampler with round_up=True and '
                'give every image its own img_id'
            )
        preds, gts = zip(*(by_id[image_id] for image_id in sorted(by_id)), strict=True)
        scores = score(gts, preds, self._class_names(), self.params, groups=self.groups)
        print_log('\n' + score_table(scores), logger='current')
        if self.max_per_img is not None:
            report = count_truncation(preds, self.max_per_img, score_thr=self.score_thr)
            print_log(report.describe(), logger='current')
        if self.outfile_prefix:
            self._write(preds, scores)
        return flat_metrics(scores)

    def _class_names(self) -> tuple[str, ...]:
        classes = (self.dataset_meta or {}).get('classes')
        if not classes:
            raise ConfigError(
                'CellMetric: the data set names no classes; scores are per class; '
                'add metainfo=dict(classes=(...)) to the data set'
            )
        return tuple(classes)

    def _write(self, preds: Sequence[InstanceSet], scores: Scores) -> None:
        known = {
            'class_names': list(scores.class_names),
            'code_commit': code_commit(),
            'max_per_img': self.max_per_img,
            'versions': versions(),
        }
        predictions_path = Path(f'{self.outfile_prefix}{PREDICTIONS_SUFFIX}')
        scores_path = Path(f'{self.outfile_prefix}{SCORES_SUFFIX}')
        origin = {**known, **self.provenance}
        save_predictions(predictions_path, Predictions(preds, origin))
        write_json(scores_path, {**scores.to_dict(), 'provenance': origin})
        print_log(f'wrote {predictions_path} and {scores_path}', logger='current')


def flat_metrics(scores: Scores) -> dict[str, float]:
    """Return the headline under CocoMetric's names where it has one."""
    return {COCO_NAMES.get(name, name): value for name, value in scores.headline().items()}


def _params(n_bootstrap: int, fields: Mapping) -> ScoreParams:
    known = {field.name for field in dataclasses.fields(ScoreParams)}
    if unknown := sorted(set(fields) - known):
        raise ConfigError(
            f'CellMetric.score_params: found {unknown}; expected some of {sorted(known)}; '
            'correct the spelling'
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return ScoreParams(**{'n_bootstrap': n_bootstrap, **values})


@METRICS.register_module()
class SaveInstances(BaseMetric):
    """Write the predicted instances where there is no ground truth to score them with.

    Args:
        path: The prediction file.
        provenance: JSON values that the file records.
        collect_device: See ``BaseMetric``.
        prefix: See ``BaseMetric``.

    Raises:
        PredictionError: An image of the data set was not delivered.
    """

    default_prefix = 'cell'

    def __init__(
        self,
        *,
        path: str,
        provenance: Mapping | None = None,
        collect_device: str = 'cpu',
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.path = Path(path)
        self.provenance = dict(provenance or {})
        self._n_images = 0

    def process(self, data_batch: object, data_samples: Sequence[Mapping]) -> None:
        """Keep the instances of each image."""
        self.results.extend(to_instance_set(sample) for sample in data_samples)

    def evaluate(self, size: int) -> dict:
        """Collect all ranks' images; see ``BaseMetric.evaluate``."""
        self._n_images = size
        return super().evaluate(size)

    def compute_metrics(self, results: list[InstanceSet]) -> dict[str, float]:
        """Write the file; runs on the main process only."""
        by_name = {s.name: s for s in results}  # padding between ranks delivers some twice
        if len(by_name) != self._n_images:
            raise PredictionError(
                f'test: {len(by_name)} different images arrived, the data set has '
                f'{self._n_images}; each must arrive; use DefaultSampler with round_up=True'
            )
        sets = [by_name[name] for name in sorted(by_name)]
        save_predictions(self.path, Predictions(sets, self.provenance))
        return {'n_instances': float(sum(len(s) for s in sets))}
