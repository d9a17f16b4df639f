"""Names of classes: compared in one form, exactly first, and never in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellseg_mm.core.errors import CellSegError, LabelMapError
from cellseg_mm.data.importing.classes import Classes, build_classes, clean, nearest
from cellseg_mm.data.importing.sources import ImportParams

HERE = Path('a.json')
COMPOSED, DECOMPOSED = 'Z\u00e4hne', 'Za\u0308hne'


def build(
    own: list[str], found: list[str], *, is_fixed: bool = False, **options: object
) -> Classes:
    return build_classes(ImportParams(**options), own, found=found, is_fixed=is_fixed)


def test_names_have_one_form() -> None:
    assert clean(f'\u00a0 {DECOMPOSED}\t') == COMPOSED
    assert nearest('lymphocite', ['Lymphocyte', 'epithelial']) == 'Lymphocyte'
    assert nearest('xyz', ['Lymphocyte']) == ''


@pytest.mark.parametrize(
    'options',
    [
        pytest.param({'class_map': {f' {COMPOSED}': 'x '}, 'class_names': ('x',)}, id='--map'),
        pytest.param({'class_names': (f'{COMPOSED} ',)}, id='--classes'),
        pytest.param({'class_names': (DECOMPOSED,), 'class_map': {}}, id='--classes, decomposed'),
    ],
)
def test_blanks_and_unicode_forms_do_not_count(options: dict) -> None:
    classes = build([], [f'{DECOMPOSED} '], **options)
    assert classes.number(f'{DECOMPOSED} ', HERE) == classes.number(COMPOSED, HERE) == 1
    assert not classes.remarks


def test_skip_wins_over_every_class() -> None:
    for options in ({}, {'class_names': ('a', 'b')}):
        classes = build(['a', 'b'], ['a', 'b'], skipped=frozenset({f' b{chr(0xA0)}'}), **options)
        assert classes.number('b', HERE) == 0
        assert classes.number('a', HERE) == 1


def test_exact_names_come_first_and_capitals_are_said() -> None:
    classes = build([], ['Cell', 'cell', 'CELLS'], class_names=('cell', 'other', 'cells'),
                    class_map={'Cell': 'other'})  # fmt: skip
    assert [classes.number(name, HERE) for name in ('Cell', 'cell', 'CELLS')] == [2, 1, 3]
    assert list(classes.remarks) == ["class 'CELLS' is taken as 'cells': only capitals differ"]
    with pytest.raises(LabelMapError, match='differs only in capitals from cell and Cell'):
        classes.number('CELL', HERE)


def test_capitals_of_the_format_itself_are_no_news() -> None:
    classes = build(['epithelial'], [], is_fixed=True)
    assert classes.number('Epithelial', HERE) == 1
    assert not classes.remarks


def test_an_option_takes_every_spelling_that_differs_in_capitals() -> None:
    classes = build(['Debris', 'DEBRIS', 'a'], ['Debris', 'DEBRIS', 'a'], class_names=('a',),
                    skipped=frozenset({'debris'}))  # fmt: skip
    assert [classes.number(name, HERE) for name in ('Debris', 'DEBRIS', 'a')] == [0, 0, 1]
    assert len(classes.remarks) == 2


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'skipped': frozenset({'debriss'})}, r"--skip: .* no class 'debriss'; .*nearest: debris"),
        ({'class_map': {'celll': 'cell'}}, r"--map: .* no class 'celll'; .*nearest: cell"),
        (
            {'class_map': {'cell': 'x'}, 'class_names': ('a', 'b')},
            r"'x' is none of a, b; .*--class",
        ),
        ({'class_map': {'cell': 'debris'}, 'skipped': frozenset({'cell '})}, '--map and --skip'),
        ({'class_names': ('a', 'A')}, 'must differ'),
        ({'class_names': ('a', ' ')}, 'none empty'),
        ({'class_names': ('a', 'b'), 'single_class': 'c'}, 'all cells of the source have a class'),
        ({'skipped': frozenset({'cell', 'debris'})}, 'expected one name or more'),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict, message: str) -> None:
    with pytest.raises(CellSegError, match=message):
        build(['cell', 'debris'], ['cell', 'debris'], **options)


def test_categories_that_differ_only_in_capitals_name_the_way_out() -> None:
    with pytest.raises(CellSegError, match=r'Cell and cell must differ.*--classes Cell'):
        build(['Cell', 'cell'], ['Cell', 'cell'])
    classes = build(['Cell', 'cell'], ['Cell', 'cell'], class_names=('Cell',))
    assert [classes.number(name, HERE) for name in ('Cell', 'cell')] == [1, 1]


def test_cells_without_a_name() -> None:
    for options in ({'class_names': ('a',)}, {'class_names': ('b', 'a'), 'single_class': 'A'}):
        classes = build(['x'], ['', 'x'], **options)
        assert classes.names[classes.number(' ', HERE) - 1] == 'a'
    assert build(['x'], ['', 'x'], skipped=frozenset({''})).number('', HERE) == 0
    with pytest.raises(LabelMapError, match=r'without a class name; .*--class'):
        build(['x'], ['', 'x']).number('', HERE)
