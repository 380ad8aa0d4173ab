"""Before the Transformer, and sequence to sequence.

Counts are held against a dictionary, cells against PyTorch, attention against a loop and against
padding, dates against the calendar.
"""

import datetime
import json
import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transformer_course.before import (
    MLPLanguageModel,
    NGram,
    RecurrentLanguageModel,
    gram_codes,
    gru_cell,
    lstm_cell,
    ngram_table,
    rnn_cell,
    unroll,
)
from transformer_course.bigram import IGNORE_INDEX, evaluate, sample
from transformer_course.dates import MONTHS, WEEKDAYS, date_forms, date_pairs
from transformer_course.seq2seq import (
    END,
    PAD,
    AdditiveAttention,
    Decoder,
    Encoder,
    Seq2Seq,
    additive_attention,
    greedy,
)

V = 5
thorough = settings(deadline=None, derandomize=True, max_examples=40)
texts = st.lists(st.integers(0, V - 1), min_size=1, max_size=60)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def slow(ids, history, w, n):
    "P_n(w | history), from the formula, with lists."
    if n == 0:
        return 1 / V
    lower = slow(ids, history, w, n - 1)
    if len(history) < n - 1:
        return lower
    h = history[len(history) - n + 1 :]
    after = [ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == h]
    c, T = len(after), len(set(after))
    return (after.count(w) + T * lower) / (c + T) if after else lower


def in_base(base, digits):
    "The number that has these digits."
    return sum(d * base**i for i, d in enumerate(reversed(digits)))


@thorough
@given(texts, st.integers(1, 5))
def test_codes_and_table_count_what_is_there(ids, n):
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    assert gram_codes(torch.tensor(ids), V, n).tolist() == [in_base(V, g) for g in grams]
    contexts, starts, nexts, counts = (t.tolist() for t in ngram_table(torch.tensor(ids), V, n))
    found = {
        (c, nexts[k]): counts[k]
        for m, c in enumerate(contexts)
        for k in range(starts[m], starts[m + 1])
    }
    assert found == {(in_base(V, g[:-1]), g[-1]): k for g, k in Counter(grams).items()}


@thorough
@given(texts, texts, st.integers(1, 5))
def test_ngram_is_the_formula(ids, asked, n):
    logits, loss = NGram(torch.tensor(ids), V, n)(torch.tensor([asked]), torch.tensor([asked]))
    want = torch.tensor(
        [[slow(ids, asked[: t + 1], w, n) for w in range(V)] for t in range(len(asked))]
    )
    torch.testing.assert_close(logits[0].exp(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(1, len(asked)))
    mean = -want[range(len(asked)), asked].log().mean()
    torch.testing.assert_close(loss, mean, atol=1e-4, rtol=1e-4)


def test_ngram_sees_its_context_and_no_more():
    model = NGram(torch.randint(V, (500,), generator=rng()), V, 3)
    rows = [0, 1, 2, 3], [4, 4, 2, 3], [0, 1, 4, 3]
    same, older, inside = (model(torch.tensor([row]))[0][0, -1] for row in rows)
    assert torch.equal(same, older)
    assert not torch.equal(same, inside)


def test_ngram_survives_its_state_dict_and_writes():
    ids = torch.randint(V, (400,), generator=rng(1))
    model, other = NGram(ids, V, 4), NGram(ids, V, 4)
    other.load_state_dict(model.state_dict())
    assert evaluate(model, ids, 50) == evaluate(other, ids, 50)
    assert evaluate(model, ids, 50) < evaluate(NGram(ids, V, 1), ids, 50)
    assert sample(model, torch.tensor([[0]]), 9, block_size=3, generator=rng()).shape == (1, 10)


def test_the_longest_code_is_exact():
    ids = torch.full((10,), 64)
    assert gram_codes(ids, 65, 10).item() == 65**10 - 1
    with pytest.raises(ValueError, match='n=11'):
        gram_codes(ids, 65, 11)


@thorough
@given(
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99)
)
def test_cells_are_torchs(B, T, C, H, seed):
    torch.manual_seed(seed)
    x, h, c = torch.randn(B, T, C), torch.randn(B, H), torch.randn(B, H)
    for name, cell, state, theirs in (
        ('RNN', rnn_cell, h, h[None]),
        ('GRU', gru_cell, h, h[None]),
        ('LSTM', lstm_cell, (h, c), (h[None], c[None])),
    ):
        net = getattr(nn, name)(C, H, batch_first=True)
        torch.testing.assert_close(unroll(cell, x, state, net.all_weights[0]), net(x, theirs)[0])


