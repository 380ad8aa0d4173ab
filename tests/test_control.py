"Control: plain text, the judge, batches, guidance by hand and with the cache, steering."

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transformer_course.before import NGram
from transformer_course.control import (
    GuidedModel,
    NGramJudge,
    check_layer,
    class_directions,
    control_batches,
    distinct_grams,
    guided_logits,
    plain_text,
    steered,
    text_nats,
)
from transformer_course.generation import generate
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.training import TrainConfig, train

N_TEXT, CONTROLS, NONE = 6, torch.tensor([6, 7]), 8


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def lively(seed=0, **changes):
    "A GPT whose weights are large enough that every token matters."
    fields = dict(block_size=24, vocab_size=9, n_layer=2, n_head=2, n_embd=16, bias=False)
    kind = dict(position='rotary', smear=True, tie_weights=False)
    model = GPT(GPTConfig(**fields | kind | changes), rng(seed)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng(seed + 1)) * 0.5)
    return model


def guided(model, guidance):
    return GuidedModel(model, guidance, n_text=N_TEXT, none=NONE)


def prompt(rows=3, length=4, seed=0):
    text = torch.randint(N_TEXT, (rows, length), generator=rng(seed))
    return torch.cat([CONTROLS[torch.arange(rows) % 2, None], text], 1)


@torch.no_grad()
def by_hand(model, idx, guidance, length, seed=0):
    "Guidance in probabilities, p(x) (p(x | c) / p(x))^w, one letter at a time, no cache."
    generator = rng(seed)
    for _ in range(length):
        free = torch.cat([torch.full_like(idx[:, :1], NONE), idx[:, 1:]], 1)
        p, q = (model(x)[0][:, -1].double().softmax(-1) for x in (free, idx))
        weights = p * (q / p) ** guidance
        weights[:, N_TEXT:] = 0
        new = torch.multinomial(
            (weights / weights.sum(-1, keepdim=True)).float(), 1, generator=generator
        )
        idx = torch.cat([idx, new], 1)
    return idx


# ---------------------------------------------------------------- text and judge


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.text())
def test_plain_text_has_only_letters_and_is_its_own_plain_text(text):
    plain = plain_text(text)
    assert set(plain) <= set('abcdefghijklmnopqrstuvwxyz .,\n') and plain_text(plain) == plain


def test_accents_go_and_letters_stay():
    assert plain_text('Écoute, ÑANDÚ\n\n\nStraße.') == 'ecoute, nandu\nstrasse.'
    assert plain_text('<b>a</b> %(name)s {x} %d') == ' a '


def test_the_judge_is_the_likeliest_ngram():
    texts = [torch.randint(3, (200,), generator=rng(k)) + 3 * k for k in range(2)]
    judge, rows = NGramJudge(texts, N_TEXT, n=3), torch.randint(N_TEXT, (7, 9), generator=rng(5))
    for k, text in enumerate(texts):
        for row, nats in zip(rows, judge.nats(rows)[:, k]):
            loss = NGram(text, N_TEXT, 3)(row[None, :-1], row[None, 1:])[1]
            torch.testing.assert_close(nats, loss)
    assert judge(torch.stack([texts[0][:9], texts[1][:9]])).tolist() == [0, 1]


def test_distinct_is_a_share_of_all_runs():
    assert distinct_grams(torch.zeros(3, 10, dtype=torch.long), N_TEXT, n=4) == 1 / 21
    assert distinct_grams(torch.arange(6)[None], N_TEXT, n=2) == 1


# ---------------------------------------------------------------- batches


def test_rows_begin_with_their_source_and_the_token_is_dropped_as_often_as_asked():
    texts = [torch.randint(3, (300,), generator=rng(k)) + 3 * k for k in range(2)]
    x, y = control_batches(texts, CONTROLS, NONE, 2000, 8)(rng())
    assert x.shape == y.shape == (2000, 9) and torch.equal(x[:, 1:], y[:, :-1])
    dropped = x[:, 0] == NONE
    assert abs(dropped.double().mean() - 0.15) < 0.03
    assert torch.equal(x[~dropped, 0], CONTROLS[(y[~dropped, 0] >= 3).long()])
    assert (y[dropped, 0] >= 3).double().mean().sub(0.5).abs() < 0.15  # dropped whatever the source
    for drop, names in ((0, {6, 7}), (1, {8})):
        batch = control_batches(texts, CONTROLS, NONE, 50, 8, drop)
        assert set(batch(rng())[0][:, 0].tolist()) == names
    again = control_batches(texts, CONTROLS, NONE, 2000, 8)(rng())
    assert torch.equal(again[0], x) and torch.equal(again[1], y)


