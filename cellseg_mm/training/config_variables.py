"""Variables of config files that change nothing.

In: a config's path and its content. Out: faults. Invariant: a variable is evaluated where it
stands, so one that a child sets anew after its base used it is named before anything is computed.
"""

from __future__ import annotations

import ast
import difflib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config

from cellseg_mm.training.faults import READ_KEYS, Fault, nodes_of, places_of


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """One file of a config's chain of bases.

    Attributes:
        path: The file.
        bases: What it inherits, as written.
        set_at: Line of the last assignment of each top-level name.
        used: Top-level names that it reads itself.
        used_of_base: Names that it reads as ``_base_.name``.
        readers: Line and target of the first statement that reads a name.
    """

    path: Path
    bases: tuple[str, ...]
    set_at: dict[str, int] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    used_of_base: set[str] = field(default_factory=set)
    readers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, path: Path) -> ConfigFile | None:
        """Read a file's names; None for one that is no Python of the text style."""
        text = path.read_text(encoding='utf-8')
        if path.suffix != '.py' or 'read_base' in text:
            return None
        tree = ast.parse(re.sub(r'\{\{.*?\}\}', '0', text))
        found = cls(path, _bases(tree))
        found.used_of_base.update(re.findall(r'\{\{\s*_base_\.(\w+)', text))
        for statement in tree.body:
            targets = _targets(statement)
            found.set_at.update(dict.fromkeys(targets, statement.lineno))
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
                    found.used.add(node.id)
                    where = f'{path.name}, line {statement.lineno}'
                    target = f' ({", ".join(targets)})' if targets else ''
                    found.readers.setdefault(node.id, where + target)
                is_of_base = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                if is_of_base and node.value.id == '_base_':
                    found.used_of_base.add(node.attr)
        return found


def _targets(statement: ast.stmt) -> list[str]:
    targets: Sequence[ast.expr] = ()
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    return [one.id for one in targets if isinstance(one, ast.Name)]


def _bases(tree: ast.Module) -> tuple[str, ...]:
    for statement in tree.body:
        if '_base_' in _targets(statement) and isinstance(statement, ast.Assign):
            try:
                value = ast.literal_eval(statement.value)
            except ValueError:
                return ()
            return (value,) if isinstance(value, str) else tuple(map(str, value))
    return ()


def chain_of(path: Path) -> list[ConfigFile]:
    """Return a config's own files, the config first; those of packages such as mmdet are left out.

    Empty where one of them is not of the text style.
    """
    files, todo = [], [path]
    while todo:
        one = ConfigFile.parse(todo.pop(0))
        if one is None:
            return []
        files.append(one)
        todo += [one.path.parent / base for base in one.bases if '::' not in base]
    return files


def inherited_options(path: Path) -> set[str]:
    """Return the dotted paths of all options that come from configs of packages such as mmdet."""
    found: set[str] = set()
    for one in chain_of(path):
        bases = tuple(base for base in one.bases if '::' in base)
        if bases:
            content = _content(bases, one.path.parent)
            found.update(f'{where}.{key}' for where, node in nodes_of(content) for key in node)
    return found


def variable_faults(cfg: Config, path: Path) -> Iterator[Fault]:
    """Yield the variables of a config and its bases that nothing reads.

    Args:
        cfg: Content of the config.
        path: The file; one without a base is a dumped config, whose variables are remains.
    """
    files = chain_of(path)
    for number, one in enumerate(files):
        read_below = set().union(*(child.used_of_base for child in files[:number]))
        unread = set(one.set_at) - READ_KEYS - one.used - read_below - {'custom_imports'}
        if not one.bases:
            continue
        unread = {name for name in unread if not name.startswith('_')}
        base = _content(one.bases, one.path.parent) if unread else {}
        for name in sorted(unread):
            yield from _unread(cfg, one, name, base, files[number + 1 :])


def _content(bases: Sequence[str], folder: Path) -> dict[str, object]:
    """Return what a config of nothing but these bases holds; mmengine knows where packages are."""
    named = [base if '::' in base else str(folder.resolve() / base) for base in bases]
    with tempfile.TemporaryDirectory() as scratch:
        child = Path(scratch) / 'bases.py'
        child.write_text(f'_base_ = {named!r}\n', encoding='utf-8')
        return Config.fromfile(child).to_dict()


def _unread(
    cfg: Config,
    one: ConfigFile,
    name: str,
    base: Mapping[str, object],
    above: Sequence[ConfigFile],
) -> Iterator[Fault]:
    where = f'{one.path}, line {one.set_at[name]}: {name}'
    content = cfg.to_dict()
    value = Config.fromfile(str(one.path)).to_dict().get(name)
    places = [place for place, found in places_of(content, name) if found != value]
    instead = f'set {", ".join(places[:6])} instead' if places else 'change what is made of it'
    if name in base:
        if base[name] == value:
            return
        reader = next((file.readers[name] for file in above if name in file.readers), 'its base')
        yield Fault(
            True,
            f'{where} is set here, but {reader} has used it already, so that this changes nothing; '
            f'expected it where it is read; {instead}',
        )
        return
    near = difflib.get_close_matches(name, READ_KEYS, n=1, cutoff=0.8)
    if near:
        yield Fault(
            True, f'{where} is read by nothing; did you mean {near[0]}? correct the spelling'
        )
    elif places:
        yield Fault(True, f'{where} is read by nothing here, so that it changes nothing; {instead}')
    elif not any(True for _ in places_of(content, name)):
        yield Fault(False, f'{where} is read by nothing; remove it, or use it where it belongs')
