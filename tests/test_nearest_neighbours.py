"A store of states: neighbours against sorting, votes against loops, states against the model."

import math

import pytest
import torch

from transformer_course.gpt import GPT, GPTConfig
from transformer_course.nearest_neighbours import last_states, memory_probs, mixed_loss, neighbours


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def small_gpt(block_size=8, **changes):
    shape = dict(vocab_size=11, n_layer=2, n_head=2, n_embd=16, position='rotary')
    return GPT(GPTConfig(block_size=block_size, **shape | changes), rng(1)).eval()


def some_ids(n=60):
    return torch.randint(11, (n,), generator=rng(2))


@pytest.mark.parametrize('sizes', [(50,), (3, 20, 50), (1, 2, 3)])
def test_neighbours_are_what_sorting_finds_at_each_size(sizes):
    q, k = torch.randn(600, 5, generator=rng(1)), torch.randn(50, 5, generator=rng(2))
    found = neighbours(q, k, 4, sizes)
    assert len(found) == len(sizes)
    for size, (distances, where) in zip(sizes, found):
        exact = (q[:, None] - k[None, :size]).square().sum(-1)
        best, order = exact.sort(1)
        torch.testing.assert_close(distances, best[:, :4], rtol=1e-4, atol=1e-5)
        assert (where == order[:, :4]).double().mean() > 0.999
        torch.testing.assert_close(exact.gather(1, where), distances, rtol=1e-4, atol=1e-5)


def test_votes_by_a_loop():
    distances = torch.rand(7, 5, generator=rng(1)) * 4
    nexts = torch.randint(3, (7, 5), generator=rng(2))
    for T in (0.5, 3.0):
        probs = memory_probs(distances, nexts, 4, T)
        for row, near, token in zip(probs, distances.tolist(), nexts.tolist()):
            votes = [0.0] * 4
            for d, w in zip(near, token):
                votes[w] += math.exp(-d / T)
            torch.testing.assert_close(row, torch.tensor(votes) / sum(votes))
    far = memory_probs(distances + 1e6, nexts, 4, 0.5)
    assert far.isfinite().all() and torch.allclose(far.sum(1), torch.ones(7))


@pytest.mark.parametrize('block_size', [8, 9])
def test_states_are_the_models_with_half_a_window_before_them(block_size):
    model, ids = small_gpt(block_size), some_ids()
    half = block_size // 2
    skipped = block_size - half
    states, nexts, log_probs = last_states(model, ids)
    M = len(nexts)
    assert M % half == 0 and M >= len(ids) - block_size and states.shape == (M, 16)
    assert torch.equal(nexts, ids[skipped + 1 : skipped + 1 + M])
    for place in (0, 1, half, M - 1):
        end = skipped + place + 1  # tokens read so far
        start = place // half * half
        alone = model(ids[None, start:end])[0][0, -1].log_softmax(-1)
        torch.testing.assert_close(log_probs[place], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.lm_head(states).log_softmax(-1), log_probs)


@pytest.mark.parametrize('position', ['learned', 'sinusoidal', 'rotary', 'alibi', 'none'])
def test_states_know_every_kind_of_position(position):
    model, ids = small_gpt(position=position), some_ids(9)
    alone = model(ids[None, :8])[0][0].log_softmax(-1)
    torch.testing.assert_close(last_states(model, ids)[2], alone[4:], rtol=1e-4, atol=1e-5)


def test_states_do_not_see_what_comes_next():
    model, ids = small_gpt(), some_ids()
    other = ids.clone()
    other[30:] = (other[30:] + 1) % 11
    one, two = (last_states(model, z)[0] for z in (ids, other))
    same = (one == two).all(1)
    assert same[: 30 - 4].all() and not same[30 - 4 :].any()


def test_the_mixture_by_hand():
    log_probs = torch.randn(6, 4, generator=rng(1)).log_softmax(-1)
    memory = torch.rand(6, 4, generator=rng(2)).softmax(-1)
    targets = torch.tensor([0, 3, 1, 2, 2, 0])
    for share in (0, 0.3, 0.99):
        total = 0.0
        for p, m, w in zip(log_probs.exp().tolist(), memory.tolist(), targets.tolist()):
            total -= math.log((1 - share) * p[w] + share * m[w])
        assert abs(mixed_loss(log_probs, memory, targets, share).item() - total / 6) < 1e-5


@pytest.mark.parametrize(
    ('bad', 'match'),
    [
        (lambda: neighbours(torch.zeros(2, 3), torch.zeros(5, 3), 1, ()), 'sizes'),
        (lambda: neighbours(torch.zeros(2, 3), torch.zeros(5, 3), 1, (0, 4)), 'sizes'),
        (lambda: neighbours(torch.zeros(2, 3), torch.zeros(5, 3), 1, (4, 3)), 'sizes'),
        (lambda: neighbours(torch.zeros(2, 3), torch.zeros(5, 3), 1, (6,)), 'at most 5'),
        (lambda: neighbours(torch.zeros(2, 3), torch.zeros(5, 3), 0, (5,)), 'top=0'),
        (lambda: neighbours(torch.zeros(2, 3), torch.zeros(5, 4), 1, (5,)), 'queries'),
        (lambda: memory_probs(torch.zeros(2, 3), torch.zeros(2, 3).long(), 4, 0), 'temperature'),
        (lambda: memory_probs(torch.zeros(2, 3), torch.zeros(2, 2).long(), 4, 1), 'shape'),
        (lambda: memory_probs(torch.zeros(2, 3), torch.full((2, 3), 4), 4, 1), 'holds 4'),
        (lambda: mixed_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2).long(), 1), 'sha'),
        (lambda: last_states(small_gpt(), some_ids(8)), 'more than 8'),
        (lambda: last_states(small_gpt(), some_ids()[None]), 'shape'),
    ],
)
def test_bad_input_is_refused(bad, match):
    with pytest.raises(ValueError, match=match):
        bad()
