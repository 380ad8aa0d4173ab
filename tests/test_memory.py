"The memory outside the window: streams against loops, the layer against loops, reach, training."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transformer_course.bigram import IGNORE_INDEX
from transformer_course.generation import generate
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.memory import (
    ASK,
    CELL,
    TELL,
    TOKENS,
    MemoryAttention,
    MemoryConfig,
    MemoryGPT,
    earlier_segments,
    fact_stream,
    nearest,
    recall,
)
from transformer_course.training import TrainConfig, train

thorough = settings(deadline=None, derandomize=True, max_examples=40)
SMALL = dict(vocab_size=TOKENS.size, block_size=64, n_layer=2, n_head=2, n_embd=16, segment=8)
SMALL |= dict(position='rotary', qk_norm=True, smear=True, tie_weights=False)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def lively(seed=0, **changes):
    "A model in double precision whose weights are large enough to matter."
    model = MemoryGPT(MemoryConfig(**SMALL | changes), rng(seed)).double().eval()
    for i, p in enumerate(model.parameters()):
        if p.dim() == 2:
            nn.init.normal_(p, std=0.3, generator=rng(100 + i))
    return model


def some_ids(tokens=40, seed=3):
    return torch.randint(TOKENS.size, (2, tokens), generator=rng(seed))


# ---------------------------------------------------------------- streams


@thorough
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 99))
def test_a_stream_is_what_a_loop_reads_in_it(facts, events, seed):
    x, targets, back = fact_stream(3, 4 * 30, facts, events, rng(seed))
    for row, wanted, far in zip(x.tolist(), targets.tolist(), back.tolist()):
        told, seen = {}, 0
        for at in range(0, len(row), CELL):
            mark, key, value, last = row[at : at + CELL]
            assert TOKENS.name(last) == 'filler'
            if mark not in (TELL, ASK):
                assert [TOKENS.name(i) for i in row[at : at + 3]] == 3 * ['filler']
                assert wanted[at : at + CELL] == CELL * [IGNORE_INDEX]
                continue
            seen += 1
            assert (TOKENS.name(key), TOKENS.name(value)) == ('key', 'value')
            assert (mark == ASK) == (key in told)
            if mark == ASK:
                said, when = told[key]
                assert wanted[at : at + CELL] == [IGNORE_INDEX, said] + 2 * [IGNORE_INDEX]
                assert value == said and far[at : at + CELL] == [0, at - when, 0, 0]
            else:
                assert not any(far[at : at + CELL]) and set(wanted[at : at + CELL]) == {-100}
            told[key] = value, at
        assert seen == events and len(told) <= facts


def test_streams_differ_in_who_has_what_and_a_seed_gives_one():
    x, targets, _ = fact_stream(400, 64, 4, 16, rng())
    answers = targets[targets != IGNORE_INDEX] - TOKENS.first['value']
    shares = answers.bincount(minlength=16) / len(answers)
    assert shares.min() > 0.045 and shares.max() < 0.08
    before = torch.get_rng_state()
    assert torch.equal(fact_stream(400, 64, 4, 16, rng())[0], x)
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(('segment', 'room'), [(1, None), (4, None), (4, 6), (5, 1), (30, 3)])
def test_what_was_in_memory_when_the_segment_began(segment, room):
    mask = earlier_segments(20, segment, room)
    for t in range(20):
        began = t - t % segment
        kept = range(0 if room is None else max(0, began - room), began)
        assert mask[t].nonzero().flatten().tolist() == list(kept)


@pytest.mark.parametrize('top', [1, 3, 50])
def test_the_nearest_are_those_that_sorting_finds(top):
    q, k = torch.randn(2, 6, 5, generator=rng(1)), torch.randn(2, 9, 5, generator=rng(2))
    mask = torch.rand(6, 9, generator=rng(3)) < 0.6
    for given_mask in (None, mask):
        found = nearest(q, k, top, given_mask)
        for b in range(2):
            for t in range(6):
                may = [s for s in range(9) if given_mask is None or given_mask[t, s]]
                best = sorted(may, key=lambda s: -(q[b, t] @ k[b, s]).item())[:top]
                assert found[b, t].nonzero().flatten().tolist() == sorted(best)


