"The Neural GPU: the sum against Python, carries, rows, the cell against loops, reach, training."

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transformer_course.checkpoint import load_model, save_checkpoint
from transformer_course.experiments.neural_gpu import (
    ConvGRU,
    Curriculum,
    NeuralGPU,
    NeuralGPUConfig,
    add_bits,
    hard_gate,
    hard_value,
    longest_carry,
    pair_ids,
    random_pairs,
    right_rows,
    twin_pairs,
)
from transformer_course.training import TrainConfig, train

thorough = settings(deadline=None, derandomize=True, max_examples=60)
numbers = st.integers(1, 60).flatmap(
    lambda n: st.tuples(st.just(n), *[st.integers(0, 2**n - 1)] * 2)
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def columns(n, a, b):
    return torch.tensor([[(a >> i & 1, b >> i & 1) for i in range(n)]])


def lively(seed=0, **changes):
    "A machine whose gates are half open, so that each place hears its neighbours."
    model = NeuralGPU(NeuralGPUConfig(**changes), rng(seed)).eval()
    nn.init.zeros_(model.cell.gates.bias)
    return model.double()


# ---------------------------------------------------------------- the task


@thorough
@given(numbers)
def test_the_sum_is_pythons(problem):
    n, a, b = problem
    bits = add_bits(columns(n, a, b))[0].tolist()
    assert len(bits) == n + 1 and sum(bit << i for i, bit in enumerate(bits)) == a + b


@thorough
@given(numbers)
def test_the_longest_carry_by_trying(problem):
    "Two numbers may differ below a place and have the same answer there, unless it is in reach."
    n, a, b = problem
    pairs = columns(n, a, b)
    equal = (pairs[0, :, 0] == pairs[0, :, 1]).tolist()
    slow = 1
    for place in range(n + 1):
        back = 1
        while back <= place and not equal[place - back]:
            back += 1
        slow = max(slow, back)
    assert longest_carry(pairs).item() == slow


@pytest.mark.parametrize(('n', 'd'), [(1, 1), (4, 2), (7, 3), (8, 8)])
def test_the_share_of_carries_is_that_of_all_rows(n, d):
    every = torch.tensor([[(i >> k & 1, 0) for k in range(n)] for i in range(2**n)])
    share = [1.0] * d
    for length in range(d, n + 1):
        share.append(sum(share[length - i] / 2**i for i in range(1, d + 1)))
    assert (longest_carry(every) <= d).double().mean().item() == share[n]


def test_hard_rows_carry_from_a_random_place_to_the_end():
    rows = random_pairs(2000, 60, rng(), hard=1.0)
    carries = longest_carry(rows)
    assert (rows[:, -1, 0] != rows[:, -1, 1]).double().mean() > 0.97
    assert carries.double().mean() > 25 and carries.min() < 8 and carries.max() > 55
    plain = random_pairs(2000, 60, rng(), hard=0.0)
    assert abs((plain[..., 0] == plain[..., 1]).double().mean() - 0.5) < 0.01
    assert abs(plain.double().mean() - 0.5) < 0.01
    before = torch.get_rng_state()
    assert torch.equal(random_pairs(5, 9, rng(3)), random_pairs(5, 9, rng(3)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(('n', 'chain'), [(2, 2), (9, 2), (9, 6), (9, 9), (40, 17)])
def test_twins_differ_in_one_place_and_their_sums_up_to_the_end_of_the_carry(n, chain):
    none, one = twin_pairs(60, n, chain, rng(chain))
    differ = (none != one).any(-1)
    assert (differ.sum(1) == 1).all()
    start = differ.long().argmax(1)
    assert start.max() <= n - chain
    if n > chain + 3:
        assert start.unique().numel() > 3
    expected = torch.zeros(60, n + 1, dtype=torch.bool)
    for row, at in enumerate(start):
        expected[row, at + 1 : at + chain + 1] = True
    assert torch.equal(add_bits(none) != add_bits(one), expected)
    assert (longest_carry(none) == chain).all() and (longest_carry(one) == chain).all()


def test_symbols_tell_the_columns_apart():
    pairs = torch.tensor([[(0, 0), (0, 1), (1, 0), (1, 1)]])
    assert pair_ids(pairs).tolist() == [[1, 2, 3, 4, 0]]


@pytest.mark.parametrize(
    ('bad', 'match'),
    [
        (lambda: add_bits(torch.zeros(3, 2, dtype=torch.long)), 'shape'),
        (lambda: add_bits(torch.zeros(3, 4, 3, dtype=torch.long)), 'shape'),
        (lambda: longest_carry(torch.zeros(3, 0, 2, dtype=torch.long)), 'shape'),
        (lambda: pair_ids(torch.zeros(0, 4, 2, dtype=torch.long)), 'shape'),
        (lambda: pair_ids(torch.zeros(3, 4, 2)), 'dtype'),
        (lambda: add_bits(torch.full((3, 4, 2), 2)), 'holds 2'),
        (lambda: NeuralGPU()(torch.full((3, 4, 2), -1)), 'holds -1'),
        (lambda: NeuralGPU()(torch.zeros(3, 4, dtype=torch.long)), 'shape'),
        (lambda: NeuralGPU()(random_pairs(3, 4, rng()), steps=0), 'steps'),
        (lambda: NeuralGPU()(random_pairs(3, 4, rng()), torch.zeros(3, 4).long()), 'targets'),
        (lambda: random_pairs(0, 4, rng()), 'count'),
        (lambda: random_pairs(3, 0, rng()), 'n=0'),
        (lambda: twin_pairs(3, 4, 5, rng()), 'chain'),
        (lambda: twin_pairs(3, 4, 1, rng()), 'chain'),
        (lambda: NeuralGPUConfig(kernel=2), 'odd'),
        (lambda: NeuralGPUConfig(steps=0), 'steps'),
        (lambda: NeuralGPUConfig(channels=0), 'channels'),
        (lambda: NeuralGPUConfig(channels='many'), 'channels'),
        (lambda: NeuralGPUConfig(dropout=-0.1), 'dropout'),
        (lambda: Curriculum(2), 'low'),
    ],
)
def test_bad_input_is_refused(bad, match):
    with pytest.raises(ValueError, match=match):
        bad()


# ---------------------------------------------------------------- the machine


def test_hard_gates_are_a_stretched_sigmoid_and_tanh():
    x = torch.linspace(-8, 8, 1001, dtype=torch.double)
    inside = x.abs() < 2
    torch.testing.assert_close(hard_gate(x)[inside], (1.2 / (1 + (-x).exp()) - 0.1)[inside])
    assert hard_gate(x)[x < -2.4].eq(0).all() and hard_gate(x)[x > 2.4].eq(1).all()
    assert hard_value(x)[x.abs() > 1.2].abs().eq(1).all()
    torch.testing.assert_close(hard_value(-x), -hard_value(x))


def test_the_cell_with_a_kernel_of_one_is_a_gru_at_each_place():
    "No neighbours: every place by itself, with matrices in place of convolutions."
    cell = ConvGRU(NeuralGPUConfig(channels=5, kernel=1), rng(1)).double().eval()
    s = torch.randn(2, 5, 7, generator=rng(2), dtype=torch.double)
    gates, value = cell.gates.weight[..., 0], cell.value.weight[..., 0]
    for place in range(7):
        h = s[:, :, place]
        u, r = hard_gate(h @ gates.mT + cell.gates.bias).chunk(2, 1)
        expected = u * h + (1 - u) * hard_value((r * h) @ value.mT + cell.value.bias)
        torch.testing.assert_close(cell(s)[:, :, place], expected)


def test_the_cell_with_neighbours_is_three_matrices():
    cell = ConvGRU(NeuralGPUConfig(channels=4), rng(3)).double().eval()
    s = torch.randn(2, 4, 6, generator=rng(4), dtype=torch.double)

    def conv(layer, tape):
        out = layer.bias[:, None].expand(2, -1, 6).clone()
        out[:, :, 1:] += layer.weight[..., 0] @ tape[:, :, :-1]
        out += layer.weight[..., 1] @ tape
        out[:, :, :-1] += layer.weight[..., 2] @ tape[:, :, 1:]
        return out

    u, r = hard_gate(conv(cell.gates, s)).chunk(2, 1)
    expected = u * s + (1 - u) * hard_value(conv(cell.value, r * s))
    torch.testing.assert_close(cell(s), expected)


def test_an_open_update_gate_keeps_the_state_to_the_bit():
    cell = ConvGRU(NeuralGPUConfig(channels=4), rng(1))
    nn.init.zeros_(cell.gates.weight)
    nn.init.constant_(cell.gates.bias, 5.0)
    s = torch.randn(1, 4, 6, generator=rng(2))
    assert torch.equal(cell.train()(s), s)  # dropout too leaves it alone


@pytest.mark.parametrize(('kernel', 'steps'), [(3, 1), (3, 4), (5, 3)])
def test_a_step_reaches_kernel_less_one_places(kernel, steps):
    model, reach = lively(2, kernel=kernel, steps=steps), steps * (kernel - 1)
    tape = random_pairs(8, 40, rng(5))
    other = tape.clone()
    other[:, 20] = 1 - other[:, 20]
    moved = (model(tape)[0] != model(other)[0]).any(-1).any(0)  # (41,)
    assert moved.nonzero().flatten().tolist() == list(range(20 - reach, 21 + reach))


def test_a_machine_with_few_steps_is_never_right_on_far_twins():
    model = lively(4, steps=4)
    none, one = twin_pairs(64, 30, 9, rng(9))
    assert not (right_rows(model, none) & right_rows(model, one)).any()
    start = (none != one).any(-1).long().argmax(1)
    end = torch.arange(64), start + 9
    assert torch.equal(model(none)[0][end], model(one)[0][end])
    near = torch.arange(64), start + 8
    assert not torch.allclose(model(none)[0][near], model(one)[0][near], rtol=0, atol=1e-12)


def test_patterns_are_treated_alike_wherever_they_lie():
    model, tape = lively(6), random_pairs(2, 40, rng(7))
    pushed = torch.cat([random_pairs(2, 3, rng(8)), tape[:, :-3]], 1)
    one, two = (model(rows, steps=4)[0] for rows in (tape, pushed))
    torch.testing.assert_close(one[:, 8:29], two[:, 11:32])
    assert not torch.allclose(one[:, :8], two[:, 3:11])


def test_steps_are_the_places_unless_said_and_rows_are_alone():
    model, rows = lively(1), random_pairs(3, 6, rng(1))
    assert torch.equal(model(rows)[0], model(rows, steps=7)[0])
    assert not torch.allclose(model(rows)[0], model(rows, steps=6)[0])
    three = NeuralGPU(NeuralGPUConfig(steps=3)).double().eval()
    three.load_state_dict(model.state_dict())
    assert torch.equal(three(rows)[0], model(rows, steps=3)[0])
    assert torch.equal(three(rows, steps=5)[0], model(rows, steps=5)[0])
    torch.testing.assert_close(model(rows[1:2])[0][0], model(rows)[0][1])


@pytest.mark.parametrize('n', [1, 4, 20])
def test_each_step_is_two_convolutions(n):
    model, calls = NeuralGPU(), []
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(random_pairs(2, n, rng()))
    assert len(calls) == 2 * (n + 1)


def test_the_loss_is_the_mean_over_all_bits():
    model, rows = lively(3), random_pairs(4, 5, rng(2))
    logits, loss = model(rows, add_bits(rows))
    log_p = logits.log_softmax(-1)
    by_hand = [-log_p[i, j, add_bits(rows)[i, j]] for i in range(4) for j in range(6)]
    torch.testing.assert_close(loss, sum(by_hand) / 24)


# ---------------------------------------------------------------- training


def test_right_rows_counts_whole_rows():
    class Almost(nn.Module):
        def forward(self, pairs):
            bits = add_bits(pairs)
            bits[::2, -1] = 1 - bits[::2, -1]
            return nn.functional.one_hot(bits, 2).double(), None

    assert right_rows(Almost(), random_pairs(6, 9, rng())).tolist() == [False, True] * 3


def test_the_curriculum_grows_with_small_losses_on_the_longest_sums_only():
    lessons = Curriculum(6, low=2, enough=0.1)
    for _ in range(100):
        lessons.n = 1
        lessons.hear(0, dict(loss=0.0))
    assert lessons.longest == 2
    for _ in range(200):
        lessons.n = lessons.longest
        lessons.hear(0, dict(loss=0.2))
    assert lessons.longest == 2
    for _ in range(200):
        lessons.n = lessons.longest
        lessons.hear(0, dict(loss=0.0))
    assert lessons.longest == 6
    generator = rng(1)
    sizes = [lessons(generator)[0].shape[1] for _ in range(400)]
    assert set(sizes) == set(range(1, 7)) and 0.5 < sizes.count(6) / 400 < 0.68


def trained(seed=5):
    model, lessons = NeuralGPU(NeuralGPUConfig(channels=8), rng(seed)), Curriculum(4, count=8)
    config = TrainConfig(optimizer='adamw', max_iters=12, eval_interval=12, seed=seed)
    return model, train(model, lessons, config, on_step=lessons.hear).losses


def test_one_seed_gives_one_run():
    (one, a), (two, b) = trained(), trained()
    assert a == b and len(set(a)) == 12
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    assert trained(6)[1] != a


def test_training_lowers_the_loss_of_a_batch():
    model, rows = NeuralGPU(generator=rng(1)), random_pairs(32, 3, rng(2))
    before = copy.deepcopy(model).eval()(rows, add_bits(rows))[1]
    config = TrainConfig(optimizer='adamw', max_iters=60, learning_rate=3e-3, eval_interval=60)
    train(model, lambda generator: (rows, add_bits(rows)), config)
    assert model(rows, add_bits(rows))[1] < 0.6 * before


def test_a_checkpoint_is_opened_by_name(tmp_path):
    model, rows = NeuralGPU(NeuralGPUConfig(channels=8, steps=3), rng(2)), random_pairs(4, 9, rng())
    save_checkpoint(tmp_path / 'machine', model)
    opened, about = load_model(tmp_path / 'machine')
    assert about['model'] == 'NeuralGPU' and type(opened) is NeuralGPU
    assert opened.config == model.config and not opened.training
    assert torch.equal(opened(rows)[0], model.eval()(rows)[0])
