"The benchmarks run small, give what they promise, and the results that are kept hang together."

import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
import types
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
    "A script's folder comes first on the path: tokenizers.py would be imported for the package."
    packages = {'tokenizers', 'tiktoken', 'transformers', 'torch', 'regex', 'minbpe', 'nanoGPT'}
    for path in FOLDER.glob('*.py'):
        assert path.stem not in packages | sys.stdlib_module_names


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


def shown_by(name):
    "The text that the committed outputs of a notebook show."
    path = ROOT / 'nbs' / name
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    outputs = [out for cell in cells for out in cell.get('outputs', [])]
    return '\n'.join(''.join(out.get('data', {}).get('text/markdown', '')) for out in outputs)


def test_the_main_job_has_the_same_figures_everywhere():
    "README.md, the front page and the benchmarks' page quote one file, and no other keeps a copy."
    job = json.loads((FOLDER / 'results' / 'main_job.json').read_text(encoding='utf-8'))
    middle, loss = job['median'], job['runs'][-1]['val'][-1][1]
    megabytes = f"{middle['peak_memory_mb']:,.0f}"
    said = f"that took {middle['seconds']:.0f} seconds, {megabytes} MB of memory"
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    for text in (readme, shown_by('index.ipynb')):
        assert said in text and f'**{loss:.3f} nats per character**' in text
        assert text.count('that took') == 1
    page = shown_by('support/benchmarks.ipynb')
    assert f"| median | {middle['seconds']:.5g} | {middle['cpu_seconds']:.5g} |" in page
    assert f'| peak of the whole main job | {megabytes} |' in page
    assert 'full' not in json.loads((FOLDER / 'results' / 'memory.json').read_text())['main_job']


def summaries(node, where=''):
    "Each part of a result that holds medians (or means) and the runs behind them."
    if isinstance(node, dict):
        if isinstance(node.get('runs'), (list, dict)) and ('median' in node or 'mean' in node):
            yield where, node
        for key, value in node.items():
            yield from summaries(value, f'{where}/{key}')


def differences(summary):
    "Figures of a summary that its runs do not give."
    kind = 'median' if 'median' in summary else 'mean'
    middle, average = summary[kind], getattr(statistics, kind)
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
    runs = dict(ours=[dict(seconds=1), dict(seconds=2), dict(seconds=9)])
    right = dict(median=dict(ours=dict(seconds=2)), runs=runs)
    assert not differences(right) and list(summaries(dict(train=right))) == [('/train', right)]
    right['median']['ours']['seconds'] = 4
    assert differences(right) == [('ours', 'seconds', 4)]
    wrong = dict(mean=dict(fast=3), runs=[dict(fast=1), dict(fast=2)])
    assert differences(wrong) == [('fast', None, 3)]


# --- byte-pair encoding ---


def test_bpe_quick(load, capsys, monkeypatch):
    bpe = load('bpe')
    monkeypatch.setattr(bpe.peers, 'write', lambda *a: pytest.fail('--quick must not write'))
    result = bpe.main(['--quick'])
    names = {'ours', 'ours, to_tiktoken()', 'tiktoken'}
    if result['tokens_equal_hugging_face']:
        names |= {'Hugging Face', 'Hugging Face, encode_batch_fast'}
    assert set(result['encode']['median']) == names and result['vocab_size'] == 300
    assert all(len(rows) == 1 for rows in result['train']['runs'].values())
    out = capsys.readouterr().out
    assert 'CPU s' in out and result['versions']['tiktoken'] in out
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
    contestants = {name: lambda name=name: order.append(name) for name in 'ab'}
    _, rows = load('bpe').take_turns(contestants, 2)
    assert order == ['a', 'b', 'a', 'b'] and len(rows['a']) == 2


def test_bpe_without_a_checkout_of_minbpe(load, tmp_path):
    with pytest.raises(ValueError, match='give a checkout'):
        load('bpe').load_minbpe(tmp_path)


# --- memory ---


