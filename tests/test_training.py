"Training where a notebook cannot go: any batch, many processes, kills, short numbers, translators."

import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from transformer_course import training
from transformer_course.bigram import IGNORE_INDEX, BigramLanguageModel, cross_entropy, evaluate
from transformer_course.block import BlockConfig, make_blocks, run_blocks
from transformer_course.checkpoint import read_checkpoint
from transformer_course.data import get_batch
from transformer_course.flops import model_flops_per_token
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.logs import LogFile, TensorBoard
from transformer_course.multihead import padding_mask
from transformer_course.optim import Muon
from transformer_course.stopping import Stopped
from transformer_course.strategy import Precision, SingleProcess, choose_compile, choose_precision
from transformer_course.training import TrainConfig, TrainState, train, update

IDS = torch.randint(0, 20, (3000,), generator=torch.Generator().manual_seed(0))
SHAPE = dict(block_size=16, vocab_size=20, n_layer=1, n_head=2, n_embd=32)
CONFIG, STILL = GPTConfig(**SHAPE, dropout=0.1), GPTConfig(**SHAPE)


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
    assert whole.losses[-1] < whole.losses[0] - 0.001 and whole.first_step == 0
    assert again.first_step == 4 and again.losses == whole.losses[4:]
    assert again.val == whole.val and again.tokens == whole.tokens == 12 * 2 * 64


def test_short_numbers_reach_muon():
    for name, dtype in dict(auto=None, float16=None, bfloat16=torch.bfloat16).items():
        muon, _ = TrainState(fresh(), TrainConfig(dtype=name)).optimizers
        assert muon.dtype is dtype
    g, steps = torch.Generator().manual_seed(0), []
    gradient = torch.randn(48, 16, generator=g)
    for dtype in (torch.bfloat16, None):
        weight = nn.Parameter(torch.zeros(48, 16))
        weight.grad = gradient
        Muon([weight], dtype=dtype).step()
        steps.append(weight.detach())
    assert weight.dtype == torch.float32
    assert 1e-4 < (steps[0] - steps[1]).norm() / steps[1].norm() < 0.05


def test_an_old_checkpoint_is_taken_up(tmp_path):
    "One with all losses, without a loss scale, and with a Muon that knew parts of one size only."
    short = partial(TrainConfig, eval_interval=2, warmup_iters=0, lr_decay='none')
    whole = train(fresh(), batch, short(max_iters=6))
    train(fresh(), batch, short(max_iters=4), folder=tmp_path / 'c')
    path = tmp_path / 'c' / 'checkpoint.json'
    about = json.loads(path.read_text())
    assert sorted(about['history']) == ['seconds', 'tokens', 'val']  # the losses are in the log
    del about['scaler'], about['history']['tokens'], about['train']['dtype'], about['model']
    del about['check']
    about['format'] = 1
    about['history']['losses'] = whole.losses[:4]
    for group in about['optimizers'][0]:
        group['parts'] = 3 if group.pop('sizes') else 1
    path.write_text(json.dumps(about))
    again = train(fresh(1), batch, short(max_iters=6), folder=tmp_path / 'c', resume=True)
    assert again.first_step == 4 and again.losses == whole.losses[4:] and again.tokens == 2 * 64


@pytest.mark.parametrize('change', [dict(seed=7), dict(optimizer='adamw')], ids=str)
def test_what_a_run_was_made_with_cannot_change(tmp_path, change):
    config = TrainConfig(max_iters=2, eval_interval=2)
    train(fresh(), batch, config, folder=tmp_path / 'c')
    with pytest.raises(ValueError, match='cannot change|of 2 optimisers'):
        train(fresh(), batch, replace(config, **change), folder=tmp_path / 'c', resume=True)


@pytest.mark.parametrize('at', [1, 3])
def test_a_stop_saves_the_update_in_hand(tmp_path, at):
    "What was done is in the checkpoint, and the run that goes on from it is bit for bit the same."
    config, folder = TrainConfig(max_iters=6, eval_interval=4, warmup_iters=2), tmp_path / 'c'
    whole, asked = train(fresh(), batch, config), []
    with pytest.raises(Stopped) as e:
        stop = lambda: len(asked) > at or bool(asked.append(1))
        train(fresh(), batch, config, folder=folder, stop=stop)
    assert e.value.step == at + 1
    again = train(fresh(1), batch, config, folder=folder, resume=True)
    assert again.losses == whole.losses[at + 1 :]


