"""Links for what prose names: papers by their arXiv number, chapters, other libraries' names.

`[arXiv 1706.03762](...)` in a notebook stays as it is; a bare `arXiv 1706.03762` gets its link
here, when the site is made, and so do "chapter 07", `torch.nn.functional.cross_entropy` and the
classes of Hugging Face's transformers. Code, formulas, headings and links are left alone.
"""

import re
from collections import Counter

from cells import ROOT, notebook_paths, read_cells

LEAVE = (
    r'```.*?```|^---\n.*?^---|\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)]*\)|<a\b.*?</a>|<!--.*?-->|<[^>]+>'
    r'|\$\$.*?\$\$|\$[^$\n]+\$|^#{1,6} .*?$|https?://\S+'
)
NAMED = re.compile(
    rf'(?P<leave>{LEAVE})|(?P<code>``?(?P<inside>[^`\n]+)``?)'
    r'|\b(?P<paper>arXiv[: ]?(?P<id>\d{4}\.\d{4,5}))'
    r'|\b(?P<said>[Cc]hapters?) (?P<numbers>\d\d(?:(?:, | and | to | or )\d\d)*)\b',
    re.M | re.S,
)
TORCH = re.compile(r'(torch(?:\.nn\.functional|\.nn|\.optim)?|F|nn)\.([A-Za-z]\w*)(?:\(.*\))?')
NESTED = re.compile(r'\[\[(`[^`]+`)\]\([^)]*\)\]\(')  # nbdev links a name inside of a link
SHORT = {'F': 'torch.nn.functional', 'nn': 'torch.nn'}
FACE = re.compile(r'(GPT2|Bert|Llama|T5|ViT|Whisper)[A-Z]\w+')


def chapter_names():
    "The notebook that each chapter's number stands for: the one that links with it lead to."
    found = {}
    for path in notebook_paths():
        prose = '\n'.join(c['source'] for c in read_cells(path) if c['cell_type'] == 'markdown')
        for number, name in re.findall(r'\[[^\]]*?(\d\d)\]\((?:\.\./)?(\1_\w+\.ipynb)\)', prose):
            found.setdefault(number, Counter())[name] += 1
    for path in sorted((ROOT / 'nbs').glob('[0-9][0-9]_*.ipynb')):
        found.setdefault(path.name[:2], Counter({path.name: 1}))
    here = {number: count.most_common(1)[0][0] for number, count in found.items()}
    return {number: name for number, name in here.items() if (ROOT / 'nbs' / name).exists()}


def library_page(name):
    "The page of another library's documentation about a name in code, or None."
    if match := FACE.fullmatch(name):
        page = f'https://huggingface.co/docs/transformers/model_doc/{match[1].lower()}'
        return f'{page}#transformers.{name}'
    match = TORCH.fullmatch(name)
    if not match:
        return None
    import torch

    module = SHORT.get(match[1], match[1])
    place = torch
    for part in module.split('.')[1:]:
        place = getattr(place, part)
    known = callable(getattr(place, match[2], None)) and match[2] != 'Tensor'
    page = 'https://docs.pytorch.org/docs/stable/generated'
    return f'{page}/{module}.{match[2]}.html' if known else None


def linked(text, own, folder, names):
    "Prose with its links; `own` is the number of the chapter that it stands in."

    def chapter(number):
        known = number in names and number != own
        return f'[{number}]({folder}{names[number]})' if known else number

    def link(m):
        if m['paper']:
            return f'[{m["paper"]}](https://arxiv.org/abs/{m["id"]})'
        if m['code']:
            page = library_page(m['inside'])
            return f'[{m["code"]}]({page})' if page else m[0]
        if m['numbers']:
            first, *others = re.split(r'(?<=\d)(?=\D)|(?<=\D)(?=\d\d)', m['numbers'])
            alone = not others and first in names and first != own
            if alone:
                return f'[{m["said"]} {first}]({folder}{names[first]})'
            return f'{m["said"]} ' + re.sub(r'\d\d', lambda n: chapter(n[0]), m['numbers'])
        return m[0]

    return NAMED.sub(link, NESTED.sub(r'[\1](', text))


def prose_links(nb, path, names):
    "Link what the prose of a notebook, and the docstrings that its page shows, name."
    own, folder = path.name[:2], '../' * (len(path.parts) - 1)
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown':
            cell['source'] = linked(''.join(cell['source']), own, folder, names)
        if cell['cell_type'] != 'code' or 'show_doc(' not in ''.join(cell['source']):
            continue
        for out in cell.get('outputs', []):
            data = out.get('data', {})
            if 'text/markdown' in data:
                text = ''.join(data['text/markdown'])
                data['text/markdown'] = linked(text, own, folder, names)
