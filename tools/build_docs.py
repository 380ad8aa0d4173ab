"""Build the course's site from the executed notebooks, with nothing fetched while it is read.

    python tools/build_docs.py                 write _docs/
    python tools/build_docs.py --out DIR       write DIR instead
    python tools/build_docs.py --sidebar       only rewrite nbs/sidebar.yml, for a new chapter

The notebooks are not executed again: their committed outputs are what the site shows. nbdev's own
processors prepare them (API entries, links, hidden cells) and smalldocs renders them; `nbdev_docs`
with Quarto reads the same sources. Needs Python 3.11 or later, `pip install -e '.[dev]'`, and
`npm i --ignore-scripts` for KaTeX. The build fails on a broken link or anchor, and on anything a
page would fetch from another host.
"""

import argparse
import ast
import functools
import json
import os
import re
import shutil
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import page_cells
import page_frames
import site_search
from alt_texts import alt_texts
from cells import ROOT, notebook_paths
from chapter_order import chapters
from prose_links import chapter_names, prose_links

sys.path.insert(0, str(ROOT))
from transformer_course.course.ledger import CLAIMS
from transformer_course.files import write_file

PARTS = [
    ('Part I: language', 0, 2),
    ('Part II: the Transformer', 3, 7),
    ('Part III: a GPT in practice', 8, 11),
    ('Part IV: one block, many token sets', 12, 18),
    ('Part V: in-context learning', 19, 22),
    ('Part VI: why', 23, 25),
    ('Part VII: what the talk says is missing', 26, 99),
]
SUPPORT = ['sources', 'figures', 'plots', 'matrices', 'graphs', 'walk', 'progress']
SUPPORT += [
    'records',
    'claims',
    'ledger',
    'pages',
    'long_runs',
    'missing',
]  # in this order; then the others, by name


def section(title, files):
    "A section of the sidebar, as lines; an empty one is left out."
    head = [f'      - section: "{title}"', '        contents:']
    return [*head, *(f'          - {f}' for f in files)] if files else []


def sidebar(nbs):
    "The text of `sidebar.yml`: the parts of the course, then the tools that it stands on."
    lines, found = ['website:', '  sidebar:', '    contents:'], chapters(nbs)
    starts = [('Start', 'index'), ('How do I …?', 'questions'), ('The command line', 'manual')]
    starts += [('PyTorch for people who know numpy', 'pytorch'), ('The ledger', 'ledger')]
    for text, page in ((text, f'{stem}.ipynb') for text, stem in starts):
        if (Path(nbs) / page).exists():
            lines += [f'      - text: {text}', f'        href: {page}']
    for title, first, last in PARTS:
        lines += section(title, [name for n, name in found if first <= n <= last])
    names = [p.stem for p in (Path(nbs) / 'support').glob('[!._]*.ipynb')]
    names.sort(key=lambda n: (SUPPORT.index(n) if n in SUPPORT else len(SUPPORT), n))
    if (Path(nbs) / 'bibliography.ipynb').exists():
        lines += ['      - text: Bibliography', '        href: bibliography.ipynb']
    lines += section('Support', [f'support/{n}.ipynb' for n in names])
    return '\n'.join(lines) + '\n'


def katex():
    "The folder of KaTeX's built files."
    dist = ROOT / 'node_modules' / 'katex' / 'dist'
    if not (dist / 'katex.min.js').exists():
        mend = f'run `npm i --ignore-scripts --no-package-lock` in {ROOT.name}/ first'
        sys.exit(f'build_docs: KaTeX is missing; {mend}')
    return dist


# ---------------------------------------------------------------- notebooks as smalldocs' sources


def compact(nb):
    "Where its source follows an API entry, only the source shows the signature."
    signature = re.compile(r'^---\n|^```python\n.*?^```\n\n?', re.M | re.S)
    sources = [''.join(cell['source']) for cell in nb['cells']]
    for cell, source, following in zip(nb['cells'], sources, sources[1:]):
        if 'show_doc(' not in source or not following.startswith('#| code-fold'):
            continue
        for out in cell['outputs']:
            text = ''.join(out.get('data', {}).get('text/markdown', ''))
            if text:
                out['data']['text/markdown'] = signature.sub('', text)


def links_out(nb, folder, blob):
    "Links that leave nbs/, such as to ../LICENSE, lead to the file in the repository."

    def link(m):
        path = os.path.normpath(f'nbs/{folder}/{m[2]}')
        return m[0] if path.startswith('nbs/') else f'{m[1]}{blob}/{path}'

    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown':
            cell['source'] = re.sub(r'(\]\()(\.\./[^)\s]+)', link, ''.join(cell['source']))


