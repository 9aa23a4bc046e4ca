// Asks for the next task, of which nobody chooses.
for (const button of document.querySelectorAll("[data-next]")) {
  button.addEventListener("click", async () => {
    const refused = document.getElementById("refused");
    button.disabled = true;
    try {
      const next = await window.rushes.ask(`/api/projects/${button.dataset.project}/label/next`, { work: button.dataset.next });
      if (next.assignment_id) location.assign(next.go);
      else window.rushes.say(next.reason, refused);
    } catch (error) {
      window.rushes.say(error.message, refused);
    }
    button.disabled = false;
  });
}
