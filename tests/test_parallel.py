"""Several processes on one machine: the same losses as one, and a run that outlives its workers.

Real torchrun, gloo, tiny models. What costs time is that every process imports torch, so there are three launches in all."""

import json, os, subprocess, sys
from types import SimpleNamespace
import pytest, torch
from transformer_course.checkpoint import read_checkpoint
from transformer_course.parallel import torchrun
from transformer_course.training import load_model

COMMON = '''
import json, os, signal, sys, torch
from pathlib import Path
from transformer_course import checkpoint, parallel as P
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.training import TrainConfig, train

IDS = torch.randint(13, (300,), generator=torch.Generator().manual_seed(0))
SHAPE = dict(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=16)
CONFIG = dict(max_iters=8, batch_size=12, eval_interval=4, warmup_iters=2, grad_clip=0.5, lr_decay='none')
drawn = []   # where each row began, of each batch of this process

def model(seed=1, **kw): return GPT(GPTConfig(**(SHAPE | kw)), torch.Generator().manual_seed(seed))
def starts(g):
    s = torch.randint(len(IDS) - 8, (12, 1), generator=g)
    return s, s
def batch(parallel, accident=lambda: None):
    mine = P.global_batch(starts, parallel)
    def draw(g):
        s, _ = mine(g)
        drawn.append(s.flatten().tolist())
        accident()
        return IDS[s + torch.arange(8)], IDS[s + torch.arange(1, 9)]
    return draw
def validate(m):
    with torch.no_grad(): return m(IDS[None, :8], IDS[None, 1:9])[1].item()
def run(parallel, m=None, folder=None, resume=False, accident=lambda: None, **kw):
    h = train(m or model(), batch(parallel, accident), TrainConfig(**(CONFIG | kw)), validate=validate, folder=folder, resume=resume, parallel=parallel)
    return h.losses + [v for _, v in h.val]
'''
exec(COMMON)  # the same model and batches here, in one process
PLAIN = P.Single()


def launch(tmp_path, body, *args, fails=False, **how):
    "Run a script under torchrun; what each process wrote to `rank<r>.json` in the folder that it is given."
    script = tmp_path / 'script.py'
    script.write_text(COMMON + body)
    for old in tmp_path.glob('rank*.json'):
        old.unlink()
    env = {k: v for k, v in os.environ.items() if k != 'GLOO_SOCKET_IFNAME'} | dict(
        OMP_NUM_THREADS='1', TQDM_DISABLE='1'
    )
    done = subprocess.run(
        torchrun(script, tmp_path, *args, **how),
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if fails:
        return done
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        json.loads((tmp_path / f'rank{r}.json').read_text()) for r in range(how.get('processes', 2))
    ]


SAME = '''
tmp = Path(sys.argv[1])
found = {}
with P.together('ddp', 'cpu') as ddp:
    fsdp = P.Sharded(ddp.device, ddp.store)
    for name, parallel in dict(ddp=ddp, fsdp=fsdp).items():
        other = lambda **kw: model(1 + parallel.rank, **kw)           # rank 1 begins with other weights: rank 0's count
        found[name] = run(parallel, other(), tmp / name)
        found[name + ' again'] = run(parallel)
        found[name + ' adamw'] = run(parallel, other(), optimizer='adamw')
        found[name + ' parts'] = run(parallel, other(), gradient_accumulation_steps=2, max_iters=4)
        found[name + ' dropout'] = run(parallel, model(dropout=0.2), tmp / f'{name}-dropout')
        run(parallel, model(dropout=0.2), tmp / f'{name}-half', max_iters=4)
        found[name + ' resumed'] = run(parallel, model(7, dropout=0.2), tmp / f'{name}-half', resume=True)
        always = type('Always', (type(parallel),), dict(accumulate=lambda self, forward, last: super(type(self), self).accumulate(forward, True)))
        found[name + ' always'] = run(always(parallel.device, parallel.store), gradient_accumulation_steps=2, max_iters=4)
    found['tied'] = run(P.Sharded(ddp.device), model(1 + ddp.rank, tie_weights=not SHAPE.get('tie_weights', True), n_embd=24))
    dice = [t.tolist() for t in ddp.gather(torch.rand(3, generator=torch.Generator().manual_seed(ddp.rank)))]
    m = model()
    fsdp.wrap(m)
    held = sum(p.to_local().numel() for p in m.parameters())
    (tmp / f'rank{ddp.rank}.json').write_text(json.dumps(dict(found=found, dice=dice, held=held, mean=ddp.mean(float(ddp.rank)))))
'''


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "One launch of two processes that trains in every way; what they found, and the folder with their checkpoints."
    tmp = tmp_path_factory.mktemp('two')
    ranks = launch(tmp, SAME)
    return SimpleNamespace(tmp=tmp, ranks=ranks, found=ranks[0]['found'])


def close(a, b):
    torch.testing.assert_close(
        torch.tensor(a, dtype=torch.float64),
        torch.tensor(b, dtype=torch.float64),
        rtol=3e-6,
        atol=0,
    )