def rename(proc, host, blob):
    "Give the processed notebooks the names that their pages have; links to this site become local."
    names, claims, numbered = {}, {claim.id for claim in CLAIMS}, chapter_names()
    for path in sorted(proc.rglob('*.ipynb')):
        text = path.read_text(encoding='utf-8')
        out = re.search(r'output-file: ([\w.-]+)\.html', text)
        nb = json.loads(text.replace(host, '/'))
        folder = path.parent.relative_to(proc)
        compact(nb)
        links_out(nb, folder, blob)
        alt_texts(nb)
        prose_links(nb, path.relative_to(proc), numbered)
        page_cells.for_readers(nb, claims, '../ledger.html' if folder.parts else 'ledger.html')
        new = path.with_name((out[1] if out else path.stem) + '.ipynb')
        names[path.name] = new.name
        path.unlink()
        new.write_text(json.dumps(nb), encoding='utf-8')
    for path in [*proc.rglob('*.ipynb'), proc / 'sidebar.yml']:
        text = path.read_text(encoding='utf-8')
        path.write_text(link_pages(text, names, path.suffix == '.yml'), encoding='utf-8')


def link_pages(text, names, everywhere=False):
    """Links between notebooks, written with the names of nbs/, with the names of their pages.

    Only links of this site, unless `everywhere`: a command of the text, and an address in the
    repository, keep the file's name.
    """
    old = '|'.join(re.escape(name) for name in names if names[name] != name) or '(?!)'
    start = r'(?<!\w)' if everywhere else r'\]\([\w./-]*?(?<!\w)|href=\\?"[\w./-]*?(?<!\w)'
    return re.sub(rf'({start})({old})', lambda m: m[1] + names[m[2]], text)


def only_definitions():
    """Have nbdev run definitions and imports for the API entries, and no cell of a lesson.

    nbdev would run a cell that mixes imports with other code.
    """
    from nbdev import processors

    wanted = processors._do_eval
    defining = {'export', 'exports', 'exporti', 'exec_doc'}

    def do_eval(cell):
        if cell.cell_type != 'code' or cell.directives_.keys() & defining:
            return wanted(cell)
        nodes = cell.parsed_() or []
        only_imports = all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes)
        return wanted(cell) if only_imports or processors._show_docs(nodes) else None

    processors._do_eval = do_eval


def render(out):
    "Build the site in a copy of the sources, so that the work tree stays as it is."
    dist, cwd = katex(), os.getcwd()
    with tempfile.TemporaryDirectory(prefix='course-site-') as tmp:
        try:
            return render_in(Path(tmp).resolve(), out, dist)
        finally:
            os.chdir(cwd)


def copy_sources(tmp):
    "The notebooks and the package in the empty folder `tmp`, which becomes the place to work."
    for name in ('settings.ini', 'README.md'):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp / name)
    skip = shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__', '_proc', '*.tmp')
    for name in ('nbs', 'transformer_course'):
        shutil.copytree(ROOT / name, tmp / name, ignore=skip)
    for path in (tmp / 'nbs').rglob('*.ipynb'):
        nb = json.loads(path.read_text(encoding='utf-8'))
        page_cells.open_imports(nb)
        path.write_text(json.dumps(nb), encoding='utf-8')
    os.chdir(tmp)
    sys.path.insert(0, str(tmp))


def processed(tmp):
    "The folder of the notebooks as nbdev's processors leave them, with the names of their pages."
    from nbdev.config import get_config
    from nbdev.doclinks import _build_modidx
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    cfg = get_config()
    only_definitions()
    refresh_quarto_yml()
    _build_modidx()
    (tmp / 'nbs' / 'sidebar.yml').write_text(sidebar(tmp / 'nbs'), encoding='utf-8')
    proc = Path(proc_nbs(tmp / 'nbs', n_workers=0, force=True))
    rename(proc, f'{cfg.doc_host}{cfg.doc_baseurl}/', f'{cfg.git_url}/blob/{cfg.branch}')
    return proc


def render_in(tmp, out, dist):
    "Build the site in the folder `tmp` and copy it to `out`; the site, and what is wrong with it."
    copy_sources(tmp)
    proc = processed(tmp)
    import smalldocs.layout
    from smalldocs.site import build

    smalldocs.layout.KATEX = '@@KATEX@@'
    site = build(proc, quiet=True)
    # renamed above; for Quarto only; `check` reports links
    known = re.compile('output-file|commonmark|keep-md|broken link')
    for warning in site.warnings:
        if not known.search(warning):
            print(f'build_docs: {warning}', file=sys.stderr)
    finish(site.out, dist)
    unlink(site.out)
    page_frames.frame(site.out)
    site_search.write_search(site.out)
    write_copies(site.out / 'notebooks')
    problems = check(site.out)
    if out.exists():
        if any(out.iterdir()) and not (out / 'site_libs').is_dir():
            sys.exit(f'build_docs: {out} is not empty and is no built site; give another folder')
        shutil.rmtree(out)
    shutil.copytree(site.out, out)
    return site, problems


