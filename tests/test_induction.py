"Induction: lists against their period, the hand-made circuit against a rule, scores against loops."

import itertools

import pytest
import torch
from torch import nn

from transformer_course.gpt import GPT, GPTConfig
from transformer_course.experiments.induction import (
    AttentionOnly,
    Silent,
    ablate,
    attention_maps,
    composition,
    copying_score,
    full_circuits,
    head_matrices,
    head_scores,
    induction_by_hand,
    loss_by_place,
    on_diagonal,
    repeat_accuracy,
    repeated,
    steepest_drop,
)

V = 12


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def some_model(position='rotary', n_layer=2, n_head=2, mlp=False, **changes):
    "Random weights large enough for attention to be far from even."
    shape = dict(block_size=16, vocab_size=V, n_layer=n_layer, n_head=n_head, n_embd=16)
    kind = dict(position=position, norm='plain', bias=False, tie_weights=False)
    config = GPTConfig(**shape, **kind | changes)
    model = GPT(config, rng()) if mlp else AttentionOnly(config, rng())
    g = rng(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4, generator=g)
    return model.eval()


def some_ids(n=5, length=13, periods=(3, 6), seed=0, distinct=True):
    return repeated(n, length, V, periods, rng(seed), distinct)


@pytest.mark.parametrize('distinct', [True, False])
def test_lists_repeat_with_their_period(distinct):
    ids, period = repeated(400, 30, V, (4, 9), rng(), distinct)
    assert ids.shape == (400, 30)
    assert sorted(set(period.tolist())) == list(range(4, 10))
    assert set(ids.flatten().tolist()) == set(range(V))
    t = torch.arange(30)
    assert torch.equal(ids, ids.gather(1, t % period[:, None]))
    doubles = sum(len(set(row[:p])) < p for row, p in zip(ids.tolist(), period.tolist()))
    assert doubles == 0 if distinct else doubles > 100


def test_lists_depend_on_the_generator_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one = some_ids()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(one, some_ids()))
    assert not torch.equal(one[0], some_ids(seed=1)[0])


@pytest.mark.parametrize(
    'kw, word',
    [
        (dict(periods=(0, 3)), 'at least 1'),
        (dict(periods=(5, 4)), 'shortest'),
        (dict(periods=(3, V + 1)), 'distinct=False'),
    ],
)
def test_impossible_lists(kw, word):
    with pytest.raises(ValueError, match=word):
        repeated(2, 9, V, generator=rng(), **kw)


def test_a_list_longer_than_the_alphabet_needs_doubles():
    assert repeated(2, 9, V, (3, V + 1), rng(), distinct=False)[0].shape == (2, 9)


def test_accuracy_counts_the_second_round_only():
    ids, period = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2]]), torch.tensor([3])
    logits = nn.functional.one_hot(ids[:, 1:], 3).float()
    assert repeat_accuracy(logits, ids, period) == 1
    for t in range(8):
        wrong = logits.clone()
        wrong[0, t] = wrong[0, t].roll(1)
        assert repeat_accuracy(wrong, ids, period) == pytest.approx(2 / 3 if t in (3, 4, 5) else 1)


def test_by_hand_on_every_sequence():
    every = torch.tensor(list(itertools.product(range(3), repeat=7)))
    guesses = induction_by_hand(3, 7)(every)[0].argmax(-1)
    checked = 0
    for row, out in zip(every.tolist(), guesses.tolist()):
        after = {}
        for t, token in enumerate(row):
            if t:
                after[row[t - 1]] = token
            if token in after:
                checked += 1
                assert out[t] == after[token], (row, t)
    assert checked > 6000


def test_by_hand_is_causal_and_sure():
    model, (ids, period) = induction_by_hand(V, 13), some_ids()
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % V
    assert torch.equal(model(ids)[0][:, :8], model(changed)[0][:, :8])
    p = model(ids[:, :-1])[0].softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert p[torch.arange(12) >= period[:, None]].min() > 0.999


def test_by_hand_does_not_care_which_symbol_is_which():
    model, (ids, _) = induction_by_hand(V, 13), some_ids()
    names = torch.randperm(V, generator=rng(4))
    torch.testing.assert_close(model(names[ids])[0][..., names], model(ids)[0])