def test_a_checkpoint_does_not_grow_with_its_run(tmp_path):
    sizes = []
    for n in (1, 40):
        config = TrainConfig(max_iters=n, eval_interval=100)
        train(fresh(), batch, config, folder=tmp_path / str(n))
        sizes.append(sum(p.stat().st_size for p in (tmp_path / str(n)).iterdir()))
    assert sizes[1] - sizes[0] < 200  # one more evaluation would be allowed to show


def test_what_is_kept_about_a_run_cannot_replace_what_it_needs(tmp_path):
    config = TrainConfig(max_iters=2, eval_interval=1)
    train(fresh(), batch, config, folder=tmp_path / 'c', about=dict(step=99, word='hello'))
    about = read_checkpoint(tmp_path / 'c')[0]
    assert about['step'] == 2 and about['word'] == 'hello'


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


def made(model, config, precision=None, optimizers=None):
    "A `TrainState`, perhaps with other optimisers or numbers than it would choose."
    with torch.random.fork_rng():
        state = TrainState(model, config)
    state.precision = precision or state.precision
    state.optimizers = optimizers or state.optimizers
    return state


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_an_overflow_stops_every_optimiser_and_halves_the_scale():
    precision = Precision('cpu', torch.float16, init_scale=2.0**120)
    state = made(fresh(), TrainConfig(grad_clip=1.0), precision)
    before = flat(state.model)
    assert math.isfinite(update(state, batch)) and precision.scaler.get_scale() == 2.0**119
    assert torch.equal(flat(state.model), before)
    assert not any(optimizer.state for optimizer in state.optimizers)


def test_clipping_sees_the_gradient_without_the_loss_scale():
    moves, config = [], TrainConfig(grad_clip=0.01, warmup_iters=0, lr_decay='none')
    for precision in (Precision(), Precision('cpu', torch.float16, init_scale=1024.0)):
        model = fresh(config=STILL)
        start = flat(model)
        sgd = [torch.optim.SGD(model.parameters(), lr=1.0)]
        update(made(model, config, precision, sgd), batch)
        moves.append(flat(model) - start)
    assert math.isclose(moves[0].norm(), 0.01, rel_tol=1e-3)
    assert (moves[0] - moves[1]).norm() < 0.02 * moves[0].norm()


def test_a_loss_that_is_no_number_is_not_taken_for_an_overflow():
    model = fresh()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match='no longer finite at step 0 .a weight'):
        train(model, batch, TrainConfig(max_iters=2, dtype='float16'))


def test_after_a_nan_the_weights_are_those_before_the_update(tmp_path):
    class Poisoned(GPT):
        "A GPT that keeps its weights before each update, and whose loss turns to nan at the fifth."

        def forward(self, idx, targets=None, **kw):
            logits, loss = super().forward(idx, targets, **kw)
            if self.training:
                self.kept.append(flat(self))
                loss = loss * math.nan if len(self.kept) == 5 else loss
            return logits, loss

    model = Poisoned(CONFIG, torch.Generator().manual_seed(0))
    model.kept = []
    with pytest.raises(ValueError, match='no longer finite at step 4 .loss nan.*is kept'):
        config = TrainConfig(max_iters=9, eval_interval=3)
        train(model, batch, config, folder=tmp_path / 'c')
    assert len(model.kept) == 5 and torch.equal(flat(model), model.kept[4])
    assert not torch.equal(model.kept[4], model.kept[3])
    assert all(p.grad is None for p in model.parameters())  # nobody steps along nan later
    about, weights, _ = read_checkpoint(tmp_path / 'c')
    assert about['step'] == 3 and all(w.isfinite().all() for w in weights.values())
    good = fresh()
    train(good, batch, TrainConfig(max_iters=9, eval_interval=3), on_step=stop_after(4, good))
    assert torch.equal(flat(model), good.kept)


def stop_after(at, model):
    "For `on_step`: keeps the weights after update `at`."

    def on_step(step, record):
        if step == at:
            model.kept = flat(model)

    return on_step


# --- any batch ---


