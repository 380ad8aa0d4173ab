"""One ladder: the budget that every model gets, the records made under it, and the picture of them.

The seconds that a rung takes are spent in long runs; here are the rules, on models that take none.
"""

import math
import re

import pytest
import torch
from conftest import ROOT
from notebooks import ALL
from torch import nn

from transformer_course.bigram import BigramLanguageModel, cross_entropy
from transformer_course.course.ladder import GrowingModel, climb, share_of_step, train_rung
from transformer_course.course.long_runs import recorded
from transformer_course.course.scoreboard import (
    BUDGET,
    CHAPTERS,
    MARKS,
    Budget,
    rung,
    rungs_of,
    scoreboard,
    standings,
)
from transformer_course.data import CharTokenizer, get_batch, train_val_split
from transformer_course.multihead import MultiHeadAttention
from transformer_course.positions import Rotary
from transformer_course.sources import load_text

LADDER = ['one head', 'four heads', 'rotary positions', 'a block', "today's GPT"]
SHOWN = ['01_bigram', '02_before', '03_attention', '04_multihead', '05_positions', '06_block']
SHOWN += ['06_depth', '07_gpt', '08_tokenizer', '09_training']
small = Budget(updates=8, batch_size=2, block_size=8, warmup=3, trial_updates=5, seeds=(1, 2))


def records():
    "All rows of all ladders: (chapter, row)."
    return [(number, row) for number in CHAPTERS for row in recorded(f'{number}_ladder')]


# ---------------------------------------------------------------- the records


def test_everybody_who_learns_had_the_budget():
    "1,000 updates, the five seeds, and the best of the three step sizes of the trials."
    learned = {}
    for _, row in records():
        if row['seed'] is not None and not row.get('note'):
            learned.setdefault(row['rung'], []).append(row)
    assert [*learned] == ['MLP', 'RNN', *LADDER]
    for name, rows in learned.items():
        trials = [r for r in rows if r.get('trial')]
        quoted = [r for r in rows if not r.get('trial')]
        assert [r['step_size'] for r in trials] == list(BUDGET.step_sizes), name
        assert {(r['seed'], r['updates']) for r in trials} == {(0, BUDGET.trial_updates)}
        best = min(trials, key=lambda r: r['loss'])['step_size']
        assert {(r['step_size'], r['updates']) for r in quoted} == {(best, BUDGET.updates)}
        assert [r['seed'] for r in quoted] == list(BUDGET.seeds)


def test_the_ladder_falls():
    "Each model that grew from another is better than that, by the median and on every seed."
    losses = [rung(name).losses for name in LADDER]
    for name, before, after in zip(LADDER[1:], losses, losses[1:]):
        assert all(after[seed] < before[seed] for seed in BUDGET.seeds), name


def test_what_was_promised():
    "Today's GPT passes the recurrent network; the long run passes the 5-gram in one piece."
    assert rung("today's GPT").median < rung('RNN').median
    [whole] = [row['whole'] for _, row in records() if row['rung'] == '5-gram']
    assert rung('the long run').median < whole < rung('5-gram').median


def test_the_counted_bigram():
    "Counted anew with a dictionary's worth of code, scored at the same places."
    text = load_text()
    if text.source.startswith('generated'):
        pytest.skip('the record is of Shakespeare')
    ids = torch.tensor(CharTokenizer.train(text.text).encode(text.text))
    train, val = train_val_split(ids)
    V, n = int(ids.max()) + 1, (len(val) - 1) // BUDGET.block_size * BUDGET.block_size
    table = torch.ones(V, V).index_put((train[:-1], train[1:]), torch.tensor(1.0), accumulate=True)
    p = (table / table.sum(1, keepdim=True))[val[:n], val[1 : n + 1]]
    assert math.isclose(rung('bigram').median, -p.double().log().mean().item(), abs_tol=1e-5)


# ---------------------------------------------------------------- the rules


def test_one_run_is_the_loop_written_out():
    "`train_rung` is: these weights, these batches, AdamW with this step size at each update."
    found, model, _ = train_rung(BigramLanguageModel, 0.3, 5, small)
    ids = torch.tensor(CharTokenizer.train(load_text().text).encode(load_text().text))
    train, _ = train_val_split(ids)
    twin, g = BigramLanguageModel(int(ids.max()) + 1), torch.Generator().manual_seed(5)
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.3, betas=(0.9, 0.95), weight_decay=0.0)
    for done in range(8):
        adamw.param_groups[0]['lr'] = 0.3 * [1 / 3, 2 / 3, 1, 1, 0.8, 0.6, 0.4, 0.2][done]
        adamw.zero_grad()
        twin(*get_batch(train, 2, 8, g))[1].backward()
        adamw.step()
    torch.testing.assert_close(twin.table.weight, model.table.weight, rtol=1e-5, atol=1e-6)
    assert found < math.log(len(twin.table.weight))