def test_recall_is_a_softmax_of_cosines():
    q, k, v = (torch.randn(n, 4, generator=rng(n), dtype=torch.double) for n in (3, 7, 7))
    for top in (None, 2, 99):
        read = recall(q, k, v, 5.0, top=top)
        for t in range(3):
            cosines = [(q[t] @ key / q[t].norm() / key.norm()).item() for key in k]
            kept = sorted(range(7), key=lambda s: -cosines[s])[:top]
            weights = torch.tensor([cosines[s] for s in kept]).double().mul(5).softmax(0)
            expected = sum(w * v[s] for w, s in zip(weights, kept))
            torch.testing.assert_close(read[t], expected)
    torch.testing.assert_close(recall(q * 7, k * 0.1, v, 5.0), recall(q, k, v, 5.0))
    assert torch.equal(recall(q, k[:0], v[:0], 5.0, top=3), torch.zeros_like(q))
    nowhere = torch.zeros(3, 7, dtype=torch.bool)
    assert torch.equal(recall(q, k, v, 5.0, top=3, mask=nowhere), torch.zeros_like(q))


# ---------------------------------------------------------------- the model


def as_gpt(model):
    "The same weights as a plain GPT, which knows of no segments."
    plain = {k: v for k, v in vars(model.config).items() if k in GPTConfig.__dataclass_fields__}
    gpt = GPT(GPTConfig(**plain)).double().eval()
    gpt.load_state_dict(model.state_dict())
    return gpt


def test_without_a_memory_it_is_a_gpt_that_starts_anew_in_each_segment():
    model, ids = lively(memory_layer=None), some_ids(40)
    expected = torch.cat([as_gpt(model)(part)[0] for part in ids.split(8, 1)], 1)
    torch.testing.assert_close(model(ids)[0], expected)


def test_a_shut_gate_reads_nothing():
    model, ids = lively(), some_ids(40)
    without = lively(memory_layer=None)
    weights = model.state_dict()
    without.load_state_dict({k: weights[k] for k in without.state_dict()})
    assert not torch.allclose(model(ids)[0], without(ids)[0])
    nn.init.constant_(model.transformer.h[1].attn.gate, -800.0)
    torch.testing.assert_close(model(ids)[0], without(ids)[0])


def test_the_layer_by_loops():
    model = lively(memory_top=3, memory_room=12)
    attn = model.transformer.h[1].attn
    nn.init.normal_(attn.gate, generator=rng(9))
    x = torch.randn(1, 3, 8, 16, generator=rng(4), dtype=torch.double)
    out = attn(x, rotary=model.rotary)
    plain = [attn.heads(x[:, s], rotary=model.rotary) for s in range(3)]
    q, k, v = (torch.cat(z, 2)[0] for z in zip(*(attn.heads(x[:, s]) for s in range(3))))
    gate = attn.gate.sigmoid()
    for t in (3, 8, 13, 23):
        segment, place = divmod(t, 8)
        kept, mixed = range(max(0, 8 * segment - 12), 8 * segment), []
        for h in range(2):
            near_q, near_k, near_v = (z[0, h] for z in plain[segment])
            scores = near_k[: place + 1] @ near_q[place] / 8**0.5
            near = scores.softmax(0) @ near_v[: place + 1]
            cosine = {s: (q[h, t] @ k[h, s] / q[h, t].norm() / k[h, s].norm()) for s in kept}
            best = sorted(kept, key=lambda s: -cosine[s].item())[:3]
            far = torch.zeros(8).double()
            if best:
                weights = (attn.sharpness * torch.stack([cosine[s] for s in best])).softmax(0)
                far = sum(w * v[h, s] for w, s in zip(weights, best))
            mixed.append(gate[h] * far + (1 - gate[h]) * near)
        torch.testing.assert_close(out[0, segment, place], attn.c_proj(torch.cat(mixed)))


@pytest.mark.parametrize('room', [None, 1, 8, 13, 24])
@pytest.mark.parametrize('piece', [8, 16])
def test_segment_by_segment_is_the_same_as_at_once(room, piece):
    model, ids = lively(memory_room=room), some_ids(48)
    memory = model.make_cache()
    with torch.no_grad():
        parts = [model(part, cache=memory)[0] for part in ids.split(piece, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids)[0])
    assert memory.length == 48


@pytest.mark.parametrize(
    ('room', 'last'), [(None, 39), (1, 15), (8, 15), (9, 23), (16, 23), (17, 31)]
)
def test_a_segment_is_seen_as_long_as_there_is_room_for_its_end(room, last):
    "The first block has told token 7 of token 0."
    model, ids = lively(memory_room=room, memory_top=None), some_ids(40)
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % TOKENS.size
    moved = (model(ids)[0] != model(other)[0]).any(-1).any(0)
    assert moved.nonzero().max() == last


