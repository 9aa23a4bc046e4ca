// The screen on which clips of a prompt are ranked, or accepted as examples. Its parts come from /api/assignments/ID; the next task is made ready behind it.
const { ask, say } = window.rushes;
const root = document.getElementById("screen");
const { Player } = await import(root.dataset.player);
const $ = (id) => document.getElementById(id);
const LETTERS = "ABCDEF";
const ORDINALS = ["1st", "2nd", "3rd", "4th", "5th", "6th"];
const SURE = [["0.25", "A guess"], ["0.5", "Rather"], ["0.75", "Quite"], ["1", "Certain"]];
const DRAFT_MS = 700;

let now = null; // the task on the screen: { view, takes, player, said, began, history, ... }
let ahead = null; // the next one, made ready
let sending = false;
let confirmed = ""; // what a second Enter agrees to

// Small things

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

const newId = () => `w_${crypto.getRandomValues(new Uint32Array(5)).reduce((text, n) => text + n.toString(36).padStart(7, "0"), "")}`.slice(0, 36);
const heard = (text) => ($("live").textContent = text);
const wrong = (text) => say(text, $("wrong"));
const examples = () => now.view.work === "demonstration";
const places = () => now.view.clips.map((each) => each.place);
const usable = (place) => now.view.clips[place].available && !now.said.unsafe[place] && !now.said.broken.includes(place) && !now.player.failed.has(place);
const dimension = () => now.view.dimensions[now.said.step];
const ranks = () => (now.said.ranks[dimension().name] ??= places().map(() => null));
const key = (id) => `undo ${now.view.project_id} ${id}`;

// A task is made ready: its elements load before they are shown

async function prepare(assignmentId, left = null) {
  const view = await ask(`/api/assignments/${assignmentId}`);
  const held = left || view.draft || {};
  const said = { step: 0, ranks: {}, allBad: false, broken: [], unsafe: {}, likert: {}, confidence: "", comment: "", accepted: {}, best: null, caption: null, ...held.said };
  if (view.prompt !== null && view.work === "rank") said.step = Math.max(said.step, view.dimensions.findIndex((each) => each.sees_prompt));
  const takes = view.clips.map((clip) => take(view, clip));
  const player = new Player(takes.map((each) => each.video), view.fps);
  if (held.seen) player.restore(held.seen, held.ms);
  view.clips.forEach((clip, place) => clip.available || player.drop(place));
  const task = { view, said, takes, player, began: null, spent: held.spent || 0, history: [], focus: 0, flip: false, answerId: held.answerId || newId(), saving: null };
  player.addEventListener("tick", () => now === task && tick());
  player.addEventListener("state", () => now === task && draw());
  return task;
}

function take(view, clip) {
  const letter = LETTERS[clip.place];
  const video = el("video", { playsinline: true, preload: "auto", disablepictureinpicture: true, tabindex: "-1", "aria-label": `Clip ${letter}` });
  video.muted = true;
  if (clip.available) video.src = clip.media;
  const gone = el("p", { class: "gone", hidden: true });
  const box = el("div", { class: "box", onclick: () => focus(clip.place) }, video, gone);
  box.style.aspectRatio = `${view.box[0]} / ${view.box[1]}`;
  const badge = el("span", { class: "badge", "aria-hidden": "true" });
  box.append(badge);
  const letterOf = el("span", { class: "letter", "aria-hidden": "true", title: "Drag to a place below" }, letter);
  if (view.work === "rank") drag(letterOf, clip.place);
  const buttons = {};
  const bar = el("div", { class: "ranks", role: "group", "aria-label": view.work === "rank" ? `Rank of clip ${letter}` : `Clip ${letter} as an example` });
  const press = (name, label, text, act) => {
    buttons[name] = el("button", { type: "button", class: text.length > 2 ? "rank word" : "rank", "aria-pressed": "false", "aria-label": label, onclick: () => (focus(clip.place, false), act()) }, text);
    return buttons[name];
  };
  if (view.work === "rank") {
    view.clips.forEach((_, at) => bar.append(press(at + 1, `Clip ${letter}: ${ORDINALS[at]}`, String(at + 1), () => rank(clip.place, at + 1))));
  } else {
    bar.append(press("yes", `Accept clip ${letter}`, "Accept", () => accept(clip.place, true)), press("no", `Reject clip ${letter}`, "Reject", () => accept(clip.place, false)));
    bar.append(press("best", `Clip ${letter} is the best`, "Best", () => best(clip.place)));
  }
  const marks = el("div", { class: "marks" });
  if (view.work === "rank") marks.append(press("broken", `Clip ${letter} is broken`, "Broken", () => broken(clip.place)));
  marks.append(press("unsafe", `Clip ${letter} is unsafe: say why`, "Unsafe…", () => unsafe(clip.place)));
  const stars = el("div", { class: "stars", role: "group", "aria-label": `How good is clip ${letter}, 1 to 5` });
  if (view.work === "rank" && view.likert) {
    for (let n = 1; n <= 5; n++) stars.append(press(`star${n}`, `Clip ${letter}: ${n} of 5`, String(n), () => rate(clip.place, n)));
  }
  const caption = el("figcaption", {}, letterOf, bar, stars.childElementCount ? stars : "", marks);
  const figure = el("figure", { class: "take", tabindex: "0", role: "group", onfocus: () => focus(clip.place, false) }, box, caption);
  return { figure, video, gone, badge, buttons };
}

