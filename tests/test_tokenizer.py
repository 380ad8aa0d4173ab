"The tokenizer against slow and foreign implementations, on texts that hypothesis makes up."

import functools
import json
import random
from collections import Counter

import pytest

from transformer_course import streams
from transformer_course import tokenizer as T
from transformer_course.fetching import SourceError
from transformer_course.sources import load_text
from transformer_course.tokenizer import (
    BPETokenizer,
    ByteVocabulary,
    learn_merges,
    merge_bytes,
    split_pieces,
)
from transformer_course.vocabularies import gpt2_encoding

hypothesis = pytest.importorskip('hypothesis')
from hypothesis import example, given, settings
from hypothesis import strategies as st

cut_stream = functools.partial(streams.cut_stream, split=split_pieces)

END = '<|endoftext|>'
PROSE = (
    "First Citizen:\nWe'll speak, won't we?  I've 3 tongues, and he's 12,\n\n"
    "\tall proud; they'd say 'tis so.\n"
    'Naïve café owners déjà vu — 猫と犬 🙂🙂 नमस्ते\r\n'
    * 3
    + 'the cat sat on the mat, the rat that sat on the cat. ' * 5
)
everyday = settings(max_examples=200, deadline=None)
awkward = st.sampled_from(
    [
        "'",
        's',
        'll',
        "'ve",
        ' ',
        '  ',
        '\n',
        '\t',
        '\x1c',
        '\x85',
        '\u2028',
        '\ufeff',
        '\u0301',
        'é',
        '猫',
        '🙂',
        '\ud83d',
        '\ude42',
        '٣',
        '7',
        'a',
        'the',
        '!',
        '<|',
        END,
        'endoftext|>',
        '\U000323b0',
        '\U0001e900',
    ]
)
any_char = st.characters(exclude_categories=())  # surrogates too
texts = st.lists(st.one_of(awkward, any_char), max_size=40).map(''.join)


@pytest.fixture(scope='module')
def tok():
    return BPETokenizer.train(PROSE, 360, [END])


@pytest.fixture(scope='module')
def fast(tok):
    return tok.to_tiktoken()


def naive_merges(pieces, n):
    "Count all, merge the most frequent pair (among equals the smallest ids); shares no code."
    words, merges = [(list(p), w) for p, w in pieces.items()], []
    for new in range(256, 256 + n):
        table = {}
        for ids, w in words:
            for k in range(len(ids) - 1):
                table[ids[k], ids[k + 1]] = table.get((ids[k], ids[k + 1]), 0) + w
        if not table:
            break
        most = max(table.values())
        best = sorted(p for p, c in table.items() if c == most)[0]
        merges.append(best)
        for ids, _ in words:
            k = 0
            while k < len(ids) - 1:
                if (ids[k], ids[k + 1]) == best:
                    ids[k : k + 2] = [new]
                k += 1
    return merges


def naive_ids(piece, tokens):
    "Apply each merge in the order of learning, all over the piece."
    parts = [bytes([b]) for b in piece]
    for token in tokens[256:]:
        k = 0
        while k < len(parts) - 1:
            if parts[k] + parts[k + 1] == token:
                parts[k : k + 2] = [token]
            k += 1
    return [tokens.index(p) for p in parts]


def flat(chunks, specials, **kw):
    "Pieces and special tokens of a stream, in order."
    stream = cut_stream(chunks, allowed=specials, **kw)
    return [x for pieces, special in stream for x in (*pieces, special) if x]


def repaired(text):
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


# training


@everyday
@given(
    st.dictionaries(
        st.binary(min_size=1, max_size=12) | st.text('ab', min_size=1, max_size=12).map(str.encode),
        st.integers(1, 4),
        max_size=8,
    ),
    st.integers(0, 60),
)
@example({b'aaaa': 1}, 9)
@example({b'aaaaaaa': 1, b'baaab': 2}, 9)
@example({}, 3)
def test_merges_equal_a_naive_trainer(pieces, n):
    assert learn_merges(pieces, n) == naive_merges(pieces, n)


