"""Real texts as people have them: train, then type what the command recommends.

Chinese, Arabic, Japanese and Hindi from Django's catalogues, tables from scikit-learn, source, CSV
and one-line JSON: written in the encodings and with the ends of lines that are met outside.
"""

import gettext
import io
import json
import shlex
from pathlib import Path

import pytest
from conftest import typed

from transformer_course import cli
from transformer_course.fetching import SourceError
from transformer_course.wheels import wheel_member

TINY = '--block_size 16 --n_layer 1 --n_head 2 --n_embd 8 --batch_size 2 --max_iters 2'
TINY += ' --eval_interval 2 --eval_tokens 64 --optimizer adamw --device cpu --sample_tokens 9'


def messages(language):
    "The translations of Django's own interface into one language."
    try:
        data = wheel_member('django', f'django/conf/locale/{language}/LC_MESSAGES/django.mo')
    except SourceError as e:
        pytest.skip(str(e))
    catalogue = gettext.GNUTranslations(io.BytesIO(data))._catalog
    return '\n'.join(text for source, text in catalogue.items() if source and text)


def source():
    return Path(cli.__file__).with_name('training.py').read_text(encoding='utf-8')


def table():
    datasets = pytest.importorskip('sklearn.datasets')
    return (Path(datasets.__file__).parent / 'data' / 'breast_cancer.csv').read_text()


def one_line():
    return json.dumps({str(i): w for i, w in enumerate(messages('zh_Hans').split())})


def log():
    lines = enumerate(source().splitlines())
    return ''.join(f'2026-11-{1 + i % 28:02} 12:{i % 60:02}:00 INFO {line}\n' for i, line in lines)


EMOJI = 'To be 🎭 or not to be 🤔? 👩‍👩‍👧‍👦 naïve café, Zürich 🇨🇭; \u202eright to left\u202c. ' * 60
GOOD = dict(
    chinese=lambda: messages('zh_Hans').encode(),
    arabic=lambda: messages('ar').encode(),
    hindi=lambda: messages('hi').encode(),
    with_bom=lambda: messages('de').encode('utf-8-sig'),
    one_line_json=lambda: one_line().encode(),
    csv=lambda: table().encode(),
    log=lambda: log().encode(),
    source=lambda: source().encode(),
    crlf=lambda: source().replace('\n', '\r\n').encode(),
    cr=lambda: source().replace('\n', '\r').encode(),
    emoji=lambda: EMOJI.encode(),
)
REFUSED = dict(  # the bytes, and what the line must name
    utf16=(lambda: messages('zh_Hans').encode('utf-16'), 'iconv -f utf-16'),
    utf16_without_a_mark=(lambda: messages('fr').encode('utf-16-le'), 'iconv -f utf-16'),
    shift_jis=(lambda: messages('ja').encode('shift_jis', 'ignore'), 'iconv -f '),
    gb2312=(lambda: messages('zh_Hans').encode('gb18030'), 'iconv -f '),
    picture=(lambda: b'\x89PNG\r\n\x1a\n' + bytes(range(256)) * 40, 'text'),
)


@pytest.mark.parametrize('name', GOOD)
def test_train_and_the_recommended_command(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    Path('t.txt').write_bytes(GOOD[name]())
    code, out, err = typed(['train', '--text', 't.txt', *TINY.split()], capsys)
    assert code == 0, err
    (more,) = [line for line in out.splitlines() if line.startswith('more ')]
    command = shlex.split(more.removeprefix('more '))
    assert command[:2] == ['transformer-course', 'sample']
    code, out, err = typed([*command[1:], '--max_new_tokens', '20', '--seed', '3'], capsys)
    assert code == 0 and len(out.strip('\n')) > 10 and '\ufffd' not in out, err


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_not_utf8_is_named(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    data, word = REFUSED[name]
    Path('t.txt').write_bytes(data())
    code, _, err = typed(['train', '--text', 't.txt', *TINY.split()], capsys)
    assert code == 2 and err.count('\n') == 1 and word in err.lower(), err
