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

  // On the page for lost readers, a link opens the search; a click on its label does so by itself.
  const reachSearch = () => {
    document.querySelector(".lost-search a")?.addEventListener("click", (event) => {
      event.preventDefault();
      document.getElementById("__search").click();
    });
  };

  const start = () => { reachScrollable(); reachTerms(); reachSearch(); };
  if (typeof document$ === "undefined") start();
  else document$.subscribe(start);
  addEventListener("resize", reachScrollable, { passive: true });
  addEventListener("load", reachScrollable);
  if (document.fonts) document.fonts.ready.then(reachScrollable);
})();
