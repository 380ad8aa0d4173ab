"The Transformer of 2017: against PyTorch's, its masks and shifts, and its two ways of writing."

import functools
import itertools
import warnings
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transformer_course.attention import causal_mask
from transformer_course.bigram import IGNORE_INDEX
from transformer_course.block import Block, BlockConfig
from transformer_course.checkpoint import load_model, save_checkpoint
from transformer_course.encoder_decoder import (
    Transformer,
    TransformerConfig,
    beam_search,
    greedy,
    shift_right,
    smoothed_cross_entropy,
    source_mask,
)
from transformer_course.seq2seq import END, PAD
from transformer_course.training import TrainConfig, train

SHAPE = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=11, source_size=9, block_size=9)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def some_model(seed=0, **changes):
    "Random weights large enough for every part to matter."
    model = Transformer(TransformerConfig(**SHAPE | changes), rng()).eval()
    for i, p in enumerate(model.parameters()):
        nn.init.normal_(p, std=0.3, generator=rng(100 * seed + i))
    return model


def some_rows(lengths, end=False, seed=0):
    "Rows of these lengths, filled up as a source or, with END, as a target."
    S, V = max(lengths), SHAPE['vocab_size']
    real = torch.arange(S) < torch.tensor(lengths)[:, None]
    ids = torch.randint(2, V, (len(lengths), S), generator=rng(seed))
    if end:
        ids[range(len(lengths)), [n - 1 for n in lengths]] = END
    return ids.masked_fill(~real, IGNORE_INDEX if end else PAD)


SRC, TARGETS = some_rows([7, 4, 1]), some_rows([6, 2, 4], end=True, seed=1)
KINDS = [
    dict(norm_first=first, position=position, tie_weights=tie)
    for first, position, tie in itertools.product(
        (False, True), ('sinusoidal', 'learned'), (True, False)
    )
]
every_kind = pytest.mark.parametrize(
    'kind', KINDS, ids=lambda kind: ' '.join(map(str, kind.values()))
)


# ---------------------------------------------------------------- against PyTorch


def copy_attention(ours, theirs):
    theirs.in_proj_weight.data.copy_(ours.c_attn.weight)
    theirs.in_proj_bias.data.copy_(ours.c_attn.bias)
    theirs.out_proj.load_state_dict(ours.c_proj.state_dict())


def copy_block(ours, theirs):
    copy_attention(ours.attn, theirs.self_attn)
    names = dict(ln_1='norm1', ln_2='norm2') | {'mlp.c_fc': 'linear1', 'mlp.c_proj': 'linear2'}
    if ours.cross:
        copy_attention(ours.crossattention, theirs.multihead_attn)
        names |= dict(ln_cross_attn='norm2', ln_2='norm3')
    for o, t in names.items():
        theirs.get_submodule(t).load_state_dict(ours.get_submodule(o).state_dict())


def twin(model):
    "An `nn.Transformer` with the same weights."
    c = model.config
    sizes = c.n_embd, c.n_head, len(model.encoder), len(model.decoder), 4 * c.n_embd
    theirs = nn.Transformer(*sizes, 0.0, norm_first=c.norm_first, batch_first=True).eval()
    pairs = zip([*model.encoder, *model.decoder], [*theirs.encoder.layers, *theirs.decoder.layers])
    for block, layer in pairs:
        copy_block(block, layer)
    if c.norm_first:
        theirs.encoder.norm.load_state_dict(model.ln_source.state_dict())
        theirs.decoder.norm.load_state_dict(model.ln_target.state_dict())
    else:
        theirs.encoder.norm = theirs.decoder.norm = None
    return theirs


@every_kind
def test_is_torch_s_transformer(kind):
    model = some_model(n_encoder_layer=3, **kind)
    real_s, real_t = SRC != PAD, TARGETS != IGNORE_INDEX
    x = model.embed(SRC, 'source'), model.embed(shift_right(TARGETS), 'target')
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of a fast path
        theirs = twin(model)(
            *x,
            tgt_mask=~causal_mask(TARGETS.shape[1]),
            src_key_padding_mask=~real_s,
            tgt_key_padding_mask=~real_t,
            memory_key_padding_mask=~real_s,
        )
        gap = (model(SRC, TARGETS)[0] - model.lm_head(theirs))[real_t].abs().max()
    assert gap <= 1e-5


