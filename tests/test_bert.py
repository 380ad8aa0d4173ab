"BERT: who sees whom, padding that does nothing, what is hidden, and Hugging Face's numbers."

import warnings
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

from transformer_course.bert import (
    BERT,
    BERTClassifier,
    BERTConfig,
    ClassifierConfig,
    MaskedLM,
    mask_tokens,
)
from transformer_course.bert_weights import load_bert_weights
from transformer_course.bigram import IGNORE_INDEX
from transformer_course.checkpoint import load_model, save_checkpoint
from transformer_course.multihead import MultiHeadAttention
from transformer_course.training import TrainConfig, train

SPECIAL = dict(pad_id=0, mask_id=3, cls_id=1, sep_id=2)
SHAPE = dict(vocab_size=41, block_size=24, n_layer=2, n_head=4, n_embd=32, **SPECIAL)
CONFIG = BERTConfig(**SHAPE)
SORTER = ClassifierConfig(**SHAPE, n_classes=3)
KINDS = {
    'as BERT-base': {},
    'modern': dict(position='rotary', norm='rms', norm_first=True, activation='silu', gated=True),
    'mean, no pooler': dict(pooler=False, bias=False, zero_init=True),
}
every_kind = pytest.mark.parametrize('kind', KINDS)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def shaken(model, std=0.1):
    "Weights large enough for every part to matter."
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += std * torch.randn(p.shape, generator=rng(i))
    return model.eval()


def texts(lengths=(20, 11, 5, 1), T=20, seed=0):
    "Rows of ordinary tokens, filled up with padding; and types of places."
    idx = torch.randint(4, 41, (len(lengths), T), generator=rng(seed))
    real = torch.arange(T) < torch.tensor(lengths)[:, None]
    return idx.masked_fill(~real, 0), torch.randint(2, idx.shape, generator=rng(seed + 1)), real


# ---------------------------------------------------------------- the reference

PAIRS = {
    'BertModel': lambda: BERT(CONFIG),
    'BertForMaskedLM': lambda: MaskedLM(CONFIG),
    'BertForSequenceClassification': lambda: BERTClassifier(SORTER),
}


