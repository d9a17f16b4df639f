"""The jobs that are killed: a command, where its results are, and when to kill it.

Every job works on the same small sample data and models (MICRO of tests/support/micro.py), which
are made once by :func:`prepare_data` and :func:`prepare_models`. A job's command may be started
again and again in one folder; ``results`` tells when two endings are equal.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.micro import MICRO

Digest = dict[str, str]
CONFIG = 'configs/sample/fold0.py'
N_ITERS = 4


@dataclass(frozen=True)
class Job:
    """One kind of work.

    Attributes:
        words: Bench folder, folder of this run -> command line, beginning with the tool.
        results: Folder of this run -> digest of every final result.
        begins: Text in the output that begins the moment to kill in; '' for the start.
        ends: Text in the output that ends it; '' for the end of the process.
        watch: Pattern below the run's folder whose appearance begins the moment instead.
    """

    words: Callable[[Path, Path], list[str]]
    results: Callable[[Path], Digest]
    begins: str = ''
    ends: str = ''
    watch: str = ''


def _options(**changes: object) -> list[str]:
    settings = {
        **MICRO,
        'train_cfg.max_iters': N_ITERS,
        'train_cfg.val_interval': 2,
        'default_hooks.checkpoint.interval': 2,
        # small crops and images: a start is mostly the job, not its arithmetic
        'train_dataloader.dataset.dataset.pipeline.3.crop_size': [64, 64],
        'val_dataloader.dataset.pipeline.1.scale_factor': 0.25,
        'test_dataloader.dataset.pipeline.1.scale_factor': 0.25,
        'model.roi_head.mask_head.num_convs': 1,
        **changes,
    }
    return ['--cfg-options', *(f'{key}={json.dumps(value)}' for key, value in settings.items())]


def file_digest(path: Path) -> str:
    """Return a hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def files_digest(*patterns: str) -> Callable[[Path], Digest]:
    """Return a function that digests the files of these patterns."""

    def digest(folder: Path) -> Digest:
        found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
        return {str(p.relative_to(folder)): file_digest(p) for p in found if p.is_file()}

    return digest


def tested_digest(folder: Path) -> Digest:
    """Digest scores and predictions without the experiment's name, which is the time of start."""
    import numpy as np

    scores = json.loads((folder / 'out/val.scores.json').read_text())
    scores['provenance'].pop('experiment')
    digest = hashlib.sha256(json.dumps(scores, sort_keys=True).encode())
    with np.load(folder / 'out/val.predictions.npz') as content:
        for name in sorted(set(content) - {'header'}):
            digest.update(name.encode() + content[name].tobytes())
        header = json.loads(content['header'].tobytes())
    header['provenance'].pop('experiment')
    digest.update(json.dumps(header, sort_keys=True).encode())
    return {'scores and predictions': digest.hexdigest()[:16]}


def report_digest(folder: Path) -> Digest:
    """Digest the page without the words that say when it was made."""
    text = (folder / 'out/report.html').read_text(encoding='utf-8')
    text = re.sub(r'This page was made on [^<]*', '', text)
    return {'report.html': hashlib.sha256(text.encode()).hexdigest()[:16]}


def checkpoint_digest(path: Path) -> str:
    """Return a hash of weights, optimizer state and step; not of times in the log's history."""
    import torch

    content = torch.load(path, map_location='cpu', weights_only=False)
    digest = hashlib.sha256(str(content['meta']['iter']).encode())
    for name in ('state_dict', 'optimizer'):
        _update(digest, content.get(name))  # the best checkpoint is kept without optimizer
    return digest.hexdigest()[:16]


