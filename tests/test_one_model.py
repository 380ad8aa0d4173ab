"One model: ranges go there and back, rows are shifted by one, each row counts as one, µ-law."

import math

import pytest
import torch
import torch.nn.functional as F

from transformer_course.bigram import IGNORE_INDEX, cross_entropy
from transformer_course.checkpoint import load_model, save_checkpoint
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.one_model import FairRows, Vocabulary, mu_law, mu_law_back, pack_rows
from transformer_course.training import TrainConfig, train

SIZES = dict(kind=3, char=7, grey=4)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gpt(seed=0):
    "A small GPT with weights large enough for everything to matter."
    model = GPT(GPTConfig(vocab_size=14, block_size=9, n_layer=2, n_head=2, n_embd=16), rng(seed))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=rng(p.numel()))
    return model.eval()


# ---------------------------------------------------------------- ranges


def test_ranges_fill_the_ids_once():
    vocab = Vocabulary(SIZES)
    ids = torch.cat([vocab.encode(name, range(size)) for name, size in SIZES.items()])
    assert ids.tolist() == list(range(14)) and vocab.size == 14
    names = [vocab.name(i) for i in range(14)]
    assert names == [name for name, size in SIZES.items() for _ in range(size)]


@pytest.mark.parametrize('name', SIZES)
@pytest.mark.parametrize('shape', [(), (5,), (2, 3), (0,)])
def test_there_and_back(name, shape):
    vocab = Vocabulary(SIZES)
    values = torch.randint(SIZES[name], shape, generator=rng(3))
    assert torch.equal(vocab.decode(name, vocab.encode(name, values)), values)


def test_bad_ids_are_named():
    vocab = Vocabulary(SIZES)
    with pytest.raises(ValueError, match=r"values runs from -1 to 2: 'grey' has 0 to 3"):
        vocab.encode('grey', [-1, 2])
    with pytest.raises(ValueError, match=r"values runs from 4 to 4: 'grey' has 0 to 3"):
        vocab.encode('grey', 4)
    with pytest.raises(ValueError, match='torch.float32: round'):
        vocab.encode('grey', [1.0])
    with pytest.raises(ValueError, match=r"ids holds a 'char', but 'grey' is 10 to 13"):
        vocab.decode('grey', torch.tensor([10, 9]))
    with pytest.raises(ValueError, match=r"ids holds a 'grey', but 'char' is 3 to 9"):
        vocab.decode('char', torch.tensor([9, 10]))
    with pytest.raises(ValueError, match=r"name='blue' has no range: take one of \['kind'"):
        vocab.encode('blue', 0)
    for i in (-1, 14):
        with pytest.raises(ValueError, match='run from 0 to 13'):
            vocab.name(i)
    for sizes in ({}, dict(kind=0)):
        with pytest.raises(ValueError, match='at least one range'):
            Vocabulary(sizes)


# ---------------------------------------------------------------- rows


def test_rows_are_shifted_by_one():
    body = torch.randint(3, 14, (4, 6), generator=rng())
    x, y = pack_rows(2, body, 6, 9)
    assert x.shape == y.shape == (4, 9) and (x[:, 0] == 2).all()
    assert torch.equal(x[:, 1:6], body[:, :-1]) and torch.equal(y[:, :6], body)
    assert (y[:, 6:] == IGNORE_INDEX).all()
    for scored in range(1, 7):
        _, y = pack_rows(2, body, scored, 9)
        real = y != IGNORE_INDEX
        assert real.sum(1).tolist() == [scored] * 4 and torch.equal(
            y[:, 6 - scored : 6], body[:, 6 - scored :]
        )


def test_a_full_row_has_no_padding():
    body = torch.arange(9)[None]
    x, y = pack_rows(0, body, 9, 9)
    assert y.tolist() == body.tolist() and x.tolist() == [[0, *range(8)]]


def test_rows_do_not_change_what_they_were_made_of():
    body = torch.arange(6)[None]
    pack_rows(0, body, 2, 9)
    assert body.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_padding_is_not_seen():
    body = torch.randint(3, 14, (2, 5), generator=rng())
    (x, y), (short, _) = pack_rows(1, body, 3, 9), pack_rows(1, body, 3, 5)
    model = gpt()
    torch.testing.assert_close(model(x)[0][:, :5], model(short)[0])
    torch.testing.assert_close(FairRows(model)(x, y)[1], FairRows(model)(short, y[:, :5])[1])


@pytest.mark.parametrize(('shape', 'scored'), [((2, 10), 1), ((2, 0), 1), ((3,), 1)])
def test_bad_rows_are_named(shape, scored):
    with pytest.raises(ValueError, match='n from 1 to T=9'):
        pack_rows(0, torch.zeros(shape).long(), scored, 9)


