// What every page needs: the session's token on each request, and what went wrong, said where it was asked.
"use strict";

const csrf = () => document.body.dataset.csrf || "";

document.addEventListener("htmx:configRequest", (event) => {
  event.detail.headers["X-CSRF"] = csrf();
});

document.addEventListener("htmx:beforeSwap", (event) => {
  const type = event.detail.xhr.getResponseHeader("content-type") || "";
  if (type.startsWith("application/json")) event.detail.shouldSwap = false; // an answer, not a piece of a page
});

document.addEventListener("htmx:afterRequest", (event) => {
  const form = event.target.closest("form") || event.target;
  const alert = form.querySelector("[role=alert]");
  if (event.detail.successful) {
    if (alert) alert.textContent = "";
    const shown = form.dataset.show && form.querySelector("[role=status]");
    if (shown) shown.textContent = JSON.parse(event.detail.xhr.responseText)[form.dataset.show];
  } else {
    say(reasonOf(event.detail.xhr), alert);
  }
});

function reasonOf(xhr) {
  try {
    return JSON.parse(xhr.responseText).detail;
  } catch {
    return xhr.status ? `The server answered ${xhr.status}.` : "The server does not answer. Is the connection there?";
  }
}

function say(text, where) {
  (where || document.getElementById("said")).textContent = text;
}

// For modules: asks the API as the page's person. Resolves with the answer; rejects with an Error of one line.
async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json", "X-CSRF": csrf() }, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is the connection there?");
  }
  const told = await answer.json().catch(() => ({ detail: `The server answered ${answer.status}.` }));
  if (!answer.ok) throw Object.assign(new Error(told.detail), { status: answer.status });
  return told;
}

window.rushes = { ask, say };