def test_merges_of_a_text_equal_a_naive_trainer():
    pieces = {p.encode(): n for p, n in Counter(split_pieces(PROSE)).items()}
    tokens = [bytes([i]) for i in range(256)]
    for a, b in naive_merges(pieces, 120):
        tokens.append(tokens[a] + tokens[b])
    assert BPETokenizer.train(PROSE, 376).tokens == tokens


@pytest.fixture(scope='module')
def play():
    "Tiny Shakespeare, or what `load_text` gives in its place."
    return load_text().text


def test_tokens_equal_hugging_face(play):
    "8,192 tokens of a real text, ties included: theirs is the smaller pair of ids, as ours."
    hf = pytest.importorskip('tokenizers')
    letters = [
        chr(0x400 + b) for b in range(256)
    ]  # a character for each byte, in the order of the bytes
    trainer = hf.trainers.BpeTrainer(vocab_size=8192, initial_alphabet=letters, show_progress=False)
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.train_from_iterator(
        (''.join(letters[b] for b in p.encode()) for p in split_pieces(play)), trainer
    )
    vocab = theirs.get_vocab()
    tokens = [bytes(ord(c) - 0x400 for c in t) for t in sorted(vocab, key=vocab.get)]
    assert BPETokenizer.train(play, 8192).tokens == tokens


def test_pieces_equal_hugging_face(play):
    hf = pytest.importorskip('tokenizers')
    theirs = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    for text in (play, PROSE):
        assert [text[a:b] for _, (a, b) in theirs.pre_tokenize_str(text)] == split_pieces(text)


def test_special_tokens_part_the_training_text():
    assert BPETokenizer.train(f'ab{END}cd' * 5, 258, [END]).tokens[256:] == [b'ab']
    joined = BPETokenizer.train(f'ab{END}cd' * 5, 300, [END]).tokens
    assert not any(b'bc' in t or b'end' in t or b'<' in t[1:] for t in joined[256:])


def test_training_in_chunks(play):
    chunks = [play[i : i + 777] for i in range(0, 200_000, 777)]
    assert (
        BPETokenizer.train(iter(chunks), 600).tokens
        == BPETokenizer.train(''.join(chunks), 600).tokens
    )


# encoding


@everyday
@given(st.text('theandous ', max_size=30).map(str.encode) | st.binary(max_size=30))
def test_ids_of_a_piece_equal_merge_by_merge(tok, piece):
    assert merge_bytes(piece, tok.ranks) == naive_ids(piece, tok.tokens)


@settings(max_examples=1000, deadline=None)
@given(texts)
def test_ids_equal_tiktoken(tok, fast, text):
    assert tok.encode(text, disallowed_special=()) == fast.encode(text, disallowed_special=())
    assert tok.encode(text, allowed_special='all') == fast.encode(text, allowed_special='all')
    assert tok.encode(text, {END}) == fast.encode(text, allowed_special={END})


@everyday
@given(texts)
def test_refuses_what_tiktoken_refuses(tok, fast, text):
    if END in text:
        for encoding in (tok, fast):
            with pytest.raises(ValueError, match='endoftext'):
                encoding.encode(text)
    else:
        assert tok.encode(text) == fast.encode(text)


@everyday
@given(texts)
def test_round_trip(tok, text):
    for how in (dict(disallowed_special=()), dict(allowed_special='all')):
        assert tok.decode(tok.encode(text, **how)) == repaired(text)


@everyday
@given(st.binary(max_size=60) | st.text(max_size=20).map(str.encode))
def test_any_bytes_round_trip(tok, fast, data):
    assert tok.decode_bytes(tok.encode_bytes(data)) == data
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    assert tok.encode_bytes(data) == fast.encode_ordinary(text)


