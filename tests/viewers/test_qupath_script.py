"""The script for QuPath says words that the command knows. It ran in Groovy, see docs/qupath.md."""

from __future__ import annotations

import re
from importlib.resources import files

from tools.import_data import FINDERS
from tools.predict import parse_args


def test_its_options_are_those_of_predict() -> None:
    text = (files('cellseg_mm.viewers') / 'cellseg.groovy').read_text(encoding='utf-8')
    options = set(re.findall(r"'(--[a-z-]+)'", text))
    assert {'--out', '--format', '--tissue', '--um-per-px', '--red-blue'} == options
    words = ['m.cellseg', 'a.tif', '--out', 'o', '--format', 'geojson', '--red-blue', 'normal']
    args = parse_args([*words, '--tissue', 'r.json', '--um-per-px', '0.25'])
    assert (args.format, args.tissue, args.um_per_px) == (['geojson'], 'r.json', 0.25)
    assert 'geojson' in FINDERS  # what its last line is for


def test_braces_and_quotes_close() -> None:
    text = (files('cellseg_mm.viewers') / 'cellseg.groovy').read_text(encoding='utf-8')
    code = re.sub(r'/\*.*?\*/', '', text, flags=re.DOTALL)
    code = re.sub(r"//[^\n']*$", '', code, flags=re.MULTILINE)
    for opening, closing in ('()', '[]', '{}'):
        assert code.count(opening) == code.count(closing)
