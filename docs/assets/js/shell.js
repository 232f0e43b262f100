// What the page does once it stands: set the mathematics, and let the keyboard reach whatever scrolls sideways.
(() => {
  const setMathematics = () => {
    if (typeof katex === "undefined") return; // only pages with mathematics load KaTeX
    for (const node of document.querySelectorAll(".arithmatex")) {
      const source = node.textContent.trim();
      const display = source.startsWith("\\[");
      katex.render(source.slice(2, -2), node, { displayMode: display, throwOnError: false, strict: "ignore" });
    }
  };

  const reachScrollable = () => {
    for (const node of document.querySelectorAll(".md-typeset__scrollwrap, .plate, div.arithmatex, .md-typeset pre > code, .md-typeset pre")) {
      if (node.scrollWidth > node.clientWidth + 1) node.tabIndex = 0;
      else if (node.tabIndex === 0) node.removeAttribute("tabindex");
    }
  };

  // A glossary term opens on hover; the keyboard and a finger get there by focus.
  const reachTerms = () => { for (const node of document.querySelectorAll(".md-content abbr[title]")) node.tabIndex = 0; };

  const start = () => { setMathematics(); reachScrollable(); reachTerms(); };
  if (typeof document$ === "undefined") start();
  else document$.subscribe(start);
  addEventListener("resize", reachScrollable, { passive: true });
  addEventListener("load", reachScrollable);
  if (document.fonts) document.fonts.ready.then(reachScrollable);
})();
