"""The fold ensemble as a hook of MMDetection's test loop.

In: members. Out: their fused answer in the place of the model's. Invariant: a missing member is
reported, never skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mmdet.registry import HOOKS
from mmengine.config import Config
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.data.folds import load_folds
from cellseg_mm.detectors.fold_ensemble import FoldEnsembleModel
from cellseg_mm.detectors.member_models import (
    MemberModels,
    MemberSource,
    Placement,
    check_same_pipeline,
    load_members,
)
from cellseg_mm.ensemble.members import Member, clean_members
from cellseg_mm.fusion import views
from cellseg_mm.fusion.fuse import (
    FuseReport,
    Rule,
    cut_at,
    from_spec,
    post_from_spec,
    to_spec,
)
from cellseg_mm.fusion.settings import DEFAULT_FUSION
from cellseg_mm.pipeline.dataset import base_dataset


@HOOKS.register_module()
class FoldEnsembleHook(Hook):
    """Put a fold ensemble in the place of the runner's model for the time of a test.

    Args:
        members: One each. In a config a dict with ``checkpoint`` and perhaps ``config`` (a file);
            without it the runner's own config is used.
        rule: Fusion rule, as on the command line (``soft_mask:iou_thr=0.4``), or its record.
        post: Post-processing, as on the command line (``disjoint,min_area_px=20``).
        mask_thr: Least probability of a mask's pixel, of members and of averages (unless the rule
            has its own); None leaves the configs' own.
        placement: ``auto``, ``device`` or ``turns``; see ``MemberModels``.
        leave_out_seen: On training images use only the members that never saw them.
        tta: Test-time augmentation of each member, as on the command line (``d4``); the data
            loader's pipeline must be the one that ``views.TtaSpec.tta_pipeline`` makes.
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
        members: Sequence[MemberSource | Mapping[str, str]],
        *,
        rule: str | Rule = DEFAULT_FUSION,
        post: str = '',
        mask_thr: float | None = None,
        placement: Placement = 'auto',
        leave_out_seen: bool = False,
        tta: str | None = None,
        keep_mask_probs: bool = False,
    ) -> None:
        if not members:
            raise ConfigError('FoldEnsembleHook.members: is empty; give at least one checkpoint')
        self.sources = tuple(members)
        self.rule = cut_at(from_spec(rule), mask_thr) if isinstance(rule, str) else rule
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
        sources = [_source(member, runner) for member in self.sources]
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
        return None if self.tta is None else views.from_spec(self.tta).tta_model()

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


def _source(member: MemberSource | Mapping[str, str], runner: Runner) -> MemberSource:
    if isinstance(member, MemberSource):
        return member
    checkpoint, path = Path(member['checkpoint']), member.get('config')
    if path is None:
        return MemberSource(runner.cfg, 'the config', checkpoint)
    return MemberSource(Config.fromfile(path), str(path), checkpoint)