def hugging_face(kind):
    "A shaken BERT of Hugging Face, its attention written out."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        transformers = pytest.importorskip('transformers')
    shape = dict(vocab_size=41, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(intermediate_size=128, max_position_embeddings=24, num_labels=3)
    config = transformers.BertConfig(**shape, attn_implementation='eager')
    return shaken(getattr(transformers, kind)(config))


@pytest.mark.parametrize('kind', PAIRS)
def test_hugging_face_says_the_same(kind):
    theirs, ours = hugging_face(kind), PAIRS[kind]().eval()
    load_bert_weights(ours, theirs.state_dict())
    idx, types, real = texts()
    with torch.no_grad():
        a = theirs(idx, attention_mask=real.long(), token_type_ids=types)
        b = ours(idx, types=types)
    b = b if kind == 'BertModel' else b[0]
    off = (a[0] - b)[real] if b.dim() == 3 else a[0] - b
    assert off.abs().max() < 1e-5 and a[0].abs().max() > 0.3
    if kind == 'BertModel':
        torch.testing.assert_close(a.pooler_output, ours.summary(b, idx), atol=1e-5, rtol=0)


def test_weights_go_in_as_a_whole_or_not_at_all():
    given, ours = hugging_face('BertModel').state_dict(), BERT(CONFIG, rng())
    before = {name: w.clone() for name, w in ours.state_dict().items()}
    lacking = {name: w for name, w in given.items() if 'layer.1.output.dense.bias' not in name}
    other = given | {'embeddings.word_embeddings.weight': torch.zeros(41, 16)}
    for bad in (lacking, other, given | {'encoder.layer.2.output.dense.bias': torch.zeros(32)}):
        with pytest.raises(ValueError, match='of another model'):
            load_bert_weights(ours, bad)
    assert all(torch.equal(w, before[name]) for name, w in ours.state_dict().items())
    load_bert_weights(BERT(replace(CONFIG, pooler=False)), given)  # the pooler is left out


# ---------------------------------------------------------------- who sees whom


@every_kind
def test_everybody_sees_everybody_and_nobody_sees_padding(kind):
    model = shaken(BERT(BERTConfig(**SHAPE | KINDS[kind])))
    idx, types, real = texts()
    with torch.no_grad():
        whole = model(idx, types)
        for row, length in enumerate(real.sum(1).tolist()):
            alone = model(idx[row : row + 1, :length], types[row : row + 1, :length])
            torch.testing.assert_close(whole[row, :length], alone[0], atol=1e-5, rtol=1e-4)
        changed = idx.clone()
        changed[0, 13] = 4 + (changed[0, 13] - 3) % 37
        moved = (model(changed, types) - whole).abs().amax(-1)
    assert (moved[0] > 1e-5).all() and not moved[1:].any()


def test_places_and_types_matter():
    model, (idx, types, _) = shaken(BERT(CONFIG)), texts((20, 20))
    with torch.no_grad():
        mixed = model(idx.flip(1), types.flip(1)).flip(1)
        assert (mixed - model(idx, types)).abs().max() > 0.01
        assert (model(idx) - model(idx, types)).abs().max() > 0.01
        torch.testing.assert_close(model(idx), model(idx, torch.zeros_like(types)))


@pytest.mark.parametrize('pool', ['first', 'mean'])
def test_a_summary_by_hand(pool):
    model, (idx, _, real) = shaken(BERT(replace(CONFIG, pooler=False))), texts()
    with torch.no_grad():
        x = model(idx)
        found = model.summary(x, idx, pool)
    for row in range(4):
        by_hand = x[row, 0] if pool == 'first' else x[row, real[row]].mean(0)
        torch.testing.assert_close(found[row], by_hand)


# ---------------------------------------------------------------- what is hidden


def test_the_shares_of_what_is_hidden():
    idx = torch.randint(0, 41, (100, 3000), generator=rng(1))
    read, targets = mask_tokens(idx, CONFIG, rng(2))
    chosen, ordinary = targets != IGNORE_INDEX, idx > 3
    assert not chosen[~ordinary].any() and torch.equal(read[~chosen], idx[~chosen])
    assert torch.equal(targets[chosen], idx[chosen])
    marked, same = read[chosen] == 3, read[chosen] == idx[chosen]
    for found, share in ((chosen[ordinary], 0.15), (marked, 0.8), (same, 0.1 + 0.1 / 37)):
        deviation = (share * (1 - share) / len(found)) ** 0.5
        assert abs(found.float().mean() - share) < 4 * deviation
    drawn = read[chosen & (read != 3) & (read != idx)].bincount(minlength=41)
    assert not drawn[:4].any() and (drawn[4:] > 0.5 * drawn[4:].float().mean()).all()


def test_special_ids_in_the_middle_are_stepped_over():
    config = BERTConfig(**SHAPE | dict(pad_id=40, mask_id=17, cls_id=0, sep_id=18))
    idx = torch.full((4, 5000), 5)
    read, _ = mask_tokens(idx, config, rng(), mask_prob=1.0, random_prob=1.0, keep_prob=0.0)
    assert set(read.unique().tolist()) == set(range(41)) - {40, 17, 0, 18}
    read, targets = mask_tokens(idx, config, rng(), 1.0, 0.0, 0.0)
    assert (read == 17).all() and torch.equal(targets, idx)
    read, _ = mask_tokens(idx, config, rng(), 1.0, 0.0, 1.0)
    assert torch.equal(read, idx)


def test_hidden_tokens_cannot_be_read():
    "What is under a mark changes no guess; with targets, only the scored places are asked."
    model, (idx, _, _) = shaken(MaskedLM(CONFIG)), texts()
    read, targets = mask_tokens(idx, CONFIG, rng(3), 0.5, 0, 0)
    scored = targets != IGNORE_INDEX
    with torch.no_grad():
        everywhere, nothing = model(read)
        logits, loss = model(read, targets)
    assert nothing is None
    torch.testing.assert_close(logits, everywhere[scored])
    by_hand = -everywhere.log_softmax(-1)[scored, targets[scored]].mean()
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(loss, F.cross_entropy(everywhere[scored], idx[scored]))


# ---------------------------------------------------------------- bad input, files, training

ROW = torch.tensor([[1, 5, 9, 2]])
BAD = {
    'holds 45': lambda: BERT(CONFIG)(ROW + 36),
    'holds -1': lambda: BERT(CONFIG)(ROW - 2),
    'block_size=24': lambda: BERT(CONFIG)(ROW.repeat(1, 7)),
    'empty row': lambda: BERT(CONFIG)(torch.tensor([[1, 5], [0, 0]])),
    'padding 0 before a token': lambda: BERT(CONFIG)(torch.tensor([[1, 0, 5]])),
    'shape \\(4,\\)': lambda: BERT(CONFIG)(ROW[0]),
    'shape \\(1, 0\\)': lambda: BERT(CONFIG)(ROW[:, :0]),
    'dtype': lambda: BERT(CONFIG)(ROW.float()),
    'one per token': lambda: BERT(CONFIG)(ROW, ROW[:, 1:]),
    'n_types=2': lambda: BERT(CONFIG)(ROW, ROW),
    'from 0 to 40': lambda: MaskedLM(CONFIG)(ROW, ROW + 40),
    'IGNORE_INDEX where': lambda: MaskedLM(CONFIG)(ROW, ROW[:, 1:]),
    'from 0 to 2': lambda: BERTClassifier(SORTER)(ROW, torch.tensor([3])),
    'targets has shape': lambda: BERTClassifier(SORTER)(ROW, torch.tensor([1, 1])),
    'mask_prob=0': lambda: mask_tokens(ROW, CONFIG, mask_prob=0),
    'mask_prob=1.5': lambda: mask_tokens(ROW, CONFIG, mask_prob=1.5),
    'keep_prob=-0.1': lambda: mask_tokens(ROW, CONFIG, keep_prob=-0.1),
    'sum at most 1': lambda: mask_tokens(ROW, CONFIG, random_prob=0.6, keep_prob=0.6),
    'mask_id=None': lambda: mask_tokens(ROW, replace(CONFIG, mask_id=None)),
    'special ids': lambda: BERTConfig(vocab_size=103),
    'must be different': lambda: BERTConfig(pad_id=101),
    'n_types=0': lambda: BERTConfig(n_types=0),
    'position=': lambda: BERTConfig(position='alibi'),
    'odd size': lambda: BERTConfig(position='rotary', n_embd=36),
    'pool=': lambda: ClassifierConfig(pool='max'),
    'n_classes=1': lambda: ClassifierConfig(n_classes=1),
}


@pytest.mark.parametrize('message', BAD)
def test_bad_input_is_refused_in_words(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def some_text(g):
    return texts((20, 12, 20, 7), seed=int(torch.randint(1000, (1,), generator=g)))[0]


def hidden_text(g):
    return mask_tokens(some_text(g), CONFIG, g)


def labelled_text(g):
    idx = some_text(g)
    return idx, (idx == 7).any(1).long()


@every_kind
@pytest.mark.parametrize('task', ['masked', 'sorted'])
def test_one_seed_gives_one_run_and_a_file_gives_it_back(kind, task, tmp_path):
    def run():
        shape = SHAPE | KINDS[kind]
        model = MaskedLM(BERTConfig(**shape), rng())
        if task == 'sorted':
            model = BERTClassifier(ClassifierConfig(**shape, pool='mean'), rng())
        batch = hidden_text if task == 'masked' else labelled_text
        return model, train(model, batch, TrainConfig(max_iters=4, warmup_iters=1)).losses

    (a, losses), (b, again) = run(), run()
    assert losses == again
    save_checkpoint(tmp_path / 'c', a)
    c, _ = load_model(tmp_path / 'c')
    assert type(c) is type(a) and asdict(c.config) == asdict(a.config)
    for x, y, z in zip(*(m.state_dict().values() for m in (a, b, c))):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_the_body_of_a_reader_goes_into_a_sorter():
    reader = shaken(MaskedLM(CONFIG))
    sorter = BERTClassifier(ClassifierConfig(**SHAPE | dict(pooler=False))).eval()
    sorter.bert.load_state_dict(reader.bert.state_dict())
    idx = texts()[0]
    with torch.no_grad():
        torch.testing.assert_close(reader.bert(idx), sorter.bert(idx))
    assert all(not m.causal for m in sorter.modules() if isinstance(m, MultiHeadAttention))
