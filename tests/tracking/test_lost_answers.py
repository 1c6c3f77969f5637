"""MLflow away in the middle of a run, whose answers get lost, and whose workers die meanwhile."""

import threading
from pathlib import Path

import pytest

from tests.faults.lives import STEPS, Life
from tests.faults.proxy import Weather, through
from tests.noise import pack_noise

OUTAGE_S = 60.0

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_table_of_metrics_is_that_of_a_clean_run(mlflow_server: int, tmp_path: Path) -> None:
    """60 s without MLflow, a kill of a worker and one of the driver in them, 10 % of replies lost.

    Every other reset comes after the server has acted: that is a lost reply.
    """
    data = str(tmp_path / "data")
    pack_noise(data, images=45, side=4)
    clean = Life(tmp_path / "clean", data)
    clean.drive()
    assert clean.live(2)

    weather = Weather(reset=0.2)
    with through(f"http://127.0.0.1:{mlflow_server}", weather) as uri:
        life = Life(tmp_path / "fired", data, uri=uri)
        life.drive()
        assert not life.live(2, f"{tmp_path / 'first'} kill@sent:8/0")
        weather.down = True
        mended = threading.Timer(OUTAGE_S, setattr, (weather, "down", False))
        mended.start()
        assert not life.live(2, f"{tmp_path / 'second'} kill@between:16/1")
        life.drive()  # the same command, by a driver that cannot ask MLflow anything
        assert life.tracked is None
        assert weather.down
        assert life.live(2)
        mended.join()
        ended = life.end()
    assert weather.done["reset"] > 0
    assert ended.same_rows() == clean.end().same_rows()
    assert (ended.runs, ended.status) == (1, "FINISHED")
    assert [step for step, _ in ended.rows["train/loss"]] == list(range(1, STEPS + 1))
