"""Build the course's site from the executed notebooks, with nothing fetched while it is read.

    python tools/build_docs.py                 write _docs/
    python tools/build_docs.py --out DIR       write DIR instead
    python tools/build_docs.py --sidebar       only rewrite nbs/sidebar.yml (after a chapter was added)

The notebooks are not executed again: their committed outputs are what the site shows. nbdev's own processors prepare
them (API entries, links, hidden cells) and smalldocs renders them; `nbdev_docs` with Quarto reads the same sources.
Needs Python 3.11 or later, `pip install -e '.[dev]'`, and `npm i --ignore-scripts` for KaTeX.
The build fails on a broken link or anchor, and on anything a page would fetch from another host.
"""

import argparse, json, os, re, shutil, sys, tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
PARTS = [
    ('Part I: language', 0, 2),
    ('Part II: the Transformer', 3, 7),
    ('Part III: a GPT in practice', 8, 11),
    ('Part IV: one block, many token sets', 12, 18),
    ('Part V: in-context learning', 19, 22),
    ('Part VI: why', 23, 99),
]
SUPPORT = ['sources', 'plots', 'claims', 'ledger', 'exercises', 'checkpoint', 'cli']
NO_PREFIX = re.compile(r'^\d+[a-z]?_')


def chapters(nbs):
    "The chapters of folder `nbs` as {number: file name}, for the notebooks that exist."
    return {int(p.name[:2]): p.name for p in sorted(Path(nbs).glob('[0-9][0-9]_*.ipynb'))}


def sidebar(nbs):
    "The text of `sidebar.yml` for the notebooks in folder `nbs`: the parts of the course, then the tools it stands on."
    lines = ['website:', '  sidebar:', '    contents:']
    for text, page in (('Start', 'index.ipynb'), ('The ledger', 'ledger.ipynb')):
        if (Path(nbs) / page).exists():
            lines += [f'      - text: {text}', f'        href: {page}']
    found = chapters(nbs)

    def section(title, files):
        if files:
            lines.extend(
                [
                    f'      - section: "{title}"',
                    '        contents:',
                    *(f'          - {f}' for f in files),
                ]
            )

    for title, first, last in PARTS:
        section(title, [f for n, f in sorted(found.items()) if first <= n <= last])
    names = [p.stem for p in (Path(nbs) / 'support').glob('[!._]*.ipynb')]
    names.sort(key=lambda n: (SUPPORT.index(n) if n in SUPPORT else len(SUPPORT), n))
    section('Support', [f'support/{n}.ipynb' for n in names])
    return '\n'.join(lines) + '\n'


def katex():
    "The folder of KaTeX's built files."
    dist = ROOT / 'node_modules' / 'katex' / 'dist'
    if not (dist / 'katex.min.js').exists():
        sys.exit(
            f'build_docs: KaTeX is missing; run `npm i --ignore-scripts --no-package-lock` in {ROOT.name}/ first'
        )
    return dist


# ---------------------------------------------------------------- from notebooks to smalldocs' sources


def alt_texts(nb):
    "Give each figure without a description one, from the section it stands in."
    heading = ''
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            found = re.findall(r'^#+ (.+?)(?: \{.*\})?$', source, re.M)
            heading = found[-1] if found else heading
            title = re.search(r'^title: (.+)$', source, re.M) if source.startswith('---') else None
            heading = title[1] if title else heading
        elif (
            any(m.startswith('image/') for o in cell.get('outputs', []) for m in o.get('data', {}))
            and 'fig-alt:' not in source
        ):
            text = re.sub(r'[`"*$\\]', '', heading).strip("' ")
            cell['source'] = f'#| fig-alt: "Figure: {text}"\n{source}'


def compact(nb):
    "Where an API entry is followed by its source, leave the signature to the source instead of showing it twice."
    cells = nb['cells']
    for entry, following in zip(cells, cells[1:]):
        if 'show_doc(' not in ''.join(entry['source']) or not ''.join(
            following['source']
        ).startswith('#| code-fold'):
            continue
        for out in entry['outputs']:
            text = ''.join(out.get('data', {}).get('text/markdown', ''))
            if text:
                out['data']['text/markdown'] = re.sub(
                    r'^---\n|^```python\n.*?^```\n\n?', '', text, flags=re.M | re.S
                )


