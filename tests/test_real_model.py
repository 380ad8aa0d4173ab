"The tools of 24_real_model on small random models: what they say must equal the long way round."

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transformer_course.data import CharTokenizer
from transformer_course.experiments.induction import head_scores, induction_by_hand, repeated
from transformer_course.experiments.patching import activations, part_names, run_with, written
from transformer_course.experiments.real_model import (
    arrow_streams,
    copy_scores,
    label_margins,
    lay_out,
    lens,
    mean_writes,
    overwritten,
    ranked_heads,
    replaced,
    score_answers,
    stand_ins,
    streams,
)
from transformer_course.gpt import GPT, GPTConfig, embed

LETTERS = CharTokenizer('\n ->abcdefgh')
V = LETTERS.vocab_size
PAIRS = [('ab', 'c'), ('d', 'ef'), ('gg', 'hab'), ('c', 'd'), ('fe', 'ba')]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def some_model(seed=0, **changes):
    "Random weights large enough for every part to matter."
    shape = dict(block_size=64, vocab_size=V, n_layer=3, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**shape | changes), rng(seed))
    for p in model.parameters():
        nn.init.normal_(p, std=0.4, generator=rng(p.numel() + seed))
    return model.eval()


LLAMA = dict(position='rotary', norm='rms', bias=False, n_kv_head=1, gated=True, activation='silu')
KINDS = [LLAMA, dict(), dict(position='alibi', norm='plain'), dict(smear=True, embed_norm='rms')]
every_kind = pytest.mark.parametrize('kind', KINDS, ids=str)
close = lambda a, b: torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def hooks_left(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_layout_holds_the_text_and_finds_its_answers():
    ids, spans = lay_out(PAIRS, LETTERS)
    assert ids[0] == 0
    assert LETTERS.decode(ids[1:]) == ''.join(f'{q} -> {a}\n' for q, a in PAIRS)
    assert [LETTERS.decode(ids[a:b]) for a, b in spans] == [f' {a}' for _, a in PAIRS]
    ids, spans = lay_out(PAIRS, LETTERS, arrow='-', end='>', start=(3, 4))
    assert ids[:2] == [3, 4] and LETTERS.decode(ids[2:]).startswith('ab- c>d- ef>')
    assert [LETTERS.decode(ids[a:b]) for a, b in spans] == [f' {a}' for _, a in PAIRS]


@pytest.mark.parametrize('bad', [[], [('a', '')], [('', 'a')], [('a', 'b'), ('c', '')]])
def test_a_layout_refuses_half_an_example(bad):
    with pytest.raises(ValueError, match='pairs of a question and an answer'):
        lay_out(bad, LETTERS)


@every_kind
def test_the_stream_below_the_head_is_the_models_own(kind):
    model = some_model(**kind)
    idx = torch.randint(V, (3, 20), generator=rng())
    read = []
    model.lm_head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    model(idx)
    assert torch.equal(model.states(idx), read[0])
    close(model.transformer.ln_f(streams(model, idx)[-1]), read[0])


@every_kind
def test_scores_are_those_of_a_loop_over_single_prompts(kind):
    model = some_model(**kind)
    prompts = [lay_out(PAIRS[i:] + PAIRS[:i], LETTERS) for i in range(5)]
    prompts += [lay_out([('a', 'b' * (i + 1)), *PAIRS[:4]], LETTERS) for i in range(3)]
    right, loss = score_answers(model, prompts, batch_size=3)
    assert right.shape == loss.shape == (8, 5) and right.dtype == torch.bool
    for (ids, spans), some_right, some_loss in zip(prompts, right.tolist(), loss):
        logits = model(torch.tensor([ids]))[0][0].detach()
        for k, (a, b) in enumerate(spans):
            truth = torch.tensor(ids[a:b])
            close(F.cross_entropy(logits[a - 1 : b - 1], truth, reduction='sum'), some_loss[k])
            assert some_right[k] == torch.equal(logits[a - 1 : b - 1].argmax(-1), truth)


def test_an_answer_is_right_only_with_all_of_its_tokens():
    "A model that always says the token that follows in the alphabet of ids."
    model = some_model(position='none', norm='none', tie_weights=False, bias=False)
    with torch.no_grad():
        for p in model.transformer.h.parameters():
            p.zero_()
        model.transformer.wte.weight.copy_(torch.eye(V, 16))
        model.lm_head.weight.copy_(torch.eye(V, 16).roll(1, 0))
    ids = [0, 1, 2, 3, 4, 6, 7, 8]  # 4 -> 6 is a break
    right, _ = score_answers(model, [(ids, [(1, 3), (3, 6), (6, 8), (5, 6)])])
    assert right.tolist() == [[True, False, True, False]]


def test_exact_match_is_what_greedy_writing_gives():
    model, found = some_model(), []
    for seed in range(30):  # answers of two letters, some of them the model's own
        order = torch.randperm(5, generator=rng(seed)).tolist()
        ids, _ = lay_out([PAIRS[i] for i in order], LETTERS)
        wrote = list(ids)
        for _ in range(2):
            logits = model(torch.tensor([wrote]))[0][0, -1]
            wrote.append(logits.topk(2).indices[seed % 2 if len(wrote) > len(ids) else 0].item())
        right, _ = score_answers(model, [(wrote, [(len(ids), len(wrote))])])
        found.append(right.item())
        assert found[-1] == (seed % 2 == 0)
    assert any(found) and not all(found)


def test_prompts_must_have_equally_many_answers():
    model = some_model()
    with pytest.raises(ValueError, match='equally many'):
        score_answers(model, [lay_out(PAIRS, LETTERS), lay_out(PAIRS[:2], LETTERS)])
    with pytest.raises(ValueError, match='equally many'):
        score_answers(model, [])


@every_kind
def test_margins_are_differences_of_log_probabilities(kind):
    model, prompts = some_model(**kind), [lay_out(PAIRS, LETTERS), lay_out(PAIRS[::-1], LETTERS)]
    margins = label_margins(model, prompts, 5, 7)
    for (ids, spans), row in zip(prompts, margins):
        log_p = model(torch.tensor([ids]))[0].log_softmax(-1)[0].detach()
        close(row, torch.stack([log_p[a - 1, 5] - log_p[a - 1, 7] for a, _ in spans]))
    close(label_margins(model, prompts, 7, 5), -margins)


@pytest.mark.parametrize('yes, no', [(3, 3), (-1, 3), (3, V)])
def test_margins_need_two_labels_of_the_vocabulary(yes, no):
    with pytest.raises(ValueError, match=f'yes={yes} and no={no}'):
        label_margins(some_model(), [lay_out(PAIRS, LETTERS)], yes, no)


@every_kind
def test_scores_of_heads_are_those_of_chapter_20(kind):
    model = some_model(**kind)
    ids = repeated(4, 18, V, (9, 9), rng(2))[0]
    theirs = head_scores(model, ids, torch.full((4,), 9))
    close(copy_scores(model, ids, 9), theirs)
    shorter = head_scores(model, ids[:, :15], torch.full((4,), 9))
    close(copy_scores(model, ids[:, :15], 9), shorter)


def test_the_head_that_was_made_by_hand_is_found_and_is_the_one_that_is_needed():
    made = induction_by_hand(V, 24)
    ids = repeated(6, 20, V, (10, 10), rng(1))[0]
    previous, prefix = copy_scores(made, ids, 10)
    assert ranked_heads(prefix)[0] == 'L1.H0' and ranked_heads(previous)[0] == 'L0.H0'
    assert prefix[1, 0] > 0.99 and previous[0, 0] > 0.99
    behind = F.pad(ids, (1, 0), value=ids[0, 3].item())
    assert copy_scores(made, behind, 10, start=1)[1][1, 0] > 0.99
    second = lambda: (made(ids[:, :-1])[0][:, 10:].argmax(-1) == ids[:, 11:]).float().mean()
    assert second() == 1
    means = mean_writes(made, ids)
    with replaced(made, {'L1.H0': means['L1.H0']}):
        assert second() < 0.3
    assert second() == 1


@pytest.mark.parametrize('period, start', [(5, 0), (18, 0), (9, 9), (17, 1)])
def test_scores_of_heads_want_two_readings(period, start):
    with pytest.raises(ValueError, match=f'start={start} and period={period}'):
        copy_scores(some_model(), repeated(2, 18, V, (9, 9), rng())[0], period, start)


def test_ranks_are_named_by_layer_and_head():
    assert ranked_heads(torch.tensor([[0.1, 0.4], [0.3, 0.2]])) == [
        'L0.H1',
        'L1.H0',
        'L1.H1',
        'L0.H0',
    ]
    with pytest.raises(ValueError, match='scores has shape'):
        ranked_heads(torch.zeros(4))


def test_means_leave_the_first_places_out():
    model, idx = some_model(**LLAMA), torch.randint(V, (3, 12), generator=rng())
    kept = activations(model, idx)
    assert list(mean_writes(model, idx)) == part_names(model)
    for skip in (0, 1, 5):
        for name, mean in mean_writes(model, idx, skip).items():
            close(mean, kept[name][:, skip:].flatten(0, 1).mean(0))
    for skip in (-1, 12):
        with pytest.raises(ValueError, match=f'skip={skip}'):
            mean_writes(model, idx, skip)


@every_kind
def test_replaced_parts_are_those_of_chapter_20(kind):
    model, idx = some_model(**kind), torch.randint(V, (3, 12), generator=rng())
    means, plain = mean_writes(model, idx), model(idx)[0]
    with replaced(model, {}):
        assert torch.equal(model(idx)[0], plain)
    for names in (['L1.H1'], ['L0.H0', 'L2.MLP'], ['L2.H0', 'L2.H1']):
        given = {name: means[name] for name in names}
        with replaced(model, given):
            ours = model(idx)[0]
        assert torch.equal(ours, run_with(model, idx, given)) and not torch.equal(ours, plain)
    assert not hooks_left(model)


def test_a_silent_head_is_a_head_without_its_columns():
    model, idx = some_model(**LLAMA), torch.randint(V, (2, 9), generator=rng())
    with replaced(model, {'L1.H1': torch.zeros(8)}):
        silent = model(idx)[0]
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[:, 8:] = 0
    close(silent, model(idx)[0])


def test_what_was_hung_in_is_gone_after_a_failure():
    model = some_model()
    for room in (
        replaced(model, {'L0.H0': torch.zeros(8)}),
        overwritten(model, 0, torch.zeros(16), torch.tensor([0])),
    ):
        with pytest.raises(ZeroDivisionError), room:
            1 / 0
        assert not hooks_left(model)
    with pytest.raises(ValueError, match="L0.H7.*parts are called"):
        with replaced(model, {'L0.H7': torch.zeros(8)}):
            pass
    with pytest.raises(ValueError, match='token ids are whole numbers'):
        streams(model, torch.zeros(1, 4))
    with pytest.raises(ValueError, match='token ids are whole numbers'):
        copy_scores(model, torch.zeros(1, 4), 2)
    assert not hooks_left(model)


def test_stand_ins_are_others_of_the_same_layers():
    ranked = ranked_heads(torch.rand(6, 5, generator=rng()))
    for seed in range(20):
        chosen = ranked[:7]
        found = stand_ins(chosen, ranked, 10, rng(seed))
        assert len(set(found)) == 7 and not set(found) & set(ranked[:10])
        layer = lambda name: name.split('.')[0]
        for name, other in zip(chosen, found):
            left = [x for x in ranked[10:] if layer(x) == layer(name)]
            assert layer(other) == layer(name) or set(left) <= set(found)
    assert stand_ins(chosen, ranked, 10, rng(3)) == stand_ins(chosen, ranked, 10, rng(3))
    assert any(stand_ins(chosen, ranked, 10, rng(s)) != found for s in range(5))
    with pytest.raises(ValueError, match='spare=25 leaves 5 heads for 7'):
        stand_ins(chosen, ranked, 25, rng())
    with pytest.raises(ValueError, match='spare=10 leaves 13 heads for 14'):
        stand_ins(ranked[3:17], ranked, 10, rng())


@every_kind
def test_streams_are_the_partial_sums_of_what_is_written(kind):
    model, idx = some_model(**kind), torch.randint(V, (2, 9), generator=rng())
    depth = streams(model, idx)
    assert depth.shape == (4, 2, 9, 16)
    close(depth[0], embed(model, idx).detach())
    parts = written(model, idx)
    for n in range(4):
        below = [x for name, x in parts.items() if name == 'embed' or int(name[1]) < n]
        close(depth[n], sum(below))
    close(lens(model, depth[-1]), model(idx)[0])
    assert not hooks_left(model)


@every_kind
def test_an_overwritten_place_changes_itself_and_what_comes_after(kind):
    model, idx = some_model(**kind), torch.randint(V, (3, 9), generator=rng())
    places, plain = torch.tensor([2, 5, 7]), model(idx)[0]
    depth = streams(model, idx)
    rows = torch.arange(3)
    with overwritten(model, 1, depth[2][rows, places], places):
        close(model(idx)[0], plain)
    vector = torch.randn(16, generator=rng(4))
    with overwritten(model, 1, vector, places):
        changed, inside = model(idx)[0], streams(model, idx)
    for row, place in enumerate(places.tolist()):
        close(changed[row, :place], plain[row, :place])
        assert not torch.allclose(changed[row, place:], plain[row, place:], atol=1e-3)
        close(inside[1][row], depth[1][row])
    with overwritten(model, 2, vector, places):
        close(model(idx)[0][rows, places], lens(model, vector).expand(3, V))
    assert not hooks_left(model)


def test_an_overwritten_block_and_its_rows_must_be_there():
    model, idx = some_model(), torch.zeros(2, 4, dtype=torch.long)
    for block in (-1, 3):
        with pytest.raises(ValueError, match=f'block={block} is not there'):
            with overwritten(model, block, torch.zeros(16), torch.tensor([0])):
                pass
    with pytest.raises(ValueError, match='places has 3 rows for a batch of 2'):
        with overwritten(model, 0, torch.zeros(16), torch.tensor([0, 1, 2])):
            model(idx)
    assert not hooks_left(model)


def test_the_stream_at_the_arrow_does_not_know_the_answer():
    model = some_model(**LLAMA)
    one, other = (lay_out([*PAIRS[:3], ('gh', answer)], LETTERS) for answer in ('a', 'bcd'))
    found = arrow_streams(model, [one, other])
    assert found.shape == (4, 2, 16)
    close(found[:, 0], found[:, 1])
    close(found[:, 0], streams(model, torch.tensor([one[0]]))[:, 0, one[1][-1][0] - 1])