def test_nats_are_those_of_the_loss():
    model, idx = lively(), prompt(4, 9)
    logits = model(idx[:, :-1])[0]
    for first in (1, 5):
        loss = [F.cross_entropy(l[first - 1 :], t[first:]) for l, t in zip(logits, idx)]
        torch.testing.assert_close(text_nats(model, idx, first), torch.stack(loss))


# ---------------------------------------------------------------- guidance


def test_guidance_is_bayes_rule():
    free, control = torch.randn(2, 5, 7, generator=rng(), dtype=torch.double)
    p, q = free.softmax(-1), control.softmax(-1)
    for w in (-1, 0, 0.5, 1, 2, 5):
        weights = p * (q / p) ** w
        expected = weights / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(guided_logits(free, control, w).softmax(-1), expected)


@pytest.mark.parametrize('guidance', [0, 0.5, 1, 2.0, 4])
@pytest.mark.parametrize('use_cache', [True, False])
def test_generate_with_guidance_is_the_loop_by_hand(guidance, use_cache):
    for seed in range(3):
        model, idx = lively(seed), prompt(seed=seed)
        rows = generate(guided(model, guidance), idx, 18, generator=rng(), use_cache=use_cache)
        assert torch.equal(rows, by_hand(model, idx, guidance, 18))


def test_text_only_and_only_with_a_control_token():
    model = guided(lively(), 2.0)
    rows = generate(model, CONTROLS[:, None], 23, generator=rng())
    assert (rows[:, 1:] < N_TEXT).all() and torch.equal(rows[:, 0], CONTROLS)
    assert (model(prompt())[0][..., N_TEXT:] == -math.inf).all()
    mixed = torch.cat([prompt()[:1], prompt()[:1].flip(1)])  # the second row begins with text
    for idx in (prompt()[:, 1:], mixed):
        with pytest.raises(ValueError, match='begins with text'):
            model(idx)


def test_a_text_beyond_the_block_is_refused_before_its_token_is_lost():
    assert generate(guided(lively(), 2), prompt(1, 0), 24).shape == (1, 25)  # nobody reads the last
    for use_cache in (True, False):
        with pytest.raises(ValueError, match='cut off the control token'):
            generate(guided(lively(), 2), prompt(1, 0), 25, use_cache=use_cache)


def test_more_guidance_obeys_more():
    texts = [torch.randint(3, (300,), generator=rng(k)) + 3 * k for k in range(2)]
    texts = [torch.cat([t, torch.randint(N_TEXT, (300,), generator=rng(9))]) for t in texts]
    model = lively()
    for p in model.parameters():
        nn.init.normal_(p, std=0.05, generator=rng(1))
    plan = TrainConfig(max_iters=60, learning_rate=1e-2, muon_lr=0.02, eval_interval=60, seed=0)
    train(model, control_batches(texts, CONTROLS, NONE, 16, 8), plan)
    idx = CONTROLS[torch.arange(200) % 2, None]
    share = {}
    for w in (0, 1, 3):
        rows = generate(guided(model.eval(), w), idx, 1, generator=rng())
        share[w] = ((rows[:, 1] >= 3) == (rows[:, 0] == 7)).double().mean()
    assert share[0] < 0.62 and share[0] + 0.1 < share[1] < share[3] - 0.03


# ---------------------------------------------------------------- steering


def test_directions_are_means_less_their_mean():
    model, groups = lively(), [prompt(5, 11, seed) for seed in range(3)]
    for layer in range(2):
        means = []
        for rows in groups:
            x = model.transformer.drop(model.transformer.wte(rows))
            x = x + model.smear * F.pad(x, (0, 0, 1, 0))[:, :-1]
            for block in model.transformer.h[: layer + 1]:
                x = block(x, rotary=model.rotary)
            means.append(x[:, 4:].mean((0, 1)))
        expected = torch.stack(means) - torch.stack(means).mean(0)
        torch.testing.assert_close(class_directions(model, groups, layer, skip=4), expected)


