"""Soups: averages by hand, norm statistics by hand, and no choice on images that were seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import cellseg_mm  # noqa: F401  (makes mmdet importable where mmcv has no compiled ops)

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmengine.config import Config  # noqa: E402
from torch import nn  # noqa: E402

from cellseg_mm.core.errors import CheckpointError, ConfigError, FoldError  # noqa: E402
from cellseg_mm.detectors import soup  # noqa: E402
from cellseg_mm.detectors.member_models import Source, load_member  # noqa: E402
from cellseg_mm.detectors.soup import Ingredient  # noqa: E402
from cellseg_mm.ensemble.members import Member, clean_members  # noqa: E402
from tests.support.tiny_folds import TinyFolds, make_tiny_folds, save_checkpoint  # noqa: E402

pytestmark = pytest.mark.mm


@pytest.fixture(scope='module')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyFolds]:
    root = tmp_path_factory.mktemp('tiny')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CELLSEG_DATA', str(root / 'data'))
        yield make_tiny_folds(root)


def ingredient(name: str, fold: int | None, folds: str = 'h', excluded: tuple = ()) -> Ingredient:
    member = Member(name, name, fold=fold, fold_hash=folds, excluded_folds=excluded)
    return Ingredient(member, {}, {})


def test_average_of_two_by_hand() -> None:
    first = {'w': torch.tensor([1.0, 2.0]), 'h': torch.tensor([1.0]).half(), 'n': torch.tensor(7)}
    second = {'w': torch.tensor([3.0, 0.5]), 'h': torch.tensor([2.0]).half(), 'n': torch.tensor(9)}
    mixed = soup.average_states([first, second])
    assert mixed['w'].tolist() == [2.0, 1.25]
    assert mixed['h'].tolist() == [1.5]
    assert mixed['h'].dtype == torch.float16
    assert mixed['n'].item() == 7
    mixed['n'] += 1
    assert first['n'].item() == 7


@pytest.mark.parametrize(
    ('singles', 'soups', 'wanted'),
    [
        # best first is 1; with 2 it gains, with 0 it loses
        pytest.param([0.2, 0.5, 0.4], {(1, 2): 0.6, (1, 2, 0): 0.59}, ([1, 2], 0.6), id='two'),
        pytest.param([0.2, 0.5], {(1, 0): 0.4999}, ([1], 0.5), id='best alone'),
        pytest.param([0.5, 0.5], {(0, 1): 0.5}, ([0, 1], 0.5), id='ties stay'),
    ],
)
def test_greedy_choice(singles: list, soups: dict, wanted: tuple) -> None:
    assert soup.greedy_choice(singles, lambda index: soups[tuple(index)]) == wanted


def test_greedy_choice_needs_a_fold_that_nobody_saw() -> None:
    one_fold = [ingredient('a', 1), ingredient('b', 1)]
    assert soup.honest_fold(one_fold) == 1
    held_out = [ingredient('a', 0, excluded=(2,)), ingredient('b', 1, excluded=(2,))]
    assert soup.honest_fold(held_out) == 2
    for unfair in (
        [ingredient('a', 0), ingredient('b', 1)],
        [ingredient('a', 0), ingredient('b', 0, folds='other')],
        [ingredient('a', 0, folds=''), ingredient('b', 0, folds='')],
        [ingredient('a', None), ingredient('b', 0)],
    ):
        with pytest.raises(FoldError, match='no fold that none of the candidates saw'):
            soup.honest_fold(unfair)


def test_a_soup_has_seen_what_its_parts_saw(tiny: TinyFolds) -> None:
    folds = tiny.folds
    parts = [ingredient('a', 0, folds.hash, (2,)), ingredient('b', 1, folds.hash, (2,))]
    made = soup.mixed_provenance(parts)
    assert (made['fold'], made['fold_hash'], made['excluded_folds']) == (None, folds.hash, [2])
    assert [part['source'] for part in made['soup']] == ['a', 'b']
    member = Member('soup', 's', None, folds.hash, tuple(made['excluded_folds']))
    names = folds.val_names(2)
    assert set(clean_members([member], names, folds, leave_out_seen=False)) == set(names)
    for fold in (0, 1):
        with pytest.raises(FoldError, match='has trained on image'):
            clean_members([member], folds.val_names(fold), folds, leave_out_seen=False)
    other = soup.mixed_provenance([parts[0], ingredient('c', 0, 'other')])
    assert (other['fold'], other['fold_hash'], other['excluded_folds']) == (None, '', [])


def test_a_held_out_fold_is_used_up_by_choosing_on_it(tiny: TinyFolds, tmp_path: Path) -> None:
    cfg = Config.fromfile(tiny.configs[0])
    paths = []
    for fold in (0, 1):
        model = load_member(Source(cfg, 'c', tiny.checkpoints[fold])).model
        path = tmp_path / f'{fold}.pth'
        trained = {'fold': fold, 'fold_hash': tiny.folds.hash, 'excluded_folds': [2]}
        paths.append(save_checkpoint(path, model, **trained))
    kitchen = soup.SoupKitchen(cfg, n_batches=1)
    ingredients = soup.load_ingredients(paths)
    names = tiny.folds.val_names(2)
    for is_greedy in (False, True):
        make = kitchen.greedy if is_greedy else kitchen.uniform
        made = make(ingredients, tmp_path / 'soup.pth')
        member = load_member(Source(cfg, 'c', made.path)).member
        # A soup of one is its ingredient, but chosen all the same.
        own = {member.fold} - {None}
        assert member.clean_folds == (own if is_greedy else own | {2})
        if is_greedy:
            assert made.selected_on == 2
            with pytest.raises(FoldError):
                clean_members([member], names, tiny.folds, leave_out_seen=False)


class Toy(nn.Module):
    """Two norms, one of which stays frozen as a backbone with norm_eval does."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.frozen = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def train(self, mode: bool = True) -> Toy:
        super().train(mode)
        self.frozen.eval()
        return self

    def data_preprocessor(self, data: dict, training: bool) -> dict:
        assert training
        return data

    def forward(self, x: torch.Tensor, mode: str) -> torch.Tensor:
        assert mode == 'loss'
        return self.frozen(self.live(x))


