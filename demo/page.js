// Shows the details of the token under the pointer or the keyboard's focus; a click keeps one until the next click.
(() => {
  const show = (token) => {
    const inspector = token.closest(".mlpm-inspector");
    for (const other of inspector.querySelectorAll(".mlpm-token.mlpm-active")) {
      other.classList.remove("mlpm-active");
      other.tabIndex = -1;
    }
    token.classList.add("mlpm-active");
    token.tabIndex = 0;
    for (const detail of inspector.querySelectorAll(".mlpm-detail")) {
      detail.hidden = detail.id !== token.dataset.detail;
    }
  };
  const tokenOf = (event) => event.target.closest?.(".mlpm-token");
  const pinned = (token) => token.closest(".mlpm-inspector").dataset.pinned;

  document.addEventListener("mouseover", (event) => {
    const token = tokenOf(event);
    if (token && !pinned(token)) show(token);
  });
  document.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (!token) return;
    const inspector = token.closest(".mlpm-inspector");
    const keep = inspector.dataset.pinned !== token.dataset.detail;
    inspector.dataset.pinned = keep ? token.dataset.detail : "";
    inspector.classList.toggle("mlpm-pinned", keep);
    show(token);
  });
  document.addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!token || !step) return;
    const tokens = [...token.closest(".mlpm-inspector").querySelectorAll(".mlpm-token")];
    const next = tokens[tokens.indexOf(token) + step];
    if (!next) return;
    event.preventDefault();
    const inspector = token.closest(".mlpm-inspector");
    if (inspector.dataset.pinned) inspector.dataset.pinned = next.dataset.detail;
    show(next);
    next.focus();
  });
})();
