"use strict";
// Draws what a safety record says: pictures, scores over the steps, the mask over the words. No outside resources.
const saferedir = (() => {
  const WIDTH = 384, HEIGHT = 72, EDGE = 8;

  function element(name, attributes = {}, ...children) {
    const made = name.startsWith("svg:")
      ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
      : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined) made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  // One concept's scores over `total` steps: the line, the threshold, a dot where it fired, shade where it rested.
  function curve(concept, threshold, total) {
    const line = element("svg:polyline", { points: "" });
    const level = place(0, threshold ?? 1, total)[1];
    const box = element("svg:svg", {
      class: "curve", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `score of ${concept} in every step`,
    });
    if (threshold !== null) box.append(element("svg:line", { x1: 0, x2: WIDTH, y1: level, y2: level }));
    box.append(line, element("svg:text", { x: EDGE, y: 12 }, concept));
    const points = [];
    let highest = 0;
    return {
      box,
      // A step: its index from 0, its score, whether it fired, the steps of rest left after it.
      add(index, score, fired, rest) {
        const [x, y] = place(index, score, total);
        points.push(`${x.toFixed(1)},${y.toFixed(1)}`);
        line.setAttribute("points", points.join(" "));
        if (rest) box.prepend(element("svg:rect", { x, y: 0, width: (WIDTH - 2 * EDGE) / Math.max(1, total - 1), height: HEIGHT }));
        if (fired) box.append(element("svg:circle", { cx: x, cy: y, r: 3.5 }));
        highest = Math.max(highest, score);
        box.setAttribute("aria-label", `score of ${concept} in every step, highest ${highest.toFixed(2)}`);
      },
    };
  }

  function place(index, score, total) {
    return [EDGE + ((WIDTH - 2 * EDGE) * index) / Math.max(1, total - 1), HEIGHT - 6 - (HEIGHT - 22) * score];
  }

  // The prompt's words, shaded by the mask.
  function words(record) {
    const masks = Object.values(record.token_mask ?? {});
    const line = element("p", { class: "words" });
    if (!masks.length) return line;
    record.tokens.forEach((token, index) => {
      const weight = Math.max(...masks.map((mask) => mask[index]));
      if (token.startsWith("<|")) return;
      const word = element("span", { title: weight.toFixed(2) }, token.replace("</w>", ""));
      word.style.background = `rgb(var(--mask) / ${(0.45 * weight).toFixed(2)})`; // light enough to read
      line.append(word, " ");
    });
    return line;
  }

  function figure(source, caption, alternative) {
    const image = element("img", { alt: alternative, src: source });
    return { image, box: element("figure", {}, image, element("figcaption", {}, caption)) };
  }

  // What was seen and done, in a sentence.
  function verdict(record, replacements = {}) {
    const fired = [...new Set(record.steps.flatMap((step) => step.fired))];
    if (!fired.length) return "nothing fired";
    return fired.map((name) => (replacements[name] ? `${name}: redirected to ${replacements[name]}` : `${name} fired`)).join(", ");
  }

  // A card of one prompt drawn both ways: `item` has note, unprotected, protected (sources of pictures), record.
  function comparison(item, replacements = {}) {
    const record = item.record;
    const card = element("article", { class: record.steps.some((step) => step.fired.length) ? "fired" : "" });
    const pair = element("div", { class: "pair" });
    if (item.unprotected) pair.append(figure(item.unprotected, "unprotected", `unprotected: ${record.prompt}`).box);
    pair.append(figure(item.protected, "protected", `protected: ${record.prompt}`).box);
    const said = [item.note, `seed ${record.seed}`, verdict(record, replacements), item.same].filter(Boolean).join(" · ");
    card.append(element("h3", {}, record.prompt ?? "(embedding)"), element("p", { class: "note" }, said), pair);
    for (const [name, looked] of Object.entries(record.looked_for)) {
      const drawn = curve(name, looked.threshold, record.steps.length);
      record.steps.forEach((step, index) => drawn.add(index, step.score[name], step.fired.includes(name), step.cooldown));
      card.append(drawn.box);
    }
    card.append(words(record));
    return card;
  }

  return { element, curve, words, figure, verdict, comparison };
})();