@pytest.mark.parametrize('scored', [0, 5, -1])
def test_bad_counts_are_named(scored):
    with pytest.raises(ValueError, match=f'scored={scored} must lie between 1 and 4'):
        pack_rows(0, torch.zeros(2, 4).long(), scored, 9)


# ---------------------------------------------------------------- each row counts as one


def test_fair_is_the_mean_of_the_rows_own_losses():
    model, lengths = gpt(), (1, 4, 8)
    bodies = [torch.randint(3, 14, (1, n), generator=rng(n)) for n in lengths]
    parts = [pack_rows(i, body, body.shape[1], 9) for i, body in enumerate(bodies)]
    x, y = (torch.cat(part) for part in zip(*parts))
    alone = torch.stack([cross_entropy(model(a)[0], b) for a, b in parts])
    logits, loss = FairRows(model)(x, y)
    torch.testing.assert_close(loss, alone.mean())
    torch.testing.assert_close(logits, model(x)[0])
    assert (loss - cross_entropy(logits, y)).abs() > 0.01  # and not the mean over targets


def test_a_row_without_targets_counts_nothing():
    model, body = gpt(), torch.randint(3, 14, (2, 6), generator=rng())
    x, y = pack_rows(0, body, 6, 9)
    empty = torch.cat([y[:1], torch.full_like(y[:1], IGNORE_INDEX)])
    alone = FairRows(model)(x[:1], y[:1])[1]
    torch.testing.assert_close(FairRows(model)(x, empty)[1], alone)
    with pytest.raises(ValueError, match='everywhere'):
        FairRows(model)(x, torch.full_like(y, IGNORE_INDEX))
    with pytest.raises(ValueError, match=r'targets has shape \(2, 8\), but idx \(2, 9\)'):
        FairRows(model)(x, y[:, :-1])
    assert FairRows(model)(x)[1] is None


def test_trains_the_gpt_inside_and_one_seed_gives_one_run(tmp_path):
    def batch(g):
        body = torch.randint(3, 14, (8, 1), generator=g).expand(8, 4)  # the same id four times
        return pack_rows(1, body, 3, 9)

    runs = []
    for _ in range(2):
        shape = dict(n_layer=1, n_head=2, n_embd=16)
        model = GPT(GPTConfig(vocab_size=14, block_size=9, **shape), rng())
        train(FairRows(model), batch, TrainConfig(max_iters=60, eval_interval=100, seed=1))
        runs.append(model)
    a, b = (m.state_dict() for m in runs)
    assert all(torch.equal(a[key], b[key]) for key in a)
    x, y = batch(rng(9))
    assert (runs[0](x)[0][:, 1:4].argmax(-1) == y[:, 1:4]).float().mean() > 0.9
    save_checkpoint(tmp_path / 'saved', runs[0])
    again, about = load_model(tmp_path / 'saved')
    assert about['model'] == 'GPT' and torch.equal(again(x)[0], runs[0](x)[0])


# ---------------------------------------------------------------- µ-law


@pytest.mark.parametrize('levels', [2, 16, 32, 256])
def test_every_level_comes_back(levels):
    steps = torch.arange(levels)
    assert torch.equal(mu_law(mu_law_back(steps, levels), levels), steps)


def test_mu_law_by_hand():
    "x = 0.1: ln(1 + 25.5) / ln(256) = 0.59100, and (0.59100 + 1) / 2 * 255 = 202.85."
    assert mu_law(torch.tensor([0.1, 0.0, 1.0, -1.0])).tolist() == [203, 128, 255, 0]
    back = mu_law_back(torch.tensor([203.0]))
    bent = 203 / 255 * 2 - 1
    torch.testing.assert_close(back, torch.tensor([(256**bent - 1) / 255]))
    assert math.isclose(back.item(), 0.1, abs_tol=0.002)


def test_quiet_sounds_are_kept_better_than_by_equal_steps():
    wave = 0.02 * torch.rand(500, generator=rng())
    equal = ((wave + 1) / 2 * 255).round() / 255 * 2 - 1
    assert F.mse_loss(mu_law_back(mu_law(wave)), wave) < 0.1 * F.mse_loss(equal, wave)


def test_mu_law_keeps_the_order():
    numbers = mu_law(torch.linspace(-1, 1, 20_001), 32)
    assert (numbers.diff() >= 0).all() and numbers.unique().tolist() == list(range(32))


def test_bad_waves_are_named():
    with pytest.raises(ValueError, match='reaches 1.5: scale it'):
        mu_law(torch.tensor([1.5]))
    with pytest.raises(ValueError, match='torch.int64'):
        mu_law(torch.tensor([1]))
    with pytest.raises(ValueError, match='levels=1'):
        mu_law(torch.zeros(3), 1)
    with pytest.raises(ValueError, match='mu=0'):
        mu_law(torch.zeros(3), mu=0)
