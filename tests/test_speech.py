"Sound and speech: Whisper's picture, Whisper's architecture, padding that changes nothing."

import functools
import math
import platform

import pytest
import torch
from torch import nn

from transformer_course.bigram import IGNORE_INDEX as X
from transformer_course.checkpoint import load_model, save_checkpoint
from transformer_course.fetching import SourceError, cached
from transformer_course.seq2seq import END
from transformer_course.sound import (
    BANDWIDTHS,
    TELEPHONE,
    VOWELS,
    add_noise,
    hz_to_mel,
    log_mel,
    mel_filters,
    mel_to_hz,
    random_words,
    resample,
    say,
    spoken,
    voice,
)
from transformer_course.speech import (
    SpeechConfig,
    SpeechTransformer,
    char_error_rate,
    edit_distance,
    forward_share,
    listening,
    to_targets,
    to_words,
    transcribe,
)
from transformer_course.training import TrainConfig, train
from transformer_course.wheels import WHEELS

NEAR = dict(atol=1e-5, rtol=1e-4)
SIZES = dict(n_layer=2, n_head=4, n_embd=48, n_mels=6, n_frames=20, block_size=8, vocab_size=11)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def some_model(**changes):
    "Random weights large enough for every part to matter."
    model = SpeechTransformer(SpeechConfig(**SIZES | changes), rng())
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=rng(p.numel()))
    return model.eval()


def some_clips():
    mel, lengths = torch.randn(3, 9, 6, generator=rng(1)), torch.tensor([9, 6, 1])
    return mel, lengths, torch.tensor([[2, 5, 3, END], [4, END, X, X], [END, X, X, X]])


# ---------------------------------------------------------------- sound


def test_a_voice_against_scipy():
    signal = pytest.importorskip('scipy.signal')
    formants = torch.tensor([[300.0, 900.0, 2300.0], [700.0, 1700.0, 2500.0]])
    pulses = torch.zeros(2, 1000)
    pulses[0, ::80], pulses[1, ::50] = 1, 1
    expected = pulses.double().numpy()
    for row, (own, x) in enumerate(zip(formants.tolist(), expected)):
        for f, b in zip(own, BANDWIDTHS):
            r = math.exp(-math.pi * b / 8000)
            back = [1, -2 * r * math.cos(2 * math.pi * f / 8000), r * r]
            x = signal.lfilter([sum(back)], back, x)
        expected[row] = x
    made = voice(formants, torch.tensor([100.0, 160.0]), 1000)
    torch.testing.assert_close(made.double(), torch.tensor(expected), atol=1e-5, rtol=1e-3)


def test_words_and_their_letters():
    words = random_words(40, rng())
    wave, samples = say(words, rng(1))
    assert samples.shape == (40, max(map(len, words))) and wave.shape[1] == samples.sum(1).max()
    assert [int((row > 0).sum()) for row in samples] == [len(w) for w in words]
    for row, n in zip(wave, samples.sum(1)):
        assert not row[n:].any() and row[:n].abs().max() > 0.5
    assert torch.equal(say(words, rng(1))[0], wave) and not torch.equal(say(words, rng(2))[0], wave)


@pytest.mark.parametrize('snr', [20.0, 0.0, -5.0])
def test_noise_is_as_loud_as_stated(snr):
    wave, lengths = torch.zeros(2, 30000), torch.tensor([30000, 20000])
    wave[0], wave[1, :20000] = 0.1, 3.0
    noise = add_noise(wave, lengths, snr, rng()) - wave
    power = [row[:n].square().mean() for row, n in zip(noise, lengths.tolist())]
    assert abs(10 * math.log10(0.01 / power[0]) - snr) < 0.2
    assert abs(10 * math.log10(9.0 / power[1]) - snr) < 0.2
    assert not noise[1, 20000:].any()


SETTINGS = [(16000, 400, 80), (16000, 400, 128), (8000, 256, 40), (22050, 1024, 64)]


