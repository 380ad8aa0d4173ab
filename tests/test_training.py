"Training where a notebook cannot go: other processes, kills, short numbers, translators, damaged logs."

import importlib.util
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from unittest import mock

import pytest
import torch
from conftest import ROOT
from torch import nn

from transformer_course import training
from transformer_course.bigram import evaluate
from transformer_course.checkpoint import read_checkpoint
from transformer_course.data import get_batch
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.logs import LogFile, TensorBoard, read_log
from transformer_course.optim import Muon, make_optimizers
from transformer_course.strategy import Precision, choose_compile, choose_precision
from transformer_course.flops import model_flops_per_token
from transformer_course.training import Run, Single, TrainConfig, train, update

IDS = torch.randint(0, 20, (3000,), generator=torch.Generator().manual_seed(0))
CONFIG = GPTConfig(block_size=16, vocab_size=20, n_layer=1, n_head=2, n_embd=32, dropout=0.1)


def fresh(seed=0, config=CONFIG):
    return GPT(config, torch.Generator().manual_seed(seed))


def batch(generator):
    return get_batch(IDS, 4, 16, generator)


def validate(model):
    return evaluate(model, IDS[:400], 16)


class Cut(Exception):
    "The lights go out."


def cut(at):
    def on_step(step, record):
        if step == at:
            raise Cut

    return on_step


# --- bit for bit ---


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
@pytest.mark.parametrize('dtype', ['auto', 'bfloat16', 'float16'])
def test_resume_is_exact_in_all_numbers(tmp_path, dtype, optimizer):
    config = TrainConfig(
        max_iters=12,
        eval_interval=4,
        dtype=dtype,
        optimizer=optimizer,
        gradient_accumulation_steps=2,
        grad_clip=0.5,
    )
    large = partial(
        Precision, init_scale=2.0**19
    )  # float16: overflows at first, so that the scale moves before the cut
    with mock.patch.object(training, 'Precision', large):
        whole = train(fresh(), batch, config, validate=validate)
        with pytest.raises(Cut):
            train(fresh(), batch, config, validate=validate, folder=tmp_path / 'c', on_step=cut(7))
        about = read_checkpoint(tmp_path / 'c')[0]
        assert about['step'] == 4 and (dtype != 'float16' or 2 <= about['scaler']['scale'] < 2**19)
        again = train(
            fresh(9), batch, config, validate=validate, folder=tmp_path / 'c', resume=True
        )
    assert whole.losses[-1] < whole.losses[0] - 0.001
    assert (
        again.losses == whole.losses
        and again.val == whole.val
        and again.tokens == whole.tokens == 12 * 2 * 64
    )


def test_a_checkpoint_from_before_there_were_scalers_is_taken_up(tmp_path):
    config = TrainConfig(max_iters=4, eval_interval=2)
    whole = train(fresh(), batch, config, folder=tmp_path / 'c')
    path = tmp_path / 'c' / 'checkpoint.json'
    about = json.loads(path.read_text())
    del (
        about['scaler'],
        about['history']['tokens'],
        about['train']['dtype'],
        about['train']['compile'],
    )
    path.write_text(json.dumps(about))
    assert (
        train(
            fresh(1),
            batch,
            TrainConfig(max_iters=6, eval_interval=2),
            folder=tmp_path / 'c',
            resume=True,
        ).losses[:4]
        == whole.losses
    )


# --- sixteen bits ---


@pytest.mark.parametrize(
    'device, dtype, capability, expected',
    [
        ('cpu', 'auto', None, torch.float32),
        ('mps', 'auto', None, torch.float32),
        ('cuda', 'auto', (6, 1), torch.float32),
        ('cuda', 'auto', (7, 5), torch.float16),
        ('cuda', 'auto', (8, 0), torch.bfloat16),
        ('cuda:1', 'auto', (12, 0), torch.bfloat16),
        ('cpu', 'float16', None, torch.float16),
        ('cuda', 'float32', (9, 0), torch.float32),
    ],
)
def test_numbers_are_chosen_by_the_device(device, dtype, capability, expected):
    assert choose_precision(device, dtype, capability) == expected