// A task is shown

function show(task) {
  for (const each of [now, ahead]) if (each && each !== task) each.player.close();
  [now, ahead, confirmed] = [task, null, ""];
  now.began = performance.now();
  root.dataset.assignment = now.view.assignment_id;
  history.replaceState(null, "", `/assignments/${now.view.assignment_id}`);
  $("takes").replaceChildren(...now.takes.map((each) => each.figure));
  $("takes").dataset.number = now.takes.length;
  $("practice").hidden = !now.view.practice;
  $("progress").textContent = `${now.view.done} answered, ${now.view.today} today`;
  $("speed").value = "1";
  wrong("");
  pose();
  drawMore();
  draw();
  focus(0, false);
  $("question").focus({ preventScroll: true });
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  now.player.ready.then(() => {
    if (now !== task) return;
    tick();
    draw();
    if (!still && !document.querySelector("dialog[open]")) task.player.play();
  });
}

function pose() {
  const { view, said } = now;
  const prompt = $("prompt");
  if (examples()) {
    $("question").textContent = "Which clips are worth imitating?";
    $("steps").textContent = "Accept or reject every clip";
  } else {
    $("question").textContent = visible(dimension().question);
    $("steps").textContent = view.dimensions.length > 1 ? `Question ${said.step + 1} of ${view.dimensions.length}` : "Rank the clips, 1 is best";
  }
  const sees = examples() || dimension().sees_prompt;
  prompt.hidden = !(sees && view.prompt !== null);
  prompt.lang = view.lang;
  prompt.textContent = prompt.hidden ? "" : visible(view.prompt);
  const last = examples() || said.step === view.dimensions.length - 1 || said.allBad;
  $("submit").textContent = last ? "Submit" : "Next question";
  $("all-bad").hidden = examples();
  $("board").hidden = examples();
}

// What cannot be seen is shown, as on the server's pages (`visible` in web.py).
const HIDDEN = /(?![\t\n])[\p{Default_Ignorable_Code_Point}\p{Cf}\p{Zl}\p{Zp}\p{Cc}]/gu;
const visible = (text) => text.replace(HIDDEN, (c) => `‹U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`);

function drawMore() {
  const { view, said } = now;
  const parts = [];
  if (examples()) {
    const area = el("textarea", { id: "caption", rows: "2", maxlength: "4000", oninput: () => ((said.caption = area.value), save()) });
    area.value = said.caption ?? view.prompt;
    parts.push(el("label", {}, "What the clips show; correct it where it is wrong", area));
  } else {
    if (view.confidence) {
      const set = el("fieldset", { class: "sure" }, el("legend", {}, "How sure are you?"));
      for (const [value, text] of SURE) {
        const input = el("input", { type: "radio", name: "sure", value, onchange: () => ((said.confidence = value), save()) });
        input.checked = said.confidence === value;
        set.append(el("label", { class: "choice" }, input, ` ${text}`));
      }
      parts.push(set);
    }
    const area = el("textarea", { rows: "2", maxlength: "2000", oninput: () => ((said.comment = area.value), save()) });
    area.value = said.comment;
    parts.push(el("details", said.comment ? { open: true } : {}, el("summary", {}, "A remark"), el("label", {}, "For those who run the project", area)));
  }
  $("more").replaceChildren(...parts);
}