@pytest.mark.parametrize('kind', ('rnn', 'lstm', 'gru'))
def test_recurrent_models_do_not_see_the_future_and_have_no_horizon(kind):
    torch.manual_seed(0)
    model, a = RecurrentLanguageModel(V, 4, 8, kind), torch.randint(V, (2, 12), generator=rng())
    b, c = a.clone(), a.clone()
    b[:, -1], c[:, 0] = (a[:, -1] + 1) % V, (a[:, 0] + 1) % V
    assert torch.equal(model(a)[0][:, :-1], model(b)[0][:, :-1])
    assert not torch.equal(model(a)[0][:, -1], model(c)[0][:, -1])


@pytest.mark.parametrize('context', (1, 2, 5))
def test_mlp_has_a_horizon(context):
    torch.manual_seed(0)
    model, a = MLPLanguageModel(V, context, 4, 8), torch.randint(V, (3, 9), generator=rng())
    for back in range(9):
        b = a.clone()
        b[:, 8 - back] = (a[:, 8 - back] + 1) % V
        assert torch.equal(model(a)[0][:, -1], model(b)[0][:, -1]) == (back >= context)
    assert model(a)[0].shape == (3, 9, V)


@thorough
@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 99))
def test_additive_attention(B, S, seed):
    g = rng(seed)
    query, keys, v = (torch.randn(*shape, 6, generator=g) for shape in ((B,), (B, S), ()))
    mask = torch.rand(B, S, generator=g) < 0.6
    mask[:, 0] = True
    w = additive_attention(query, keys, v, mask)
    torch.testing.assert_close(w.sum(-1), torch.ones(B))
    assert (w[~mask] == 0).all()
    for b in range(B):
        scores = [(v * (query[b] + keys[b, j]).tanh()).sum() for j in range(S) if mask[b, j]]
        torch.testing.assert_close(w[b][mask[b]], torch.stack(scores).softmax(0))


@pytest.mark.parametrize('attention', (True, False))
def test_padding_changes_nothing(attention):
    torch.manual_seed(0)
    model = Seq2Seq(9, 4, 6, attention)
    src = torch.tensor([[2, 3, 4, 5], [6, 7, PAD, PAD]])
    targets = torch.tensor([[3, 2, END], [4, END, IGNORE_INDEX]])
    logits, loss = model(src, targets)
    torch.testing.assert_close(model(nn.functional.pad(src, (0, 3)), targets)[0], logits)
    torch.testing.assert_close(model(src[1:, :2], targets[1:])[0], logits[1:])
    scored = (targets != IGNORE_INDEX).nonzero().tolist()
    losses = [-logits[b, t].log_softmax(-1)[targets[b, t]] for b, t in scored]
    torch.testing.assert_close(loss, torch.stack(losses).mean())


@pytest.mark.parametrize('attention', (True, False))
def test_greedy_is_teacher_forcing_of_its_own_words(attention):
    torch.manual_seed(1)
    model, src = Seq2Seq(9, 4, 6, attention), torch.randint(2, 9, (20, 5), generator=rng())
    out, weights = greedy(model, src, 12)
    ended = (out == END).cumsum(1) - (out == END).int() > 0
    assert (out[ended] == END).all()
    likeliest = model(src, out)[0].argmax(-1)
    assert torch.equal(likeliest[~ended], out[~ended]) and (weights is None) == (not attention)


def test_without_attention_every_word_goes_through_the_summary():
    torch.manual_seed(0)
    decoder = Decoder(9, 4, 6, False)
    memory, summary = torch.randn(1, 3, 12), torch.randn(1, 12)

    def say(memory, summary):
        state, source = decoder.begin(memory, torch.ones(1, 3, dtype=torch.bool), summary)
        return decoder(torch.tensor([2]), state, source)[0]

    assert torch.equal(say(memory, summary), say(memory + 1, summary))
    assert not torch.equal(say(memory, summary), say(memory, summary + 1))