def test_embedding_by_hand():
    "Token vectors times sqrt(C), plus waves: the first is sin 0, cos 0, ..."
    model = some_model()
    x = model.embed(torch.tensor([[5, 5]]), 'source')[0]
    torch.testing.assert_close(x[0] - 4 * model.wte.weight[5], torch.tensor([0.0, 1.0] * 8))
    torch.testing.assert_close((x[1] - x[0])[0], torch.tensor(1.0).sin())


@pytest.mark.parametrize('share', [0.0, 0.1, 0.5])
def test_smoothing_is_torch_s(share):
    logits = torch.randn(*TARGETS.shape, 11, generator=rng())
    theirs = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), label_smoothing=share)
    torch.testing.assert_close(smoothed_cross_entropy(logits, TARGETS, share), theirs)


def test_smoothing_in_training_only():
    model = some_model(label_smoothing=0.2, dropout=0.0)
    logits, plain = model(SRC, TARGETS)
    torch.testing.assert_close(plain, smoothed_cross_entropy(logits, TARGETS))
    smoothed = model.train()(SRC, TARGETS)[1]
    torch.testing.assert_close(smoothed, smoothed_cross_entropy(logits, TARGETS, 0.2))


# ---------------------------------------------------------------- masks and shifts


def test_shift_and_mask_by_hand():
    targets = torch.tensor([[5, 6, END], [END, IGNORE_INDEX, IGNORE_INDEX]])
    assert shift_right(targets).tolist() == [[END, 5, 6], [END, END, PAD]]
    assert source_mask(torch.tensor([[4, PAD], [5, 6]]))[:, 0, 0].tolist() == [[1, 0], [1, 1]]


@every_kind
def test_padding_changes_nothing(kind):
    model = some_model(**kind)
    logits, loss = model(SRC, TARGETS)
    padded = F.pad(SRC, (0, 2)), F.pad(TARGETS, (0, 3), value=IGNORE_INDEX)
    more, same = model(*padded)
    real = TARGETS != IGNORE_INDEX
    torch.testing.assert_close(logits[real], more[:, :6][real])
    torch.testing.assert_close(loss, same)
    alone, _ = model(SRC[1:2, :4], TARGETS[1:2, :2])
    torch.testing.assert_close(alone, logits[1:2, :2])


@every_kind
def test_who_hears_of_whom(kind):
    "Each place of the target hears what comes before it, and all of the source."
    model = some_model(**kind)
    logits, changed = model(SRC, TARGETS)[0], TARGETS.clone()
    changed[0, 2] = 2 + (changed[0, 2] - 1) % 9
    other = model(SRC, changed)[0]
    assert torch.equal(logits[:, :3], other[:, :3])
    assert not torch.allclose(logits[0, 3:], other[0, 3:])
    for place in range(7):
        src = SRC.clone()
        src[0, place] = 2 + (src[0, place] - 1) % 9
        other = model(src, TARGETS)[0]
        assert not torch.allclose(logits[0, 0], other[0, 0])
        torch.testing.assert_close(logits[1:], other[1:])


def test_a_memory_is_a_set():
    model = some_model()
    memory, mask = model.encode(SRC)
    order = torch.randperm(7, generator=rng(3))
    before = shift_right(TARGETS)
    moved = model.decode(before, memory[:, order], mask[..., order])
    torch.testing.assert_close(moved, model.decode(before, memory, mask))


def test_the_difference_is_one_layer():
    config = BlockConfig(n_embd=8, n_head=2)
    names = lambda block: {name.split('.')[0] for name, _ in block.named_parameters()}
    assert names(Block(config)) == names(Block(config, causal=False))
    added = names(Block(config, cross=True)) - names(Block(config))
    assert added == {'ln_cross_attn', 'crossattention'}


