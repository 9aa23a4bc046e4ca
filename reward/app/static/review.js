// The reviewers' screen. Nothing sharper than the blurred poster is asked of the server before the reveal of it was written down there; one key hides and pauses.
const { ask } = window.rushes;
const PICTURES = { blur: "blur.jpg", edges: "edges.jpg", light: "light.jpg", sheet: "sheet.jpg" };
const SAYS = { blur: "Blurred poster", edges: "Edge drawing", light: "Light blur", sheet: "Contact sheet", sharp: "The clip itself", none: "Hidden" };
const KEYS = { 1: "blur", 2: "edges", 3: "light", 4: "sheet", 5: "sharp" };
const $ = (id) => document.getElementById(id);
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(15)), (byte) => byte.toString(16).padStart(2, "0")).join("");
const typing = (target) => target.matches("textarea, input:not([type=checkbox]):not([type=radio]):not([type=range]), select");

const root = $("reading");
if (root) (root.dataset.decided ? afterwards : judge)(root.dataset);
if ($("personal")) settings($("personal"));

function settings(form) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const told = new FormData(form);
    const body = { start: told.get("start"), size: told.get("size"), speed: told.get("speed"), grey: told.has("grey"), hold: told.has("hold"), keys: told.has("keys"), without: told.getAll("without") };
    try {
      await ask(`/api/review/${form.dataset.project}/settings`, body);
      window.rushes.say("Kept.");
    } catch (error) {
      form.querySelector("[role=alert]").textContent = error.message;
    }
  });
}

async function go(path, body, where) {
  try {
    location.assign((await ask(path, body)).go);
  } catch (error) {
    if (where) where.textContent = error.message;
    return error;
  }
}

// After the decision: undo while it can be, then on.
function afterwards(data) {
  const undo = $("undo"), next = $("next"), error = $("after-error");
  const until = Number(data.undo);
  const tick = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    undo.hidden = left <= 0;
    if (until) $("countdown").textContent = left > 0 ? `It takes effect in ${left} s.` : "It takes effect now.";
    if (left > 0) setTimeout(tick, 500);
  };
  if (until) tick();
  const back = () => go("/api/reading/undo", { review_id: data.decided }, error);
  const on = () => go(`/api/review/${data.project}/next`, { queue: data.queue }, error);
  undo.addEventListener("click", back);
  next.addEventListener("click", on);
  document.addEventListener("keydown", (event) => {
    if (data.keys && event.key.toLowerCase() === "z" && !undo.hidden && !event.ctrlKey && !event.metaKey) back();
  });
  next.focus();
}

