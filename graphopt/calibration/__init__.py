"""What a model's activations look like on real text, for passes that need to know."""

from graphopt.calibration.record import Calibration
from graphopt.calibration.statistics import InputStatistics, Magnitudes

__all__ = ["Calibration", "InputStatistics", "Magnitudes"]
