"""What axe sees on a page: every rule once, and the contrast of each look of a text in each palette."""

from collections import Counter
from pathlib import Path

AXE = Path(__file__).parent.parent / "assets" / "axe.min.js"

# axe fetches every style sheet once more for one experimental rule, which is off: it preloads sound and film alone.
AXE_RUN = """(left_out) => axe.run(document, {
  resultTypes: ["violations"], preload: {assets: ["media"]},
  rules: Object.fromEntries(left_out.map((rule) => [rule, {enabled: false}])),
}).then((found) => found.violations
  .filter((v) => ["serious", "critical"].includes(v.impact))
  .map((v) => "axe " + v.id + ": " + v.nodes.slice(0, 3).map((n) => n.target.join(" ")).join(" | ")))"""
OF_COLOUR = ["color-contrast", "link-in-text-block"]  # axe's rules that look at colours

# Two thirds of axe's time are its rule of contrast, for every text of every page. Texts of one look have one contrast:
# of the same colours, size and weight, over the same backgrounds. So have links of one look in a text of one look. Axe
# gets a text and a link of each look that is not known; its faults come back, the looks that it passed, and the others.
AXE_LOOKS = """async ([looks, rules]) => {
  const known = new Set(looks), texts = new Map(), links = new Map(), behind = new Map();
  const bare = ["rgba(0, 0, 0, 0)", "none", "1", "none", "normal", "none"].join();
  const backgrounds = (node) => {
    if (!node) return "";
    if (!behind.has(node)) {
      const {backgroundColor, backgroundImage, opacity, filter, mixBlendMode, maskImage} = getComputedStyle(node);
      const own = [backgroundColor, backgroundImage, opacity, filter, mixBlendMode, maskImage].join();
      behind.set(node, backgrounds(node.parentElement) + (own === bare ? "" : own + " > "));
    }
    return behind.get(node);
  };
  const look = (node) => {
    const {color, fontSize, fontWeight, fontStyle, textShadow, textDecoration, borderBottom} = getComputedStyle(node);
    return [color, fontSize, fontWeight, fontStyle, textShadow, textDecoration, borderBottom, backgrounds(node)].join();
  };
  const isShown = (node) => node.checkVisibility({visibilityProperty: true});
  const take = (looks, name, node) => known.has(name) || looks.has(name) || looks.set(name, node);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), met = new Set();
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (met.has(node) || !walker.currentNode.data.trim()) continue;
    met.add(node);
    if (isShown(node)) take(texts, "text " + look(node), node);
  }
  const length = (node) => node.textContent.trim().length;
  for (const link of document.querySelectorAll("a[href]")) {
    let block = link.parentElement;
    while (getComputedStyle(block).display.startsWith("inline")) block = block.parentElement;
    const linked = [...block.querySelectorAll("a[href]")].reduce((sum, one) => sum + length(one), 0);
    const within = [block.localName, Math.sign(length(block) - 2 * linked)];  // axe asks for more text than links
    const all = ["link", look(link), getComputedStyle(link).display, look(link.parentElement), within];
    if (isShown(link)) take(links, all.join(), link);
  }
  if (!texts.size && !links.size) return [[], [], []];
  const {violations, passes} = await axe.run({include: [...new Set([...texts.values(), ...links.values()])]}, {
    resultTypes: ["violations", "passes"], elementRef: true, preload: {assets: ["media"]},
    runOnly: {type: "rule", values: rules},
  });
  const elements = (found) => new Set(found.flatMap((one) => one.nodes.map((n) => n.element)));
  const right = elements(passes.filter((one) => one.id === "color-contrast")), wrong = elements(violations);
  const judged = [
    ...[...texts].map(([name, node]) => [name, wrong.has(node) ? "wrong" : right.has(node) ? "right" : "none"]),
    ...[...links].map(([name, node]) => [name, wrong.has(node) ? "wrong" : "right"]),
  ];
  const of = (kind) => judged.filter(([_, judgement]) => judgement === kind).map(([name, _]) => name);
  return [
    violations.map((v) => "axe " + v.id + ": " + v.nodes.slice(0, 3).map((n) => n.target.join(" ")).join(" | ")),
    of("right"), of("none"),
  ];
}"""

# How often axe was asked of each look in each palette, by all pages so far; TIMES once it has passed. Of some it never
# judges: what a figure writes, what is there for a screen reader alone.
TIMES = 3
ASKED: dict[str, Counter[str]] = {palette: Counter() for palette in ("light", "dark")}


def load_axe(page) -> None:
    """Give the page that is shown axe, which its policy would not let it load."""
    page.evaluate(AXE.read_text(encoding="utf-8") + ";0")


def faults_by_axe(page, palette: str, *, all_rules: bool, every_text: bool) -> list[str]:
    """What axe sees on the page in its present palette.

    Args:
        page: a window that shows the page, and has axe.
        palette: its palette.
        all_rules: whether all of axe's rules are asked, or those of colour alone.
        every_text: whether the rules of colour look at every text of the page; if not, then at one of each look that
            has not passed in this palette before.
    """
    faults = page.evaluate(AXE_RUN, [] if every_text else OF_COLOUR) if all_rules else []
    if not every_text:
        asked = ASKED[palette]
        known = [look for look, times in asked.items() if times >= TIMES]
        found, passed, unjudged = page.evaluate(AXE_LOOKS, [known, OF_COLOUR])
        faults += found
        asked.update(dict.fromkeys(passed, TIMES) | dict.fromkeys(unjudged, 1))
    return faults
