// What the page does once it stands: let the keyboard reach whatever scrolls sideways, and the terms of the glossary.
(() => {
  // What can be scrolled is reached by the Tab key, and its edge is shaded where more lies beyond it.
  const SCROLLABLE = ".md-typeset__scrollwrap, .plate, div.arithmatex, .md-typeset pre > code, .md-typeset pre";
  const shade = (node) => {
    const beyond = node.scrollWidth - node.clientWidth - node.scrollLeft;
    node.classList.toggle("more-left", node.scrollLeft > 1);
    node.classList.toggle("more-right", beyond > 1);
  };
  const reachScrollable = () => {
    for (const node of document.querySelectorAll(SCROLLABLE)) {
      if (node.closest("details:not([open])")) continue; // to measure what is folded would have it laid out
      if (node.scrollWidth > node.clientWidth + 1) node.tabIndex = 0;
      else if (node.tabIndex === 0) node.removeAttribute("tabindex");
      shade(node);
    }
  };
  const shadeScrolled = ({ target }) => { if (target.matches?.(SCROLLABLE)) shade(target); };

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
  document.addEventListener("scroll", shadeScrolled, { capture: true, passive: true });
  document.addEventListener("toggle", reachScrollable, { capture: true, passive: true }); // a fold that opens
  if (document.fonts) document.fonts.ready.then(reachScrollable);
})();
