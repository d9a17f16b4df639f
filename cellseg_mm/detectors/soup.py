"""Soups: the weights of several members averaged into one model, at one model's cost.

In: checkpoints of one architecture. Out: one checkpoint that says whose weights are in it. The
statistics of batch normalisation are estimated anew for the averaged weights. Invariant: a soup
counts as having seen every image that any of its members saw, and it is never chosen by scores on
images that one of the candidates saw.

Source: Wortsman et al., Model soups (ICML 2022), uniform and greedy; statistics re-estimated as in
stochastic weight averaging (Izmailov et al., UAI 2018, section 3.2). The code is ours.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cellseg_mm.core import files
from cellseg_mm.core.errors import CheckpointError, ConfigError, FoldError
from cellseg_mm.core.progress import track
from cellseg_mm.core.provenance import code_commit
from cellseg_mm.data.config import dataset_settings, folds_path
from cellseg_mm.data.folds import excluded_by, load_folds
from cellseg_mm.data.labels import find_cases, read_gt
from cellseg_mm.detectors.member_models import checkpoint_member, fill_strictly
from cellseg_mm.ensemble.members import Member, check_classes, in_order
from cellseg_mm.model.detections import to_instance_set
from cellseg_mm.scores.records import ScoreParams
from cellseg_mm.scores.score import score
from cellseg_mm.weights.checkpoints import load_checkpoint_file

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Ingredient:
    """A checkpoint that may go into a soup."""

    member: Member
    state: State
    meta: dict


def load_ingredients(
    paths: Sequence[Path | str], class_names: Sequence[str] = ()
) -> list[Ingredient]:
    """Load checkpoints, sorted by content.

    Raises:
        CheckpointError: One cannot be read, or they are of different architectures.
        PredictionError: One is given twice, or they have other classes.
    """
    loaded = []
    for path in paths:
        content = load_checkpoint_file(path)
        if 'state_dict' not in content:
            raise CheckpointError(f'{path}: has no state_dict; expected a checkpoint of a training')
        loaded.append(
            Ingredient(
                checkpoint_member(path, content), content['state_dict'], content.get('meta', {})
            )
        )
    members = [item.member for item in loaded]
    order = in_order(members)
    check_classes(members, class_names or members[0].class_names)
    loaded = [loaded[i] for i in order]
    shapes = [{name: tuple(t.shape) for name, t in item.state.items()} for item in loaded]
    for item, shape in zip(loaded, shapes, strict=True):
        if shape != shapes[0]:
            differing = sorted({*shape.items()} ^ {*shapes[0].items()})
            raise CheckpointError(
                f'{item.member.source}: is of another architecture than {loaded[0].member.source} '
                f'(first difference: {differing[0][0]}); only equal shapes can be averaged; merge '
                'their predictions with tools/ensemble.py instead'
            )
    return loaded


def average_states(states: Sequence[State]) -> State:
    """Average weights in float64; integer buffers (counters) are those of the first."""
    first = states[0]
    mixed: State = {}
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            mixed[name] = tensor.clone()
            continue
        total = torch.zeros_like(tensor, dtype=torch.float64)
        for state in states:
            total += state[name]
        mixed[name] = (total / len(states)).to(tensor.dtype)
    return mixed


def clean_folds(members: Sequence[Member]) -> frozenset[int]:
    """Return the folds that every member left out; none if they were trained with other folds."""
    if len({member.fold_hash for member in members}) > 1 or not members[0].fold_hash:
        return frozenset()
    return frozenset.intersection(*(member.clean_folds for member in members))


def mixed_provenance(ingredients: Sequence[Ingredient], *, selected_on: int | None = None) -> dict:
    """Return ``meta['cellseg']`` of a soup.

    It is clean only on folds that every ingredient left out, and on none if the ingredients
    were trained with different folds. A common held-out fold that the ingredients were chosen on
    is not clean any more: fusion measured there would be flattered by the choice. The own fold of
    checkpoints of one fold stays what it is, as for a best checkpoint.
    """
    members = [item.member for item in ingredients]
    hashes = {member.fold_hash for member in members}
    folds = {member.fold for member in members}
    clean = clean_folds(members)
    is_one_split = len(hashes) == 1
    fold = folds.pop() if is_one_split and len(folds) == 1 else None
    return {
        **ingredients[0].meta.get('cellseg', {}),
        'fold': fold,
        'fold_hash': hashes.pop() if is_one_split else '',
        'excluded_folds': sorted(clean - {fold, selected_on}) if is_one_split else [],
        'selected_on': selected_on,
        'commit': code_commit(),
        'soup': [member.to_json() for member in members],
    }


def norm_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms that use a batch's own statistics when ``model`` trains."""
    model.train()  # a backbone with norm_eval sets its norms back to evaluation
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]