class Encoder(nn.Module):
    "Reads padded texts, `model(x, lengths, targets)`, and says the token that comes at each place."

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(20, config.n_embd)
        self.h = make_blocks(config, causal=False)
        self.head = nn.Linear(config.n_embd, 20)

    def forward(self, x, lengths, targets):
        mask = padding_mask(lengths, x.shape[1])
        logits = self.head(run_blocks(self.h, self.wte(x), mask=mask))
        return logits, cross_entropy(logits, targets)


class Regressor(nn.Module):
    "Real numbers to real numbers: `model(x, y) -> (prediction, mean squared error)`."

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))

    def forward(self, x, y):
        return (z := self.layers(x)), F.mse_loss(z, y)


def text(g):
    return batch(g)


def padded(g):
    x, lengths = torch.randint(20, (4, 16), generator=g), torch.tensor([2, 16, 2, 16])
    real = torch.arange(16) < lengths[:, None]
    return x, lengths, ((x + 1) % 20).where(real, IGNORE_INDEX)


def points(g):
    x = torch.randn(4, 3, generator=g)
    return x, x[:, :2] * 2 + 1


def uneven(g):
    "Rows with 2, 16, 2 and 16 scored targets."
    x, y = batch(g)
    few = torch.tensor([True, False, True, False])[:, None] & (torch.arange(16) >= 2)
    return x, y.masked_fill(few, IGNORE_INDEX)


ENCODER = BlockConfig(n_layer=1, n_head=2, n_embd=16)
KINDS = {
    'bigram': (lambda: BigramLanguageModel(20), uneven, 36),
    'gpt': (lambda: fresh(config=STILL), uneven, 36),
    'gpt of grouped heads': (lambda: fresh(config=GPTConfig(**SHAPE, n_kv_head=1)), uneven, 36),
    'encoder': (lambda: Encoder(ENCODER), padded, 36),
    'regressor': (Regressor, points, 8),
}
every_kind = pytest.mark.parametrize('kind', KINDS)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


@every_kind
def test_one_loop_trains_every_kind_of_model(kind):
    make, any_batch, scored = KINDS[kind]
    fixed = any_batch(torch.Generator().manual_seed(1))
    config = TrainConfig(max_iters=30, warmup_iters=0, learning_rate=0.02)
    model = seeded(make)
    history = train(model, lambda g: fixed, config)
    assert history.losses[-1] < 0.9 * history.losses[0] and history.tokens == 30 * scored
    assert history.losses[0] == seeded(make)(*fixed)[1].item()  # the mean over scored targets


def sgd_update(model, batch, parts=1, parallel=None):
    "What one update of plain gradient descent does: loss, tokens and weights."
    config = TrainConfig(warmup_iters=0, lr_decay='none', gradient_accumulation_steps=parts)
    state = made(model, config, optimizers=[torch.optim.SGD(model.parameters(), lr=1.0)])
    state.parallel = parallel or state.parallel
    loss = update(state, batch)
    return loss, state.history.tokens, flat(model)


def rows(tensors, i):
    return tuple(t[i] for t in tensors)


def of(parts):
    left = list(parts)
    return lambda g: left.pop(0)


def agree(found, expected):
    assert found[:2] == (pytest.approx(expected[0], abs=1e-6), expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=0, atol=1e-6)


@every_kind
def test_unequal_parts_are_the_one_big_batch(kind):
    make, any_batch, scored = KINDS[kind]
    whole = any_batch(torch.Generator().manual_seed(1))
    expected = sgd_update(seeded(make), lambda g: whole)
    assert expected[1] == scored
    parts = [rows(whole, slice(i, i + 1)) for i in range(4)]
    agree(sgd_update(seeded(make), of(parts), parts=4), expected)
    three = [rows(whole, slice(0, 1)), rows(whole, slice(1, 3)), rows(whole, slice(3, 4))]
    agree(sgd_update(seeded(make), of(three), parts=3), expected)


@pytest.mark.parametrize('at', [0, 1, 2])
def test_a_part_without_targets_contributes_nothing(at):
    whole = uneven(torch.Generator().manual_seed(1))
    expected = sgd_update(fresh(config=STILL), lambda g: whole)
    parts = [rows(whole, slice(0, 2)), rows(whole, slice(2, 4))]
    parts.insert(at, (whole[0], torch.full_like(whole[1], IGNORE_INDEX)))
    agree(sgd_update(fresh(config=STILL), of(parts), parts=3), expected)


