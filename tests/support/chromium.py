"""Drives a headless Chromium over its DevTools pipe, with the standard library alone.

The pipe (--remote-debugging-pipe) carries JSON messages that end in a NUL byte, so that neither a
port nor a WebSocket library is needed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')
FLAGS = (
    '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
    '--disable-background-networking', '--disable-component-update', '--disable-sync',
    '--disable-dev-shm-usage', '--remote-debugging-pipe',
)  # fmt: skip

# The browser reads from descriptor 3 and writes to 4.
PUT_PIPES = (
    'import fcntl, os, sys;'
    'high = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]];'
    'os.dup2(high[0], 3); os.dup2(high[1], 4); os.execv(sys.argv[3], sys.argv[3:])'
)


def find_chromium() -> str | None:
    """Return the browser: $CELLSEG_CHROMIUM, or the first known name on PATH."""
    named = os.environ.get('CELLSEG_CHROMIUM')
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One page of a headless browser; use as a context manager.

    Attributes:
        problems: Console errors, uncaught exceptions and failed loads, in order.
        requests: URLs that the page asked for, other than itself and data URIs.
    """

    def __init__(self, timeout_s: float = 120) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.timeout_s = timeout_s
        self._answers: dict[int, dict] = {}
        self._events: list[dict] = []
        self._buffer = b''
        self._last = 0
        self._session: str | None = None

    def __enter__(self) -> Chromium:
        path = find_chromium()
        if path is None:
            raise FileNotFoundError(f'found none of {NAMES}; install chromium')
        self._profile = tempfile.mkdtemp(prefix='cellseg-chromium-')
        to_read, self._to = os.pipe()
        self._from, from_write = os.pipe()
        command = [sys.executable, '-c', PUT_PIPES, str(to_read), str(from_write), path, *FLAGS]
        self._process = subprocess.Popen(
            [*command, f'--user-data-dir={self._profile}', 'about:blank'],
            pass_fds=(to_read, from_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        answer = self.call('Target.attachToTarget', targetId=target, flatten=True)
        self._session = answer['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.call(f'{domain}.enable')
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        with contextlib.suppress(OSError, TimeoutError):
            self._send('Browser.close', {})
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **params: object) -> dict:
        """Send one DevTools command and return its result."""
        number = self._send(method, params)
        end = time.monotonic() + self.timeout_s
        while number not in self._answers:
            self._read(end, method)
        answer = self._answers.pop(number)
        if 'error' in answer:
            raise RuntimeError(f'{method}: {answer["error"]}')
        return answer['result']

    def _send(self, method: str, params: dict) -> int:
        self._last += 1
        message = {'id': self._last, 'method': method, 'params': params}
        if self._session:
            message['sessionId'] = self._session
        content = json.dumps(message).encode() + b'\0'
        while content:
            content = content[os.write(self._to, content) :]
        return self._last

    def _read(self, end: float, what: str) -> None:
        ready, _, _ = select.select([self._from], [], [], max(0, end - time.monotonic()))
        if not ready:
            raise TimeoutError(f'{what}: no answer from the browser')
        block = os.read(self._from, 1 << 16)
        if not block:
            raise RuntimeError(f'{what}: the browser ended')
        *messages, self._buffer = (self._buffer + block).split(b'\0')
        for text in messages:
            message = json.loads(text)
            if 'id' in message:
                self._answers[message['id']] = message
            else:
                self._event(message)

    def _event(self, message: dict) -> None:
        method, params = message['method'], message.get('params', {})
        self._events.append({'method': method, **params})
        if method == 'Runtime.exceptionThrown':
            self.problems.append(str(params['exceptionDetails']))
        elif method == 'Runtime.consoleAPICalled' and params['type'] in ('error', 'warning'):
            self.problems.append(str(params['args']))
        elif method == 'Log.entryAdded' and params['entry']['level'] in ('error', 'warning'):
            self.problems.append(str(params['entry']))
        elif method == 'Network.requestWillBeSent':
            url = params['request']['url']
            if not url.startswith('data:') and params.get('type') != 'Document':
                self.requests.append(url)

    def open(self, path: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Open a file in a window of this size and wait until it is loaded."""
        self.call(
            'Emulation.setDeviceMetricsOverride',
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = 'dark' if dark else 'light'
        features = [{'name': 'prefers-color-scheme', 'value': scheme}]
        self.call('Emulation.setEmulatedMedia', features=features)
        self._events.clear()
        self.call('Page.navigate', url=path.resolve().as_uri())
        end = time.monotonic() + self.timeout_s
        while not any(event['method'] == 'Page.loadEventFired' for event in self._events):
            self._read(end, str(path))

    def run(self, script: str) -> object:
        """Return the value of a JavaScript expression; a promise is waited for."""
        answer = self.call(
            'Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True
        )
        if 'exceptionDetails' in answer:
            raise RuntimeError(f'{script}: {answer["exceptionDetails"]}')
        return answer['result'].get('value')

    def wait_for(self, script: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + self.timeout_s
        while not self.run(script):
            if time.monotonic() > end:
                raise TimeoutError(f'{script}: stayed false; {self.problems}')
            time.sleep(0.05)

    def give_files(self, selector: str, *paths: Path) -> None:
        """Choose files in a file input, as a person would."""
        root = self.call('DOM.getDocument')['root']['nodeId']
        node = self.call('DOM.querySelector', nodeId=root, selector=selector)['nodeId']
        names = [str(path.resolve()) for path in paths]
        self.call('DOM.setFileInputFiles', files=names, nodeId=node)

    def save_into(self, folder: Path) -> None:
        """Put what pages save into a folder."""
        folder.mkdir(exist_ok=True)
        self.call('Browser.setDownloadBehavior', behavior='allow', downloadPath=str(folder))

    def screenshot(self, path: Path, selector: str | None = None) -> None:
        """Write a PNG of the page, or of one element."""
        clip = {}
        if selector:
            box = self.run(
                f'(() => {{ const b = document.querySelector({json.dumps(selector)})'
                '.getBoundingClientRect(); return {x: b.x + scrollX, y: b.y + scrollY, '
                'width: b.width, height: b.height, scale: 1}; })()'
            )
            clip = {'clip': box, 'captureBeyondViewport': True}
        answer = self.call('Page.captureScreenshot', format='png', **clip)
        path.write_bytes(base64.b64decode(answer['data']))
