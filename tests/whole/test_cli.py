"""How tools start and end: shared options, exit codes, --help without anything heavy."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cellseg_mm.cli import add_config_arguments, run_tool
from cellseg_mm.core.errors import ConfigError
from tests.support.micro import ROOT

TOOLS = sorted(path.name for path in (ROOT / 'tools').glob('*.py'))


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return parser.parse_args(words)


def test_config_options_are_read_as_mmengine_reads_them() -> None:
    from mmengine.config import DictAction

    words = ['--cfg-options', 'a.b=1', 'c=[1,2.5]', 'd="x y"', 'e=1,2', 'f=true', 'g=(1,[2,a])']
    theirs = argparse.ArgumentParser()
    theirs.add_argument('--cfg-options', nargs='+', action=DictAction)
    assert parse(*words).cfg_options == theirs.parse_args(words).cfg_options
    assert parse().cfg_options is None


def test_an_option_without_value_is_a_sentence(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parse('--cfg-options', 'a=1', 'resume')
    assert ended.value.code == 2
    assert '--cfg-options: resume: expected key=value' in capsys.readouterr().err


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ('main', 'code'),
    [
        pytest.param(lambda: None, 0, id='done'),
        pytest.param(lambda: 1, 1, id='findings'),
        pytest.param(lambda: fail(ConfigError('c.py: no such file')), 2, id="user's error"),
        pytest.param(lambda: fail(KeyboardInterrupt()), 130, id='Ctrl-C'),
        pytest.param(lambda: fail(SystemExit(143)), 143, id='SIGTERM'),
    ],
)
def test_exit_codes(main, code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        run_tool(main)
    assert ended.value.code == code


@pytest.mark.parametrize('name', TOOLS)
def test_tools_end_in_run_tool_and_help_needs_nothing_heavy(name: str) -> None:
    assert (ROOT / 'tools' / name).read_text().splitlines()[-1].startswith('    run_tool(main')
    code = (
        'import atexit, runpy, sys\n'
        "heavy = ('torch', 'mmengine', 'mmcv', 'mmdet', 'scipy', 'cv2')\n"
        'atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\n'
        f"sys.argv = ['{name}', '--help']\n"
        f"runpy.run_path('tools/{name}', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == '[]'


def bootstrap(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, 'tools/bootstrap.py', *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, 'CELLSEG_VENV': str(folder)},
    )


@pytest.mark.parametrize(
    ('name', 'said'),
    [
        pytest.param('thesis.txt', 'found files and no virtual environment', id='files'),
        pytest.param('pyvenv.cfg', 'a virtual environment of Python 3.2.1', id='other Python'),
    ],
)
def test_bootstrap_deletes_nothing_that_it_did_not_make(
    tmp_path: Path, name: str, said: str
) -> None:
    kept = tmp_path / name
    kept.write_text('version = 3.2.1\n')
    done = bootstrap(tmp_path, 'setup')
    assert (done.returncode, kept.is_file()) == (2, True)
    assert said in done.stderr
    assert 'CELLSEG_VENV' in done.stderr


def test_bootstrap_setup_takes_no_further_words(tmp_path: Path) -> None:
    done = bootstrap(tmp_path / 'venv', 'setup', '--help')
    assert done.returncode == 2
    assert not (tmp_path / 'venv').exists()
    assert 'setup takes no further words: --help' in done.stderr


def cellseg(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, '-m', 'cellseg_mm', *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize('shell', ['bash', 'zsh', 'fish'])
def test_completion_knows_every_tool_and_its_options(shell: str, tmp_path: Path) -> None:
    done = cellseg('--print-completion', shell)
    assert done.returncode == 0, done.stderr
    for name in TOOLS:
        assert (name.removesuffix('.py') in done.stdout) == (name != 'bootstrap.py')
    assert 'score-thr' in done.stdout
    if shell == 'bash':
        subprocess.run(['bash', '-n'], input=done.stdout, text=True, check=True)


def test_a_tool_is_a_word_of_the_command() -> None:
    done = cellseg('make-sample', '--help')
    assert done.stdout.startswith('usage: cellseg make_sample ')
    done = cellseg('predikt')
    assert done.returncode == 2
    assert done.stderr.startswith('error: predikt: no such tool; expected one of browse, check')
    assert done.stderr.endswith('did you mean predict\n')
    assert cellseg().stdout == cellseg('--help').stdout


def test_the_command_runs_a_script_of_others_too(tmp_path: Path) -> None:
    script = tmp_path / 'test.py'  # the tool of that name is another
    script.write_text('import sys; print(sys.argv, __name__)')
    assert cellseg(str(script), 'a').stdout.split() == [f"['{script}',", "'a']", '__main__']


def test_packaged_configs_are_words_of_every_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['tool', 'cellseg_mm::fold*.py', 'x'])
    with pytest.raises(SystemExit):
        run_tool(lambda: None)
    assert [Path(word).name for word in sys.argv[1:]] == [*(f'fold{k}.py' for k in range(5)), 'x']
    monkeypatch.setattr(sys, 'argv', ['tool', 'cellseg_mm::fold9.py'])
    with pytest.raises(SystemExit) as ended:
        run_tool(lambda: None)
    assert ended.value.code == 2


def test_a_missing_torch_is_a_sentence(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run_tool(lambda: fail(ModuleNotFoundError("No module named 'torch'", name='torch')))
    assert 'error: torch: is not installed; ' in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):  # ours to mend
        run_tool(lambda: fail(ModuleNotFoundError('x', name='cellseg_mm.nothing')))


def test_a_reader_that_goes_away_ends_a_tool_without_a_traceback() -> None:
    code = (
        'from cellseg_mm.cli import run_tool\n'
        "run_tool(lambda: [print('x' * 80) for _ in range(10_000)] and None)"
    )
    words = f'set -o pipefail; {sys.executable} -c "$1" | head -n 1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ['bash', '-c', words, 'bash', code], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ['x' * 80, '141']
    assert done.stderr == ''


def test_another_broken_pipe_is_no_silent_end() -> None:
    with pytest.raises(BrokenPipeError):
        run_tool(lambda: fail(BrokenPipeError('a worker')))