@everyday
@given(st.lists(st.integers(0, 359), max_size=30))
def test_decode_equals_tiktoken(tok, fast, ids):
    assert tok.decode(ids) == fast.decode(ids) and tok.decode_bytes(ids) == fast.decode_bytes(ids)


@settings(max_examples=500, deadline=None)
@given(st.lists(texts | st.just(''), max_size=8), st.sampled_from([0, 0, 7, 4096]))
@example(["a'", 'l', 'l'], 0)
@example(['a ', ' ', ' b'], 0)
@example(['\ud83d', '\ude42'], 0)
@example(['\ud83d', '', 'a'], 0)
@example(['<|endof', 'text|', '>', ' x'], 0)
def test_chunks_change_nothing(tok, chunks, buffer):
    assert flat(chunks, [END], buffer=buffer) == flat([''.join(chunks)], [END])
    assert list(tok.encode_stream(chunks, 'all')) == tok.encode(''.join(chunks), 'all')


@settings(max_examples=500, deadline=None)
@given(texts, st.integers(1, 5), st.sampled_from([[], [END]]))
@example("I'll", 1, [])
@example('a  b', 1, [])
def test_small_chunks(tok, text, size, specials):
    "Without special tokens fewer characters are held back: what the pattern itself needs."
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    assert flat(parts, specials, buffer=0) == flat([text], specials, buffer=0)


def test_a_stream_refuses_special_tokens_that_are_split(tok):
    with pytest.raises(ValueError, match='endoftext'):
        list(tok.encode_stream(['a<|endof', 'text|>']))


def test_a_stream_needs_little_memory(tok):
    "Ids come out long before the text ends, and little is kept back."
    read = 0

    def chunks():
        nonlocal read
        for _ in range(10_000):
            read += 1
            yield 'the cat sat on the mat. ' * 10

    stream = tok.encode_stream(chunks())
    for _ in range(1000):
        next(stream)
    assert read < 100


def test_memory_of_pieces_is_bounded(tok, monkeypatch):
    monkeypatch.setattr(T, 'CACHE_SIZE', 10)
    mine = BPETokenizer(tok.tokens)
    text = ' '.join(map(str, range(1000))) + ' ' + 'x' * 1000 + '! the end'
    assert mine.encode(text) == tok.encode(text)
    assert len(mine.cache) <= 10 and max(map(len, mine.cache)) <= T.CACHE_LENGTH


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    'text',
    [
        '',
        'a' * 1_000_000,
        'ab' * 300_000,
        ' ' * 200_000 + 'x',
        '\n' * 300_000,
        '🙂' * 100_000,
        '-' * 500_000,
    ],
)
def test_huge_pieces(tok, fast, text):
    assert tok.encode(text) == fast.encode(text)
    assert list(
        tok.encode_stream(text[i : i + 5000] for i in range(0, len(text), 5000))
    ) == tok.encode(text)


@pytest.mark.parametrize('first', 'a1!')
def test_every_letter_of_unicode(first):
    """Whatever edition of Unicode each library has. The tokens join `first` to the first byte of
    what follows, so a cut in front of a character shows in the ids."""
    tok = BPETokenizer(
        [bytes([i]) for i in range(256)]
        + [first.encode() + bytes([lead]) for lead in range(0xC2, 0xF5)]
    )
    text = ''.join(
        first + chr(c)
        for c in (*range(0x80, 0x10000), *range(0x10000, 0x110000, 5))
        if not 0xD800 <= c < 0xE000
    )
    assert tok.encode(text) == tok.to_tiktoken().encode(text)


