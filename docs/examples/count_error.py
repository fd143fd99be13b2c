"""A metric: mean absolute error of the number of objects per image, summed over the thing classes.

evaluate.metrics: [{kind: count_error:CountError, options: {min_score: 0.5}}]
"""

from collections import Counter

from mpformer.evaluate.prediction import Prediction
from mpformer.evaluate.truth import Truth


class CountError:
    def __init__(self, min_score: float = 0.5) -> None:
        self.min_score = min_score
        self.errors: list[int] = []

    def update(self, prediction: Prediction, truth: Truth) -> None:
        found = Counter(one.label for one in prediction.instances or () if one.score >= self.min_score)
        things = truth.classes.thing_labels
        true = Counter(one.label for one in truth.instances if one.label in things and not one.crowd)
        self.errors.append(sum(abs(found[label] - true[label]) for label in found | true))

    def compute(self) -> dict[str, float]:
        return {"count_error": sum(self.errors) / len(self.errors) if self.errors else float("nan")}
