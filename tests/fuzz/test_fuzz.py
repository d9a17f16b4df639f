"""A few hundred cases of each reader's fuzz, and what the long runs have found."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from cellseg_mm.core.errors import CellSegError, FoldError, PredictionError
from cellseg_mm.data.folds import load_folds
from cellseg_mm.results.predictions import load_predictions
from tests.fuzz import run
from tests.fuzz.mutate import ODD_VALUES, json_values, tiff_tags, zip_members
from tests.fuzz.readers import READERS, Reader, good_folds, good_predictions, good_tiffs

N_CASES = {'tiff': 150, 'idmap': 150, 'folds': 150, 'predictions': 120, 'checkpoint': 60}


@pytest.mark.parametrize('name', sorted(READERS))
def test_damaged_files_are_refused_or_read(name: str) -> None:
    if name == 'checkpoint':
        pytest.importorskip('torch')
    tally = run.fuzz(name, cases=N_CASES[name], seed=1)
    assert tally.failures == []
    assert tally.n_cases == tally.n_refused + tally.n_accepted == N_CASES[name]
    assert len(tally.sentences) > 8  # the damage reaches many places


@pytest.mark.parametrize('name', sorted(READERS))
def test_files_to_start_from_are_good(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    for i, content in enumerate(reader.good(tmp_path)):
        path = tmp_path / f'{i}{reader.suffix}'
        path.write_bytes(content)
        reader.read(path)


def broken_reader(path: Path) -> None:
    """Crash, hang, or raise what no reader may, by the first byte."""
    first = path.read_bytes()[:1]
    if first == b'c':
        faulthandler.disable()  # this crash is wanted; its dump would frighten who reads the output
        os.kill(os.getpid(), signal.SIGSEGV)
    while first == b'h':
        pass
    if first == b'u':
        raise ZeroDivisionError('undocumented')
    if first == b'n':
        raise CellSegError('names no file')
    raise CellSegError(f'{path}: is bad')


def test_the_harness_notices_every_kind_of_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    letters = [b'c', b'x', b'h', b'u', b'n', b'x']

    def letter(content: bytes, rng: np.random.Generator) -> bytes:
        number = rng.bit_generator.seed_seq.entropy[1]  # the case's
        return letters[number]

    reader = Reader('.x', broken_reader, lambda folder: [b''], letter)
    monkeypatch.setitem(READERS, 'broken', reader)
    monkeypatch.setattr(run, 'SECONDS', 1)
    tally = run.fuzz('broken', cases=len(letters), seed=0)
    assert tally.n_cases == len(letters)
    assert tally.n_refused == 2
    text = ' '.join(tally.failures)
    for part in (
        'ended by signal 11',
        'more than 1 s of CPU',
        'ZeroDivisionError',
        'not name the file',
    ):
        assert part in text


def test_array_header_that_is_no_literal(tmp_path: Path) -> None:
    """numpy hands it to Python's tokenizer, whose error is no ValueError."""
    content = good_predictions(tmp_path)[0]

    def spoil(data: bytes, rng: np.random.Generator) -> bytes:
        return data.replace(b'(', b'{', 1) if data.startswith(b'\x93NUMPY') else data

    path = tmp_path / 'p.npz'
    for seed in range(6):
        path.write_bytes(zip_members(spoil)(content, np.random.default_rng(seed)))
        with pytest.raises(PredictionError, match=r'p\.npz: '):
            load_predictions(path)


@pytest.mark.parametrize('n_folds', [6, 2**31, 10**30])
def test_more_folds_than_cases_cost_nothing(tmp_path: Path, n_folds: int) -> None:
    """A list was made for each of 2 ** 31 folds, before anything was compared."""
    content = json.loads(good_folds(tmp_path)[0]) | {'n_folds': n_folds}
    path = tmp_path / 'f.json'
    path.write_text(json.dumps(content))
    with pytest.raises(FoldError, match=rf'n_folds is {n_folds}, but there are 5 cases'):
        load_folds(path)


def test_a_damaged_json_depends_on_its_own_draws_only() -> None:
    before = json.dumps(ODD_VALUES)
    text = json.dumps({'a': [1, {'b': [2, 3]}], 'c': {'d': 'e'}}).encode()
    damaged = text
    for seed in range(3000):
        damaged = json_values(damaged if seed % 20 else text, np.random.default_rng(seed))
    assert json.dumps(ODD_VALUES) == before


def test_tags_are_changed_where_tags_are(tmp_path: Path) -> None:
    good = good_tiffs(tmp_path)[1]
    start = int.from_bytes(good[4:8], 'little')
    end = start + 2 + 12 * int.from_bytes(good[start : start + 2], 'little')
    for seed in range(20):
        bad = tiff_tags(good, np.random.default_rng(seed))
        assert len(bad) == len(good)
        differs = [i for i, (a, b) in enumerate(zip(good, bad, strict=True)) if a != b]
        assert all(start + 2 <= i < end for i in differs)
