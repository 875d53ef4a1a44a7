from tests.tuning.test_results import trial
from tuning.report.plots import draw_plots
from tuning.results import Importance
from tuning.space import Axis


def test_every_plot_is_drawn_also_of_choices_and_stopped_trials() -> None:
    space = {"smgs_weight": Axis(low=0.0, high=1.0), "mode": Axis(choices=("a", "b"))}
    trials = [
        trial(0, settings={"smgs_weight": 0.1, "mode": "a"}),
        trial(1, settings={"smgs_weight": 0.9, "mode": "b"}, steps=(25,), validation=(0.5,)),
        trial(2, settings={"smgs_weight": 0.9, "mode": "b"}, steps=(), validation=()),
    ]
    importances = {
        "mode": Importance(share=0.9, low=0.7, high=0.95, by_chance=0.6),
        "smgs_weight": Importance(share=0.1, low=0.05, high=0.3, by_chance=0.6),
    }
    plots = draw_plots(trials, trials[0], space, importances)
    assert set(plots) == {
        "trials",
        "value_over_time",
        "slices",
        "parallel_coordinates",
        "importances",
    }
    assert all(picture.width >= 700 for picture in plots.values())