def test_several_special_tokens():
    specials = ['<|user|>', '<|bot|>', 'é!']
    tok = BPETokenizer.train(PROSE, 300, specials)
    fast, rng = tok.to_tiktoken(), random.Random(0)
    assert (
        list(tok.special_tokens.values()) == [297, 298, 299]
        and tok.vocab_size == fast.n_vocab == 300
    )
    for _ in range(500):
        text = ''.join(rng.choices([*specials, 'the', ' ', '\n', 'é', '!', '<|'], k=12))
        for how in (
            dict(allowed_special='all'),
            dict(allowed_special={'<|bot|>'}, disallowed_special=()),
            dict(disallowed_special=()),
        ):
            assert tok.encode(text, **how) == fast.encode(text, **how)
    with pytest.raises(ValueError, match='bot'):
        tok.encode('<|user|> <|bot|>', allowed_special={'<|user|>'})
    with pytest.raises(ValueError, match='allowed_special'):
        tok.encode('x', allowed_special='<|user|>')


def test_gpt2(play):
    try:
        gpt2 = gpt2_encoding()
    except SourceError as e:
        pytest.skip(str(e))
    ours = BPETokenizer([gpt2.decode_single_token_bytes(i) for i in range(50256)], [END])
    for text in (play, PROSE):
        assert ours.encode(text) == gpt2.encode(text)
    assert ours.encode(f'a{END}', 'all') == [64, 50256]


# files and mistakes


def test_save_and_load(tok, tmp_path):
    tok.save(tmp_path / 't.json')
    back = BPETokenizer.load(tmp_path / 't.json')
    assert (
        type(back) is BPETokenizer
        and back.tokens == tok.tokens
        and back.special_tokens == tok.special_tokens
    )
    assert back.encode(PROSE) == tok.encode(PROSE)
    assert json.loads((tmp_path / 't.json').read_text())['kind'] == 'bpe'


@pytest.mark.parametrize(
    'damage',
    [
        lambda s: s[:-30],
        lambda s: '',
        lambda s: '\x00\xff',
        lambda s: '[]',
        lambda s: 'null',
        lambda s: '{"kind": "char", "chars": "ab"}',
        lambda s: '{"kind": "bpe"}',
        lambda s: s.replace('"tokens": [', '"tokens": [1, '),
        lambda s: s.replace('" the"', '"猫"'),
        lambda s: '{"kind": "bpe", "tokens": 5, "special_tokens": []}',
        lambda s: s.replace('"special_tokens": [', '"special_tokens": [3, '),
    ],
)
def test_damaged_files(tok, tmp_path, damage):
    path = tmp_path / 't.json'
    tok.save(path)
    good = path.read_text()
    assert damage(good) != good
    path.write_text(damage(good), encoding='latin-1' if '\xff' in damage(good) else 'utf-8')
    with pytest.raises(ValueError, match='is not a saved BPETokenizer'):
        BPETokenizer.load(path)


def test_wrong_tokens():
    singles = [bytes([i]) for i in range(256)]
    for tokens, match in (
        (singles[1:], '256 single bytes'),
        (singles + [b'ab', b'ab'], 'twice'),
        (singles + [b'abc'], 'two earlier'),
        (singles + [b''], 'two earlier'),
        ([*'ab'], 'bytes'),
    ):
        with pytest.raises(ValueError, match=match):
            ByteVocabulary(tokens)
    for specials in (['a', 'a'], ['<|a', '<|a|>'], [''], [5], ['a', 5], END):
        with pytest.raises(ValueError, match='special_tokens'):
            ByteVocabulary(singles, specials)
        with pytest.raises(ValueError, match='special_tokens'):
            BPETokenizer.train('abc', 300, specials)


def test_wrong_arguments(tok):
    with pytest.raises(ValueError, match='vocab_size=256'):
        BPETokenizer.train('abc', 256, [END])
    for empty in ('', [], ['', '']):
        with pytest.raises(ValueError, match='empty'):
            BPETokenizer.train(empty, 300)
    for wrong in (b'bytes', 5, None):
        with pytest.raises(ValueError, match='give a string'):
            tok.encode(wrong)
    with pytest.raises(ValueError, match='give a string'):
        BPETokenizer.train(b'bytes', 300)
    for ids in ([360], [-1], [10**9]):
        with pytest.raises(ValueError, match='ends at 359'):
            tok.decode(ids)
