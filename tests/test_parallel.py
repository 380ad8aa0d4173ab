"""Several processes on one machine: the same losses as one, and a run that outlives its workers.

Real torchrun, gloo, tiny models. What costs time is that every process imports torch, so there are
three launches in all.
"""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from small_runs import P, batches, drawn, model, run, share, validate
from transformer_course import processes
from transformer_course.checkpoint import load_model, read_checkpoint
from transformer_course.processes import torchrun
from transformer_course.strategy import SingleProcess

HEAD = """
import json, os, signal, sys, torch
from pathlib import Path
import small_runs
from small_runs import P, batches, drawn, model, run, share
from transformer_course import checkpoint
from transformer_course.sharded import FullySharded

tmp = Path(sys.argv[1])
"""
PLAIN = SingleProcess()


def launch(tmp_path, body, *args, fails=False, **how):
    "Run a script under torchrun; what each process wrote to `rank<r>.json` in its folder."
    script = tmp_path / 'script.py'
    script.write_text(HEAD + body)
    for old in tmp_path.glob('rank*.json'):
        old.unlink()
    env = {k: v for k, v in os.environ.items() if k != 'GLOO_SOCKET_IFNAME'}
    path = os.pathsep.join([str(Path(__file__).parent), env.get('PYTHONPATH', '')])
    env |= dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1', PYTHONPATH=path.rstrip(os.pathsep))
    command = torchrun(script, tmp_path, *args, **how)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    if fails:
        return done
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = range(how.get('processes', 2))
    return [json.loads((tmp_path / f'rank{r}.json').read_text()) for r in ranks]


SAME = """
found = {}
with P.together('ddp', 'cpu') as ddp:
    fsdp = FullySharded(ddp.device, ddp.store)
    other = lambda **kw: model(1 + ddp.rank, **kw)    # rank 1 begins elsewhere: rank 0 counts
    few = dict(gradient_accumulation_steps=2, max_iters=4)
    for name, how in dict(ddp=ddp, fsdp=fsdp).items():
        found[name] = run(how, other(), tmp / name)
        found[name + ' again'] = run(how)
        found[name + ' adamw'] = run(how, other(), optimizer='adamw')
        found[name + ' parts'] = run(how, other(), **few)
        mask = batches(how, mask=True)
        found[name + ' masked'] = run(how, other(), batch=mask)
        found[name + ' masked parts'] = run(how, other(), batch=mask, **few)
        found[name + ' shares'] = run(how, other(), validate=share(how), max_iters=4)
        found[name + ' dropout'] = run(how, model(dropout=0.2), tmp / f'{name}-dropout')
        half = tmp / f'{name}-half'
        run(how, model(dropout=0.2), half, max_iters=4)
        found[name + ' resumed'] = run(how, model(7, dropout=0.2), half, resume=True)
        exchange = lambda self, forward, last: super(type(self), self).accumulate(forward, True)
        always = type('Always', (type(how),), dict(accumulate=exchange))
        found[name + ' always'] = run(always(how.device, how.store), **few)
    found['untied'] = run(FullySharded(ddp.device), other(tie_weights=False, n_embd=24))
    own = torch.rand(3, generator=torch.Generator().manual_seed(ddp.rank))
    dice = [t.tolist() for t in ddp.gather(own)]
    sums = ddp.sum(0.1 * (1 + ddp.rank), ddp.rank), ddp.mean(float(ddp.rank))
    m = model()
    fsdp.wrap(m)
    held = sum(p.to_local().numel() for p in m.parameters())
    overflow = small_runs.overflow_of_one(m, ddp.rank)
    mine = dict(found=found, dice=dice, held=held, sums=sums, overflow=overflow)
    (tmp / f'rank{ddp.rank}.json').write_text(json.dumps(mine))
"""


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "One launch of two processes that trains in every way; what they found, and their folder."
    tmp = tmp_path_factory.mktemp('two')
    ranks = launch(tmp, SAME)
    return SimpleNamespace(tmp=tmp, ranks=ranks, found=ranks[0]['found'])


def close(a, b, rtol=3e-6):
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (a, b))
    torch.testing.assert_close(a, b, rtol=rtol, atol=0)


