"""pipeline.seeding: equal seeds give equal samples; draws, epochs, workers and ranks differ."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.runner import Runner

import cellseg_mm.components
from cellseg_mm.pipeline.seeding import SeededInfiniteSampler

pytestmark = pytest.mark.mm
assert cellseg_mm.components


@pytest.fixture
def config(sample_config: Config) -> Config:
    sample_config.train_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    sample_config.train_dataloader.dataset.dataset.pipeline[3].crop_size = (64, 48)
    return sample_config


def samples(cfg: Config, n: int, seed: int = 3, **changes: object) -> list[tuple[str, np.ndarray]]:
    """Return name and pixels of the first ``n`` training samples."""
    loader_cfg = cfg.train_dataloader.copy()
    loader_cfg.update(changes)
    loader = Runner.build_dataloader(loader_cfg, seed=seed)
    batches = islice(iter(loader), n)
    return [(b['data_samples'][0].name, b['inputs'][0].numpy().copy()) for b in batches]


def equal(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        x[0] == y[0] and np.array_equal(x[1], y[1]) for x, y in zip(a, b, strict=True)
    )


def test_samples_depend_on_the_seed_alone(config: Config) -> None:
    alone = samples(config, 8)
    assert equal(alone, samples(config, 8))
    assert equal(alone, samples(config, 8, num_workers=2))  # however many workers share the work
    assert not equal(alone, samples(config, 8, seed=4))


def test_an_image_is_augmented_anew_in_each_epoch(config: Config) -> None:
    config.train_dataloader.dataset.dataset.pipeline[4].prob = 0.5
    n_images = 3  # of fold 0's training part
    drawn: dict[str, list[np.ndarray]] = {}
    for name, pixels in samples(config, 4 * n_images):
        drawn.setdefault(name, []).append(pixels)
    assert sorted(map(len, drawn.values())) == [4] * n_images  # each epoch has each image once
    for pixels in drawn.values():
        for i, first in enumerate(pixels):
            assert not any(np.array_equal(first, other) for other in pixels[i + 1 :])


def test_two_workers_do_not_draw_the_same(config: Config) -> None:
    """Worker 0 makes the even batches, worker 1 the odd ones; numpy's copied state is a trap."""
    found = samples(config, 12, num_workers=2)
    even, odd = found[::2], found[1::2]
    assert not any(np.array_equal(a[1], b[1]) for a in even for b in odd)


def test_ranks_and_runs_share_no_draw() -> None:
    numbers = {}
    for seed in (1, 2):
        for rank in (0, 1):
            sampler = SeededInfiniteSampler(range(5), seed=seed)
            sampler.rank, sampler.world_size = rank, 2
            numbers[seed, rank] = [index // 5 for index in islice(sampler._indices_of_rank(), 20)]
    flat = [number for row in numbers.values() for number in row]
    assert len(flat) == len(set(flat)) == 80