def test_norm_statistics_are_the_mean_over_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(5 + i, 2, generator=generator) * (i + 1) + i for i in range(4)]
    model = Toy()
    model.live.running_mean += 100
    model.live.momentum = 0.03
    before = model.frozen.running_mean.clone()
    assert soup.reestimate_norms(model, [{'x': b} for b in batches]) == 4
    wanted_mean = torch.stack([b.mean(dim=0) for b in batches]).mean(dim=0)
    wanted_var = torch.stack([b.var(dim=0) for b in batches]).mean(dim=0)
    assert torch.allclose(model.live.running_mean, wanted_mean, rtol=1e-5)
    assert torch.allclose(model.live.running_var, wanted_var, rtol=1e-5)
    assert torch.equal(model.frozen.running_mean, before)
    assert model.live.momentum == 0.03
    assert not model.training
    with pytest.raises(ConfigError, match='batches above 0'):
        soup.reestimate_norms(model, [])


def test_uniform_soup_of_folds_loads_everywhere_and_is_repeatable(
    tiny: TinyFolds, tmp_path: Path
) -> None:
    cfg = Config.fromfile(tiny.configs[0])
    kitchen = soup.SoupKitchen(cfg, n_batches=2)
    made = []
    for i, paths in enumerate([tiny.checkpoints, tiny.checkpoints[::-1]]):
        made.append(kitchen.uniform(soup.load_ingredients(paths), tmp_path / f'{i}.pth'))
    assert made[0].n_batches == 2
    assert 'soup of 3' in soup.describe(made[0])
    loaded = [load_member(Source(cfg, 'c', m.path)) for m in made]
    states = [item.model.state_dict() for item in loaded]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    parts = [item.state for item in soup.load_ingredients(tiny.checkpoints)]
    name = 'roi_head.bbox_head.fc_cls.weight'
    wanted = torch.stack([part[name].double() for part in parts]).mean(dim=0)
    assert torch.allclose(states[0][name].double(), wanted, rtol=1e-6)
    norm = 'backbone.bn1.running_mean'
    assert not torch.equal(states[0][norm], parts[0][norm])
    member = loaded[0].member
    assert len(member.parts) == 3
    assert (member.fold, member.clean_folds) == (None, frozenset())


