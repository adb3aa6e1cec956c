"""From kNN targets on disk to the tensors of a training step: rate, bytes, and that nothing dense is built."""

from __future__ import annotations

import itertools

from benchmarks import plain
from benchmarks.measure import Row, median, rounds, timed
from benchmarks.setting import Setting
from benchmarks.training_step import offline_rows, step_windows

STAGE = "target_batches"
PLAIN_ROWS = 128


def measure(setting: Setting) -> list[Row]:
    import numpy as np

    source = offline_rows(setting.prepare("targets"))
    loads = [np.arange(first, last) for first, last in step_windows(setting, source)]
    rows_read = sum(int(source.window_rows()[load].sum()) for load in loads)

    def read() -> None:
        for load in loads:
            source.rows(source.read(load))

    seconds = rounds({"read": read}, max(setting.repeats, 3))
    targets = source.read_targets(loads[0])
    arrays = (targets.id_cnt, targets.token_id, targets.prob, targets.label)
    entries, count = len(targets.token_id), len(targets.label)
    per_entry = sum(array.nbytes for array in arrays) / entries
    on_disk = sum(part.stat().st_size for part in setting.targets_path.glob("*.arrow"))
    all_entries = sum(len(source.read_targets(load).token_id) for load in loads)
    ends = np.concatenate([[0], np.cumsum(targets.id_cnt)])
    lists = [
        (targets.token_id[a:b].tolist(), targets.prob[a:b].astype(np.float32).tolist())
        for a, b in itertools.pairwise(ends)
    ]
    slow = timed(lambda: plain.dense_target(lists, source.vocabulary)) / len(lists)
    rate = rows_read / median(seconds["read"])
    detail = f"one worker, warm file, hidden states included; dense targets in a loop: {1 / slow:.0f} tokens/s"
    dense = 4 * source.vocabulary * count / 1e6
    largest = max(array.nbytes for array in arrays) / 1e6
    return [
        Row(STAGE, "rate of one worker", rate, ">=", 500_000, "tokens/s", detail),
        Row(
            STAGE,
            "bytes of a stored entry",
            max(per_entry, on_disk / all_entries),
            "<=",
            6.5,
            "bytes",
            f"{per_entry:.2f} in a batch, {on_disk / all_entries:.2f} on disk; {all_entries / rows_read:.0f} entries a row",
        ),
        Row(
            STAGE,
            "largest array of a batch, of the dense target",
            largest / dense,
            "<=",
            0.1,
            "x",
            f"{largest:.2f} MB where a dense target has {dense:.0f} MB ({count} rows)",
        ),
    ]