# ---------------------------------------------------------------- writing


@functools.cache
def undecided(norm_first, vocab_size=11, seed=0, steps=80):
    "A model that has begun to learn to copy: what it writes depends on all that it should."

    def batch(generator):
        n = torch.randint(1, 7, (32,), generator=generator)
        src = torch.randint(2, vocab_size, (32, 7), generator=generator)
        src = src.masked_fill(torch.arange(7) >= n[:, None], PAD)
        targets = src.masked_fill(src == PAD, IGNORE_INDEX)
        return src, targets.scatter(1, n[:, None], END)

    changes = dict(norm_first=norm_first, vocab_size=vocab_size, tie_weights=False)
    model = Transformer(TransformerConfig(**SHAPE | changes), rng(seed))
    train(model, batch, TrainConfig(max_iters=steps, seed=seed))
    return model


def slow_greedy(model, src, n):
    "Without a cache, and row by row."
    rows = []
    for row in src:
        source, out = model.encode(row[row != PAD][None]), [END]
        while len(out) <= n and (len(out) == 1 or out[-1] != END):
            out.append(model.decode(torch.tensor([out]), *source)[0, -1].argmax().item())
        rows.append(out[1:] + [END] * (n + 1 - len(out)))
    return torch.tensor(rows)


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('norm_first', [False, True])
def test_greedy_and_a_beam_of_one(norm_first, seed):
    model = undecided(norm_first, seed=seed)
    wanted = slow_greedy(model, SRC, 9)
    assert len(wanted.unique()) > 2 and (wanted == END).any()
    assert torch.equal(greedy(model, SRC, 9), wanted)
    for alpha in (0.0, 1.0):
        assert torch.equal(beam_search(model, SRC, 9, width=1, alpha=alpha)[0], wanted)


def best_text(model, src, n, alpha):
    "The best of all texts of at most n tokens, and its score."
    V, texts = model.config.vocab_size, set()
    for text in itertools.product(range(V), repeat=n):
        texts.add(text[: text.index(END) + 1] if END in text else text)
    scores = {}
    for k in range(1, n + 1):  # all texts of one length at once
        same = torch.tensor([text for text in texts if len(text) == k])
        source = [t.expand(len(same), *t.shape[1:]) for t in model.encode(src)]
        logp = model.decode(F.pad(same[:, :-1], (1, 0), value=END), *source).log_softmax(-1)
        total = logp.gather(2, same[..., None])[..., 0].sum(1) / k**alpha
        scores |= dict(zip(map(tuple, same.tolist()), total.tolist()))
    text = max(scores, key=scores.get)
    return [*text, *[END] * (n - len(text))], scores[text]


@pytest.mark.parametrize('alpha', [0.0, 0.6, 1.0])
def test_a_wide_beam_is_exhaustive(alpha):
    differs = 0
    for seed in range(3):
        model, src = undecided(True, 5, seed, 15), 2 + SRC[:2] % 3
        tokens, scores = beam_search(model, src, 3, width=125, alpha=alpha)
        for row, score, one in zip(tokens, scores, src):
            text, best = best_text(model, one[None], 3, alpha)
            assert row.tolist() == text and abs(score.item() - best) < 1e-5
        differs += not torch.equal(tokens, greedy(model, src, 3))
    assert differs  # or the test would say nothing


def test_beams_of_a_batch_do_not_mix():
    model = undecided(True)
    together, scores = beam_search(model, SRC, 9, width=3)
    for i, row in enumerate(SRC):
        alone, score = beam_search(model, row[row != PAD][None], 9, width=3)
        assert torch.equal(alone[0], together[i])
        torch.testing.assert_close(score[0], scores[i])


# ---------------------------------------------------------------- use


