"""training.fold_guard: every pair of a checkpoint and a data set, by what the one has seen."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, combinations, product
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from torch import nn

import cellseg_mm.components
from cellseg_mm.core.errors import CheckpointError, ConfigError, FoldError
from cellseg_mm.data.config import DataSettings
from cellseg_mm.data.pixel_size import save_size
from cellseg_mm.training import fold_guard
from cellseg_mm.training.fold_guard import (
    check_classes,
    refuse_other_class_count,
    refuse_other_folds,
    refuse_resuming,
    refuse_seen_start,
)

pytestmark = pytest.mark.mm
assert cellseg_mm.components

FOLDS = range(3)


@dataclass(frozen=True)
class Part:
    """What the guard reads of a data set."""

    fold: int
    split: str = 'val'
    exclude_folds: tuple[int, ...] = ()
    fold_hash: str = 'ours'
    fold_lineage: tuple[str, ...] = ('first', 'second')
    data_root: str = 'data'
    data_hash: str = 'cells'
    folds_file: str = 'folds.json'


def some_folds() -> list[tuple[int, ...]]:
    """Every set of excluded folds but all of them."""
    return list(chain.from_iterable(combinations(FOLDS, n) for n in range(len(FOLDS))))


def trained(fold: int, *excluded: int, folds: str = 'ours', data: str = 'cells') -> dict:
    return {'fold': fold, 'excluded_folds': list(excluded), 'fold_hash': folds, 'data_hash': data}


@pytest.mark.parametrize('excluded', some_folds(), ids=str)
@pytest.mark.parametrize(('model_fold', 'fold'), list(product(FOLDS, FOLDS)))
def test_validation_images_are_scored_by_models_that_never_saw_them(
    model_fold: int, fold: int, excluded: tuple[int, ...]
) -> None:
    seen = set(FOLDS) - {model_fold, *excluded}  # the images that this model was trained on
    if fold in seen:
        with pytest.raises(FoldError, match=f'trained for fold {model_fold} .*has seen images'):
            refuse_other_folds(trained(model_fold, *excluded), Part(fold))
    else:
        refuse_other_folds(trained(model_fold, *excluded), Part(fold))


def test_resuming_needs_the_very_same_images() -> None:
    refuse_other_folds(trained(1, 2), Part(1, 'train', (2,)))
    for other in (Part(1, 'train'), Part(2, 'train', (1,)), Part(0, 'train', (2,))):
        with pytest.raises(FoldError, match='use the config of its own fold'):
            refuse_other_folds(trained(1, 2), other)
    with pytest.raises(FoldError, match=r'folds theirs, folds\.json now has folds ours'):
        refuse_other_folds(trained(1, folds='theirs'), Part(1))


@pytest.mark.parametrize('excluded', some_folds(), ids=str)
@pytest.mark.parametrize('held_out', some_folds()[1:], ids=str)
@pytest.mark.parametrize('model_fold', FOLDS)
def test_training_begins_with_weights_that_never_saw_what_it_holds_out(
    model_fold: int, held_out: tuple[int, ...], excluded: tuple[int, ...]
) -> None:
    part = Part(held_out[0], 'train', held_out[1:])
    seen = sorted(set(held_out) & (set(FOLDS) - {model_fold, *excluded}))
    start = trained(model_fold, *excluded)
    if seen:
        named = ', '.join(map(str, seen))
        with pytest.raises(FoldError, match=f'has seen images of fold {named} of folds.json'):
            refuse_seen_start(start, part)
    else:
        refuse_seen_start(start, part)


def test_weights_of_other_data_are_welcome_and_of_other_folds_are_not() -> None:
    refuse_seen_start(trained(0, folds='theirs', data='cats'), Part(1, 'train'))
    with pytest.raises(FoldError, match='of folds theirs and has seen images of fold 1'):
        refuse_seen_start(trained(1, folds='theirs'), Part(1, 'train'))


@pytest.mark.parametrize(('model_fold', 'fold'), list(product(FOLDS, FOLDS)))
def test_models_of_folds_that_were_extended_count_by_what_they_held_out(
    model_fold: int, fold: int
) -> None:
    for start in (trained(model_fold, folds=f, data='fewer') for f in ('first', 'second')):
        if model_fold == fold:
            refuse_seen_start(start, Part(fold, 'train'))
            refuse_other_folds(start, Part(fold))
        else:
            with pytest.raises(FoldError, match=f'has seen images of fold {fold} of folds.json'):
                refuse_seen_start(start, Part(fold, 'train'))
            with pytest.raises(FoldError, match='has seen images that this config holds out'):
                refuse_other_folds(start, Part(fold))
        with pytest.raises(FoldError, match='trained with folds'):  # others were trained on
            refuse_other_folds(start, Part(fold, 'train'))


def test_a_model_of_all_images_is_no_start_after_their_correction_either() -> None:
    everything = {'split': 'all', 'fold': None, 'fold_hash': '', 'data_hash': 'uncorrected'}
    refuse_seen_start({**everything, 'data_root': 'elsewhere'}, Part(1, 'train'))
    with pytest.raises(FoldError, match='has seen images of fold 1'):
        refuse_seen_start({**everything, 'data_root': 'data'}, Part(1, 'train'))


class Head(nn.Module):
    def __init__(self, num_classes: int, class_agnostic: bool = False) -> None:
        super().__init__()
        self.num_classes, self.class_agnostic = num_classes, class_agnostic


def model_of(**heads: nn.Module) -> nn.Module:
    model = nn.Module()
    model.roi_head = nn.Module()
    for name, head in heads.items():
        model.roi_head.add_module(name, head)
    return model


def test_heads_have_as_many_classes_as_the_data() -> None:
    names = ('round', 'long')
    cascade = nn.ModuleList([Head(2), Head(3)])
    refuse_other_class_count(model_of(bbox_head=Head(2), mask_head=Head(2)), names)
    refuse_other_class_count(model_of(bbox_head=Head(9)), ())  # the data name none
    refuse_other_class_count(model_of(mask_head=Head(1, class_agnostic=True)), names)
    refuse_other_class_count(model_of(semantic_head=Head(9)), names)  # no head of cells
    with pytest.raises(ConfigError, match=r'model\.roi_head\.bbox_head\.1\.num_classes=3: .*2 cl'):
        refuse_other_class_count(model_of(bbox_head=cascade, mask_head=Head(2)), names)


@dataclass(frozen=True)
class Classes:
    """A data set's classes."""

    names: tuple[str, ...]

    @property
    def metainfo(self) -> dict:
        return {'classes': self.names}