def test_an_update_without_any_target_is_an_error():
    x, y = batch(torch.Generator().manual_seed(1))
    blank = x, torch.full_like(y, IGNORE_INDEX)
    with pytest.raises(ValueError, match='batch has no scored target'):
        train(fresh(), lambda g: blank, TrainConfig(max_iters=1))


def test_a_batch_is_a_tuple():
    with pytest.raises(ValueError, match='batch returned Tensor: give a tuple'):
        train(fresh(), lambda g: batch(g)[0], TrainConfig(max_iters=1))


def test_a_model_may_count_its_targets_itself():
    class Classifier(nn.Module):
        "Scores the rows whose weight, the middle tensor, is not zero."

        def __init__(self):
            super().__init__()
            self.map = nn.Linear(3, 5)

        def count_targets(self, batch):
            return (batch[1] != 0).sum()

        def forward(self, x, weight, label):
            logits = self.map(x)
            losses = F.cross_entropy(logits, label, reduction='none')
            return logits, (losses * weight).sum() / (weight != 0).sum()

    g = torch.Generator().manual_seed(0)
    x, label = torch.randn(6, 3, generator=g), torch.randint(5, (6,), generator=g)
    whole = x, torch.tensor([1.0, 0, 0, 1, 1, 1]), label
    expected = sgd_update(seeded(Classifier), lambda g: whole)
    assert expected[1] == 4
    parts = [rows(whole, slice(0, 3)), rows(whole, slice(3, 6))]
    agree(sgd_update(seeded(Classifier), of(parts), parts=2), expected)
    blank = x, torch.zeros(6), label  # a loss of 0/0, whose gradient is nan
    agree(sgd_update(seeded(Classifier), of([*parts, blank]), parts=3), expected)


def test_dropout_acts_in_training_and_not_in_validation():
    seen = []

    class Watched(GPT):
        def forward(self, idx, targets=None, **kw):
            x = self.transformer.drop(torch.ones(1000))
            seen.append((self.training, self.transformer.h[0].training, bool((x == 0).any())))
            return super().forward(idx, targets, **kw)

    def ask(model):
        seen.append('validates' if not model.training else 'validates with dropout')
        return evaluate(model, IDS[:40], 16)

    model = Watched(CONFIG, torch.Generator().manual_seed(0))
    model.eval()  # as it comes from `load_model`
    train(model, batch, TrainConfig(max_iters=3, eval_interval=2), validate=ask)
    on, off = (True, True, True), (False, False, False)
    asked = ['validates', off]
    assert seen == [*asked, on, on, *asked, on, *asked]
    assert not model.training


@pytest.mark.parametrize('place', ['embedding', 'blocks'])
def test_dropout_changes_the_loss_wherever_it_is(place):
    def first_loss(config, seed):
        model = fresh(config=config)
        if place == 'embedding':
            for block in model.transformer.h:
                block.drop = nn.Identity()
        else:
            model.transformer.drop = nn.Identity()
        config = TrainConfig(max_iters=1, seed=seed)
        return train(model, lambda g: (IDS[None, :16], IDS[None, 1:17]), config).losses[0]

    assert first_loss(CONFIG, 1) != first_loss(CONFIG, 2)
    assert first_loss(STILL, 1) == first_loss(STILL, 2)


# --- validation ---


def test_validation_is_a_mean_or_a_sum_and_a_count():
    class Two(SingleProcess):
        "The other process has a loss sum of 30 over 2 targets, or a mean of 15."

        rank, world_size = 0, 2

        def sum(self, *values):
            others = {2: (30.0, 2), 1: (15.0,)}[len(values)]
            return [a + b for a, b in zip(values, others)]

    state = made(fresh(), TrainConfig())
    assert training.validation_loss(state, lambda model: torch.tensor(5.0)) == 5
    assert training.validation_loss(state, lambda model: (10.0, 4)) == 2.5
    state.parallel = Two()
    assert training.validation_loss(state, lambda model: 5.0) == 10
    assert training.validation_loss(state, lambda model: (10.0, 8)) == 4
    state.parallel = SingleProcess()
    with pytest.raises(ValueError, match='no target'):
        training.validation_loss(state, lambda model: (0.0, 0))


