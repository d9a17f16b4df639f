"""Draws of training samples that a resumed run repeats.

In: a dataset and a seed. Out: seeded draws. Invariant: draw n is the same in every run.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from mmdet.datasets.base_det_dataset import BaseDetDataset
from mmdet.registry import DATA_SAMPLERS, DATASETS
from mmengine.dataset import InfiniteSampler


@DATASETS.register_module()
class SeededDataset:
    """Make every sample a function of the seed and of its number in the stream of draws.

    Without it, augmentation depends on which worker got a sample and on what that worker had done
    before, and a resumed run sees other samples than an uninterrupted one. Put it outside all other
    wrappers and sample with :class:`SeededInfiniteSampler`, whose indices carry the draw's number.

    Args:
        dataset: The data set (or its config) that is wrapped.
    """

    def __init__(self, dataset: Mapping | BaseDetDataset, lazy_init: bool = False) -> None:
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, Mapping) else dataset
        self._metainfo = self.dataset.metainfo
        if not lazy_init:
            self.full_init()

    @property
    def metainfo(self) -> dict:
        """The wrapped data set's meta information."""
        return copy.deepcopy(self._metainfo)

    def full_init(self) -> None:
        """Let the wrapped data set read its list of cases."""
        self.dataset.full_init()

    def get_data_info(self, idx: int) -> dict:
        """Return the data info of a plain or a draw-carrying index."""
        return self.dataset.get_data_info(idx % len(self))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        draw, idx = divmod(int(index), len(self))
        seed = int(np.random.SeedSequence([draw, idx]).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - mmdet's transforms draw from it
        torch.manual_seed(seed)
        return self.dataset[idx]


@DATA_SAMPLERS.register_module()
class SeededInfiniteSampler(InfiniteSampler):
    """InfiniteSampler whose indices carry a number that differs for each draw, rank and seed.

    Index = number * len(dataset) + case; :class:`SeededDataset` takes it apart. The number of the
    d-th draw of a rank is ``(seed mod 2^20) * 2^36 + d * world_size + rank``, so two runs with
    different seeds share no augmentation.
    """

    def _indices_of_rank(self) -> Iterator[int]:
        base = (int(self.seed) % (1 << 20)) << 36
        for number, index in enumerate(self._infinite_indices()):
            if number % self.world_size == self.rank:
                yield (base + number) * self.size + index
