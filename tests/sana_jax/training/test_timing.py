"""Clocks that tick when they are told to."""

import pytest

from sana_jax.training.timing import Clocks


class Time:
    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds

    def go(self, seconds):
        self.seconds += seconds


def clocks(**kwargs):
    time = Time()
    return time, Clocks(clock=time, now=time, **kwargs)


def test_a_line_counts_since_the_last():
    time, made = clocks(peak=100.0)
    for _ in range(4):
        with made.apart("data"):
            time.go(0.5)
        time.go(1.5)
        made.step(images=6, flops=80.0)
    with made.apart("save"):
        time.go(2.0)
    line = made.line(bad={"damaged": 3})
    assert line["images_per_second"] == pytest.approx(24 / 10)
    assert line["seconds_per_step"] == pytest.approx(10 / 4)
    assert line["mfu"] == pytest.approx(320 / 10 / 100)
    assert line["data_wait"] == pytest.approx(0.2)
    assert line["apart"] == pytest.approx({"data": 2.0, "save": 2.0})
    assert line["productive_seconds"] == pytest.approx(6.0)
    assert line["goodput"] == pytest.approx(0.6)
    assert line["bad"] == {"damaged": 3}

    time.go(5.0)
    made.step(images=10, flops=100.0)
    line = made.line()
    assert line["images_per_second"] == pytest.approx(2.0)
    assert (line["apart"], line["data_wait"], line["bad"]) == ({}, 0, {})
    assert line["productive_seconds"] == pytest.approx(11.0)
    assert line["wall_seconds"] == pytest.approx(15.0)


def test_a_block_inside_another_is_counted_once():
    time, made = clocks()
    with made.apart("preview"):
        time.go(1.0)
        with made.apart("compile"):
            time.go(4.0)
        time.go(2.0)
    assert made.line()["apart"] == pytest.approx({"preview": 3.0, "compile": 4.0})


def test_time_apart_counts_when_the_block_fails():
    time, made = clocks()
    with pytest.raises(OSError), made.apart("save"):
        time.go(3.0)
        raise OSError
    assert made.line()["apart"] == {"save": 3.0}


def test_goodput_remembers_earlier_processes_and_the_time_between():
    time, made = clocks(began=900.0, productive=30.0)  # 70 of 100 seconds were lost
    time.go(50.0)
    line = made.line()
    assert line["wall_seconds"] == pytest.approx(150.0)
    assert line["goodput"] == pytest.approx(80 / 150)


@pytest.mark.parametrize("peak, flops", [(None, 5.0), (100.0, None)])
def test_no_mfu_where_something_is_unknown(peak, flops):
    time, made = clocks(peak=peak)
    time.go(1.0)
    made.step(images=1, flops=1.0)
    made.step(images=1, flops=flops)
    assert made.line()["mfu"] is None


def test_nothing_is_divided_by_zero():
    _, made = clocks()
    line = made.line()
    assert line["seconds_per_step"] is None and line["images_per_second"] == 0