function draw() {
  const { view, said, takes, player } = now;
  const given = examples() ? null : ranks();
  takes.forEach((each, place) => {
    const ok = usable(place);
    const lost = !view.clips[place].available || said.unsafe[place] ? "Not shown: a reviewer looks at it" : player.failed.has(place) ? "This clip does not load. Call it broken" : "";
    each.gone.hidden = !lost;
    each.gone.textContent = lost;
    each.video.hidden = Boolean(lost);
    let state = "not ranked";
    for (const [name, button] of Object.entries(each.buttons)) {
      let on = false;
      if (name === "broken") on = said.broken.includes(place);
      else if (name === "unsafe") on = Boolean(said.unsafe[place]);
      else if (name === "yes") on = said.accepted[place] === true;
      else if (name === "no") on = said.accepted[place] === false;
      else if (name === "best") on = said.best === place;
      else if (name.startsWith("star")) on = said.likert[place] === Number(name.slice(4));
      else on = ok && !said.allBad && given[place] === Number(name);
      button.setAttribute("aria-pressed", String(on));
      const shown = view.clips[place].available && !said.unsafe[place];
      button.disabled = name === "broken" ? !shown : name === "unsafe" ? !shown : !ok || (said.allBad && /^\d$/.test(name));
    }
    let badge = "";
    if (said.broken.includes(place)) [badge, state] = ["broken", "broken"];
    else if (lost) state = lost;
    else if (examples()) {
      state = said.best === place ? "the best" : said.accepted[place] === true ? "accepted" : said.accepted[place] === false ? "rejected" : "not decided";
      badge = said.best === place ? "best" : { true: "yes", false: "no" }[said.accepted[place]] || "";
    } else if (said.allBad) [badge, state] = ["bad", "all bad"];
    else if (given[place] !== null) [badge, state] = [ORDINALS[given[place] - 1], `ranked ${ORDINALS[given[place] - 1]}`];
    each.badge.textContent = badge;
    each.badge.dataset.rank = !examples() && given[place] !== null && ok ? given[place] : "";
    each.figure.setAttribute("aria-label", `Clip ${LETTERS[place]}, ${state}`);
    each.figure.classList.toggle("current", place === now.focus);
  });
  $("takes").classList.toggle("one", now.flip);
  $("flip").setAttribute("aria-pressed", String(now.flip));
  $("all-bad").setAttribute("aria-pressed", String(said.allBad));
  $("play").textContent = player.playing ? "Pause" : "Play";
  player.visible = now.flip ? new Set([now.focus]) : new Set(places());
  if (!examples()) drawBoard(given);
}

function drawBoard(given) {
  const row = (rank, name) => {
    const chips = places().filter((place) => usable(place) && !now.said.allBad && given[place] === rank);
    return el("div", { class: "slot", "data-rank": rank ?? "" }, el("span", { class: "name" }, name), ...chips.map((place) => drag(el("span", { class: "chip" }, LETTERS[place]), place)));
  };
  $("board").replaceChildren(...places().map((at) => row(at + 1, at ? ORDINALS[at] : "Best")), row(null, "Not ranked"));
}

function tick() {
  const { player } = now;
  $("seek").value = player.duration ? Math.round((1000 * player.time) / player.duration) : 0;
  $("seek").setAttribute("aria-valuetext", `${player.time.toFixed(2)} seconds of ${player.duration.toFixed(2)}`);
  $("time").textContent = `${player.time.toFixed(2)} / ${player.duration.toFixed(2)} s`;
}

function focus(place, move = true) {
  now.focus = place;
  draw();
  if ($("sound").getAttribute("aria-pressed") === "true") now.player.sound(place);
  if (move) now.takes[place].figure.focus({ preventScroll: false });
}

function flip(on) {
  now.flip = on;
  draw();
  if (on) now.takes[now.focus].figure.focus({ preventScroll: true });
}

// What is said

