"""BERTs out of folders: what went in comes out, what does not fit is refused in a line."""

import json
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from transformer_course.bert import BERT, BERTConfig
from transformer_course.fetching import SourceError
from transformer_course.minilm import HUB_SIZES, load_bert, minilm
from transformer_course.sentences import sentence_vectors
from transformer_course.smollm import hub_folder
from transformer_course.snippets import draw_labels, film_snippets, film_split, snippet_rows

VOCAB = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'cat', '##s', '.', 'b']
ABOUT = dict(model_type='bert', vocab_size=10, num_hidden_layers=2, num_attention_heads=2)
ABOUT |= dict(hidden_size=8, intermediate_size=20, max_position_embeddings=16, type_vocab_size=2)
ABOUT |= dict(layer_norm_eps=1e-12, hidden_act='gelu', hidden_dropout_prob=0.1)


@pytest.fixture(scope='module')
def theirs():
    "A small BertModel of Hugging Face with every weight shaken."
    transformers = pytest.importorskip('transformers')
    about = {k: v for k, v in ABOUT.items() if k != 'model_type'}
    config = transformers.BertConfig(**about, attn_implementation='eager')
    model, g = transformers.BertModel(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    return model


@pytest.fixture
def folder(tmp_path, theirs):
    "A folder as the hub has it."
    (tmp_path / 'config.json').write_text(json.dumps(ABOUT))
    (tmp_path / 'vocab.txt').write_text('\n'.join(VOCAB) + '\n', encoding='utf-8')
    weights = {k: w.contiguous() for k, w in theirs.state_dict().items()}
    save_file(weights, tmp_path / 'model.safetensors')
    return tmp_path


def test_a_folder_is_the_model_that_it_came_from(folder, theirs):
    model, tokenizer = load_bert(folder)
    assert model.pooler is None and not model.training and model.config.n_inner == 20
    idx = tokenizer.batch(['A cat.', 'cats cats b', ''])
    real = idx != 0
    with torch.no_grad():
        off = (model(idx) - theirs(idx, attention_mask=real.long())[0])[real].abs().max()
    assert off < 1e-5
    with_pooler, _ = load_bert(folder, pooler=True)
    with torch.no_grad():
        summary = with_pooler.summary(with_pooler(idx), idx)
        torch.testing.assert_close(summary, theirs(idx, attention_mask=real.long())[1])


def test_half_precision_and_prefixes(folder, theirs):
    whole = load_bert(folder)[0].wte.weight
    weights = {f'bert.{k}': w.half() for k, w in theirs.state_dict().items()}
    weights['bert.embeddings.position_ids'] = torch.arange(16)[None]
    weights['cls.predictions.bias'] = torch.zeros(10)
    save_file(weights, folder / 'model.safetensors')
    model, _ = load_bert(folder)
    assert model.wte.weight.dtype == torch.float32
    torch.testing.assert_close(model.wte.weight, whole, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    'change, says',
    [
        (dict(model_type='roberta'), 'model_type'),
        (dict(hidden_act='swish7'), 'hidden_act'),
        (dict(hidden_act=['gelu']), 'hidden_act'),
        (dict(position_embedding_type='relative_key'), 'position_embedding_type'),
        (dict(vocab_size=10**15), 'word_embeddings'),
        (dict(vocab_size=9), 'word_embeddings'),
        (dict(max_position_embeddings=10**15), 'position_embeddings'),
        (dict(type_vocab_size=10**9), 'token_type'),
        (dict(intermediate_size=10**12), 'intermediate'),
        (dict(num_hidden_layers=10**12), 'encoder.layer'),
        (dict(num_hidden_layers=1), 'h.1.'),
        (dict(num_hidden_layers=0), 'n_layer'),
        (dict(num_attention_heads=3), 'n_head'),
        (dict(hidden_size=None), 'n_embd'),
        (dict(layer_norm_eps='tiny'), 'norm_eps'),
        (dict(hidden_dropout_prob=2), 'dropout'),
    ],
)
def test_a_config_that_does_not_fit(folder, change, says):
    (folder / 'config.json').write_text(json.dumps(ABOUT | change))
    with pytest.raises(ValueError) as e:
        load_bert(folder)
    assert says in str(e.value) and '\n' not in str(e.value)


def mutated(data, draw):
    "Bytes with a few of them changed, some cut off, or some put in."
    data, at = bytearray(data), draw.randrange(len(data))
    kind = draw.choice(('change', 'cut', 'insert', 'header'))
    if kind == 'cut':
        return bytes(data[:at])
    if kind == 'insert':
        return bytes(data[:at] + draw.randbytes(draw.randint(1, 9)) + data[at:])
    if kind == 'header':
        return struct.pack('<Q', draw.choice((0, 1, 2**40, 2**63, 2**64 - 1))) + bytes(data[8:])
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(min(len(data), 3000))] = draw.randrange(256)
    return bytes(data)


