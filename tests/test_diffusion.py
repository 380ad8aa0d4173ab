"Masked diffusion: against enumeration, against BERT-like loops, and its sampler by chi-square."

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transformer_course.bigram import IGNORE_INDEX
from transformer_course.checkpoint import load_model, save_checkpoint
from transformer_course.diffusion import (
    DiffusionConfig,
    DiffusionLM,
    check_shares,
    denoise,
    denoise_steps,
    diffusion_loss,
    even_shares,
    hide,
)
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.training import TrainConfig, train

thorough = settings(deadline=None, derandomize=True, max_examples=25)
V, T = 7, 8
SMALL = dict(block_size=T, vocab_size=V, n_layer=2, n_head=2, n_embd=16)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def small(seed=0, **fields):
    model = DiffusionLM(DiffusionConfig(**SMALL | fields), rng(seed))
    for p in model.parameters():  # weights large enough for every part to matter
        nn.init.normal_(p, std=0.3, generator=rng(seed + p.numel()))
    return model.eval()


def ids(seed=1, shape=(3, T), high=V):
    return torch.randint(high, shape, generator=rng(seed))


class Known(nn.Module):
    "Guesses by the exact conditionals of a joint distribution over `size` letters in `places`."

    def __init__(self, size=2, places=3, seed=0):
        super().__init__()
        self.config = DiffusionConfig(block_size=places, vocab_size=size)
        joint = torch.rand((size,) * places, generator=rng(seed), dtype=torch.double) ** 3
        self.joint = joint / joint.sum()

    def forward(self, idx):
        rows = []
        for row in idx.tolist():
            seen = self.joint
            for place, i in enumerate(row):
                if i < self.config.vocab_size:
                    shown = torch.zeros(self.config.vocab_size, dtype=torch.double)
                    shown[i] = 1.0
                    seen = seen * shown.view([-1 if p == place else 1 for p in range(len(row))])
            axes = range(len(row))
            marginals = [seen.sum([a for a in axes if a != p]) for p in axes]
            rows.append(torch.stack(marginals) / seen.sum())
        return torch.stack(rows).log(), None


def every_mask(row, mask_id):
    "Each way of hiding part of a row: (noisy (1, T), hidden (1, T))."
    for pattern in itertools.product((False, True), repeat=row.shape[1]):
        hidden = torch.tensor([pattern])
        yield row.masked_fill(hidden, mask_id), hidden


def exact_bound(model, row):
    "The mean over t, 0 to 1, of `diffusion_loss`, by enumeration: nats a row."
    n, total = row.shape[1], 0.0
    for noisy, hidden in every_mask(row, model.config.vocab_size):
        if k := int(hidden.sum()):
            chance = math.factorial(k - 1) * math.factorial(n - k) / math.factorial(n)
            ones = torch.ones(1, dtype=torch.double)
            total += chance * n * diffusion_loss(model(noisy)[0], row, hidden, ones).item()
    return total


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize('seed', range(3))
def test_bound_of_the_truth_is_the_text_s_own_cost(seed):
    "For exact conditionals, text by text: so the mean is the entropy."
    model = Known(size=2, places=3, seed=seed)
    entropy = -(model.joint * model.joint.log()).sum()
    mean = 0.0
    for row in itertools.product(range(2), repeat=3):
        p = model.joint[row].item()
        bound = exact_bound(model, torch.tensor([row]))
        assert math.isclose(bound, -math.log(p), rel_tol=1e-6)
        mean += p * bound
    assert math.isclose(mean, entropy.item(), rel_tol=1e-6)


def test_bound_of_a_network_is_the_mean_over_orders():
    model = small(block_size=4, vocab_size=3).double()
    row = ids(2, (1, 4), 3)
    costs = []
    for order in itertools.permutations(range(4)):
        noisy, cost = torch.full_like(row, 3), 0.0
        for place in order:
            cost -= model(noisy)[0].log_softmax(-1)[0, place, row[0, place]].item()
            noisy[0, place] = row[0, place]
        costs.append(cost)
    assert math.isclose(sum(costs) / len(costs), exact_bound(model, row), rel_tol=1e-9)
    assert max(costs) - min(costs) > 0.01