# --- the contract with many processes ---


class Pair(SingleProcess):
    "One of two threads that play two processes: sums are exchanged, gradients averaged."

    world_size = 2

    def __init__(self, rank, meeting, model):
        self.rank, self.meeting, self.model = rank, meeting, model

    def exchange(self, mine):
        self.meeting['said'][self.rank] = mine
        self.meeting['barrier'].wait(30)
        said = list(self.meeting['said'])
        self.meeting['barrier'].wait(30)
        return said

    def sum(self, *values):
        return [sum(parts) for parts in zip(*self.exchange(values))]

    @contextmanager
    def accumulate(self, forward, last):
        yield
        if not last:
            return
        grads = self.exchange([p.grad.clone() for p in self.model.parameters()])
        for p, a, b in zip(self.model.parameters(), *grads, strict=True):
            p.grad = (a + b) / 2


def in_two(make, batches, parts):
    "What an update does in each of two processes; `batches`: the parts of each."
    meeting, found = dict(said=[None] * 2, barrier=threading.Barrier(2)), [None, None]
    models = [seeded(make) for _ in range(2)]

    def work(rank):
        parallel = Pair(rank, meeting, models[rank])
        found[rank] = sgd_update(models[rank], of(batches[rank]), parts, parallel)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@every_kind
def test_two_processes_are_the_one_big_batch(kind):
    make, any_batch, _ = KINDS[kind]
    whole = any_batch(torch.Generator().manual_seed(1))
    expected = sgd_update(seeded(make), lambda g: whole)
    one_row = [rows(whole, slice(i, i + 1)) for i in range(4)]
    for batches, parts in (
        ([[rows(whole, slice(0, 1))], [rows(whole, slice(1, 4))]], 1),
        ([[one_row[0], one_row[2]], [one_row[1], one_row[3]]], 2),
    ):
        for found in in_two(make, batches, parts):
            agree(found, expected)


def test_a_process_without_targets_contributes_nothing():
    x, y = whole = uneven(torch.Generator().manual_seed(1))
    expected = sgd_update(fresh(config=STILL), lambda g: whole)
    blank = x, torch.full_like(y, IGNORE_INDEX)
    for found in in_two(lambda: fresh(config=STILL), [[blank], [whole]], 1):
        agree(found, expected)


class Stranger(SingleProcess):
    "One of two processes, not the one that reports; notes what it is asked."

    rank, world_size = 1, 2

    def __init__(self):
        self.lasts, self.sums, self.wrapped = [], 0, None

    def wrap(self, model):
        weight = model.lm_head.weight.detach().clone()
        model.lm_head.weight = nn.Parameter(weight)  # as sharding does
        self.wrapped = model
        self.forward = lambda *args: model(*args)
        return self.forward

    @contextmanager
    def accumulate(self, forward, last):
        assert forward is self.forward
        self.lasts.append(last)
        yield

    def sum(self, *values):
        self.sums += 1
        return [2 * value for value in values]  # the other process has found the same


def test_the_loop_asks_parallel_for_everything_that_many_processes_do_differently():
    model = fresh(config=GPTConfig(**SHAPE, tie_weights=False))
    other, heard = Stranger(), []
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
    assert other.lasts == [False, False, True] * 2 and other.sums == 2 * 2 + 2 * 3
    assert heard == []  # only rank 0 reports
    assert history.tokens == 2 * 2 * 3 * 64  # of both processes
    assert not torch.equal(model.lm_head.weight, head)  # the optimisers were made after `wrap`