@pytest.mark.parametrize(
    'content',
    [
        {'meta': {'cellseg': {'class_names': ['round', 'long']}}},
        {'meta': {'dataset_meta': {'classes': ('round', 'long')}}},  # trained by MMDetection
    ],
    ids=['ours', 'stock'],
)
@pytest.mark.parametrize('names', [('long', 'round'), ('round', 'oval'), ('round', 'long', 'x')])
def test_a_model_of_other_classes_is_never_scored(
    content: dict, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    says = f'a.pth: its classes are round, long; the config has {", ".join(names)}; '
    check_classes(content, Classes(('round', 'long')), 'a.pth', is_fine_tuning=False)
    check_classes({'meta': {}}, Classes(names), 'a.pth', is_fine_tuning=False)
    with pytest.raises(CheckpointError, match=says):
        check_classes(content, Classes(names), 'a.pth', is_fine_tuning=False)
    said: list[str] = []
    monkeypatch.setattr(fold_guard, 'print_log', lambda text, *_, **__: said.append(text))
    check_classes(content, Classes(names), 'a.pth', is_fine_tuning=True)
    (text,) = said  # weights to begin with may be of others, in so many words
    assert text.startswith(says)
    assert ('begin as those of the other classes' in text) == (len(names) == 2)
    assert ('do not fit and begin anew' in text) == (len(names) == 3)


def test_resuming_needs_the_recipe_of_the_checkpoint() -> None:
    """MMDetection's own --resume goes wherever last_checkpoint points."""
    record = {'parts': {'model': 'm', 'train_cfg': 't', 'load_from': ''}}
    refuse_resuming('a.pth', {}, record)
    longer = {'parts': {'model': 'm', 'train_cfg': 'u', 'load_from': 'x'}}
    refuse_resuming('a.pth', longer, record)
    with pytest.raises(CheckpointError, match=r'a\.pth: was trained with other .*of model than'):
        refuse_resuming('a.pth', {'parts': {'model': 'n'}}, record)


def test_checkpoints_carry_the_size_of_pixels(tmp_path: Path) -> None:
    @dataclass
    class Known:
        settings: DataSettings

    said = DataSettings(tmp_path, tmp_path / 'folds.json', ('a',), ((0, 0, 0),), False, 'train', 0)
    runner = SimpleNamespace(cfg=Config())
    assert fold_guard.dataset_um(runner, Known(said)) is None
    save_size(tmp_path / 'pixel_size.json', (0.5, 0.25))
    assert fold_guard.dataset_um(runner, Known(said)) == (0.5, 0.25)
    runner.cfg.um_per_px = 0.4
    assert fold_guard.dataset_um(runner, Known(said)) == (0.4, 0.4)
    assert fold_guard.dataset_um(runner, None) == (0.4, 0.4)
