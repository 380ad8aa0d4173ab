"Few-shot prompts: codes are one-to-one; closed forms agree with counting and with brute force."

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_course.bigram import IGNORE_INDEX
from transformer_course.experiments.few_shot import (
    RULES,
    cipher_ceiling,
    cipher_prompts,
    draw_letters,
    icl_score,
    lookup_evidence,
    markov_bayes,
    markov_chains,
    per_token,
    seen_before,
    small_gpt,
    task_bayes,
    task_prompts,
)

thorough = settings(deadline=None, derandomize=True, max_examples=30)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@thorough
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_seen_before_is_a_set_that_grows(keys):
    known = [key in keys[:i] for i, key in enumerate(keys)]
    assert seen_before(torch.tensor([keys]))[0].tolist() == known


@thorough
@given(st.integers(2, 8), st.integers(1, 20), st.integers(0, 10**6))
def test_codes_are_one_to_one(n_symbols, n_examples, seed):
    idx, targets = cipher_prompts(4, n_examples, n_symbols, rng(seed))
    assert idx.shape == targets.shape == (4, 2 * n_examples)
    assert idx.min() >= 0 and idx.max() < 2 * n_symbols
    for row in idx.view(4, n_examples, 2).tolist():
        pairs = {tuple(p) for p in row}
        assert len(pairs) == len({a for a, _ in pairs}) == len({y for _, y in pairs})
        assert all(a < n_symbols <= y for a, y in row)
    assert (targets[:, 1::2] == IGNORE_INDEX).all() and torch.equal(targets[:, ::2], idx[:, 1::2])


def test_prompts_repeat_with_their_seed_and_differ_without():
    for make in (
        lambda s: cipher_prompts(3, 9, 10, rng(s))[0],
        lambda s: task_prompts(3, 9, {'first': 1.0, 'lookup': 1.0}, rng(s))[0],
        lambda s: markov_chains(3, 9, 4, rng(s)),
    ):
        assert torch.equal(make(1), make(1)) and not torch.equal(make(1), make(2))


def test_given_tables_are_used():
    table = torch.tensor([[2, 0, 1]])
    idx, _ = cipher_prompts(5, 6, 3, rng(), tables=table)
    assert torch.equal(idx[:, 1::2], table[0][idx[:, ::2]] + 3)


@thorough
@given(st.integers(1, 4), st.integers(0, 5))
def test_ceiling_is_the_average_over_all_prompts(n_symbols, k):
    total = 0.0
    for draws in itertools.product(range(n_symbols), repeat=k + 1):
        seen = set(draws[:-1])
        total += 1 if draws[-1] in seen else 1 / (n_symbols - len(seen))
    assert math.isclose(cipher_ceiling(k, n_symbols), total / n_symbols ** (k + 1), abs_tol=1e-12)


@pytest.mark.parametrize(
    'bad',
    [
        lambda: draw_letters(2, 3, 5, 6, rng()),
        lambda: draw_letters(2, 3, 5, 0, rng()),
        lambda: cipher_prompts(2, 3, 5, rng(), tables=torch.zeros(2, 4, dtype=torch.long)),
        lambda: cipher_ceiling(-1, 10),
        lambda: cipher_ceiling(1, 0),
        lambda: small_gpt(10, 10, n_embd=48),
        lambda: task_prompts(1, 1, {'shift 10': 1.0}, rng()),
        lambda: task_prompts(1, 1, {}, rng()),
        lambda: task_prompts(1, 1, {'lookup': -1.0}, rng()),
        lambda: task_bayes(torch.zeros(1, 3, dtype=torch.long), {'third': 1.0}),
        lambda: task_bayes(torch.zeros(1, 4, dtype=torch.long), {'first': 1.0}),
        lambda: markov_chains(1, 5, 1, rng()),
        lambda: markov_chains(1, 0, 3, rng()),
        lambda: icl_score(torch.ones(15)),
        lambda: icl_score(torch.ones(30), early=5, late=5),
        lambda: icl_score(torch.ones(64), early=0),
    ],
)
def test_bad_input_is_named(bad):
    with pytest.raises(ValueError, match=r'.{20,}'):
        bad()


def test_rules_by_hand():
    a, b = torch.tensor([7, 1, 9]), torch.tensor([2, 8, 9])
    by_hand = {
        'first': [7, 1, 9],
        'second': [2, 8, 9],
        'later': [7, 8, 9],
        'earlier': [2, 1, 9],
        'shift 3': [5, 1, 2],
    }
    assert {name: RULES[name](a, b).tolist() for name in by_hand} == by_hand
    for k in range(1, 10):  # each shift keeps its own k
        assert RULES[f'shift {k}'](a, b)[0] == (2 + k) % 10