def reestimate_norms(model: nn.Module, batches: Iterable[dict], *, seed: int = 0) -> int:
    """Estimate the statistics of batch norms anew: the plain mean over training batches.

    The batches go through the training path, so that norms of the heads see the same mixture of
    proposals as in training. Norms that are frozen keep the average of the members' statistics,
    which are all equal then.

    Args:
        model: Changed in place, left in evaluation mode.
        batches: Batches of a training data loader.
        seed: Of the sampling of proposals.

    Returns:
        Batches used; 0 when there is no such norm.

    Raises:
        ConfigError: There are norms to estimate and no batch.
    """
    norms = norm_layers(model)
    if not norms:
        model.eval()
        return 0
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative mean
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - mmdet's samplers draw from it
    torch.manual_seed(seed)
    n_batches = 0
    with torch.no_grad():
        for batch in batches:
            data = model.data_preprocessor(batch, True)
            model(**data, mode='loss')
            n_batches += 1
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
    if not n_batches:
        raise ConfigError(
            f'soup: {len(norms)} norms need their statistics from training images, none were '
            'given; set a number of batches above 0'
        )
    return n_batches


def _check_in_force(members: Sequence[Member], path: Path) -> None:
    """Refuse members of other folds: the file does not say which images they saw."""
    in_force, theirs = load_folds(path).hash, members[0].fold_hash
    if in_force != theirs:
        raise FoldError(
            f'{members[0].source}: trained with folds {theirs}, {path} has {in_force}; nobody '
            'knows which of these images it saw; restore the folds file or train again'
        )


def training_batches(cfg: Config, n_batches: int, members: Sequence[Member]) -> Iterable[dict]:
    """Return the first ``n_batches`` of a config's training data loader, the same every time.

    Images that none of the members saw are left out, whatever fold the config is of: statistics
    estimated on them would let the soup see what it counts as unseen.

    Raises:
        FoldError: The members left out folds that are not those in force, or nothing is left.
    """
    loader_settings = copy.deepcopy(cfg.train_dataloader)
    unseen = sorted(clean_folds(members))
    if unseen:
        settings = dataset_settings(Config({'x': loader_settings}), 'x')
        _check_in_force(members, folds_path(settings))
        settings.fold, settings.exclude_folds = unseen[0], unseen
    return islice(Runner.build_dataloader(loader_settings, seed=0), n_batches)


def greedy_choice(
    candidates: Sequence[float], score_of: Callable[[list[int]], float]
) -> tuple[list[int], float]:
    """Choose ingredients: best first, each stays if the soup does not get worse with it.

    Args:
        candidates: Each ingredient's own score.
        score_of: Score of the soup of the given ingredients.

    Returns:
        The indices chosen, in the order in which they joined, and the score of their soup.
    """
    order = sorted(range(len(candidates)), key=lambda i: (-candidates[i], i))
    chosen, best = [order[0]], candidates[order[0]]
    for index in order[1:]:
        value = score_of([*chosen, index])
        if value >= best:
            chosen, best = [*chosen, index], value
    return chosen, best


def honest_fold(ingredients: Sequence[Ingredient]) -> int:
    """Return the fold that a greedy choice may look at: one that no candidate saw.

    Raises:
        FoldError: There is none, so that a choice would reward what was memorised.
    """
    members = [item.member for item in ingredients]
    clean = clean_folds(members)
    if not clean:
        seen = '; '.join(member.describe() for member in members)
        raise FoldError(
            f'greedy soup: there is no fold that none of the candidates saw ({seen}); each '
            'would be judged on images that others trained on; use checkpoints of one fold, or '
            'train with exclude_folds (docs/fusion.md), or make a uniform soup'
        )
    return min(clean)


@dataclass(frozen=True, slots=True)
class Soup:
    """What was made.

    Attributes:
        path: The checkpoint.
        members: The checkpoints in it.
        n_batches: Training batches for the norms.
        selected_on: The fold that a greedy choice looked at; its score there is flattered.
        scores: Of a greedy choice, mask AP50 of each candidate by its path, and of the soup.
    """

    path: Path
    members: tuple[Member, ...]
    n_batches: int
    selected_on: int | None
    scores: dict[str, float]


