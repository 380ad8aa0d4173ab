"Why it works: programs against Python, gradients and paths against hand calculation, windows."

import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transformer_course.attention import causal_mask, scaled_dot_product_attention
from transformer_course.before import RecurrentLanguageModel
from transformer_course.bigram import IGNORE_INDEX
from transformer_course.gpt import GPT
from transformer_course.experiments.programs import (
    Program,
    Selector,
    compile_program,
    layout,
    run_program,
    schedule,
)
from transformer_course.calibration import saved_bytes
from transformer_course.experiments.why import (
    chrono_init,
    critical_path,
    input_gradient,
    needle,
    recall,
    windowed_attention,
)

thorough = settings(deadline=None, derandomize=True, max_examples=25)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def sorter(chars='0123', length=6):
    p = Program(chars, length)
    p.apply('key', ('token', 'position'), lambda t, i: (t, i))
    p.count('rank', Selector('key', 'key', lambda mine, other: other < mine))
    p.aggregate('sorted', Selector('position', 'rank', lambda place, rank: place == rank), 'token')
    return p


SORT = sorter()
SORTER = compile_program(SORT, 'sorted')


@thorough
@given(st.text('0123', min_size=1, max_size=6))
def test_sort_is_sorted(text):
    assert run_program(SORTER, SORT, 'sorted', text) == sorted(text)


def test_logits_of_a_program_are_ones_and_zeros():
    logits = SORTER(torch.tensor([[0, 4, 1, 2, 2, 3]]))[0][0, 1:]
    assert (logits - logits.round()).abs().max() < 1e-12
    assert (logits.sum(-1) - 1).abs().max() < 1e-12


def test_programs_survive_float32():
    model = compile_program(SORT, 'sorted').float()
    texts = [''.join(t) for t in product('0123', repeat=4)]
    assert all(run_program(model, SORT, 'sorted', t) == sorted(t) for t in texts)


def test_program_is_a_gpt_that_round_trips_through_its_state_dict():
    other = GPT(SORTER.config).double()
    other.load_state_dict(SORTER.state_dict())
    for block in other.transformer.h:
        block.attn.causal = False
    assert run_program(other, SORT, 'sorted', '3120') == ['0', '1', '2', '3']
    for block in other.transformer.h:
        block.attn.causal = True
    assert run_program(other, SORT, 'sorted', '3120') != ['0', '1', '2', '3']


@pytest.mark.parametrize(
    'damage',
    [
        lambda m: m.transformer.h[0].mlp,
        lambda m: m.transformer.h[1].attn,
        lambda m: m.transformer.h[1].mlp,
        lambda m: m.transformer.h[2].attn,
    ],
)
def test_every_part_of_the_sorter_is_needed(damage):
    model = compile_program(SORT, 'sorted')
    for p in damage(model).parameters():
        p.data.zero_()
    assert run_program(model, SORT, 'sorted', '3120') != ['0', '1', '2', '3']


@thorough
@given(st.text('ab', min_size=1, max_size=7))
def test_causal_counts_look_back_only(text):
    p = Program('ab', 7, causal=True)
    p.count('n', Selector('token', 'token', lambda mine, other: other == 'a'))
    model = compile_program(p, 'n')
    assert run_program(model, p, 'n', text) == [text[: i + 1].count('a') for i in range(len(text))]


def test_nobody_selected_leaves_the_register_empty():
    p = Program('ab', 3)
    p.aggregate('other', Selector('token', 'token', lambda mine, other: False), 'token')
    p.apply('seen', ('other',), lambda c: c * 2)
    for output in ('other', 'seen'):
        assert run_program(compile_program(p, output), p, output, 'aba') == [None] * 3


def test_layout_has_no_overlaps():
    places, C = layout(SORT)
    assert sorted(i for s in places.values() for i in range(s.start, s.stop)) == list(range(C))
    assert [len(b) for b in schedule(SORT)[0]] == [1, 1, 1]


