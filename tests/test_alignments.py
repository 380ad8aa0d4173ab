"Contacts from aligned sequences: statistics against hand and numpy, the model's symmetries."

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score
from torch import nn

from transformer_course.alignments import (
    AlignmentConfig,
    AlignmentTransformer,
    PairUpdate,
    apc,
    coupling_size,
    encode_alignment,
    fan_in,
    mean_field_dca,
    mutual_information,
    pair_shares,
    precision_at,
)
from transformer_course.bigram import IGNORE_INDEX
from transformer_course.checkpoint import load_model, save_checkpoint
from transformer_course.families import Families, chemistry, evolve, plant, sample_families
from transformer_course.training import TrainConfig, train

thorough = settings(deadline=None, derandomize=True, max_examples=15)
SMALL = AlignmentConfig(
    n_layer=2, n_head=2, n_embd=8, n_letters=4, n_pair=4, n_outer=3, mlp_ratio=1
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def letters(seed=0, shape=(2, 6, 5), A=4):
    return torch.randint(A, shape, generator=rng(seed))


def loud(seed=0, **fields):
    "A model whose weights are all of some size, in double precision."
    model = AlignmentTransformer(replace(SMALL, **fields), rng(seed))
    for p in model.parameters():
        nn.init.normal_(p, std=0.4, generator=rng(seed + p.numel()))
    return model.double().eval()


# ---------------------------------------------------------------- statistics


@thorough
@given(st.integers(0, 999), st.integers(2, 30))
def test_mutual_information_equals_scikit_learn(seed, rows):
    x = letters(seed, (1, rows, 4))
    told = mutual_information(x, 4)[0]
    for i in range(4):
        for j in range(4):
            theirs = mutual_info_score(x[0, :, i].numpy(), x[0, :, j].numpy())
            assert abs(told[i, j].item() - theirs) < 1e-5


def test_shares_of_weighted_rows():
    x, weight = torch.tensor([[[0, 1], [1, 1], [1, 0]]]), torch.tensor([[0.5, 0.25, 0.25]])
    one, two = pair_shares(x, 2, weight)
    assert one[0].tolist() == [[0.5, 0.5], [0.25, 0.75]]
    assert two[0, 0, 1].tolist() == [[0, 0.5], [0.25, 0.25]]


def test_correction_takes_off_what_is_due_to_columns():
    s = torch.tensor([[[9.0, 1, 2], [1, 9, 3], [2, 3, 9]]])
    mean = [1.5, 2.0, 2.5]
    expected = 3 - mean[1] * mean[2] / 2.0
    assert math.isclose(apc(s)[0, 1, 2].item(), expected, abs_tol=1e-6)
    torch.testing.assert_close(apc(s), apc(s).mT)


def test_mean_field_equals_numpy():
    x, A, L = letters(3, (1, 50, 3)), 4, 3
    o = np.eye(A)[x[0].numpy()]
    one, two = o.mean(0), np.einsum('ria,rjb->iajb', o, o) / 50
    one = 0.5 * one + 0.5 / A
    even = np.full((L, A, L, A), 1 / A**2)
    for i in range(L):
        even[i, :, i] = np.eye(A) / A
    C = (0.5 * two + 0.5 * even) - one[:, :, None, None] * one
    J = -np.linalg.inv(C[:, :-1, :, :-1].reshape(9, 9)).reshape(3, 3, 3, 3)
    full = np.zeros((L, A, L, A))
    full[:, :-1, :, :-1] = J
    found = mean_field_dca(x, A)[0]
    for i in range(L):
        for j in range(L):
            b = full[i, :, j]
            b = b - b.mean(0) - b.mean(1, keepdims=True) + b.mean()
            assert abs(found[i, j].item() - np.sqrt((b**2).sum())) < 1e-3
    assert coupling_size(torch.arange(4.0)[:, None].expand(4, 4)).item() < 1e-6


def test_direct_coupling_sees_through_a_chain():
    a = torch.randint(2, (20_000,), generator=rng())
    flips = (torch.rand(2, 20_000, generator=rng(1)) < 0.2).long()
    x = torch.stack([a, a ^ flips[0], a ^ flips[0] ^ flips[1]], 1)[None]
    direct, told = mean_field_dca(x, 2, 0.001)[0], mutual_information(x, 2)[0]
    assert told[0, 2] > 0.15 * told[0, 1] and direct[0, 2] < 0.05 * direct[0, 1]


def test_precision_by_hand():
    scores = torch.tensor([[[0, 3.0, 1], [3, 0, 2], [1, 2, 0]]])
    touch = torch.zeros(1, 3, 3, dtype=torch.bool)
    touch[0, 0, 1] = touch[0, 1, 0] = True
    assert [precision_at(scores, touch, k).item() for k in (1, 2)] == [1, 0.5]
    assert abs(precision_at(scores, touch).item() - 1 / 3) < 1e-6


# ---------------------------------------------------------------- families


def test_planted_contacts():
    model = plant(20, rng())
    touch = model.contacts
    assert torch.equal(touch, touch.mT) and not touch.diagonal(dim1=1, dim2=2).any()
    assert touch.sum(2).max() <= 3 and touch.sum((1, 2)).max() <= 48
    columns = torch.arange(20).expand_as(model.partner)
    assert torch.equal(model.partner.gather(2, model.partner), columns)
    lonely = model.partner == columns
    assert not model.J[lonely].any() and model.J[~lonely].abs().amax((-1, -2)).min() > 0
    assert torch.equal(chemistry(8), chemistry(8).T)


def test_gibbs_sampling_draws_from_the_model():
    partner = torch.tensor([[[1, 0], [0, 1], [0, 1]]])
    J, h = torch.zeros(1, 3, 2, 2, 2), torch.tensor([[[0.5, 0.0], [0.0, 0.0]]])
    table = torch.tensor([[1.0, 0], [0, 0.3]])
    J[0, 0, 0], J[0, 0, 1] = table, table.T
    drawn = evolve(letters(0, (1, 20_000, 2), 2), Families(partner, J, h), 30, rng())
    weight = (table + h[0, 0][:, None]).exp()
    found = (2 * drawn[0, :, 0] + drawn[0, :, 1]).bincount(minlength=4) / 20_000
    torch.testing.assert_close(found, (weight / weight.sum()).flatten(), atol=0.015, rtol=0)


def test_ancestors_make_rows_alike():
    def same(x):
        return (x[:, :, None] == x[:, None]).float().mean().item()

    x, touch = sample_families(8, rng())
    again, _ = sample_families(8, rng())
    assert x.shape == (8, 32, 20) and touch.shape == (8, 20, 20) and torch.equal(x, again)
    assert same(x) > same(sample_families(8, rng(), changes=None)[0]) + 0.1


@pytest.mark.parametrize(
    'wrong', [dict(married=11), dict(n_letters=1), dict(common=2), dict(rows=12)]
)
def test_bad_families(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sample_families(1, rng(), **wrong)


# ---------------------------------------------------------------- the model


@thorough
@given(st.integers(0, 999))
def test_rows_have_no_order_and_columns_carry_their_pairs(seed):
    model, x = loud(seed), letters(seed)
    before = model(x)[0]
    rows, columns = torch.randperm(6, generator=rng(seed)), torch.randperm(5, generator=rng(seed))
    torch.testing.assert_close(model(x[:, rows])[0], before)
    torch.testing.assert_close(model(x[:, :, columns])[0], before[:, columns][:, :, columns])
    torch.testing.assert_close(before, before.mT)
    assert before.std() > 1e-5


def test_triangles_are_the_only_way_between_other_pairs():
    "Without them and without attention a pair is told of its two columns alone."
    for on in (True, False):
        model = loud(triangle=on, n_layer=1)
        for block in (*model.along_rows, *model.along_columns):
            for linear in (block.attn.c_proj, block.mlp.c_proj):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
        x = letters(1)
        other = x.clone()
        other[:, :, 4] = (x[:, :, 4] + letters(2, (2, 6), 3) + 1) % 4
        change = (model(x)[0] - model(other)[0]).abs()[:, :4, :4].max().item()
        assert (change > 1e-4) == on


def test_families_do_not_mix():
    model, x = loud(), letters()
    torch.testing.assert_close(model(x)[0][1:], model(x[1:])[0])


def test_triangle_sum_by_loop():
    update = PairUpdate(SMALL)
    fan_in(update, rng())
    pair = torch.randn(1, 5, 5, 4, generator=rng(1))
    a, b, p, q = update.sides(update.ln_in(pair)).chunk(4, -1)
    a, b = a * p.sigmoid(), b * q.sigmoid()
    total = sum(a[0, 1, k] * b[0, 3, k] for k in range(5))
    gate = update.gate(update.ln_in(pair)[0, 1, 3]).sigmoid()
    expected = update.back(update.ln_out(total)) * gate
    torch.testing.assert_close(update.triangles(pair)[0, 1, 3], expected)


def test_pairs_tell_rows_where_to_look():
    model, x = loud(), letters()
    before = model.tables(x)[0]
    with torch.no_grad():
        model.bias[1].weight.mul_(3)
    assert (model.tables(x)[0] - before).abs().max() > 1e-4


def test_losses_add_up():
    model, x = loud(), letters()
    touch = letters(5, (2, 5, 5), 2)
    targets = x.masked_fill(torch.rand(x.shape, generator=rng()) < 0.8, IGNORE_INDEX)
    both, hidden, pairs = (
        model(x, targets, touch)[1],
        model(x, targets)[1],
        model(x, None, touch)[1],
    )
    torch.testing.assert_close(both, hidden + pairs)
    assert model(x)[1] is None
    flipped = model(x, None, 1 - touch)[1]
    assert (flipped - pairs).abs() > 1e-3


BAD = {
    'idx has shape': lambda x: x[0],
    'dtype torch.float32': lambda x: x.float(),
    'idx holds 5': lambda x: x.clone().fill_(5),
    'idx holds -4': lambda x: x - x.max() - 1,
    r'\(2, 0, 5\)': lambda x: x[:, :0],
}


@pytest.mark.parametrize('words', BAD)
def test_bad_alignments(words):
    x = letters()
    x[0, 0, 0] = 3
    with pytest.raises(ValueError, match=words):
        loud()(BAD[words](x))


def test_bad_letters_and_rows():
    for rows, words in (([], 'empty'), (['AC', 'A'], 'lengths'), (['A1'], "'1'"), ([''], 'empty')):
        with pytest.raises(ValueError, match=words):
            encode_alignment(rows)
    assert encode_alignment(['Ag-', 'WPx']).tolist() == [[1, 6, 0], [2, 7, 0]]
    for wrong in (dict(n_pair=3), dict(n_letters=1), dict(window=2)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(SMALL, **wrong)


def test_all_hidden_is_finite():
    hidden = torch.full((1, 6, 5), 4)
    model = loud()
    logits, loss = model(hidden, hidden.clamp(max=3), torch.zeros(1, 5, 5))
    loss.backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_checkpoint_and_one_seed_is_one_run(tmp_path):
    x, touch = letters(1, (4, 6, 5)), letters(2, (4, 5, 5), 2)

    def batch(generator):
        pick = torch.randint(4, (2,), generator=generator)
        return x[pick], x[pick], touch[pick]

    def run(seed):
        model = AlignmentTransformer(SMALL, rng(seed))
        return model, train(model, batch, TrainConfig(max_iters=4, seed=seed)).losses

    (model, losses), (_, again), (_, other) = run(1), run(1), run(2)
    assert losses == again != other
    save_checkpoint(tmp_path / 'a', model)
    back, _ = load_model(tmp_path / 'a')
    assert isinstance(back, AlignmentTransformer) and back.config == model.config
    torch.testing.assert_close(back(x)[0], model(x)[0])