def write_copies(out):
    "Copies of the notebooks that install the course where it is missing, under their own names."
    for path in notebook_paths():
        nb = page_cells.to_run_elsewhere(json.loads(path.read_text(encoding='utf-8')))
        to = out / path.relative_to(ROOT / 'nbs')
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps(nb, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')


# ---------------------------------------------------------------- what smalldocs leaves to do


def finish(site, dist):
    "Point the pages at the local KaTeX, copy it in, and drop the themes' imports of web fonts."
    for page in site.rglob('*.html'):
        text = page.read_text(encoding='utf-8')
        up = '../' * (len(page.relative_to(site).parts) - 1)
        text = text.replace('@@KATEX@@', up + 'site_libs/katex')
        page.write_text(text, encoding='utf-8')
    keep = ('katex.min.css', 'katex.min.js', 'contrib/auto-render.min.js')
    for name in keep:
        to = site / 'site_libs' / 'katex' / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(dist / name, to)
    other = shutil.ignore_patterns('*.ttf', '*.woff')
    shutil.copytree(dist / 'fonts', site / 'site_libs' / 'katex' / 'fonts', ignore=other)
    web_font = re.compile(r'@import\s*url\(["\']?https://fonts\.googleapis\.com[^)]*\);?')
    other_font = re.compile(r',url\(fonts/[\w-]+\.(?:woff|ttf)\) format\("\w+"\)')
    for css in site.rglob('*.css'):
        text = web_font.sub('', css.read_text(encoding='utf-8'))
        text = other_font.sub('', text) if css.name == 'katex.min.css' else text
        css.write_text(text, encoding='utf-8')


def unlink(site):
    "nbdev links every name in backticks: one without an entry gets its class's, or stays plain."
    pages = {path: path.read_text(encoding='utf-8') for path in site.rglob('*.html')}
    ids = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    named = re.compile(r'<a href="([^":#]*)#([^"]+)">(<code>[^<]*</code>)</a>')

    def link(path, m):
        target = ids.get((path.parent / unquote(m[1])).resolve() if m[1] else path)
        if target is None or m[2] in target:
            return m[0]
        owner = m[2].rpartition('.')[0]
        return f'<a href="{m[1]}#{owner}">{m[3]}</a>' if owner in target else m[3]

    for path, text in pages.items():
        text = named.sub(functools.partial(link, path), text)
        path.write_text(text, encoding='utf-8')


# ---------------------------------------------------------------- what is wrong with a site

LOADING = 'script', 'img', 'iframe', 'source', 'video', 'audio', 'embed'
STYLE_URL = re.compile(r'(?:@import\s+|url\()["\']?((?:https?:)?//[^"\')\s]+)')


class Links(HTMLParser):
    "Collects a page's ids, its links, and what it loads."

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        for key in ('id', 'name') if tag == 'a' else ('id',):
            if attrs.get(key):
                self.ids.add(attrs[key])
        if tag == 'a' and attrs.get('href'):
            self.links.append(attrs['href'])
        if tag == 'link' and attrs.get('rel') in ('stylesheet', 'icon', 'preload', 'modulepreload'):
            self.loads.append(attrs.get('href', ''))
        if tag in LOADING and attrs.get('src'):
            self.loads.append(attrs['src'])


def broken_link(path, url, pages):
    "What is wrong with a link to `url` on the page at `path`, or None."
    parts = urlsplit(url)
    if parts.scheme or parts.netloc:
        return None
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target = target / 'index.html'
    if not target.exists():
        return f'links to {url}, which does not exist'
    if target not in pages or not parts.fragment or unquote(parts.fragment) in pages[target].ids:
        return None
    return f'links to {url}, but that page has no such anchor'


def check(site):
    "What is wrong with a built site: links that lead nowhere, and things fetched from other hosts."
    site, pages, problems = Path(site).resolve(), {}, []
    for path in sorted(site.rglob('*.html')):
        pages[path] = Links()
        pages[path].feed(path.read_text(encoding='utf-8'))
    for path, page in pages.items():
        name = path.relative_to(site)
        away = [url for url in page.loads if re.match(r'(?i)(https?:)?//', url)]
        problems += [f'{name} loads {url}' for url in away]
        for url in dict.fromkeys(page.loads + page.links):
            if wrong := broken_link(path, url, pages):
                problems.append(f'{name} {wrong}')
    for css in site.rglob('*.css'):
        name, away = css.relative_to(site), STYLE_URL.findall(css.read_text(encoding='utf-8'))
        problems += [f'{name} loads {url}' for url in away]
    return problems


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    place = ROOT / '_docs'
    parser.add_argument('--out', type=Path, default=place, help='where it goes (default _docs)')
    parser.add_argument('--sidebar', action='store_true', help='only rewrite nbs/sidebar.yml')
    args = parser.parse_args()
    if args.sidebar:
        write_file(ROOT / 'nbs' / 'sidebar.yml', sidebar(ROOT / 'nbs'))
        return
    if sys.version_info < (3, 11):
        mend = 'Python 3.11 or later (smalldocs does); the course itself runs on 3.10'
        sys.exit(f'build_docs: the site needs {mend}')
    site, problems = render(args.out.resolve())
    for problem in problems:
        print(f'build_docs: {problem}', file=sys.stderr)
    size = sum(p.stat().st_size for p in args.out.rglob('*') if p.is_file())
    wrong = f'; {len(problems)} problems' if problems else ''
    print(f'{len(site.pages)} pages, {size / 1e6:.1f} MB in {args.out}{wrong}')
    sys.exit(bool(problems))


if __name__ == '__main__':
    main()