function change(act) {
  const before = JSON.stringify(now.said);
  act();
  if (JSON.stringify(now.said) === before) return;
  now.history.push(before);
  confirmed = "";
  wrong("");
  pose();
  draw();
  save();
  if (complete()) fetchNext();
}

function rank(place, value) {
  if (!usable(place) || examples()) return;
  change(() => {
    now.said.allBad = false;
    ranks()[place] = ranks()[place] === value ? null : value;
  });
  heard(`Clip ${LETTERS[place]} ${ranks()[place] === null ? "not ranked" : ORDINALS[ranks()[place] - 1]}`);
}

function tie(place) {
  // As good as the one above: the nearest better rank, or the last one given where it has none.
  const held = places().filter((each) => each !== place && usable(each) && ranks()[each] !== null).map((each) => ranks()[each]);
  const mine = ranks()[place];
  const above = mine === null ? held : held.filter((each) => each < mine);
  if (above.length) set(place, Math.max(...above));
}

function set(place, value) {
  if (usable(place) && ranks()[place] !== value) rank(place, value === null ? ranks()[place] : value);
}

function broken(place) {
  if (!now.view.clips[place].available || now.said.unsafe[place]) return;
  change(() => {
    const held = now.said.broken;
    now.said.broken = held.includes(place) ? held.filter((each) => each !== place) : [...held, place].sort();
  });
  heard(`Clip ${LETTERS[place]} ${now.said.broken.includes(place) ? "called broken" : "not broken"}`);
}

const rate = (place, n) => change(() => (now.said.likert[place] = n));

function accept(place, yes) {
  if (!usable(place)) return;
  change(() => {
    now.said.accepted[place] = yes;
    if (!yes && now.said.best === place) now.said.best = null;
  });
  heard(`Clip ${LETTERS[place]} ${yes ? "accepted" : "rejected"}`);
}

function best(place) {
  if (!usable(place)) return;
  change(() => {
    now.said.best = now.said.best === place ? null : place;
    now.said.accepted[place] = true;
  });
  heard(`Clip ${LETTERS[place]} ${now.said.best === place ? "is the best" : "is not the best"}`);
}

function allBad() {
  if (examples()) return;
  change(() => (now.said.allBad = !now.said.allBad));
  heard(now.said.allBad ? "All bad" : "Not all bad");
}

async function undo() {
  if (now.history.length) {
    const kept = { unsafe: now.said.unsafe, step: now.said.step };
    now.said = { ...JSON.parse(now.history.pop()), ...kept };
    pose();
    drawMore();
    draw();
    save();
    heard("Undone");
    return;
  }
  const last = sessionStorage.getItem(key("answer"));
  if (!last) return heard("There is nothing to undo");
  try {
    const { id, left } = JSON.parse(last);
    const told = await ask(`/api/answers/${id}/undo`, {});
    sessionStorage.removeItem(key("answer"));
    await store();
    const task = await prepare(told.go.split("/").pop(), left);
    task.answerId = newId();
    show(task);
    store();
    heard("Your last answer is taken back");
  } catch (error) {
    wrong(error.message);
  }
}

function complete() {
  const { view, said } = now;
  const good = places().filter(usable);
  if (examples()) return good.every((place) => said.accepted[place] !== undefined);
  return said.allBad || (said.step === view.dimensions.length - 1 && good.every((place) => ranks()[place] !== null));
}

// Drafts

function save() {
  clearTimeout(now.saving);
  now.saving = setTimeout(store, DRAFT_MS, now);
}

function draftOf({ said, player, answerId, spent, began }) {
  return { said, answerId, spent: Math.round(spent + performance.now() - began), seen: player.seen.map((each) => [...each]), ms: player.ms.map(Math.round) };
}

async function store(task = now) {
  clearTimeout(task.saving);
  task.saving = null;
  try {
    await ask(`/api/assignments/${task.view.assignment_id}/draft`, { draft: draftOf(task) });
  } catch (error) {
    if (task === now && !sending) wrong(error.message);
  }
}

document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "hidden" && now) {
    now.player.pause();
    if (now.saving) store();
  }
});

// Sending