@thorough
@given(st.integers(0, 999))
def test_loss_equals_a_loop(seed):
    logits = torch.randn(3, 5, V, generator=rng(seed), dtype=torch.double)
    targets = ids(seed, (3, 5))
    targets[0, 0] = IGNORE_INDEX
    hidden, t = torch.rand(3, 5, generator=rng(seed)) < 0.5, 1 - torch.rand(3, generator=rng(seed))
    total, count = 0.0, 0
    for b, i in itertools.product(range(3), range(5)):
        if (target := targets[b, i].item()) != IGNORE_INDEX:
            count += 1
            if hidden[b, i]:
                total -= logits[b, i].log_softmax(0)[target].item() / t[b].item()
    loss = diffusion_loss(logits, targets, hidden, t).item()
    assert math.isclose(loss, total / count, rel_tol=1e-6, abs_tol=1e-9)


def test_all_hidden_is_plain_cross_entropy():
    model, targets = small(), ids()
    noisy, hidden, t = hide(targets, torch.ones(3), V)
    logits, loss = model(noisy, t, targets)
    assert hidden.all()
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def test_nothing_hidden_costs_nothing_and_has_no_gradient():
    model, targets = small(), ids()
    _, loss = model(targets, torch.full((3,), 1e-6), targets)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    none = torch.full_like(targets, IGNORE_INDEX)
    assert model(targets, torch.ones(3), none)[1] == 0


# ---------------------------------------------------------------- hiding


@thorough
@given(st.integers(1, 40), st.integers(0, 99))
def test_even_shares_have_one_in_each_interval(B, seed):
    t = even_shares(B, rng(seed))
    check_shares(t, B)
    assert torch.equal((t.double() * B - 1e-6).ceil().long(), torch.arange(1, B + 1))
    assert not torch.equal(t, even_shares(B, rng(seed + 1)))


@thorough
@given(st.integers(0, 999), st.booleans())
def test_hide(seed, exact):
    idx, given_places = ids(seed, (6, 20)), torch.rand(6, 20, generator=rng(seed)) < 0.3
    given_places[0] = True  # a row in which nothing may be hidden
    how = dict(given=given_places, exact=exact)
    noisy, hidden, t = hide(idx, even_shares(6, rng(seed)), V, **how, generator=rng(seed))
    assert torch.equal(noisy == V, hidden) and torch.equal(noisy[~hidden], idx[~hidden])
    assert not (hidden & given_places).any()
    if exact:
        free = (~given_places).sum(1)
        torch.testing.assert_close(hidden.sum(1).float(), t * free)
    again = hide(idx, even_shares(6, rng(seed)), V, **how, generator=rng(seed))
    assert torch.equal(again[0], noisy)


def test_both_ways_of_hiding_have_the_same_mean():
    "Coins and exact counts, against the enumerated bound."
    model, row = small(block_size=4, vocab_size=3), ids(2, (1, 4), 3)
    want, rows = exact_bound(model, row) / 4, row.expand(20_000, 4)
    for exact in (False, True):
        noisy, _, t = hide(rows, even_shares(20_000, rng(1)), 3, exact=exact, generator=rng(2))
        with torch.no_grad():
            assert abs(model(noisy, t, rows)[1].item() - want) < 0.02


# ---------------------------------------------------------------- the model


def test_sees_both_sides_and_not_under_the_mask():
    model, idx = small(), ids()
    logits = model(idx)[0]
    for place in (0, T - 1):
        changed = idx.clone()
        changed[:, place] = (idx[:, place] + 1) % V
        other = model(changed)[0]
        assert ((other - logits).abs().amax(-1) > 1e-6).all()  # at all places
    assert logits.shape == (3, T, V)


def test_smear_takes_from_both_neighbours():
    "At zero it does nothing; then each embedding has its neighbours' shares, by hand."
    model, plain = small(smear=True), small()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != 'smear'})
    idx, smear = ids(), model.smear.detach().clone()
    x = plain.embed(idx)
    want = x.clone()
    for i in range(T):
        want[:, i] += smear[0] * x[:, i - 1] if i else 0
        want[:, i] += smear[1] * x[:, i + 1] if i < T - 1 else 0
    torch.testing.assert_close(model.embed(idx), want)
    nn.init.zeros_(model.smear)
    torch.testing.assert_close(model(idx)[0], plain(idx)[0])