def test_the_seed_decides_the_weights():
    make = lambda V: GrowingModel(V, nn.Linear(4, 4), n_embd=4)
    torch.manual_seed(99)  # whatever was drawn before does not matter
    a, model, _ = train_rung(make, 1e-9, 1, small)
    torch.manual_seed(1)
    torch.testing.assert_close(model.embed.weight, make(len(model.table.weight)).embed.weight)
    b, c = (train_rung(make, 1e-9, seed, small)[0] for seed in (1, 2))
    assert a == b != c


def test_trials_choose_and_are_not_counted():
    rows = list(climb('net', BigramLanguageModel, small))
    assert [r['seed'] for r in rows] == [0, 0, 0, 1, 2]
    best = min(rows[:3], key=lambda r: r['loss'])['step_size']
    assert [r['step_size'] for r in rows] == [*small.step_sizes, best, best]
    [net] = rungs_of(rows, '04')
    assert set(net.losses) == {1, 2} and net.worst == max(r['loss'] for r in rows[3:])
    assert net.params == rows[0]['params'] > 0


@pytest.mark.parametrize('updates, warmup', [(10, 4), (1000, 50), (3, 1)])
def test_step_sizes(updates, warmup):
    shares = [share_of_step(i, updates, warmup) for i in range(updates)]
    assert max(shares) == 1 == shares[warmup - 1] and min(shares) > 0
    assert shares[:warmup] == sorted(shares[:warmup])
    assert shares[warmup:] == sorted(shares[warmup:], reverse=True)


def test_the_growing_model():
    "The table plus what the middle says of embedding and place; rotary is handed on."
    torch.manual_seed(0)
    attn, idx = MultiHeadAttention(8, 2), torch.tensor([[3, 1, 4, 1, 5]])
    for how in (dict(places=5), dict(rotary=Rotary(4, 5)), {}):
        model = GrowingModel(9, attn, 8, **how)
        nn.init.normal_(model.table.weight)
        x = model.embed(idx) + (model.place.weight if 'places' in how else 0)
        expected = model.table(idx) + model.out(attn(x, rotary=how.get('rotary')))
        torch.testing.assert_close(model(idx)[0], expected)
        torch.testing.assert_close(model(idx, idx)[1], cross_entropy(expected, idx))
    changed = idx.clone()
    changed[0, -1] = 0
    assert torch.equal(model(changed)[0][:, :-1], model(idx)[0][:, :-1])


WRONG = {
    'updates=0': lambda: Budget(updates=0),
    'warmup=300': lambda: Budget(warmup=300),
    'step_sizes=(0.1, -1)': lambda: Budget(step_sizes=(0.1, -1)),
    'trial_seed=0': lambda: Budget(seeds=(0, 1)),
    "rung 'GTP'": lambda: rung('GTP'),
    "chapter='index'": lambda: standings('index'),
    "chapter='00_data'": lambda: scoreboard('00_data'),
    'updates=3 must be more': lambda: share_of_step(0, 3, 3),
    'places=2': lambda: GrowingModel(3, nn.Identity(), 4, places=2)(torch.zeros(1, 3).long()),
}


@pytest.mark.parametrize('said', WRONG)
def test_bad_input(said):
    with pytest.raises(ValueError, match=re.escape(said)):
        WRONG[said]()


# ---------------------------------------------------------------- the pages and the picture


@pytest.mark.parametrize('name', SHOWN)
def test_each_chapter_ends_with_the_picture(name):
    "One call with the chapter's own name, after the lesson and before its table."
    [nb] = [nb for nb in ALL if nb.path.stem == name]
    calls = [i for i, c in enumerate(nb.cells) if f"scoreboard('{name}')" in c['source']]
    table = [i for i, c in enumerate(nb.cells) if c['source'].strip() == 'claims.show()']
    assert len(calls) == 1 and len(table) == 1 and table[0] - 8 <= calls[0] < table[0]
    kinds = [kind for out in nb.cells[calls[0]]['outputs'] for kind in out.get('data', {})]
    assert any(kind.startswith('image/') for kind in kinds)


@pytest.mark.parametrize('name', SHOWN)
def test_the_picture_shows_what_there_is(name):
    "A row for each model so far, with the median that the records give; the own ones stand out."
    ax, rows = scoreboard(name), standings(name)
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert [label[:2] for label in labels] == [r.chapter for r in rows] <= [name[:2]] * len(rows)
    dots = [line for line in ax.lines if line.get_marker() == 'o']
    assert [line.get_xdata()[0] for line in dots] == [r.median for r in rows]
    own = dots[-1].get_color()
    mine = [r.chapter == name[:2] for r in rows]
    assert [line.get_color() == own for line in dots] == mine or not any(mine)
    marks = sum(r.name in MARKS for r in rows)
    assert len(ax.lines) == 2 * len(rows) + marks
    said = [t.get_text().split()[0] for t in ax.texts]
    assert said == [f'{r.median:.3f}' for r in rows]


def test_no_loss_is_typed_into_a_page():
    "The records are what the pages read; their folder is part of the package."
    folder = ROOT / 'transformer_course' / 'course' / 'runs'
    assert {p.name[:2] for p in folder.glob('*_ladder.json')} == set(CHAPTERS)
