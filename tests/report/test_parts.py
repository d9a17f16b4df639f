"""Texts cannot end the script element; colours stand out from the page."""

from __future__ import annotations

import json

import pytest

from cellseg_mm.report.parts import contrast, readable, script_json


@pytest.mark.parametrize('text', ['</script>', '<!--', ']]>', '&amp;', '\u2028', '"\\'])
def test_script_json_comes_back_and_ends_no_element(text: str) -> None:
    written = script_json({'a': [text]})
    assert json.loads(written) == {'a': [text]}
    assert not set(written) & set('<>&\u2028\u2029')


def test_script_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match='JSON'):
        script_json(float('nan'))


@pytest.mark.parametrize('page', [(255, 255, 255), (22, 27, 34)])
@pytest.mark.parametrize('colour', [(240, 228, 66), (0, 114, 178), (255, 255, 255), (0, 0, 0)])
def test_readable_colours_stand_out(colour: tuple, page: tuple) -> None:
    assert contrast(readable(colour, page), page) >= 3
    if contrast(colour, page) >= 3:
        assert readable(colour, page) == colour


def test_contrast_of_black_and_white() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
