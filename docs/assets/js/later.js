// The search index is the largest file of a page, and few readers search. It is fetched when the search is first opened.
// This runs before the theme's script, which would ask for it at once.
(() => {
  const asked = new Promise((resolve) => {
    if (/[?&][qh]=/.test(location.search)) resolve(); // a link that carries a search
    document.addEventListener("focusin", (event) => { if (event.target.matches(".md-search__input")) resolve(); });
    document.addEventListener("change", (event) => { if (event.target.id === "__search") resolve(); });
    document.addEventListener("pointerover", (event) => { if (event.target.closest?.(".md-search, [for=__search]")) resolve(); });
  });
  const { open, send } = XMLHttpRequest.prototype;
  XMLHttpRequest.prototype.open = function (method, address, ...rest) {
    if (String(address).endsWith("search/search_index.json")) this.send = (body) => { asked.then(() => send.call(this, body)); };
    return open.call(this, method, address, ...rest);
  };
})();