def test_posterior_sums_to_one_and_believes_what_is_so():
    prior = {'first': 1.0, 'later': 2.0, 'shift 4': 0.5, 'lookup': 3.0}
    idx, _, which = task_prompts(300, 12, prior, rng(1))
    answers, posterior = task_bayes(idx, prior)
    for p in (answers, posterior):
        torch.testing.assert_close(p.sum(-1), torch.ones(300, 12, dtype=torch.double))
    expected = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.double) / 6.5
    torch.testing.assert_close(posterior[0, 0], expected)
    assert (posterior[:, -1].argmax(-1) == which).double().mean() > 0.95
    assert (posterior[torch.arange(300), -1, which] > 0).all()


def test_posterior_looks_at_nothing_later():
    prior = {'first': 1.0, 'lookup': 1.0}
    idx = task_prompts(20, 8, prior, rng(2))[0]
    answers, posterior = task_bayes(idx, prior)
    for k in (1, 5, 7):
        first_answers, first_posterior = task_bayes(idx[:, : 3 * k], prior)
        assert torch.equal(answers[:, :k], first_answers)
        assert torch.equal(posterior[:, :k], first_posterior)
    idx[:, -1] = 10 + (idx[:, -1] - 9) % 10  # another last answer
    other_answers, other_posterior = task_bayes(idx, prior)
    assert torch.equal(answers, other_answers) and torch.equal(posterior, other_posterior)


def test_lookup_evidence_counts_codes():
    b, y = torch.tensor([[3, 3, 5, 3]]), torch.tensor([[1, 1, 2, 4]])
    evidence, vote = lookup_evidence(b, y)
    expected = torch.tensor([1, 1 / 10, 1 / 10, 1 / 90], dtype=torch.double)
    torch.testing.assert_close(evidence[0], expected)
    assert vote[0, 1].argmax() == 1 and vote[0, 1].max() == 1
    assert vote[0, 2, 1] == 0 and math.isclose(vote[0, 2, 2], 1 / 9)


def test_predictions_of_the_posterior_are_calibrated():
    prior = {'first': 1.0, 'second': 1.0, 'shift 1': 1.0, 'lookup': 2.0}
    idx, _, _ = task_prompts(40_000, 3, prior, rng(4))
    answers, _ = task_bayes(idx, prior)
    hit = torch.zeros(40_000, 3, 10).scatter_(2, idx[:, 2::3, None] - 10, 1)
    for low in (0.05, 0.25, 0.45, 0.65):
        band = (answers > low) & (answers < low + 0.2)
        four_errors = 2 / max(band.sum(), 1) ** 0.5  # four standard errors
        assert abs(answers[band].mean() - hit[band].mean()) < four_errors


@thorough
@given(st.integers(2, 4), st.integers(2, 20), st.integers(0, 10**6))
def test_markov_bayes_is_counting_plus_a_half(n_states, length, seed):
    chains = markov_chains(2, length, n_states, rng(seed))
    p = markov_bayes(chains, n_states)
    assert p.shape == (2, length, n_states)
    for row, c in zip(p.tolist(), chains.tolist()):
        assert row[0] == [1 / n_states] * n_states
        for t in range(1, length):
            after = [c[i + 1] for i in range(t - 1) if c[i] == c[t - 1]]
            for s in range(n_states):
                assert math.isclose(row[t][s], (after.count(s) + 0.5) / (len(after) + n_states / 2))


def test_markov_bayes_beats_other_smoothing():
    chains = markov_chains(3000, 40, 4, rng(7))
    bayes = -markov_bayes(chains, 4).gather(-1, chains[..., None]).log().mean()
    state, following = chains[:, :-1], chains[:, 1:]
    pairs = F.one_hot(state * 4 + following, 16).cumsum(1).view(3000, 39, 4, 4)
    before = F.pad(pairs, (0, 0, 0, 0, 1, 0))[:, :-1]
    counts = before.gather(2, state[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    for added in (0.25, 1.0):
        p = (counts + added) / (counts + added).sum(-1, keepdim=True)
        other = -p.gather(-1, following[..., None]).log().sum() + 3000 * math.log(4)
        assert bayes < other / chains.numel()


def test_small_gpt_is_causal_and_scored_place_by_place():
    model = small_gpt(20, 30, seed=3, zero_init=False)
    idx, targets = cipher_prompts(4, 10, 10, rng())
    changed = idx.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % 20
    assert torch.equal(model(idx)[0][:, :11], model(changed)[0][:, :11])
    right, loss = per_token(model, idx, targets)
    torch.testing.assert_close(loss.sum() / (targets >= 0).sum(), model(idx, targets)[1].detach())
    assert not right[targets < 0].any() and (loss[targets < 0] == 0).all()
    same = small_gpt(20, 30, seed=3, zero_init=False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters()))


def test_score_by_hand():
    loss = torch.tensor([[4.0, 5.0, 3.0, 1.0], [2.0, 3.0, 3.0, 2.0]])
    assert icl_score(loss, early=2, late=4) == 1.5 - 4
    by_place = torch.arange(64.0).square()
    assert icl_score(by_place) == 63**2 - 7**2  # the 64th place minus the 8th, counted from 1
