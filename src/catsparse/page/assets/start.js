// Everything in order; and the charts once more at the width of paper.

summary();
themeSetUp();
sliderSetUp();
activations();
layers();
achieved();
quality();
speed();
byId("foot").textContent = `Made by catsparse ${DATA.version}. This page is complete in itself: it loads ` +
  "nothing, and its own policy forbids it to.";

addEventListener("beforeprint", () => {
  for (const it of charts) if (it.spec) redraw(it, it.element.closest(".pair") ? 330 : 680);
});
addEventListener("afterprint", () => {
  for (const it of charts) if (it.spec) redraw(it);
});