def test_knows_where_it_stands():
    "All masks: places differ only by their distance to the others, as rotary positions have it."
    model, noisy = small(), torch.full((1, T), V)
    noisy[0, 0] = 1
    logits = model(noisy)[0][0]
    assert (logits[1] - logits[2]).abs().max() > 1e-4


def test_is_the_gpt_without_its_mask():
    "The same weights: equal to a GPT that is told to look at everything, but for one embedding."
    shape = dict(n_layer=2, n_head=2, n_embd=16)
    gpt = GPT(
        GPTConfig(block_size=T, vocab_size=V, position='rotary', tie_weights=False, **shape), rng()
    ).eval()
    model = small()
    model.h.load_state_dict(gpt.transformer.h.state_dict())
    model.ln_f.load_state_dict(gpt.transformer.ln_f.state_dict())
    model.lm_head.load_state_dict(gpt.lm_head.state_dict())
    model.wte.weight.data[:V] = gpt.transformer.wte.weight.data
    assert sum(p.numel() for p in model.parameters()) == gpt.num_params() + 16
    idx = ids(5, (2, 1))  # one place: no future to hide
    torch.testing.assert_close(model(idx)[0], gpt(idx)[0])
    idx = ids(5)  # the last place of a GPT of one layer sees all
    one, gpt.transformer.h = nn.ModuleList(model.h[:1]), nn.ModuleList(gpt.transformer.h[:1])
    model.h = one
    torch.testing.assert_close(model(idx)[0][:, -1], gpt(idx)[0][:, -1])
    assert not torch.allclose(model(idx)[0][:, 0], gpt(idx)[0][:, 0])


def batch(generator):
    rows = (torch.randint(V, (16, 1), generator=generator) + torch.arange(T)) % V
    noisy, _, t = hide(rows, even_shares(16, generator), V, exact=True, generator=generator)
    return noisy, t, rows


def learned(seed=0, steps=200):
    model = DiffusionLM(DiffusionConfig(**SMALL), rng(seed))
    history = train(model, batch, TrainConfig(max_iters=steps, eval_interval=steps, seed=seed))
    return model, history


def test_learns_and_one_seed_gives_one_run():
    "Rows that count upwards: one letter shown says all the others."
    model, history = learned()
    assert sum(history.losses[-10:]) < 0.6 * sum(history.losses[:10])
    assert history.tokens == 200 * 16 * T
    again, same = learned()
    assert same.losses == history.losses
    start = torch.full((4, T), V)
    texts = [denoise(m, start, 3, generator=rng(1)) for m in (model, again)]
    assert torch.equal(*texts)


def test_checkpoint(tmp_path):
    model = small()
    save_checkpoint(tmp_path / 'run', model)
    again, about = load_model(tmp_path / 'run')
    assert type(again) is DiffusionLM and again.config == model.config
    assert about['model'] == 'DiffusionLM'
    assert torch.equal(again(ids())[0], model(ids())[0])


# ---------------------------------------------------------------- writing


def chi_square(model, order='random', n_steps=3, n=3000, temperature=1.0):
    start = torch.full((n, model.joint.dim()), model.config.vocab_size)
    how = dict(order=order, generator=rng(3), temperature=temperature)
    found = denoise(model, start, n_steps, **how)
    counts = torch.zeros_like(model.joint)
    counts.index_put_(tuple(found.T), torch.ones(n, dtype=torch.double), accumulate=True)
    return ((counts - n * model.joint) ** 2 / (n * model.joint)).sum().item()


def test_one_place_a_pass_writes_the_distribution():
    "Seven degrees of freedom: below 24.3 in 999 of 1,000. In one pass, or colder, it does not."
    model = Known(size=2, places=3, seed=0)
    assert chi_square(model) < 24.3
    assert chi_square(model, n_steps=1) > 100
    assert chi_square(model, temperature=0.7) > 100
    assert chi_square(model, order='confidence') > 30


