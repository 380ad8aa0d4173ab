// The ranking of the site's search. It answers to the name and the calls of the library that
// smalldocs asks (new Fuse(entries).search(query, {limit})), and ranks words instead of letters:
// all words of the question that say something are looked for, in the words that readers of other
// books use too; a title counts more than a heading, a heading more than text, a chapter more than
// a tool, a lesson more than the name of a function.
(() => {
  'use strict';
  const words = '@@WORDS@@';
  const idle = new Set(words.idle);
  const tokens = (text) => text.toLowerCase().normalize('NFKD').match(/[\p{L}\p{N}_]+/gu) || [];
  const stem = (word) => word.length < 4 ? word : word
    .replace(/(sses|xes)$/, (end) => end.slice(0, -2)).replace(/ies$/, 'y')
    .replace(/([^su])s$/, '$1').replace(/(.{3,})(ing|ed|er|ers|ation)$/, '$1').replace(/(.{3,})e$/, '$1')
    .replace(/([^aeiouls])\1$/, '$1');
  const pieces = (text) => tokens(text).flatMap((t) => t.includes('_') ? [t, ...t.split('_')] : [t])
    .filter(Boolean).map(stem);
  const count = (list) => list.reduce((seen, w) => seen.set(w, (seen.get(w) || 0) + 1), new Map());
  const KIND = { lesson: 1, support: 0.8, api: 0.6 };
  const LESS = /^(bibliography|ledger|support\/ledger)\.html|#(further-reading|exercises|solutions|what-we-measured)/;
  const telling = (text) => new Set(tokens(text).filter((t) => !idle.has(t) && !/^\d+$/.test(t)).flatMap(pieces));

  class Search {
    constructor(entries) {
      this.entries = entries.map((entry) => {
        const page = entry.href.split('#')[0], opening = !entry.section;
        return {
          entry, page, title: telling(entry.title), section: telling(entry.section),
          hints: new Set(opening ? pieces(words.pages[page] || '') : []), opening,
          text: count(pieces(entry.text)), long: Math.sqrt(120 + entry.text.length / 6),
        };
      });
      this.seen = new Map();
      this.entries.forEach((e) => new Set([...e.text.keys(), ...e.title, ...e.section, ...e.hints])
        .forEach((w) => this.seen.set(w, (this.seen.get(w) || 0) + 1)));
    }

    // what is asked: [word, the words that mean the same]
    asked(query) {
      const all = tokens(query), told = all.filter((w) => !idle.has(w));
      const plain = ` ${all.join(' ')} `;
      const asked = (told.length ? told : all).map((w) => [stem(w), []]);
      for (const [phrase, same] of Object.entries(words.same)) {
        if (!plain.includes(` ${phrase} `)) continue;
        const first = asked.find(([w]) => pieces(phrase).includes(w));
        if (first) first[1].push(...same.flatMap(pieces));
      }
      return asked;
    }

    // how often a word that is still being typed begins others
    begins(start) {
      return start.length < 3 ? [] : [...this.seen.keys()].filter((w) => w.startsWith(start) && w !== start).slice(0, 12);
    }

    // how much an entry says about a word: a short title that consists of it says most
    weight(e, word) {
      const rare = Math.log(1 + this.entries.length / (this.seen.get(word) || 1));
      const text = e.text.get(word) || 0;
      const named = (set, most) => (set.has(word) ? most / Math.sqrt(set.size) : 0);
      const title = named(e.title, e.opening ? 9 : e.entry.kind === 'api' ? 0 : 2);
      const found = title + named(e.section, 7) + (e.hints.has(word) ? 4 : 0)
        + 12 * text / (text + 1.5) / (0.4 * e.long);
      return found * rare;
    }

    score(e, asked, last) {
      let sum = 0, met = 0;
      asked.forEach(([word, same], i) => {
        const own = Math.max(this.weight(e, word), ...same.map((w) => 0.9 * this.weight(e, w)),
          ...(i === asked.length - 1 ? last.map((w) => 0.4 * this.weight(e, w)) : [0]));
        sum += own;
        met += own > 0;
      });
      return sum * KIND[e.entry.kind] * (LESS.test(e.entry.href) ? 0.4 : 1) * (met / asked.length) ** 2;
    }

    // the best pages first, each with its two best places
    search(query, { limit = 20 } = {}) {
      const asked = this.asked(query);
      if (!asked.length) return [];
      const last = this.begins(asked[asked.length - 1][0]);
      const pages = new Map();
      this.entries.forEach((e) => {
        const score = this.score(e, asked, last);
        if (score > 0) pages.set(e.page, [...(pages.get(e.page) || []), { item: e.entry, score, e }]);
      });
      const best = [...pages.values()].map((found) => {
        found.sort((a, b) => b.score - a.score);
        const opening = found.find(({ e }) => e.opening);
        const told = found.slice(0, 2).filter(({ score }) => score > 0.2 * found[0].score);
        return { found: told, score: found[0].score + 0.5 * (opening ? opening.score : 0) };
      });
      return best.sort((a, b) => b.score - a.score).flatMap(({ found }) => found).slice(0, limit);
    }
  }
  Search.telling = (query) => {
    const all = tokens(query), told = all.filter((w) => !idle.has(w));
    return told.length ? told : all;
  };
  window.Fuse = Search;
})();
