"""Draws docs/pipeline.svg, the diagram in README: python docs/pipeline_diagram.py"""

from __future__ import annotations

from pathlib import Path

BOXES = {  # name: (column, row, title, command)
    "text": (0, 0, "text", ""),
    "windows": (1, 0, "token windows", "utils/preprocess_dataset.py"),
    "datastore": (2, 0, "datastore", "train_base --save_knnlm_dstore"),
    "index": (3, 0, "FAISS index", "knn_utils.build_index"),
    "targets": (3, 1, "kNN distributions", "knn_utils.saveKNNMulti"),
    "memory": (2, 1, "MLP memory", "train_mlpmem_offline / online"),
    "use": (1, 1, "base + memory", "evaluate_joint, generate, …"),
    "base": (0, 1, "base model", "frozen"),
}
ARROWS = (
    *(("text", "windows"), ("windows", "datastore"), ("datastore", "index"), ("index", "targets")),
    *(("targets", "memory"), ("datastore", "memory"), ("memory", "use"), ("base", "use")),
)
WIDTH, HEIGHT, GAP_X, GAP_Y = 190, 54, 50, 46


def corner(name: str) -> tuple[int, int]:
    """The left upper corner of a box, in pixels."""
    column, row = BOXES[name][:2]
    return 10 + column * (WIDTH + GAP_X), 10 + row * (HEIGHT + GAP_Y)


def arrow(start: str, end: str) -> str:
    """A line from the edge of one box to the edge of another."""
    (x, y), (u, v) = corner(start), corner(end)
    if y == v:
        x, u = (x + WIDTH, u - 6) if x < u else (x, u + WIDTH + 6)
        y = v = y + HEIGHT // 2
    else:
        x = u = x + WIDTH // 2
        y, v = y + HEIGHT, v - 6
    return f'<line x1="{x}" y1="{y}" x2="{u}" y2="{v}" stroke="#555" stroke-width="1.5" marker-end="url(#head)"/>'


def box(name: str) -> str:
    x, y = corner(name)
    title, command = BOXES[name][2:]
    fill = "#fde9d0" if name in ("memory", "use") else "#e8eef7"
    middle = y + (23 if command else 32)
    return (
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{fill}" stroke="#555"/>'
        f'<text x="{x + WIDTH // 2}" y="{middle}" text-anchor="middle" font-size="15">{title}</text>'
        f'<text x="{x + WIDTH // 2}" y="{y + 41}" text-anchor="middle" font-size="11" fill="#444">{command}</text>'
    )


def main() -> None:
    width, height = 10 + 4 * (WIDTH + GAP_X), 20 + 2 * HEIGHT + GAP_Y
    head = '<marker id="head" markerWidth="8" markerHeight="8" refX="5" refY="3" orient="auto">'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">',
        f'<rect width="100%" height="100%" fill="white"/><defs>{head}<path d="M0,0 L6,3 L0,6 z" fill="#555"/></marker></defs>',
        *(arrow(*each) for each in ARROWS),
        *(box(name) for name in BOXES),
        "</svg>",
    ]
    Path(__file__).with_name("pipeline.svg").write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
