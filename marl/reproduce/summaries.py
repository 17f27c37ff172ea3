"""What the runs of a panel say in a few sentences: the verdicts on KNIFE, and what else does at least as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from marl.reproduce.figures.figure import Measure, Panel, Runs, scores_of
from marl.reproduce.statistics import Difference, Scores, holm, paired_difference
from marl.reproduce.verdict import LEVEL, Judgement, judge

__all__ = ["judged", "summary"]

OURS = "KNIFE"
"""How the arms begin that the claims are about."""


def summary(panel: Panel, runs: Runs) -> Iterator[str]:
    """A line for each of KNIFE's arms: what is solved, what became of the units, and which arms beat it."""
    solved, units, *_ = panel.measures
    on_solved, on_units = judged(panel, runs, solved), judged(panel, runs, units)
    for name in (each for each in on_solved if each.startswith(OURS)):
        claims = [_claim(panel, runs, solved, (name, on_solved[name]))]
        if name in on_units:
            claims.append(_claim(panel, runs, units, (name, on_units[name])))
        yield f"- **{name}**: {'; '.join(claims)}. {_rivals(runs, solved, name)}"


def judged(panel: Panel, runs: Runs, measure: Measure) -> dict[str, Judgement]:
    """The judgement of each arm that has runs; empty where a control has none."""
    _, scores = scores_of(runs, measure)
    controls = (panel.nothing, panel.optimizer)
    if any(control not in scores for control in controls):
        return {}
    methods = [name for name in scores if name not in controls]
    less, smallest = measure.is_less_better, measure.smallest_effect
    return judge(scores, methods, controls=controls, is_less_better=less, smallest_effect=smallest)


def _claim(panel: Panel, runs: Runs, measure: Measure, found: tuple[str, Judgement]) -> str:
    scores, (name, judgement) = scores_of(runs, measure)[1], found
    own, nothing, optimizer = (f"{scores[arm].mean():.2f}" for arm in (name, panel.nothing, panel.optimizer))
    return (
        f"{measure.name} {own} against {nothing} without and {optimizer} with a fresh optimizer: "
        f"*{judgement.verdict.value}*"
    )


def _rivals(runs: Runs, measure: Measure, name: str) -> str:
    """The arms that are better on the same seeds, so that whoever reads of a success reads of simpler ones as well."""
    better = _better(scores_of(runs, measure)[1], name, sign=-1.0 if measure.is_less_better else 1.0)
    if not better:
        return f"No other arm is better at {measure.name}."
    return f"Better at {measure.name}: " + "; ".join(f"{arm} by {by}" for arm, by in better.items()) + "."


def _better(scores: Mapping[str, Scores], name: str, *, sign: float) -> dict[str, Difference]:
    others = {
        arm: paired_difference(sign * own, sign * scores[name])
        for arm, own in scores.items()
        if not arm.startswith(OURS)
    }
    adjusted = holm({arm: by.p_value for arm, by in others.items()})
    return {arm: by for arm, by in others.items() if by.is_above_zero and adjusted[arm] < LEVEL}
