"""Options of predicting: which range of values holds."""

from __future__ import annotations

import pytest

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.data.intensity import ValueRange
from cellseg_mm.predict.options import choose_range

OF_DATA = ValueRange(0, 4095)
TRAINED = [{'source': 'a.pth', 'value_range': [0, 1000]}]
OLD = [{'source': 'a.pth'}]  # trained on 8 bits, or before ranges were recorded


@pytest.mark.parametrize(
    ('word', 'members', 'of_data', 'expected'),
    [
        ('auto', TRAINED, OF_DATA, None),
        ('5,99', TRAINED, OF_DATA, ValueRange(5, 99)),
        ('config', TRAINED, OF_DATA, ValueRange(0, 1000)),
        ('config', [*TRAINED, *OLD], None, ValueRange(0, 1000)),
        ('config', OLD, OF_DATA, OF_DATA),
        ('config', None, OF_DATA, OF_DATA),
        ('config', OLD, None, None),
    ],
)
def test_which_range_holds(
    word: str, members: object, of_data: ValueRange | None, expected: ValueRange | None
) -> None:
    found, source = choose_range(word, members, of_data)
    assert found == expected
    assert bool(source) == (expected is not None)


def test_members_of_different_ranges_are_refused() -> None:
    members = [*TRAINED, {'source': 'b.pth', 'value_range': [0, 255]}]
    with pytest.raises(ConfigError, match=r'ranges of values 0\.\.1000 and 0\.\.255; .*--range'):
        choose_range('config', members, None)
    assert choose_range('0,9', members, None)[0] == ValueRange(0, 9)


@pytest.mark.parametrize('word', ['', 'bright', '9', '9,1'])
def test_wrong_words(word: str) -> None:
    with pytest.raises(ConfigError, match='range'):
        choose_range(word, OLD, None)