def links_out(nb, folder, blob):
    "Links that leave nbs/, such as to ../LICENSE, lead to the file in the repository."

    def link(m):
        path = os.path.normpath(f'nbs/{folder}/{m[2]}')
        return m[0] if path.startswith('nbs/') else f'{m[1]}{blob}/{path}'

    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown':
            cell['source'] = re.sub(r'(\]\()(\.\./[^)\s]+)', link, ''.join(cell['source']))


def rename(proc, host, blob):
    "Give the processed notebooks the names their pages have in the Quarto site, and make links to this site local."
    names = {}
    for path in sorted(proc.rglob('*.ipynb')):
        text = path.read_text(encoding='utf-8')
        out = re.search(r'output-file: ([\w.-]+)\.html', text)
        nb = json.loads(text.replace(host, '/'))
        folder = path.parent.relative_to(proc)
        alt_texts(nb)
        compact(nb)
        links_out(nb, folder, blob)
        notebook = f'code-links:\n- text: This notebook\n  icon: journal-code\n  href: {blob}/nbs/{folder / path.name}\n---'
        if nb['cells'][0]['cell_type'] == 'raw':
            nb['cells'][0]['source'] = re.sub(
                r'---\s*$', notebook, ''.join(nb['cells'][0]['source'])
            )
        new = path.with_name((out[1] if out else path.stem) + '.ipynb')
        names[path.name] = new.name
        path.unlink()
        new.write_text(json.dumps(nb), encoding='utf-8')
    # links between notebooks, written with the file names of nbs/
    link = re.compile(
        '|'.join(rf'(?<![\w]){re.escape(old)}' for old in names if names[old] != old) or '(?!)'
    )
    for path in [*proc.rglob('*.ipynb'), proc / 'sidebar.yml']:
        path.write_text(
            link.sub(lambda m: names[m[0]], path.read_text(encoding='utf-8')), encoding='utf-8'
        )


def only_definitions():
    "Have nbdev run no cell for the API entries that mixes imports with other code: the build executes definitions, not lessons."
    import ast
    from nbdev import processors

    wanted = processors._do_eval

    def do_eval(cell):
        lesson = (
            not (cell.directives_.keys() & {'export', 'exports', 'exporti', 'exec_doc'})
            and cell.cell_type == 'code'
        )
        if (
            lesson
            and any(not isinstance(t, (ast.Import, ast.ImportFrom)) for t in cell.parsed_() or [])
            and not processors._show_docs(cell.parsed_())
        ):
            return None
        return wanted(cell)

    processors._do_eval = do_eval


def render(out):
    "Build the site in a copy of the sources, so that the work tree stays as it is, and put it at `out`."
    dist, cwd = katex(), os.getcwd()
    with tempfile.TemporaryDirectory(prefix='course-site-') as tmp:
        try:
            return render_in(Path(tmp).resolve(), out, dist)
        finally:
            os.chdir(cwd)


def render_in(tmp, out, dist):
    "Build the site in the empty folder `tmp` and copy it to `out`; the site, and what is wrong with it."
    for name in ('settings.ini', 'README.md'):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp / name)
    skip = shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__', '_proc', '*.tmp')
    for name in ('nbs', 'transformer_course'):
        shutil.copytree(ROOT / name, tmp / name, ignore=skip)
    os.chdir(tmp)
    sys.path.insert(0, str(tmp))
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
    import smalldocs.layout
    from smalldocs.site import build

    smalldocs.layout.KATEX = '@@KATEX@@'
    site = build(proc, quiet=True)
    known = re.compile(
        'output-file|commonmark|keep-md|broken link'
    )  # renamed above; for Quarto only; `check` reports links
    for warning in site.warnings:
        if not known.search(warning):
            print(f'build_docs: {warning}', file=sys.stderr)
    finish(site.out, dist)
    unlink(site.out)
    problems = check(site.out)
    if out.exists():
        if any(out.iterdir()) and not (out / 'site_libs').is_dir():
            sys.exit(f'build_docs: {out} is not empty and is no built site; give another folder')
        shutil.rmtree(out)
    shutil.copytree(site.out, out)
    return site, problems


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
    shutil.copytree(
        dist / 'fonts',
        site / 'site_libs' / 'katex' / 'fonts',
        ignore=shutil.ignore_patterns('*.ttf', '*.woff'),
    )
    for css in site.rglob('*.css'):
        text = css.read_text(encoding='utf-8')
        local = re.sub(r'@import\s*url\(["\']?https://fonts\.googleapis\.com[^)]*\);?', '', text)
        if css.name == 'katex.min.css':
            local = re.sub(r',url\(fonts/[\w-]+\.(?:woff|ttf)\) format\("\w+"\)', '', local)
        if local != text:
            css.write_text(local, encoding='utf-8')