def test_greedy_soup_of_one_fold(tiny: TinyFolds, tmp_path: Path) -> None:
    cfg = Config.fromfile(tiny.configs[0])
    model = load_member(Source(cfg, 'c', tiny.checkpoints[0])).model
    with torch.no_grad():
        model.roi_head.bbox_head.fc_cls.bias += 0.5
    later = save_checkpoint(tmp_path / 'b.pth', model, fold=0, fold_hash=tiny.folds.hash)
    kitchen = soup.SoupKitchen(cfg, n_batches=1)
    made = kitchen.greedy(soup.load_ingredients([tiny.checkpoints[0], later]), tmp_path / 's.pth')
    assert made.selected_on == 0
    assert set(made.scores) == {str(tiny.checkpoints[0]), str(later), 'soup'}
    assert load_member(Source(cfg, 'c', made.path)).member.fold == 0


@pytest.mark.parametrize(
    ('parts', 'unseen'),
    [
        pytest.param(((1, ()), (1, ())), (1,), id='checkpoints of another fold than the config'),
        pytest.param(((0, (2,)), (1, (2,))), (2,), id='a common held-out fold'),
        pytest.param(((0, (1,)), (1, (0,))), (0, 1), id='two folds'),
        pytest.param(((0, ()), (1, ()), (2, ())), (0,), id='all folds: as the config says'),
    ],
)
def test_norms_never_see_images_that_the_soup_counts_as_unseen(
    tiny: TinyFolds, parts: tuple, unseen: tuple[int, ...]
) -> None:
    cfg = Config.fromfile(tiny.configs[0])
    members = [ingredient(str(i), f, tiny.folds.hash, e).member for i, (f, e) in enumerate(parts)]
    shown = {
        sample.name
        for batch in soup.training_batches(cfg, 12, members)
        for sample in batch['data_samples']
    }
    wanted = {name for fold in {0, 1, 2} - set(unseen) for name in tiny.folds.val_names(fold)}
    assert shown == wanted
    assert cfg.train_dataloader.dataset.dataset.fold == 0


def test_nothing_is_chosen_on_folds_that_changed_after_training(
    tiny: TinyFolds, tmp_path: Path
) -> None:
    """Fold 0 of other folds may hold images that the candidates trained on."""
    cfg = Config.fromfile(tiny.configs[0])
    model = load_member(Source(cfg, 'c', tiny.checkpoints[0])).model
    old = save_checkpoint(tmp_path / 'old.pth', model, fold=0, fold_hash='0' * 16)
    kitchen = soup.SoupKitchen(cfg, n_batches=1)
    with pytest.raises(FoldError, match=f'0000, .* has {tiny.folds.hash}; nobody knows'):
        kitchen.greedy(soup.load_ingredients([old]), tmp_path / 's.pth')
    assert not (tmp_path / 's.pth').exists()


def test_norms_need_the_folds_of_the_members(tiny: TinyFolds) -> None:
    cfg = Config.fromfile(tiny.configs[0])
    foreign = [ingredient('a', 0, 'other').member]
    with pytest.raises(FoldError, match='restore the folds file'):
        soup.training_batches(cfg, 1, foreign)


def test_other_architectures_are_refused(tiny: TinyFolds, tmp_path: Path) -> None:
    odd = tmp_path / 'odd.pth'
    torch.save({'meta': {}, 'state_dict': {'w': torch.zeros(1)}}, odd)
    with pytest.raises(CheckpointError, match=r'another architecture .*first difference'):
        soup.load_ingredients([tiny.checkpoints[0], odd])