def test_stream_is_reproducible_and_as_long_as_asked(load):
    memory = load('memory')
    words = memory.words(500)
    text = ''.join(memory.stream(words, 0.05))
    assert len(text) == 50_000 and text == ''.join(memory.stream(words, 0.05))
    assert text != ''.join(memory.stream(words, 0.05, seed=1)) and len(set(words)) == 500
    often, seldom = (text.count(f' {words[i]} ') for i in (0, -1))
    assert often > 20 * seldom


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_stream_memory(load):
    memory = load('memory')
    assert memory.resident('VmHWM') >= memory.resident('VmRSS') * 0.9 > 10
    measured = memory.stream_memory(0.3)
    assert measured['ids'] > 50_000 and 0 <= measured['growth_mb'] < 100


# --- other texts ---


def test_reviews_are_cleaned(load):
    data = 'id\tsentiment\ttext\r\n1\t2.2\tA café, naïve.\r\n2\t-1\t Dull “film” \r\n'
    lines = load('corpora').cleaned(data.encode()).splitlines()
    assert sorted(lines) == ['A cafe, naive.', 'Dull film']


def test_reviews_are_the_ones_quoted(load, monkeypatch):
    "The text behind the figures, where it is there; another one is refused."
    corpora = load('corpora')
    monkeypatch.setenv('TRANSFORMER_COURSE_OFFLINE', '1')  # a test downloads nothing
    try:
        text = corpora.reviews().text
    except corpora.SourceError:
        pass  # neither cache nor network has it
    else:
        assert len(text) == corpora.LENGTH and 60 <= len(set(text)) <= 150
    monkeypatch.setattr(corpora, 'wheel_member', lambda *a: b'id\n1\t0\tother\n')
    with pytest.raises(ValueError, match='reviews'):
        corpora.reviews()


def test_every_machine_has_documentation_and_code(load):
    corpora = load('corpora')
    for text in (corpora.documentation(), corpora.library_source()):
        assert len(text.text) > 300_000 and text.text.isascii() and 'Python' in text.source


def fake(losses):
    "Trainings that end at once: nanoGPT at loss 2 after 10 s, ours at the given losses after 2 s."
    losses = iter(losses)
    return types.SimpleNamespace(
        nanogpt=lambda *a, **k: dict(loss=2.0, cpu_seconds=10.0),
        ours=lambda *a, model, train: dict(
            loss=next(losses), cpu_seconds=train['max_iters'] / 100, updates=train['max_iters']
        ),
    )


@pytest.mark.parametrize(
    'losses, ratio',
    [([1.9, 1.8, 1.7, 1.6], 5), ([2.1, 2.05, 2.0, 1.9], 10 / 4), ([2.1] * 4, None)],
    ids=['at once', 'later', 'never'],
)
def test_time_to_the_same_loss(load, monkeypatch, losses, ratio):
    corpora = load('corpora')
    monkeypatch.setattr(corpora, 'peers', fake([*losses, 1.5]))
    recipe = dict(model={}, train=dict(max_iters=200))
    row = corpora.compare('nowhere', 'text', 0, fast=recipe, long=recipe)
    assert [run['updates'] for run in row['fast']] == [200, 300, 400, 600]
    assert row['ratio'] == (pytest.approx(ratio) if ratio else None)
    kept = corpora.summary([row, row])
    assert kept['ratio'] == row['ratio'] and kept['median']['long']['loss'] == 1.5
    assert [run['loss'] for run in kept['fast']] == losses


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


# --- a published model ---


@pytest.fixture
def small_file(tmp_path):
    "A Llama of two layers as a GGUF file."
    from test_pretrained import GGUF_NAMES, gguf_bytes, llama_meta, parts_of, small_llama

    path = tmp_path / 'small.gguf'
    path.write_bytes(gguf_bytes(llama_meta(), parts_of(small_llama(), GGUF_NAMES)))
    return path