@pytest.mark.parametrize('sample_rate, n_fft, n_mels', SETTINGS)
def test_filters_against_transformers(sample_rate, n_fft, n_mels):
    audio = pytest.importorskip('transformers.audio_utils')
    ends = 0.0, sample_rate / 2, sample_rate
    theirs = audio.mel_filter_bank(n_fft // 2 + 1, n_mels, *ends, norm='slaney', mel_scale='slaney')
    ours = mel_filters(sample_rate, n_fft, n_mels)
    torch.testing.assert_close(ours, torch.tensor(theirs).float(), atol=1e-7, rtol=1e-4)


def test_picture_against_whisper():
    transformers = pytest.importorskip('transformers')
    wave = say(['iɑu', 'ɝæo'], rng(), 16000, 10.0)[0].flatten()
    theirs = transformers.WhisperFeatureExtractor()
    for features in (theirs._np_extract_fbank_features, theirs._torch_extract_fbank_features):
        expected = torch.tensor(features(wave[None].numpy(), 'cpu')[0]).mT
        torch.testing.assert_close(log_mel(wave), expected, atol=1e-4, rtol=0)


def test_silence_lies_eight_powers_below_the_loudest_spot():
    wave = torch.zeros(8000)
    wave[2000:4000] = torch.sin(torch.arange(2000) * 0.3)
    picture = log_mel(wave)
    assert picture[40:].unique().tolist() == [picture.min()]
    torch.testing.assert_close(picture.max() - picture.min(), torch.tensor(2.0))  # 8 / 4


def test_mel_scale():
    hz = torch.linspace(0, 8000, 50)
    torch.testing.assert_close(mel_to_hz(hz_to_mel(hz)), hz, atol=1e-2, rtol=1e-5)
    assert (hz_to_mel(hz).diff() > 0).all() and hz_to_mel(torch.tensor(1000.0)) == 15


def test_resample_against_scipy():
    signal = pytest.importorskip('scipy.signal')
    wave = torch.randn(999, generator=rng()).double()
    for new in (363, 501, 1501):  # odd: the two treat the last frequency of an even n differently
        expected = torch.tensor(signal.resample(wave.numpy(), new))
        torch.testing.assert_close(resample(wave, 999, new), expected)


def test_sound_errors():
    for wave, changes, what in (
        (torch.zeros(2, 3, 400), {}, 'wave has shape'),
        (torch.zeros(0), {}, 'wave has shape'),
        (torch.zeros(500).short(), {}, 'dtype'),
        (torch.zeros(200), {}, '200 samples'),
        (torch.zeros(500), dict(sample_rate=0), 'sample_rate=0'),
        (torch.zeros(500), dict(n_mels=200), 'without a frequency'),
        (torch.zeros(500), dict(hop=0), 'hop=0'),
    ):
        with pytest.raises(ValueError, match=what):
            log_mel(wave, **changes)
    with pytest.raises(ValueError, match='x'):
        say(['ix'], rng())


def test_the_engine():
    wheel, here = WHEELS['espeakng-loader'], (platform.system(), platform.machine())
    if here != ('Linux', 'x86_64'):
        with pytest.raises(SourceError):
            spoken([('one', 'en-us+m3', 150, 50)])
        return
    if cached(f'wheels/{wheel.package}-{wheel.version}.whl', wheel.sha256) is None:
        pytest.skip('the engine is not in the cache')
    jobs = [('one', 'en-us+m3', s, 50) for s in (120, 240)] + [('two', 'en-us+m3', 120, 50)]
    slow, fast, other = spoken(jobs)
    assert 8000 > len(slow) > len(fast) > 800 and len(other) != len(slow)
    assert torch.equal(spoken(jobs)[1], fast)
    with pytest.raises(ValueError, match='nobody'):
        spoken([('one', 'nobody', 150, 50)])


# ---------------------------------------------------------------- the model


def copy_attention(ours, theirs):
    q, k, v = theirs.q_proj, theirs.k_proj, theirs.v_proj
    ours.c_attn.weight.copy_(torch.cat([q.weight, k.weight, v.weight]))
    ours.c_attn.bias.copy_(torch.cat([q.bias, torch.zeros_like(q.bias), v.bias]))
    ours.c_proj.load_state_dict(theirs.out_proj.state_dict())


def copy_layers(ours, theirs):
    for mine, other in zip(ours, theirs):
        copy_attention(mine.attn, other.self_attn)
        mine.ln_1.load_state_dict(other.self_attn_layer_norm.state_dict())
        mine.ln_2.load_state_dict(other.final_layer_norm.state_dict())
        mine.mlp.c_fc.load_state_dict(other.fc1.state_dict())
        mine.mlp.c_proj.load_state_dict(other.fc2.state_dict())
        if mine.cross:
            copy_attention(mine.crossattention, other.encoder_attn)
            mine.ln_cross_attn.load_state_dict(other.encoder_attn_layer_norm.state_dict())


def whisper(transformers):
    sizes = dict(encoder_layers=2, decoder_layers=2, d_model=48, vocab_size=11, num_mel_bins=6)
    sizes |= dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=192)
    sizes |= dict(decoder_ffn_dim=192, max_source_positions=10, max_target_positions=8)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1)
    config = transformers.WhisperConfig(**sizes, **special, suppress_tokens=None)
    theirs = transformers.WhisperModel(config).eval()
    for p in theirs.parameters():
        p.requires_grad_(False)
        nn.init.normal_(p, std=0.3, generator=rng(p.numel()))
    return theirs