def test_silent_models_are_attention_and_addition():
    model, ids = some_model(), some_ids()[0]
    assert all(isinstance(b.mlp, Silent) for b in model.transformer.h)
    assert not any('mlp' in name or 'ln_2' in name for name, _ in model.named_parameters())
    x = model.embed_norm(model.transformer.wte(ids))
    for block in model.transformer.h:
        x = x + block.attn(block.ln_1(x), rotary=model.rotary)
    torch.testing.assert_close(model.lm_head(model.transformer.ln_f(x)), model(ids)[0])


@pytest.mark.parametrize('position', ['learned', 'rotary', 'alibi', 'none'])
@pytest.mark.parametrize('mlp', [True, False])
def test_maps_are_what_attention_uses(position, mlp):
    model, ids = some_model(position, mlp=mlp), some_ids()[0]
    maps, seen = attention_maps(model, ids), []
    assert maps.shape == (2, 5, 2, 13, 13)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 5, 2, 13))
    assert (maps.triu(1) == 0).all()
    attn = model.transformer.h[1].attn
    attn.register_forward_pre_hook(lambda m, args, kw: seen.append(args[0]), with_kwargs=True)
    attn.c_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(ids)
    _, _, v = attn.heads(seen[0])
    merged = (maps[1] @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(merged, seen[1], atol=1e-5, rtol=1e-5)


def test_maps_leave_no_hooks():
    model = some_model()
    attention_maps(model, some_ids()[0])
    with pytest.raises(ValueError):
        attention_maps(model, torch.tensor([[V]]))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_scores_against_loops():
    model, (ids, period) = some_model(), some_ids()
    w, (previous, prefix) = attention_maps(model, ids), head_scores(model, ids, period)
    for l, h in itertools.product(range(2), range(2)):
        before = [w[l, b, h, t, t - 1].item() for b in range(5) for t in range(1, 13)]
        copies = [
            sum(w[l, b, h, t, j + 1].item() for j in range(t) if (t - j) % p == 0)
            for b, p in enumerate(period.tolist())
            for t in range(p, 13)
        ]
        assert previous[l, h].item() == pytest.approx(sum(before) / len(before), abs=1e-5)
        assert prefix[l, h].item() == pytest.approx(sum(copies) / len(copies), abs=1e-5)


@pytest.mark.parametrize('position', ['learned', 'rotary', 'none'])
@pytest.mark.parametrize('layer', [0, 1, 2])
def test_cutting_nothing_and_everything(position, layer):
    model, ids = some_model(position, n_layer=3), some_ids()[0]
    torch.testing.assert_close(ablate(model, ids, layer, ''), model(ids)[0], atol=1e-4, rtol=1e-4)
    cut = ablate(model, ids, layer)
    with torch.no_grad():
        model.transformer.h[layer].attn.c_proj.weight.zero_()
    torch.testing.assert_close(cut, model(ids)[0], atol=1e-4, rtol=1e-4)


def test_nothing_above_the_last_layer_reads_it():
    model, ids = some_model(), some_ids()[0]
    assert torch.equal(ablate(model, ids, 1, 'qkv'), ablate(model, ids, 1, ''))
    assert not torch.allclose(ablate(model, ids, 1, 'r'), ablate(model, ids, 1, ''))


def test_each_way_is_a_way_of_its_own():
    model, ids = some_model(), some_ids()[0]
    logits = [ablate(model, ids, 0, cut) for cut in ('', 'q', 'k', 'v', 'r')]
    for a, b in itertools.combinations(logits, 2):
        assert (a - b).abs().max() > 1e-3


def test_the_mean_is_kept():
    model, ids = some_model(), some_ids()[0]
    block = model.transformer.h[1]
    x = model.transformer.wte(ids)
    x = x + model.transformer.h[0].attn(model.transformer.h[0].ln_1(x), rotary=model.rotary)
    mean = block.attn(block.ln_1(x), rotary=model.rotary).mean((0, 1))
    expected = model.lm_head(model.transformer.ln_f(x + mean))
    torch.testing.assert_close(ablate(model, ids, 1, fill='mean'), expected, atol=1e-4, rtol=1e-4)


def test_bad_cuts():
    ids = some_ids()[0]
    with pytest.raises(ValueError, match='qkvr'):
        ablate(some_model(), ids, 0, 'x')
    with pytest.raises(ValueError, match='mean'):
        ablate(some_model(), ids, 0, 'q', fill='median')
    with pytest.raises(ValueError, match='AttentionOnly'):
        ablate(some_model(mlp=True), ids)
    with pytest.raises(ValueError, match='layer=2'):
        ablate(some_model(), ids, 2)


@pytest.mark.parametrize('position', ['learned', 'rotary'])
@pytest.mark.parametrize('head', [0, 1])
def test_matrices_give_the_scores(position, head):
    model, x = some_model(position), torch.randn(1, 9, 16, generator=rng(2))
    attn = model.transformer.h[1].attn
    q, k, v = attn.heads(x, rotary=model.rotary)
    near = dict(atol=1e-4, rtol=1e-4)
    for t, s in ((8, 8), (8, 1), (5, 2)):
        qk, ov = head_matrices(model, 1, head, t - s)
        torch.testing.assert_close(q[0, head, t] @ k[0, head, s], x[0, t] @ qk @ x[0, s], **near)
    message = attn.c_proj.weight[:, 8 * head : 8 * head + 8] @ v[0, head, 3]
    torch.testing.assert_close(message, ov @ x[0, 3], **near)


def test_orthogonal_maps_compose_at_chance():
    model = some_model('learned', n_head=1)
    for block in model.transformer.h:
        for w in (*block.attn.c_attn.weight.chunk(3), block.attn.c_proj.weight):
            nn.init.orthogonal_(w, generator=rng(w.shape[0]))
    for way, score in composition(model).items():
        assert score == pytest.approx(16**-0.5, abs=1e-4), way


def test_steepest_drop():
    stairs = [3.0] * 5 + [1.0] * 5
    for curve in (stairs, [s + 7 for s in stairs], [9 * s for s in stairs]):
        assert steepest_drop(curve, 1) == 4
    for width in (2, 4, 6):
        assert 2 <= steepest_drop(stairs, width) <= 7
    for width in (0, 10):
        with pytest.raises(ValueError, match=f'width={width}'):
            steepest_drop(stairs, width)


@pytest.mark.parametrize('norm', ['plain', 'none'])
def test_full_circuits_against_two_tokens(norm):
    "A score between two made-up places: one holds a symbol alone, the other a note alone."
    model = some_model('learned', norm=norm, n_head=1)
    matches, copies = full_circuits(model)
    first, second = (block.attn for block in model.transformer.h)
    norm_of = (lambda x: x) if norm == 'none' else lambda x: x - x.mean()
    q, k, v = second.c_attn.weight.chunk(3)
    v1 = first.c_attn.weight.chunk(3)[2]
    E = model.transformer.wte.weight
    for a, b in ((0, 0), (3, 7), (11, 2)):
        note = first.c_proj.weight @ (v1 @ norm_of(E[b]))
        asked = (q @ norm_of(E[a])) @ (k @ norm_of(note))
        assert matches[a, b].item() == pytest.approx(asked.item(), abs=1e-3, rel=1e-4)
        said = norm_of(second.c_proj.weight @ (v @ norm_of(E[a])))
        said = model.lm_head.weight[b] @ said
        assert copies[a, b].item() == pytest.approx(said.item(), abs=1e-3, rel=1e-4)


def test_the_circuits_choose_their_heads_and_their_distance():
    model = some_model('rotary')
    one, other = full_circuits(model, (0, 0), 3), full_circuits(model, (0, 1), 3)
    far, first = full_circuits(model, (0, 0), 7), full_circuits(model, (1, 0), 3)
    assert not torch.allclose(one[0], other[0]) and not torch.allclose(one[1], other[1])
    assert not torch.allclose(one[0], far[0]) and torch.equal(one[1], far[1])
    assert not torch.allclose(one[0], first[0]) and torch.equal(one[1], first[1])


def test_on_diagonal_and_copying_score():
    table = torch.tensor([[2.0, 1, 0], [5, 4, 3], [0, 0, 1]])
    assert on_diagonal(table) == 2
    assert copying_score(table.triu()) == pytest.approx(1)
    assert copying_score(torch.diag(torch.tensor([3.0, -1.0]))) == pytest.approx(0.5)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])  # eigenvalues i and -i
    assert copying_score(turn) == pytest.approx(0, abs=1e-6)


def test_loss_by_place_is_cross_entropy_per_place():
    logits, targets = torch.randn(6, 5, V, generator=rng()), some_ids(6, 5)[0]
    by_place = loss_by_place(logits, targets)
    for t in range(5):
        loss = nn.functional.cross_entropy(logits[:, t], targets[:, t])
        torch.testing.assert_close(by_place[t], loss)