async function advance() {
  if (sending || !now) return;
  const { view, said } = now;
  const good = places().filter(usable);
  if (!examples() && !said.allBad) {
    const open = good.filter((place) => ranks()[place] === null);
    if (good.length > 1 && good.length - open.length < 2) return stop(open[0], "Rank two clips at least.");
    if (open.length && good.length > 1 && agreed("open")) return stop(open[0], `Not ranked: ${open.map((place) => LETTERS[place]).join(", ")}. Enter again leaves it so.`);
    if (said.step < view.dimensions.length - 1) return nextQuestion();
  }
  if (examples()) {
    const open = good.find((place) => said.accepted[place] === undefined);
    if (open !== undefined) return stop(open, "Accept or reject every clip.");
  }
  const short = good.find((place) => now.player.watched(place) < view.least_watched);
  if (short !== undefined) {
    if (!now.player.playing) now.player.play();
    return stop(short, `Watch every clip first: of clip ${LETTERS[short]} you have seen ${Math.round(100 * now.player.watched(short))} %.`);
  }
  if (!examples() && view.likert) {
    const unrated = good.find((place) => !said.likert[place]);
    if (unrated !== undefined) return stop(unrated, `Rate clip ${LETTERS[unrated]}, 1 to 5.`);
  }
  if (!examples() && view.confidence && !said.confidence) {
    document.querySelector("#more input").focus();
    return wrong("Say how sure you are.");
  }
  await send(examples() ? "demonstrate" : "answer", examples() ? demonstration() : answer());
}

function agreed(what) {
  // True the first time: the second time the same is asked for, it is meant.
  const name = `${what} ${now.said.step} ${JSON.stringify(now.said.ranks)}`;
  const first = confirmed !== name;
  confirmed = name;
  return first;
}

function stop(place, text) {
  focus(place);
  wrong(text);
}

async function nextQuestion() {
  const { view, said } = now;
  const task = now;
  if (!dimension().sees_prompt && view.dimensions[said.step + 1].sees_prompt && view.prompt === null) {
    sending = true;
    try {
      await store();
      const blind = Object.fromEntries(view.dimensions.filter((each) => !each.sees_prompt).map((each) => [each.name, said.ranks[each.name]]));
      view.prompt = (await ask(`/api/assignments/${view.assignment_id}/prompt`, { ranks: blind })).prompt;
    } catch (error) {
      return wrong(error.message);
    } finally {
      sending = false;
    }
    if (task !== now) return;
  }
  said.step += 1;
  now.history = [];
  confirmed = "";
  wrong("");
  pose();
  draw();
  save();
  $("question").focus({ preventScroll: true });
}

function watching() {
  const { player, answerId } = now;
  return {
    id: answerId,
    watched: places().map((place) => player.watched(place)),
    watch_ms: places().map((place) => Math.round(player.ms[place])),
    lead_time_ms: Math.round(now.spent + performance.now() - now.began),
  };
}

const suspects = () => Object.entries(now.said.unsafe).map(([place, policies]) => ({ place: Number(place), policies }));

function answer() {
  const { said, view } = now;
  const likert = view.likert ? places().map((place) => said.likert[place] ?? null) : null;
  const given = said.allBad ? {} : Object.fromEntries(Object.entries(said.ranks).map(([name, each]) => [name, each.map((value, place) => (usable(place) ? value : null))]));
  const lost = places().filter((place) => now.player.failed.has(place) && view.clips[place].available && !said.unsafe[place]);
  const bad = [...new Set([...said.broken, ...lost])];
  return { ...watching(), ranks: given, all_bad: said.allBad, broken: bad, unsafe: suspects(), likert, confidence: said.confidence ? Number(said.confidence) : null, comment: said.comment };
}

function demonstration() {
  const { said, view } = now;
  const caption = said.caption !== null && said.caption.trim() !== view.prompt.trim() ? said.caption : "";
  return { ...watching(), accepted: places().map((place) => (usable(place) ? said.accepted[place] : null)), best: said.best, caption, unsafe: suspects() };
}

