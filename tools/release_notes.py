"""What a release says of itself: the section of CHANGELOG.md for a version.

    python tools/release_notes.py            of the version in settings.ini
    python tools/release_notes.py v0.4.0     the same, if the tag is that version's; else exit 1

settings.ini has the version. A tag, CITATION.cff or a CHANGELOG that disagrees stops a release.
"""

import re
import sys

from cells import ROOT, settings


def section(changelog, version):
    "What stands under `## version`, without the heading; '' if nothing does."
    found = re.search(rf'^## {re.escape(version)}\n(.*?)(?=^## |\Z)', changelog, re.M | re.S)
    return found[1].strip() if found else ''


def wrong(tag, version, citation, notes):
    "What keeps this version from being released, as sentences."
    if tag != f'v{version}':
        yield f'the tag is {tag}, settings.ini has {version}: tag it v{version}'
    if f'version: {version}\n' not in citation:
        yield f'CITATION.cff is of another version than {version}: change it there'
    if not notes:
        yield f'CHANGELOG.md has no section for {version}: write one'


def main():
    version = settings()['version']
    tag = sys.argv[1] if len(sys.argv) > 1 else f'v{version}'
    notes = section((ROOT / 'CHANGELOG.md').read_text(encoding='utf-8'), version)
    citation = (ROOT / 'CITATION.cff').read_text(encoding='utf-8')
    if bad := list(wrong(tag, version, citation, notes)):
        sys.exit('\n'.join(f'release_notes: {line}' for line in bad))
    print(notes)


if __name__ == '__main__':
    main()
