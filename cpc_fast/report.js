"use strict";
// Moves the threshold: every decision, count and mark on the page follows from scores in data-score attributes.
// Text is only ever set through textContent, so nothing a file name holds can become markup.
(() => {
  document.documentElement.classList.add("js");
  const one = (root, selector) => root.querySelector(selector);
  const all = (root, selector) => [...root.querySelectorAll(selector)];
  const BADGE = { caught: "Caught", missed: "Missed", alarm: "False alarm", passed: "Passed" };
  const ELSEWHERE = "Caught elsewhere"; // as in report.py

  const percent = (share) => (Math.floor(share * 1000 + 0.5) / 10).toFixed(1) + "%";
  const interval = (hits, of) => { // 95 % Wilson score interval, as in report.py
    if (!of) return "no images";
    const z = 1.959964, p = hits / of;
    const middle = p + (z * z) / (2 * of), half = z * Math.sqrt((p * (1 - p)) / of + (z * z) / (4 * of * of));
    const whole = (x) => Math.floor(Math.min(1, Math.max(0, x / (1 + (z * z) / of))) * 100 + 0.5);
    return `${whole(middle - half)} to ${whole(middle + half)}%`;
  };
  const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

  // ------------------------------------------------------------------------------------------------ one data set
  function section(panel) {
    const low = +panel.dataset.low, high = +panel.dataset.high, given = +panel.dataset.threshold;
    const show = (x) => x.toFixed(+panel.dataset.digits);
    // Few digits, but as many as it takes to decide as x does: what is read off here is typed elsewhere.
    const typed = (x) => {
      const decides = (t) => steps.every((s) => s > x === s > t);
      for (let digits = +panel.dataset.digits; digits < 17; digits++) {
        const near = +x.toFixed(digits), above = +(x + 0.5 / 10 ** digits).toFixed(digits);
        for (const t of [near, above]) if (decides(t)) return t.toFixed(digits);
      }
      return String(x);
    };
    const gallery = one(panel, ".gallery");
    const cards = all(gallery, ".card").map((element) => ({
      element,
      score: +element.dataset.score,
      there: +element.dataset.there, // the highest value on the known defect; no number where that is unknown
      good: element.dataset.good === "1",
      group: element.dataset.group,
      name: one(element, ".name").textContent,
      badge: one(element, ".badge"),
      kind: "",
    }));
    const steps = [low, ...new Set(cards.map((c) => c.score).sort((a, b) => a - b))];
    const good = cards.filter((c) => c.good), bad = cards.filter((c) => !c.good);
    const slider = one(panel, ".slider"), exact = one(panel, ".exact"), order = one(panel, ".order");
    let threshold = given;

    function decide(value) {
      threshold = Math.min(high, Math.max(low, value));
      const count = { caught: 0, missed: 0, alarm: 0, passed: 0 }, flagged = {};
      for (const card of cards) {
        const above = card.score > threshold;
        const kind = card.good ? (above ? "alarm" : "passed") : above ? "caught" : "missed";
        count[kind] += 1;
        flagged[card.group] = (flagged[card.group] || 0) + above;
        if (kind !== card.kind) {
          card.kind = kind;
          card.element.className = "card " + kind;
        }
        card.badge.textContent = kind === "caught" && card.there <= threshold ? ELSEWHERE : BADGE[kind];
      }
      const put = (selector, text) => { one(panel, selector).textContent = text; };
      put(".tp", count.caught); put(".fn", count.missed); put(".fp", count.alarm); put(".tn", count.passed);
      put(".recall", bad.length ? percent(count.caught / bad.length) : "no defects");
      put(".recall-interval", interval(count.caught, bad.length));
      put(".fpr", good.length ? percent(count.alarm / good.length) : "no good images");
      put(".fpr-interval", interval(count.alarm, good.length));
      for (const cell of all(panel, ".flagged-of")) cell.textContent = flagged[cell.dataset.group] || 0;
      put(".of-all", cards.length);
      for (const kind in count) put(".of-" + kind, count[kind]);

      const across = (100 * (threshold - low)) / (high - low) + "%";
      one(panel, ".clip-below").setAttribute("width", across);
      one(panel, ".clip-above").setAttribute("x", across);
      for (const end of ["x1", "x2"]) one(panel, ".cut").setAttribute(end, across);
      if (good.length && bad.length) {
        const at = `M${count.alarm / good.length} ${1 - count.caught / bad.length}h0`;
        const dot = one(panel, ".at-roc");
        dot.setAttribute("d", at);
        dot.previousElementSibling.setAttribute("d", at);
      }
      slider.value = threshold;
      slider.setAttribute("aria-valuetext",
        `${show(threshold)}: ${plural(count.missed, "missed defect")}, ${plural(count.alarm, "false alarm")}`);
      exact.value = typed(threshold);
      for (const button of all(panel, ".preset")) {
        button.setAttribute("aria-pressed", preset(button.dataset.preset) === threshold);
      }
      if (order.value === "near") sort();
      filter();
    }

    function preset(name) {
      if (name === "no-alarm" && good.length) return Math.max(...good.map((c) => c.score));
      if (name === "no-miss" && bad.length) {
        const weakest = Math.min(...bad.map((c) => c.score));
        return Math.max(...steps.filter((s) => s < weakest));
      }
      return given;
    }

    function filter() {
      const outcome = one(panel, ".chips input:checked").value, group = one(panel, ".kind").value;
      let shown = 0;
      for (const card of cards) {
        const hide = (outcome !== "all" && card.kind !== outcome) || (group !== "all" && card.group !== group);
        card.element.hidden = hide;
        shown += !hide;
      }
      const text = shown ? `${shown} of ${plural(cards.length, "image")} shown` : "No image matches these filters.";
      const status = one(panel, ".shown-count");
      if (status.textContent !== text) status.textContent = text;
    }

    function sort() {
      const by = {
        high: (a, b) => b.score - a.score,
        low: (a, b) => a.score - b.score,
        near: (a, b) => Math.abs(a.score - threshold) - Math.abs(b.score - threshold),
        name: (a, b) => (a.name < b.name ? -1 : a.name > b.name),
      }[order.value];
      gallery.append(...cards.sort(by).map((c) => c.element));
    }

    slider.addEventListener("input", () => decide(+slider.value));
    slider.addEventListener("keydown", (event) => {
      const jump = { PageUp: 0.05, PageDown: -0.05 }[event.key];
      if (["ArrowUp", "ArrowRight"].includes(event.key)) decide(steps.find((s) => s > threshold) ?? high);
      else if (["ArrowDown", "ArrowLeft"].includes(event.key)) {
        const passed = steps.findLast((s) => s <= threshold); // its image is the next to be flagged
        decide(steps.findLast((s) => s < passed) ?? low);
      } else if (jump) decide(threshold + jump * (high - low));
      else if (event.key === "Home") decide(low);
      else if (event.key === "End") decide(high);
      else return;
      event.preventDefault();
    });
    exact.addEventListener("change", () => decide(exact.value === "" ? threshold : +exact.value));
    for (const button of all(panel, ".preset")) {
      button.addEventListener("click", () => decide(preset(button.dataset.preset)));
    }
    for (const input of all(panel, ".chips input, .kind")) input.addEventListener("change", filter);
    order.addEventListener("change", sort);
    for (const box of all(panel, "[data-layer]")) {
      box.addEventListener("change", () => panel.classList.toggle("hide-" + box.dataset.layer, !box.checked));
    }
    gallery.addEventListener("click", (event) => {
      const view = event.target.closest(".view");
      if (view) enlarge(view.closest(".card"));
    });
    decide(given);
  }

  // -------------------------------------------------------------------------------------------- one image, enlarged
  const dialog = one(document, ".enlarged");
  let current = null;

  function enlarge(card) {
    current = card;
    const picture = one(card, ".picture"), plain = picture.cloneNode(true), marked = picture.cloneNode(true);
    for (const layer of all(plain, ".heat, path")) layer.remove();
    const panes = [[plain, "Photograph"], [marked, "Map and outlines"]].map(([svg, text]) => {
      const figure = document.createElement("figure"), caption = document.createElement("figcaption");
      caption.textContent = text;
      figure.append(svg, caption);
      return figure;
    });
    one(dialog, ".panes").replaceChildren(...panes);
    const kind = card.classList[1], badge = one(dialog, ".badge");
    dialog.className = "enlarged " + kind;
    badge.textContent = one(card, ".badge").textContent;
    one(dialog, "#enlarged-name").textContent = one(card, ".name").textContent;
    one(dialog, ".enlarged-text").textContent = picture.getAttribute("aria-label");
    if (!dialog.open) dialog.showModal();
  }

  function move(by) {
    const shown = all(current.parentElement, ".card:not([hidden])");
    if (!shown.length) return;
    const next = shown[(shown.indexOf(current) + by + shown.length) % shown.length];
    enlarge(next);
  }

  one(dialog, ".previous").addEventListener("click", () => move(-1));
  one(dialog, ".next").addEventListener("click", () => move(1));
  one(dialog, ".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { event.preventDefault(); move(by); }
  });
  dialog.addEventListener("close", () => one(current, ".view").focus());

  // ------------------------------------------------------------------------------------------------------- tabs
  const panels = all(document, ".panel"), tabs = all(document, ".tab");
  panels.forEach(section);

  function open(index, focus) {
    tabs.forEach((tab, n) => {
      tab.setAttribute("aria-selected", n === index);
      tab.tabIndex = n === index ? 0 : -1;
      panels[n].classList.toggle("folded", n !== index);
    });
    if (focus) tabs[index].focus();
  }

  if (tabs.length) {
    one(document, ".tabs").setAttribute("role", "tablist");
    tabs.forEach((tab, n) => {
      tab.setAttribute("role", "tab");
      tab.setAttribute("aria-controls", panels[n].id);
      panels[n].setAttribute("role", "tabpanel");
      panels[n].setAttribute("aria-labelledby", tab.id);
      tab.addEventListener("click", (event) => { event.preventDefault(); open(n, true); });
      tab.addEventListener("keydown", (event) => {
        const to = { ArrowRight: n + 1, ArrowLeft: n - 1, Home: 0, End: tabs.length - 1 }[event.key];
        if (to === undefined && event.key !== " ") return;
        event.preventDefault();
        open(to === undefined ? n : (to + tabs.length) % tabs.length, true);
      });
    });
    all(document, ".jump").forEach((link, n) => link.addEventListener("click", (event) => {
      event.preventDefault();
      open(n, true);
      panels[n].scrollIntoView();
    }));
    open(Math.max(0, panels.findIndex((p) => "#" + p.id === location.hash)), false);
  }
})();
