// The filters of the ledger. Their state lives in the address (?essay=A&verdict=holds), so that a view can be shared.

(() => {
  function start() {
    const ledger = document.querySelector(".ledger:has(.ledger-filter)");
    if (!ledger || ledger.dataset.ready) return;
    ledger.dataset.ready = "yes";
    const form = ledger.querySelector("form");
    const { essay, verdict } = form.elements;
    const shown = form.querySelector("output");
    const rows = [...ledger.querySelectorAll("tr[data-verdict]")];

    const read = () => {
      const asked = new URLSearchParams(location.search);
      for (const select of [essay, verdict]) {
        const value = asked.get(select.name) ?? "";
        select.value = [...select.options].some((option) => option.value === value) ? value : "";
      }
    };
    const wanted = (row) =>
      (!essay.value || row.dataset.essay === essay.value) &&
      (!verdict.value || row.dataset.verdict === verdict.value ||
        (verdict.value === "answered" && row.dataset.verdict !== "not reached yet"));
    const show = () => {
      for (const row of rows) row.hidden = !wanted(row);
      for (const body of ledger.querySelectorAll("tbody")) body.hidden = !body.querySelector("tr[data-verdict]:not([hidden])");
      const left = rows.filter((row) => !row.hidden).length;
      shown.textContent = left === rows.length ? `all ${left} claims shown` : `${left} of ${rows.length} claims shown`;
    };
    const write = () => {
      const address = new URL(location.href);
      for (const { name, value } of [essay, verdict]) value ? address.searchParams.set(name, value) : address.searchParams.delete(name);
      address.hash = "";
      history.replaceState(history.state, "", address.href.replace(/#$/, ""));
    };
    const reveal = () => { // a link to a claim shows it, whatever is filtered
      const row = location.hash && rows.find((each) => each.id === decodeURIComponent(location.hash.slice(1)));
      if (row && row.hidden) { essay.value = verdict.value = ""; show(); row.scrollIntoView(); }
    };

    form.addEventListener("change", () => { show(); write(); });
    form.addEventListener("submit", (event) => event.preventDefault());
    window.addEventListener("hashchange", reveal);
    form.hidden = false;
    read();
    show();
    reveal();
  }
  if (window.document$) window.document$.subscribe(start);
  else start();
})();
