"""Token shards: nothing lost, nothing twice, whatever the number of files, processes and lives;
and errors that name the file.
"""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import run_over_shards

from transformer_course.files import signed
from transformer_course.data import CharTokenizer
from transformer_course.parallel import global_batch
from transformer_course.prepare import hf_documents, prepare
from transformer_course.processes import torchrun
from transformer_course.shards import ShardBatches, Shards, ShardWriter, read_index
from transformer_course.shuffle import epoch_windows, shuffled
from transformer_course.strategy import SingleProcess
from transformer_course.tokenizer import BPETokenizer

DOCUMENTS = [f'document {i}: ' + 'abcdefgh'[i % 8] * (i % 23) + '\n' for i in range(300)]
CHARS = CharTokenizer.train(''.join(DOCUMENTS))


def write(folder, ids, shard_tokens=50, vocab_size=1000):
    writer = ShardWriter(folder, vocab_size, shard_tokens)
    for i in range(0, len(ids), 37):
        writer.add(ids[i : i + 37])
    writer.close()
    return Shards(folder, verify=True)


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_every_place_has_a_window_of_its_own(n, key):
    assert np.array_equal(np.sort(shuffled(np.arange(n), n, key)), np.arange(n))


@given(st.integers(1, 2**40), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_windows_of_large_epochs_stay_inside_and_differ(n, seed):
    places = np.unique(np.array([0, n // 3, n // 2, n - 1]))
    found = epoch_windows(places, n, seed)
    assert len(set(found)) == len(places) and 0 <= found.min() and found.max() < n
    alone = [epoch_windows(places[i : i + 1], n, seed) for i in range(len(places))]
    assert np.array_equal(found, np.concatenate(alone)), 'a place is looked up by itself'


@given(st.lists(st.integers(0, 70_000), min_size=1, max_size=200), st.integers(1, 60), st.data())
@settings(max_examples=40, deadline=None)
def test_cuts_between_files_do_not_matter(tmp_path_factory, ids, shard_tokens, data):
    shards = write(tmp_path_factory.mktemp('cut') / 's', ids, shard_tokens, 70_001)
    a = data.draw(st.integers(0, len(ids) - 1))
    b = data.draw(st.integers(a + 1, len(ids)))
    assert len(shards) == len(ids) and shards.read(a, b).tolist() == ids[a:b]
    *full, last = [s['tokens'] for s in shards.index['shards']]
    assert set(full) <= {shard_tokens} and 0 < last <= shard_tokens


def group(rank, world_size):
    return SimpleNamespace(rank=rank, world_size=world_size)


def deal(shards, lives, seed=7, block=4):
    """The windows that a run of several lives sees, by their first tokens.

    A life is (batch size, processes, batches); one generator goes through all."""
    g, seen = torch.Generator().manual_seed(seed), []
    for batch_size, processes, times in lives:
        state = g.get_state()
        drawn = []
        for rank in range(processes):
            g = torch.Generator()
            g.set_state(state)  # as a checkpoint gives it back
            batch = ShardBatches(shards, batch_size, block, group(rank, processes))
            drawn.append([batch(g) for _ in range(times)])
        for x, y in (b for mine in drawn for b in mine):
            assert torch.equal(x[:, 1:], y[:, :-1])
        for t in range(times):
            parts = [mine[t][0][:, 0] for mine in drawn]  # (rows,) of each process
            seen += torch.stack(parts, dim=1).flatten().tolist()  # rows go round the processes
    return seen


@pytest.mark.parametrize(
    'lives',
    [
        [(12, 1, 8)],
        [(12, 2, 8)],
        [(12, 3, 4), (12, 2, 4)],
        [(8, 4, 6), (6, 1, 8)],
        [(1, 1, 50), (2, 2, 23)],
    ],
    ids=str,
)
def test_an_epoch_is_every_window_once(tmp_path, lives):
    "96 windows of 4; the number of processes changes on the way, and the batch size too."
    shards = write(tmp_path / 's', list(range(96 * 4 + 1)))
    assert sorted(deal(shards, lives)) == list(range(0, 96 * 4, 4))
    assert deal(shards, lives) == deal(shards, [(96, 1, 1)]), 'the order is that of one process'
    assert deal(shards, lives, seed=8) != deal(shards, lives)


def test_a_batch_may_end_one_epoch_and_begin_the_next(tmp_path):
    shards = write(tmp_path / 's', list(range(7 * 4 + 2)))
    seen = deal(shards, [(5, 1, 7)])
    for epoch in range(5):
        assert sorted(seen[7 * epoch : 7 * epoch + 7]) == list(range(0, 28, 4))
    assert len({tuple(seen[7 * e : 7 * e + 7]) for e in range(5)}) > 1


def test_a_batch_depends_on_the_generator_alone(tmp_path):
    batch = ShardBatches(write(tmp_path / 's', list(range(500))), 3, 8)
    g = torch.Generator().manual_seed(5)
    state = g.get_state()
    first, second = batch(g)[0], batch(g)[0]
    g.set_state(state)
    assert torch.equal(batch(g)[0], first) and not torch.equal(first, second)
    torch.rand(1000, generator=g)  # draws of others do not move the position
    assert torch.equal(batch(g)[0], second)


def test_the_rows_are_those_of_the_global_batch(tmp_path):
    shards = write(tmp_path / 's', list(range(500)))
    for rank in range(3):
        mine = ShardBatches(shards, 6, 8, group(rank, 3))
        cut = global_batch(ShardBatches(shards, 6, 8), group(rank, 3))
        a, b = (batch(torch.Generator().manual_seed(2)) for batch in (mine, cut))
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_the_counter_says_when_it_is_full(tmp_path):
    batch = ShardBatches(write(tmp_path / 's', list(range(50))), 3, 8)
    with pytest.raises(ValueError, match='last that can be counted'):
        batch(torch.Generator().manual_seed(2**64 - 1))


@pytest.mark.parametrize(
    'tokenizer',
    [CHARS, BPETokenizer.train(''.join(DOCUMENTS), 300, ['<|endoftext|>'])],
    ids=['char', 'bpe'],
)
def test_prepare_loses_nothing_and_repeats_itself(tmp_path, tokenizer):
    for name in 'ab':
        prepare(
            tmp_path / name, iter(DOCUMENTS), tokenizer, val_fraction=0.1, seed=3, shard_tokens=400
        )
    files = {}
    for name in 'ab':
        paths = sorted((tmp_path / name).rglob('*.*'))
        files[name] = [(p.relative_to(tmp_path / name), p.read_bytes()) for p in paths]
    assert files['a'] == files['b'] and len(files['a']) > 5
    text = ''
    for part in ('train', 'val'):
        shards = Shards(tmp_path / 'a' / part, verify=True)
        text += tokenizer.decode(shards.read(0, len(shards)).tolist())
    lines = text.replace('<|endoftext|>', '').splitlines()
    assert sorted(lines) == sorted(''.join(DOCUMENTS).splitlines())
    prepare(tmp_path / 'c', iter(DOCUMENTS), tokenizer, val_fraction=0.1, seed=4)
    first, other = (tmp_path / name / 'val/00000.bin' for name in 'ac')
    assert first.read_bytes() != other.read_bytes()


def test_a_prepare_that_dies_leaves_no_folder(tmp_path):
    def documents():
        yield from DOCUMENTS[:100]
        raise RuntimeError('the network is gone')

    with pytest.raises(RuntimeError):
        prepare(tmp_path / 'data', documents(), CHARS, val_fraction=0.1)
    assert not list(tmp_path.iterdir())
    prepare(tmp_path / 'data', DOCUMENTS, CHARS, val_fraction=0.1)
    assert [p.name for p in tmp_path.iterdir()] == ['data']


def damage(tmp_path, how):
    shards = write(tmp_path / 's', list(range(120)))
    path = tmp_path / 's/00001.bin'
    if how == 'missing':
        path.unlink()
    if how == 'short':
        path.write_bytes(path.read_bytes()[:-2])
    if how == 'long':
        path.write_bytes(path.read_bytes() + b'xx')
    if how == 'changed':
        path.write_bytes(path.read_bytes()[:-2] + b'\1\1')
    index = tmp_path / 's/index.json'
    if how == 'index cut':
        index.write_text(index.read_text()[:-9])
    if how == 'index lies':
        index.write_text(json.dumps(signed(shards.index | dict(tokens=999))))
    if how == 'index changed':
        index.write_text(json.dumps(shards.index | dict(vocab_size=9)))
    if how == 'other format':
        index.write_text(json.dumps(signed(shards.index | dict(format=9))))
    if how == 'no index':
        index.unlink()


@pytest.mark.parametrize(
    'how, words',
    [
        ('missing', ['00001.bin', 'is missing']),
        ('short', ['00001.bin', '98 bytes instead of 100']),
        ('long', ['00001.bin', '102 bytes']),
        ('changed', ['00001.bin', 'checksum']),
        ('index cut', ['index.json', 'not JSON']),
        ('index changed', ['index.json', 'was changed']),
        ('index lies', ['index.json', 'damaged']),
        ('other format', ['format 9']),
        ('no index', ['no index.json', 'prepare']),
    ],
)
def test_damage_is_named(tmp_path, how, words):
    damage(tmp_path, how)
    with pytest.raises(ValueError) as e:
        Shards(tmp_path / 's', verify=True)
    for word in words:
        assert word in str(e.value)


@pytest.mark.parametrize(
    'work, words',
    [
        (lambda s, d: ShardBatches(s, 0, 4), ['batch_size=0']),
        (
            lambda s, d: ShardBatches(s, 5, 4, group(0, 2)),
            ['batch_size=5', '2 processes', 'example 4'],
        ),
        (lambda s, d: ShardBatches(s, 1, 120), ['120 tokens', 'block_size=120']),
        (lambda s, d: s.read(-1, 3), ['0 <= start']),
        (lambda s, d: ShardWriter(d / 'new', 10, 0), ['shard_tokens=0']),
        (lambda s, d: ShardWriter(d / 'new', 0), ['vocab_size=0']),
        (lambda s, d: prepare(d, DOCUMENTS, CHARS), ['exists']),
        (lambda s, d: prepare(d / 'new', DOCUMENTS, CHARS, val_fraction=1.5), ['val_fraction=1.5']),
        (lambda s, d: prepare(d / 'new', [], CHARS, val_fraction=0.5), ['documents left nothing']),
    ],
)
def test_bad_input_is_named(tmp_path, work, words):
    shards = write(tmp_path / 's', list(range(120)))
    with pytest.raises(ValueError) as e:
        work(shards, tmp_path)
    for word in words:
        assert word in str(e.value)


def test_datasets_streams_into_shards(tmp_path):
    "The package itself, on a local file; skipped where it is not installed."
    pytest.importorskip('datasets')
    (tmp_path / 'plain.txt').write_text(''.join(DOCUMENTS))
    documents = hf_documents('text', how=dict(data_files=str(tmp_path / 'plain.txt')))
    prepare(tmp_path / 'data', documents, CHARS, val_fraction=0.1)
    assert read_index(tmp_path / 'data/train')['tokens'] > 1000


KILLED = """
import json, os, sys
from pathlib import Path
from small_runs import run_over_shards as run
from transformer_course import parallel as P
from transformer_course.sharded import FullySharded

tmp, life = Path(sys.argv[1]), int(os.environ['TORCHELASTIC_RESTART_COUNT'])
out, text = tmp / 'out', tmp / 's'
with P.together('ddp', 'cpu') as ddp:
    fatal = 11 if life == 0 and ddp.rank else None
    found = dict(life=life, killed=run(text, ddp, out, P.should_resume(out), fatal))
    found['unbroken'] = run(text, ddp)
    found['fsdp'] = run(text, FullySharded(ddp.device, ddp.store))
    (tmp / f'rank{ddp.rank}.json').write_text(json.dumps(found))
"""


def test_two_processes_over_shards_and_one_killed(tmp_path):
    """40 windows read in 10 updates of 2 x 4 rows: two epochs, nothing repeated or lost.

    One process is killed in the sixth update."""
    write(tmp_path / 's', list(range(40 * 8 + 1)), shard_tokens=100, vocab_size=400)
    (tmp_path / 'script.py').write_text(KILLED)
    env = {k: v for k, v in os.environ.items() if k != 'GLOO_SOCKET_IFNAME'}
    path = os.pathsep.join([str(Path(__file__).parent), env.get('PYTHONPATH', '')])
    env |= dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1', PYTHONPATH=path.rstrip(os.pathsep))
    command = torchrun(tmp_path / 'script.py', tmp_path, max_restarts=1)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = run_over_shards(tmp_path / 's', SingleProcess())
    for rank in (0, 1):
        found = json.loads((tmp_path / f'rank{rank}.json').read_text())
        killed, unbroken, fsdp = (found[name] for name in ('killed', 'unbroken', 'fsdp'))
        assert found['life'] == 1 and killed['losses'] == unbroken['losses']
        # the second life begins at the checkpoint, after 4 updates of 2 batches
        assert killed['seen'] == unbroken['seen'][8:]
        rows = [batch[rank::2] for batch in alone['seen']]
        assert unbroken['seen'] == fsdp['seen'] == rows
        for how in (unbroken, fsdp):
            torch.testing.assert_close(how['losses'], alone['losses'], rtol=3e-6, atol=0)
    whole = [w for rows in alone['seen'] for w in rows]
    for epoch in (whole[:40], whole[40:]):
        assert sorted(epoch) == list(range(0, 320, 8))