def test_an_overflow_stops_every_optimiser_and_halves_the_scale():
    model, config, steps = fresh(), TrainConfig(grad_clip=1.0), []
    optimizers = make_optimizers(model, config)
    precision = Precision('cpu', torch.float16, init_scale=2.0**120)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = update(
        model, batch, optimizers, config, 0, torch.Generator().manual_seed(0), precision=precision
    )
    assert math.isfinite(loss) and precision.scaler.get_scale() == 2.0**119
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(optimizer.state for optimizer in optimizers)


def test_clipping_sees_the_gradient_without_the_loss_scale():
    moves = []
    for precision in (Precision(), Precision('cpu', torch.float16, init_scale=1024.0)):
        model = fresh(
            config=GPTConfig(block_size=16, vocab_size=20, n_layer=1, n_head=2, n_embd=32)
        )
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        update(
            model,
            batch,
            [torch.optim.SGD(model.parameters(), lr=1.0)],
            TrainConfig(grad_clip=0.01, warmup_iters=0, lr_decay='none'),
            0,
            torch.Generator().manual_seed(0),
            precision=precision,
        )
        moves.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - start)
    assert (
        math.isclose(moves[0].norm(), 0.01, rel_tol=1e-3)
        and (moves[0] - moves[1]).norm() < 0.02 * moves[0].norm()
    )


def test_a_loss_that_is_no_number_is_not_taken_for_an_overflow():
    model = fresh()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match='no longer finite at step 0'):
        train(model, batch, TrainConfig(max_iters=2, dtype='float16'))


# --- the contract with many processes ---


class Stranger(Single):
    "One of two processes, not the one that reports; notes what it is asked."

    rank, world_size = 1, 2

    def __init__(self):
        self.lasts, self.means, self.wrapped = [], 0, None

    def wrap(self, model):
        model.lm_head.weight = nn.Parameter(
            model.lm_head.weight.detach().clone()
        )  # as sharding does
        self.wrapped = model
        self.forward = lambda *args: model(*args)
        return self.forward

    @contextmanager
    def accumulate(self, forward, last):
        assert forward is self.forward
        self.lasts.append(last)
        yield

    def mean(self, value):
        self.means += 1
        return value


def test_the_loop_asks_parallel_for_everything_that_many_processes_do_differently():
    model, other, heard = (
        fresh(
            config=GPTConfig(
                block_size=16, vocab_size=20, n_layer=1, n_head=2, n_embd=32, tie_weights=False
            )
        ),
        Stranger(),
        [],
    )
    head = model.lm_head.weight.detach().clone()
    history = train(
        model,
        batch,
        TrainConfig(max_iters=2, eval_interval=1, gradient_accumulation_steps=3),
        parallel=other,
        validate=validate,
        on_eval=lambda *a: heard.append(a),
        on_step=lambda *a: heard.append(a),
    )
    assert other.lasts == [False, False, True] * 2 and other.means >= 2 + 3
    assert heard == []  # only rank 0 reports
    assert history.tokens == 2 * 2 * 3 * 64  # of both processes
    assert not torch.equal(model.lm_head.weight, head)  # the optimisers were made after `wrap`


def test_each_process_has_its_own_dropout_and_the_same_batches():
    ones, other = Single(), Stranger()
    with torch.random.fork_rng():
        first = Run(fresh(), TrainConfig(), parallel=ones), torch.rand(1)
    with torch.random.fork_rng():
        second = Run(fresh(), TrainConfig(), parallel=other), torch.rand(1)
    assert (
        torch.equal(first[0].generator.get_state(), second[0].generator.get_state())
        and first[1] != second[1]
    )


def test_when_one_process_has_no_number_all_stop():
    class Ill(Single):
        def mean(self, value):
            return math.nan

    with pytest.raises(ValueError, match='step 0'):
        train(fresh(), batch, TrainConfig(max_iters=2), validate=validate, parallel=Ill())

    class Hole(Single):  # its own weights are fine, those of another process are not
        def mean(self, value):
            return value or 0.5

    with pytest.raises(ValueError, match='step 0'):
        train(fresh(), batch, TrainConfig(max_iters=2), validate=validate, parallel=Hole())


