"""The site's search: an index of what the pages say, and the words that readers use for it.

An entry is a section of a page, or a name of the API. Code is left out, except for the names in
it that prose mentions. The ranking stands in `tools/site/search.js`, which takes the place of the
fuzzy search that smalldocs brings; the words of other books stand in `tools/site/words.json`.
"""

import html
import json
import re
from pathlib import Path

SITE = Path(__file__).resolve().parent / 'site'
HEADING = re.compile(
    r'<h[2-4](?=[^>]*\bid="([^"]+)")(?=[^>]*\bclass="([^"]*)")[^>]*>(.*?)</h[2-4]>', re.S
)
CUT = re.compile(
    r'<(pre|button|svg|script|style|nav|header|summary|footer)\b.*?</\1>|<!--.*?-->'
    r'|<ul class="notebook-links".*?</ul>|<ul class="measured".*?</ul>',
    re.S,
)
SHOWN = {  # results begin at, and mark, words that say something, and whole ones
    'q.toLowerCase().split(/\\s+/)[0]': 'window.Fuse.telling(q)[0]',
    'q.split(/\\s+/).filter((w) => w.length > 1)': 'window.Fuse.telling(q)',
    'new RegExp("(" +': 'new RegExp("(?<![\\\\p{L}</&])(" +',
    '+ ")", "ig")': '+ "[\\\\p{L}]*)", "igu")',
}


def words_of(text):
    "A piece of a page as plain text."
    text = re.sub(r'<[^>]+>', '', re.sub(r'</(p|li|td|th|h\d|div|dd)>', ' ', text))
    return re.sub(r'\s+', ' ', html.unescape(text)).strip()


def entries_of(name, text):
    "The entries of one page: its opening, its sections, and the names it defines."
    title = words_of(re.search(r'<h1[^>]*>(.*?)</h1>', text, re.S)[1])
    about = re.search(r'<div class="description">(.*?)</div>', text, re.S)
    body = CUT.sub(' ', re.search(r'<main\b[^>]*>(.*)</main>', text, re.S)[1])
    parts = HEADING.split(body)
    kind = 'support' if name.startswith('support/') else 'lesson'
    entry = dict(href=name, title=title, section='', kind=kind)
    entry['text'] = words_of(f'{about[1] if about else ""} {parts[0]}')
    found, around = [entry], entry
    for anchor, classes, heading, text in zip(*(parts[i::4] for i in (1, 2, 3, 4))):
        words, api = words_of(text), 'api' in classes.split()
        entry = dict(href=f'{name}#{anchor}', title=title, section=words_of(heading))
        entry |= dict(kind='api' if api else kind, text=words[:240] if api else words)
        found.append(entry)
        if api:  # the lesson goes on after an entry
            around['text'] += f' {words}'
        else:
            around = entry
    return found


def index(site):
    "All entries of a built site."
    pages = sorted(site.rglob('*.html'))
    found = []
    for page in pages:
        name = page.relative_to(site).as_posix()
        found += entries_of(name, page.read_text(encoding='utf-8'))
    return found


def write_search(site):
    "The index and the ranking of a built site, in the places where its pages look for them."
    words = json.loads((SITE / 'words.json').read_text(encoding='utf-8'))
    entries = index(site)
    text = json.dumps(entries, ensure_ascii=False, separators=(',', ':'))
    (site / 'search.json').write_text(text, encoding='utf-8')
    script = (SITE / 'search.js').read_text(encoding='utf-8')
    told = json.dumps(words, ensure_ascii=False, separators=(',', ':'))
    ranking = next(site.glob('site_libs/fuse/fuse*.js'))
    ranking.write_text(script.replace("'@@WORDS@@'", told), encoding='utf-8')
    shown = site / 'site_libs' / 'smalldocs.js'
    text = shown.read_text(encoding='utf-8')
    for old, new in SHOWN.items():
        if old not in text:
            raise ValueError(f'smalldocs.js has no {old!r}: see how it shows results now')
        text = text.replace(old, new)
    shown.write_text(text, encoding='utf-8')