def test_a_stream_need_not_end_with_a_segment_and_nobody_sees_the_future():
    model, ids = lively(), some_ids(40)
    for end in (1, 7, 8, 21):
        torch.testing.assert_close(model(ids[:, :end])[0], model(ids)[0][:, :end])
    assert generate(model, ids[:, :5], 9, temperature=0, use_cache=False).shape == (2, 14)
    torch.testing.assert_close(model(ids, last_only=True)[0], model(ids)[0][:, -1:])


def test_states_are_what_the_head_reads():
    model, ids, read = lively(), some_ids(21), []
    model.lm_head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    model(ids)
    assert torch.equal(model.states(ids), read[0])


def test_what_was_written_learns_only_if_asked():
    for grad in (True, False):
        attn = MemoryAttention(MemoryConfig(**SMALL, memory_grad=grad))
        x = torch.randn(1, 2, 8, 16, generator=rng(1), requires_grad=True)
        attn(x)[:, 1].sum().backward()
        assert bool(x.grad[:, 0].any()) == grad and x.grad[:, 1].any()


def test_all_is_read_in_training_and_the_nearest_in_tests():
    model, ids = lively(memory_top=1), some_ids(40)
    everything, one = (lively(memory_top=top)(ids)[0] for top in (None, 1))
    torch.testing.assert_close(model.train()(ids)[0], everything)
    torch.testing.assert_close(model.eval()(ids)[0], one)
    assert not torch.allclose(everything, one)
    model.config.memory_train_top = 1
    torch.testing.assert_close(model.train()(ids)[0], one)


def test_training_learns_and_one_seed_gives_one_run():
    def run(seed):
        model = MemoryGPT(MemoryConfig(**SMALL), rng(seed))
        config = TrainConfig(max_iters=30, eval_interval=30, seed=seed)
        return train(model, lambda g: fact_stream(8, 64, 2, 16, g)[:2], config).losses

    losses = run(1)
    assert losses == run(1) and losses != run(2)
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3


@pytest.mark.parametrize(
    ('bad', 'match'),
    [
        (lambda: fact_stream(2, 0, 1, 1, rng()), 'tokens=0'),
        (lambda: fact_stream(2, 30, 1, 1, rng()), 'tokens=30'),
        (lambda: fact_stream(2, 32, 0, 1, rng()), 'facts=0'),
        (lambda: fact_stream(2, 32, 65, 1, rng()), 'facts=65'),
        (lambda: fact_stream(2, 32, 1, 9, rng()), 'events=9'),
        (lambda: fact_stream(0, 32, 1, 1, rng()), 'count=0'),
        (lambda: nearest(torch.zeros(2, 4), torch.zeros(3, 4), 0), 'top=0'),
        (lambda: earlier_segments(8, 0), 'segment=0'),
        (lambda: earlier_segments(8, 2, 0), 'room=0'),
        (lambda: MemoryConfig(segment=0), 'segment=0'),
        (lambda: MemoryConfig(memory_layer=12), 'memory_layer=12'),
        (lambda: MemoryConfig(memory_layer=-1), 'memory_layer=-1'),
        (lambda: MemoryConfig(memory_top=0), 'memory_top=0'),
        (lambda: MemoryConfig(memory_room=0), 'memory_room=0'),
        (lambda: MemoryConfig(memory_train_top='all'), 'memory_train_top'),
        (lambda: MemoryConfig(position='alibi'), 'alibi'),
        (lambda: MemoryConfig(window=4), 'window=4'),
        (lambda: MemoryConfig(n_kv_head=1), 'n_kv_head=1'),
        (lambda: MemoryConfig(attn_dropout=0.1), 'attn_dropout=0.1'),
        (lambda: lively()(some_ids(72)), 'block_size=64'),
        (lambda: lively()(some_ids()[0]), 'shape'),
        (lambda: lively()(some_ids(12), cache=lively().make_cache()), 'whole segments of 8'),
        (lambda: generate(lively(), some_ids(9), 2), 'use_cache=False'),
    ],
)
def test_bad_input_is_refused(bad, match):
    with pytest.raises(ValueError, match=match):
        bad()