def test_chat_at_toy_size(load, small_file, tmp_path, capsys, monkeypatch):
    chat = load('chat')
    monkeypatch.setattr(chat, 'installed', lambda: [*chat.CONTESTANTS][:3])
    words = ['--gguf', small_file, '--tokens', 4, '--rounds', 2, '--most', 2]
    monkeypatch.setattr(chat, 'peak', lambda name, path, n: 100.0)
    result = chat.main([str(word) for word in (*words, '--out', tmp_path / 'chat.json')])
    assert result == json.loads((tmp_path / 'chat.json').read_text())
    for task in ('write', 'read'):
        assert set(result['table'][task]) == set(chat.installed())
        assert all(len(row['runs']) == 2 for row in result['table'][task].values())
    assert not any(differences(s) for _, s in summaries(result))
    assert 'tokens per second' in capsys.readouterr().out and result['model'] == 'small.gguf'


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_chat_peak_is_of_a_fresh_process(load, small_file):
    assert 100 < load('chat').peak('ours, int8', small_file, 3) < 1000


def test_chat_finds_a_difference(load):
    chat = load('chat')
    write = lambda ids, n: [1] * n
    contestants = {'ours, floats': write, 'Hugging Face, floats': lambda ids, n: [2] * n}
    with pytest.raises(AssertionError, match='other tokens'):
        chat.measure(contestants, dict(write=(4, 3)), 1, 1)
    with pytest.raises(AssertionError, match='not 3'):
        chat.one_round({'short': lambda ids, n: []}, dict(write=(4, 3)))


# --- on a graphics card; here everything very small ---


