// Bring each interactive figure of the page to life: its drawing gives way to what its own file makes of its data.
// Without a script, or when something fails, the drawing stays.

async function start(figure) {
  const { default: begin } = await import(`./${figure.dataset.live}.js`);
  const data = JSON.parse(figure.querySelector("script.data").textContent);
  const stage = document.createElement("div");
  stage.className = "stage";
  begin(stage, data);
  figure.querySelector(".plates, .plate").replaceWith(stage);
  figure.classList.add("alive"); // the tests wait for this
}

for (const figure of document.querySelectorAll("figure[data-live]")) start(figure).catch((fault) => console.error(fault));