function judge(data) {
  const still = $("still"), clip = $("clip"), cover = $("cover"), player = $("player"), form = $("decision");
  const media = (name) => `/review-media/${data.reading}/${name}`;
  const missing = new Set(data.missing.split(" ").filter(Boolean));
  const asked = new Map(); // level -> the promise that its reveal is written down
  const buttons = new Map([...document.querySelectorAll("[data-level]")].map((button) => [button.dataset.level, button]));
  let level = "none", wanted = "none", marks = [], markFrom = null, sent = { body: "", id: "" };

  // Showing
  function put(name) {
    level = name;
    for (const [each, button] of buttons) button.setAttribute("aria-pressed", String(each === name));
    clip.hidden = name !== "sharp";
    player.hidden = !clip.getAttribute("src");
    still.hidden = !(name in PICTURES);
    cover.hidden = name !== "none";
    cover.textContent = "Hidden";
    if (name in PICTURES) {
      still.alt = `${SAYS[name]} of the clip`;
      if (still.getAttribute("src") !== media(PICTURES[name])) still.src = media(PICTURES[name]);
    }
    $("shown").textContent = SAYS[name];
  }

  function hide() {
    wanted = "none";
    clip.pause();
    put("none");
    playing();
  }

  async function show(name) {
    wanted = name;
    if (missing.has(name)) return fail(name);
    if (name !== "blur" && !asked.has(name)) asked.set(name, ask(`/api/reading/${data.reading}/reveal`, { level: name }));
    try {
      await asked.get(name);
    } catch (error) {
      asked.delete(name);
      return over(error);
    }
    if (wanted !== name) return; // hidden again in the meantime
    if (name === "sharp" && !clip.getAttribute("src")) {
      clip.src = media("clip.mp4");
      clip.playbackRate = clip.defaultPlaybackRate = Number($("speed").value);
    }
    if (name !== "sharp") clip.pause();
    put(name);
    playing();
  }

  function fail(name) {
    put("none");
    cover.textContent = `${SAYS[name]}: the file is not there. What cannot be seen is not safe: give the clip back, or say you cannot tell.`;
    $("shown").textContent = cover.textContent;
  }

  still.addEventListener("error", () => fail(level in PICTURES ? level : "blur"));
  clip.addEventListener("error", () => fail("sharp"));

  const holding = () => $("hold").checked;
  const release = () => { if (holding() && wanted !== "none" && wanted !== "blur") back(); };
  const back = () => { clip.pause(); if (data.start === "text") hide(); else show("blur"); };
  for (const [name, button] of buttons) {
    button.addEventListener("pointerdown", () => { if (holding()) show(name); });
    for (const end of ["pointerup", "pointercancel", "pointerleave"]) button.addEventListener(end, release);
    button.addEventListener("keydown", (event) => { if (holding() && [" ", "Enter"].includes(event.key)) { event.preventDefault(); event.stopPropagation(); if (!event.repeat) show(name); } });
    button.addEventListener("keyup", release);
    button.addEventListener("click", () => { if (!holding()) show(name); });
    button.addEventListener("contextmenu", (event) => event.preventDefault());
  }
  document.querySelector("[data-hide]").addEventListener("click", hide);
  document.addEventListener("visibilitychange", () => { if (document.hidden) hide(); });
  window.addEventListener("blur", release);
  $("grey").addEventListener("change", () => clip.classList.toggle("grey", $("grey").checked));

  // Playing
  const play = $("play"), seek = $("seek"), speed = $("speed");
  function playing() {
    play.firstChild.textContent = clip.paused ? "Play " : "Pause ";
    play.setAttribute("aria-pressed", String(!clip.paused));
  }
  const toggle = () => { if (level === "sharp") clip.paused ? clip.play().catch(() => {}) : clip.pause(); };
  const to = (seconds) => { clip.pause(); clip.currentTime = Math.max(0, Math.min(seconds, clip.duration || 0)); };
  const step = (frames) => { if (level === "sharp") to(clip.currentTime + frames / Number(data.fps)); };
  play.addEventListener("click", toggle);
  for (const name of ["play", "pause", "ended"]) clip.addEventListener(name, playing);
  clip.addEventListener("loadedmetadata", () => { seek.max = clip.duration; draw(); });
  clip.addEventListener("timeupdate", () => { seek.value = clip.currentTime; });
  seek.addEventListener("input", () => to(Number(seek.value)));
  speed.addEventListener("change", () => { clip.playbackRate = clip.defaultPlaybackRate = Number(speed.value); });
  $("loop").addEventListener("change", () => { clip.loop = $("loop").checked; });
  for (const button of document.querySelectorAll("[data-step]")) button.addEventListener("click", () => step(Number(button.dataset.step)));

  // Marks
  const length = () => clip.duration || Number(data.seconds) || 1;
  const round = (seconds) => Math.round(seconds * 100) / 100;
  function draw() {
    $("marks").replaceChildren(...marks.map((mark) => {
      const bar = document.createElement("i");
      bar.style.left = `${(100 * mark.start) / length()}%`;
      bar.style.width = `${(100 * (mark.end - mark.start)) / length()}%`;
      return bar;
    }));
    $("mark-list").replaceChildren(...marks.map((mark, place) => {
      const entry = document.createElement("li"), button = document.createElement("button");
      button.type = "button";
      button.className = "quiet";
      button.textContent = `${mark.start.toFixed(2)} – ${mark.end.toFixed(2)} s ×`;
      button.setAttribute("aria-label", `Take away the mark from ${mark.start.toFixed(2)} to ${mark.end.toFixed(2)} seconds`);
      button.addEventListener("click", () => { marks.splice(place, 1); draw(); changed(); });
      entry.append(button);
      return entry;
    }));
    $("mark-end").disabled = markFrom === null;
  }
  const markStart = () => { if (level !== "sharp") return; markFrom = round(clip.currentTime); draw(); };
  const markEnd = () => {
    if (markFrom === null || marks.length >= 50) return;
    const here = round(clip.currentTime);
    marks.push({ start: Math.min(markFrom, here), end: Math.max(markFrom, here) });
    markFrom = null;
    draw();
    changed();
  };
  $("mark-start").addEventListener("click", markStart);
  $("mark-end").addEventListener("click", markEnd);

  // The form
  const number = (text) => (text ? Number(text) : null);
  function told() {
    const found = new FormData(form);
    return {
      said: found.get("said"), policies: found.getAll("policies"), severity: number(found.get("severity")), temporal: found.has("temporal"), marks,
      rationale: found.get("rationale"), confidence: number(found.get("confidence")), escalate: found.has("escalate"), ruling: found.get("ruling"),
    };
  }
  function fill(draft) {
    for (const name of ["said", "ruling"]) {
      const chosen = draft[name] && form.querySelector(`[name=${name}][value=${draft[name]}]`);
      if (chosen) chosen.checked = true;
    }
    for (const box of form.querySelectorAll("[name=policies]")) box.checked = draft.policies.includes(box.value);
    for (const name of ["temporal", "escalate"]) form.elements[name].checked = draft[name];
    for (const name of ["severity", "confidence"]) form.elements[name].value = draft[name] ?? "";
    form.elements.rationale.value = draft.rationale;
    marks = draft.marks;
    draw();
  }
  const over = (error) => { $("decision-error").textContent = error.message; if (error.status === 404 || error.status === 409) { hide(); $("shown").textContent = error.message; } };
  let timer = 0;
  const save = () => { clearTimeout(timer); timer = 0; return ask(`/api/reading/${data.reading}/draft`, told()).then((answer) => leased(answer.lease_until), over); };
  const changed = () => { clearTimeout(timer); timer = setTimeout(save, 800); };
  const leased = (until) => { $("lease").textContent = until ? `Yours until ${new Date(until).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })}` : ""; };
  form.addEventListener("input", changed);
  let seen = Date.now(); // a lease is renewed while somebody is there, not for ever
  for (const name of ["keydown", "pointerdown"]) document.addEventListener(name, () => { seen = Date.now(); });
  setInterval(() => { if (Date.now() - seen < 300_000) save(); }, 120_000);

  let sending = false;
  async function send() {
    if (sending) return;
    const body = { ...told(), policy_version: data.policy };
    const ruled = ["uphold", "refer"].includes(body.ruling);
    if (!body.said && ruled) body.said = "cannot_tell";
    if (!body.said) return problem("Say whether it violates the policy.", form.querySelector("[name=said]"));
    if (body.said === "violating" && !body.policies.length && !ruled) return problem("Name at least one policy that it violates.", form.querySelector("[name=policies]"));
    if (ruled || ["not_violating", "cannot_tell"].includes(body.said)) body.policies = [];
    if (ruled) body.said = "cannot_tell";
    if (!body.rationale.trim()) return problem("Say why, in a few words.", form.elements.rationale);
    const written = JSON.stringify(body);
    if (sent.body !== written) sent = { body: written, id: newId() };
    sending = true;
    clearTimeout(timer);
    clip.pause();
    await go(`/api/reading/${data.reading}/decide`, { ...body, id: sent.id }, $("decision-error"));
    sending = false;
  }
  function problem(text, where) {
    $("decision-error").textContent = text;
    where.focus();
  }
  form.addEventListener("submit", (event) => { event.preventDefault(); send(); });

  // Ways out
  const leave = (path, body) => { hide(); go(`/api/reading/${data.reading}/${path}`, body, $("decision-error")); };
  $("skip").addEventListener("click", () => leave("skip", {}));
  $("suspect")?.addEventListener("click", () => leave("suspect", {}));

  // Keys
  const choose = (name, value) => { const box = form.querySelector(`[name=${name}][value=${value}]`); box.checked = true; box.focus(); changed(); };
  const flip = (name) => { form.elements[name].checked = !form.elements[name].checked; changed(); };
  const keys = {
    v: () => choose("said", "violating"), n: () => choose("said", "not_violating"), b: () => choose("said", "borderline"), c: () => choose("said", "cannot_tell"),
    p: () => form.querySelector("[name=policies]").focus(), r: () => form.elements.rationale.focus(), t: () => flip("temporal"), e: () => flip("escalate"),
    ",": () => step(-1), ".": () => step(1), "[": markStart, "]": markEnd,
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.preventDefault(); return hide(); }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); return send(); }
    if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target) || !data.keys) return;
    if (event.key in KEYS) { event.preventDefault(); if (!event.repeat) show(KEYS[event.key]); return; }
    if (event.key === " " && level === "sharp" && !event.target.matches("button, input, summary")) { event.preventDefault(); return toggle(); }
    const act = keys[event.key.toLowerCase()];
    if (act && !(event.target.matches("input[type=radio], input[type=range]") && event.key.startsWith("Arrow"))) { event.preventDefault(); act(); }
  }, true);
  document.addEventListener("keyup", (event) => { if (event.key in KEYS && !typing(event.target)) release(); });

  fill(JSON.parse(data.draft));
  if (data.start === "blur") show("blur"); else put("none");
}
