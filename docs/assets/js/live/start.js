// Bring each interactive figure of the page to life: its drawing gives way to what its own file makes of its data.
// Without a script, or when something fails, the drawing stays.

// The build puts large data into a file of their own, which does not hold up the page.
async function dataOf(figure) {
  if (!figure.dataset.from) return JSON.parse(figure.querySelector("script.data").textContent);
  const answer = await fetch(figure.dataset.from);
  if (!answer.ok) throw new Error(`${figure.dataset.from}: ${answer.status}`);
  return answer.json();
}

async function start(figure) {
  const [{ default: begin }, data] = await Promise.all([import(`./${figure.dataset.live}.js`), dataOf(figure)]);
  const stage = document.createElement("div");
  stage.className = "stage";
  begin(stage, data);
  figure.querySelector(".plates, .plate").replaceWith(stage);
  figure.classList.add("alive"); // the tests wait for this
}

for (const figure of document.querySelectorAll("figure[data-live]")) start(figure).catch((fault) => console.error(fault));
