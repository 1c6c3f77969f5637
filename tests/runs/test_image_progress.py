"""Progress of a job that scores a model: monotone, of all workers, and complete at the end."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.collectives import Workers
from ddpm_ray.reporting import Progress
from ddpm_ray.runs.evaluation import image_progress
from ddpm_ray.runs.evaluation.image_progress import ImageProgress


@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(1, 8), st.integers(1, 9))
def test_images_of_all_passes_are_counted_to_the_end(
    passes: list[int], count: int, size: int
) -> None:
    total, shown = sum(passes), list[Progress]()
    workers = Workers(0, count)
    progress, used = ImageProgress(total, workers, shown.append), 0
    image_progress.REPORT_EVERY_S, usual = 0.0, image_progress.REPORT_EVERY_S
    for images in passes:
        parts = torch.arange(len(workers.share(images))).split(size)
        for (index,) in progress.counted((part,) for part in parts):
            used += len(index)
    image_progress.REPORT_EVERY_S = usual
    progress.finish()
    done = [one.step for one in shown]
    assert used == sum(len(workers.share(images)) for images in passes)
    assert done == sorted(done)
    assert done[-1] == total
    assert all(total - one.step < count * len(passes) for one in shown[-2:])
    assert {one.steps for one in shown} == {total}


def test_only_the_main_worker_reports() -> None:
    shown: list[Progress] = []
    progress = ImageProgress(8, Workers(1, 2), shown.append)
    assert len(list(progress.counted([(torch.arange(4),)]))) == 1
    progress.finish()
    assert shown == []
