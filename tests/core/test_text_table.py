from __future__ import annotations

from cellseg_mm.core.text_table import text_table


def test_the_first_column_stands_left_and_the_others_right() -> None:
    assert text_table(['class', 'cells'], [['a', '7'], ['longer', '12345678']]).split('\n') == [
        'class      cells',
        'a              7',
        'longer  12345678',
    ]


def test_rows_may_end_early_and_notes_follow_their_last_cell() -> None:
    rows = [['x', '1', '2'], ['y', '3']]
    table = text_table(['h', 'm', 'n'], rows, least_width=4, notes=['', '[0, 1]'])
    assert table.split('\n') == [
        'h     m     n',
        'x     1     2',
        'y     3  [0, 1]',
    ]


def test_several_columns_may_stand_left_and_no_line_ends_in_blanks() -> None:
    table = text_table(['image', 'class', 'n'], [['', 'all', '10']], n_left=2)
    assert table.split('\n') == ['image  class   n', '       all    10']
    assert text_table(['image', 'class'], [['a', 'b']], n_left=2) == 'image  class\na      b'


def test_a_table_without_rows_is_its_head() -> None:
    assert text_table(['fold', 'images'], []) == 'fold  images'