class SoupKitchen:
    """Makes soups of one config's architecture.

    Args:
        cfg: Config of the checkpoints; its training images re-estimate the norms.
        n_batches: Training batches for the norms.
        device: Where to compute.
    """

    def __init__(self, cfg: Config, *, n_batches: int = 50, device: str = 'cpu') -> None:
        init_default_scope(cfg.get('default_scope', 'mmdet'))  # as a Runner would
        self.cfg = cfg
        self.n_batches = n_batches
        self.device = device

    def cook(self, ingredients: Sequence[Ingredient]) -> tuple[nn.Module, int]:
        """Return the averaged model in evaluation mode, and the batches its norms saw."""
        model = MODELS.build(copy.deepcopy(self.cfg.model)).to(self.device)
        where = f'{ingredients[0].member.source}: does not fit {self.cfg.filename}'
        fill_strictly(model, average_states([item.state for item in ingredients]), where)
        if len(ingredients) == 1 or not norm_layers(model):
            return model.eval(), 0
        members = [item.member for item in ingredients]
        batches = training_batches(self.cfg, self.n_batches, members)
        return model, reestimate_norms(model, track(batches, description='norms'))

    def score(self, ingredients: Sequence[Ingredient], fold: int) -> float:
        """Return the mask AP50 of a soup on a fold's held-out images."""
        model, _ = self.cook(ingredients)
        loader_settings = copy.deepcopy(self.cfg.val_dataloader)
        settings = dataset_settings(Config({'x': loader_settings}), 'x')
        settings.split, settings.fold = 'val', fold
        loader = Runner.build_dataloader(loader_settings, seed=0)
        classes = tuple(settings.metainfo.classes)
        every = find_cases(
            settings.data_root,
            'train',
            len(classes),
            exclude_names=excluded_by(folds_path(settings)),
        )
        cases = {c.name: c for c in every}
        with torch.no_grad():
            found = [to_instance_set(s) for batch in loader for s in model.test_step(batch)]
        gt = [read_gt(cases[s.name]) for s in found]
        value = score(gt, found, classes, ScoreParams(n_bootstrap=0)).headline()['segm_AP50']
        return 0.0 if np.isnan(value) else value

    def uniform(
        self, ingredients: Sequence[Ingredient], path: Path | str, *, selected_on: int | None = None
    ) -> Soup:
        """Average everything and save; ``selected_on`` is the fold that chose the ingredients."""
        model, n_batches = self.cook(ingredients)
        save_soup(path, model, ingredients, selected_on=selected_on)
        members = tuple(item.member for item in ingredients)
        return Soup(Path(path), members, n_batches, selected_on, {})

    def greedy(self, ingredients: Sequence[Ingredient], path: Path | str) -> Soup:
        """Choose on images that no candidate saw, average and save.

        Raises:
            FoldError: There are no such images, see :func:`honest_fold`, or the folds in force are
                not those of the candidates.
        """
        fold = honest_fold(ingredients)
        members = [item.member for item in ingredients]
        _check_in_force(members, folds_path(dataset_settings(self.cfg, 'val_dataloader')))
        single = [self.score([item], fold) for item in ingredients]
        chosen, best = greedy_choice(
            single, lambda index: self.score([ingredients[i] for i in index], fold)
        )
        parts = [ingredients[i] for i in sorted(chosen)]
        soup = self.uniform(parts, path, selected_on=fold)
        scores = {item.member.source: v for item, v in zip(ingredients, single, strict=True)}
        scores['soup'] = best
        return Soup(soup.path, soup.members, soup.n_batches, fold, scores)


def save_soup(
    path: Path | str,
    model: nn.Module,
    ingredients: Sequence[Ingredient],
    *,
    selected_on: int | None = None,
) -> None:
    """Write a soup as a checkpoint that every tool loads."""
    origin = mixed_provenance(ingredients, selected_on=selected_on)
    meta = {**ingredients[0].meta, 'cellseg': origin}
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    with files.atomic_path(path) as temporary:
        torch.save({'meta': meta, 'state_dict': state}, temporary)


def describe(soup: Soup) -> str:
    """Return what was made, for a terminal."""
    lines = [f'soup of {len(soup.members)}:']
    lines += [f'  {member.describe()}' for member in soup.members]
    if soup.n_batches:
        lines.append(f'batch norm statistics from {soup.n_batches} training batches')
    else:
        lines.append('no batch norm statistics to estimate: averaged as they are')
    if soup.selected_on is not None:
        lines.append(
            f'chosen by mask AP50 on fold {soup.selected_on}, which nobody saw in training (the '
            "soup's own score there is flattered by the choice):"
        )
        lines += [f'  {value:.4f}  {name}' for name, value in soup.scores.items()]
    lines.append(f'written: {soup.path}')
    lines.append(f'next: python tools/ensemble.py CONFIG --checkpoints {soup.path}')
    return '\n'.join(lines)
