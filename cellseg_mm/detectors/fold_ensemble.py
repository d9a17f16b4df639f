"""The fold ensemble inside mmengine's test loop: all members predict, one answer comes out.

In: a Runner's test loop and the members' checkpoints. Out: data samples with fused instances, so
that evaluators, dumps, visualisers and launchers work unchanged. Invariant: the runner has its own
model back when the test is over, however it ends; and no member predicts a training image that it
may have seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import HOOKS, METRICS, MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dist import all_gather_object
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from cellseg_mm.core.errors import ConfigError, PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.folds import load_folds
from cellseg_mm.detectors.member_models import (
    MemberModels,
    Placement,
    Source,
    check_same_pipeline,
    load_members,
)
from cellseg_mm.detectors.proposal_sharing import check_family, predict_shared
from cellseg_mm.ensemble.members import Member, clean_members
from cellseg_mm.fusion.fuse import (
    FuseReport,
    PostProcess,
    Rule,
    cut_at,
    from_spec,
    fuse_with_report,
    post_from_spec,
    postprocess,
    to_spec,
)
from cellseg_mm.fusion.masks import prob_uncertainty
from cellseg_mm.fusion.settings import DEFAULT_FUSION
from cellseg_mm.model.detections import case_name, to_instance_set, to_pred_instances
from cellseg_mm.pipeline.dataset import base_dataset
from cellseg_mm.results.predictions import Predictions, save_predictions

PROBS = ('mask_probs', 'mask_boxes')


class FoldEnsembleModel(BaseModel):
    """Predicts with all members and fuses per image.

    Args:
        models: The members.
        rule: How to fuse.
        post: What to do afterwards; None does nothing.
        chosen: For each image name the indices of its members; None means all members always.
        tta_model: Settings of a test-time augmentation model that each member is put into.
        keep_mask_probs: Keep the fused mask probabilities in the results.

    Attributes:
        reports: What was merged, by image name.
        member_counts: Instances of each member, by image name; -1 where a member was left out.
    """

    def __init__(
        self,
        models: MemberModels,
        rule: Rule,
        post: PostProcess | None = None,
        *,
        chosen: Mapping[str, tuple[int, ...]] | None = None,
        tta_model: Mapping | None = None,
        keep_mask_probs: bool = False,
    ) -> None:
        super().__init__()
        if rule.needs_models:
            if tta_model is not None:
                raise ConfigError(
                    f'fusion {rule.name}: cannot share proposals between turned images; leave out '
                    'test-time augmentation, or choose another rule'
                )
            check_family(models.models, [member.source for member in models.members])
        self.models = models
        self.rule = rule
        self.post = post
        self.chosen = chosen
        self.tta_model = tta_model
        self.keep_mask_probs = keep_mask_probs
        self.reports: dict[str, FuseReport] = {}
        self.member_counts: dict[str, tuple[int, ...]] = {}

    def forward(self, *args: object, **kwargs: object) -> None:
        """Refuse: there is no loss and no single tensor of an ensemble."""
        raise NotImplementedError('an ensemble predicts by test_step only')

    @torch.no_grad()
    def test_step(self, data: dict) -> list[DetDataSample]:
        """Predict and fuse a batch.

        Args:
            data: As the data loader gives it: ``inputs`` and ``data_samples``, two lists.

        Returns:
            One sample per image with fused ``pred_instances``, masks as COCO RLE.
        """
        samples = [s[0] if isinstance(s, (list, tuple)) else s for s in self._by_image(data)]
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, sample in enumerate(samples):
            groups[self._members_of(case_name(sample))].append(i)
        predict = self._share_proposals if self.rule.needs_models else self._predict_each
        results: dict[int, DetDataSample] = {}
        for chosen, index in groups.items():
            batch = data if len(groups) == 1 else self._part(data, index)
            for i, fused in zip(index, predict(chosen, batch), strict=True):
                results[i] = samples[i].new()
                results[i].pred_instances = to_pred_instances(self._stripped(fused))
        return [results[i] for i in range(len(samples))]

    val_step = test_step

    def _by_image(self, data: dict) -> list:
        samples = data['data_samples']
        # TestTimeAug gives a list per augmentation, each with the batch's images.
        return [*zip(*samples, strict=True)] if self.tta_model is not None else samples

    def _part(self, data: dict, index: Sequence[int]) -> dict:
        if self.tta_model is None:
            return {key: [values[i] for i in index] for key, values in data.items()}
        return {key: [[aug[i] for i in index] for aug in values] for key, values in data.items()}

    def _members_of(self, name: str) -> tuple[int, ...]:
        if self.chosen is None:
            return tuple(range(len(self.models)))
        if name not in self.chosen:
            raise PredictionError(
                f'image {name}: is not one of the images that the ensemble was checked for; '
                'build the ensemble for this data set'
            )
        return self.chosen[name]

    def _predict_each(self, chosen: tuple[int, ...], batch: dict) -> list[InstanceSet]:
        found: list[list[InstanceSet]] = []
        for index in chosen:
            with self.models.use(index) as model:
                predict = model
                if self.tta_model is not None:
                    with DefaultScope.overwrite_default_scope('mmdet'):
                        predict = MODELS.build({**self.tta_model, 'module': model})
                # To instances at once, so that the device holds one member's results only.
                found.append([to_instance_set(sample) for sample in predict.test_step(batch)])
        fused = []
        for sets in zip(*found, strict=True):
            result, report = fuse_with_report(sets, self.rule, self.post)
            self._note(result.name, chosen, [len(s) for s in sets], report)
            fused.append(result)
        return fused

    def _share_proposals(self, chosen: tuple[int, ...], batch: dict) -> list[InstanceSet]:
        fused = []
        for sample in predict_shared(self.models, chosen, batch):
            shared = _with_votes(to_instance_set(sample), len(chosen))
            result, dropped = shared, None
            if self.post is not None:
                result, dropped = postprocess(shared, self.post)
            counts = {} if dropped is None else {f'n_{k}': v for k, v in asdict(dropped).items()}
            report = FuseReport(n_images=1, n_in=len(shared), n_out=len(result), **counts)
            self._note(result.name, chosen, [len(shared)] * len(chosen), report)
            fused.append(result)
        return fused

    def _note(
        self, name: str, chosen: Sequence[int], counts: Sequence[int], report: FuseReport
    ) -> None:
        by_member = dict(zip(chosen, counts, strict=True))
        self.reports[name] = report
        self.member_counts[name] = tuple(by_member.get(i, -1) for i in range(len(self.models)))

    def _stripped(self, fused: InstanceSet) -> InstanceSet:
        if self.keep_mask_probs:
            return fused
        return replace(fused, extra={k: v for k, v in fused.extra.items() if k not in PROBS})


def _with_votes(shared: InstanceSet, n_members: int) -> InstanceSet:
    """Add what fusion reports: every member took part in every instance."""
    n = len(shared)
    extra = {
        'n_votes': np.full(n, n_members, dtype=np.int64),
        'agreement': np.ones(n, dtype=np.float32),
    }
    if 'mask_probs' in shared.extra:
        extra['mask_uncertainty'] = prob_uncertainty(shared.extra['mask_probs'])
    return replace(shared, extra={**shared.extra, **extra})


@HOOKS.register_module()
class FoldEnsembleHook(Hook):
    """Put a fold ensemble in the place of the runner's model for the time of a test.

    Args:
        members: Per member a dict with ``checkpoint`` and perhaps ``config`` (a file, or a Config);
            without a config the runner's own is used.
        rule: Fusion rule, as on the command line (``soft_mask:iou_thr=0.4``).
        post: Post-processing, as on the command line (``disjoint,min_area_px=20``).
        mask_thr: Least probability of a mask's pixel, of members and of averages (unless the rule
            has its own); None leaves the configs' own.
        placement: ``auto``, ``device`` or ``turns``; see ``MemberModels``.
        leave_out_seen: On training images use only the members that never saw them.
        tta: Test-time augmentation of each member, as on the command line (``d4``); the data
            loader's pipeline must be the one that ``tta.TtaSpec.tta_pipeline`` makes.
        keep_mask_probs: Keep the fused mask probabilities in the results.

    Attributes:
        members: The members in use, by content, once a test has begun.
        report: What was merged, of all images and ranks, once a test is over.
        member_counts: Instances of each member, likewise, by image name.

    Raises:
        CheckpointError: A checkpoint cannot be read, or does not fit its config's model.
        FoldError: A member has seen, or may have seen, images that would now be scored.
        ConfigError: Members that cannot be combined as asked.
    """

    priority = 'BELOW_NORMAL'  # after ProvenanceHook told the metrics about the runner's own model

    def __init__(
        self,
        members: Sequence[Mapping],
        *,
        rule: str = DEFAULT_FUSION,
        post: str = '',
        mask_thr: float | None = None,
        placement: Placement = 'auto',
        leave_out_seen: bool = False,
        tta: str | None = None,
        keep_mask_probs: bool = False,
    ) -> None:
        if not members:
            raise ConfigError('FoldEnsembleHook.members: is empty; give at least one checkpoint')
        self.sources = [dict(member) for member in members]
        self.rule = cut_at(from_spec(rule), mask_thr)
        self.post = post_from_spec(post) if post else None
        self.mask_thr = mask_thr
        self.placement = placement
        self.leave_out_seen = leave_out_seen
        self.tta = tta
        self.keep_mask_probs = keep_mask_probs
        self.members: tuple[Member, ...] = ()
        self.report = FuseReport()
        self.member_counts: dict[str, tuple[int, ...]] = {}
        self._put_back: Callable[[], None] | None = None

    def before_run(self, runner: Runner) -> None:
        """Arrange that the model comes back even if the test raises: no hook is called then."""
        loop = runner._test_loop
        if not hasattr(loop, 'run'):  # settings only: this run does not test
            return
        run = loop.run

        def guarded() -> dict:
            try:
                return run()
            finally:
                del loop.run
                self._restore()

        loop.run = guarded

    def before_test(self, runner: Runner) -> None:
        """Load the members and swap."""
        dataset = runner.test_loop.dataloader.dataset
        sources = [self._source(member, runner) for member in self.sources]
        check_same_pipeline(sources)
        classes = dataset.metainfo.get('classes') or ()
        loaded = load_members(sources, classes, mask_thr=self.mask_thr)
        self.members = tuple(item.member for item in loaded)
        chosen = self._clean(dataset)
        device = next(runner.model.parameters()).device
        ensemble = FoldEnsembleModel(
            MemberModels(loaded, device, self.placement),
            self.rule,
            self.post,
            chosen=chosen,
            tta_model=self._tta_model(),
            keep_mask_probs=self.keep_mask_probs,
        )
        for metric in runner.test_loop.evaluator.metrics:
            if hasattr(metric, 'provenance'):
                metric.provenance = {**metric.provenance, **self.provenance()}
        for member in self.members:
            print_log(f'member: {member.describe()}', 'current')
        own = runner.model

        def put_back() -> None:
            runner.model = own

        runner.model, self._put_back = ensemble, put_back

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Sum up what was merged, over all ranks; an image that padding doubled counts once."""
        model = runner.model
        reports: dict[str, FuseReport] = {}
        for part_reports, part_counts in all_gather_object((model.reports, model.member_counts)):
            reports |= part_reports
            self.member_counts |= part_counts
        self.report = sum((reports[name] for name in sorted(reports)), FuseReport())

    def after_test(self, runner: Runner) -> None:
        """Give the runner its model back."""
        self._restore()

    def _restore(self) -> None:
        if self._put_back is not None:
            self._put_back()
            self._put_back = None

    def provenance(self) -> dict:
        """Return what result files say about the ensemble."""
        return {
            'checkpoint': '',
            'checkpoint_hash': '',
            'trained': {},
            'fusion': to_spec(self.rule),
            'post': to_spec(self.post) if self.post is not None else '',
            'mask_thr': self.mask_thr,
            'tta': self.tta,
            'leave_out_seen': self.leave_out_seen,
            'members': [member.to_json() for member in self.members],
        }

    def _tta_model(self) -> dict | None:
        if self.tta is None:
            return None
        from cellseg_mm.model import tta

        return tta.from_spec(self.tta).tta_model()

    @staticmethod
    def _source(member: Mapping, runner: Runner) -> Source:
        config = member.get('config')
        if config is None:
            return Source(runner.cfg, 'the config', Path(member['checkpoint']))
        if isinstance(config, Config):
            name = str(member.get('config_path', config.filename))
            return Source(config, name, Path(member['checkpoint']))
        return Source(Config.fromfile(config), str(config), Path(member['checkpoint']))

    def _clean(self, dataset: object) -> dict[str, tuple[int, ...]] | None:
        cells = base_dataset(dataset)
        if cells is None or cells.split == 'test':
            return None
        names = [cells.get_data_info(i)['name'] for i in range(len(cells))]
        return clean_members(
            self.members,
            names,
            load_folds(cells.folds_file),
            leave_out_seen=self.leave_out_seen,
            folds_path=cells.folds_file,
        )


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