def test_equals_whisper():
    theirs, ours = whisper(pytest.importorskip('transformers')), some_model()
    with torch.no_grad():
        theirs.encoder.embed_positions.weight.copy_(ours.encoder.waves)
        copy_layers(ours.encoder.h, theirs.encoder.layers)
        copy_layers(ours.h, theirs.decoder.layers)
        ours.ln_f.load_state_dict(theirs.decoder.layer_norm.state_dict())
        ours.encoder.ln_f.load_state_dict(theirs.encoder.layer_norm.state_dict())
        ours.encoder.conv1.load_state_dict(theirs.encoder.conv1.state_dict())
        ours.encoder.conv2.load_state_dict(theirs.encoder.conv2.state_dict())
        ours.wte.weight.copy_(theirs.decoder.embed_tokens.weight)
        ours.wpe.weight.copy_(theirs.decoder.embed_positions.weight)
        mel = torch.randn(3, 20, 6, generator=rng(2))
        tokens = torch.randint(11, (3, 8), generator=rng(3))
        out = theirs(input_features=mel.mT, decoder_input_ids=tokens)
        memory, mask = ours.encoder(mel, torch.tensor([20, 20, 20]))
        logits = ours.decode(tokens, memory, mask)
    expected = out.last_hidden_state @ theirs.decoder.embed_tokens.weight.T
    assert out.encoder_last_hidden_state.std() > 0.1 and expected.std() > 0.1
    torch.testing.assert_close(memory, out.encoder_last_hidden_state, **NEAR)
    torch.testing.assert_close(logits, expected, **NEAR)


def test_padding_changes_nothing():
    model, (mel, lengths, targets) = some_model(), some_clips()
    filled = mel.clone()
    for row, n in zip(filled, lengths.tolist()):
        row[n:] = float('nan')
    batched, _ = model(filled, lengths, targets)
    assert batched.isfinite().all()
    for i, n in enumerate(lengths.tolist()):
        m = int((targets[i] != X).sum())
        alone, _ = model(mel[i : i + 1, :n], lengths[i : i + 1], targets[i : i + 1, :m])
        torch.testing.assert_close(alone[0], batched[i, :m], **NEAR)


def test_the_decoder_sees_the_past_and_the_clip():
    model, (mel, lengths, targets) = some_model(), some_clips()
    logits = model(mel, lengths, targets)[0][0]
    later = targets.clone()
    later[0, 1] = 7
    assert torch.equal(model(mel, lengths, later)[0][0, :2], logits[:2])
    assert not torch.allclose(model(mel, lengths, later)[0][0, 2], logits[2])
    other = mel.clone()
    other[0, 8] += 1  # the last column is heard by the first token
    assert not torch.allclose(model(other, lengths, targets)[0][0, 0], logits[0])


def test_order_is_in_the_rows_of_the_memory():
    model, (mel, lengths, _) = some_model(), some_clips()
    memory, mask = model.encoder(mel[:1], lengths[:1])
    tokens, order = torch.tensor([[END, 3]]), torch.tensor([4, 2, 0, 1, 3])
    logits = model.decode(tokens, memory, mask)
    torch.testing.assert_close(model.decode(tokens, memory[:, order], mask), logits, **NEAR)
    turned, mask = model.encoder(mel[:1].flip(1), lengths[:1])
    assert not torch.allclose(model.decode(tokens, turned, mask), logits, atol=1e-3)


def test_weights_are_those_that_are_used():
    model, (mel, lengths, targets) = some_model(), some_clips()
    tokens, written = targets.clamp(min=0), []
    for block in model.h:
        block.crossattention.register_forward_hook(lambda m, args, out: written.append((args, out)))
    maps = listening(model, mel, lengths, tokens)
    assert maps.shape == (2, 3, 4, 4, 5) and not any(m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 4, 4))
    assert not maps[:, 1, ..., 3:].any() and not maps[:, 2, ..., 1:].any()
    for block, weights, ((asked, memory), out) in zip(model.h, maps, written):
        layer = block.crossattention
        _, _, v = layer.heads(asked, memory)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(layer.c_proj(mixed), out, **NEAR)


def test_writing_is_greedy():
    model, (mel, lengths, _) = some_model(), some_clips()
    written = transcribe(model, mel, lengths)
    assert written.shape[0] == 3 and 1 <= written.shape[1] <= 8
    for i, n in enumerate(lengths.tolist()):
        memory, mask = model.encoder(mel[i : i + 1, :n], lengths[i : i + 1])
        tokens = [END]
        for _ in range(written.shape[1]):
            logits = model.decode(torch.tensor([tokens]), memory, mask)
            tokens.append(int(logits[0, -1].argmax()))
            if tokens[-1] == END:
                break
        tokens = tokens[1:] + [END] * (written.shape[1] + 1 - len(tokens))
        assert written[i].tolist() == tokens


