"""What an ensemble's members are, and which training images each of them has never seen.

In: what a checkpoint or a prediction file says about its origin. Out: :class:`Member`, and for each
image the members that may be scored on it. Invariant: a member whose folds are not those in force
is never taken for clean, because nobody knows what it saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cellseg_mm.core.errors import FoldError, PredictionError
from cellseg_mm.core.files import JsonValue
from cellseg_mm.data.folds import Folds
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.data.pixel_size import Um, stated


@dataclass(frozen=True, slots=True)
class Member:
    """One model, or one file of predictions.

    Attributes:
        source: Path of the checkpoint or prediction file.
        source_hash: First 16 hex digits of the file's SHA-256; members are sorted by it.
        fold: The fold that it held out; None if unknown.
        fold_hash: Hash of the folds it was trained with; '' if unknown.
        excluded_folds: Further folds that it never saw.
        class_names: Names of the classes; empty if unknown.
        score: Best validation score that the file records, or None.
        value_range: Of values of more than 8 bits, as in its training; None where none was needed.
        um_per_px: Height and width of a pixel of what it was trained on; None where nobody said it.
    """

    source: str
    source_hash: str
    fold: int | None = None
    fold_hash: str = ''
    excluded_folds: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    score: float | None = None
    value_range: ValueRange | None = None
    um_per_px: Um | None = None

    @property
    def clean_folds(self) -> frozenset[int]:
        """Folds of ``fold_hash`` of which it never saw an image."""
        return frozenset(k for k in (self.fold, *self.excluded_folds) if k is not None)

    def to_json(self) -> dict[str, JsonValue]:
        """Return what a result file records."""
        return {
            'source': self.source,
            'source_hash': self.source_hash,
            'fold': self.fold,
            'fold_hash': self.fold_hash,
            'excluded_folds': list(self.excluded_folds),
            'score': self.score,
            **({'value_range': self.value_range.to_json()} if self.value_range else {}),
            **({'um_per_px': [*self.um_per_px]} if self.um_per_px else {}),
        }

    def describe(self) -> str:
        """Return one line for a terminal."""
        fold = '-' if self.fold is None else str(self.fold)
        if self.excluded_folds:
            fold += f' (never saw {", ".join(map(str, sorted(self.clean_folds)))})'
        score = 'no score' if self.score is None else f'score {self.score:.4f}'
        return f'fold {fold}, folds {self.fold_hash or "unknown"}, {score}: {self.source}'


def trained_member(
    source: str,
    source_hash: str,
    trained: Mapping[str, object],
    *,
    score: float | None = None,
) -> Member:
    """Build a member from ``meta['cellseg']`` or the ``trained`` entry of a prediction file.

    Raises:
        PredictionError: It is a soup, an average of weights, which earlier versions made.
    """
    if parts := list_of(trained.get('soup')):
        raise PredictionError(
            f'{source}: is a soup of {len(parts)} checkpoints; soups are gone, because '
            'averaged folds scored 0.059 AP50 below their members; fuse the checkpoints themselves '
            'with tools/ensemble.py'
        )
    fold = trained.get('fold')
    return Member(
        source,
        source_hash,
        fold=fold if isinstance(fold, int) and not isinstance(fold, bool) else None,
        fold_hash=str(trained.get('fold_hash') or ''),
        excluded_folds=tuple(int(str(k)) for k in list_of(trained.get('excluded_folds'))),
        class_names=tuple(map(str, list_of(trained.get('class_names')))),
        score=score,
        value_range=ValueRange.from_json(trained.get('value_range')),
        um_per_px=stated(trained.get('um_per_px'), source),
    )


def list_of(value: object) -> list[object]:
    """Return what a file holds where it should hold a list; [] where it holds none."""
    return list(value) if isinstance(value, (list, tuple)) else []


def in_order(members: Sequence[Member]) -> list[int]:
    """Return the order in which members are used: by content, whatever order they came in.

    Raises:
        PredictionError: There is no member, or one is given twice.
    """
    if not members:
        raise PredictionError('ensemble: there is no member; at least one is needed')
    first_with: dict[str, int] = {}
    for i, member in enumerate(members):
        twin = first_with.setdefault(member.source_hash, i)
        if twin != i:
            raise PredictionError(
                f'ensemble: {member.source} and {members[twin].source} have the same content; a '
                'member that votes twice is no second opinion; give each once'
            )
    return sorted(range(len(members)), key=lambda i: members[i].source_hash)


def check_classes(members: Sequence[Member], class_names: Sequence[str]) -> None:
    """Refuse members that name other classes; those that name none are trusted.

    Raises:
        PredictionError: Names or their order differ.
    """
    wanted = tuple(class_names)
    for member in members:
        if member.class_names and member.class_names != wanted:
            raise PredictionError(
                f'{member.source}: its classes are {", ".join(member.class_names)}; the ensemble '
                f'has {", ".join(wanted)}; members must agree in names and order; leave it out'
            )


def clean_members(
    members: Sequence[Member],
    names: Sequence[str],
    folds: Folds,
    *,
    leave_out_seen: bool,
    folds_path: object = 'the folds file',
) -> dict[str, tuple[int, ...]]:
    """Find for each training image the members that never saw it.

    Args:
        members: All members.
        names: Names of the images that are to be predicted and scored.
        folds: The folds in force.
        leave_out_seen: Leave members out where they saw the image, instead of refusing.
        folds_path: Where ``folds`` came from, for messages.

    Returns:
        Indices of members by image name.

    Raises:
        FoldError: A member was trained with other folds; a member saw one of the images and
            ``leave_out_seen`` is off; or nobody is clean on an image.
    """
    for member in members:
        if member.fold_hash not in (folds.hash, *folds.lineage):
            raise FoldError(
                f'{member.source}: trained with folds {member.fold_hash or "unknown"}, '
                f'{folds_path} has {folds.hash}; nobody knows which of these images it saw; '
                'leave it out, or predict the test images'
            )
    fold_of = folds.fold_of()
    chosen: dict[str, tuple[int, ...]] = {}
    for name in names:
        fold = fold_of.get(name)
        if fold is None:
            raise FoldError(
                f'image {name}: is in no fold of {folds_path}; nobody knows who saw it; restore '
                'the folds file, or leave the image out'
            )
        chosen[name] = tuple(i for i, m in enumerate(members) if fold in m.clean_folds)
        if len(chosen[name]) < len(members) and not leave_out_seen:
            seen = next(m for m in members if fold not in m.clean_folds)
            raise FoldError(
                f'{seen.source}: has trained on image {name} (fold {fold} of folds {folds.hash}); '
                'an ensemble is never scored on images that a member saw; choose leave-out-seen to '
                'use only the others there, or predict the test images'
            )
        if not chosen[name]:
            raise FoldError(
                f'image {name}: every member has trained on it (fold {fold} of folds '
                f'{folds.hash}); add the member of fold {fold}, or choose the images of other folds'
            )
    return chosen