@pytest.mark.parametrize(
    'call, said',
    [
        (lambda m: m(SRC[0], TARGETS), 'src has shape'),
        (lambda m: m(SRC.float(), TARGETS), 'src has dtype .*float32'),
        (lambda m: m(F.pad(SRC, (0, 3)), TARGETS), 'source_size=9'),
        (lambda m: m(SRC + 9, TARGETS), 'src holds .* vocab_size=11'),
        (lambda m: m(SRC.masked_fill(SRC > 0, PAD), TARGETS), 'src has an empty row'),
        (lambda m: m(SRC.flip(1), TARGETS), 'pad on the right'),
        (lambda m: m(torch.tensor([[3, PAD, 4]]), TARGETS[:1]), 'src .* before a token'),
        (lambda m: m(SRC, TARGETS[0]), 'targets has shape'),
        (lambda m: m(SRC, F.pad(TARGETS, (0, 4), value=IGNORE_INDEX)), 'block_size=9'),
        (lambda m: m(SRC, TARGETS.masked_fill(TARGETS == END, 3)), 'targets .* END=1'),
        (lambda m: m(SRC, TARGETS.flip(1)), 'targets .* END=1'),
        (lambda m: m(SRC, torch.full_like(TARGETS, IGNORE_INDEX)), 'targets .* END=1'),
        (lambda m: m(SRC, TARGETS.masked_fill(TARGETS > 1, 11)), 'targets holds 11'),
        (lambda m: greedy(m, SRC, 10), 'max_new_tokens=10 .* block_size=9'),
        (lambda m: beam_search(m, SRC, 0), 'max_new_tokens=0'),
        (lambda m: beam_search(m, SRC, 5, width=0), 'width=0'),
        (lambda m: beam_search(m, SRC[0], 5), 'src has shape'),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(ValueError, match=said):
        call(some_model())


@pytest.mark.parametrize(
    'wrong, said',
    [
        (dict(vocab_size=2), 'vocab_size=2'),
        (dict(source_size=0), 'source_size=0'),
        (dict(n_encoder_layer=0), 'n_encoder_layer=0'),
        (dict(label_smoothing=1.0), 'label_smoothing=1.0'),
        (dict(position='rotary'), 'sinusoidal, learned'),
        (dict(n_embd=9, n_head=3), 'n_embd=9'),
    ],
)
def test_bad_config(wrong, said):
    with pytest.raises(ValueError, match=said):
        TransformerConfig(**SHAPE | wrong)


def test_base_model_of_the_paper():
    with torch.device('meta'):
        n = sum(p.numel() for p in Transformer().parameters())
    mlp = 2 * 512 * 2048 + 2048 + 512
    attention, norm = 4 * 512**2 + 4 * 512, 2 * 512
    encoder, decoder = attention + mlp + 2 * norm, 2 * attention + mlp + 3 * norm
    assert n == 37000 * 512 + 6 * (encoder + decoder)


@every_kind
def test_checkpoint(tmp_path, kind):
    model = some_model(n_encoder_layer=1, **kind)
    save_checkpoint(tmp_path / 'm', model)
    again, about = load_model(tmp_path / 'm')
    assert about['model'] == 'Transformer' and asdict(again.config) == asdict(model.config)
    assert torch.equal(again(SRC, TARGETS)[0], model(SRC, TARGETS)[0])


def test_learns_and_one_seed_gives_one_run():
    "Three updates twice are the same; a hundred learn to write a letter twice."

    def batch(generator):
        src = torch.randint(2, 11, (32, 1), generator=generator)
        return src, F.pad(src.repeat(1, 2), (0, 1), value=END)

    def learn(steps, dropout):
        changes = dict(norm_first=True, dropout=dropout, tie_weights=False)
        model = Transformer(TransformerConfig(**SHAPE | changes), rng())
        return model, train(model, batch, TrainConfig(max_iters=steps)).losses

    assert learn(3, 0.1)[1] == learn(3, 0.1)[1]
    src = torch.arange(2, 11)[:, None]
    assert torch.equal(
        greedy(learn(100, 0.0)[0], src, 3), F.pad(src.repeat(1, 2), (0, 1), value=END)
    )
