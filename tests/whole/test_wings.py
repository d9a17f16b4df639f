"""Who may import whom: read from every import statement of the package, lazy ones too.

The table is the house; it is read from CONTRIBUTING.md. A wing on the left may import those on the
right and itself. Modules at the root are named by their file.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / 'cellseg_mm'
TORCH = ('torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet')


def table_of_wings() -> tuple[dict[str, str], list[str]]:
    """Return what each wing may import and which have no torch, as CONTRIBUTING.md says."""
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    may_import: dict[str, str] = {}
    torch_free: list[str] = []
    for line in text[text.index('| wing |') :].splitlines()[2:]:
        if not line.startswith('|'):
            break
        name, _, imports = (cell.strip().replace('`', '') for cell in line.strip('|').split('|'))
        if name == '**with torch**':
            torch_free = list(may_import)
        elif not name.startswith('**'):
            may_import[name] = imports.replace(',', '')
    return may_import, torch_free


WINGS, TORCH_FREE = table_of_wings()
MAY_IMPORT = WINGS | {
    'cli.py': 'core',
    'runtime.py': 'core model',
    '__main__.py': 'core runtime.py cli.py',
    '__init__.py': 'runtime.py',
}
LATE_MMENGINE = {'report'}  # reads configs with it, inside functions
SUB_WINGS = ('preparing', 'importing', 'drawing')  # of data: never each other


def wing_of(module: str) -> str:
    """Return the wing (or root file) of a dotted module name."""
    parts = module.split('.')
    if len(parts) == 1:
        return '__init__.py'
    return parts[1] if (PACKAGE / parts[1]).is_dir() else f'{parts[1]}.py'


@cache
def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob('*.py')):
        parts = path.relative_to(ROOT).with_suffix('').parts
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


@cache
def imports_of(module: str) -> tuple[tuple[str, int, bool], ...]:
    """Return (imported module, line, whether at the top level) of each import of a module."""
    tree = ast.parse(modules()[module].read_text(encoding='utf-8'))
    type_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if id(node) in type_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{module}:{node.lineno}: relative import'
            base = node.module or ''
            names = [
                f'{base}.{alias.name}' if f'{base}.{alias.name}' in modules() else base
                for alias in node.names
            ]
        else:
            continue
        found += [(name, node.lineno, id(node) in top) for name in names]
    return tuple(found)


def test_the_table_has_a_row_for_each_wing_and_names_only_wings() -> None:
    folders = sorted(path.parent.name for path in PACKAGE.glob('*/__init__.py'))
    assert sorted(WINGS) == folders
    assert len(TORCH_FREE) == 11
    known = {*folders, *(path.name for path in PACKAGE.glob('*.py'))}
    assert {name for names in MAY_IMPORT.values() for name in names.split()} <= known


@pytest.mark.parametrize('module', sorted(modules()))
def test_imports_only_what_its_wing_may(module: str) -> None:
    wing = wing_of(module)
    if wing == 'components.py':
        return  # names everything that registers itself
    allowed = {wing, '__init__.py', *MAY_IMPORT[wing].split()}
    wrong = [
        f'line {line}: {name}'
        for name, line, _ in imports_of(module)
        if name.split('.')[0] == 'cellseg_mm' and wing_of(name) not in allowed
    ]
    assert not wrong, f'{module} ({wing}) imports {wrong}; it may import {sorted(allowed)}'


@pytest.mark.parametrize('module', sorted(m for m in modules() if wing_of(m) in TORCH_FREE))
def test_torch_free_wings_name_no_torch(module: str) -> None:
    wrong = [
        f'line {line}: {name}'
        for name, line, is_top in imports_of(module)
        if name.split('.')[0] in TORCH
        and not (name.startswith('mmengine') and wing_of(module) in LATE_MMENGINE and not is_top)
    ]
    assert not wrong


@pytest.mark.parametrize('wing', TORCH_FREE)
def test_a_fresh_interpreter_stays_without_torch(wing: str) -> None:
    names = [m for m in modules() if wing_of(m) == wing]
    code = (
        f'import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n'
        f'print([name for name in {TORCH!r} if name in sys.modules])'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == '[]'


def private_names_of_others(path: Path) -> list[str]:
    """Return the names with an underscore that a file takes from a module of the package."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    imported = [
        (node, f'{node.module}.{alias.name}', alias)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('cellseg_mm')
        for alias in node.names
    ]
    found = [f'line {node.lineno}: {name}' for node, name, a in imported if a.name.startswith('_')]
    rooms = {alias.asname or alias.name for _, name, alias in imported if name in modules()}
    return found + [
        f'line {node.lineno}: {ast.unparse(node)}'
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in rooms
        and node.attr.startswith('_')
    ]


@pytest.mark.parametrize(
    'path',
    [*modules().values(), *sorted((ROOT / 'tools').glob('*.py'))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_private_name_stays_in_its_file(path: Path) -> None:
    assert not private_names_of_others(path)


def test_private_names_are_seen(tmp_path: Path) -> None:
    path = tmp_path / 'a.py'
    path.write_text(
        'from cellseg_mm.core import rle\nfrom cellseg_mm.core.files import _hidden, replace\n'
        'rle._joined(rle.Runs)\nself._own()\n'
    )
    assert private_names_of_others(path) == [
        'line 2: cellseg_mm.core.files._hidden',
        'line 3: rle._joined',
    ]


def test_nobody_imports_tools_or_components() -> None:
    for module in modules():
        for name, line, _ in imports_of(module):
            assert name.split('.')[0] != 'tools', f'{module}:{line}'
            assert name != 'cellseg_mm.components', f'{module}:{line}'


@pytest.mark.parametrize(
    'module', [m for m in sorted(modules()) if m.startswith('cellseg_mm.data.')]
)
def test_sub_wings_of_data_are_entered_from_outside_only(module: str) -> None:
    """data/*.py imports no sub-wing, and no sub-wing imports another."""
    own = next((part for part in module.split('.') if part in SUB_WINGS), '')
    for name, line, _ in imports_of(module):
        parts = name.split('.')
        if parts[:2] == ['cellseg_mm', 'data'] and len(parts) > 2 and parts[2] in SUB_WINGS:
            assert parts[2] == own, f'{module}:{line} imports {name}'


def test_no_cycle_between_files() -> None:
    graph = {
        module: {name for name, _, _ in imports_of(module) if name in modules() and name != module}
        for module in modules()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, ' -> '.join((*trail[trail.index(module) :], module))
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize(
    'path', [p for p in sorted(PACKAGE.rglob('__init__.py')) if p.parent != PACKAGE], ids=str
)
def test_wings_begin_empty(path: Path) -> None:
    assert path.read_text() == ''


@pytest.mark.parametrize('module', sorted(modules()))
def test_sizes(module: str) -> None:
    """No file above 500 lines, no function above 60."""
    text = modules()[module].read_text(encoding='utf-8')
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f'{node.name} has {length} lines'


def test_no_small_room_for_one_other_alone() -> None:
    """A file of the package under 60 lines that only one other file uses belongs into that one.

    components.py is no user: it names what configs use.
    """
    users: dict[str, set[str]] = {}
    for module in set(modules()) - {'cellseg_mm.components'}:
        for name, _, _ in imports_of(module):
            users.setdefault(name, set()).add(module)
    tools = '\n'.join(p.read_text() for p in (ROOT / 'tools').glob('*.py'))
    small = [
        module
        for module, path in modules().items()
        if module.count('.') > 1
        and path.name != '__init__.py'
        and len(path.read_text().splitlines()) < 60
        and len(users.get(module, set())) == 1
        and module not in tools
    ]
    assert not small
