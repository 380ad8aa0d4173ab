"""The Transformer, from a bigram to a GPT: `from transformer_course import GPT, train`."""

__version__ = "0.6.2"

from importlib import import_module as _import_module

_HOME = {
    'CharTokenizer': 'data',
    'get_batch': 'data',
    'BigramLanguageModel': 'bigram',
    'scaled_dot_product_attention': 'attention',
    'MultiHeadAttention': 'multihead',
    'Block': 'block',
    'BlockConfig': 'block',
    'GPT': 'gpt',
    'GPTConfig': 'gpt',
    'BPETokenizer': 'tokenizer',
    'TrainConfig': 'training',
    'train': 'training',
    'load_model': 'checkpoint',
    'generate': 'generation',
    'load_text': 'sources',
}
__all__ = ['__version__', *_HOME]


def __getattr__(name: str):
    "Import a name of `__all__` when it is first asked for: `import transformer_course` alone costs nothing."
    if name not in _HOME:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(_import_module(f'{__name__}.{_HOME[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
