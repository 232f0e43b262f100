// What the page does once it stands: let the keyboard reach whatever scrolls sideways, and the terms of the glossary.
(() => {
  // What can be scrolled is reached by the Tab key, and its edge is shaded where more lies beyond it.
  const SCROLLABLE = ".md-typeset__scrollwrap, .plate, div.arithmatex, .md-typeset pre > code, .md-typeset pre";
  const shade = (node) => {
    const beyond = node.scrollWidth - node.clientWidth - node.scrollLeft;
    node.classList.toggle("more-left", node.scrollLeft > 1);
    node.classList.toggle("more-right", beyond > 1);
  };
  const reach = (node) => {
    if (node.scrollWidth > node.clientWidth + 1) node.tabIndex = 0;
    else if (node.tabIndex === 0) node.removeAttribute("tabindex");
    shade(node);
  };
  // What is folded, or left for later by the style sheet's content-visibility, is measured once it is laid out: to measure
  // it earlier is slow. Until then, browsers let the Tab key reach what scrolls.
  const laidOut = (node) => !node.closest("details:not([open])")
    && ((node.firstElementChild ?? node).checkVisibility?.({ contentVisibilityAuto: true }) ?? true);
  const reachScrollable = () => [...document.querySelectorAll(SCROLLABLE)].filter(laidOut).forEach(reach);
  const reachShown = ({ target, skipped }) => {
    if (skipped) return;
    [target, ...target.querySelectorAll("*")].filter((node) => node.matches(SCROLLABLE) && laidOut(node)).forEach(reach);
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

  // What is laid out on the way to a link's target may push it away, on a busy machine seconds later: for ten of them it
  // is brought back whenever its place in the page has changed, unless the reader moves on. The address may follow the
  // headings that go by, so the target is looked up once.
  const land = () => {
    let limit = performance.now() + 10_000, target = null, place = null;
    const stop = () => { limit = 0; };
    for (const kind of ["wheel", "touchstart", "keydown", "pointerdown"])
      addEventListener(kind, stop, { once: true, passive: true });
    const settle = () => {
      if (performance.now() > limit) return;
      target ??= document.getElementById(decodeURIComponent(location.hash.slice(1)));
      const now = target && Math.round(target.getBoundingClientRect().top + scrollY);
      if (now !== place) {
        place = now;
        target?.scrollIntoView({ behavior: "instant" });
      }
      requestAnimationFrame(settle);
    };
    requestAnimationFrame(settle);
  };
  const arrive = () => { if (location.hash && performance.getEntriesByType("navigation")[0]?.type === "navigate") land(); };
  const landOnClick = ({ target }) => { if (target.closest?.("a[href*='#']")) land(); };

  const start = () => { reachTerms(); reachSearch(); };
  if (typeof document$ === "undefined") start();
  else document$.subscribe(start);
  addEventListener("resize", reachScrollable, { passive: true });
  addEventListener("load", () => { reachScrollable(); arrive(); });
  document.addEventListener("click", landOnClick);
  document.addEventListener("scroll", shadeScrolled, { capture: true, passive: true });
  document.addEventListener("contentvisibilityautostatechange", reachShown, { capture: true, passive: true });
  document.addEventListener("toggle", reachScrollable, { capture: true, passive: true }); // a fold that opens
  document.fonts?.addEventListener("loadingdone", reachScrollable);
})();
