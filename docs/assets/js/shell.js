// What the page does once it stands: let the keyboard reach whatever scrolls sideways, and the terms of the glossary.
(() => {
  const reachScrollable = () => {
    for (const node of document.querySelectorAll(".md-typeset__scrollwrap, .plate, div.arithmatex, .md-typeset pre > code, .md-typeset pre")) {
      if (node.scrollWidth > node.clientWidth + 1) node.tabIndex = 0;
      else if (node.tabIndex === 0) node.removeAttribute("tabindex");
    }
  };

  // A glossary term opens on hover; the keyboard and a finger get there by focus.
  const reachTerms = () => { for (const node of document.querySelectorAll(".md-content abbr[title]")) node.tabIndex = 0; };

  const start = () => { reachScrollable(); reachTerms(); };
  if (typeof document$ === "undefined") start();
  else document$.subscribe(start);
  addEventListener("resize", reachScrollable, { passive: true });
  addEventListener("load", reachScrollable);
  if (document.fonts) document.fonts.ready.then(reachScrollable);
})();
