"use strict";
// The page of a service: a request and its events, and a reviewer's look at the audit.
(() => {
  const { element, curve, words, figure, verdict, comparison } = saferedir;
  const at = (id) => document.getElementById(id);
  let setup = null, under = null;

  async function begin() {
    setup = await (await fetch("page/setup")).json();
    for (const name of setup.samplers) at("sampler").append(element("option", {}, name));
    at("sampler").value = setup.sampler;
    const steps = setup.steps ?? [1, 999];
    at("steps").min = steps[0];
    at("steps").max = Math.min(steps[1], setup.most_steps);
    at("key-field").hidden = !setup.needs_key;
    at("plain-field").hidden = !setup.unprotected;
    at("tab-review").hidden = !setup.review;
    for (const concept of setup.concepts) {
      const name = `threshold-${concept.name}`;
      const level = concept.threshold.toFixed(3);
      at("policy").append(element("div", {},
        element("label", { for: name }, `${concept.name}: ${concept.action} from ${level} on`),
        element("input", { id: name, type: "number", min: 0, max: concept.threshold, step: "any", placeholder: level }),
      ));
      at("concept").append(element("option", {}, concept.name));
    }
  }

  function asked() {
    const body = { stream: true, previews: 12 };
    for (const name of ["prompt", "negative_prompt", "sampler"]) {
      const value = at("request").elements[name].value;
      if (value) body[name] = value;
    }
    body.steps = Number(at("steps").value);
    body.guidance_scale = Number(at("guidance").value);
    body.seed = at("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number(at("seed").value);
    const lowered = setup.concepts.filter((concept) => at(`threshold-${concept.name}`).value !== "");
    if (lowered.length) {
      body.tighten = { thresholds: Object.fromEntries(lowered.map((own) => [own.name, Number(at(`threshold-${own.name}`).value)])) };
    }
    return body;
  }

  function card(body) {
    const box = element("article", { "aria-busy": "true" });
    const pair = element("div", { class: "pair" });
    const safe = figure(BLANK, "protected", `protected: ${body.prompt}`);
    const note = element("p", { class: "note" }, `seed ${body.seed}`);
    const words_ = element("div"), buttons = element("div", { class: "buttons" });
    pair.append(safe.box);
    const curves = Object.fromEntries(setup.concepts.map((concept) => {
      const own = body.tighten?.thresholds[concept.name] ?? concept.threshold;
      return [concept.name, curve(concept.name, own, body.steps)];
    }));
    box.append(element("h3", {}, body.prompt), note, pair, ...Object.values(curves).map((own) => own.box), words_, buttons);
    at("cards").prepend(box);
    return { box, pair, safe, note, curves, words: words_, buttons };
  }

  const BLANK = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==";
  const png = (data) => `data:image/png;base64,${data}`;

  async function* events(answer) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
        const line = rest.slice(0, end).split("\n").find((own) => own.startsWith("data: "));
        if (line) yield JSON.parse(line.slice(6));
      }
    }
  }

  const headers = () => ({
    "content-type": "application/json", ...(at("key").value ? { authorization: `Bearer ${at("key").value}` } : {}),
  });

  async function draw(body, shown, path) {
    const answer = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal: under.signal });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      if (event.type === "progress") shown.progress?.(event);
      if (event.type === "preview") shown.image.src = png(event.b64_json);
      if (event.type === "completed") return event.pictures[0];
    }
    throw new Error("the connection ended");
  }

  async function go(submitted) {
    submitted.preventDefault();
    const body = asked(), shown = card(body);
    under = new AbortController();
    busy(true, "drawing");
    try {
      const tasks = [draw(body, {
        image: shown.safe.image,
        progress(event) {
          at("said").textContent = `step ${event.step} of ${body.steps}`;
          for (const [name, own] of Object.entries(shown.curves)) {
            own.add(event.step - 1, event.scores[name], event.fired.includes(name), 0);
          }
          if (event.fired.length) shown.box.classList.add("fired");
        },
      }, "v1/pictures")];
      if (at("plain").checked) {
        const plain = figure(BLANK, "unprotected", `unprotected: ${body.prompt}`);
        shown.pair.prepend(plain.box);
        tasks.push(draw(body, { image: plain.image }, "page/unprotected").then((own) => { plain.image.src = png(own.b64_json); }));
      }
      const [picture] = await Promise.all(tasks);
      shown.safe.image.src = png(picture.b64_json);
      shown.note.textContent = `seed ${body.seed} · ${verdict(picture.record, setup.replacements)}`;
      shown.words.append(words(picture.record));
      const record = new Blob([JSON.stringify(picture.record, null, 1)], { type: "application/json" });
      shown.buttons.append(
        element("a", { href: png(picture.b64_json), download: `${picture.id}.png` }, "Picture"),
        element("a", { href: URL.createObjectURL(record), download: `${picture.id}.json` }, "Record"),
      );
      busy(false, "done");
    } catch (error) {
      shown.note.textContent = error.name === "AbortError" ? "stopped" : error.message;
      shown.note.classList.add("error");
      busy(false, shown.note.textContent);
    }
    shown.box.setAttribute("aria-busy", "false");
  }

  function busy(is, said) {
    at("go").disabled = is;
    at("stop").disabled = !is;
    at("said").textContent = said;
  }

  let before = null;

  async function review(submitted, older) {
    submitted?.preventDefault();
    if (!older) {
      before = null;
      at("records").tBodies[0].replaceChildren();
    }
    const wanted = new URLSearchParams({ limit: 50 });
    for (const name of ["outcome", "concept", "tenant"]) if (at(name).value) wanted.set(name, at(name).value);
    if (before !== null) wanted.set("before", before);
    const answer = await fetch(`page/audit?${wanted}`, { headers: reviewer() });
    const found = await answer.json();
    if (!answer.ok) {
      at("reviewed").textContent = found.error.message;
      return;
    }
    for (const own of found.records) {
      const open = element("button", { type: "button" }, own.id.slice(0, 16));
      open.addEventListener("click", () => show(own));
      const fired = [...new Set(own.fired.flat())].join(", ");
      const cells = [own.number, own.at.slice(0, 19).replace("T", " "), own.tenant || "-", own.outcome, fired || "-", own.steps_done];
      at("records").tBodies[0].append(element("tr", {}, ...cells.map((cell) => element("td", {}, String(cell))), element("td", {}, open)));
    }
    before = found.records.at(-1)?.number ?? before;
    at("older").disabled = found.records.length < 50;
    at("reviewed").textContent = `${at("records").tBodies[0].rows.length} records`;
  }

  const reviewer = () => ({ authorization: `Bearer ${at("review-key").value}` });

  function show(own) {
    const box = element("article", { class: own.fired.flat().length ? "fired" : "" });
    const pair = element("div", { class: "pair" });
    const again = element("button", { type: "button" }, "Draw it again, and compare the bytes");
    const said = element("p", { class: "note", role: "status" });
    const text = element("p", {}, own.texts ? own.texts.prompt : "(its prompt was not kept)");
    again.addEventListener("click", async () => {
      said.textContent = "drawing";
      const answer = await fetch(`page/audit/${own.id}/replay`, { method: "POST", headers: reviewer() });
      const found = await answer.json();
      said.textContent = answer.ok ? "the same to the byte" : found.error.message;
      if (answer.ok) pair.replaceChildren(figure(png(found.b64_json), "drawn again", "the picture, drawn again").box);
    });
    box.append(element("h3", { tabindex: -1 }, own.id), text, said, pair);
    setup.concepts.forEach((concept, index) => {
      const drawn = curve(concept.name, own.thresholds[concept.name], own.scores.length);
      own.scores.forEach((score, step) => drawn.add(step, score[index], own.fired[step].includes(concept.name), 0));
      if (own.scores.length) box.append(drawn.box);
    });
    const details = element("details", {}, element("summary", {}, "everything"), element("pre", { class: "wide", tabindex: 0 }, JSON.stringify(own, null, 1)));
    box.append(element("div", { class: "buttons" }, again), details);
    at("record").replaceChildren(box);
    box.firstChild.focus();
  }

  function choose(name) {
    for (const own of ["draw", "review"]) {
      at(own).hidden = own !== name;
      at(`tab-${own}`).setAttribute("aria-selected", String(own === name));
      at(`tab-${own}`).tabIndex = own === name ? 0 : -1;
    }
  }

  at("request").addEventListener("submit", go);
  at("stop").addEventListener("click", () => under?.abort());
  at("filter").addEventListener("submit", review);
  at("older").addEventListener("click", () => review(null, true));
  for (const own of ["draw", "review"]) {
    at(`tab-${own}`).addEventListener("click", () => choose(own));
    at(`tab-${own}`).addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
      const other = own === "draw" && setup?.review ? "review" : "draw";
      choose(other);
      at(`tab-${other}`).focus();
    });
  }
  begin();
})();