@pytest.mark.parametrize(
    'bad, word',
    [
        (lambda: Program('', 3), "chars=''"),
        (lambda: Program('aba', 3), "chars='aba'"),
        (lambda: Program('ab', 0), 'length=0'),
        (lambda: Program('ab', 3).apply('x', ('nothing',), len), "'nothing'"),
        (lambda: Program('ab', 3).count('token', Selector('token', 'token', max)), "'token'"),
        (lambda: compile_program(SORT, 'rang'), "output='rang'"),
        (lambda: run_program(SORTER, SORT, 'sorted', ''), "text=''"),
        (lambda: run_program(SORTER, SORT, 'sorted', '0000000'), '8 tokens'),
        (lambda: needle(0, 1, rng()), 'distance=0'),
        (lambda: recall(1, rng(), pairs=8), 'pairs=8'),
        (lambda: chrono_init(nn.LSTM(2, 2), 1, rng()), 'longest=1'),
        (lambda: critical_path(torch.ones(1)), 'grad_fn'),
        (lambda: windowed_attention(*[torch.ones(6, 2)] * 3, 4), 'window=4'),
        (lambda: windowed_attention(*[torch.ones(6, 2)] * 3, 0), 'window=0'),
    ],
)
def test_bad_input_is_named(bad, word):
    with pytest.raises(ValueError, match=word.replace('(', r'\(')):
        bad()


def test_tasks_repeat_with_the_seed():
    for task in (lambda g: needle(9, 4, g), lambda g: recall(4, g)):
        assert all(map(torch.equal, task(rng(3)), task(rng(3))))
        assert not torch.equal(task(rng(3))[0], task(rng(4))[0])


def test_recall_asks_only_what_can_be_known():
    x, y = recall(50, rng(), pairs=12, letters=5)
    for row, asked in zip(x.tolist(), y.tolist()):
        book = {}
        for i in range(0, 24, 2):
            assert asked[i] == book.get(row[i], IGNORE_INDEX) and asked[i + 1] == IGNORE_INDEX
            assert book.setdefault(row[i], row[i + 1]) == row[i + 1]
    sparse = recall(50, rng(), dense=False, pairs=12, letters=5)[1]
    assert (sparse[:, :-2] == IGNORE_INDEX).all() and torch.equal(sparse[:, -2], x[:, -1])


def test_input_gradient_is_autograds_on_the_embedding():
    torch.manual_seed(0)
    model = RecurrentLanguageModel(27, 8, 8, 'gru').double()
    x, y = needle(6, 1, rng())
    e = model.embed(x).detach().requires_grad_()
    loss = nn.functional.cross_entropy(model.out(model.rnn(e)[0])[0, -1:], y[0, -1:])
    (expected,) = torch.autograd.grad(loss, e)
    torch.testing.assert_close(input_gradient(model, model.embed, x, y), expected[0].norm(dim=-1))
    assert not model.embed._forward_hooks


def test_chrono_gates_are_within_the_asked_times():
    torch.manual_seed(0)
    rnn = nn.LSTM(4, 300)
    chrono_init(rnn, 50, rng())
    i, f, *rest = (rnn.bias_ih_l0 + rnn.bias_hh_l0).detach().chunk(4)
    assert 1 <= f.exp().min() < 4 and 45 < f.exp().max() <= 49
    assert torch.equal(i, -f) and not any(r.any() for r in rest)


def test_critical_path_of_a_loop_grows_by_its_body():
    w = torch.ones(2, requires_grad=True)

    def chain(n):
        h = w
        for _ in range(n):
            h = (h * w).tanh()
        return critical_path(h)

    assert [chain(n) for n in (1, 2, 50)] == [3, 5, 101]


def test_saved_bytes_counts_a_shared_storage_once():
    z = torch.ones(10, requires_grad=True)
    assert saved_bytes(nn.Module(), lambda: (z * z) * (z * z)) == 3 * 40  # z, and the two products


@thorough
@given(st.sampled_from([(12, 1), (12, 3), (12, 4), (12, 12)]), st.integers(0, 99))
def test_window_equals_a_banded_mask_and_stays_causal(sizes, seed):
    T, W = sizes
    q, k, v = (torch.randn(2, T, 4, generator=rng(seed + i), dtype=torch.double) for i in range(3))
    out = windowed_attention(q, k, v, W)
    band = causal_mask(T) & ~causal_mask(T).tril(-W)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, band))
    at = random.Random(seed).randrange(T)
    v[:, at] += 1
    moved = (windowed_attention(q, k, v, W) - out).abs().amax((0, 2)) > 0
    assert moved.tolist() == [at <= t < at + W for t in range(T)]
