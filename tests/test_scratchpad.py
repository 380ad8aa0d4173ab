"Scratchpads: the program against arithmetic, the split, the loss mask, writing and streaming."

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transformer_course.bigram import cross_entropy
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.experiments.scratchpad import (
    TOK,
    addition_problem,
    addition_text,
    draw,
    held_out,
    parity_problem,
    parity_text,
    random_digits,
    split_text,
    stream_parity,
    to_batch,
    write,
)

thorough = settings(deadline=None, derandomize=True, max_examples=60)
bits, details = st.text('01', min_size=1, max_size=40), st.integers(0, 2)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def small_gpt(T=24, **changes):
    sizes = dict(block_size=T, vocab_size=TOK.vocab_size, n_layer=2, n_head=2, n_embd=16)
    return GPT(GPTConfig(**sizes, **changes), rng(3)).eval()


class Program(nn.Module):
    "Not a network: a model whose logits follow the program for questions without labels."

    config = None

    def __init__(self, slip_of=lambda question: None):
        super().__init__()
        self.slip_of = slip_of

    def forward(self, idx, targets=None):
        logits = torch.zeros(*idx.shape, TOK.vocab_size)
        for i, row in enumerate(idx):
            text = TOK.decode(row)
            question = text.partition('=')[0]
            line = parity_text(question, slip=self.slip_of(question)) + '\n'
            logits[i, -1, TOK.stoi[line[min(len(text), len(line) - 1)]]] = 1.0
        return logits, None


@thorough
@given(bits, details)
def test_parity_is_what_python_counts(q, detail):
    question, scratchpad, answer = split_text(parity_text(q, detail))
    assert question == q and answer == str(q.count('1') % 2) and len(scratchpad) == detail * len(q)
    if detail:
        so_far = [str(q[: i + 1].count('1') % 2) for i in range(len(q))]
        assert scratchpad[detail - 1 :: detail] == ''.join(so_far)
    if detail == 2:
        assert scratchpad[::2] == q


@thorough
@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(*[st.text('0123456789', min_size=n, max_size=n)] * 2)
    ),
    details,
)
def test_addition_is_what_python_adds(pair, detail):
    a, b = pair
    question, scratchpad, answer = split_text(addition_text(a, b, detail))
    assert question == f'{a}+{b}' and answer == str(int(a) + int(b)).zfill(len(a) + 1)
    if detail:
        assert ''.join(step[-1] for step in scratchpad.split(','))[::-1] == answer[1:]
    if detail == 2:
        assert ''.join(step[0] for step in scratchpad.split(','))[::-1] == a


@thorough
@given(bits, st.data())
def test_a_parity_slip_turns_everything_after_it(q, data):
    at = data.draw(st.integers(0, len(q) - 1))
    right, slipped = (split_text(parity_text(q, 1, slip=s)) for s in (None, at))
    turned = [a != b for a, b in zip(right[1], slipped[1])]
    assert turned == [i >= at for i in range(len(q))] and right[2] != slipped[2]


@thorough
@given(
    st.integers(1, 8).flatmap(
        lambda n: st.tuples(
            *[st.text('0123456789', min_size=n, max_size=n)] * 2, st.integers(0, n - 1)
        )
    )
)
def test_a_carry_slip_adds_or_takes_one_from_the_next_column(problem):
    a, b, at = problem
    right, slipped = (split_text(addition_text(a, b, slip=s)) for s in (None, at))
    carry = int(right[1].split(',')[at][-2])
    modulus = 10 ** (len(a) + 1)
    assert int(slipped[2]) % 10 ** (at + 1) == int(right[2]) % 10 ** (at + 1)
    assert (int(slipped[2]) - int(right[2]) - (1 - 2 * carry) * 10 ** (at + 1)) % modulus == 0


@thorough
@given(st.text('01=<>\n23+', max_size=14))
def test_split_takes_finished_lines_and_nothing_else(text):
    question, scratchpad, answer = split_text(text)
    if question:
        assert text in (f'{question}=<{scratchpad}>{answer}\n', f'{question}={answer}\n')
    else:
        assert (scratchpad, answer) == ('', '') and not re.fullmatch(
            r'[01+23]+=(<[01+23]*>)?[0-3]+\n', text
        )


def test_labels_do_not_change_the_scratchpad():
    line, plain = parity_text('01101', 2, labels='wxyzA'), parity_text('01101', 2)
    assert re.sub('[a-zA-Z]', '', line) == plain
    assert re.findall('[a-zA-Z]', split_text(line)[1]) == list('wxyzA')


@pytest.mark.parametrize(
    'bad',
    [
        lambda: parity_text(''),
        lambda: parity_text('0120'),
        lambda: parity_text('01', labels='abc'),
        lambda: addition_text('', ''),
        lambda: addition_text('12', '123'),
        lambda: addition_text('1-', '12'),
        lambda: to_batch([]),
        lambda: to_batch(['0110']),
        lambda: draw(parity_problem, 0, rng()),
        lambda: write(small_gpt(), [], 3),
        lambda: write(small_gpt(), ['0=', '01='], 3),
        lambda: stream_parity(small_gpt(), []),
        lambda: stream_parity(small_gpt(), ['']),
        lambda: stream_parity(small_gpt(), ['01', '0']),
        lambda: stream_parity(small_gpt(), ['0101'], n=1),
        lambda: stream_parity(small_gpt(), ['0101'], n=5),
    ],
)
def test_bad_input_is_refused(bad):
    with pytest.raises(ValueError, match='must|give|names|lengths'):
        bad()