@thorough
@given(st.integers(0, 999), st.integers(1, T), st.sampled_from(['random', 'confidence']))
def test_written_places_stay(seed, n_steps, order):
    model, start = small(), ids(seed, (4, T))
    start[torch.rand(4, T, generator=rng(seed)) < 0.6] = V
    start[0] = V
    total, before, frames = (start == V).sum(1), start, 0
    how = dict(order=order, generator=rng(seed))
    for frames, now in enumerate(denoise_steps(model, start, n_steps, **how), 1):
        shown = before != V
        assert torch.equal(now[shown], before[shown])
        written = total - (now == V).sum(1)
        assert torch.equal(written, (total * frames / n_steps).ceil().long())
        before = now
    assert frames == n_steps and (before < V).all()
    assert torch.equal(before[start != V], start[start != V])


def test_one_step_is_one_pass_and_the_mode_is_kept():
    model, passes = small().train(), []
    model.register_forward_hook(lambda m, *_: passes.append(m.training))
    denoise(model, torch.full((1, T), V), 1)
    assert passes == [False] and model.training


def test_cold_and_confident_is_greedy():
    "Temperature 0, one place a pass: the likeliest letter of the surest place, pass by pass."
    model, idx = small(), torch.full((1, T), V)
    for now in denoise_steps(model, idx.clone(), T, order='confidence', temperature=0):
        probs = model(idx)[0][0].softmax(-1).masked_fill((idx[0] != V)[:, None], -1)
        place, letter = divmod(probs.argmax().item(), V)
        idx[0, place] = letter
        assert torch.equal(now, idx)


# ---------------------------------------------------------------- bad input

GOOD = dict(idx=ids(), t=torch.full((3,), 0.5))
WRONG = {
    'idx has shape': lambda m: m(ids()[0]),
    'block_size': lambda m: m(ids(shape=(1, T + 1))),
    'noisy holds 8': lambda m: m(torch.full((1, T), V + 1)),
    'noisy holds -1': lambda m: m(torch.full((1, T), -1)),
    'idx has dtype': lambda m: m(ids().float()),
    'targets holds 7': lambda m: m(ids(), GOOD['t'], torch.full((3, T), V)),
    'targets holds -3': lambda m: m(ids(), GOOD['t'], torch.full((3, T), -3)),
    't holds 0:': lambda m: m(ids(), torch.zeros(3), ids()),
    't holds nan': lambda m: m(ids(), torch.full((3,), math.nan), ids()),
    't has shape': lambda m: m(ids(), torch.ones(2), ids()),
    't=None': lambda m: m(ids(), None, ids()),
    'targets has shape': lambda m: m(ids(), GOOD['t'], ids()[:, :-1]),
    't holds 1.5': lambda m: hide(ids(), torch.full((3,), 1.5), V),
    'B=0': lambda m: even_shares(0),
    'n_steps=0': lambda m: denoise(m, torch.full((1, T), V), 0),
    'n_steps=9': lambda m: denoise(m, torch.full((1, T), V), T + 1),
    'n_steps=1.5': lambda m: denoise(m, torch.full((1, T), V), 1.5),
    'hides nothing': lambda m: denoise(m, ids(), 1),
    'idx has shape (8,)': lambda m: denoise(m, torch.full((T,), V), 1),
    'hides nothing:': lambda m: denoise(m, torch.full((0, T), V), 1),
    'order=': lambda m: denoise(m, torch.full((1, T), V), 1, order='left'),
    'temperature=-1': lambda m: denoise(m, torch.full((1, T), V), 1, temperature=-1),
    'vocab_size=0': lambda m: DiffusionConfig(**SMALL | dict(vocab_size=0)),
    'odd size': lambda m: DiffusionConfig(**SMALL | dict(n_head=16)),
    'rope_base=0': lambda m: DiffusionConfig(**SMALL, rope_base=0),
}


@pytest.mark.parametrize('said', WRONG)
def test_bad_input(said):
    with pytest.raises(ValueError) as caught:
        WRONG[said](small())
    assert said.rstrip(':') in str(caught.value)