@pytest.fixture(scope='module')
def one():
    "The same in one process."
    few, mask = dict(gradient_accumulation_steps=2, max_iters=4), batches(PLAIN, mask=True)
    return {
        '': run(PLAIN),
        ' adamw': run(PLAIN, optimizer='adamw'),
        ' parts': run(PLAIN, **few),
        ' masked': run(PLAIN, batch=mask),
        ' masked parts': run(PLAIN, batch=mask, **few),
        ' shares': run(PLAIN, validate=share(PLAIN), max_iters=4),
        'untied': run(PLAIN, model(tie_weights=False, n_embd=24)),
    }


@pytest.mark.parametrize('how', ['ddp', 'fsdp'])
@pytest.mark.parametrize('kind', ['', ' adamw', ' parts', ' shares'])
def test_same_losses_as_one_process(two, one, how, kind):
    close(two.found[how + kind], one[kind])


@pytest.mark.parametrize('how', ['ddp', 'fsdp'])
@pytest.mark.parametrize('kind', [' masked', ' masked parts'])
def test_unequal_shares_of_targets_are_weighed(two, one, how, kind):
    "One of two processes scores 27 of 75 targets; a mean of means would be wrong from the start."
    close(two.found[how + kind], one[kind], rtol=1e-6)


def test_an_overflow_in_one_shard_is_everybodys(two):
    "float16: all processes skip the update and halve the loss scale; the next update is made."
    assert [r['overflow'] for r in two.ranks] == 2 * [[[512.0, False], [512.0, True]]]


def test_an_untied_model_in_shards(two, one):
    close(two.found['untied'], one['untied'])


@pytest.mark.parametrize('how', ['ddp', 'fsdp'])
def test_two_processes_twice_are_bit_identical(two, how):
    assert two.found[how] == two.found[how + ' again']


def test_every_process_gets_the_same_numbers(two):
    zero, one = two.ranks
    assert zero['found'] == one['found']
    assert zero['sums'] == one['sums'] == [[0.1 + 0.2, 1.0], 0.5]  # bit for bit, in rank order
    assert zero['dice'] == one['dice'] and zero['dice'][0] != zero['dice'][1]


@pytest.mark.parametrize('how', ['ddp', 'fsdp'])
def test_accumulation_exchanges_once_and_changes_nothing(two, how):
    close(two.found[how + ' parts'], two.found[how + ' always'])


@pytest.mark.parametrize('how', ['ddp', 'fsdp'])
def test_resume_with_dropout_is_bit_exact(two, how):
    assert two.found[how + ' resumed'] == two.found[how + ' dropout']
    _, _, tensors = read_checkpoint(two.tmp / f'{how}-dropout')
    assert not torch.equal(tensors['rng.dropout'], tensors['rng.dropout.1'])


def test_shards_share_the_memory(two):
    whole, held = model().num_params(), [rank['held'] for rank in two.ranks]
    assert max(held) < 0.6 * whole and sum(held) == whole


FILES = ['checkpoint.json', 'model.safetensors', 'training.safetensors']


@pytest.mark.parametrize('how', ['ddp', 'fsdp'])
def test_both_write_the_checkpoint_of_one_process(two, tmp_path, how):
    "The same files, tensors and settings, whoever wrote; nothing pickled; `load_model` reads them."
    run(PLAIN, folder=tmp_path / 'plain')
    about, weights, tensors = read_checkpoint(tmp_path / 'plain')
    a, w, t = read_checkpoint(two.tmp / how)
    assert sorted(p.name for p in (two.tmp / how).iterdir()) == FILES
    for key in ('model', 'config', 'optimizers', 'step', 'format'):
        assert a[key] == about[key], key
    assert a['model'] == 'GPT' and a['step'] == 8
    assert set(w) == set(weights) and set(t) == set(tensors) | {'rng.dropout.1'}
    for name in weights:
        if not name.endswith('attn.c_attn.bias'):
            torch.testing.assert_close(w[name], weights[name], rtol=1e-3, atol=1e-4)
    for name in tensors:
        assert t[name].shape == tensors[name].shape and t[name].dtype == tensors[name].dtype
    losses = [validate(load_model(place)[0]) for place in (two.tmp / how, tmp_path / 'plain')]
    close([losses[0]], [losses[1]])
    assert not [p.name for p in two.tmp.iterdir() if p.name.startswith('.')]


