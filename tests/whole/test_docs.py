"""What the Markdown pages name is there: files, links, options, targets, error sentences."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

import pytest

from cellseg_mm import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
PLACES = 'tools|configs|docs|tests|benchmarks|cellseg_mm'


def lines_of(page: Path) -> list[str]:
    """Lines of a page, with commands that a backslash breaks joined."""
    return re.sub(r'\\\n\s*', ' ', page.read_text(encoding='utf-8')).splitlines()


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r'\]\(([^)#]+)[^)]*\)', page.read_text(encoding='utf-8')):
        assert target.startswith('http') or (page.parent / target).exists(), target


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    for line in lines_of(page):
        for name in re.findall(rf'(?<![\w./])(?:{PLACES})/[\w./*?\[\]<>$-]+', line):
            is_placeholder = re.search(r'[<>$]', name)
            if not is_placeholder and "MMDetection's" not in line:
                assert list(ROOT.glob(name.rstrip('./'))), f'{page.name}: {name}'


def shared_options(text: str) -> set[str]:
    """Options that functions of ``cellseg_mm.cli`` add where a script calls them."""
    parser = argparse.ArgumentParser()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            add = getattr(cli, node.func.id, None)
            if node.func.id.startswith('add_') and add is not None:
                add(parser, **{word.arg: ast.literal_eval(word.value) for word in node.keywords})
    return {word for action in parser._actions for word in action.option_strings}


def options_of(tool: Path) -> set[str]:
    """Options that a script adds to its parser, and those of the scripts and modules it shares."""
    text = tool.read_text(encoding='utf-8')
    found = {'--help', *re.findall(r"'(--[a-z][a-z-]*)'", text)}
    if tool.suffix == '.py':
        found |= shared_options(text)
    for name in re.findall(r'^\s*(?:import|from) (\w+)', text, re.MULTILINE):
        shared = tool.parent / f'{name}.py'
        if shared.is_file():
            found |= options_of(shared)
    return found


def commands() -> list[tuple[Path, Path, str]]:
    """Each command line of the pages that calls a script: page, script, the words after it."""
    found = []
    for page in PAGES:
        for line in lines_of(page):
            pattern = r'((?:tools|benchmarks)/\w+\.py)((?: +[^`|;&#\s]+)*)'
            found += [(page, ROOT / name, rest) for name, rest in re.findall(pattern, line)]
    return found


def test_options_of_commands_exist() -> None:
    n_options = 0
    for page, script, rest in commands():
        for option in re.findall(r'(?<![\w-])--[a-z][a-z-]*', rest):
            n_options += 1
            assert option in options_of(script), f'{page.name}: {script.name} has no {option}'
    assert n_options > 30


def test_make_targets_exist() -> None:
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r'`make ([a-z-]+)`', page.read_text(encoding='utf-8')))
        assert named <= targets, page.name


def test_sentences_of_troubleshooting_are_those_of_the_program() -> None:
    table = (ROOT / 'docs/troubleshooting.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `(.+?)` \|', table, re.MULTILINE)
    assert len(rows) >= 10
    # The program's text with its pieces joined and what they fill in left out
    source = '\n'.join(p.read_text(encoding='utf-8') for p in (ROOT / 'cellseg_mm').rglob('*.py'))
    said = re.sub(r"'\s*\n\s*f?'", '', source)
    said = re.sub(r'\{[^{}]*\}', '...', said)
    for row in rows:
        parts = re.split(r'loss_|\[?\.\.\.\]?|folds\.json|\b[NMAB]\b', row)
        wanted = [part.strip(' ,:') for part in parts if len(part.strip(' ,:')) > 7]
        assert wanted, row
        for part in wanted:
            assert part in said, f'{row}: {part}'
