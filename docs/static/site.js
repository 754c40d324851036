// Draws the formulas, shows the current chapter in the middle of the sidebar, and cuts
// figures into the panels that stand one above the other on a phone (site.css).
document.querySelectorAll(".formula").forEach((e) =>
  katex.render(e.dataset.tex, e, { displayMode: e.tagName === "DIV", throwOnError: false })
);
const box = document.querySelector(".sidebar-scroll");
const here = document.querySelector(".sidebar-tree .current-page");
if (box && here) {
  const middle = here.getBoundingClientRect().top - box.getBoundingClientRect().top;
  box.scrollTo({ top: middle - box.clientHeight / 2, behavior: "instant" });
}
// in tables, long code may break anywhere, and "89.8 ± 0.8 [5]" nowhere
document.querySelectorAll("td code").forEach((e) => e.classList.toggle("long", e.textContent.length > 24));
document.querySelectorAll("article td").forEach((e) => e.classList.toggle("short", e.parentElement.children.length < 7 && /^[^a-z]*±[^a-z]*$/.test(e.textContent)));
document.querySelectorAll("img[class*='panels-']").forEach((whole) => {
  const edges = whole.className.match(/panels-([\d-]+)/)[1].split("-").map(Number);
  edges.slice(1).forEach((edge, k) => {
    const panel = document.createElement("span");
    const image = whole.cloneNode();
    panel.className = "panel";
    panel.style.width = `${edge - edges[k]}px`;
    image.className = "";
    image.alt = k ? "" : whole.alt;
    image.style.width = `${edges.at(-1)}px`;
    image.style.marginLeft = `-${edges[k]}px`;
    panel.append(image);
    whole.before(panel);
  });
  whole.classList.add("whole");
});