async function send(where, body) {
  if (sending) return;
  sending = true;
  $("submit").disabled = true;
  clearTimeout(now.saving);
  try {
    const said = JSON.stringify([where, { ...body, watched: 0, watch_ms: 0, lead_time_ms: 0 }]);
    if (now.sent?.said !== said) now.sent = { said, body }; // what is sent again after a broken connection is the same, while the same is said
    const told = await ask(`/api/assignments/${now.view.assignment_id}/${where}`, now.sent.body);
    sessionStorage.setItem(key("answer"), JSON.stringify({ id: told.answer_id, left: draftOf(now) }));
    now.player.pause();
    if (told.feedback) await explain(told.feedback);
    if (told.standing !== "fine") return leave();
    heard("Sent");
    await goOn();
  } catch (error) {
    if (error.status && error.status < 500) now.sent = null; // a server that failed may have kept it
    if (error.status === 403) return leave(); // the room says why
    wrong(error.message);
  } finally {
    sending = false;
    $("submit").disabled = false;
  }
}

function leave() {
  location.assign(`/projects/${now.view.project_id}/label`);
}

async function fetchNext() {
  // The next task loads while this one is still on the screen.
  const task = now;
  if (ahead || task.asked || task.view.practice) return;
  task.asked = true;
  try {
    const told = await ask(`/api/projects/${task.view.project_id}/label/next`, { besides: task.view.assignment_id, work: task.view.work });
    if (told.assignment_id) ahead = await prepare(told.assignment_id);
  } catch {
    // asked for again once this one is sent
  }
}

async function goOn() {
  if (ahead) {
    [ahead.view.done, ahead.view.today] = [now.view.done + 1, now.view.today + 1]; // it was made ready before this answer
    return show(ahead);
  }
  const told = await ask(`/api/projects/${now.view.project_id}/label/next`, { work: now.view.work });
  if (!told.assignment_id) return leave();
  show(await prepare(told.assignment_id));
}

function explain(feedback) {
  $("feedback-title").textContent = feedback.right === null ? "Thank you" : feedback.right ? "As expected" : "Not as expected";
  const parts = [el("ul", {}, ...feedback.notes.map((note, place) => el("li", {}, `Clip ${LETTERS[place]}: ${note}`)))];
  for (const [name, expected] of Object.entries(feedback.expected)) {
    const question = visible(now.view.dimensions.find((each) => each.name === name)?.question || name);
    const best = expected.map((value, place) => (value === 1 ? LETTERS[place] : "")).filter(Boolean);
    const worse = expected.map((value, place) => (value === 2 ? LETTERS[place] : "")).filter(Boolean);
    parts.push(el("p", {}, `${question} ${best.join(", ")} is better than ${worse.join(", ")}, because what was changed on purpose made ${worse.length > 1 ? "those" : "it"} worse.`));
  }
  $("feedback").replaceChildren(...parts);
  return opened($("show-feedback"));
}

// Dialogs

function opened(dialog) {
  now.player.pause();
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => done(dialog.returnValue), { once: true }));
}

async function unsafe(place) {
  if (!now.view.clips[place].available || now.said.unsafe[place]) return;
  const task = now;
  const dialog = $("ask-unsafe");
  const form = dialog.querySelector("form");
  const alert = dialog.querySelector("[role=alert]");
  alert.textContent = "";
  form.reset();
  form.onsubmit = (event) => {
    if (event.submitter?.value === "send" && !form.querySelector(":checked")) {
      event.preventDefault();
      alert.textContent = "Choose what fits, or cancel.";
    }
  };
  if ((await opened(dialog)) !== "send" || task !== now) return;
  const policies = [...form.querySelectorAll(":checked")].map((each) => each.value);
  try {
    await ask(`/api/assignments/${task.view.assignment_id}/flag`, { place, policies });
    task.said.unsafe[place] = policies;
    task.history = [];
    task.takes[place].video.removeAttribute("src");
    task.takes[place].video.load();
    task.player.drop(place);
    heard(`Clip ${LETTERS[place]} is with the reviewers`);
    draw();
    save();
  } catch (error) {
    wrong(error.message);
  }
}

async function skip() {
  const dialog = $("ask-skip");
  const form = dialog.querySelector("form");
  form.reset();
  if ((await opened(dialog)) !== "send") return;
  await send("skip", { id: now.answerId, reason: form.querySelector(":checked").value });
}

// Dragging: a letter, to a place of the board