@pytest.fixture
def gpu(tmp_path):
    "Run benchmarks/gpu.py as on a machine without a card; what it kept."
    (tmp_path / 'text.txt').write_text(TEXT * 30, encoding='utf-8')

    def call(*flags, text='text.txt'):
        text = tmp_path / text
        command = [sys.executable, FOLDER / 'gpu.py', '--toy', '--out', tmp_path, '--text', text]
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
        command = [str(word) for word in (*command, *flags)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        file = tmp_path / 'gpu.json'
        return done, json.loads(file.read_text()) if file.exists() else None

    call.folder = tmp_path
    return call


def failures(step):
    return {name: row['error'] for name, row in step['parts'].items() if 'error' in row}


def test_gpu_all_steps_at_toy_size(gpu):
    done, result = gpu()
    steps = result.pop('steps')
    assert done.returncode == 0, {k: (s.get('error'), failures(s)) for k, s in steps.items()}
    assert list(steps) == ['lengths', 'sampling', 'speed', 'shakespeare', 'parallel', 'cells']
    about = {'device', 'capability', 'torch', 'python', 'cores', 'seed', 'seconds', 'toy'}
    assert set(result) == about and result['toy'] is True and result['capability'] is None
    assert all(step['ok'] and step['seconds'] > 0 and step['parts'] for step in steps.values())
    assert all('seconds' in part for step in steps.values() for part in step['parts'].values())
    assert set(steps['lengths']['parts']) == {'Transformer', 'LSTM'}
    for part in steps['sampling']['parts'].values():
        assert part['tokens_per_second'] > 0 and part['config']['n_layer'] == 1
    updates = [p for name, p in steps['speed']['parts'].items() if not name.startswith('products')]
    assert len(updates) == 5 and all(p['tokens_per_second'] > 0 for p in updates)
    run = steps['shakespeare']['parts']['as configured']
    assert run['ended'] and run['updates'] == 6 and run['best_val'] < 4.4 and len(run['val']) == 3
    assert run['reference'] == 1.4697 and steps['shakespeare']['parts']['sample']['output']
    for how in ('ddp', 'fsdp'):
        part = steps['parallel']['parts'][how]
        assert part['equal'] and part['losses'] == part['resumed'] and len(part['losses']) == 4
    logs = {p.name for p in (gpu.folder / 'runs' / 'gpu').iterdir()}
    assert logs == {f'{name}.txt' for name in steps} | {'shakespeare.jsonl'}
    for path in [gpu.folder / 'gpu.json', *(gpu.folder / 'runs' / 'gpu').iterdir()]:
        assert not any(part in path.read_text() for part in ('/home/', '/work/', '/tmp/'))


def test_gpu_a_failing_step_is_recorded_and_stops_no_other(gpu):
    done, result = gpu('--only', 'shakespeare,lengths', text='nowhere.txt')
    assert done.returncode == 1 and list(result['steps']) == ['shakespeare', 'lengths']
    broken, fine = result['steps'].values()
    assert not broken['ok'] and fine['ok']
    assert {'as configured', 'not compiled'} == set(failures(broken))
    assert all('status 2' in error for error in failures(broken).values())
    assert 'nowhere.txt' in (gpu.folder / 'runs/gpu/shakespeare.txt').read_text()


def test_gpu_names_of_steps(gpu):
    done, result = gpu('--only', 'lenghts')
    assert done.returncode == 1 and "'lenghts'" in done.stderr and result is None
    _, result = gpu('--only', 'lengths,cells', '--skip', 'cells')
    assert list(result['steps']) == ['lengths']


def test_gpu_a_part_that_fails_and_one_that_comes_too_late(load):
    gpu, kept = load('gpu'), []

    def fail():
        raise ZeroDivisionError('in /tmp/somewhere/file.py')

    parts = [('bad', fail), ('good', lambda: dict(value=1))]
    done = gpu.carry_out(iter(parts), time.time() + 60, lambda done: kept.append(dict(done)))
    assert done['bad']['error'] == 'ZeroDivisionError: in file.py' and done['good']['value'] == 1
    assert [len(rows) for rows in kept] == [1, 2]
    late = gpu.carry_out(iter(parts), time.time() - 1, kept.append)
    assert all('time was up' in row['error'] for row in late.values())


@pytest.mark.skipif(not hasattr(os, 'killpg'), reason='needs groups of processes')
def test_gpu_a_step_that_hangs_is_stopped_with_what_it_has(load, tmp_path, monkeypatch):
    gpu = load('gpu')
    script = tmp_path / 'hangs.py'
    script.write_text(
        'import sys, time\n'
        'folder = sys.argv[sys.argv.index("--folder") + 1]\n'
        'open(f"{folder}/speed.json", "w").write(\'{"first": {"value": 1}}\')\n'
        'time.sleep(600)\n'
    )
    monkeypatch.setattr(gpu, '__file__', str(script))
    monkeypatch.setattr(gpu, 'GRACE', 1)
    found = gpu.run_step('speed', types.SimpleNamespace(toy=True, text=None), tmp_path, 1)
    assert not found['ok'] and 'stopped after' in found['error']
    assert found['parts'] == {'first': dict(value=1)}


CELLS = [
    'import math\nunused = 1',
    'size = 3\nscale = math.sqrt(size)',
    'def area(x):\n    return scale * x + offset',
    '!echo hello\nsize = 99\noffset = [i for i in range(size)][-1]\nprint(unused)',
    '#| cuda\nfor n in range(2):\n    print(n, area(n))',
]


def test_cells_for_a_card_get_what_they_need_and_nothing_else(load):
    cells = load('card_cells')
    found = [(str(i), source.replace('!echo hello', 'pass')) for i, source in enumerate(CELLS)]
    assert [cells.is_cuda(source) for _, source in found] == [False] * 4 + [True]
    asks = 'import torch\nif torch.cuda.is_available():\n    print(1)\nelse:\n    print(2)'
    assert cells.is_cuda(asks) and not cells.is_cuda(asks.replace('cuda', 'backends.mps'))
    code = cells.needed(found, 4)
    text = '\n'.join(code)
    assert 'unused' not in text and 'print' not in text and len(code) == 6
    space = {}
    exec(text, space)
    assert space['scale'] == 3**0.5 and space['offset'] == 98  # each saw the size of its time
    with pytest.raises(ValueError, match="needs 'area'"):
        cells.needed(found[:2] + found[4:], 2)


def test_every_cell_for_a_card_finds_what_it_needs(load):
    cells, number = load('card_cells'), 0
    for path in sorted((ROOT / 'nbs').rglob('*.ipynb')):
        found = cells.read_cells(path)
        for i, (_, source) in enumerate(found):
            if cells.is_cuda(source):
                number += 1
                assert cells.needed(found, i)
    assert number