def test_the_two_sides_never_meet_and_do_not_depend_on_the_seed():
    sides = [
        {line.partition('=')[0] for line in draw(parity_problem, 800, rng(seed), test)}
        for seed in (0, 1)
        for test in (False, True)
    ]
    assert not (sides[0] | sides[2]) & (sides[1] | sides[3])
    assert all(held_out(q) for q in sides[1] | sides[3])
    assert not any(held_out(q) for q in sides[0] | sides[2])


def test_the_split_is_no_matter_of_single_bits_or_of_parity():
    q = torch.tensor([[int(c) for c in f'{i:013b}'] for i in range(2**13)])
    kept = torch.tensor([held_out(f'{i:013b}') for i in range(2**13)])
    assert abs(kept.float().mean() - 1 / 8) < 0.015
    assert (q[kept].float().mean(0) - 0.5).abs().max() < 0.06
    assert abs((q[kept].sum(1) % 2).float().mean() - 0.5) < 0.06


@pytest.mark.parametrize('problem', [parity_problem, addition_problem])
def test_problems_depend_on_their_generator_alone(problem):
    torch.manual_seed(0)
    first = draw(problem, 5, rng(9))
    before = torch.get_rng_state()
    assert draw(problem, 5, rng(9)) == first != draw(problem, 5, rng(10))
    assert torch.equal(before, torch.get_rng_state())
    assert random_digits(6, 2, rng(1)) == random_digits(6, 2, rng(1))
    assert set(random_digits(200, 10, rng(1))) == set('0123456789')


def test_loss_looks_at_scratchpad_and_answer_only():
    lines = ['0110=<00111000>0\n', '1=<11>1\n', '01=1\n']
    x, y = to_batch(lines)
    for line, targets in zip(lines, y):
        assert TOK.decode(targets[targets >= 0]) == line.partition('=')[2]
    logits = torch.randn(*y.shape, TOK.vocab_size, generator=rng())
    changed = logits.clone()
    changed[y < 0] += torch.randn(int((y < 0).sum()), TOK.vocab_size, generator=rng(1))
    torch.testing.assert_close(cross_entropy(logits, y), cross_entropy(changed, y), rtol=0, atol=0)
    for row, line in zip(x, lines):
        assert TOK.decode(row).startswith(line[:-1])


def test_padding_does_not_change_the_loss():
    model, line = small_gpt(), '011=<001110>0\n'
    alone, beside = to_batch([line]), to_batch([line, '01101=<0011100011>1\n'])
    padded = cross_entropy(model(beside[0][:1])[0], beside[1][:1])
    torch.testing.assert_close(model(*alone)[1], padded)


def test_writing_is_the_slow_loop_and_rows_do_not_disturb_each_other():
    model, prompts = small_gpt(position='rotary'), ['011=', '110=', '010=<']

    def slow(line, n):
        for _ in range(n):
            line += TOK.chars[model(torch.tensor([TOK.encode(line)]))[0][0, -1].argmax()]
            if line[-1] == '\n':
                break
        return line

    assert write(model, prompts[:2], 12) == [slow(p, 12) for p in prompts[:2]]
    assert write(model, prompts[2:], 12) == [slow(prompts[2], 12)]


def test_writing_goes_on_from_inside_a_scratchpad():
    lines = [parity_text(q) for q in ('0110', '1000', '1111')]
    assert write(Program(), [line[:8] for line in lines], 20) == lines
    assert write(Program(), [line[:8] for line in lines], 3) == [line[:11] for line in lines]


@pytest.mark.parametrize('length', [5, 6, 7, 8, 30, 61])
def test_streaming_with_a_faultless_model_is_exact(length):
    generator = rng(length)
    rows = [random_digits(length, 2, generator) for _ in range(6)]
    answers, windows = stream_parity(Program(), rows, n=5)
    assert answers == [str(row.count('1') % 2) for row in rows]
    assert len(windows) == max(1, -(-(length - 1) // 4))
    assert all(len(line.partition('=')[0]) == 5 for window in windows for line in window)


def test_streaming_carries_what_was_written_and_not_the_truth():
    wrong = Program(slip_of=lambda question: 0 if question[1] == '1' else None)
    generator = rng(5)
    rows = [random_digits(17, 2, generator) for _ in range(12)]
    answers, windows = stream_parity(wrong, rows, n=5)
    # some windows turn the parity over
    slips = [sum(line[1] == '1' for line in lines) for lines in zip(*windows)]
    assert len(windows) == 4 and {s % 2 for s in slips} == {0, 1}
    assert answers == [str((row.count('1') + s) % 2) for row, s in zip(rows, slips)]
    for earlier, later in zip(windows, windows[1:]):
        assert [line[0] for line in later] == [split_text(line)[2] for line in earlier]
