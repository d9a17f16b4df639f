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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn

from cellseg_mm.core.instances import InstanceSet

LIKELY_PROPOSAL = 0.9  # a region proposal that scores so much most likely shows a cell


@contextmanager
def watch_proposals(model: nn.Module) -> Iterator[list[float]]:
    """Note where each region proposal network cuts while ``model`` predicts inside the block.

    Yields:
        A list that grows by one number per image and network: 0 where the cap was not reached,
        else the lowest score that was passed on.
    """
    cuts: list[float] = []
    heads = [m for name, m in model.named_modules() if name.split('.')[-1] == 'rpn_head']
    for head in heads:
        head.predict = _noting(head.predict, head, cuts)
    try:
        yield cuts
    finally:
        for head in heads:
            del head.predict  # the class's own is there again


def _noting(predict, head: nn.Module, cuts: list[float]):
    def noting(*args: object, **kwargs: object) -> list:
        found = predict(*args, **kwargs)
        cap = cap_of(head)
        for proposals in found:
            is_cut = 0 < cap <= len(proposals)
            cuts.append(float(proposals.scores.min()) if is_cut else 0.0)
        return found

    return noting


def cap_of(head: nn.Module) -> int:
    """Return the most proposals that a head passes on when it predicts; 0 without a limit."""
    return int((getattr(head, 'test_cfg', None) or {}).get('max_per_img', 0))


@HOOKS.register_module()
class ProposalCapHook(Hook):
    """Log after each validation and test where region proposals were cut."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._cuts: list[float] = []
        self._by_name: dict[str, float] = {}

    def _begin(self, runner: Runner) -> None:
        self._open.close()  # of a loop that an error ended
        self._by_name = {}
        self._cuts = self._open.enter_context(watch_proposals(runner.model))

    def _note(self, outputs: Sequence | None) -> None:
        # Views and members give several numbers per image; a batch's highest stands for all.
        names = [str(sample.metainfo.get('name', '?')) for sample in outputs or ()]
        values = list(self._cuts)
        self._cuts.clear()
        if len(values) != len(names):
            values = [max(values, default=0.0)] * len(names)
        self._by_name.update(zip(names, values, strict=True))

    def _end(self) -> None:
        self._open.close()
        reached = {name: cut for name, cut in self._by_name.items() if cut > 0}
        if not reached:
            return
        likely = sum(cut >= LIKELY_PROPOSAL for cut in reached.values())
        name = max(reached, key=lambda key: (reached[key], key))
        text = (
            f'{len(reached)} of {len(self._by_name)} images reached the cap of region proposals '
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
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: Sequence | None = None
    ) -> None:
        """Note the batch."""
        self._note(outputs)

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: Sequence | None = None
    ) -> None:
        """Note the batch."""
        self._note(outputs)

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
