"""Whether region proposals were cut off where cells may have been.

In: a model that predicts. Out: for each image that reached ``test_cfg.rpn.max_per_img`` the lowest
score of the proposals that were passed on; what was cut scored no more. Invariant: nothing the
model computes changes, and nothing is run twice.

A region proposal network always proposes more than there is, so that reaching the cap means
nothing by itself. Its score does: on 31 real validation images (tiny recipe, cap 1000) it is below
0.5 up to 50 cells, 0.6 to 0.9 at 200 to 300, and mostly above from 320 cells on, where neighbours
compete for places.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from mmdet.registry import HOOKS
from mmdet.structures import DetDataSample
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import nn

from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.core.proposals import LIKELY_PROPOSAL


class Cuts:
    """Where proposals were cut, one number per image and network, kept on the device.

    To read a number from a device waits until all that was asked of it is done, so that scores stay
    there until somebody wants them, and come over together.
    """

    def __init__(self) -> None:
        self._scores: list[torch.Tensor | None] = []

    def __len__(self) -> int:
        return len(self._scores)

    def add(self, score: torch.Tensor | None) -> None:
        """Add the lowest score that was passed on for an image; None where nothing was cut."""
        self._scores.append(score)

    def read(self) -> list[float]:
        """Return the numbers, 0 where the cap was not reached; waits once for each device."""
        cuts = [0.0] * len(self._scores)
        by_device: dict[torch.device, list[int]] = {}
        for i, score in enumerate(self._scores):
            if score is not None:
                by_device.setdefault(score.device, []).append(i)
        for indices in by_device.values():
            scores = torch.stack([self._scores[i].float() for i in indices])  # (N,)
            for i, value in zip(indices, scores.tolist(), strict=True):
                cuts[i] = value
        return cuts


@contextmanager
def watch_proposals(model: nn.Module) -> Iterator[Cuts]:
    """Record where each region proposal network cuts while ``model`` predicts inside the block.

    Yields:
        What grows by one number per image and network; ask for it after the model has predicted.
    """
    cuts = Cuts()
    heads = [m for name, m in model.named_modules() if name.split('.')[-1] == 'rpn_head']
    for head in heads:
        head.predict = _with_cuts_recorded(head.predict, head, cuts)
    try:
        yield cuts
    finally:
        for head in heads:
            del head.predict  # the class's own is there again


def _with_cuts_recorded(
    predict: Callable[..., list[InstanceData]], head: nn.Module, cuts: Cuts
) -> Callable[..., list[InstanceData]]:
    def predict_and_record(*args: object, **kwargs: object) -> list[InstanceData]:
        found = predict(*args, **kwargs)
        cap = cap_of(head)
        for proposals in found:
            is_cut = 0 < cap <= len(proposals)
            cuts.add(proposals.scores.min() if is_cut else None)
        return found

    return predict_and_record


def cap_of(head: nn.Module) -> int:
    """Return the most proposals that a head passes on when it predicts; 0 without a limit."""
    return int((getattr(head, 'test_cfg', None) or {}).get('max_per_img', 0))


@HOOKS.register_module()
class ProposalCapHook(Hook):
    """Log after each validation and test where region proposals were cut."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._cuts = Cuts()
        self._batches: list[tuple[list[str], int]] = []  # names, and how many numbers so far

    def _begin(self, runner: Runner) -> None:
        self._open.close()  # of a loop that an error ended
        self._batches = []
        self._cuts = self._open.enter_context(watch_proposals(runner.model))

    def _add_batch(self, outputs: Sequence[DetDataSample] | None) -> None:
        names = [str(sample.metainfo.get('name', '?')) for sample in outputs or ()]
        self._batches.append((names, len(self._cuts)))

    def _cut_by_name(self) -> dict[str, float]:
        cuts, start, found = self._cuts.read(), 0, {}
        for names, end in self._batches:
            values, start = cuts[start:end], end
            # Views and members give several numbers per image; a batch's highest stands for all.
            if len(values) != len(names):
                values = [max(values, default=0.0)] * len(names)
            found.update(zip(names, values, strict=True))
        return found

    def _end(self) -> None:
        self._open.close()
        by_name = self._cut_by_name()
        self._cuts, self._batches = Cuts(), []
        reached = {name: cut for name, cut in by_name.items() if cut > 0}
        if not reached:
            return
        likely = sum(cut >= LIKELY_PROPOSAL for cut in reached.values())
        name = max(reached, key=lambda key: (reached[key], key))
        text = (
            f'{len(reached)} of {len(by_name)} images reached the cap of region proposals '
            f'(model.test_cfg.rpn.max_per_img); what was cut scored up to {reached[name]:.3f} '
            f'({name})'
        )
        if likely:
            text += f'; on {likely} images cells are most likely lost: raise the cap'
        print_log(text, 'current', logging.WARNING if likely else logging.INFO)

    def before_val_epoch(self, runner: Runner) -> None:
        """Begin to watch."""
        self._begin(runner)

    def before_test_epoch(self, runner: Runner) -> None:
        """Begin to watch."""
        self._begin(runner)

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: Sequence[DetDataSample] | None = None,
    ) -> None:
        """Remember which images the batch had."""
        self._add_batch(outputs)

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: Sequence[DetDataSample] | None = None,
    ) -> None:
        """Remember which images the batch had."""
        self._add_batch(outputs)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Log."""
        self._end()

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Log."""
        self._end()


@dataclass(frozen=True, slots=True)
class CappedImage:
    """An image whose list of instances was cut off.

    Attributes:
        name: Case name.
        n_kept: Instances that were kept.
        lowest_score: The least score among them; whatever was lost scored no more than this.
    """

    name: str
    n_kept: int
    lowest_score: float


@dataclass(frozen=True, slots=True)
class CapReport:
    """Which images hit ``max_per_img``, and what it may have cost.

    Attributes:
        cap: ``test_cfg.rcnn.max_per_img``.
        score_thr: ``test_cfg.rcnn.score_thr``; nothing below it is ever kept.
        n_images: Images looked at.
        capped: Those with as many instances as the cap allows; highest ``lowest_score`` first.
    """

    cap: int
    score_thr: float
    n_images: int
    capped: tuple[CappedImage, ...]

    def describe(self, n_shown: int = 10) -> str:
        """Return sentences for a log or a terminal."""
        if not self.capped:
            return f'No image of {self.n_images} hit the cap of {self.cap} instances.'
        lines = [
            f'{len(self.capped)} of {self.n_images} images hit the cap of {self.cap} instances; '
            f'anything lost scored between the threshold {self.score_thr:g} and the score shown. '
            'Raise model.test_cfg.rcnn.max_per_img if you would keep such scores.'
        ]
        lines += [f'  {c.name}: kept down to {c.lowest_score:.4f}' for c in self.capped[:n_shown]]
        if len(self.capped) > n_shown:
            lines.append(f'  ... and {len(self.capped) - n_shown} more')
        return '\n'.join(lines)


def count_truncation(sets: Sequence[InstanceSet], cap: int, *, score_thr: float = 0.0) -> CapReport:
    """Find the images that have as many instances as the detector may return.

    Args:
        sets: One set per image, before anything else removed instances.
        cap: ``test_cfg.rcnn.max_per_img``; below 0 means no cap, as in MMDetection.
        score_thr: ``test_cfg.rcnn.score_thr``.
    """
    capped = [CappedImage(s.name, len(s), float(s.scores.min())) for s in sets if 0 < cap <= len(s)]
    capped.sort(key=lambda image: (-image.lowest_score, image.name))
    return CapReport(cap, score_thr, len(sets), tuple(capped))