def unlink(site):
    "nbdev links every name in backticks; where a name has no entry of its own, link its class's, or leave it plain."
    ids = {
        path: set(re.findall(r'\bid="([^"]+)"', path.read_text(encoding='utf-8')))
        for path in site.rglob('*.html')
    }
    for path in ids:

        def link(m):
            target = ids.get((path.parent / unquote(m[1])).resolve() if m[1] else path)
            if target is None or m[2] in target:
                return m[0]
            owner = m[2].rpartition('.')[0]
            return f'<a href="{m[1]}#{owner}">{m[3]}</a>' if owner in target else m[3]

        text = path.read_text(encoding='utf-8')
        path.write_text(
            re.sub(r'<a href="([^":#]*)#([^"]+)">(<code>[^<]*</code>)</a>', link, text),
            encoding='utf-8',
        )


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
        if tag in ('script', 'img', 'iframe', 'source', 'video', 'audio', 'embed') and attrs.get(
            'src'
        ):
            self.loads.append(attrs['src'])


def check(site):
    "What is wrong with a built site: links and anchors that lead nowhere, and things fetched from other hosts."
    site, pages, problems = Path(site).resolve(), {}, []
    for path in sorted(site.rglob('*.html')):
        pages[path] = Links()
        pages[path].feed(path.read_text(encoding='utf-8'))
    for path, page in pages.items():
        name = path.relative_to(site)
        for url in page.loads:
            if re.match(r'(?i)(https?:)?//', url):
                problems.append(f'{name} loads {url}')
        for url in dict.fromkeys(page.loads + page.links):
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target = target / 'index.html'
            if not target.exists():
                problems.append(f'{name} links to {url}, which does not exist')
            elif (
                target in pages
                and parts.fragment
                and unquote(parts.fragment) not in pages[target].ids
            ):
                problems.append(f'{name} links to {url}, but that page has no such anchor')
    for css in site.rglob('*.css'):
        for url in re.findall(
            r'(?:@import\s+|url\()["\']?((?:https?:)?//[^"\')\s]+)', css.read_text(encoding='utf-8')
        ):
            problems.append(f'{css.relative_to(site)} loads {url}')
    return problems


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--out', type=Path, default=ROOT / '_docs', help='where the site goes (default _docs)'
    )
    parser.add_argument('--sidebar', action='store_true', help='only rewrite nbs/sidebar.yml')
    args = parser.parse_args()
    if args.sidebar:
        return (ROOT / 'nbs' / 'sidebar.yml').write_text(
            sidebar(ROOT / 'nbs'), encoding='utf-8'
        ) and None
    if sys.version_info < (3, 11):
        sys.exit(
            'build_docs: the site needs Python 3.11 or later (smalldocs does); the course itself runs on 3.10'
        )
    site, problems = render(args.out.resolve())
    for problem in problems:
        print(f'build_docs: {problem}', file=sys.stderr)
    size = sum(p.stat().st_size for p in args.out.rglob('*') if p.is_file())
    print(
        f'{len(site.pages)} pages, {size / 1e6:.1f} MB in {args.out}'
        + (f'; {len(problems)} problems' if problems else '')
    )
    sys.exit(bool(problems))


if __name__ == '__main__':
    main()