OTHER = """
with P.together('fsdp', 'cpu') as fsdp:
    found, ddp = {}, P.DataParallel(fsdp.device, fsdp.store)
    for name, how in dict(ddp=ddp, fsdp=fsdp).items():
        drawn.clear()
        found[name] = run(how, model(9), tmp / name, resume=True, max_iters=12)
        found[name + ' drawn'] = list(drawn)
    wide = lambda seed=1: model(seed, n_embd=32, dropout=0.2)
    straight = run(ddp, wide(), max_iters=12)
    run(ddp, wide(), tmp / 'three', max_iters=4)
    found['exact'] = straight == run(ddp, wide(9), tmp / 'three', resume=True, max_iters=12)
    # vectors of two numbers: one of three processes has none
    found['narrow'] = run(fsdp, model(n_embd=2, n_head=1), tmp / 'narrow', max_iters=4)
    (tmp / f'rank{fsdp.rank}.json').write_text(json.dumps(found))
"""


def test_another_number_of_processes_goes_on(two):
    "Saved by two, taken up by three, then by one: as if one process had done it all, no row twice."
    straight, rows = run(PLAIN, max_iters=12), drawn[-12:]
    parts = two.tmp / '.fsdp-parts'  # what a killed save of more processes left behind
    parts.mkdir()
    (parts / 'shard-00009-model-00001-of-00002.safetensors').write_bytes(b'half')
    ranks = launch(two.tmp, OTHER, processes=3)
    for name in ('ddp', 'fsdp'):
        close(ranks[0][name], straight)
        for step in range(4):
            seen = [ranks[i % 3][name + ' drawn'][step][i // 3] for i in range(12)]
            assert seen == rows[8 + step]
        assert read_checkpoint(two.tmp / name)[0]['world_size'] == 3
        alone = run(PLAIN, model(9), two.tmp / name, resume=True, max_iters=14)
        close(alone, run(PLAIN, max_iters=14))
    close(ranks[0]['narrow'], run(PLAIN, model(n_embd=2, n_head=1), max_iters=4))
    close(ranks[0]['narrow'][-1:], [validate(load_model(two.tmp / 'narrow')[0])])
    assert ranks[0]['exact'], 'three processes resume bit for bit'


LIVES = """
life = int(os.environ['TORCHELASTIC_RESTART_COUNT'])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def in_batch(how):
    return lambda: die() if how.rank == 1 and len(drawn) == 11 else None

def in_save(how):
    whole, saves = checkpoint.write_folder, []
    def half(folder, write):    # the third save, at step 8, dies when half is written
        saves.append(1)
        def broken(to):
            (to / 'model.safetensors').write_bytes(b'half')
            die()
        whole(folder, broken if len(saves) == 3 else write)
    if how.rank == 0:
        checkpoint.write_folder = half
    return lambda: None

with P.together('ddp', 'cpu') as ddp:
    found = {}
    fsdp = FullySharded(ddp.device, ddp.store)
    for how, accident, fatal in ((ddp, in_batch, 0), (fsdp, in_save, 1)):
        name, notes = ('ddp', 'fsdp')[fatal], tmp / f'notes-{fatal}-{ddp.rank}.json'
        drawn.clear()
        ready = accident(how) if life == fatal else lambda: None
        go_on = P.should_resume(tmp / name)
        watched = batches(how, ready)
        losses = run(how, model(dropout=0.2), tmp / name, watched, resume=go_on, max_iters=12)
        if life == fatal + 1:
            notes.write_text(json.dumps(list(drawn)))
        found[name] = dict(losses=losses, drawn=json.loads(notes.read_text()))
    for name, how in dict(ddp=ddp, fsdp=FullySharded(ddp.device)).items():
        drawn.clear()
        unbroken = run(how, model(dropout=0.2), tmp / f'{name}-whole', max_iters=12)
        found[name] |= dict(unbroken=unbroken, all=list(drawn))
    (tmp / f'rank{ddp.rank}.json').write_text(json.dumps(dict(found, life=life)))
    run(ddp, batch=batches(ddp, rows=7))    # bad input, at last: 7 rows for 2 processes
"""


@pytest.fixture(scope='module')
def lives(tmp_path_factory):
    "One launch in three lives, ended in an update, in a save, and by bad input."
    tmp = tmp_path_factory.mktemp('lives')
    done = launch(tmp, LIVES, fails=True, max_restarts=2)
    return SimpleNamespace(
        tmp=tmp,
        done=done,
        ranks=[json.loads((tmp / f'rank{r}.json').read_text()) for r in range(2)],
    )


@pytest.mark.parametrize('how, kept', [('ddp', 8), ('fsdp', 4)])
def test_a_killed_worker_changes_nothing(lives, how, kept):
    "SIGKILL in an update or in a save: all restart; each loss and row is that of a whole run."
    for rank in lives.ranks:
        assert rank['life'] == 2
        assert rank[how]['losses'] == rank[how]['unbroken']
        assert rank[how]['drawn'] == rank[how]['all'][kept:], 'begins where the checkpoint ended'
    rows = [sorted(a + b) for a, b in zip(*(rank[how]['all'] for rank in lives.ranks))]
    drawn.clear()
    run(PLAIN, max_iters=12)
    assert rows == [sorted(b) for b in drawn], 'two halves are the batch of one process'
    about, weights, _ = read_checkpoint(lives.tmp / how)
    _, whole, _ = read_checkpoint(lives.tmp / f'{how}-whole')
    assert about['step'] == 12 and all(torch.equal(w, whole[name]) for name, w in weights.items())
    assert not [p.name for p in lives.tmp.iterdir() if p.name.startswith('.')]


def test_bad_input_is_one_line_and_ends_all(lives):
    assert lives.done.returncode != 0
    said = [line for line in lives.done.stderr.splitlines() if 'batch_size' in line]
    mend = 'batch_size=7 cannot be shared by 2 processes: make it a multiple, for example 6'
    assert len(said) == 1 and said[0].endswith(mend)
    assert 'script.py", line' not in lives.done.stderr, 'no traceback, not of those left alone'


def test_gathering_and_leaving_wait_for_torchs_threads(monkeypatch):
    "A thread of gloo that puts a tensor down while Python ends aborts the process (issue 190489)."
    waited, left = [], []
    stand_ins = dict(
        get_rank=lambda: 0,
        get_world_size=lambda: 2,
        is_initialized=lambda: True,
        get_backend=lambda: 'gloo',
        all_gather=lambda parts, t: [p.copy_(t) for p in parts],
        destroy_process_group=lambda: left.append(len(waited)),
    )
    for name, value in stand_ins.items():
        monkeypatch.setattr(P.dist, name, value)
    note = lambda tensors: waited.append([t.data_ptr() for t in tensors])
    monkeypatch.setattr(processes, 'wait_until_released', note)
    t = torch.arange(3.0)
    group = processes.ProcessGroup(torch.device('cpu'))
    assert all(torch.equal(part, t) for part in group.gather(t))
    assert len(waited) == 1 and len(set(waited[0])) == 3
    assert t.data_ptr() not in waited[0]  # its own copy: the caller may hold t elsewhere
    P.stop()
    assert left == [2]  # waited once more, then left


@pytest.mark.parametrize(
    'shapes, words',
    [
        ([(6, 2), (4, 2)], 'as many in all'),
        ([(6, 2), ()], 'as many in all'),
        ([(7, 2), (7, 2)], 'batch_size=7 cannot be shared by 2 processes.*example 6'),
        ([(1, 2)], 'batch_size=1 cannot.*example 2'),
    ],
    ids=str,
)
def test_a_batch_that_cannot_be_cut_is_refused(shapes, words):
    batch = lambda generator: tuple(torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=words):
        P.global_batch(batch, SimpleNamespace(rank=0, world_size=2))(torch.Generator())


def test_every_tensor_of_a_batch_is_cut_by_rows():
    "Inputs, a mask and targets: all processes together have each row of each tensor once."
    whole = torch.arange(12).view(6, 2), torch.arange(6), torch.arange(36).view(6, 3, 2)
    groups = [SimpleNamespace(rank=r, world_size=3) for r in range(3)]
    cut = [P.global_batch(lambda generator: whole, group)(torch.Generator()) for group in groups]
    for i, t in enumerate(whole):
        assert all(len(part[i]) == 2 for part in cut)
        assert torch.equal(torch.stack([part[i] for part in cut], dim=1).flatten(0, 1), t)