function drag(handle, place) {
  handle.addEventListener("pointerdown", (event) => {
    if (event.button || !now || !usable(place)) return;
    event.preventDefault();
    handle.setPointerCapture(event.pointerId);
    const [x, y] = [event.clientX, event.clientY];
    const over = (at) => document.elementsFromPoint(at.clientX, at.clientY).map((each) => each.closest?.("[data-rank].slot")).find(Boolean);
    const move = (at) => {
      handle.style.transform = `translate(${at.clientX - x}px, ${at.clientY - y}px)`;
      for (const slot of document.querySelectorAll(".slot")) slot.classList.toggle("over", slot === over(at));
    };
    const end = (at) => {
      handle.removeEventListener("pointermove", move);
      handle.style.transform = "";
      const slot = at.type === "pointerup" ? over(at) : null;
      for (const each of document.querySelectorAll(".slot")) each.classList.remove("over");
      if (slot) set(place, slot.dataset.rank ? Number(slot.dataset.rank) : null);
      focus(place, false);
    };
    handle.addEventListener("pointermove", move);
    handle.addEventListener("pointerup", end, { once: true });
    handle.addEventListener("pointercancel", end, { once: true });
    handle.classList.add("held");
    handle.addEventListener("lostpointercapture", () => handle.classList.remove("held"), { once: true });
  });
  return handle;
}

// Keys and buttons

function next(step) {
  return (now.focus + step + now.takes.length) % now.takes.length;
}

document.addEventListener("keydown", (event) => {
  if (!now || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const at = event.target;
  if (at.closest("textarea, select, input[type=radio], input[type=text]")) return;
  const onButton = at.closest("button, summary, a");
  const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (onButton && (name === "Enter" || name === " ")) return;
  if (at.id === "seek" && name.startsWith("Arrow")) return;
  if (name === "Tab") {
    if (!now.flip || !at.classList.contains("take")) return;
    const to = now.focus + (event.shiftKey ? -1 : 1);
    if (to < 0 || to >= now.takes.length) return;
    event.preventDefault();
    focus(to);
    return;
  }
  const acts = {
    " ": () => now.player.toggle(),
    ",": () => now.player.step(-1),
    ".": () => now.player.step(1),
    ArrowRight: () => focus(next(1)),
    ArrowDown: () => focus(next(1)),
    ArrowLeft: () => focus(next(-1)),
    ArrowUp: () => focus(next(-1)),
    "=": () => examples() || tie(now.focus),
    f: () => (now.flip ? focus(next(1)) : flip(true)),
    Escape: () => flip(false),
    x: allBad,
    b: () => examples() || broken(now.focus),
    u: () => unsafe(now.focus),
    s: skip,
    z: undo,
    y: () => examples() && accept(now.focus, true),
    n: () => examples() && accept(now.focus, false),
    "?": help,
    Enter: advance,
  };
  const digit = Number(name);
  if (/^[1-6]$/.test(name)) {
    if (examples()) digit === 1 && best(now.focus);
    else if (digit <= now.takes.length) rank(now.focus, digit);
  } else if (acts[name]) acts[name]();
  else return;
  event.preventDefault();
});

const help = () => opened($("show-help"));
$("play").onclick = () => now.player.toggle();
$("back").onclick = () => now.player.step(-1);
$("forth").onclick = () => now.player.step(1);
$("seek").oninput = () => now.player.seek(($("seek").value / 1000) * now.player.duration);
$("speed").onchange = () => now.player.speed(Number($("speed").value));
$("loop").onclick = () => {
  now.player.loop = !now.player.loop;
  $("loop").setAttribute("aria-pressed", String(now.player.loop));
};
$("sound").onclick = () => {
  const on = $("sound").getAttribute("aria-pressed") !== "true";
  $("sound").setAttribute("aria-pressed", String(on));
  now.player.sound(on ? now.focus : null);
};
$("flip").onclick = () => flip(!now.flip);
$("all-bad").onclick = allBad;
$("skip").onclick = skip;
$("undo").onclick = undo;
$("help").onclick = help;
$("submit").onclick = advance;

try {
  const first = await prepare(root.dataset.assignment);
  if (["open", "expired"].includes(first.view.state)) show(first);
  else location.replace(`/projects/${first.view.project_id}/label`);
} catch (error) {
  wrong(error.message);
}