def test_nothing_is_written_after_the_end(monkeypatch):
    model, (mel, lengths, _) = some_model(), some_clips()
    script = torch.tensor([[5, 6, END, 7], [END, 8, 8, 8], [4, END, 9, 9]])

    def decode(tokens, memory, mask):
        return nn.functional.one_hot(script[:, : tokens.shape[1]], 11).float()

    monkeypatch.setattr(model, 'decode', decode)
    assert transcribe(model, mel, lengths).tolist() == [[5, 6, END], [END] * 3, [4, END, END]]
    assert transcribe(model, mel, lengths, 2).tolist() == [[5, 6], [END] * 2, [4, END]]


BAD = [
    (lambda m, n, t: (m[0], n, t), 'mel has shape'),
    (lambda m, n, t: (m[..., :4], n, t), 'mel has shape'),
    (lambda m, n, t: (m.long(), n, t), 'dtype'),
    (lambda m, n, t: (torch.zeros(3, 21, 6), n, t), 'n_frames=20'),
    (lambda m, n, t: (m, n[:2], t), 'lengths has shape'),
    (lambda m, n, t: (m, n * 0, t), 'lengths='),
    (lambda m, n, t: (m, n + 1, t), 'lengths='),
    (lambda m, n, t: (m, n, t[:, :3]), 'row 0'),
    (lambda m, n, t: (m, n, t.float()), 'dtype'),
    (lambda m, n, t: (m, n, torch.tensor([[2, X, END]] * 3)), 'row 0'),
    (lambda m, n, t: (m, n, torch.tensor([[END, END]] * 3)), 'row 0'),
    (lambda m, n, t: (m, n, torch.tensor([[11, END]] * 3)), 'vocab_size=11'),
    (lambda m, n, t: (m, n, torch.tensor([[2] * 8 + [END]] * 3)), 'block_size=8'),
]


@pytest.mark.parametrize('change, what', BAD)
def test_bad_batches(change, what):
    with pytest.raises(ValueError, match=what):
        some_model()(*change(*some_clips()))


@pytest.mark.parametrize('bad', [dict(n_mels=0), dict(n_frames=0), dict(vocab_size=2)])
def test_bad_shapes(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SpeechConfig(**SIZES | bad)


def test_checkpoint(tmp_path):
    model, batch = some_model(norm='rms', bias=False), some_clips()
    save_checkpoint(tmp_path / 'run', model)
    again, about = load_model(tmp_path / 'run')
    assert about['model'] == 'SpeechTransformer' and again.config == model.config
    assert torch.equal(again(*batch)[0], model(*batch)[0])


def test_one_seed_is_one_run():
    alphabet = ''.join(VOWELS)

    def batch(generator):
        words = random_words(4, generator)
        wave, samples = say(words, generator, snr=10.0)
        mel, columns = log_mel(wave, **TELEPHONE), samples.sum(1) // TELEPHONE['hop']
        return mel, columns, to_targets(words, alphabet)

    def run(seed):
        sizes = dict(SIZES, n_mels=40, n_frames=64, vocab_size=14)
        model = SpeechTransformer(SpeechConfig(**sizes), rng(seed))
        return train(model, batch, TrainConfig(max_iters=6, seed=seed)).losses

    torch.manual_seed(5)
    first = run(1)
    torch.manual_seed(6)
    assert run(1) == first != run(2) and first[-1] < first[0]


# ---------------------------------------------------------------- counting


def test_edit_distance_against_the_definition():
    @functools.cache
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        last = slow(a[:-1], b[:-1]) + (a[-1] != b[-1])
        return min(last, slow(a[:-1], b) + 1, slow(a, b[:-1]) + 1)

    words = random_words(25, rng(), 1, 6) + ['']
    for a in words:
        for b in words:
            assert edit_distance(a, b) == slow(a, b) == edit_distance(b, a)
    assert char_error_rate(['', 'ab'], ['abc', 'ab']) == 3 / 5
    with pytest.raises(ValueError, match='said has'):
        char_error_rate([''], [''])


def test_tokens_and_words():
    words = ['ba', '', 'abc']
    targets = to_targets(words, 'abc')
    assert targets.tolist() == [[3, 2, END, X], [END, X, X, X], [2, 3, 4, END]]
    assert to_words(targets, 'abc') == words
    assert to_words(torch.tensor([[2, 0, END, 3]]), 'abc') == ['a?']
    with pytest.raises(ValueError, match='x'):
        to_targets(['ax'], 'abc')


def test_forward_share():
    places = torch.tensor([[0, 2, 2, 1], [5, 4, 0, 0]])
    assert forward_share(places, torch.tensor([4, 2])) == 2 / 4
    assert forward_share(places, torch.tensor([3, 1])) == 1.0