@pytest.fixture(scope='module')
def one():
    "The same in one process."
    return dict(
        plain=run(PLAIN),
        adamw=run(PLAIN, optimizer='adamw'),
        parts=run(PLAIN, gradient_accumulation_steps=2, max_iters=4),
        tied=run(PLAIN, model(tie_weights=not SHAPE.get('tie_weights', True), n_embd=24)),
    )


@pytest.mark.parametrize('how', ['ddp', 'fsdp'])
def test_same_losses_as_one_process(two, one, how):
    close(two.found[how], one['plain'])
    close(two.found[how + ' adamw'], one['adamw'])
    if how == 'fsdp':
        close(two.found['tied'], one['tied'])


@pytest.mark.parametrize('how', ['ddp', 'fsdp'])
def test_two_processes_twice_are_bit_identical(two, how):
    assert two.found[how] == two.found[how + ' again']


def test_every_process_gets_the_same_numbers(two):
    assert two.ranks[0]['found'] == two.ranks[1]['found']
    assert two.ranks[0]['mean'] == two.ranks[1]['mean'] == 0.5
    assert (
        two.ranks[0]['dice'] == two.ranks[1]['dice']
        and two.ranks[0]['dice'][0] != two.ranks[0]['dice'][1]
    )


@pytest.mark.parametrize('how', ['ddp', 'fsdp'])
def test_accumulation_exchanges_once_and_changes_nothing(two, one, how):
    close(two.found[how + ' parts'], one['parts'])
    close(two.found[how + ' parts'], two.found[how + ' always'])


@pytest.mark.parametrize('how', ['ddp', 'fsdp'])
def test_resume_with_dropout_is_bit_exact(two, how):
    assert two.found[how + ' resumed'] == two.found[how + ' dropout']
    _, _, tensors = read_checkpoint(two.tmp / f'{how}-dropout')
    assert not torch.equal(tensors['rng.dropout'], tensors['rng.dropout.1'])


def test_shards_share_the_memory(two):
    whole = model().num_params()
    assert (
        all(rank['held'] < 0.6 * whole for rank in two.ranks)
        and sum(rank['held'] for rank in two.ranks) == whole
    )


def test_both_write_the_checkpoint_of_one_process(two, tmp_path):
    "The same files, tensors and settings, whoever wrote; nothing pickled; `load_model` reads them."
    run(PLAIN, folder=tmp_path / 'plain')
    about, weights, tensors = read_checkpoint(tmp_path / 'plain')
    for how in ('ddp', 'fsdp'):
        a, w, t = read_checkpoint(two.tmp / how)
        assert sorted(p.name for p in (two.tmp / how).iterdir()) == [
            'checkpoint.json',
            'model.safetensors',
            'training.safetensors',
        ]
        assert (
            a['optimizers'] == about['optimizers']
            and a['config'] == about['config']
            and a['step'] == 8
        )
        assert set(w) == set(weights) and set(t) == set(tensors) | {'rng.dropout.1'}
        for name in weights:
            if not name.endswith('attn.c_attn.bias'):
                torch.testing.assert_close(w[name], weights[name], rtol=1e-3, atol=1e-4)
        for name in tensors:
            assert t[name].shape == tensors[name].shape and t[name].dtype == tensors[name].dtype
        close(
            [validate(load_model(two.tmp / how)[0])], [validate(load_model(tmp_path / 'plain')[0])]
        )
    assert not [p.name for p in two.tmp.iterdir() if p.name.startswith('.')]


OTHER = '''
tmp, n = Path(sys.argv[1]), sys.argv[2:]
with P.together('fsdp', 'cpu') as fsdp:
    found, ddp = {}, P.DataParallel(fsdp.device, fsdp.store)
    for name, parallel in dict(ddp=ddp, fsdp=fsdp).items():
        drawn.clear()
        found[name] = run(parallel, model(9), tmp / name, resume=True, max_iters=12)
        found[name + ' drawn'] = list(drawn)
    wide = lambda seed=1: model(seed, n_embd=32, dropout=0.2)
    straight = run(ddp, wide(), max_iters=12)
    run(ddp, wide(), tmp / 'three', max_iters=4)
    found['exact'] = straight == run(ddp, wide(9), tmp / 'three', resume=True, max_iters=12)
    found['narrow'] = run(fsdp, model(n_embd=2, n_head=1), tmp / 'narrow', max_iters=4)  # vectors of two numbers: one of three processes has none
    (tmp / f'rank{fsdp.rank}.json').write_text(json.dumps(found))
'''


def test_another_number_of_processes_goes_on(two, one):
    "Saved by two, taken up by three, then by one: the losses of a run that one process did alone; no row lost or done twice."
    straight, rows = run(PLAIN, max_iters=12), drawn[-12:]
    (two.tmp / '.fsdp-parts').mkdir()  # what a killed save of more processes left behind
    (two.tmp / '.fsdp-parts' / 'shard-00009-model-00001-of-00002.safetensors').write_bytes(b'half')
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
    assert ranks[0]['exact'], 'three processes resume bit for bit'


