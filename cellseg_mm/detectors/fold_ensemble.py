"""The fold ensemble inside mmengine's test loop: all members predict, one answer comes out.

In: a Runner's test loop and the members' checkpoints. Out: data samples with fused instances, so
that evaluators, dumps, visualisers and launchers work unchanged. Invariant: the runner has its own
model back when the test is over, however it ends; and no member predicts a training image that it
may have seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope

from cellseg_mm.core.errors import PredictionError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.detectors.member_models import MemberModels
from cellseg_mm.fusion.fuse import FuseReport, PostProcess, Rule, fuse_with_report
from cellseg_mm.model.detections import case_name, to_instance_set, to_pred_instances


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
        results: dict[int, DetDataSample] = {}
        for chosen, index in groups.items():
            batch = data if len(groups) == 1 else self._part(data, index)
            for i, fused in zip(index, self._predict_each(chosen, batch), strict=True):
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

    def _note(
        self, name: str, chosen: Sequence[int], counts: Sequence[int], report: FuseReport
    ) -> None:
        by_member = dict(zip(chosen, counts, strict=True))
        self.reports[name] = report
        self.member_counts[name] = tuple(by_member.get(i, -1) for i in range(len(self.models)))

    def _stripped(self, fused: InstanceSet) -> InstanceSet:
        if self.keep_mask_probs:
            return fused
        return fused.without_probs()
