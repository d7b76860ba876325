"""When alarms are raised and cleared, and that they follow from the metrics alone."""

from __future__ import annotations

import json
import math

import pytest

from opd_store import InvalidArgumentError
from opd_train.training.monitors import Alarm, AlarmKind, DriftConfig, DriftMonitor

GOOD = {
    "ess": 0.95,
    "chi2": 0.05,
    "ratio_mean": 1.0,
    "capped": 0.01,
    "dropped": 0.0,
    "teacher_mass": 0.99,
    "student_mass": 0.98,
    "forward_kl": 0.5,
}


def changes(rows, **config):
    """(step, rule, raised) of every alarm of a run."""
    monitor = DriftMonitor(DriftConfig(**config))
    found = [alarm for step, row in enumerate(rows, start=1) for alarm in monitor.update(step, row)]
    return [(alarm.step, alarm.rule, alarm.raised) for alarm in found], monitor


def series(metric, values):
    return [GOOD | {metric: value} for value in values]


CASES = {
    "ess": ("ess", 0.4, "ess_min", AlarmKind.DRIFT),
    "chi2": ("chi2", 1.3, "chi2_max", AlarmKind.DRIFT),
    "low ratio": ("ratio_mean", 0.7, "ratio_mean_min", AlarmKind.DRIFT),
    "high ratio": ("ratio_mean", 1.4, "ratio_mean_max", AlarmKind.DRIFT),
    "capped": ("capped", 0.3, "capped_max", AlarmKind.CORRECTION),
    "dropped": ("dropped", 0.3, "dropped_max", AlarmKind.CORRECTION),
    "teacher mass": ("teacher_mass", 0.7, "teacher_mass_min", AlarmKind.COVERAGE),
    "student mass": ("student_mass", 0.3, "student_mass_min", AlarmKind.COVERAGE),
    "diverging": ("forward_kl", 0.9, "kl_growth_max", AlarmKind.DIVERGENCE),
}


@pytest.mark.parametrize(("metric", "bad", "rule", "kind"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("value", ["bad", "nan"])
def test_each_threshold_is_raised_once_and_cleared_once(metric, bad, rule, kind, value):
    bad = math.nan if value == "nan" else bad
    rows = series(metric, [GOOD[metric]] * 4 + [bad] * 6 + [GOOD[metric]] * 6)
    found, monitor = changes(rows, smooth_steps=2)
    # What is not a number is on the wrong side of both thresholds of a ratio.
    found = [change for change in found if value == "bad" or change[1] == rule]
    assert [(name, raised) for _, name, raised in found] == [(rule, True), (rule, False)]
    raised, cleared = found[0][0], found[1][0]
    assert raised in (5, 6)
    assert cleared in (11, 12)
    assert monitor.active == ()
    monitor = DriftMonitor(DriftConfig(smooth_steps=1))
    for step, row in enumerate(rows[:5]):
        alarms = monitor.update(step, row)
    alarm = next(alarm for alarm in alarms if alarm.rule == rule)
    assert alarm.kind is kind
    assert rule in monitor.active
    assert monitor.has_drifted == (kind is AlarmKind.DRIFT)
    if value == "bad":
        assert alarm.advice in str(alarm)
        assert ("re-roll out now" in str(alarm)) == (kind is AlarmKind.DRIFT)


def test_a_good_run_raises_nothing():
    assert changes([GOOD] * 40)[0] == []


def test_one_bad_step_in_ten_is_no_drift():
    assert changes(series("ess", [0.95] * 5 + [0.1] + [0.95] * 20))[0] == []


def test_nothing_is_judged_before_there_are_enough_steps():
    assert changes(series("ess", [0.1] * 9), smooth_steps=10)[0] == []
    assert changes(series("ess", [0.1] * 10), smooth_steps=10)[0] == [(10, "ess_min", True)]
    # A metric of every third step is judged after so many values of its own.
    rows = [{"ess": 0.1} if step % 3 == 0 else {} for step in range(9)]
    assert changes(rows, smooth_steps=3)[0] == [(7, "ess_min", True)]


def test_noise_around_a_threshold_does_not_repeat_an_alarm():
    found, _ = changes(series("ess", [0.49, 0.51] * 20), smooth_steps=1)
    assert found == [(1, "ess_min", True)]
    found, _ = changes(series("chi2", [1.01, 0.99] * 20), smooth_steps=1)
    assert found == [(1, "chi2_max", True)]


def test_a_threshold_of_none_is_off():
    rows = series("ess", [0.1] * 5)
    assert changes(rows, smooth_steps=1, ess_min=None)[0] == []


def test_a_divergence_of_next_to_nothing_may_double():
    assert changes(series("forward_kl", [1e-5, 1e-3, 5e-3]), smooth_steps=1)[0] == []
    rows = [{"reverse_kl": value} for value in (1.0, 0.4, 0.5, 0.7)]
    assert changes(rows, smooth_steps=1)[0] == [(4, "kl_growth_max", True)]


@pytest.mark.parametrize("cut", range(0, 16, 3))
def test_alarms_after_a_resume_are_those_of_a_run_that_was_not_cut(cut):
    rows = series("ess", [0.95] * 4 + [0.3] * 6 + [0.95] * 6)
    config = DriftConfig(smooth_steps=3)
    whole, first, second = (DriftMonitor(config) for _ in range(3))
    expected = [whole.update(step, row) for step, row in enumerate(rows)]
    found = [first.update(step, row) for step, row in enumerate(rows[:cut])]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.update(step, row) for step, row in enumerate(rows) if step >= cut]
    assert found == expected
    assert second.state_dict() == whole.state_dict()


def test_reset_forgets_everything():
    _, monitor = changes(series("ess", [0.1] * 20), smooth_steps=5)
    assert monitor.has_drifted
    monitor.reset()
    assert monitor.state_dict() == DriftMonitor().state_dict()


def test_an_alarm_as_json():
    _, monitor = changes([], smooth_steps=1)
    (alarm,) = monitor.update(3, {"ess": 0.25})
    assert isinstance(alarm, Alarm)
    assert json.loads(json.dumps(alarm.to_json())) == {
        "kind": "drift",
        "rule": "ess_min",
        "metric": "ess",
        "step": 3,
        "value": 0.25,
        "threshold": 0.5,
        "raised": True,
    }


@pytest.mark.parametrize(
    ("config", "part"),
    [({"smooth_steps": 0}, "smooth_steps"), ({"ess_min": -1.0}, "ess_min"), ({"chi2_max": math.inf}, "chi2")],
)
def test_impossible_thresholds(config, part):
    with pytest.raises(InvalidArgumentError, match=part):
        DriftConfig(**config)