MODELS = {
    'mlp': lambda: MLPLanguageModel(V, 3, 4, 8),
    'rnn': lambda: RecurrentLanguageModel(V, 4, 6, 'rnn'),
    'lstm': lambda: RecurrentLanguageModel(V, 4, 6),
    'gru': lambda: RecurrentLanguageModel(V, 4, 6, kind='gru'),
    'search': lambda: Seq2Seq(V, 4, 6),
    'one vector': lambda: Seq2Seq(V, 4, 6, attention=False),
}


@pytest.mark.parametrize('name', MODELS)
def test_a_model_is_built_again_from_its_config(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    again = type(model)(**json.loads(json.dumps(model.config)))  # as a checkpoint keeps it
    again.load_state_dict(model.state_dict())
    x, y = torch.randint(2, V, (2, 3, 7), generator=rng())
    assert torch.equal(again(x, y)[0], model(x, y)[0])
    assert again.config == model.config


def test_bad_input_is_refused_in_one_line():
    ids, see = torch.tensor([0, 1, 2]), torch.ones(1, 2, dtype=torch.bool)
    query, keys, v = torch.zeros(1, 3), torch.zeros(1, 2, 4), torch.zeros(4)
    search = AdditiveAttention(2, 2, 2)
    for bad, name in (
        (lambda: NGram(ids, V, 0), 'n=0'),
        (lambda: NGram(ids, 2, 2), 'ids'),
        (lambda: NGram(ids[:0], V, 2), 'ids'),
        (lambda: MLPLanguageModel(V, 0, 2, 2), 'context=0'),
        (lambda: RecurrentLanguageModel(V, 2, 2, 'GRU'), "kind='GRU'"),
        (lambda: date_pairs(-1, 0), 'n=-1'),
        (lambda: Encoder(V, 2, 2)(torch.tensor([[PAD, 2]])), 'src'),
        (lambda: additive_attention(query, keys, v, see), 'query'),
        (lambda: search(torch.zeros(1, 2), torch.zeros(1, 2, 2), ~see), 'mask'),
    ):
        with pytest.raises(ValueError) as e:
            bad()
        assert str(e.value).startswith(name) and '\n' not in str(e.value)


def months_named(word):
    "The months that a word may name; only English shortens them."
    for names in MONTHS.values():
        for number, name in enumerate(names, 1):
            if word == name or (names is MONTHS['English'] and word == name[:3]):
                yield number


def read(written):
    "The days a form may mean, by looking names up: an independent reader of `date_forms`."
    words = written.replace(',', ' ').replace('.', ' ').split()
    names = [w for w in words if any(w in week for week in WEEKDAYS.values())]
    months = {m for w in words for m in months_named(w)}
    numbers = [int(figures) for figures in re.findall(r'[0-9]+', written)]
    year = numbers.pop()
    if months:
        candidates = [(m, numbers[0]) for m in months]
    elif '/' in written:
        candidates = [(numbers[0], numbers[1]), (numbers[1], numbers[0])]
    else:
        candidates = [(numbers[1], numbers[0])]
    days = {datetime.date(year, m, d) for m, d in candidates if m <= 12}
    if not names:
        return days
    return {d for d in days if any(names[0] == week[d.weekday()] for week in WEEKDAYS.values())}


@thorough
@given(st.dates(datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)))
def test_every_form_means_one_day(day):
    for written in date_forms(day):
        assert read(written) == {day}, written


def test_date_pairs():
    train, test = date_pairs(3000, 0), date_pairs(300, 0, held_out=True)
    days = [{datetime.date.fromisoformat(iso) for _, iso in pairs} for pairs in (train, test)]
    assert not days[0] & days[1]
    assert all(d.toordinal() % 10 == 0 for d in days[1])
    assert all(d.toordinal() % 10 for d in days[0])
    assert min(days[0] | days[1]).year == 1950 and max(days[0] | days[1]).year == 2049
    assert date_pairs(20, 3) == date_pairs(20, 3) != date_pairs(20, 4)
    assert date_pairs(0, 0) == []
