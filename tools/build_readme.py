"""Write README.md from nbs/index.ipynb, so that the two never differ.

    python tools/build_readme.py           write README.md (and README_files/ for figures)
    python tools/build_readme.py --check   write nothing; exit 1 if they are out of date

Hidden and exported cells are left out, outputs are kept, and links are made right for a file in the
repository's root.
"""

import argparse
import base64
import json
import re
import sys

from cells import ROOT, directives, settings
from page_cells import addresses

sys.path.insert(0, str(ROOT))
from transformer_course.files import write_file

SHIELD = 'https://img.shields.io/badge'
COLAB = 'https://colab.research.google.com/assets/colab-badge.svg'
HIDDEN = {'hide', 'export', 'exports', 'exporti', 'default_exp'}
DIRECTIVE = re.compile(r'^#\|.*\n?', re.M)
ANSI = re.compile(r'\x1b\[[\d;]*m')


def relink(text):
    "Markdown written in nbs/ with its relative links and images pointing from the root."

    def path(target):
        if re.match(r'[a-zA-Z][\w+.-]*:|#|//|/', target):
            return target
        return target[3:] if target.startswith('../') else f'nbs/{target}'

    text = re.sub(r'(\]\()([^)\s]+)', lambda m: m[1] + path(m[2]), text)
    return re.sub(
        r'(<(?:img|source)\b[^>]*?\b(?:src|srcset)=")([^"]+)|(<a\b[^>]*?\bhref=")([^"]+)',
        lambda m: (m[1] or m[3]) + path(m[2] or m[4]),
        text,
    )


def outside_code(text, change):
    "Apply `change` to Markdown, but not inside fenced code."
    parts = re.split(r'(^```.*?^```[^\n]*$)', text, flags=re.M | re.S)
    return ''.join(part if part.startswith('```') else change(part) for part in parts)


def hidden(source):
    "True for a cell that readers do not see."
    known = directives(source)
    return bool(HIDDEN & known.keys()) or known.get('include') == 'false'


def output(out, files):
    "Markdown for one output of a cell; pictures are added to `files`."
    if out['output_type'] == 'stream':
        return f"```\n{ANSI.sub('', ''.join(out['text'])).rstrip()}\n```"
    if out['output_type'] == 'error':
        raise SystemExit('build_readme: nbs/index.ipynb holds an error; execute it first')
    data = {kind: ''.join(value) for kind, value in out['data'].items()}
    for kind, ending in (('image/svg+xml', 'svg'), ('image/png', 'png')):
        if kind in data:
            name = f'README_files/figure-{len(files) + 1}.{ending}'
            files[name] = data[kind].encode() if ending == 'svg' else base64.b64decode(data[kind])
            return f'![]({name})'
    for kind in ('text/markdown', 'text/html'):
        if kind in data:
            return relink(data[kind]).strip()
    return f"```\n{data['text/plain'].rstrip()}\n```" if 'text/plain' in data else ''


def badges():
    "A row of badges: only here, since the site's pages load nothing from elsewhere."
    about = settings()
    home, branch = about['git_url'], about['branch']
    tests = f'{home}/actions/workflows/test.yaml'
    _, first = addresses('nbs/03_attention.ipynb', '')['Open in Colab']
    site = about['doc_host'] + about['doc_baseurl']
    rows = [
        f'[![tests]({tests}/badge.svg)]({tests})',
        f'[![site]({SHIELD}/read-the_site-2f6f9f)]({site})',
        f'[![Open in Colab]({COLAB})]({first})',
        f"![Python]({SHIELD}/python-{about['min_python']}_and_newer-2f6f9f)",
        f'[![Apache 2.0]({SHIELD}/licence-Apache_2.0-2f6f9f)]({home}/blob/{branch}/LICENSE)',
    ]
    return '\n'.join(rows)


def readme(nb):
    "README.md's text for the notebook `nb`, and its pictures as {path: bytes}."
    parts, files = [], {}
    for i, cell in enumerate(nb['cells']):
        if i == 1:
            parts.append(badges())
        source = ''.join(cell['source']).strip()
        if cell['cell_type'] == 'markdown':
            parts.append(outside_code(source, relink))
        if cell['cell_type'] != 'code' or hidden(source):
            continue
        code = DIRECTIVE.sub('', source).strip()
        if code and directives(source).get('echo') != 'false':
            parts.append(f'```python\n{code}\n```')
        parts += [output(o, files) for o in cell['outputs']]
    return '\n\n'.join(p for p in parts if p) + '\n', files


def out_of_date(wanted):
    "The names of files that are not what they should be, and of pictures that should not be there."
    differs = lambda name: not (ROOT / name).exists() or (ROOT / name).read_bytes() != wanted[name]
    present = {f'README_files/{p.name}' for p in (ROOT / 'README_files').glob('figure-*')}
    return sorted(filter(differs, wanted)), sorted(present - set(wanted))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--check', action='store_true', help='write nothing, only compare')
    args = parser.parse_args()
    index = ROOT / 'nbs' / 'index.ipynb'
    if not index.exists():
        sys.exit('build_readme: there is no nbs/index.ipynb to make README.md from')
    text, files = readme(json.loads(index.read_text(encoding='utf-8')))
    wanted = {'README.md': text.encode(), **files}
    stale, unwanted = out_of_date(wanted)
    if args.check:
        if stale or unwanted:
            names = ', '.join(stale + unwanted)
            sys.exit(f'build_readme: {names} out of date; run `python tools/build_readme.py`')
        return
    for name in unwanted:
        (ROOT / name).unlink()
    for name in stale:
        write_file(ROOT / name, wanted[name])
    note = '' if stale or unwanted else ', unchanged'
    print(f'README.md: {len(text.splitlines())} lines, {len(files)} pictures{note}')


if __name__ == '__main__':
    main()