def test_muon_steps_a_sharded_matrix_like_a_whole_one():
    if not torch.distributed.is_available():
        pytest.skip('torch was built without torch.distributed')
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group(
        'gloo', store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh, w, g = init_device_mesh('cpu', (1,)), torch.randn(12, 4), torch.randn(12, 4)
        plain, sharded = (
            nn.Parameter(w.clone()),
            nn.Parameter(distribute_tensor(w.clone(), mesh, [Shard(0)])),
        )
        for p, grad in ((plain, g), (sharded, distribute_tensor(g, mesh, [Shard(0)]))):
            p.grad = grad
            Muon([dict(params=[p], parts=3)], lr=0.1, weight_decay=0.1).step()
        assert torch.equal(sharded.full_tensor(), plain) and not torch.equal(plain, w)
    finally:
        torch.distributed.destroy_process_group()


# --- what a step tells ---


def test_records_of_the_steps():
    records, config = (
        [],
        TrainConfig(max_iters=3, warmup_iters=1, lr_decay='none', learning_rate=0.5),
    )
    history = train(
        fresh(), batch, config, on_step=lambda step, record: records.append((step, record))
    )
    assert [step for step, _ in records] == [1, 2, 3] and all(
        record['step'] == step for step, record in records
    )
    assert [r['loss'] for _, r in records] == history.losses and [
        r['tokens'] for _, r in records
    ] == [64, 128, 192]
    assert [r['lr'] for _, r in records] == [0.25, 0.5, 0.5] and records[0][1][
        'seconds'
    ] <= records[-1][1]['seconds'] <= history.seconds


def test_the_report_of_the_last_checkpoint_is_made_again_after_a_cut(tmp_path):
    config, steps = TrainConfig(max_iters=4, eval_interval=2), []

    def die(step, history):
        if step == 4:
            raise Cut

    with pytest.raises(Cut):
        train(fresh(), batch, config, validate=validate, folder=tmp_path / 'c', on_eval=die)
    train(
        fresh(),
        batch,
        config,
        validate=validate,
        folder=tmp_path / 'c',
        resume=True,
        on_eval=lambda step, h: steps.append((step, len(h.val))),
    )
    assert steps == [(4, 3)]


def test_a_log_torn_at_any_byte_comes_out_whole(tmp_path):
    path, line = tmp_path / 'log.jsonl', lambda step: dict(step=step, loss=1 / step)
    log = LogFile(path)
    for step in range(1, 6):
        log(step, line(step))
    whole = path.read_bytes()
    for cut_at in range(whole.index(b'{"step": 3'), len(whole)):
        path.write_bytes(whole[:cut_at])
        log = LogFile(path)
        for step in range(3, 6):
            log(step, line(step))  # resumed from step 2
        assert path.read_bytes() == whole, cut_at
    assert [p.name for p in tmp_path.iterdir()] == ['log.jsonl']


def test_a_log_of_another_kind_is_not_overwritten(tmp_path):
    (tmp_path / 'notes.txt').write_text('dear diary\n')
    with pytest.raises(ValueError, match='line 1 is not JSON'):
        LogFile(tmp_path / 'notes.txt')(1, dict(step=1))
    assert (tmp_path / 'notes.txt').read_text() == 'dear diary\n'


def test_tensorboard_reads_what_was_written(tmp_path):
    if importlib.util.find_spec('tensorboard') is None:
        pytest.skip('tensorboard is not installed')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    history = train(
        fresh(),
        batch,
        TrainConfig(max_iters=3),
        validate=validate,
        on_step=board,
        on_eval=board.on_eval,
    )
    board.writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.value for e in events.Scalars('loss')] == pytest.approx(history.losses) and [
        e.step for e in events.Scalars('val')
    ] == [0, 3]


# --- translated models ---