@pytest.mark.parametrize('name', ['config.json', 'vocab.txt', 'model.safetensors'])
def test_files_that_were_damaged(folder, name):
    "A model or one line; never another error, a hang or a bomb."
    draw, good, refused = random.Random(7), (folder / name).read_bytes(), 0
    for _ in range(170):
        (folder / name).write_bytes(mutated(good, draw))
        try:
            load_bert(folder)
        except ValueError as e:
            refused += 1
            assert '\n' not in str(e) and len(str(e)) < 1000
    assert refused > 40


def test_more_tokens_than_vectors(folder):
    (folder / 'vocab.txt').write_text('\n'.join([*VOCAB, 'dog']), encoding='utf-8')
    with pytest.raises(ValueError, match='11 tokens, the model 10'):
        load_bert(folder)


@pytest.mark.parametrize('name', ['config.json', 'vocab.txt', 'model.safetensors'])
def test_files_that_are_missing(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_bert(folder)


def test_capitals_numbers_and_places(folder, theirs):
    (folder / 'tokenizer_config.json').write_text('{"do_lower_case": false}')
    with pytest.raises(ValueError, match='capitals'):
        load_bert(folder)
    (folder / 'tokenizer_config.json').unlink()
    weights = load_file(folder / 'model.safetensors')
    weights['embeddings.LayerNorm.weight'][3] = torch.inf
    save_file(weights, folder / 'model.safetensors')
    with pytest.raises(ValueError, match=r'LayerNorm.*not finite'):
        load_bert(folder)
    for nowhere in ('nothing/here/at/all', 'nobody/nothing-at-all-here'):
        with pytest.raises(SourceError):
            load_bert(nowhere, offline=True)
    with pytest.raises(SourceError):
        hub_folder('nobody/nothing-at-all-here', True, ('vocab.txt',))


def test_vectors_do_not_depend_on_the_batch(folder):
    model, tokenizer = load_bert(folder)
    texts = ['a', 'cats cats cats', 'b a', 'a cat . a cat', 'b']
    one, all_ = (sentence_vectors(model, tokenizer, texts, batch_size=b) for b in (1, 5))
    torch.testing.assert_close(one, all_)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(5))
    alone = sentence_vectors(model, tokenizer, [texts[3]])
    torch.testing.assert_close(alone[0], one[3])
    idx = torch.tensor([tokenizer.encode(texts[1])])
    with torch.no_grad():
        by_hand = model(idx)[0].mean(0)
    torch.testing.assert_close(one[1], by_hand / by_hand.norm())
    long = sentence_vectors(model, tokenizer, ['a b ' * 50])
    torch.testing.assert_close(long, sentence_vectors(model, tokenizer, ['a b ' * 7]))


def test_vectors_refuse(folder):
    model, tokenizer = load_bert(folder)
    for texts, size, says in (('a', 32, 'texts'), ([], 32, 'texts'), (['a'], 0, 'batch_size=0')):
        with pytest.raises(ValueError, match=says):
            sentence_vectors(model, tokenizer, texts, size)
    with pytest.raises(ValueError, match='model.eval'):
        sentence_vectors(model.train(), tokenizer, ['a'])


def test_the_published_model():
    try:
        model, tokenizer = minilm()
    except SourceError as e:
        pytest.skip(str(e))
    cat, feline, stocks = sentence_vectors(
        model, tokenizer, ['A cat sits on the mat.', 'A feline rests on a rug.', 'Stocks fell.']
    )
    assert abs(cat @ feline - 0.57) < 0.01 and cat @ stocks < 0.2
    assert model.config.norm_eps == 1e-12 and tokenizer.vocab_size == 30522


def test_film_snippets():
    try:
        tests, tuning, pool = film_split()
    except SourceError as e:
        pytest.skip(str(e))
    assert (len(tests), len(tuning), len(pool)) == (2000, 1000, 7566)
    texts = [t for t, _ in tests + tuning + pool]
    assert len({*texts}) == len(texts) and texts == [t.lower() for t in texts]
    clear = film_snippets(clear=0.5, most=12)
    assert len(clear) == 2555 and sum(label for _, label in clear) > 1200
    rows = snippet_rows('movie')
    assert float(rows[0]['sentiment']) > 2 and len(snippet_rows('amazon')) > 3000
    few = draw_labels(pool, 64, 11)
    assert few == draw_labels(pool, 64, 11) and {*few} < {*draw_labels(pool, 256, 11)}
    assert sum(pool[i][1] for i in few) == 32 and few != draw_labels(pool, 64, 12)


def test_a_draw_is_the_one_of_chapter_13():
    "The same permutation, the first places of each label: its figures are set beside others."
    pool = [(str(i), i % 2) for i in range(40)]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1005)).tolist()
    even, odd = ([i for i in order if i % 2 == label] for label in (0, 1))
    assert draw_labels(pool, 10, 5) == even[:5] + odd[:5]


@pytest.mark.parametrize('n', [0, 3, 12])
def test_labels_that_cannot_be_drawn(n):
    with pytest.raises(ValueError, match=f'n={n}'):
        draw_labels([('a', 0), ('b', 1), ('c', 0), ('d', 1)], n, 0)


def test_names_of_sizes():
    fields = vars(BERTConfig())
    assert {*HUB_SIZES.values()} <= {*fields} and BERT.config_class is BERTConfig