def _update(digest: object, value: object) -> None:
    import torch

    if isinstance(value, torch.Tensor):
        digest.update(str(value.dtype).encode() + str(tuple(value.shape)).encode())
        digest.update(value.contiguous().cpu().numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _update(digest, item)
    else:
        digest.update(repr(value).encode())


def training_digest(folder: Path) -> Digest:
    """Digest the last checkpoint, and the best one: which it is, and what is in it."""
    found = {
        path.name: checkpoint_digest(path)
        for path in sorted([*folder.glob(f'iter_{N_ITERS}.pth'), *folder.glob('best_*.pth')])
    }
    mark = json.loads((folder / 'finished.json').read_text())
    return {**found, 'best': mark['best'], 'recipe': mark['recipe']}


def train_words(bench: Path, folder: Path) -> list[str]:
    """Train, or go on."""
    return ['tools/train.py', CONFIG, '--work-dir', str(folder), '--resume', *_options()]


JOBS = {
    'prepare': Job(
        lambda bench, folder: [
            *('tools/prepare_data.py', str(bench / 'many'), '--out', str(folder)),
            *('--workers', '1', '--folds', '2'),
        ],
        files_digest('folds.json', 'index.json', 'data_report.txt'),
    ),
    'train': Job(train_words, training_digest, begins='Iter(train) [1/', ends='Iter(val)'),
    'validate': Job(train_words, training_digest, begins='Iter(val)', ends='Iter(train) [3/'),
    'checkpoint': Job(train_words, training_digest, watch='.tmp-*.pth'),
    'test': Job(
        lambda bench, folder: [
            *('tools/test.py', CONFIG, str(bench / 'fold0/iter_4.pth'), '--work-dir', str(folder)),
            *('--out', str(folder / 'out'), *_options()),
        ],
        tested_digest,
        begins='scoring',
    ),
    'predict': Job(
        lambda bench, folder: [
            *('tools/predict.py', CONFIG, str(bench / 'fold0/iter_4.pth')),
            *(str(bench / 'data/test_release'), '--out', str(folder / 'out')),
            *('--format', 'geojson', 'csv', 'label-map', *_options()),
        ],
        files_digest('out/**/*'),
    ),
    'fuse': Job(
        lambda bench, folder: [
            *('tools/ensemble.py', CONFIG, '--predictions', str(bench / 'member0.npz')),
            *(str(bench / 'member1.npz'), '--fusion', 'soft_mask', '--out', str(folder / 'out')),
        ],
        files_digest('out/**/*.npz', 'out/**/*.json', 'out/**/*.zip'),
    ),
    'report': Job(
        lambda bench, folder: [
            *('tools/report.py', '--work-dir', str(bench / 'fold0'), '--out', str(folder / 'out')),
        ],
        report_digest,
    ),
}


def prepare_data(bench: Path) -> None:
    """Make the sample data, unless they are there."""
    from cellseg_mm.data.drawing.sample import make_sample
    from cellseg_mm.data.preparing import prepare
    from cellseg_mm.data.preparing.groups import GroupRule
    from cellseg_mm.data.preparing.records import PrepareParams

    if (bench / 'data/folds.json').is_file():
        return
    make_sample(bench / 'many', n_train=16, n_test=4, seed=4)
    make_sample(bench / 'data', n_train=6, n_test=2, seed=3)
    params = PrepareParams(n_folds=2, n_workers=1, groups=GroupRule(manifest=False))
    report = prepare.prepare(bench / 'data', params)
    report.raise_for_errors()


def prepare_models(bench: Path, run: Callable[[list[str], Path], int]) -> None:
    """Make one trained and scored fold and two members' predictions, unless they are there."""
    if not (bench / 'fold0/finished.json').is_file():
        code = run(train_words(bench, bench / 'fold0'), bench / 'fold0.log')
        if code:
            sys.exit(f'{bench}/fold0.log: training the model for the jobs failed ({code})')
        words = ['tools/test.py', CONFIG, '--work-dir', str(bench / 'fold0'), *_options()]
        code = run(words, bench / 'test0.log')
        if code:
            sys.exit(f'{bench}/test0.log: scoring the model for the jobs failed ({code})')
    _make_members(bench)


def _make_members(bench: Path) -> None:
    """Jitter the ground truth of the test images; the sample has none on disk, so draw cells."""
    import numpy as np

    from cellseg_mm.core.instances import InstanceSet
    from cellseg_mm.data.labels import find_cases
    from cellseg_mm.results.predictions import Predictions, save_predictions

    if (bench / 'member1.npz').is_file():
        return
    cases = find_cases(bench / 'data', 'test', 4)
    for member in range(2):
        sets = []
        for case in cases:
            rng = np.random.default_rng([case.image_id, 5])
            height, width = case.image_hw
            layer = np.zeros((1, height, width), dtype=np.int32)
            class_ids = []
            for y in range(4, height - 24, 24):
                for x in range(4, width - 24, 24):
                    dy, dx = rng.integers(0, 4, 2) + member
                    layer[0, y + dy : y + dy + 15, x + dx : x + dx + 13] = len(class_ids) + 1
                    class_ids.append(int(rng.integers(4)))
            n = len(class_ids)
            found = InstanceSet.from_label_layers(
                case.name, case.image_id, layer, np.zeros(n, int), np.array(class_ids)
            )
            scores = np.random.default_rng([case.image_id, member]).random(n).astype(np.float32)
            sets.append(
                InstanceSet(
                    found.name,
                    found.image_id,
                    found.image_hw,
                    class_ids=found.class_ids,
                    scores=scores,
                    boxes_xyxy=found.boxes_xyxy,
                    rles=found.rles,
                )
            )
        names = ['epithelial', 'lymphocyte', 'neutrophil', 'macrophage']
        provenance = {'class_names': names, 'split': 'test', 'fold': member}
        save_predictions(bench / f'member{member}.npz', Predictions(tuple(sets), provenance))