def test_checkpoints_of_compiled_and_plain_models_are_the_same(tmp_path):
    compiled, calls = partial(torch.compile, backend='eager'), []

    def noted(model):
        return calls.append(1) or compiled(model)

    short = lambda **kw: TrainConfig(max_iters=4, eval_interval=2, **kw)
    with mock.patch('torch.compile', noted):
        whole = train(fresh(), batch, short(compile=True), folder=tmp_path / 'c')
        assert calls == [1]
        names = set(read_checkpoint(tmp_path / 'c')[1])
        assert names <= set(fresh().state_dict())
        plain = train(
            fresh(1),
            batch,
            TrainConfig(max_iters=6, eval_interval=2),
            folder=tmp_path / 'c',
            resume=True,
        )
        again = train(
            fresh(2),
            batch,
            TrainConfig(max_iters=8, eval_interval=2, compile=True),
            folder=tmp_path / 'c',
            resume=True,
        )
    assert plain.losses[:4] == whole.losses and again.losses[:6] == plain.losses and len(calls) == 2


@pytest.mark.parametrize(
    'device, compile, max_iters, expected',
    [
        ('cpu', None, 10**6, False),
        ('cuda', None, 10**6, sys.platform == 'linux'),
        ('cuda', None, 10, False),
        ('cuda', False, 10**6, False),
        ('cpu', True, 1, True),
    ],
)
def test_when_to_compile(device, compile, max_iters, expected):
    assert choose_compile(device, TrainConfig(compile=compile, max_iters=max_iters)) is expected


@pytest.mark.parametrize('device, fused', [('cpu', False), ('cuda', True)])
def test_fused_adamw_is_for_gpus(device, fused):
    class There(nn.Parameter):
        "A parameter that says it is on another device."

        @property
        def device(self):
            return torch.device(device)

    asked = []
    model = fresh()
    with (
        mock.patch.object(
            model, 'parameters', lambda: iter([There(p.data) for p in GPT.parameters(model)])
        ),
        mock.patch('torch.optim.AdamW', lambda *a, fused=False, **kw: asked.append(fused)),
    ):
        make_optimizers(model, TrainConfig())
    assert asked == [fused]


# --- operations ---


@pytest.mark.parametrize(
    'more',
    [
        dict(),
        dict(tie_weights=False, mlp_ratio=3.0),
        dict(n_kv_head=1, bias=False),
        dict(position='rotary', norm='plain', smear=True, qk_norm=True),
    ],
)
def test_operations_are_those_that_torch_counts(more):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig(block_size=8, vocab_size=30, n_layer=2, n_head=2, n_embd=16, **more)
    ids = torch.zeros(3, 8, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        fresh(config=config)(ids, ids)[1].backward()
    assert counter.get_total_flops() == 24 * model_flops_per_token(config)


# --- settings ---


def test_the_settings_of_large_runs_have_fields():
    needed = set(
        'max_iters batch_size gradient_accumulation_steps optimizer learning_rate muon_lr beta1 beta2 grad_clip warmup_iters lr_decay min_lr_ratio '
        'weight_decay dtype compile eval_interval seed'.split()
    )
    assert needed <= {f.name for f in fields(TrainConfig)}


@pytest.mark.parametrize(
    'wrong',
    [
        dict(dtype='float8'),
        dict(max_iters=0),
        dict(grad_clip=-1.0),
        dict(optimizer='sgd'),
        dict(lr_decay='steep'),
    ],
)
def test_wrong_settings_are_named(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f'{name}={value!r}'):
        train(fresh(), batch, TrainConfig(**wrong))


# --- kills ---


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_kill_before_and_after_each_file_and_each_rename():
    code = "import json, kills; found = kills.kills_at_every_point(updates=4, only={'rename', 'replace', 'save_file', 'write_text'}); print(json.dumps(found))"
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=ROOT / 'benchmarks',
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found['points'] >= 30 and {'rename', 'save_file'} <= set(found['steps'])
    assert {
        k: found[k] for k in ('damaged', 'losses_that_differ', 'log_lines_wrong', 'went_back')
    } == dict(damaged=0, losses_that_differ=0, log_lines_wrong=0, went_back=0), done.stdout


def test_the_recorded_kills_did_no_harm():
    found = json.loads((ROOT / 'benchmarks/results/kills.json').read_text())
    assert (
        found['random']['kills'] >= 100
        and found['random']['while_writing'] > 0
        and found['points']['points'] > 100
    )
    assert not any(
        figures[k]
        for figures in (found['random'], found['points'])
        for k in ('damaged', 'losses_that_differ', 'log_lines_wrong')
    )