def test_a_vector_after_the_last_block_is_a_vector_before_the_last_norm():
    model, idx = lively(), prompt(3, 6)
    vectors = torch.randn(3, 16, generator=rng())
    kept = []
    hook = model.transformer.ln_f.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    plain = model(idx)[0]
    with steered(model, 1, vectors):
        found = model(idx)[0]
    after = model(idx)[0]
    hook.remove()
    torch.testing.assert_close(kept[1], kept[0] + vectors[:, None])
    assert torch.equal(after, plain) and not torch.allclose(found, plain)
    with steered(model, 1, vectors[0]):
        torch.testing.assert_close(model(idx[:1])[0], found[:1])


def test_steering_is_the_same_with_a_cache():
    model, vectors = lively(), 2 * torch.randn(3, 16, generator=rng())
    with steered(model, 0, vectors):
        rows = [
            generate(guided(model, 1), prompt(), 15, generator=rng(), use_cache=use_cache)
            for use_cache in (True, False)
        ]
    assert torch.equal(*rows)
    assert not torch.equal(rows[0], generate(guided(model, 1), prompt(), 15, generator=rng()))


def test_steering_that_nobody_calls_is_told_and_hooks_go_in_any_case():
    model = lively()
    with pytest.raises(ValueError, match='never called'), steered(model, 0, torch.ones(16)):
        model.transformer.h[0].forward(torch.zeros(1, 2, 16), rotary=model.rotary)
    with pytest.raises(KeyError), steered(model, 0, torch.ones(16)):  # its own error, not ours
        raise KeyError
    with pytest.raises(ValueError, match='idx'):
        class_directions(model, [prompt(1, 40)] * 2, 0)
    assert not any(block._forward_hooks for block in model.transformer.h)


# ---------------------------------------------------------------- bad input


def bad_calls():
    model, ids = lively(), torch.arange(6)
    yield 'at least two classes', lambda: NGramJudge([ids], N_TEXT)
    yield 'rows has shape', lambda: NGramJudge([ids, ids], N_TEXT)(ids)
    yield 'rows has shape', lambda: NGramJudge([ids, ids], N_TEXT)(ids[:, None])
    yield 'one for each', lambda: control_batches([ids], CONTROLS, NONE, 2, 3)
    yield 'one for each', lambda: control_batches([], CONTROLS[:0], NONE, 2, 3)
    yield 'drop=15', lambda: control_batches([ids, ids], CONTROLS, NONE, 2, 3, 15)
    yield 'first=0', lambda: text_nats(model, prompt(), first=0)
    yield 'first=5', lambda: text_nats(model, prompt(), first=5)
    yield 'guidance=inf', lambda: guided(model, math.inf)
    yield 'none=9', lambda: GuidedModel(model, 2, n_text=6, none=9)
    yield 'n_text=0', lambda: GuidedModel(model, 2, n_text=0, none=8)
    yield 'at least n=4', lambda: distinct_grams(prompt()[:, :3], 9)
    yield 'layer=2', lambda: check_layer(model, 2)
    yield 'layer=-1', lambda: class_directions(model, [prompt(), prompt()], -1)
    yield 'groups holds 1', lambda: class_directions(model, [prompt(2, 20)], 0)
    yield 'skip=8', lambda: class_directions(model, [prompt(), prompt()], 0)
    yield 'layer=2', lambda: steered(model, 2, torch.ones(16)).__enter__()
    yield 'vectors has shape', lambda: steered(model, 0, torch.ones(15)).__enter__()


@pytest.mark.parametrize('case', range(18))
def test_bad_input_is_named(case):
    words, call = [*bad_calls()][case]
    with pytest.raises(ValueError, match=words):
        call()


def test_dropout_is_off_while_we_measure_and_back_afterwards():
    model, idx = lively(dropout=0.5), prompt(4, 10)
    expected = text_nats(model, idx), class_directions(model, [idx, idx.flip(0)], 0)
    model.train()
    found = text_nats(model, idx), class_directions(model, [idx, idx.flip(0)], 0)
    assert all(map(torch.equal, expected, found)) and all(m.training for m in model.modules())