def test_each_process_has_its_own_dropout_and_the_same_batches():
    found = []
    for parallel in (SingleProcess(), Stranger()):
        with torch.random.fork_rng():
            state = TrainState(fresh(), TrainConfig(), parallel=parallel)
            found.append((state.generator.get_state(), torch.rand(1)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] != found[1][1]


def test_when_one_process_has_no_number_all_stop():
    class Ill(SingleProcess):
        def sum(self, *values):
            return [math.nan] * len(values)

    with pytest.raises(ValueError, match='step 0'):
        train(fresh(), batch, TrainConfig(max_iters=2), validate=validate, parallel=Ill())

    class Hole(SingleProcess):  # its own weights are fine, those of another process are not
        def sum(self, *values):
            return [value or 1.0 for value in values]

    with pytest.raises(ValueError, match='step 0 .a weight'):
        train(fresh(), batch, TrainConfig(max_iters=2), validate=validate, parallel=Hole())


# --- what a step tells ---


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_records_of_the_steps(optimizer):
    records, used = [], []
    config = TrainConfig(
        max_iters=4, warmup_iters=1, learning_rate=0.5, muon_lr=0.2, optimizer=optimizer
    )

    def noted(self, *args, **how):
        used.append(self.param_groups[0]['lr'])
        return step(self, *args, **how)

    step = torch.optim.AdamW.step
    with mock.patch.object(torch.optim.AdamW, 'step', noted):
        history = train(fresh(), batch, config, on_step=lambda *told: records.append(told))
    assert (
        [step for step, _ in records] == [record['step'] for _, record in records] == [1, 2, 3, 4]
    )
    records = [record for _, record in records]
    assert [r['loss'] for r in records] == history.losses
    assert [r['tokens'] for r in records] == [64, 128, 192, 256]
    assert [r['lr'] for r in records] == used == pytest.approx([0.25, 0.5, 0.5 * 2 / 3, 0.5 / 3])
    muon = [r.get('muon_lr') for r in records]
    assert muon == ([None] * 4 if optimizer == 'adamw' else pytest.approx([u * 0.4 for u in used]))
    assert 0 < records[0]['seconds'] <= records[-1]['seconds'] <= history.seconds


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
    with pytest.raises(ValueError, match='line 1 is no record of a step'):
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
    exact = train(fresh(), batch, TrainConfig(max_iters=8, eval_interval=2))
    assert (plain.first_step, again.first_step, len(calls)) == (4, 6, 2)
    found = whole.losses + plain.losses + again.losses
    assert found == pytest.approx(exact.losses, abs=0.02)  # the schedules differ in length


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
    assert choose_compile(device, compile, max_iters) is expected


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
    needed = (
        'max_iters batch_size gradient_accumulation_steps optimizer learning_rate muon_lr beta1 '
        'beta2 grad_clip warmup_iters lr_decay min_lr_ratio weight_decay dtype compile '
        'eval_interval seed'
    )
    assert {f.name for f in fields(TrainConfig)} == set(needed.split())


@pytest.mark.parametrize(
    'wrong',
    [
        dict(dtype='float8'),
        dict(max_iters=0),
        dict(batch_size=0),
        dict(batch_size='16'),
        dict(gradient_accumulation_steps=0),
        dict(eval_interval=0),
        dict(compile=1),
        dict(seed=None),
        dict(min_lr_ratio=2.0),
    ],
)
def test_wrong_settings_are_named(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f'^{name}={value!r}'):
        TrainConfig(**wrong)


# --- kills ---


def in_benchmarks(code):
    "What code prints that runs beside the benchmarks."
    command = [sys.executable, '-c', code]
    how = dict(capture_output=True, text=True, timeout=300)
    done = subprocess.run(command, cwd=ROOT / 'benchmarks', **how)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_kill_before_and_after_each_file_and_each_rename():
    code = (
        "import json, kills; only = {'rename', 'replace', 'save_file', 'write_text'}; "
        'print(json.dumps(kills.kills_at_every_point(updates=4, only=only)))'
    )
    done = in_benchmarks(code)
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


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_signals_in_one_process_and_in_two():
    "Whatever the signal: nothing damaged, nothing lost, nobody left behind."
    code = 'import json, signals; print(json.dumps(signals.random_signals(14, seed=3)))'
    done = in_benchmarks(code)
    check_signals(json.loads(done.stdout.splitlines()[-1]), least=14)


def check_signals(found, least):
    names = ('damaged', 'updates_lost_on_request', 'hangs', 'other_ends')
    names += ('losses_that_differ', 'log_lines_wrong')
    assert found['signals'] >= least and found['in_two_processes'] > 0 < found['saved_on_request']
    assert {name: found[name] for name in names} == dict.fromkeys(names, 0)


def test_the_recorded_signals_did_no_harm():
    found = json.loads((ROOT / 'benchmarks/results/kills.json').read_text())
    check_signals(found['signals'], least=300)
