// Shows the details of the token under the pointer or the keyboard's focus; a click keeps one until the next click.
(() => {
  const show = (event) => {
    const token = event.target.closest?.(".mlpm-token");
    const inspector = token?.closest(".mlpm-inspector");
    if (!token) return;
    if (event.type === "click") {
      const keep = inspector.dataset.pinned !== token.dataset.detail;
      inspector.dataset.pinned = keep ? token.dataset.detail : "";
      inspector.classList.toggle("mlpm-pinned", keep);
    } else if (inspector.dataset.pinned) {
      return;
    }
    for (const each of inspector.querySelectorAll(".mlpm-token")) {
      each.classList.toggle("mlpm-active", each === token);
    }
    for (const detail of inspector.querySelectorAll(".mlpm-detail")) {
      detail.hidden = detail.id !== token.dataset.detail;
    }
  };
  for (const name of ["mouseover", "focusin", "click"]) document.addEventListener(name, show);
})();