LIVES = '''
tmp, life = Path(sys.argv[1]), int(os.environ['TORCHELASTIC_RESTART_COUNT'])
def die(): os.kill(os.getpid(), signal.SIGKILL)
def in_batch(parallel):
    return lambda: die() if parallel.rank == 1 and len(drawn) == 11 else None
def in_save(parallel):
    whole, saves = P.write_atomically, []
    def half(folder, write):                                         # the third save, at step 8, dies when half is written
        saves.append(1)
        def broken(to):
            (to / 'model.safetensors').write_bytes(b'half')
            die()
        whole(folder, broken if len(saves) == 3 else write)
    if parallel.rank == 0: P.write_atomically = half
    return lambda: None

with P.together('ddp', 'cpu') as ddp:
    found = {}
    for how, accident, fatal in ((ddp, in_batch, 0), (P.Sharded(ddp.device, ddp.store), in_save, 1)):
        name, notes = ('ddp', 'fsdp')[fatal], tmp / f'notes-{fatal}-{ddp.rank}.json'
        drawn.clear()
        losses = run(how, model(dropout=0.2), tmp / name, resume=P.should_resume(tmp / name), accident=accident(how) if life == fatal else lambda: None, max_iters=12)
        if life == fatal + 1: notes.write_text(json.dumps(list(drawn)))
        found[name] = dict(losses=losses, drawn=json.loads(notes.read_text()))
    for name, how in dict(ddp=ddp, fsdp=P.Sharded(ddp.device)).items():
        drawn.clear()
        unbroken = run(how, model(dropout=0.2), tmp / f'{name}-whole', max_iters=12)
        found[name] |= dict(unbroken=unbroken, all=list(drawn))
    (tmp / f'rank{ddp.rank}.json').write_text(json.dumps(dict(found, life=life)))
    starts = lambda g: (torch.zeros(7, 1, dtype=torch.long),) * 2    # bad input, at last: 7 rows for 2 processes
    run(ddp)
'''


@pytest.fixture(scope='module')
def lives(tmp_path_factory):
    "One launch in three lives: the first ends in an update, the second in a save, the third with bad input."
    tmp = tmp_path_factory.mktemp('lives')
    done = launch(tmp, LIVES, fails=True, max_restarts=2)
    return SimpleNamespace(
        tmp=tmp,
        done=done,
        ranks=[json.loads((tmp / f'rank{r}.json').read_text()) for r in range(2)],
    )


@pytest.mark.parametrize('how, kept', [('ddp', 8), ('fsdp', 4)])
def test_a_killed_worker_changes_nothing(lives, how, kept):
    "SIGKILL in the middle of an update or of a save: torchrun restarts all, and every loss and every row is that of a run without a break."
    for rank in lives.ranks:
        assert rank['life'] == 2
        assert rank[how]['losses'] == rank[how]['unbroken']
        assert rank[how]['drawn'] == rank[how]['all'][kept:], (
            'the next life begins where the checkpoint ended'
        )
    rows = [sorted(a + b) for a, b in zip(*(rank[how]['all'] for rank in lives.ranks))]
    drawn.clear()
    run(PLAIN, max_iters=12)
    assert rows == [sorted(b) for b in drawn], 'two halves are the batch of one process'
    (about, weights, _), (_, whole, _) = (
        read_checkpoint(lives.tmp / name) for name in (how, f'{how}-whole')
    )
    assert about['step'] == 12 and all(torch.equal(w, whole[name]) for name, w in weights.items())
    assert not [p.name for p in lives.tmp.iterdir() if p.name.startswith('.')]


def test_bad_input_is_one_line_and_ends_all(lives):
    assert lives.done.returncode != 0
    said = [line for line in lives.done.stderr.splitlines() if 'batch_size' in line]
    assert len(said) == 1 and said[0].endswith(
        'batch_size=7 cannot be shared by 2 processes: make it a multiple, for example 6'
    )
    assert 'script.py", line' not in lives.done.stderr, (
        'no traceback, not of those who were left alone either'
    )


def test_gathering_and_leaving_wait_for_torchs_threads(monkeypatch):
    "A thread of gloo that puts a tensor down while Python ends aborts the process (pytorch issue 190489)."
    waited, left = [], []
    for name, value in dict(
        get_rank=lambda: 0,
        get_world_size=lambda: 2,
        is_initialized=lambda: True,
        get_backend=lambda: 'gloo',
        all_gather=lambda parts, t: [p.copy_(t) for p in parts],
        destroy_process_group=lambda: left.append(len(waited)),
    ).items():
        monkeypatch.setattr(P.dist, name, value)
    monkeypatch.setattr(P, 'let_go', lambda tensors: waited.append([t.data_ptr() for t in tensors]))
    t = torch.arange(3.0)
    assert all(torch.equal(part, t) for part in P.Many(torch.device('cpu')).gather(t))
    assert (
        len(waited) == 1 and len(set(waited[0])) == 3 and t.data_ptr() not in waited[0]
    )  # own copy: the caller may hold t elsewhere
    P.stop()
    assert left == [2]  # waited once more, then left
